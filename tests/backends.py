"""The backends that can be tested on this machine, by name."""

from sfg_fast.backends import available

FAST = ["masked"] + ["native"] * available("native")
PACKED = FAST + ["triton"] * available("triton")  # in Triton's interpreter, which is slow
EVERY = ["reference", *PACKED]
