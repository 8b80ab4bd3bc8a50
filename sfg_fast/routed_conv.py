"""The one operation of an SFG network and its gradient: the routed convolution.

    u[n,k] = b[k] + sum over c with reads(group(k), group(c)) of  W[k,c] (*) x[n,c]

x and u are packed. The weight's rows are packed for the output, its columns for the input, and it is zero (or skipped)
where a group does not read another. An SFG layer goes on with  y = z * act(norm(u))  (layers/conv.py).

In a one-hot draw a kernel has a row in one group. Its OTHERS, the rows it would have in other groups, are zero, but
their gates z want a gradient: dz = <dL/dF, act(norm(u))>. So a consumer of features has to say dL/dF of the others,
too. It does so as the gradient of `others`, a tensor of their shape that takes no memory (`SFGFeatures.others`), and
`convolve` with `keep` gives the producer what it needs to make their u once more (`Others`), without ever storing it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import operators, passes
from .groups import FilterGroups, Routing
from .kernels import masked
from .kernels.contract import Kernels, computes_gate_gradients
from .kernels.spec import Recipe, RoutedConv
from .once import once_differentiable
from .passes import fold, plain, unfold
from .tracing import in_graph, through_operators
from .way import Run, Way, decide


def routed_conv(*arguments: Any, **options: Any) -> Tensor:
    """u of `convolve`, whose arguments these are."""
    return convolve(*arguments, **options).u


class Convolved(NamedTuple):
    """u, and what else a convolution gives."""

    u: Tensor
    made_of: Others | None  # with `keep`: what u of the rows' others is made of
    # The input. With `around` it is meant for a shortcut around the convolution: in the backward pass the gradients of
    # both ways are added where the first is made.
    x: Tensor
    others: Tensor | None
    run: Run  # what did it: a normalisation behind it takes the same kernels


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
    others: Tensor | None = None,
    producer: Producer | None = None,
    keep: bool = False,
    around: bool = False,
) -> Convolved:
    """Packed x [N, columns, H, W], weight [K, C, kH, kW] and bias [K] in the layer's order -> u [N, rows, H', W'].

    `relu`: return relu(u). `residual`: a tensor like u, which is added. Not both.
    `others` [N, (G-1) * columns, H, W] (zeros): gets the gradient of the columns' others. `producer`: where x comes
    from, if that is known. `keep`: for rows all of whose gates want a gradient (`spec.rows.all_gates`).
    """
    assert residual is None or not relu, "the gradient would need the ReLU's output alone"
    run = decide(x, weight, spec)
    kernels, dtype = run.kernels, run.dtype
    given, x = (x, others), x.to(dtype)
    sizes = weight.shape[0], weight.shape[1]
    a, past = None, None
    if run.way is Way.ONCE:
        one = plain(spec, *sizes)
        u = _by_kernels(x, None, None, weight, bias, None, kernels, one, relu)[0].repeat(1, len(spec.rows.names), 1, 1)
    elif run.way is Way.FOLDED:
        one = plain(spec, *sizes)
        u = unfold(_by_kernels(fold(x, spec), None, None, weight, bias, None, kernels, one, relu)[0], spec)
    elif run.way is Way.GROUPED:
        stride, padding, dilation = spec.geometry
        groups = len(spec.columns.names)
        u = F.conv2d(x, weight.to(dtype), None if bias is None else bias.to(dtype), stride, padding, dilation, groups)
        u = F.relu(u) if relu else u
    else:
        around = around and x is given[0] and not through_operators(kernels)
        arguments = x, others, producer, weight, bias, residual, kernels, spec, relu, keep, around
        u, a, *past = _by_kernels(*arguments)
        residual = None
    u = u if residual is None else u + residual.to(u.dtype)
    made_of = None
    if keep:
        a = u.detach() if spec.routing is Routing.ALL else a
        parameters = weight.detach(), None if bias is None else bias.detach()
        made_of = Others(x.detach().to(u.dtype), a, *parameters, kernels, spec)
    x, others = past or given
    return Convolved(u, made_of, x, others, run)


class Others(NamedTuple):
    """What u of the others of all rows is made of."""

    x: Tensor
    a: Tensor | None
    weight: Tensor
    bias: Tensor | None
    kernels: Kernels
    spec: RoutedConv

    def recipe(
        self, scale: Tensor | None, shift: Tensor | None, activation: str | None, kernels: Kernels | None = None
    ) -> Recipe:
        """scale and shift [G-1, rows], or [1, rows] for all alike. `kernels`: other ones than those that computed u."""
        packed = (kernels or self.kernels).pack(self.weight, self.bias, self.spec, self.x.dtype, gates=True)
        return Recipe(self.x, self.a, packed, self.spec, scale, shift, activation)

    def gate_gradient(
        self, dothers: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None
    ) -> Tensor:
        """dz [G-1, rows] = <dL/dF, act(scale * u + shift)>, for an activation that the kernels know."""
        if through_operators(self.kernels):
            return operators.gate_gradient(dothers, *self[:4], scale, shift, self.spec, activation, self.kernels)
        return self.kernels.gate_gradient(self.recipe(scale, shift, activation), dothers)

    def values(self) -> Sequence[Tensor]:
        """u itself: G-1 tensors [N, rows, H', W']."""
        if in_graph():
            return operators.others(*self[:4], self.spec).chunk(len(self.spec.rows.names) - 1, 1)
        return masked.others(self.recipe(None, None, None, masked))

    def split(self) -> tuple[tuple[Tensor | None, ...], Others]:
        """The tensors, for autograd to keep, and what is left; `joined` is the way back."""
        return self[:4], Others(None, None, None, None, *self[4:])  # type: ignore[arg-type]

    def joined(self, tensors: Sequence[Any]) -> Others:
        x, a, weight, bias = tensors
        return self._replace(x=x, a=a, weight=weight, bias=bias)


class Producer(NamedTuple):
    """Where features come from, F = z act(scale * u + shift): a consumer whose kernels can (`COMPUTES_GATE_GRADIENTS`)
    gives the gates z their gradient itself, and dL/dF of the others is never stored. (It then goes past F: not for an F
    that is another tensor by now, or that has hooks or `retain_grad`.)"""

    packed: Tensor  # F
    h: Tensor  # act(..) of the rows, with the gradient that goes to the layer
    gates: Tensor  # [K, T+1]
    groups: FilterGroups
    others: Others | None  # None: only the gates of the drawn groups want a gradient
    scale: Tensor | None  # [T, rows] or [1, rows]
    shift: Tensor | None
    activation: str | None
    own: bool  # do the gates of the drawn groups still want their gradient?


def _by_kernels(
    x: Tensor,
    others: Tensor | None,
    producer: Producer | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernels: Kernels,
    spec: RoutedConv,
    relu: bool,
    keep: bool = False,
    around: bool = False,
) -> tuple[Any, ...]:
    """u, what is kept, and with `around` x and its others again."""
    residual = None if residual is None else residual.to(x.dtype)
    keep = keep and spec.routing is Routing.ARROW
    if producer is not None and not _can_serve(producer, x, kernels, spec):
        producer = None
    if spec.columns.all_gates and (producer or others is None or not others.requires_grad):  # nobody asks for dothers
        spec = spec._replace(columns=dataclasses.replace(spec.columns, all_gates=False))
    arguments = weight, bias, residual, kernels, spec, relu, keep
    if producer is not None:
        tensors, rest = ((), None) if producer.others is None else producer.others.split()
        made = producer._replace(packed=None, h=None, gates=None, others=rest)  # type: ignore[arg-type]
        u, a, *past = _RoutedConv.apply(producer.h, None, producer.gates, *arguments, around, made, *tensors)
    elif through_operators(kernels):
        u, a, *past = operators.routed_conv(x, others, *arguments)
    else:
        u, a, *past = _RoutedConv.apply(x, others, None, *arguments, around, None)
    return u, a if keep else None, *past


def _can_serve(producer: Producer, x: Tensor, kernels: Kernels, spec: RoutedConv) -> bool:
    """Can the consumer of these features give their gates the gradient?"""
    if not kernels.COMPUTES_GATE_GRADIENTS or through_operators(kernels) or spec.geometry.stride != (1, 1):
        return False
    if producer.packed is not x or x._backward_hooks or x.retains_grad:
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
        kernels: Kernels,
        spec: RoutedConv,
        relu: bool,
        keep: bool,
        around: bool,
        producer: Producer | None,
        *made_of: Tensor,
    ) -> Any:
        """`gates` and `producer`, without its tensors, and those of its others: see `Producer`."""
        ctx.set_materialize_grads(False)  # no zeros for a
        y, a, ctx.kept = passes.forward(x, weight, bias, residual, kernels, spec, relu, keep)
        # What passed the ReLU is positive. The weight may lie in `kept` as it is: saved, torch tells if it was changed.
        ctx.save_for_backward(weight, x, y if relu else None, gates, *made_of)
        ctx.kernels, ctx.spec, ctx.producer, ctx.size = kernels, spec, producer, y.shape
        if a is not None:
            ctx.mark_non_differentiable(a)
        if not around:
            return y, a
        zeros = None if others is None else others.view_as(others)
        if producer is not None and producer.others is not None:  # whose gates others are
            n, columns, height, width = x.shape
            zeros = x.new_zeros(()).expand(n, (len(spec.columns.names) - 1) * columns, height, width)
        return y, a, x.view_as(x), zeros

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any, *around: Tensor | None) -> Any:
        if dy is None and not any(gradient is not None for gradient in around):
            return (None,) * len(ctx.needs_input_grad)
        _, x, passed, gates, *made_of = ctx.saved_tensors
        dy = x.new_zeros(ctx.size) if dy is None else dy
        wants_x, wants_others, wants_gates, *wants, wants_residual = ctx.needs_input_grad[:6]
        kept, kernels, spec, producer = ctx.kept, ctx.kernels, ctx.spec, ctx.producer
        past = (around[0], around[1]) if around else (None, None)
        dx: Tensor | None
        dz: Tensor | None = None
        if producer is not None and wants_gates:
            recipe = None
            if producer.others is not None:
                recipe = producer.others.joined(made_of).recipe(producer.scale, producer.shift, producer.activation)
            how = {"relu": passed, "own": producer.own, "around": past}
            assert computes_gate_gradients(kernels)
            dx, of_rows = kernels.input_and_gate_gradient(dy, kept.packed, spec, x, recipe, **how)
            drawn, undrawn = of_rows[0] if producer.own else None, of_rows[1:] if recipe else None
            dz = producer.groups.by_kernel(drawn, undrawn, gates)
            _, dothers, dw, db = passes.backward(dy, x, passed, kept, kernels, spec, [False, *wants])
        else:
            asked = [wants_x or wants_others, *wants]
            dx, dothers, dw, db = passes.backward(dy, x, passed, kept, kernels, spec, asked, past)
        gradients = dx, dothers if wants_others else None, dz, dw, db, dy if wants_residual else None
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))
