"""`SFGFeatures`: what flows between SFG layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .groups import FilterGroups, Routing


@dataclasses.dataclass(frozen=True, eq=False)
class SFGFeatures:
    """The features of all groups in one packed tensor. Immutable.

    Attributes:
        packed: [N, rows, H, W], channels in the order of `groups` (its `order` and `offsets`).
        groups: what each channel is.
        routing: how the next layer reads these features: `ARROW` merges by summation (paper, section 2.1), `OWN` when
            every group's tensor already holds what that group is to read (after a merge).
    """

    packed: Tensor
    groups: FilterGroups
    routing: Routing = Routing.ARROW

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
        wanted = torch.zeros_like(self.groups.ids, dtype=torch.bool)
        for group in groups:
            wanted = wanted | (self.groups.ids == group)
        # `where`, not a product: a NaN of one task must not reach another.
        kept = self.packed.where(wanted[:, None, None], 0)
        return kept.index_select(1, self.groups.inverse)

    def streams(self) -> Tensor:
        """All groups' dense tensors side by side, [N, (T+1)K, H, W]."""
        if self.groups.full:
            return self.packed
        n, _, h, w = self.packed.shape
        zeros = self.packed.new_zeros(n, len(self.groups.names) * self.groups.width, h, w)
        return zeros.index_copy(1, self.groups.rows_in_streams, self.packed)

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
        if self.routing is not other.routing or not self.groups.same_as(other.groups):
            raise ValueError(
                "features of different groupings can't be added: let both convolutions share one draw "
                f"(conv(x, groups=features.groups)); got {self.groups} and {other.groups}"
            )
        return dataclasses.replace(self, packed=self.packed + other.packed)

    def to(self, *args: Any, **kwargs: Any) -> SFGFeatures:
        """As `Tensor.to`, for every tensor held (a dtype for the floating point ones)."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else None, non_blocking))

    def float(self) -> SFGFeatures:
        return self.to(torch.float32)

    def detach(self) -> SFGFeatures:
        return self._map(torch.Tensor.detach)

    def _map(self, fn) -> SFGFeatures:  # type: ignore[no-untyped-def]
        return dataclasses.replace(self, packed=fn(self.packed), groups=self.groups.map(fn))

    @property
    def shape(self) -> torch.Size:
        """The shape of one dense tensor, [N, K, H, W]."""
        n, _, h, w = self.packed.shape
        return torch.Size((n, self.groups.width, h, w))

    def __repr__(self) -> str:
        return f"SFGFeatures(packed={tuple(self.packed.shape)}, {self.groups}, routing={self.routing.value})"


def _unflatten(children: Iterable[Any], routing: str) -> SFGFeatures:
    packed, groups = children
    return SFGFeatures(packed, groups, Routing(routing))


pytree.register_pytree_node(
    SFGFeatures,
    lambda features: ([features.packed, features.groups], features.routing.value),
    _unflatten,
    serialized_type_name="sfg_fast.SFGFeatures",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
)
