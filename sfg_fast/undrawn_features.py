"""Undrawn features: what kernels have in the groups they were not drawn into. They are zeros, and take no memory.

Their gradient dL/dF is not zero: the gates of undrawn rows learn from it. So the graph of autograd has to carry it, and
each function here says where it goes on to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .tracing import in_graph


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of this shape that take no memory, as `like` in dtype and device."""
    return like.new_zeros(()).expand(*shape)


def of_drawn(drawn: Tensor, groups: int) -> Tensor:
    """The undrawn features [N, (groups - 1) * rows, H, W] beside drawn rows [N, rows, H, W]."""
    n, rows, *size = drawn.shape
    return zeros(drawn, n, (groups - 1) * rows, *size)


def no_memory(shape: Sequence[int], dtype: torch.dtype, *inputs: Tensor, device: Any = None) -> Tensor:
    """Zeros that take no memory, whose gradient goes to all `inputs`, which have the same shape."""
    return _NoMemory.apply(tuple(shape), dtype, device, *inputs)


def of_sum(*parts: Tensor | None) -> Tensor | None:
    """The undrawn features of a sum of features, from those of its parts (None: a part has none)."""
    inputs = [part for part in parts if part is not None]
    return no_memory(inputs[0].shape, inputs[0].dtype, *inputs) if inputs else None


def of_concatenation(places: Tensor, counts: list[int], parts: Sequence[Tensor | None]) -> Tensor:
    """The undrawn features of concatenated features. `counts` are the rows of each part; row r of all parts, one behind
    the other, is row places[r] of the result. A part that is None gets no gradient."""
    has = [part is not None for part in parts]
    return _Concatenated.apply(places, counts, has, *(part for part in parts if part is not None))


def channelwise(undrawn: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """The undrawn features behind an operation that keeps zeros and treats every channel alone."""
    if in_graph():  # a graph holds no autograd function with a Python callable: there `operation` runs on real zeros
        return operation(undrawn)
    return _Operation.apply(undrawn, operation)


def of_taken(undrawn: Tensor, rows: Tensor, count: int) -> Tensor:
    """The undrawn features [N, T * len(rows), H, W] of some of `count` rows: row r of the result is row `rows[r]`, and
    no row comes twice."""
    return _Taken.apply(undrawn, rows, count)


def scaled(undrawn: Tensor, scale: Tensor, rows: Tensor | None = None) -> Tensor:
    """The undrawn features [N, R, H, W] times `scale`, which gets no gradient: [R, 1, 1], or [N, R, H, W] with 1 in
    place of any size. With `rows`, int64 [R], channel r is multiplied with channel `rows[r]` of `scale`."""
    return _Scaled.apply(undrawn, scale, rows)


class _NoMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, *inputs: Tensor) -> Tensor:
        ctx.likes = [(tensor.dtype, tensor.device) for tensor in inputs]
        return inputs[0].new_zeros((), dtype=dtype, device=device).expand(*shape)

    @staticmethod
    def backward(ctx: Any, dundrawn: Tensor) -> Any:
        return None, None, None, *(dundrawn.to(dtype=dtype, device=device) for dtype, device in ctx.likes)


class _Concatenated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Tensor, counts: list[int], has: list[bool], *parts: Tensor) -> Tensor:
        ctx.counts, ctx.has, ctx.tasks = counts, has, parts[0].shape[1] // counts[has.index(True)]
        ctx.save_for_backward(places)
        n, _, *size = parts[0].shape
        return zeros(parts[0], n, ctx.tasks * sum(counts), *size)

    @staticmethod
    def backward(ctx: Any, dundrawn: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        by_task, of_parts = dundrawn.unflatten(1, (ctx.tasks, -1)), zip(places.split(ctx.counts), ctx.has, strict=True)
        return None, None, None, *(by_task.index_select(2, place).flatten(1, 2) for place, has in of_parts if has)


class _Operation(torch.autograd.Function):
    """The gradient of the operation at zero is computed in the backward pass, on zeros that have memory."""

    @staticmethod
    def forward(ctx: Any, undrawn: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape, ctx.operation = undrawn.shape, operation
        return zeros(undrawn, *operation(torch.empty_like(undrawn, device="meta")).shape)

    @staticmethod
    def backward(ctx: Any, dundrawn: Tensor) -> Any:
        with torch.enable_grad():
            before = dundrawn.new_zeros(ctx.shape).requires_grad_()
            return torch.autograd.grad(ctx.operation(before), before, dundrawn)[0], None


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, undrawn: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.count, ctx.tasks = count, undrawn.shape[1] // count
        ctx.save_for_backward(rows)
        n, _, *size = undrawn.shape
        return zeros(undrawn, n, ctx.tasks * len(rows), *size)

    @staticmethod
    def backward(ctx: Any, dundrawn: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        n, _, *size = dundrawn.shape
        every = dundrawn.new_zeros(n, ctx.tasks, ctx.count, *size)
        every.index_copy_(2, rows, dundrawn.unflatten(1, (ctx.tasks, -1)))
        return every.flatten(1, 2), None, None


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, undrawn: Tensor, scale: Tensor, rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale, rows)
        return undrawn.view_as(undrawn)

    @staticmethod
    def backward(ctx: Any, dundrawn: Tensor) -> Any:
        scale, rows = ctx.saved_tensors
        scale = scale if rows is None else scale.index_select(1, rows)
        return dundrawn * scale.to(dundrawn.dtype), None, None
