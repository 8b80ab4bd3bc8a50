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
from .groups import FilterGroups, Routing
from .kernels import masked
from .kernels.spec import Recipe, RoutedConv
from .passes import fold, one_image_for_every_group, plain, same_work_for_every_group, unfold


def routed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
    others: Tensor | None = None,
    producer: Producer | None = None,
) -> Tensor:
    """Packed x [N, columns, H, W], weight [K, C, kH, kW] and bias [K] in the layer's order -> u [N, rows, H', W'].

    `relu`: return relu(u). `residual`: a tensor like u, which is added. Not both.
    `others` [N, (G-1) * columns, H, W] (zeros): gets the gradient of the columns' others. `producer`: where x comes
    from, if that is known.
    """
    return _apply(x, others, producer, weight, bias, residual, spec, relu, False)[0]


class Others(NamedTuple):
    """What u of the others of all rows is made of."""

    x: Tensor
    a: Tensor | None
    weight: Tensor
    bias: Tensor | None
    kernels: Any
    spec: RoutedConv

    def recipe(self, scale: Tensor | None, shift: Tensor | None, activation: str | None, kernels: Any = None) -> Recipe:
        """scale and shift [G-1, rows]. `kernels`: other ones than those that computed u."""
        packed = (kernels or self.kernels).pack(self.weight, self.bias, self.spec, self.x.dtype, gates=True)
        return Recipe(self.x, self.a, packed, self.spec, scale, shift, activation)

    def gate_gradient(
        self, dothers: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None
    ) -> Tensor:
        """dz [G-1, rows] = <dL/dF, act(scale * u + shift)>, for an activation that the kernels know."""
        if torch.compiler.is_compiling():
            return operators.gate_gradient(dothers, *self[:4], scale, shift, self.spec, activation, self.kernels)
        return self.kernels.gate_gradient(self.recipe(scale, shift, activation), dothers)

    def values(self) -> Sequence[Tensor]:
        """u itself: G-1 tensors [N, rows, H', W']."""
        if torch.compiler.is_compiling():
            return operators.others(*self[:4], self.spec).chunk(len(self.spec.rows.names) - 1, 1)
        return masked.others(self.recipe(None, None, None, masked))

    def split(self) -> tuple[tuple[Tensor | None, ...], Others]:
        """The tensors, for autograd to keep, and what is left; `joined` is the way back."""
        return self[:4], Others(None, None, None, None, *self[4:])  # type: ignore[arg-type]

    def joined(self, tensors: Sequence[Any]) -> Others:
        x, a, weight, bias = tensors
        return self._replace(x=x, a=a, weight=weight, bias=bias)


class Producer(NamedTuple):
    """Where features come from, F = z act(scale * u + shift): a consumer whose kernels can (`FUSES_GATES`) gives the
    gates z their gradient itself, and dL/dF of the others is never stored."""

    h: Tensor  # act(..) of the rows, with the gradient that goes to the layer
    gates: Tensor  # [K, T+1]
    groups: FilterGroups
    others: Others | None  # None: only the gates of the drawn groups want a gradient
    scale: Tensor | None  # [T, rows]
    shift: Tensor | None
    activation: str | None
    own: bool  # do the gates of the drawn groups still want their gradient?


def routed_conv_kept(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    others: Tensor | None = None,
    producer: Producer | None = None,
) -> tuple[Tensor, Others]:
    """As `routed_conv`, for rows all of whose gates want a gradient (`spec.rows.all_gates`)."""
    u, a, kernels = _apply(x, others, producer, weight, bias, None, spec, relu, True)
    a = u.detach() if spec.routing is Routing.ALL else a
    parameters = weight.detach(), None if bias is None else bias.detach()
    return u, Others(x.detach().to(u.dtype), a, *parameters, kernels, spec)


def _apply(
    x: Tensor,
    others: Tensor | None,
    producer: Producer | None,
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
        u = _convolve(x, None, None, weight, bias, None, kernels, one, relu, False)[0].repeat(
            1, len(spec.rows.names), 1, 1
        )
    elif same_work_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
        one = plain(spec, *sizes)
        u = unfold(_convolve(fold(x, spec), None, None, weight, bias, None, kernels, one, relu, False)[0], spec)
    elif kernels is masked and spec.columns.full and spec.routing is Routing.OWN and spec.rows.blocked:
        stride, padding, dilation = spec.geometry
        bias = None if bias is None else bias.to(dtype)
        u = F.conv2d(x, weight.to(dtype), bias, stride, padding, dilation, len(spec.columns.names))
        u = F.relu(u) if relu else u
    else:
        return *_convolve(x, others, producer, weight, bias, residual, kernels, spec, relu, keep), kernels
    return u if residual is None else u + residual.to(u.dtype), a, kernels


def _convolve(
    x: Tensor,
    others: Tensor | None,
    producer: Producer | None,
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
    residual = None if residual is None else residual.to(x.dtype)
    keep = keep and spec.routing is Routing.ARROW
    if producer is not None and not _can_serve(producer, x, kernels, spec):
        producer = None
    if spec.columns.all_gates and (producer or others is None or not others.requires_grad):  # nobody asks for dothers
        spec = spec._replace(columns=dataclasses.replace(spec.columns, all_gates=False))
    arguments = weight, bias, residual if fused else None, kernels, spec, relu and fused, keep
    if producer is not None:
        tensors, rest = ((), None) if producer.others is None else producer.others.split()
        made = producer._replace(h=None, gates=None, others=rest)  # type: ignore[arg-type]
        u, a = _RoutedConv.apply(producer.h, None, producer.gates, *arguments, made, *tensors)
    elif torch.compiler.is_compiling():
        u, a = operators.routed_conv(x, others, *arguments)
    else:
        u, a = _RoutedConv.apply(x, others, None, *arguments, None)
    if not fused:
        u = F.relu(u) if relu else u
        u = u if residual is None else u + residual
    return u, a if keep else None


def _can_serve(producer: Producer, x: Tensor, kernels: Any, spec: RoutedConv) -> bool:
    """Can the consumer of these features give their gates the gradient?"""
    if not kernels.FUSES_GATES or torch.compiler.is_compiling() or spec.geometry.stride != (1, 1):
        return False
    return producer.h.dtype == x.dtype and (producer.others is None or producer.others.kernels is kernels)


class _RoutedConv(torch.autograd.Function):
    """The routed convolution and its gradient, in eager mode (compiled graphs: operators.py)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        others: Tensor | None,
        gates: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        kernels: Any,
        spec: RoutedConv,
        relu: bool,
        keep: bool,
        producer: Producer | None,
        *made_of: Tensor,
    ) -> Any:
        """`gates` and `producer`, without its tensors, and those of its others: see `Producer`."""
        ctx.set_materialize_grads(False)  # no zeros for a
        y, a, ctx.kept = passes.forward(x, weight, bias, residual, kernels, spec, relu, keep)
        ctx.save_for_backward(x, y if relu else None, gates, *made_of)  # what passed the ReLU is positive
        ctx.kernels, ctx.spec, ctx.producer = kernels, spec, producer
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        if a is not None:
            ctx.mark_non_differentiable(a)
        return y, a

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, passed, gates, *made_of = ctx.saved_tensors
        wants_x, wants_others, wants_gates, *wants, wants_residual = ctx.needs_input_grad[:6]
        kept, kernels, spec, producer = ctx.kept, ctx.kernels, ctx.spec, ctx.producer
        dz = None
        if producer is not None and wants_gates:
            recipe = None
            if producer.others is not None:
                recipe = producer.others.joined(made_of).recipe(producer.scale, producer.shift, producer.activation)
            dx, dz = kernels.input_and_gate_gradient(dy, kept.packed, spec, x, recipe, relu=passed, own=producer.own)
            dz = producer.groups.by_kernel(dz[0] if producer.own else None, dz[1:] if recipe else None, gates)
            _, dothers, dw, db = passes.backward(dy, x, passed, kept, kernels, spec, [False, *wants])
        else:
            asked = [wants_x or wants_others, *wants]
            dx, dothers, dw, db = passes.backward(dy, x, passed, kept, kernels, spec, asked)
        dw = None if dw is None else dw.to(ctx.dtypes[0])
        db = None if db is None else db.to(ctx.dtypes[1])
        gradients = dx, dothers if wants_others else None, dz, dw, db, dy if wants_residual else None
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))
