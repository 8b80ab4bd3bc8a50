"""The arithmetic of the routed convolution, and nothing else: no autograd, no modules, no random numbers.

This folder is installed, and imported, as `sfg_fast.kernels`. `contract.py` says what a backend offers, `spec.py` what
a routed convolution is: who reads whom, and the geometry. The backends are `masked.py`, `cpu/` and `triton/`.
"""
