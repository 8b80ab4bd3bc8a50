"""The routed convolution as operators registered with torch, for compiled graphs (`torch.compile(fullgraph=True)`) and
for modes that look at every operation, as counters of FLOPs do.

    sfg_fast::routed_conv           (x, weight, bias, residual, ..) -> (u, the kept product)
    sfg_fast::routed_conv_backward  (dy, x, weight, ..) -> (dx, dundrawn, dw, db)
    sfg_fast::gate_gradient         (dundrawn, x, weight, ..) -> dz of the undrawn gates
    sfg_fast::undrawn_rows          (x, weight, ..) -> u of the undrawn rows, for activations that kernels don't know

Each operator is one node of a compiled graph; `register_fake` gives the shape of its result without computing it. The
operators call a `Run`. In eager mode autograd functions do the same (eager.py), because calling an operator takes
longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils import flop_counter

from .. import backends
from ..groups import FilterGroups, Routing
from ..kernels import masked
from ..kernels.contract import Kernels
from ..kernels.packing import memory_format
from ..kernels.spec import Geometry, RoutedConv, UndrawnFormula
from ..tracing import without_values
from .run import Call, Run, Way


def routed_conv(
    x: Tensor, undrawn: Tensor | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """As `eager.routed_conv`, as an operator. Without `call.keep_product` the second tensor is empty."""
    run = call.run
    tensors = x, undrawn, weight, bias, residual
    return _forward(*tensors, *_flat(run.spec), call.relu, call.keep_product, _folder(run.kernels))


def gate_gradient(
    dundrawn: Tensor,
    x: Tensor,
    kept_product: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    run: Run,
) -> Tensor:
    """dz [T, rows] of the undrawn gates, as `contract.Kernels.gate_gradient`, from parameters that are not packed."""
    tensors = dundrawn, x, kept_product, weight, bias, scale, shift
    return _gate_gradient(*tensors, *_flat(run.spec), activation, _folder(run.kernels))


def undrawn_rows(
    x: Tensor, kept_product: Tensor | None, weight: Tensor, bias: Tensor | None, spec: RoutedConv
) -> Tensor:
    """u of the undrawn rows side by side, [N, T * rows, H', W'], by `masked`."""
    return _undrawn_rows(x, kept_product, weight, bias, *_flat(spec))


# An operator takes tensors, numbers and strings, so a `RoutedConv` is taken to pieces. `sides`: order and offsets of
# the rows, and of the columns; `sizes`: groups and width of the rows, and of the columns; `geometry`: stride, padding,
# dilation; `routing`: its value.


def _flat(spec: RoutedConv) -> tuple[list[Tensor], list[int], list[int], str]:
    sizes = [len(spec.rows.names), spec.rows.width, len(spec.columns.names), spec.columns.width]
    sides = [spec.rows.order, spec.rows.offsets, spec.columns.order, spec.columns.offsets]
    return sides, sizes, [number for pair in spec.geometry for number in pair], spec.routing.value


def _run(
    kernels: str,
    x: Tensor,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    *,
    all_gates: tuple[bool, bool],
) -> Run:
    """The run that the pieces were taken from. `all_gates`: do undrawn rows and undrawn columns count?"""
    both = [
        FilterGroups(order, offsets, tuple(map(str, range(number))), width, all_gates=count)
        for order, offsets, number, width, count in zip(
            sides[::2], sides[1::2], sizes[::2], sizes[1::2], all_gates, strict=True
        )
    ]
    spec = RoutedConv(both[0], both[1], Routing(routing), _geometry(geometry))
    return Run(backends.module(kernels), x.dtype, Way.PACKED, spec, in_graph=False, by_operators=False)


def _folder(kernels: Kernels) -> str:
    """The name of the kernels' module in kernels/."""
    return kernels.__name__.rsplit(".", 1)[1]


@library.custom_op("sfg_fast::routed_conv", mutates_args=())
def _forward(
    x: Tensor,
    undrawn: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    relu: bool,
    keep_product: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    run = _run(kernels, x, sides, sizes, geometry, routing, all_gates=(keep_product, undrawn is not None))
    parameters = run.pack(weight, bias, x.dtype)
    u, kept_product = run.forward(x, parameters, relu=relu, residual=residual, keep_product=keep_product)
    layout, empty = _format(kernels, x), x.new_empty(0)
    return u.contiguous(memory_format=layout), (
        empty if kept_product is None else kept_product.contiguous(memory_format=layout)
    )


@_forward.register_fake
def _(
    x: Tensor,
    undrawn: Any,
    weight: Tensor,
    bias: Any,
    residual: Any,
    sides: Sequence[Tensor],
    sizes: Any,
    geometry: Sequence[int],
    routing: Any,
    relu: Any,
    keep_product: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    size = _geometry(geometry).output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    y = _empty(x, sides[0].shape[0], size, kernels)
    return y, _empty(x, sides[0].shape[0], size, kernels) if keep_product else x.new_empty(0)


@library.custom_op("sfg_fast::routed_conv_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    relu_output: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
    kernels: str,
    wants: Sequence[bool],
    wants_undrawn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = _run(kernels, x, sides, sizes, geometry, routing, all_gates=(False, wants_undrawn))
    gradients = run.backward(dy, x, run.pack(weight, None, x.dtype), wants, relu_output=relu_output)
    dx, dundrawn, dw, db = (x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    layout = _format(kernels, x)
    dx, dundrawn = (d.contiguous(memory_format=layout) if d.dim() > 1 else d for d in (dx, dundrawn))
    return dx, dundrawn, dw.to(weight.dtype).contiguous(), db.to(weight.dtype)


@_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    relu_output: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Any,
    routing: Any,
    kernels: Any,
    wants: Sequence[bool],
    wants_undrawn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = tuple(x.shape[2:])
    dx = _empty(x, x.shape[1], size, kernels) if wants[0] else x.new_empty(0)
    dundrawn = _empty(x, (sizes[2] - 1) * x.shape[1], size, kernels) if wants_undrawn else x.new_empty(0)
    dw, db = weight.new_empty(weight.shape if wants[1] else 0), weight.new_empty(sizes[1] if wants[2] else 0)
    return dx, dundrawn, dw, db


@library.custom_op("sfg_fast::gate_gradient", mutates_args=())
def _gate_gradient(
    dundrawn: Tensor,
    x: Tensor,
    kept_product: Tensor | None,
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
    run = _run(kernels, x, sides, sizes, geometry, routing, all_gates=(True, False))
    packed = run.kernels.pack(weight, bias, run.spec, x.dtype)
    undrawn = UndrawnFormula(x, kept_product, packed, run.spec, scale, shift, activation)
    return run.kernels.gate_gradient(undrawn, dundrawn)


@_gate_gradient.register_fake
def _(
    dundrawn: Tensor,
    x: Any,
    kept_product: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    shift: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    *rest: Any,
) -> Tensor:
    dtype = torch.promote_types(dundrawn.dtype, torch.float32)
    return dundrawn.new_empty((sizes[0] - 1, sides[0].shape[0]), dtype=dtype)


@library.custom_op("sfg_fast::undrawn_rows", mutates_args=())
def _undrawn_rows(
    x: Tensor,
    kept_product: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: str,
) -> Tensor:
    run = _run("masked", x, sides, sizes, geometry, routing, all_gates=(True, False))
    packed = masked.pack(weight, bias, run.spec, x.dtype)
    undrawn = UndrawnFormula(x, kept_product, packed, run.spec, None, None, None)
    return torch.cat(masked.undrawn_rows(undrawn), 1)


@_undrawn_rows.register_fake
def _(
    x: Tensor,
    kept_product: Any,
    weight: Tensor,
    bias: Any,
    sides: Sequence[Tensor],
    sizes: Sequence[int],
    geometry: Sequence[int],
    routing: Any,
) -> Tensor:
    size = _geometry(geometry).output_size(tuple(x.shape[2:]), tuple(weight.shape[2:]))
    return x.new_empty((x.shape[0], (sizes[0] - 1) * sides[0].shape[0], *size))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, bias, _, sides, sizes, geometry, routing, relu, _, kernels = inputs
    ctx.save_for_backward(x, weight, output[0] if relu else None, *sides)
    ctx.rest, ctx.bias_dtype = (sizes, geometry, routing, kernels), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, weight, relu_output, *sides = ctx.saved_tensors
    wants_x, wants_undrawn, *wants, wants_residual = ctx.needs_input_grad[:5]
    asked = [wants_x or wants_undrawn, *wants]
    found = _backward(dy, x, weight, relu_output, sides, *ctx.rest, asked, wants_undrawn)
    dx, dundrawn, dw, db = (
        gradient if wanted else None for gradient, wanted in zip(found, (wants_x, wants_undrawn, *wants), strict=True)
    )
    db = None if db is None else db.to(ctx.bias_dtype)
    return dx, dundrawn, dw, db, dy if wants_residual else None, [None] * len(sides), *[None] * 6


_forward.register_autograd(_gradient, setup_context=_save)


# --- FLOPs, for torch.utils.flop_counter.FlopCounterMode: they count what is computed, not what is skipped -----------


@flop_counter.register_flop_formula(torch.ops.sfg_fast.routed_conv, get_raw=True)
def _flops(x: Tensor, undrawn: Any, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    sides, sizes, _, routing = rest[2:6]
    rows, columns = _shares(sides, sizes)
    pairs = [r * c for r, reads in zip(rows, _reads(rows, columns, routing), strict=True) for c in reads]
    return _of_pairs(sum(pairs), weight, out_val[0])


@flop_counter.register_flop_formula(torch.ops.sfg_fast.routed_conv_backward, get_raw=True)
def _flops_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any, **_: Any) -> int:
    """For dundrawn the gradient of every row reaches every column, in some group."""
    _, sides, sizes, _, routing, _, wants, wants_undrawn = rest
    rows, columns = _shares(sides, sizes)
    pairs = sum(r * c for r, reads in zip(rows, _reads(rows, columns, routing), strict=True) for c in reads)
    of_input = sum(rows) * sum(columns) if wants_undrawn else pairs
    return _of_pairs(of_input * wants[0] + pairs * wants[1], weight, dy)


@flop_counter.register_flop_formula(torch.ops.sfg_fast.gate_gradient, get_raw=True)
def _flops_gates(dundrawn: Tensor, x: Any, kept_product: Any, weight: Tensor, *rest: Any, **_: Any) -> int:
    return _of_undrawn_rows(weight, dundrawn, *rest[3:7])


@flop_counter.register_flop_formula(torch.ops.sfg_fast.undrawn_rows, get_raw=True)
def _flops_undrawn(x: Any, kept_product: Any, weight: Tensor, bias: Any, *rest: Any, out_val: Any, **_: Any) -> int:
    return _of_undrawn_rows(weight, out_val, *rest)


def _of_undrawn_rows(
    weight: Tensor, image: Tensor, sides: Sequence[Tensor], sizes: Sequence[int], _: Any, routing: str
) -> int:
    """FLOPs of u of the undrawn rows. With Routing.ARROW their product with the shared group is kept."""
    rows, columns = _shares(sides, sizes)
    kept = routing == Routing.ARROW.value
    pairs = 0 if routing == Routing.ALL.value else sum((sum(rows) - r) * c for r, c in zip(rows, columns, strict=True))
    pairs -= (sum(rows) - rows[0]) * columns[0] if kept else 0
    return _of_pairs(pairs, weight, image)


def _of_pairs(pairs: float, weight: Tensor, image: Tensor) -> int:
    """FLOPs of a convolution that multiplies so many pairs of a row and a column, in images of this size."""
    return round(2 * pairs * weight.shape[2:].numel() * image.shape[0] * image.shape[2:].numel())


def _shares(sides: Sequence[Tensor], sizes: Sequence[int]) -> list[list[float]]:
    """The number of rows of each group, and of columns. Of tensors without values: as if all groups had as many."""
    found: list[list[float]] = []
    for order, offsets, groups in zip(sides[::2], sides[1::2], sizes[::2], strict=True):
        if without_values(offsets):
            found.append([order.shape[0] / groups] * groups)
        else:
            found.append(offsets.diff().tolist())
    return found


def _reads(rows: Sequence[float], columns: Sequence[float], routing: str) -> list[list[float]]:
    """For each group of rows how many columns of each group it reads."""
    table = Routing(routing).reads(len(rows), len(columns))
    return [[c for c, read in zip(columns, reads, strict=True) if read] for reads in table]


def _format(kernels: str, x: Tensor) -> torch.memory_format:
    return backends.module(kernels).MEMORY_FORMAT or memory_format(x)


def _empty(x: Tensor, channels: int, size: tuple[int, ...], kernels: str) -> Tensor:
    shape = (x.shape[0], channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(kernels, x))


def _geometry(numbers: Sequence[int]) -> Geometry:
    dims = len(numbers) // 3
    return Geometry(*(tuple(numbers[start : start + dims]) for start in range(0, len(numbers), dims)))
