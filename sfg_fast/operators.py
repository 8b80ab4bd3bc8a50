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

# An operator takes tensors, numbers and strings. Of each side: order and offsets, and those of the live rows if not all
# are; `sizes`: groups and width of the rows, and of the columns.


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
    sides = *_tensors(spec.rows), *_tensors(spec.columns)
    live, rest = _forward(x, weight, bias, residual, *sides, sizes, geometry, spec.routing.value, relu, name)
    return live, rest if _has_rest(kernels, spec) else None


@torch.library.custom_op("sfg_fast::routed_conv", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor,
    row_offsets: Tensor,
    live_rows: Tensor | None,
    live_row_offsets: Tensor | None,
    columns: Tensor,
    column_offsets: Tensor,
    live_columns: Tensor | None,
    live_column_offsets: Tensor | None,
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    relu: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    sides = (
        (rows, row_offsets, live_rows, live_row_offsets),
        (
            columns,
            column_offsets,
            live_columns,
            live_column_offsets,
        ),
    )
    spec = _spec(*sides, sizes, geometry, routing)
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
    rows: Tensor,
    row_offsets: Any,
    live_rows: Tensor | None,
    live_row_offsets: Any,
    columns: Any,
    column_offsets: Any,
    live_columns: Tensor | None,
    live_column_offsets: Any,
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    relu: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    size = _geometry(geometry).output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    live = rows if live_rows is None else live_rows
    y = _empty(x, live.shape[0], size, kernels)
    spec = _spec((rows, None, live_rows, None), (columns, None, live_columns, None), sizes, geometry, routing)
    if not _has_rest(backends.module(kernels), spec):
        return y, x.new_empty(0)
    if passes.recomputes(backends.module(kernels), spec):
        assert live_columns is not None
        return y, _empty(x, live_columns.shape[0], (x.shape[2], x.shape[3]), kernels)
    return y, _empty(x, rows.shape[0], size, kernels)


@torch.library.custom_op("sfg_fast::routed_conv_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    passed: Tensor | None,
    rows: Tensor,
    row_offsets: Tensor,
    live_rows: Tensor | None,
    live_row_offsets: Tensor | None,
    columns: Tensor,
    column_offsets: Tensor,
    live_columns: Tensor | None,
    live_column_offsets: Tensor | None,
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    kernels: str,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    sides = (
        (rows, row_offsets, live_rows, live_row_offsets),
        (
            columns,
            column_offsets,
            live_columns,
            live_column_offsets,
        ),
    )
    spec = _spec(*sides, sizes, geometry, routing)
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
    rows: Any,
    row_offsets: Any,
    live_rows: Any,
    live_row_offsets: Any,
    columns: Any,
    column_offsets: Any,
    live_columns: Any,
    live_column_offsets: Any,
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
    x, weight, bias, _, *sides_and_rest = inputs
    sides, (sizes, geometry, routing, relu, kernels) = sides_and_rest[:8], sides_and_rest[8:]
    ctx.save_for_backward(x, weight, output[0] if relu else None, *sides)
    ctx.rest, ctx.bias_dtype = (sizes, geometry, routing, kernels), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, passed, *sides = ctx.saved_tensors
    *wants, wants_residual = ctx.needs_input_grad[:4]
    dx, dw, db = _backward(dy, x, weight, passed, *sides, *ctx.rest, wants)
    found = [gradient if wanted else None for gradient, wanted in zip((dx, dw, db), wants, strict=True)]
    if found[2] is not None:
        found[2] = found[2].to(ctx.bias_dtype)
    return *found, dy if wants_residual else None, *[None] * 13


_forward.register_autograd(_gradient, setup_context=_keep)


def _tensors(groups: FilterGroups) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    drawn = groups.drawn
    return (
        groups.order,
        groups.offsets,
        None if drawn is None else drawn.order,
        None if drawn is None else drawn.offsets,
    )


def _spec(
    rows: Sequence[Any], columns: Sequence[Any], sizes: Sequence[int], geometry: Sequence[int], routing: str
) -> RoutedConv:
    def groups(order: Any, offsets: Any, live: Any, live_offsets: Any, number: int, width: int) -> FilterGroups:
        names = tuple(map(str, range(number)))
        drawn = None if live is None else FilterGroups(live, live_offsets, names, width)
        return FilterGroups(order, offsets, names, width, drawn=drawn)

    both = groups(*rows, *sizes[:2]), groups(*columns, *sizes[2:])
    return RoutedConv(*both, Routing(routing), _geometry(geometry))


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
