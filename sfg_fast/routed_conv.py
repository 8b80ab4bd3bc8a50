"""The one operation of an SFG network and its gradient: the routed convolution.

    u[n,k] = b[k] + sum over c with reads(group(k), group(c)) of  W[k,c] (*) x[n,c]

x and u are packed. The weight's rows are packed for the output, its columns for the input, and it is zero (or skipped)
where a group does not read another. An SFG layer goes on with  y = z * act(norm(u))  (layers/conv.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backends
from .groups import FilterGroups, Routing
from .kernels import masked
from .kernels.packing import select_channels, unpack_dim
from .kernels.spec import RoutedConv


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


class AllRows(NamedTuple):
    """u of all rows of a one-hot draw, without gradient: the gates of rows that are not live want it for their own.

    Either kept, or (kernels that share products) to be computed again from the layer's input.
    """

    kept: Tensor | None  # [N, rows, H', W']
    x: Tensor | None  # [N, live columns, H, W]
    weight: Tensor | None
    bias: Tensor | None
    kernels: Any
    spec: RoutedConv
    relu: bool  # is it relu(u)?

    def values(self) -> Tensor:
        """[N, rows, H', W']."""
        if self.kept is not None:
            return self.kept
        assert self.x is not None
        return self.kernels.forward(self.x, self._packed(), self.spec, relu=self.relu)

    def gate_gradient(self, df: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor | None:
        """<df, act(scale * u + shift)> for each row, scale and shift [T+1, K]; None if values() are to be used."""
        if self.kept is not None:
            return None
        return self.kernels.gate_gradient(self.x, self._packed(), self.spec, df, scale, shift, relu or self.relu)

    def split(self) -> tuple[tuple[Tensor | None, ...], AllRows]:
        """The tensors, for autograd to keep, and what is left; `joined` is the way back."""
        return self[:4], AllRows(None, None, None, None, *self[4:])

    def joined(self, tensors: Sequence[Tensor | None]) -> AllRows:
        kept, x, weight, bias = tensors
        return self._replace(kept=kept, x=x, weight=weight, bias=bias)

    def _packed(self) -> Any:
        assert self.x is not None
        return self.kernels.pack(self.weight, self.bias, self.spec, self.x.dtype)


def routed_conv_expanded(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv, relu: bool = False
) -> tuple[Tensor, AllRows]:
    """(u of the live rows with its gradient, u of all rows without); `relu`: of both.

    The rows that are not live have gate zero. So no gradient comes back through them; only the gates want their values.
    """
    live, all_rows = _apply(x, weight, bias, spec, relu, None)
    assert all_rows is not None, "only expanded groups have rows that are not live"
    return live, all_rows


def _apply(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv, relu: bool, residual: Tensor | None
) -> tuple[Tensor, AllRows | None]:
    assert residual is None or not (relu or spec.rows.drawn), "the gradient would need the ReLU's output alone"
    kernels, dtype = backends.kernels(x)
    x = x.to(dtype)
    plain = _plain(spec, *weight.shape[:2])
    if spec.rows.drawn is None and _one_image_for_every_group(spec):
        live = _convolve(x, weight, bias, None, kernels, plain, relu)[0].repeat(1, len(spec.rows.names), 1, 1)
    elif spec.rows.drawn is None and _same_work_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
        live = _unfold(_convolve(_fold(x, spec), weight, bias, None, kernels, plain, relu)[0], spec)
    elif kernels is masked and spec.columns.full and spec.routing is Routing.OWN and spec.rows.blocked:
        stride, padding, dilation = spec.geometry
        bias = None if bias is None else bias.to(dtype)
        live = F.conv2d(x, weight.to(dtype), bias, stride, padding, dilation, len(spec.columns.names))
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
) -> tuple[Tensor, AllRows | None]:
    """ReLU and addition in the kernels, where these can do it."""
    fused = kernels.FUSES and relu
    if kernels.FUSES:
        residual = None if residual is None else residual.to(x.dtype)
        live, rest = _RoutedConv.apply(x, weight, bias, residual, kernels, spec, relu)
    else:
        live, rest = _RoutedConv.apply(x, weight, bias, None, kernels, spec, False)
        live = F.relu(live) if relu else live
        live = live if residual is None else live + residual
    if spec.rows.drawn is None:
        return live, None
    if _recomputes(kernels, spec):
        parameters = weight.detach(), None if bias is None else bias.detach()
        return live, AllRows(None, rest, *parameters, kernels, spec, relu)
    return live, AllRows(rest if fused or not relu else F.relu(rest), None, None, None, kernels, spec, relu)


def _recomputes(kernels: Any, spec: RoutedConv) -> bool:
    """Are rows that are not live left out in the forward pass, and computed for the gates' gradient alone?"""
    return kernels.SHARES_PRODUCTS and spec.rows.drawn is not None and not _one_image_for_every_group(spec)


class _RoutedConv(torch.autograd.Function):
    """Forward: live columns -> all rows. Backward: live rows -> all columns, and live rows x live columns.

    Returns u of the live rows, and what their unselected gates need (`AllRows`): u of all rows, or the live columns."""

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
        live_x = x if spec.columns.drawn is None else select_channels(x, spec.columns.live.rows_in_streams)
        recomputes = _recomputes(kernels, spec)
        if recomputes:
            spec = spec._replace(rows=spec.rows.live)
        fused = {"relu": relu, "residual": residual} if kernels.FUSES else {}
        packed = kernels.pack(weight, bias, spec, x.dtype)
        alike = _plain(spec, *weight.shape[:2])  # where all groups have the same kernels
        if _one_image_for_every_group(spec):
            u = kernels.forward(x, kernels.pack(weight, bias, alike, x.dtype), alike, **fused)
            u = u.repeat(1, len(spec.rows.names), 1, 1)
        elif _same_work_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
            u = kernels.forward(_fold(x, spec), kernels.pack(weight, bias, alike, x.dtype), alike, **fused)
            u = _unfold(u, spec)
        else:
            u = kernels.forward(live_x, packed, spec, **fused)
        y = u if spec.rows.drawn is None else select_channels(u, spec.rows.drawn.rows_in_streams)
        ctx.save_for_backward(live_x, y if relu else None)  # what passed the ReLU is positive
        ctx.kernels, ctx.packed, ctx.spec, ctx.size = kernels, packed, spec, tuple(x.shape[2:])
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.alike = None
        if spec.rows.drawn is None and _same_work_for_every_group(spec):
            ctx.alike = alike, kernels.pack(weight, bias, alike, x.dtype)
        if spec.rows.drawn is None and not recomputes:
            return y, None
        rest = live_x.detach() if recomputes else u
        ctx.mark_non_differentiable(rest)
        return y, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        live_x, passed = ctx.saved_tensors
        kernels, spec, packed = ctx.kernels, ctx.spec, ctx.packed
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        residual_gradient = dy if wants_residual else None
        dx = dw = db = None
        if wants_x:
            fused = {"relu": passed} if kernels.FUSES else {}
            dx = kernels.input_gradient(dy, packed, spec, ctx.size, **fused)
        if wants_weight:
            if ctx.alike is not None:  # the groups folded into the batch: one weight gradient for all
                live_x, dy = _fold(live_x, spec), _fold_rows(dy, spec)
                passed = None if passed is None else _fold_rows(passed, spec)
                spec, packed = ctx.alike
            fused = {"relu": passed} if kernels.FUSES else {}
            dw, db = kernels.weight_gradient(live_x, dy, packed, spec, **fused, bias=wants_bias)
            dw = dw.to(ctx.dtypes[0])
        elif wants_bias:
            db = (dy if passed is None else dy.where(~(passed <= 0), 0)).sum((0, 2, 3))  # a NaN passes, as in torch
            db = unpack_dim(db, 0, spec.rows.live)
        db = None if db is None else db.to(ctx.dtypes[1])
        return dx, dw, db, residual_gradient, None, None, None


def _same_work_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve full-width tensors with the same kernels? Then one block-masked convolution would do (T+1)
    times the work that is needed."""
    return spec.columns.full and spec.columns.drawn is None and spec.rows.full and spec.routing is not Routing.ALL


def _one_image_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve the same image with the same kernels? Then once is enough."""
    return spec.routing is Routing.ALL and spec.rows.full and len(spec.rows.names) > 1


def _plain(spec: RoutedConv, kernels: int, channels: int) -> RoutedConv:
    """The same convolution with one group on either side: all kernels read all channels."""
    device = spec.rows.order.device
    rows, columns = (FilterGroups.blocks([size], ("all",), device) for size in (kernels, channels))
    return RoutedConv(rows, columns, Routing.ALL, spec.geometry)


def _fold(x: Tensor, spec: RoutedConv) -> Tensor:
    """Streams [N, GC, H, W] -> [NG, C, H, W], the groups folded into the batch: what each group reads."""
    streams = x.unflatten(1, (len(spec.columns.names), -1))
    if spec.routing is Routing.ARROW:
        streams = torch.cat([streams[:, :1], streams[:, 1:] + streams[:, :1]], 1)
    return streams.flatten(0, 1)


def _fold_rows(y: Tensor, spec: RoutedConv) -> Tensor:
    """Full rows [N, GK, H, W] -> [NG, K, H, W]."""
    return y.unflatten(1, (len(spec.rows.names), -1)).flatten(0, 1)


def _unfold(y: Tensor, spec: RoutedConv) -> Tensor:
    """The inverse of `_fold_rows`."""
    return y.unflatten(0, (-1, len(spec.rows.names))).flatten(1, 2)
