"""`SFGFeatures`: what flows between SFG layers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree  # torch has no public one; torch.export's documentation names this

from . import undrawn_features
from .groups import FilterGroups, Routing, indices
from .kernels.packing import memory_format, of_channels, select_channels
from .plain_ops import TensorLike, as_plain, check_factor, check_image, check_taken


@dataclasses.dataclass(frozen=True, eq=False)
class SFGFeatures(TensorLike):
    """The features of all groups in one packed tensor. Immutable.

    Attributes:
        packed: [N, rows, H, W], channels in the order of `groups` (its `order` and `offsets`).
        groups: what each channel is.
        routing: how the next layer reads these features: `ARROW` merges by summation (paper, section 2.1), `OWN` when
            every group's tensor already holds what that group is to read (after a merge).
        undrawn: [N, T * rows, H, W], the undrawn features, in the order of `FilterGroups.undrawn_groups`: zeros that
        take no
            memory. The gates of undrawn rows learn from their gradient; None if these gates don't learn.
        deferred: the gates of these features, if the layer that reads them may compute their gradient
            (`gate_gradient.DeferredGates`); None once anything was done to the features.
    """

    packed: Tensor
    groups: FilterGroups
    routing: Routing = Routing.ARROW
    undrawn: Tensor | None = None
    deferred: Any = None

    @staticmethod
    def of_image(x: Tensor) -> SFGFeatures:
        """An image [N, C, H, W], which every group reads."""
        return SFGFeatures(x, FilterGroups.blocks([x.shape[1]], ("image",), x.device), Routing.ALL)

    @staticmethod
    def of_dense(tensors: Sequence[Tensor], tasks: Iterable[str], routing: Routing = Routing.ARROW) -> SFGFeatures:
        """T+1 dense tensors [N, K, H, W], shared first, as streams."""
        streams = FilterGroups.streams(tensors[0].shape[1], tasks, tensors[0].device)
        return SFGFeatures(torch.cat(list(tensors), 1), streams, routing)

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
        return _Dense.apply(self.packed, self.undrawn, self.groups, groups)

    def streams(self) -> Tensor:
        """All groups' dense tensors side by side, [N, (T+1)K, H, W]."""
        return self.packed if self.groups.full else _Streams.apply(self.packed, self.undrawn, self.groups)

    def __iter__(self) -> Iterator[Tensor]:
        """The T+1 dense tensors, shared first. So code that was written for dense masking runs unchanged."""
        return (self.dense(group) for group in range(len(self)))

    def __getitem__(self, group: int) -> Tensor:
        return self.dense(group)

    def __len__(self) -> int:
        return len(self.groups.names)

    def __add__(self, other: SFGFeatures | float | Tensor) -> SFGFeatures:
        """The sum, as of a shortcut, or as `plus`. Raises ValueError for features of two draws: a packed tensor can't
        hold a kernel in two groups."""
        if isinstance(other, int | float | Tensor):
            return self.plus(other)
        if not isinstance(other, SFGFeatures):
            return NotImplemented
        self.check_same_draw(other.groups, other.routing)
        both = undrawn_features.of_sum(self.undrawn, other.undrawn)
        return SFGFeatures(self.packed + other.packed, self.groups, self.routing, both)

    __radd__ = __add__

    def plus(self, x: float | Tensor) -> SFGFeatures:
        """See `TensorLike.plus`."""
        groups, x = self.groups, as_plain(x, self.shape)
        if isinstance(x, Tensor) and x.shape[1] > 1:
            x = select_channels(x, groups.order)
        if groups.full and groups.gates is not None:  # a relaxed draw; the drawn gates of others are one
            x = of_channels(groups.gates.detach().t().reshape(-1), self.packed).to(self.dtype) * x
        elif groups.gates is None and self.routing is not Routing.OWN:
            raise ValueError(f"{self} and something else can't be added: what would a task read of it?")
        return SFGFeatures(self.packed + x, groups, self.routing, self.undrawn)

    def times(self, factor: Tensor | SFGFeatures) -> SFGFeatures:
        """See `TensorLike.times`."""
        groups, behind = self.groups, self.undrawn
        rows: Tensor | None
        if isinstance(factor, SFGFeatures):
            check_factor(groups.names, groups.width, factor, factor.groups)
            scale, one = factor.packed, factor.groups.width == 1
            as_plain(scale[:, :1], self.shape)
            rows = groups.ids if one else groups.rows_in_streams
        else:
            scale = as_plain(factor, self.shape)
            one = scale.shape[1] == 1
            rows = None if one else groups.order
        if behind is not None:
            if isinstance(factor, SFGFeatures):
                of_undrawn = (groups.undrawn_groups if one else groups.undrawn_in_streams).flatten()
            else:
                of_undrawn = None if one else groups.order.repeat(len(groups.tasks))
            behind = undrawn_features.scaled(behind, scale.detach(), of_undrawn)
        of_rows = scale if rows is None else select_channels(scale, rows)
        return SFGFeatures(self.packed * of_rows, groups, self.routing, behind)

    @property
    def streams_of_groups(self) -> bool:
        """See `TensorLike.streams_of_groups`."""
        return self.groups.streams_of_groups and self.routing is Routing.OWN

    def as_shared(self, x: Tensor) -> SFGFeatures:
        """See `TensorLike.as_shared`."""
        check_image(x, self.dim())
        return SFGFeatures(x, FilterGroups.all_shared(x.shape[1], self.groups.tasks, x.device))

    def take(self, kernels: Sequence[int]) -> SFGFeatures:
        """See `TensorLike.take`."""
        before = self.groups
        chosen = indices(check_taken(kernels, before.width), self.packed)
        groups = before.taken(chosen)
        if groups.full:
            streams = self.packed.unflatten(1, (len(self), -1)).index_select(2, chosen)
            return SFGFeatures(streams.flatten(1, 2), groups, self.routing)
        rows = before.inverse[chosen[groups.order]]
        behind = self.undrawn
        if behind is not None:
            behind = undrawn_features.of_taken(behind, rows, before.width)
        return SFGFeatures(select_channels(self.packed, rows), groups, self.routing, behind)

    def prelu(self, slopes: Tensor) -> SFGFeatures:
        """See `TensorLike.prelu`."""
        of_rows, behind = slopes, self.undrawn
        if slopes.numel() > 1:
            of_rows = slopes[self.groups.order]
        if behind is not None:  # the derivative at zero is the slope
            repeated = of_rows.expand(self.groups.width).repeat(len(self.groups.tasks))
            behind = undrawn_features.scaled(behind, of_channels(repeated.detach(), self.packed))
        return SFGFeatures(F.prelu(self.packed, of_rows), self.groups, self.routing, behind)

    def check_same_draw(self, groups: FilterGroups, routing: Routing = Routing.ARROW) -> None:
        """Raises ValueError unless features of these groups can be added."""
        if self.routing is not routing or not self.groups.same_as(groups):
            raise ValueError(
                "features of different groupings can't be added: let both convolutions share one draw "
                f"(conv(x, groups=features.groups)); got {self.groups} and {groups}"
            )

    def concatenate(self, *more: SFGFeatures) -> SFGFeatures:
        """[F | F' | ..] along the channels: the kernels of all features, each in its own group. `torch.cat` calls this.
        Raises ValueError for features of different groups or routings."""
        every = (self, *more)
        if len({features.routing for features in every}) > 1:
            raise ValueError(f"features routed {[one.routing.value for one in every]} can't be concatenated")
        groups = FilterGroups.joined([features.groups for features in every])
        if groups.full:
            streams = [one.streams().unflatten(1, (len(self), -1)) for one in every]
            return SFGFeatures(torch.cat(streams, 2).flatten(1, 2), groups, self.routing)
        starts = itertools.accumulate([0, *(one.groups.width for one in every[:-1])])
        kernels = torch.cat([start + one.groups.order for one, start in zip(every, starts, strict=True)])
        places, counts = groups.inverse[kernels], [one.groups.width for one in every]
        packed = _Concatenated.apply(places, counts, *(one.packed for one in every))
        of_all = None
        if groups.all_gates:
            of_all = undrawn_features.of_concatenation(places, counts, [one.undrawn for one in every])
        return SFGFeatures(packed, groups, self.routing, of_all)

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> SFGFeatures:
        """`operation` on every channel: it must treat each alone, and keep zeros (padding, pooling, interpolation)."""
        behind = None if self.undrawn is None else undrawn_features.channelwise(self.undrawn, operation)
        return SFGFeatures(operation(self.packed), self.groups, self.routing, behind)

    def to(self, *args: Any, **kwargs: Any) -> SFGFeatures:
        """As `Tensor.to`, for all tensors of the features and their groups (a dtype: for the floating point ones)."""

        like = self.packed.new_empty([0] * self.packed.dim()).to(*args, **kwargs)
        dtype = None if like.dtype == self.packed.dtype else like.dtype
        non_blocking = bool(kwargs.get("non_blocking"))

        def move(tensor: Tensor) -> Tensor:
            if tensor is self.packed:
                return tensor.to(*args, **kwargs)
            if tensor is self.undrawn:  # `Tensor.to` would give it memory
                return undrawn_features.no_memory(tensor.shape, like.dtype, tensor, device=like.device)
            return tensor.to(like.device, dtype if tensor.is_floating_point() else None, non_blocking)

        return self._map(move)

    def float(self) -> SFGFeatures:
        """In float32."""
        return self.to(torch.float32)

    def detach(self) -> SFGFeatures:
        """The same values, without a graph of autograd."""
        return self._map(torch.Tensor.detach)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> SFGFeatures:
        behind = None if self.undrawn is None else fn(self.undrawn)
        return SFGFeatures(fn(self.packed), self.groups.map(fn), self.routing, behind)

    @property
    def dtype(self) -> torch.dtype:
        """That of the packed tensor."""
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        """That of the packed tensor."""
        return self.packed.device

    @property
    def shape(self) -> torch.Size:
        """The shape of one dense tensor, [N, K, H, W]."""
        n, _, *size = self.packed.shape
        return torch.Size((n, self.groups.width, *size))

    def __repr__(self) -> str:
        return f"SFGFeatures(packed={tuple(self.packed.shape)}, {self.groups}, routing={self.routing.value})"


class _Dense(torch.autograd.Function):
    """packed -> [N, K, H, W] of the groups `wanted`, zero where a kernel is in none of them. The gradient goes to the
    packed rows and, for kernels in other groups, to their undrawn rows."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, undrawn: Tensor | None, groups: FilterGroups, wanted: Sequence[int]
    ) -> Tensor:
        ctx.groups, ctx.wanted = groups, wanted
        here = _one_of(groups.ids, wanted)
        ctx.save_for_backward(here)
        # `where`, not a product: a NaN of one task must not reach another.
        return select_channels(packed.where(of_channels(here, packed), 0), groups.inverse)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        (here,) = ctx.saved_tensors
        df = select_channels(df, ctx.groups.order)
        dundrawn = None
        if ctx.needs_input_grad[1]:
            rows = _one_of(ctx.groups.undrawn_groups, ctx.wanted)
            dundrawn = torch.cat([df.where(of_channels(row, df), 0) for row in rows], 1)
        return df.where(of_channels(here, df), 0), dundrawn, None, None


class _Concatenated(torch.autograd.Function):
    """Packed tensors [N, rows, H, W] -> one with the rows of all, each copied once. Row r of all parts, one behind the
    other, becomes row places[r]; `counts`: the rows of each part."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """`given`: places, counts, and the parts. (torch.compile counts arguments to see whether there is a `ctx`. With
        names for the first two it would be wrong about two parts.)"""
        places, counts, *parts = given
        ctx.save_for_backward(places)
        ctx.counts, ctx.dtypes = counts, [part.dtype for part in parts]
        dtype = functools.reduce(torch.promote_types, ctx.dtypes)
        n, _, *size = parts[0].shape
        shape, layout = (n, sum(counts), *size), memory_format(parts[0])
        whole = torch.empty(shape, dtype=dtype, device=parts[0].device, memory_format=layout)
        for place, part in zip(places.split(counts), parts, strict=True):
            whole.index_copy_(1, place, part.to(dtype))
        return whole

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        parts = zip(places.split(ctx.counts), ctx.dtypes, strict=True)
        return None, None, *(select_channels(df, place).to(dtype) for place, dtype in parts)


class _Streams(torch.autograd.Function):
    """packed -> the dense tensors of all groups side by side, [N, (T+1)K, H, W], with zeros for the undrawn rows."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, undrawn: Tensor | None, groups: FilterGroups) -> Tensor:
        ctx.groups = groups
        n, _, *size = packed.shape
        streams = packed.new_zeros(n, len(groups.names) * groups.width, *size)
        return streams.index_copy_(1, groups.rows_in_streams, packed)

    @staticmethod
    def backward(ctx: Any, df: Tensor) -> Any:
        groups, dundrawn = ctx.groups, None
        if ctx.needs_input_grad[1]:
            dundrawn = select_channels(df, groups.undrawn_in_streams.flatten())
        return select_channels(df, groups.rows_in_streams), dundrawn, None


def _one_of(ids: Tensor, groups: Sequence[int]) -> Tensor:
    """bool like ids: is the group one of these?"""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for group in groups:
        found |= ids == group
    return found


def _unflatten(children: Iterable[Any], routing: str) -> SFGFeatures:
    packed, groups, behind = children
    return SFGFeatures(packed, groups, Routing(routing), behind)


pytree.register_pytree_node(
    SFGFeatures,
    lambda features: ([features.packed, features.groups, features.undrawn], features.routing.value),
    _unflatten,
    serialized_type_name="sfg_fast.SFGFeatures",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)
