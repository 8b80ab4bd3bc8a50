"""The two passes of the routed convolution, on any kernels and without autograd.

What stands between the one operation and the kernels: when the groups share work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import FilterGroups, Routing
from .kernels.contract import Kernels, Packed
from .kernels.packing import channels_last, unpack_dim
from .kernels.spec import RoutedConv
from .way import same_work_for_every_group


class Kept(NamedTuple):
    """What the backward pass wants of the forward pass, the layer's input aside."""

    packed: Packed
    alike: tuple[RoutedConv, Packed] | None  # a relaxed draw: the plain convolution that all groups do, and its weight
    dtypes: tuple[torch.dtype, torch.dtype]  # of weight and bias, and so of their gradients


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernels: Kernels,
    spec: RoutedConv,
    relu: bool,
    keep: bool,
    affine: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Kept]:
    """Returns u (`relu`: relu(u)), with `keep` what the gates of the others need besides x, and what is kept."""
    kept = prepare(weight, bias, kernels, spec, x.dtype)
    more: dict[str, Any] = {} if affine is None else {"affine": affine}  # of kernels that read what they normalise
    return *kernels.forward(x, kept.packed, spec, relu=relu, residual=residual, keep=keep, **more), kept


def prepare(weight: Tensor, bias: Tensor | None, kernels: Kernels, spec: RoutedConv, dtype: torch.dtype) -> Kept:
    """The parameters, packed."""
    alike = None
    if same_work_for_every_group(spec):
        one = plain(spec, *weight.shape[:2])
        alike = one, kernels.pack(weight, None, one, dtype)
    dtypes = weight.dtype, weight.dtype if bias is None else bias.dtype
    return Kept(kernels.pack(weight, bias, spec, dtype), alike, dtypes)


def backward(
    dy: Tensor,
    x: Tensor,
    passed: Tensor | None,
    kept: Kept,
    kernels: Kernels,
    spec: RoutedConv,
    wants: Sequence[bool],
    around: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dothers (`kernels/contract.py`), dw, db, where wanted. `passed`: the ReLU's output. `around`: is added to dx
    and dothers."""
    wants_x, wants_weight, wants_bias = wants
    packed = kept.packed
    if passed is not None and not kernels.MASKS_GRADIENTS:  # once for both gradients
        dy, passed = torch.ops.aten.threshold_backward(dy, passed, 0), None
    dx = dothers = dw = db = None
    if wants_x:
        around = around[0], around[1] if spec.columns.all_gates else None
        size = x.shape[2], x.shape[3]
        dx, dothers = kernels.input_gradient(dy, packed, spec, size, relu=passed, around=around)
    if wants_weight:
        if kept.alike is not None:  # the groups folded into the batch: one weight gradient for all
            x, dy = fold(x, spec), fold_rows(dy, spec)
            passed = None if passed is None else fold_rows(passed, spec)
            spec, packed = kept.alike
        dw, db = kernels.weight_gradient(x, dy, packed, spec, relu=passed, bias=wants_bias)
    elif wants_bias:
        db = (dy if passed is None else dy.where(~(passed <= 0), 0)).sum((0, 2, 3))  # a NaN passes, as in torch
        db = unpack_dim(db, 0, spec.rows)
    dw, db = (d if d is None else d.to(dtype) for d, dtype in zip((dw, db), kept.dtypes, strict=True))
    return dx, dothers, dw, db


def plain(spec: RoutedConv, kernels: int, channels: int) -> RoutedConv:
    """The same convolution with one group on either side: all kernels read all channels."""
    device = spec.rows.order.device
    rows, columns = (FilterGroups.blocks([size], ("all",), device) for size in (kernels, channels))
    return RoutedConv(rows, columns, Routing.ALL, spec.geometry)


def fold(x: Tensor, spec: RoutedConv) -> Tensor:
    """Streams [N, GC, H, W] -> [NG, C, H, W], the groups folded into the batch: what each group reads."""
    if spec.routing is Routing.ARROW:
        shared, *tasks = x.chunk(len(spec.columns.names), 1)
        x = torch.cat([shared, *(task + shared for task in tasks)], 1)
    return _groups_to_batch(x, len(spec.columns.names))


def fold_rows(y: Tensor, spec: RoutedConv) -> Tensor:
    """Full rows [N, GK, H, W] -> [NG, K, H, W]."""
    return _groups_to_batch(y, len(spec.rows.names))


def _groups_to_batch(x: Tensor, groups: int) -> Tensor:
    """Keeps channels_last; without it nothing is copied."""
    if channels_last(x):
        return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).movedim(3, 1).flatten(0, 1).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def unfold(y: Tensor, spec: RoutedConv) -> Tensor:
    """The inverse of `fold_rows`."""
    groups = len(spec.rows.names)
    if channels_last(y):
        return y.permute(0, 2, 3, 1).unflatten(0, (-1, groups)).movedim(1, 3).flatten(3, 4).permute(0, 3, 1, 2)
    return y.unflatten(0, (-1, groups)).flatten(1, 2)
