"""Batch normalisation beside a routed convolution, by kernels that do it in one go with what stands around it.

Everything else of the normalisation is plain torch (norm.py).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..activations import Activation
from ..groups import FilterGroups
from ..kernels.contract import Normalises, normalises, reads_normalised
from ..kernels.spec import BatchNorm, RoutedConv
from ..norm import KernelNorm, count_batch, keep_statistics, values_of_each_channel
from . import eager
from .convolve import routed_conv
from .run import Run, decide


class Normalised(NamedTuple):
    """What `normalise_and_gate` returns."""

    h: Tensor  # act(norm(u)) + residual [N, rows, H, W]; the drawn gates have their gradient already
    scale: Tensor | None  # [1, rows]: of the undrawn rows, if their gates learn
    shift: Tensor | None


def in_one_go(norm: KernelNorm, run: Run, u: Tensor, groups: FilterGroups, activation: Activation) -> Normalises | None:
    """The kernels of this run, which convolved, if they can do `normalise_and_gate` on u [N, rows, H, W], or None."""
    if not norm.training or groups.full or norm.synchronised or activation not in run.kernels.KNOWS:
        return None
    return _normalising(run, u)


def normalise_and_gate(
    norm: KernelNorm,
    u: Tensor,
    groups: FilterGroups,
    activation: Activation,
    residual: Tensor | None,
    kernels: Normalises,
) -> Normalised:
    """Normalisation by the batch, activation, sum with `residual` and drawn gates of u [N, rows, H, W] in one go. The
    running statistics of `norm` move."""
    assert groups.gates is not None
    assert groups.assignment is not None
    assert activation is None or isinstance(activation, str)
    gates = groups.gates if groups.learns else None
    how = BatchNorm(norm.weight, norm.bias, groups.order, norm.eps, activation)
    h, _, mean, var, affine = eager.batch_norm(u, how, residual, kernels, gates, groups)
    count = values_of_each_channel(u)
    kernels.keep_statistics(mean, var, groups.assignment, count, norm.momentum, norm.running)
    return Normalised(h, None, None) if affine is None else Normalised(h, affine[:1], affine[1:])


def normalised_conv(
    norm: nn.BatchNorm2d | None,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(norm(u)), plus `residual` or with another ReLU behind it (`relu`); and u [N, columns, H,
    W] once more, for a shortcut around both: the gradient that comes through it is added where their own is made.

    Kernels that can normalise u as they read it; then relu(norm(u)) is never stored. Residual blocks on streams are
    made of nothing else (layers/streams.py): of their tensors this saves half.
    """
    if type(norm) is not nn.BatchNorm2d or not norm.training:
        return routed_conv(nn.functional.relu(u if norm is None else norm(u)), weight, bias, spec, relu, residual), u
    run = decide(u, weight, spec)
    kernels = _normalising(run, u) if run.dtype == u.dtype else None
    if kernels is None:
        return routed_conv(nn.functional.relu(norm(u)), weight, bias, spec, relu, residual, run=run), u
    how = BatchNorm(norm.weight, norm.bias, None, norm.eps, "relu")
    if reads_normalised(kernels) and not relu and not run.by_operators:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        running = norm.running_mean, norm.running_var, count_batch(norm)
        residual = None if residual is None else residual.to(u.dtype)
        return eager.normalised_conv(u, how, running, weight, bias, residual, run)
    h, again, mean, var, _ = eager.batch_norm(u, how, None, kernels)
    keep_statistics(norm, mean, var, values_of_each_channel(u))
    return routed_conv(h, weight, bias, spec, relu, residual, run=run), again


def _normalising(run: Run, u: Tensor) -> Normalises | None:
    """The kernels of the run, if they normalise u [N, rows, H, W] and activate it in one go, or None."""
    can = normalises(run.kernels) and not run.by_operators and values_of_each_channel(u) > 1
    return run.kernels if can else None  # type: ignore[return-value]
