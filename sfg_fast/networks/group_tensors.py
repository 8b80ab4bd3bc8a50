"""The features between the layers of a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..groups import Routing, indices
from ..plain_ops import TensorLike, as_plain, check_image, check_taken


class GroupTensors(TensorLike):
    """Features of a frozen network: for each group the channels of its own kernels alone, [N, K_g, H, W]. A group is
    computed when somebody first reads it.

    `kernels`: for each group the indices of its kernels, [] for none. `width`: K. `zero`: one channel of zeros of the
    features' size, which stands in where a group has nothing. `side_by_side`: all groups that anybody reads, in order,
    in one tensor, or None; `sizes`: how many channels of it are whose.
    """

    def __init__(
        self,
        compute: Callable[[int], Tensor],
        zero: Callable[[], Tensor],
        kernels: Sequence[Sequence[int]],
        width: int,
        names: tuple[str, ...],
        routing: Routing = Routing.ARROW,
        side_by_side: Tensor | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        self.zero, self.kernels, self.width, self.names, self.routing = zero, kernels, width, names, routing
        self.groups = kernels  # what another layer takes as its draw
        self.side_by_side, self.sizes = side_by_side, list(sizes)
        self._compute, self._known = compute, {}  # type: ignore[var-annotated]

    def __getitem__(self, group: int) -> Tensor:
        """The channels of a group that has kernels, [N, K_g, H, W]."""
        if group not in self._known:
            if self.side_by_side is not None and self.sizes[group]:
                self._known[group] = self.side_by_side.narrow(1, sum(self.sizes[:group]), self.sizes[group])
            else:
                self._known[group] = self._compute(group)
        return self._known[group]

    def read(self, group: int) -> list[int]:
        """The groups that a group of the next layer reads, and that have kernels."""
        both = (group, 0) if self.routing is Routing.ARROW and group else (group,)
        return [one for one in both if self.kernels[one]]

    def dense(self, group: int | str) -> Tensor:
        """[N, K, H, W], zero where a kernel is in another group."""
        group = self.names.index(group) if isinstance(group, str) else group
        kernels = self.kernels[group]
        if list(kernels) == list(range(self.width)):
            return self[group]
        channels = torch.cat([self[group], self.zero()], 1) if kernels else self.zero()
        place = {kernel: row for row, kernel in enumerate(kernels)}
        rows = tuple(place.get(kernel, len(kernels)) for kernel in range(self.width))
        return channels.index_select(1, indices(rows, channels))

    def merged(self, task: int | str) -> Tensor:
        """[F_task | F_shared] by summation, [N, K, H, W]."""
        group = self.names.index(task) if isinstance(task, str) else task
        parts = [self.dense(one) for one in self.read(group)] or [self.dense(group)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @property
    def shape(self) -> torch.Size:
        """That of one dense tensor, [N, K, H, W]."""
        n, _, *size = self.zero().shape
        return torch.Size((n, self.width, *size))

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> GroupTensors:
        """`operation` on every group: it must treat each channel alone, and keep zeros."""
        return GroupTensors(
            lambda group: operation(self[group]), lambda: operation(self.zero()),
            self.kernels, self.width, self.names, self.routing,
        )  # fmt: skip

    def of_kernels(self, operation: Callable[[Tensor, int], Tensor]) -> GroupTensors:
        """`operation` on every group that has kernels, and the group's number; it must not change the size."""
        return GroupTensors(
            lambda group: operation(self[group], group), self.zero, self.kernels, self.width, self.names, self.routing
        )

    def _own(self, x: Tensor, group: int) -> Tensor:
        """The channels of a group's kernels in x [N, K, H, W], or x itself if it has one channel."""
        kernels = tuple(self.kernels[group])
        alike = x.shape[1] == 1 or kernels == tuple(range(self.width))
        return x if alike else x.index_select(1, indices(kernels, x))

    @property
    def streams_of_groups(self) -> bool:
        """See `TensorLike.streams_of_groups`."""
        return self.routing is Routing.OWN

    def as_shared(self, x: Tensor) -> GroupTensors:
        """See `TensorLike.as_shared`."""
        check_image(x, self.dim())
        kernels = [list(range(x.shape[1])), *([] for _ in self.names[1:])]
        return GroupTensors(lambda group: x, lambda: x[:, :1] * 0, kernels, x.shape[1], self.names)

    def plus(self, x: float | Tensor) -> GroupTensors:
        """See `TensorLike.plus`."""
        x = as_plain(x, self.shape)
        return self.of_kernels(lambda f, group: f + (self._own(x, group) if isinstance(x, Tensor) else x))

    def times(self, factor: Tensor | GroupTensors) -> GroupTensors:
        """See `TensorLike.times`."""
        plain = as_plain(factor, self.shape) if isinstance(factor, Tensor) else None
        return self.of_kernels(lambda f, group: f * self._own(factor[group] if plain is None else plain, group))

    def take(self, kernels: Sequence[int]) -> GroupTensors:
        """See `TensorLike.take`."""
        chosen = check_taken(kernels, self.width)
        taken = [[new for new, old in enumerate(chosen) if old in own] for own in self.kernels]
        rows = [tuple(list(own).index(chosen[new]) for new in of) for own, of in zip(self.kernels, taken, strict=True)]

        def of_group(group: int) -> Tensor:
            before = self[group]
            return before.index_select(1, indices(rows[group], before))

        return GroupTensors(of_group, self.zero, taken, len(chosen), self.names, self.routing)

    def prelu(self, slopes: Tensor) -> GroupTensors:
        """See `TensorLike.prelu`."""
        return self.of_kernels(lambda f, group: F.prelu(f, self._own(slopes[None], group).flatten()))

    def __add__(self, other: GroupTensors | float | Tensor) -> GroupTensors:
        if isinstance(other, int | float | Tensor):
            return self.plus(other)
        if [list(one) for one in self.kernels] != [list(one) for one in other.kernels]:
            raise ValueError(f"features of different groupings can't be added: {self.kernels} and {other.kernels}")
        return GroupTensors(
            lambda group: self[group] + other[group], self.zero, self.kernels, self.width, self.names, self.routing
        )

    __radd__ = __add__

    def concatenate(self, *more: GroupTensors) -> GroupTensors:
        """[F | F' | ..] along the channels: the kernels of all features, each in its own group."""
        every = (self, *more)
        kernels: list[list[int]] = [[] for _ in self.names]
        width = 0
        for one in every:
            for group, own in enumerate(one.kernels):
                kernels[group] += [kernel + width for kernel in own]
            width += one.width
        return GroupTensors(
            lambda group: torch.cat([one[group] for one in every if one.kernels[group]], 1), self.zero,
            kernels, width, self.names, self.routing,
        )  # fmt: skip
