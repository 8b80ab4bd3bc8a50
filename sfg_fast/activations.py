"""The activations that layers and kernels know by name. They stand before the gate (layers/conv.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Activation = str | Callable[[Tensor], Tensor] | None


def relu_pool(h: Tensor) -> Tensor:
    """ReLU, and the maximum of each 2x2 window; an odd last row or column is left out."""
    return F.max_pool2d(F.relu(h), 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu_pool": relu_pool}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Of a callable `x` itself is left alone, whatever it does in place: others read it, too."""
    if activation is None:
        return x
    if isinstance(activation, str):
        return ACTIVATIONS[activation](x)
    return activation(x.clone() if getattr(activation, "inplace", False) else x)
