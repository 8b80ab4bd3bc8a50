"""`SFGFeatures`: what flows between SFG layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .groups import FilterGroups, Routing
from .kernels.packing import select_channels
from .plain_ops import TensorLike
from .tracing import in_graph


@dataclasses.dataclass(frozen=True, eq=False)
class SFGFeatures(TensorLike):
    """The features of all groups in one packed tensor. Immutable.

    Attributes:
        packed: [N, rows, H, W], channels in the order of `groups` (its `order` and `offsets`).
        groups: what each channel is.
        routing: how the next layer reads these features: `ARROW` merges by summation (paper, section 2.1), `OWN` when
            every group's tensor already holds what that group is to read (after a merge).
        others: zeros that take no memory, [N, T * rows, H, W]: what the kernels have in the T groups they were not
            drawn into (`FilterGroups.others`). Their gradient is what the gates of those groups learn from; None if
            these gates don't learn.
        producer: how an SFG layer made these features (`routed_conv.Producer`), if nothing was done to them since.
    """

    packed: Tensor
    groups: FilterGroups
    routing: Routing = Routing.ARROW
    others: Tensor | None = None
    producer: Any = None

    def dense(self, group: int | str) -> Tensor:
        """F_group as [N, K, H, W]: kernels in their own order, zero where a kernel is in another group."""
        return self._select((self.groups.index(group),))

    def merged(self, task: int | str) -> Tensor:
        """[F_task | F_shared], merged by summation, [N, K, H, W]; the shared group's features for `shared` itself."""
        group = self.groups.index(task)
        if self.routing is Routing.OWN or group == 0:
            return self.dense(group)
        return self._select((group, 0))

    def _select(self, groups: tuple[int, ...]) -> Tensor:
        width = self.groups.width
        if self.groups.full:
            parts = [self.packed[:, group * width : (group + 1) * width] for group in groups]
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return _Dense.apply(self.packed, self.others, self.groups, groups)

    def streams(self) -> Tensor:
        """All groups' dense tensors side by side, [N, (T+1)K, H, W]."""
        return self.packed if self.groups.full else _Streams.apply(self.packed, self.others, self.groups)

    def __iter__(self) -> Iterator[Tensor]:
        """The T+1 dense tensors, shared first: code written for dense masking runs unchanged."""
        return (self.dense(group) for group in range(len(self)))

    def __getitem__(self, group: int) -> Tensor:
        return self.dense(group)

    def __len__(self) -> int:
        return len(self.groups.names)

    def __add__(self, other: SFGFeatures) -> SFGFeatures:
        """A shortcut. Both must be of one draw: a packed tensor can't hold a kernel in two groups."""
        if not isinstance(other, SFGFeatures):
            return NotImplemented
        self.check_same_draw(other.groups, other.routing)
        others = joined_others(self.others, other.others)
        return SFGFeatures(self.packed + other.packed, self.groups, self.routing, others)

    def check_same_draw(self, groups: FilterGroups, routing: Routing = Routing.ARROW) -> None:
        """Raises ValueError unless features of these groups can be added."""
        if self.routing is not routing or not self.groups.same_as(groups):
            raise ValueError(
                "features of different groupings can't be added: let both convolutions share one draw "
                f"(conv(x, groups=features.groups)); got {self.groups} and {groups}"
            )

    def concatenate(self, *more: SFGFeatures) -> SFGFeatures:
        """[F | F' | ..] along the channels: the kernels of all, each in its own group (`torch.cat` does this)."""
        every = (self, *more)
        if len({features.routing for features in every}) > 1:
            raise ValueError(f"features routed {[one.routing.value for one in every]} can't be concatenated")
        groups = FilterGroups.joined([features.groups for features in every])
        if groups.full:
            streams = [one.streams().unflatten(1, (len(self), -1)) for one in every]
            return SFGFeatures(torch.cat(streams, 2).flatten(1, 2), groups, self.routing)
        starts = itertools.accumulate([0, *(one.groups.width for one in every[:-1])])
        rows = torch.cat([one.groups.inverse + start for one, start in zip(every, starts, strict=True)])[groups.order]
        packed = select_channels(torch.cat([one.packed for one in every], 1), rows)
        others = None
        if groups.all_gates:
            inputs = [one.others for one in every if one.others is not None]
            where = [one.others is not None for one in every]
            others = _JoinedOthers.apply(rows, [one.packed.shape[1] for one in every], where, *inputs)
        return SFGFeatures(packed, groups, self.routing, others)

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> SFGFeatures:
        """`operation` on every channel: it must treat each alone, and keep zeros (padding, pooling, interpolation)."""
        others = self.others
        if others is not None:  # in a graph the plain operation does, zeros and all
            others = operation(others) if in_graph() else _OnZeros.apply(others, operation)
        return SFGFeatures(operation(self.packed), self.groups, self.routing, others)

    def to(self, *args: Any, **kwargs: Any) -> SFGFeatures:
        """As `Tensor.to`, for every tensor held (a dtype for the floating point ones)."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(t: Tensor) -> Tensor:
            if t is self.others:  # `Tensor.to` would give it memory
                return no_memory(t.shape, dtype or t.dtype, t, device=device)
            return t.to(device, dtype if t.is_floating_point() else None, non_blocking)

        return self._map(move)

    def float(self) -> SFGFeatures:
        return self.to(torch.float32)

    def detach(self) -> SFGFeatures:
        return self._map(torch.Tensor.detach)

    def _map(self, fn) -> SFGFeatures:  # type: ignore[no-untyped-def]
        others = None if self.others is None else fn(self.others)
        return SFGFeatures(fn(self.packed), self.groups.map(fn), self.routing, others)

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def shape(self) -> torch.Size:
        """The shape of one dense tensor, [N, K, H, W]."""
        n, _, h, w = self.packed.shape
        return torch.Size((n, self.groups.width, h, w))

    def __repr__(self) -> str:
        return f"SFGFeatures(packed={tuple(self.packed.shape)}, {self.groups}, routing={self.routing.value})"


class _NoMemory(torch.autograd.Function):
    """Zeros that take no memory. Their gradient goes to all `inputs`, which are like them."""

    @staticmethod
    def forward(ctx: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, *inputs: Tensor) -> Tensor:
        ctx.likes = [(tensor.dtype, tensor.device) for tensor in inputs]
        return inputs[0].new_zeros((), dtype=dtype, device=device).expand(*shape)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        return None, None, None, *(df.to(dtype=dtype, device=device) for dtype, device in ctx.likes)


def no_memory(shape: Sequence[int], dtype: torch.dtype, *inputs: Tensor, device: Any = None) -> Tensor:
    return _NoMemory.apply(tuple(shape), dtype, device, *inputs)


def joined_others(*parts: Tensor | None) -> Tensor | None:
    """The others of a sum."""
    inputs = [part for part in parts if part is not None]
    return no_memory(inputs[0].shape, inputs[0].dtype, *inputs) if inputs else None


class _JoinedOthers(torch.autograd.Function):
    """The others of concatenated features: row r is number `rows[r]` of the parts' `counts` rows. Parts that have no
    others (not `where`) get no gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], where: list[bool], *parts: Tensor) -> Tensor:
        ctx.counts, ctx.where, ctx.tasks = counts, where, parts[0].shape[1] // counts[where.index(True)]
        ctx.save_for_backward(rows)
        n, _, height, width = parts[0].shape
        return parts[0].new_zeros(()).expand(n, ctx.tasks * len(rows), height, width)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        by_part = df.unflatten(1, (ctx.tasks, -1)).index_select(2, torch.argsort(rows)).split(ctx.counts, 2)
        return None, None, None, *(d.flatten(1, 2) for d, has in zip(by_part, ctx.where, strict=True) if has)


class _OnZeros(torch.autograd.Function):
    """An operation on zeros that take no memory, whose result is zero, too. Its gradient there is what it is."""

    @staticmethod
    def forward(ctx: Any, others: Tensor, operation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape, ctx.operation = others.shape, operation
        shape = operation(torch.empty_like(others, device="meta")).shape
        return others.new_zeros(()).expand(*shape)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        with torch.enable_grad():
            zeros = df.new_zeros(ctx.shape).requires_grad_()
            return torch.autograd.grad(ctx.operation(zeros), zeros, df)[0], None


class _Dense(torch.autograd.Function):
    """The rows of some groups -> [N, K, H, W], zero where a kernel is in none of them; so are its others, but they get
    their gradient."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, others: Tensor | None, groups: FilterGroups, wanted: Sequence[int]) -> Tensor:
        ctx.groups, ctx.wanted = groups, wanted
        here = _one_of(groups.ids, wanted)
        ctx.save_for_backward(here)
        # `where`, not a product: a NaN of one task must not reach another.
        return select_channels(packed.where(here[:, None, None], 0), groups.inverse)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        (here,) = ctx.saved_tensors
        df = select_channels(df, ctx.groups.order)
        dothers = None
        if ctx.needs_input_grad[1]:
            rows = _one_of(ctx.groups.others, ctx.wanted)
            dothers = torch.cat([df.where(row[:, None, None], 0) for row in rows], 1)
        return df.where(here[:, None, None], 0), dothers, None, None


class _Streams(torch.autograd.Function):
    """All groups' dense tensors side by side: every row where it belongs, zeros where its others are."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, others: Tensor | None, groups: FilterGroups) -> Tensor:
        ctx.groups = groups
        n, _, height, width = packed.shape
        streams = packed.new_zeros(n, len(groups.names) * groups.width, height, width)
        return streams.index_copy_(1, groups.rows_in_streams, packed)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        groups, dothers = ctx.groups, None
        if ctx.needs_input_grad[1]:
            dothers = select_channels(df, (groups.others * groups.width + groups.order).flatten())
        return select_channels(df, groups.rows_in_streams), dothers, None


def _one_of(ids: Tensor, groups: Sequence[int]) -> Tensor:
    found = torch.zeros_like(ids, dtype=torch.bool)
    for group in groups:
        found |= ids == group
    return found


def _unflatten(children: Iterable[Any], routing: str) -> SFGFeatures:
    packed, groups, others = children
    return SFGFeatures(packed, groups, Routing(routing), others)


pytree.register_pytree_node(
    SFGFeatures,
    lambda features: ([features.packed, features.groups, features.others], features.routing.value),
    _unflatten,
    serialized_type_name="sfg_fast.SFGFeatures",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)
