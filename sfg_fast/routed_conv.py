"""The one operation of an SFG network and its gradient: the routed convolution.

    u[n,k] = b[k] + sum over c with reads(group(k), group(c)) of  W[k,c] (*) x[n,c]

x and u are packed. The weight's rows are packed for the output, its columns for the input, and it is zero (or skipped)
where a group does not read another. An SFG layer goes on with  y = z * act(norm(u))  (layers/conv.py).
"""

from __future__ import annotations

from collections.abc import Callable
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


def routed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Packed x [N, columns, H, W], weight [K, C, kH, kW] and bias [K] in the layer's order -> u [N, rows, H', W'].

    For expanded groups (`spec.rows.drawn`), only the live rows: see `routed_conv_expanded`.
    Exact gradients for all rows and columns that may be non-zero or have a gate that wants a gradient.

    `relu`: return relu(u). `residual`: a tensor like u, which is added. Not both, and no residual to expanded groups.
    """
    return _apply(x, weight, bias, spec, relu, residual)[0]


def routed_conv_expanded(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv, relu: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(u of the live rows with its gradient, u of all rows without); `relu`: of both.

    The rows that are not live have gate zero. So no gradient comes back through them; only the gates want their values.
    """
    return _apply(x, weight, bias, spec, relu, None)


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv, relu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    assert residual is None or not (relu or spec.rows.drawn), "the gradient would need the ReLU's output alone"
    kernels, dtype = backends.kernels(x)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if _same_work_for_every_group(spec) and spec.rows.drawn is None:
        plain = _plain(spec, weight)
        live = _fold(x, spec, lambda streams: _convolve(streams, weight, bias, None, kernels, plain, relu)[0])
    elif kernels is masked and spec.columns.full and spec.routing is Routing.OWN and spec.rows.blocked:
        stride, padding, dilation = spec.geometry
        live = F.conv2d(x, weight, bias, stride, padding, dilation, len(spec.columns.names))
        live = F.relu(live) if relu else live
    else:
        return _convolve(x, weight, bias, residual, kernels, spec, relu)
    return live if residual is None else live + residual, None


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernels: Any,
    spec: RoutedConv,
    relu: bool,
) -> tuple[Tensor, Tensor | None]:
    """ReLU and addition in the kernels, where these can do it."""
    if kernels is not masked:
        residual = None if residual is None else residual.to(x.dtype)
        return _RoutedConv.apply(x, weight, bias, residual, kernels, spec, relu)
    live, everything = _RoutedConv.apply(x, weight, bias, None, kernels, spec, False)
    if relu:
        live, everything = F.relu(live), None if everything is None else F.relu(everything)
    return live if residual is None else live + residual, everything


class _RoutedConv(torch.autograd.Function):
    """Forward: live columns -> all rows. Backward: live rows -> all columns, and live rows x live columns."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        kernels: Any,
        spec: RoutedConv,
        relu: bool,
    ) -> Any:
        live = spec._replace(columns=spec.columns.live)
        live_x = x if spec.columns.drawn is None else x.index_select(1, spec.columns.live.rows_in_streams)
        fused = {} if kernels is masked else {"relu": relu, "residual": residual}
        if _same_work_for_every_group(spec):
            plain = _plain(spec, weight).blocks()
            u = _fold(x, spec, lambda t: kernels.forward(t, weight, bias, plain, spec.geometry, **fused))
        elif spec.routing is Routing.ALL and spec.rows.full and len(spec.rows.names) > 1 and residual is None:
            # Every group convolves the image with the same kernels: once is enough.
            u = kernels.forward(x, weight, bias, _plain(spec, weight).blocks(), spec.geometry, **fused)
            u = u.repeat(1, len(spec.rows.names), 1, 1)
        else:
            packed = pack(weight, live.rows, live.columns, spec.routing if kernels is masked else None)
            packed_bias = None if bias is None else bias[spec.rows.order]
            u = kernels.forward(live_x, packed, packed_bias, live.blocks(), spec.geometry, **fused)
        y = u if spec.rows.drawn is None else u.index_select(1, spec.rows.drawn.rows_in_streams)
        ctx.save_for_backward(live_x, weight, y if relu else None)  # what passed the ReLU is positive
        ctx.kernels, ctx.spec, ctx.size = kernels, spec, tuple(x.shape[2:])
        if spec.rows.drawn is None:
            return y, None
        ctx.mark_non_differentiable(u)
        return y, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        live_x, weight, passed = ctx.saved_tensors
        spec = ctx.spec._replace(rows=ctx.spec.rows.live)
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        fused = {} if ctx.kernels is masked else {"relu": passed}
        residual_gradient = dy if wants_residual else None
        dx = dw = db = None
        if wants_x or wants_weight:
            dy = dy.contiguous()
        if wants_x:
            packed = pack(weight, spec.rows, spec.columns, spec.routing if ctx.kernels is masked else None)
            dx = ctx.kernels.input_gradient(dy, packed, spec.blocks(), spec.geometry, ctx.size, **fused)
        if wants_weight:
            live = spec._replace(columns=spec.columns.live)
            kernel = tuple(weight.shape[2:])
            arguments = (live_x, dy, live.blocks(), spec.geometry, kernel)
            packed, db = ctx.kernels.weight_gradient(*arguments, **fused, bias=wants_bias)
            dw = unpack(packed, live.rows, live.columns)
        elif wants_bias:
            db = (dy if passed is None else dy.where(~(passed <= 0), 0)).sum((0, 2, 3))  # a NaN passes, as in torch
        db = None if db is None else unpack_dim(db, 0, spec.rows)
        return dx, dw, db, residual_gradient, None, None, None


def _same_work_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve full-width tensors with the same kernels? Then one block-masked convolution would do (T+1)
    times the work that is needed."""
    return spec.columns.full and spec.columns.drawn is None and spec.rows.full and spec.routing is not Routing.ALL


def _plain(spec: RoutedConv, weight: Tensor) -> RoutedConv:
    """The same convolution with one group on either side: all kernels read all channels."""
    kernels, channels = weight.shape[:2]
    rows, columns = (FilterGroups.blocks([size], ("all",), weight.device) for size in (kernels, channels))
    return RoutedConv(rows, columns, Routing.ALL, spec.geometry)


def _fold(x: Tensor, spec: RoutedConv, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """The groups folded into the batch: each reads its tensor (plus the shared one), all have the same kernels."""
    n, groups = x.shape[0], len(spec.columns.names)
    streams = x.unflatten(1, (groups, -1))
    if spec.routing is Routing.ARROW:
        streams = torch.cat([streams[:, :1], streams[:, 1:] + streams[:, :1]], 1)
    u = convolve(streams.flatten(0, 1))
    return u.unflatten(0, (n, groups)).flatten(1, 2)
