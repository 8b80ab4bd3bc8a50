"""The routed convolution as operators registered with torch, for graphs: `torch.compile(fullgraph=True)`.

    sfg_fast::routed_conv           (x, weight, bias, residual, ..) -> (u, what the gates of its others need)
    sfg_fast::routed_conv_backward  (dy, x, weight, ..) -> (dx, gradient of the columns' others, dw, db)
    sfg_fast::gate_gradient         (gradient of the rows' others, x, weight, ..) -> dz of the others
    sfg_fast::others                (x, weight, ..) -> u of the others, for activations that the kernels don't know

A graph sees them as one node each, with shapes but without values (`register_fake`). In eager mode an
autograd.Function does the same work (routed_conv.py), because calling an operator costs more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import flop_counter

from . import backends, passes
from .groups import FilterGroups, Routing
from .kernels import masked
from .kernels.contract import Kernels
from .kernels.packing import memory_format
from .kernels.spec import Geometry, Recipe, RoutedConv

# An operator takes tensors, numbers and strings. `sides`: order and offsets of the rows, and of the columns; `sizes`:
# groups and width of the rows, and of the columns; `geometry`: stride, padding, dilation.


def routed_conv(
    x: Tensor,
    others: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernels: Kernels,
    spec: RoutedConv,
    relu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """What `_RoutedConv.apply` does in eager mode, as an operator. Without `keep` the second tensor is empty."""
    return _forward(x, others, weight, bias, residual, *_numbers(spec), relu, keep, _folder(kernels))


def gate_gradient(
    dothers: Tensor,
    x: Tensor,
    a: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    spec: RoutedConv,
    activation: str | None,
    kernels: Kernels,
) -> Tensor:
    """`kernels.gate_gradient` of unpacked parameters, as an operator: dz [G-1, rows] of the others."""
    return _gate_gradient(dothers, x, a, weight, bias, scale, shift, *_numbers(spec), activation, _folder(kernels))


def others(x: Tensor, a: Tensor | None, weight: Tensor, bias: Tensor | None, spec: RoutedConv) -> Tensor:
    """u of the others side by side, [N, (G-1) * rows, H', W'], by `masked`, as an operator."""
    return _others(x, a, weight, bias, *_numbers(spec))


def _numbers(spec: RoutedConv) -> tuple[list[Tensor], list[int], list[int], str]:
    sizes = [len(spec.rows.names), spec.rows.width, len(spec.columns.names), spec.columns.width]
    sides = [spec.rows.order, spec.rows.offsets, spec.columns.order, spec.columns.offsets]
    return sides, sizes, [number for pair in spec.geometry for number in pair], spec.routing.value


def _folder(kernels: Kernels) -> str:
    return kernels.__name__.rsplit(".", 1)[1]


@library.custom_op("sfg_fast::routed_conv", mutates_args=())
def _forward(
    x: Tensor,
    others: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    relu: bool,
    keep: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    spec = _spec(sides, sizes, geometry, routing, others is not None, keep)
    u, a, _ = passes.forward(x, weight, bias, residual, backends.module(kernels), spec, relu, keep)
    layout = _format(kernels, x)
    return u.contiguous(memory_format=layout), x.new_empty(0) if a is None else a.contiguous(memory_format=layout)


@_forward.register_fake
def _(
    x: Tensor,
    others: Any,
    weight: Tensor,
    bias: Any,
    residual: Any,
    sides: Sequence[Tensor],
    sizes: Any,
    geometry: Sequence[int],
    routing: Any,
    relu: Any,
    keep: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    size = _geometry(geometry).output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    y = _empty(x, sides[0].shape[0], size, kernels)
    return y, _empty(x, sides[0].shape[0], size, kernels) if keep else x.new_empty(0)


@library.custom_op("sfg_fast::routed_conv_backward", mutates_args=())
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
    wants_others: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = _spec(sides, sizes, geometry, routing, wants_others, False)
    module = backends.module(kernels)
    kept = passes.prepare(weight, None, module, spec, x.dtype)
    gradients = passes.backward(dy, x, passed, kept, module, spec, wants)
    dx, dothers, dw, db = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    layout = _format(kernels, x)
    dx, dothers = (d.contiguous(memory_format=layout) if d.dim() == 4 else d for d in (dx, dothers))
    return dx, dothers, dw.to(weight.dtype).contiguous(), db.to(weight.dtype)


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
    wants_others: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = (x.shape[2], x.shape[3])
    dx = _empty(x, x.shape[1], size, kernels) if wants[0] else x.new_empty(0)
    dothers = _empty(x, (sizes[2] - 1) * x.shape[1], size, kernels) if wants_others else x.new_empty(0)
    dw, db = weight.new_empty(weight.shape if wants[1] else 0), weight.new_empty(sizes[1] if wants[2] else 0)
    return dx, dothers, dw, db


@library.custom_op("sfg_fast::gate_gradient", mutates_args=())
def _gate_gradient(
    dothers: Tensor,
    x: Tensor,
    a: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    activation: str | None,
    kernels: str,
) -> Tensor:
    module, spec = backends.module(kernels), _spec(sides, sizes, geometry, routing, False, True)
    packed = module.pack(weight, bias, spec, x.dtype, gates=True)
    return module.gate_gradient(Recipe(x, a, packed, spec, scale, shift, activation), dothers)


@_gate_gradient.register_fake
def _(
    dothers: Tensor,
    x: Any,
    a: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    *rest: Any,
) -> Tensor:
    dtype = torch.promote_types(dothers.dtype, torch.float32)
    return dothers.new_empty((sizes[0] - 1, sides[0].shape[0]), dtype=dtype)


@library.custom_op("sfg_fast::others", mutates_args=())
def _others(
    x: Tensor,
    a: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
) -> Tensor:
    spec = _spec(sides, sizes, geometry, routing, False, True)
    packed = masked.pack(weight, bias, spec, x.dtype, gates=True)
    return torch.cat(masked.others(Recipe(x, a, packed, spec, None, None, None)), 1)


@_others.register_fake
def _(
    x: Tensor,
    a: Any,
    weight: Tensor,
    bias: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: Any,
) -> Tensor:
    size = _geometry(geometry).output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    return x.new_empty((x.shape[0], (sizes[0] - 1) * sides[0].shape[0], *size))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, bias, _, sides, sizes, geometry, routing, relu, _, kernels = inputs
    ctx.save_for_backward(x, weight, output[0] if relu else None, *sides)
    ctx.rest, ctx.bias_dtype = (sizes, geometry, routing, kernels), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, passed, *sides = ctx.saved_tensors
    wants_x, wants_others, *wants, wants_residual = ctx.needs_input_grad[:5]
    asked = [wants_x or wants_others, *wants]
    found = _backward(dy, x, weight, passed, sides, *ctx.rest, asked, wants_others)
    dx, dothers, dw, db = (
        gradient if wanted else None for gradient, wanted in zip(found, (wants_x, wants_others, *wants), strict=True)
    )
    db = None if db is None else db.to(ctx.bias_dtype)
    return dx, dothers, dw, db, dy if wants_residual else None, [None] * len(sides), *[None] * 6


_forward.register_autograd(_gradient, setup_context=_keep)


# --- FLOPs, for torch.utils.flop_counter.FlopCounterMode: of what is computed, not of what is skipped -----------------


@flop_counter.register_flop_formula(torch.ops.sfg_fast.routed_conv, get_raw=True)
def _flops(x: Tensor, others: Any, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    sides, sizes, _, routing = rest[2:6]
    rows, columns = _shares(sides, sizes)
    pairs = [r * c for r, reads in zip(rows, _reads(rows, columns, routing), strict=True) for c in reads]
    return _of_pairs(sum(pairs), weight, out_val[0])


@flop_counter.register_flop_formula(torch.ops.sfg_fast.routed_conv_backward, get_raw=True)
def _flops_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    """dothers: every row's gradient reaches every column, in some group."""
    _, sides, sizes, _, routing, _, wants, wants_others = rest
    rows, columns = _shares(sides, sizes)
    pairs = sum(r * c for r, reads in zip(rows, _reads(rows, columns, routing), strict=True) for c in reads)
    of_input = sum(rows) * sum(columns) if wants_others else pairs
    return _of_pairs(of_input * wants[0] + pairs * wants[1], weight, dy)


@flop_counter.register_flop_formula(torch.ops.sfg_fast.gate_gradient, get_raw=True)
def _flops_gates(dothers: Tensor, x: Tensor, a: Any, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    """Of the rows in the groups they were not drawn into; what they read of the shared group is kept (`a`)."""
    sides, sizes, _, routing = rest[3:7]
    rows, columns = _shares(sides, sizes)
    kept = routing == Routing.ARROW.value
    pairs = 0 if routing == Routing.ALL.value else sum((sum(rows) - r) * c for r, c in zip(rows, columns, strict=True))
    pairs -= (sum(rows) - rows[0]) * columns[0] if kept else 0
    return _of_pairs(pairs, weight, dothers)


def _of_pairs(pairs: float, weight: Tensor, image: Tensor) -> int:
    """Of a convolution that multiplies so many pairs of a row and a column, in an image of this size."""
    return round(2 * pairs * weight.shape[2] * weight.shape[3] * image.shape[0] * image.shape[2] * image.shape[3])


def _shares(sides: Sequence[Tensor], sizes: Sequence[int]) -> list[list[float]]:
    """Rows of each group, and columns; of tensors without values as if all groups had as many."""
    found: list[list[float]] = []
    for order, offsets, groups in zip(sides[::2], sides[1::2], sizes[::2], strict=True):
        if isinstance(offsets, FakeTensor) or offsets.is_meta:
            found.append([order.shape[0] / groups] * groups)
        else:
            found.append(offsets.diff().tolist())
    return found


def _reads(rows: Sequence[float], columns: Sequence[float], routing: str) -> list[list[float]]:
    """For each group of rows how many columns of each group it reads."""
    table = Routing(routing).reads(len(rows), len(columns))
    return [[c for c, read in zip(columns, reads, strict=True) if read] for reads in table]


def _spec(
    sides: Sequence[Tensor], sizes: Sequence[int], geometry: Sequence[int], routing: str, others: bool, keep: bool
) -> RoutedConv:
    """`others`: do the columns have others? `keep`: do the rows?"""
    both = [
        FilterGroups(order, offsets, tuple(map(str, range(number))), width, all_gates=all_gates)
        for order, offsets, number, width, all_gates in zip(
            sides[::2], sides[1::2], sizes[::2], sizes[1::2], (keep, others), strict=True
        )
    ]
    return RoutedConv(both[0], both[1], Routing(routing), _geometry(geometry))


def _format(kernels: str, x: Tensor) -> torch.memory_format:
    return backends.module(kernels).MEMORY_FORMAT or memory_format(x)


def _empty(x: Tensor, channels: int, size: tuple[int, int], kernels: str) -> Tensor:
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(kernels, x))


def _geometry(numbers: Sequence[int]) -> Geometry:
    pairs = [(numbers[i], numbers[i + 1]) for i in (0, 2, 4)]
    return Geometry(*pairs)
