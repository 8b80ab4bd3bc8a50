"""The activations that layers and kernels know by name. They stand before the gate (layers/conv.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Activation = str | Callable[[Tensor], Tensor] | None

LEAKY_SLOPE = 0.01
"""The slope of "leaky_relu" below zero, in layers, kernels and networks."""


def leaky_relu(h: Tensor) -> Tensor:
    """LeakyReLU of slope `LEAKY_SLOPE`."""
    return F.leaky_relu(h, LEAKY_SLOPE)


def relu_pool(h: Tensor) -> Tensor:
    """ReLU, and then the maximum of each 2x2 window of [N, C, H, W]; an odd last row or column is left out."""
    return F.max_pool2d(F.relu(h), 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": leaky_relu,
    "relu_pool": relu_pool,
}


def check_activation(activation: Activation) -> None:
    """Raises ValueError for an activation with an unknown name, and for a class in place of an instance."""
    if isinstance(activation, str) and activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation={activation!r} is unknown, expected None, {known} or a callable")
    if isinstance(activation, type):
        name = activation.__name__
        raise ValueError(f"activation is the class {name}, expected an instance: {name}()")


def activate(x: Tensor, activation: Activation, kernels: Tensor | None = None) -> Tensor:
    """activation(x). A module that works in place is given a copy of x, because others read x, too. (If a function
    works in place, torch's autograd raises an error.)

    `kernels`, int64 [C], says which kernel each channel of x [N, C, H, W] is: an `nn.PReLU` with a slope for each
    kernel needs it. None: channel k is kernel k."""
    if activation is None:
        return x
    if isinstance(activation, str):
        return ACTIVATIONS[activation](x)
    if isinstance(activation, nn.PReLU) and activation.num_parameters > 1:
        return F.prelu(x, activation.weight if kernels is None else activation.weight[kernels])
    modules = activation.modules() if isinstance(activation, nn.Module) else ()
    return activation(x.clone() if any(getattr(module, "inplace", False) for module in modules) else x)
