"""The activations that layers and kernels know by name. They stand before the gate (layers/conv.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

Activation = str | Callable[[Tensor], Tensor] | None


def relu_pool(h: Tensor) -> Tensor:
    """ReLU, and then the maximum of each 2x2 window of [N, C, H, W]; an odd last row or column is left out."""
    return F.max_pool2d(F.relu(h), 2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # of slope 0.01
    "relu_pool": relu_pool,
}


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
