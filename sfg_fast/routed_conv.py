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

from . import backends, operators, passes
from .groups import Routing
from .kernels import masked
from .kernels.spec import RoutedConv
from .passes import fold, one_image_for_every_group, plain, recomputes, same_work_for_every_group, unfold


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
        assert scale is None or not self.relu, "a norm behind the ReLU"
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
    sizes = weight.shape[0], weight.shape[1]
    if spec.rows.drawn is None and one_image_for_every_group(spec):
        one = plain(spec, *sizes)
        live = _convolve(x, weight, bias, None, kernels, one, relu)[0].repeat(1, len(spec.rows.names), 1, 1)
    elif spec.rows.drawn is None and same_work_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
        one = plain(spec, *sizes)
        live = unfold(_convolve(fold(x, spec), weight, bias, None, kernels, one, relu)[0], spec)
    elif kernels is masked and spec.columns.full and spec.routing is Routing.OWN and spec.rows.blocked:
        stride, padding, dilation = spec.geometry
        bias = None if bias is None else bias.to(dtype)
        live = F.conv2d(x, weight.to(dtype), bias, stride, padding, dilation, len(spec.columns.names))
        live = F.relu(live) if relu else live
    else:
        return _convolve(x, weight, bias, residual, kernels, spec, relu)
    return live if residual is None else live + residual.to(live.dtype), None


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
    fused = kernels.FUSES
    operation = operators.routed_conv if torch.compiler.is_compiling() else _RoutedConv.apply
    residual = None if residual is None else residual.to(x.dtype)
    live, rest = operation(x, weight, bias, residual if fused else None, kernels, spec, relu and fused)
    if not fused:
        live = F.relu(live) if relu else live
        live = live if residual is None else live + residual
    if spec.rows.drawn is None:
        return live, None
    if recomputes(kernels, spec):
        parameters = weight.detach(), None if bias is None else bias.detach()
        return live, AllRows(None, x.detach() if rest is None else rest, *parameters, kernels, spec, relu)
    assert rest is not None
    return live, AllRows(rest if fused or not relu else F.relu(rest), None, None, None, kernels, spec, relu)


class _RoutedConv(torch.autograd.Function):
    """The routed convolution and its gradient, in eager mode (compiled graphs: operators.py)."""

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
        y, rest, live_x, ctx.kept = passes.forward(x, weight, bias, residual, kernels, spec, relu)
        ctx.save_for_backward(live_x, y if relu else None)  # what passed the ReLU is positive
        ctx.kernels, ctx.spec, ctx.size = kernels, spec, tuple(x.shape[2:])
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        if rest is not None:
            ctx.mark_non_differentiable(rest)
        return y, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        live_x, passed = ctx.saved_tensors
        *wants, wants_residual = ctx.needs_input_grad[:4]
        dx, dw, db = passes.backward(dy, live_x, passed, ctx.kept, ctx.kernels, ctx.spec, ctx.size, wants)
        dw = None if dw is None else dw.to(ctx.dtypes[0])
        db = None if db is None else db.to(ctx.dtypes[1])
        return dx, dw, db, dy if wants_residual else None, None, None, None
