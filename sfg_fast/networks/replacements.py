"""Which layer takes the place of a layer of torch.nn when a network is converted: convolutions, norms, drop paths. Each
is given the parameters and statistics of the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layer import SFGLayer
from ..layers.conv import SFGConv2d, SFGConv3d, SFGConvTranspose2d, SFGConvTranspose3d
from ..layers.feature_norm import FeatureNorm
from ..layers.stream_conv import StreamConv2d
from ..norm import ImageNorm, KernelNorm, NormName
from .record import base_of

# By the class of torch.nn whose forward pass a layer has: the layer that takes its place.
SFG_LAYERS: dict[Any, type[SFGLayer]] = {
    nn.Conv2d: SFGConv2d,
    nn.Conv3d: SFGConv3d,
    nn.ConvTranspose2d: SFGConvTranspose2d,
    nn.ConvTranspose3d: SFGConvTranspose3d,
}
NORMS: dict[Any, str] = {
    nn.BatchNorm2d: "batch",
    nn.BatchNorm3d: "batch",
    nn.InstanceNorm2d: "instance",
    nn.InstanceNorm3d: "instance",
    nn.GroupNorm: "group",
}
"""The norms that can stand behind an SFG layer, and what it calls them."""


def is_norm(module: nn.Module | None) -> bool:
    """Is the module one of `NORMS`?"""
    return module is not None and base_of(module) in NORMS


def sfg_layer(
    conv: Any, norm: nn.Module | None, activation: Any, tasks: Sequence[str], options: Mapping[str, Any]
) -> SFGLayer:
    """The SFG layer of a convolution, with the norm and the activation behind it. `options`: init and estimator. Raises
    ValueError for a norm that a layer can't have."""
    kind: Any = SFG_LAYERS[next(base for base in type(conv).__mro__ if base in SFG_LAYERS)]
    given: dict[str, Any] = {
        name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")
    }
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        given["output_padding"] = conv.output_padding
    layer = kind(
        conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None, **given, tasks=tasks,
        norm=_name_of(norm), activation=activation, device=conv.weight.device, dtype=conv.weight.dtype, **options,
    )  # fmt: skip
    layer.weight, layer.bias = conv.weight, conv.bias
    if norm is not None and layer.norm is not None:
        _copy_norm(norm, layer.norm)
    return layer


def feature_norm(norm: Any, width: int, tasks: Sequence[str]) -> FeatureNorm:
    """The norm of features of K = `width` kernels that takes the place of a norm of torch. Raises ValueError as
    `sfg_layer` does."""
    like = next((one for one in (*norm.parameters(), *norm.buffers()) if one.is_floating_point()), None)
    factory: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    made = FeatureNorm(width, 1 + len(tasks), _name_of(norm), **factory)
    _copy_norm(norm, made.norm)
    return made


def stream_conv(conv: Any, norm: Any, activation: Any, tasks: Sequence[str]) -> StreamConv2d:
    """The convolution of streams that takes the place of the last one before a product. Raises ValueError for another
    convolution than nn.Conv2d, and for a norm other than batch normalisation."""
    plain: Any = conv
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        raise ValueError(f"is the last convolution before a product, expected nn.Conv2d of groups=1, got {conv}")
    if norm is not None and NORMS[base_of(norm)] != "batch":
        raise ValueError(f"is {type(norm).__name__} behind the last convolution before a product, expected batch norm")
    layer = StreamConv2d(
        conv.in_channels, conv.out_channels, plain.kernel_size, conv.stride, conv.padding, conv.dilation, 1,
        conv.bias is not None, conv.padding_mode, device=conv.weight.device, dtype=conv.weight.dtype,
        tasks=tasks, norm=None if norm is None else "batch", activation=activation,
    )  # fmt: skip
    layer.weight, layer.bias = conv.weight, conv.bias
    if norm is not None and layer.norm is not None:
        _repeat_batch_norm(norm, layer.norm)
    return layer


def _name_of(norm: Any) -> NormName:
    """What `norm` an SFG layer has in place of this one."""
    if norm is None:
        return None
    name = NORMS[base_of(norm)]
    if name == "batch":
        return name
    if name == "instance" and norm.track_running_stats:
        raise ValueError("is an instance normalisation with running statistics, expected track_running_stats=False")
    options = {"eps": norm.eps, "affine": norm.affine}
    return name, options | ({"num_groups": norm.num_groups} if name == "group" else {})


def _copy_norm(norm: Any, to: KernelNorm | ImageNorm) -> None:
    if isinstance(to, KernelNorm):
        return copy_batch_norm(norm, to)
    if to.weight is not None:  # the same parameters, as those of convolutions
        to.weight, to.bias = norm.weight, norm.bias


@torch.no_grad()
def copy_batch_norm(norm: Any, to: KernelNorm) -> None:
    """Copy scale, shift and running statistics of a batch normalisation to a KernelNorm.

    The shared group reads what the network read before, so its statistics go on from those of the batch normalisation.
    The statistics of a task start with its first draw. Raises ValueError for a normalisation without running
    statistics, or with a momentum of 0.
    """
    if norm.momentum == 0:
        raise ValueError("is a batch normalisation of momentum=0, expected it in eval() to keep its statistics")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("is a batch normalisation without running statistics (track_running_stats=False)")
    to.eps, to.momentum = norm.eps, norm.momentum or 0.0
    if norm.affine:
        for own, given in ((to.weight, norm.weight), (to.bias, norm.bias)):
            own.copy_(given)
            own.requires_grad_(given.requires_grad)
    else:
        to.requires_grad_(False)
    for running, pooled, statistic in (
        (to.running_mean, to.pooled_mean, norm.running_mean),
        (to.running_var, to.pooled_var, norm.running_var),
    ):
        running[0] = statistic
        pooled.copy_(statistic)
    counted = norm.num_batches_tracked
    # After so many draws the statistics of a (group, kernel) move at the rate of the momentum (norm.py). Without a
    # momentum the rate is 1/n.
    to.draws[0] = math.ceil(1 / norm.momentum) if norm.momentum else float(counted) if counted is not None else 0.0


@torch.no_grad()
def _repeat_batch_norm(norm: nn.BatchNorm2d, to: nn.BatchNorm2d) -> None:
    """Copy scale, shift and running statistics of a batch normalisation of K channels to each K channels of another."""
    to.eps, to.momentum, times = norm.eps, norm.momentum, to.num_features // norm.num_features
    for name in ("weight", "bias", "running_mean", "running_var"):
        own, given = getattr(to, name), getattr(norm, name)
        if given is not None:
            own.copy_(given.repeat(times))
            own.requires_grad_(given.requires_grad)
    if norm.num_batches_tracked is not None and to.num_batches_tracked is not None:
        to.num_batches_tracked.copy_(norm.num_batches_tracked)
