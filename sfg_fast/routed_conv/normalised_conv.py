"""A routed convolution behind a plain batch normalisation and a ReLU: residual blocks on streams are made of nothing
else (layers/streams.py)."""

from __future__ import annotations

from torch import Tensor, nn

from ..kernels.contract import reads_normalised
from ..kernels.spec import Norm, RoutedConv
from ..norm import count_batch, move_statistics, values_of_each_channel
from . import eager
from .convolve import routed_conv
from .run import decide


def normalised_conv(
    norm: nn.BatchNorm2d | None,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(norm(u)), plus `residual` or with another ReLU behind it (`relu`). And u [N, columns, H,
    W] once more, for a shortcut around both: the backward pass then adds the gradients of both paths in one go.

    If the kernels can, they normalise u while they read it. Then relu(norm(u)) is never stored, which saves half of the
    tensors of a residual block.
    """
    if type(norm) is not nn.BatchNorm2d or not norm.training:
        return routed_conv(nn.functional.relu(u if norm is None else norm(u)), weight, bias, spec, relu, residual), u
    run = decide(u, weight, spec)
    kernels = run.normalising(values_of_each_channel(u)) if run.dtype == u.dtype else None
    if kernels is None:
        return routed_conv(nn.functional.relu(norm(u)), weight, bias, spec, relu, residual, run=run), u
    how = Norm(norm.weight, norm.bias, None, norm.eps, "relu")
    if reads_normalised(kernels) and not relu and not run.by_operators:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        running = norm.running_mean, norm.running_var, count_batch(norm)
        residual = None if residual is None else residual.to(u.dtype)
        return eager.normalised_conv(u, how, running, weight, bias, residual, run)
    h, again, mean, var, _ = eager.normalise(u, how, None, kernels)
    move_statistics(norm, mean, var, values_of_each_channel(u))
    return routed_conv(h, weight, bias, spec, relu, residual, run=run), again
