"""The activation behind a norm and in front of a gate, and the way back through it."""

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)  # of "leaky_relu"


@triton.jit
def rectified(x, below, ACTIVATION: tl.constexpr):
    """x, times the activation's slope where the argument of the activation is `below` zero. ACTIVATION: None, "relu" or
    "leaky_relu", as in activations.py.

    act(h) is rectified(h, h < 0, ACTIVATION), or with h <= 0; dL/dh is rectified(dL/dact(h), h <= 0, ACTIVATION). A NaN
    passes, as in torch.
    """
    if ACTIVATION == "relu":
        x = tl.where(below, 0.0, x)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(below, x * LEAKY_SLOPE, x)
    return x
