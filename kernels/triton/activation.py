"""The activation behind a norm and in front of a gate, and the way back through it.

A kernel is compiled for one ACTIVATION: None, "relu" or "leaky_relu", as in activations.py. A NaN passes, as in torch.
"""

import triton
import triton.language as tl

from ... import activations

LEAKY_SLOPE = tl.constexpr(activations.LEAKY_SLOPE)


@triton.jit
def activated(h, below, ACTIVATION: tl.constexpr):
    """act(h). `below`: which h a ReLU sets to zero, h < 0 or h <= 0. Both are right, but compile to different code."""
    if ACTIVATION == "relu":
        h = tl.where(below, 0.0, h)
    elif ACTIVATION == "leaky_relu":
        h = tl.maximum(h, h * LEAKY_SLOPE)  # `where` takes more registers: a tile of the gates' gradient would spill
    return h


@triton.jit
def through_activation(g, h, ACTIVATION: tl.constexpr):
    """dL/dh, where g is dL/dact(h)."""
    if ACTIVATION == "relu":
        g = tl.where(h <= 0, 0.0, g)
    elif ACTIVATION == "leaky_relu":
        g = tl.where(h <= 0, g * LEAKY_SLOPE, g)
    return g
