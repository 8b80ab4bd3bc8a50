"""The one operation of an SFG network and its gradient: the routed convolution.

    u[n,k] = b[k] + sum over c with reads(group(k), group(c)) of  W[k,c] (*) x[n,c]

x and u are packed. The weight's rows are packed for the output, its columns for the input, and it is zero (or skipped)
where a group does not read another. An SFG layer goes on with  y = z * act(norm(u))  (layers/conv.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backends
from .groups import FilterGroups, Routing
from .kernels import masked
from .kernels.blocks import Blocks, Geometry
from .packing import pack, unpack, unpack_dim


class RoutedConv(NamedTuple):
    """Who convolves with whom, and how."""

    rows: FilterGroups  # the output's channels
    columns: FilterGroups  # the input's channels
    routing: Routing
    geometry: Geometry

    def blocks(self) -> Blocks:
        reads = self.routing.reads(len(self.rows.names), len(self.columns.names), self.rows.order.device)
        return Blocks(self.rows.offsets, self.columns.offsets, reads)


def routed_conv(x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv) -> Tensor:
    """Packed x [N, columns, H, W], weight [K, C, kH, kW] and bias [K] in the layer's order -> u [N, rows, H', W'].

    For expanded groups (`spec.rows.drawn`), only the live rows: see `routed_conv_expanded`.
    Exact gradients for all rows and columns that may be non-zero or have a gate that wants a gradient.
    """
    return routed_conv_expanded(x, weight, bias, spec)[0]


def routed_conv_expanded(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv
) -> tuple[Tensor, Tensor | None]:
    """(u of the live rows with its gradient, u of all rows without).

    The rows that are not live have gate zero. So no gradient comes back through them; only the gates want their values.
    """
    dtype = backends.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    kernels = backends.kernels(x)
    if kernels is masked and spec.columns.full and spec.routing is Routing.OWN and spec.rows.blocked:
        stride, padding, dilation = spec.geometry
        return F.conv2d(x, weight, bias, stride, padding, dilation, len(spec.columns.names)), None
    if kernels is masked and _same_work_for_every_group(spec) and spec.rows.drawn is None:
        return _fold(x, weight, bias, spec), None
    live, everything = _RoutedConv.apply(x, weight, bias, kernels, spec)
    return live, everything if spec.rows.drawn is not None else None


class _RoutedConv(torch.autograd.Function):
    """Forward: live columns -> all rows. Backward: live rows -> all columns, and live rows x live columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Any, spec: RoutedConv) -> Any:
        live = spec._replace(columns=spec.columns.live)
        live_x = x if spec.columns.drawn is None else x.index_select(1, spec.columns.live.rows_in_streams)
        if kernels is masked and _same_work_for_every_group(spec):
            u = _fold(x, weight, bias, spec)
        elif kernels is masked and spec.routing is Routing.ALL and spec.rows.full:
            # Every group convolves the image with the same kernels: once is enough.
            u = F.conv2d(x, weight, bias, *spec.geometry).repeat(1, len(spec.rows.names), 1, 1)
        else:
            packed = pack(weight, live.rows, live.columns, spec.routing)
            packed_bias = None if bias is None else bias[spec.rows.order]
            u = kernels.forward(live_x, packed, packed_bias, live.blocks(), spec.geometry)
        ctx.save_for_backward(live_x, weight)
        ctx.kernels, ctx.spec, ctx.size, ctx.has_bias = kernels, spec, tuple(x.shape[2:]), bias is not None
        if spec.rows.drawn is None:
            return u, None
        ctx.mark_non_differentiable(u)
        return u.index_select(1, spec.rows.drawn.rows_in_streams), u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        live_x, weight = ctx.saved_tensors
        spec = ctx.spec._replace(rows=ctx.spec.rows.live)
        dy = dy.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            packed = pack(weight, spec.rows, spec.columns, spec.routing)
            dx = ctx.kernels.input_gradient(dy, packed, spec.blocks(), spec.geometry, ctx.size)
        if ctx.needs_input_grad[1]:
            live = spec._replace(columns=spec.columns.live)
            kernel = tuple(weight.shape[2:])
            packed = ctx.kernels.weight_gradient(live_x, dy, live.blocks(), spec.geometry, kernel)
            dw = unpack(packed, live.rows, live.columns)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = unpack_dim(dy.sum((0, 2, 3)), 0, spec.rows)
        return dx, dw, db, None, None


def _same_work_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve full-width tensors with the same kernels? Then one block-masked convolution would do (T+1)
    times the work that is needed."""
    return spec.columns.full and spec.columns.drawn is None and spec.rows.full and spec.routing is not Routing.ALL


def _fold(x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv) -> Tensor:
    """The groups folded into the batch: each reads its tensor (plus the shared one), all have the same kernels."""
    n, groups = x.shape[0], len(spec.columns.names)
    streams = x.unflatten(1, (groups, -1))
    if spec.routing is Routing.ARROW:
        streams = torch.cat([streams[:, :1], streams[:, 1:] + streams[:, :1]], 1)
    u = F.conv2d(streams.flatten(0, 1), weight, bias, *spec.geometry)
    return u.unflatten(0, (n, groups)).flatten(1, 2)
