"""The two passes of the routed convolution, on any kernels and without autograd.

What stands between the one operation and the kernels: which rows and columns are live, and when the groups share work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .groups import FilterGroups, Routing
from .kernels.packing import select_channels, unpack_dim
from .kernels.spec import RoutedConv


def recomputes(kernels: Any, spec: RoutedConv) -> bool:
    """Are rows that are not live left out in the forward pass, and computed for the gates' gradient alone?"""
    return kernels.SHARES_PRODUCTS and spec.rows.drawn is not None and not one_image_for_every_group(spec)


class Kept(NamedTuple):
    """What the backward pass wants of the forward pass, the layer's input aside."""

    packed: Any
    alike: tuple[RoutedConv, Any] | None  # a relaxed draw: the plain convolution that all groups do, and its parameters


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kernels: Any, spec: RoutedConv, relu: bool
) -> tuple[Tensor, Tensor | None, Tensor, Kept]:
    """Live columns -> all rows.

    Returns u of the live rows; what the gates of the others need (`AllRows`), unless that is x: u of all rows, or the
    live columns; the live columns; and what is kept.
    """
    live_x = x if spec.columns.drawn is None else select_channels(x, spec.columns.live.rows_in_streams)
    rest = None
    if recomputes(kernels, spec):
        rest = None if live_x is x else live_x
        spec = spec._replace(rows=spec.rows.live)
    fused = {"relu": relu, "residual": residual} if kernels.FUSES else {}
    packed = kernels.pack(weight, bias, spec, x.dtype)
    alike = None
    if one_image_for_every_group(spec) or same_work_for_every_group(spec):
        one = plain(spec, *weight.shape[:2])
        alike = one, kernels.pack(weight, bias, one, x.dtype)
    if one_image_for_every_group(spec):
        assert alike is not None
        u = kernels.forward(x, alike[1], alike[0], **fused).repeat(1, len(spec.rows.names), 1, 1)
    elif alike is not None and not kernels.SHARES_PRODUCTS:
        u = unfold(kernels.forward(fold(x, spec), alike[1], alike[0], **fused), spec)
    else:
        u = kernels.forward(live_x, packed, spec, **fused)
    if spec.rows.drawn is not None:
        alike = None  # the live rows don't do the same work
    if spec.rows.drawn is None:
        return u, rest, live_x, Kept(packed, alike)
    return select_channels(u, spec.rows.drawn.rows_in_streams), u, live_x, Kept(packed, alike)


def prepare_backward(x: Tensor, weight: Tensor, kernels: Any, spec: RoutedConv) -> tuple[Tensor, Kept]:
    """The live columns and what `forward` would have kept."""
    live_x = x if spec.columns.drawn is None else select_channels(x, spec.columns.live.rows_in_streams)
    spec = spec._replace(rows=spec.rows.live)
    alike = None
    if same_work_for_every_group(spec):
        one = plain(spec, *weight.shape[:2])
        alike = one, kernels.pack(weight, None, one, x.dtype)
    return live_x, Kept(kernels.pack(weight, None, spec, x.dtype), alike)


def backward(
    dy: Tensor,
    live_x: Tensor,
    passed: Tensor | None,
    kept: Kept,
    kernels: Any,
    spec: RoutedConv,
    size: tuple[int, int],
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Live rows -> all columns, and live rows x live columns: dx, dw, db, where wanted. `passed`: the ReLU's output."""
    wants_x, wants_weight, wants_bias = wants
    packed = kept.packed
    dx = dw = db = None
    if wants_x:
        fused = {"relu": passed} if kernels.FUSES else {}
        dx = kernels.input_gradient(dy, packed, spec, size, **fused)
    if wants_weight:
        if kept.alike is not None:  # the groups folded into the batch: one weight gradient for all
            live_x, dy = fold(live_x, spec), fold_rows(dy, spec)
            passed = None if passed is None else fold_rows(passed, spec)
            spec, packed = kept.alike
        fused = {"relu": passed} if kernels.FUSES else {}
        dw, db = kernels.weight_gradient(live_x, dy, packed, spec, **fused, bias=wants_bias)
    elif wants_bias:
        db = (dy if passed is None else dy.where(~(passed <= 0), 0)).sum((0, 2, 3))  # a NaN passes, as in torch
        db = unpack_dim(db, 0, spec.rows.live)
    return dx, dw, db


def same_work_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve full-width tensors with the same kernels? Then one block-masked convolution would do (T+1)
    times the work that is needed."""
    return spec.columns.full and spec.columns.drawn is None and spec.rows.full and spec.routing is not Routing.ALL


def one_image_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve the same image with the same kernels? Then once is enough."""
    return spec.routing is Routing.ALL and spec.rows.full and len(spec.rows.names) > 1


def plain(spec: RoutedConv, kernels: int, channels: int) -> RoutedConv:
    """The same convolution with one group on either side: all kernels read all channels."""
    device = spec.rows.order.device
    rows, columns = (FilterGroups.blocks([size], ("all",), device) for size in (kernels, channels))
    return RoutedConv(rows, columns, Routing.ALL, spec.geometry)


def fold(x: Tensor, spec: RoutedConv) -> Tensor:
    """Streams [N, GC, H, W] -> [NG, C, H, W], the groups folded into the batch: what each group reads."""
    streams = x.unflatten(1, (len(spec.columns.names), -1))
    if spec.routing is Routing.ARROW:
        streams = torch.cat([streams[:, :1], streams[:, 1:] + streams[:, :1]], 1)
    return streams.flatten(0, 1)


def fold_rows(y: Tensor, spec: RoutedConv) -> Tensor:
    """Full rows [N, GK, H, W] -> [NG, K, H, W]."""
    return y.unflatten(1, (len(spec.rows.names), -1)).flatten(0, 1)


def unfold(y: Tensor, spec: RoutedConv) -> Tensor:
    """The inverse of `fold_rows`."""
    return y.unflatten(0, (-1, len(spec.rows.names))).flatten(1, 2)
