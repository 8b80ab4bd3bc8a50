"""The one operation of an SFG network and its gradient: the routed convolution.

    u[n,k] = b[k] + sum over c with reads(group(k), group(c)) of  W[k,c] (*) x[n,c]

x and u are packed. The weight's rows are packed for the output, its columns for the input, and it is zero (or skipped)
where a group does not read another. An SFG layer goes on with  y = z * act(norm(u))  (layers/conv.py).

In a one-hot draw a kernel has a row in one group. Its OTHERS, the rows it would have in other groups, are zero, but
their gates z want a gradient: dz = <dL/dF, act(norm(u))>. So a consumer of features has to say dL/dF of the others,
too. It does so as the gradient of `others`, a tensor of their shape that takes no memory (`SFGFeatures.others`), and
`routed_conv_kept` gives the producer what it needs to make their u once more (`Others`), without ever storing it.
"""

from __future__ import annotations

import dataclasses
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
from .passes import fold, one_image_for_every_group, plain, same_work_for_every_group, unfold


def routed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
    others: Tensor | None = None,
) -> Tensor:
    """Packed x [N, columns, H, W], weight [K, C, kH, kW] and bias [K] in the layer's order -> u [N, rows, H', W'].

    `relu`: return relu(u). `residual`: a tensor like u, which is added. Not both.
    `others` [N, (G-1) * columns, H, W] (zeros): gets the gradient of the columns' others.
    """
    return _apply(x, others, weight, bias, residual, spec, relu, False)[0]


class Others(NamedTuple):
    """What u of the others of all rows is made of, for their gates' gradient."""

    x: Tensor
    a: Tensor | None
    weight: Tensor
    bias: Tensor | None
    kernels: Any
    spec: RoutedConv

    def gate_gradient(self, df: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool) -> Tensor:
        """<df, act(scale * u + shift)> of each other: [G-1, rows], as scale and shift. df [N, (G-1) * rows, H', W']."""
        packed = self.kernels.pack(self.weight, self.bias, self.spec, self.x.dtype)
        return self.kernels.gate_gradient(self.x, self.a, packed, self.spec, df, scale, shift, relu)

    def values(self) -> list[Tensor]:
        """u of the others: G-1 tensors [N, rows, H', W']."""
        return masked.others(self.x, self.a, masked.pack(self.weight, self.bias, self.spec, self.x.dtype), self.spec)

    def split(self) -> tuple[tuple[Tensor | None, ...], Others]:
        """The tensors, for autograd to keep, and what is left; `joined` is the way back."""
        return self[:4], Others(None, None, None, None, *self[4:])  # type: ignore[arg-type]

    def joined(self, tensors: Sequence[Any]) -> Others:
        x, a, weight, bias = tensors
        return self._replace(x=x, a=a, weight=weight, bias=bias)


def routed_conv_kept(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    others: Tensor | None = None,
) -> tuple[Tensor, Others]:
    """As `routed_conv`, for rows all of whose gates want a gradient (`spec.rows.all_gates`)."""
    u, a, kernels = _apply(x, others, weight, bias, None, spec, relu, True)
    a = u.detach() if spec.routing is Routing.ALL else a
    parameters = weight.detach(), None if bias is None else bias.detach()
    return u, Others(x.detach().to(u.dtype), a, *parameters, kernels, spec)


def _apply(
    x: Tensor,
    others: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    spec: RoutedConv,
    relu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Any]:
    assert residual is None or not relu, "the gradient would need the ReLU's output alone"
    kernels, dtype = backends.kernels(x)
    x = x.to(dtype)
    sizes = weight.shape[0], weight.shape[1]
    a = None
    if one_image_for_every_group(spec):
        one = plain(spec, *sizes)
        u = _convolve(x, None, weight, bias, None, kernels, one, relu, False)[0].repeat(1, len(spec.rows.names), 1, 1)
    elif same_work_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
        one = plain(spec, *sizes)
        u = unfold(_convolve(fold(x, spec), None, weight, bias, None, kernels, one, relu, False)[0], spec)
    elif kernels is masked and spec.columns.full and spec.routing is Routing.OWN and spec.rows.blocked:
        stride, padding, dilation = spec.geometry
        bias = None if bias is None else bias.to(dtype)
        u = F.conv2d(x, weight.to(dtype), bias, stride, padding, dilation, len(spec.columns.names))
        u = F.relu(u) if relu else u
    else:
        return *_convolve(x, others, weight, bias, residual, kernels, spec, relu, keep), kernels
    return u if residual is None else u + residual.to(u.dtype), a, kernels


def _convolve(
    x: Tensor,
    others: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernels: Any,
    spec: RoutedConv,
    relu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """ReLU and addition in the kernels, where these can do it."""
    fused = kernels.FUSES
    operation = operators.routed_conv if torch.compiler.is_compiling() else _RoutedConv.apply
    residual = None if residual is None else residual.to(x.dtype)
    keep = keep and spec.routing is Routing.ARROW
    if spec.columns.all_gates and (others is None or not others.requires_grad):  # nobody asks for their gradient
        spec = spec._replace(columns=dataclasses.replace(spec.columns, all_gates=False))
    u, a = operation(x, others, weight, bias, residual if fused else None, kernels, spec, relu and fused, keep)
    if not fused:
        u = F.relu(u) if relu else u
        u = u if residual is None else u + residual
    return u, a if keep else None


class _RoutedConv(torch.autograd.Function):
    """The routed convolution and its gradient, in eager mode (compiled graphs: operators.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        others: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        kernels: Any,
        spec: RoutedConv,
        relu: bool,
        keep: bool,
    ) -> Any:
        y, a, ctx.kept = passes.forward(x, weight, bias, residual, kernels, spec, relu, keep)
        ctx.save_for_backward(x, y if relu else None)  # what passed the ReLU is positive
        ctx.kernels, ctx.spec = kernels, spec
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        if a is not None:
            ctx.mark_non_differentiable(a)
        return y, a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        x, passed = ctx.saved_tensors
        wants_x, wants_others, *wants, wants_residual = ctx.needs_input_grad[:5]
        wants = [wants_x or wants_others, *wants]
        dx, dothers, dw, db = passes.backward(dy, x, passed, ctx.kept, ctx.kernels, ctx.spec, wants)
        dw = None if dw is None else dw.to(ctx.dtypes[0])
        db = None if db is None else db.to(ctx.dtypes[1])
        return dx, dothers if wants_others else None, dw, db, dy if wants_residual else None, *[None] * 4
