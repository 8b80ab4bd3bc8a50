"""The routed convolution as operators registered with torch, for graphs: `torch.compile(fullgraph=True)`.

    sfg_fast::routed_conv           (x, weight, bias, residual, ..) -> (u of the live rows, what their gates need)
    sfg_fast::routed_conv_backward  (dy, x, weight, ..) -> (dx, dw, db)

A graph sees them as one node each, with shapes but without values (`register_fake`). In eager mode an
autograd.Function does the same work (routed_conv.py), because calling an operator costs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, passes
from .groups import FilterGroups, Routing
from .kernels.packing import channels_last
from .kernels.spec import Geometry, RoutedConv

# An operator takes tensors, numbers and strings. `sides`: of the rows, and of the columns, order and offsets, and those
# of the live ones (empty tensors, if all are); `sizes`: groups and width of the rows, and of the columns.


def routed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernels: Any,
    spec: RoutedConv,
    relu: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `_RoutedConv.apply` does in eager mode, as an operator."""
    name = kernels.__name__.rsplit(".", 1)[1]
    sizes = [len(spec.rows.names), spec.rows.width, len(spec.columns.names), spec.columns.width]
    geometry = [number for pair in spec.geometry for number in pair]
    sides = [*_tensors(spec.rows), *_tensors(spec.columns)]
    live, rest = _forward(x, weight, bias, residual, sides, sizes, geometry, spec.routing.value, relu, name)
    return live, rest if _has_rest(kernels, spec) else None


@torch.library.custom_op("sfg_fast::routed_conv", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    relu: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    spec = _spec(sides, sizes, geometry, routing)
    live, rest, _, _ = passes.forward(x, weight, bias, residual, backends.module(kernels), spec, relu)
    layout = _format(kernels, x)
    return live.contiguous(memory_format=layout), x.new_empty(0) if rest is None else rest.contiguous(
        memory_format=layout
    )


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    residual: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    relu: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    size = _geometry(geometry).output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    spec = _spec(sides, sizes, geometry, routing)
    y = _empty(x, spec.rows.live.order.shape[0], size, kernels)
    if not _has_rest(backends.module(kernels), spec):
        return y, x.new_empty(0)
    if passes.recomputes(backends.module(kernels), spec):
        return y, _empty(x, spec.columns.live.order.shape[0], (x.shape[2], x.shape[3]), kernels)
    return y, _empty(x, spec.rows.order.shape[0], size, kernels)


@torch.library.custom_op("sfg_fast::routed_conv_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    passed: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    kernels: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _spec(sides, sizes, geometry, routing)
    module = backends.module(kernels)
    live_x, kept = passes.prepare_backward(x, weight, module, spec)
    gradients = passes.backward(dy, live_x, passed, kept, module, spec, (x.shape[2], x.shape[3]), wants)
    dx, dw, db = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    if wants[0]:
        dx = dx.contiguous(memory_format=_format(kernels, x))
    return dx, dw.to(weight.dtype).contiguous(), db.to(weight.dtype)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    passed: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Any,
    routing: Any,
    kernels: Any,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _empty(x, x.shape[1], (x.shape[2], x.shape[3]), kernels) if wants[0] else x.new_empty(0)
    dw, db = weight.new_empty(weight.shape if wants[1] else 0), weight.new_empty(sizes[1] if wants[2] else 0)
    return dx, dw, db


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, sides, sizes, geometry, routing, relu, kernels = inputs
    ctx.save_for_backward(x, weight, output[0] if relu else None, *sides)
    ctx.rest, ctx.bias_dtype = (sizes, geometry, routing, kernels), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, passed, *sides = ctx.saved_tensors
    *wants, wants_residual = ctx.needs_input_grad[:4]
    dx, dw, db = _backward(dy, x, weight, passed, sides, *ctx.rest, wants)
    found = [gradient if wanted else None for gradient, wanted in zip((dx, dw, db), wants, strict=True)]
    if found[2] is not None:
        found[2] = found[2].to(ctx.bias_dtype)
    return *found, dy if wants_residual else None, [None] * len(sides), *[None] * 5


_forward.register_autograd(_gradient, setup_context=_keep)


def _tensors(groups: FilterGroups) -> list[Tensor]:
    drawn = groups.drawn
    live = [groups.order.new_empty(0)] * 2 if drawn is None else [drawn.order, drawn.offsets]
    return [groups.order, groups.offsets, *live]


def _spec(sides: Sequence[Tensor], sizes: Sequence[int], geometry: Sequence[int], routing: str) -> RoutedConv:
    both = []
    for (order, offsets, live, live_offsets), (number, width) in zip(
        (sides[:4], sides[4:]), (sizes[:2], sizes[2:]), strict=True
    ):
        names = tuple(map(str, range(number)))
        drawn = FilterGroups(live, live_offsets, names, width) if live_offsets.shape[0] else None
        both.append(FilterGroups(order, offsets, names, width, drawn=drawn))
    return RoutedConv(both[0], both[1], Routing(routing), _geometry(geometry))


def _format(kernels: str, x: Tensor) -> torch.memory_format:
    fixed = backends.module(kernels).MEMORY_FORMAT
    return fixed or (torch.channels_last if channels_last(x) else torch.contiguous_format)


def _empty(x: Tensor, channels: int, size: tuple[int, int], kernels: str) -> Tensor:
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(kernels, x))


def _geometry(numbers: Sequence[int]) -> Geometry:
    pairs = [(numbers[i], numbers[i + 1]) for i in (0, 2, 4)]
    return Geometry(*pairs)


def _has_rest(kernels: Any, spec: RoutedConv) -> bool:
    """Does `passes.forward` return a second tensor?"""
    return spec.rows.drawn is not None and not (passes.recomputes(kernels, spec) and spec.columns.drawn is None)
