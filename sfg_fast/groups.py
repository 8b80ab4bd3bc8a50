"""Which kernel belongs to which group, and which group reads which (paper, section 2.1).

Group 0 is `shared`, groups 1..T are the tasks. The features of all groups lie side by side in one packed tensor;
`FilterGroups` says which channel is which, `Routing` says which channels a group of the next layer reads.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # torch has no public one; torch.export's documentation names this

from .tracing import in_graph

SHARED = "shared"


class Routing(enum.Enum):
    """Which input groups an output group reads (paper, section 2.1, "Feature Routing")."""

    ARROW = "arrow"  # shared reads shared; task t reads t and shared: F_t = h([F_t | F_s] * G_t)
    OWN = "own"  # group g reads group g
    ALL = "all"  # the first layer: every group reads the image

    @functools.cache
    def reads(self, groups_out: int, groups_in: int) -> tuple[tuple[bool, ...], ...]:
        """[groups_out][groups_in]: does the output group read the input group?"""
        return tuple(
            tuple(self is Routing.ALL or out == g or (self is Routing.ARROW and g == 0) for g in range(groups_in))
            for out in range(groups_out)
        )


class _computed_once:
    """A property of `FilterGroups` whose value is kept in `known`. (`functools.cached_property` holds a lock in Python
    3.11, which a compiled graph can't.) In graphs, and for fake tensors, it is computed wherever it is used."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, groups: Any, owner: type) -> Any:
        if groups is None:
            return self
        name = self.compute.__name__
        if name in groups.known:
            return groups.known[name]
        if in_graph():
            return self.compute(groups)
        with torch.inference_mode(False):  # the groups may outlive the mode
            return groups.known.setdefault(name, self.compute(groups))


def _made_once(make: Callable[..., FilterGroups]) -> Callable[..., FilterGroups]:
    """`make`, which keeps the groups that it has made: they hold nothing of a run. It keeps those on the CPU only,
    because tensors made while a CUDA graph is captured lie in the graph's memory. A compiled graph makes its own."""
    made = functools.lru_cache(maxsize=1024)(make)

    @functools.wraps(make)
    def groups(
        size: int | Sequence[int], names: int | Iterable[str], device: torch.device | None = None
    ) -> FilterGroups:
        names = names if isinstance(names, int | str) else tuple(names)  # (a text is refused by `group_names`)
        if in_graph() or device is None or device.type != "cpu":
            return make(size, names, device)
        with torch.inference_mode(False):
            return made(size if isinstance(size, int) else tuple(size), names, device)

    return groups


def group_names(tasks: int | Iterable[str]) -> tuple[str, ...]:
    """Names of the T+1 groups, `shared` first, from the number of tasks (`task1`, ..) or their names."""
    if isinstance(tasks, str):
        raise ValueError(f"tasks={tasks!r} is one text, expected a number or a sequence of names")
    names = tuple(f"task{t + 1}" for t in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
    if not names:
        raise ValueError(f"tasks={tasks!r}: at least one task is needed")
    if SHARED in names or len(set(names)) != len(names):
        raise ValueError(f"tasks={tasks!r}: names must be distinct and none may be {SHARED!r}, the shared group's own")
    return (SHARED, *names)


@dataclasses.dataclass(frozen=True, eq=False)
class FilterGroups:
    """What the channels of a packed tensor are: the group and the kernel of each.

    Channels (rows) are sorted by group, and by kernel index within a group. There are three kinds:

    * one row per kernel: a drawn or fixed assignment (`from_assignment`);
    * `full`: one row for every (group, kernel) pair, group after group: a relaxed draw, or streams;
    * `blocks`: rows of their own for every group (heads, merges), used to address a weight.

    Attributes:
        order: int64 [rows], packed row -> kernel index.
        offsets: int64 [groups + 1], group g owns rows offsets[g]:offsets[g+1].
        names: the groups' names, `shared` first.
        width: K, the number of kernels.
        assignment: int64 [K], the drawn group of each kernel; None for streams and blocks.
        gates: [K, groups] the gate z of each kernel in each group; None where all are one (streams, blocks).
        all_gates: do the gates of undrawn rows want a gradient, too? Undrawn rows are zero, and no part of the packed
            tensor.
        sizes: the number of rows of each group, for `blocks`.
        known: values of the properties below, by name, as far as they have been computed.
    """

    order: Tensor
    offsets: Tensor
    names: tuple[str, ...]
    width: int
    assignment: Tensor | None = None
    gates: Tensor | None = None
    all_gates: bool = False
    sizes: tuple[int, ...] | None = None
    known: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @staticmethod
    def from_assignment(
        assignment: Tensor | Sequence[int],
        tasks: int | Iterable[str] = 2,
        gates: Tensor | None = None,
        by_group: tuple[Tensor, Tensor, dict[str, Any]] | None = None,
        all_gates: bool = False,
    ) -> FilterGroups:
        """One row per kernel, from int [K]. `gates` [K, T+1] is its one-hot form by default. `by_group`: order,
        offsets, and properties by name, where a backend has computed them already. Raises ValueError for groups that
        aren't there and for another shape."""
        names = group_names(tasks)
        if not isinstance(assignment, Tensor) and any(not 0 <= group < len(names) for group in assignment):
            raise ValueError(f"assignment={list(assignment)}: expected groups 0 (shared) to {len(names) - 1}")
        assignment = torch.as_tensor(assignment, dtype=torch.int64)
        if assignment.dim() != 1:
            raise ValueError(f"assignment has shape {tuple(assignment.shape)}, expected [K]")
        if gates is None:
            gates = (assignment[:, None] == torch.arange(len(names), device=assignment.device)).to(
                torch.get_default_dtype()
            )
        order, offsets, known = (*sort_by_group(assignment, len(names)), {}) if by_group is None else by_group
        groups = FilterGroups(order, offsets, names, assignment.numel(), assignment, gates, all_gates)
        groups.known.update(known)
        return groups

    @staticmethod
    def relaxed(gates: Tensor, tasks: int | Iterable[str]) -> FilterGroups:
        """All (T+1)K rows of a relaxed draw: `gates` [K, T+1] are a softmax, and none of them is zero."""
        streams = FilterGroups.streams(gates.shape[0], tasks, gates.device)
        return dataclasses.replace(streams, assignment=gates.detach().argmax(1), gates=gates)

    @staticmethod
    @_made_once
    def streams(width: int, tasks: int | Iterable[str], device: torch.device | None = None) -> FilterGroups:
        """T+1 full-width tensors side by side: every group has a tensor of its own."""
        names = group_names(tasks)
        order = torch.arange(width, device=device).repeat(len(names))
        offsets = torch.arange(len(names) + 1, device=device) * width
        return FilterGroups(order, offsets, names, width)

    @staticmethod
    @_made_once
    def concatenated(width: int, tasks: int | Iterable[str], device: torch.device | None = None) -> FilterGroups:
        """Streams as the columns of [F_t | F_s]: a task's own channels are 0..K-1, the shared ones K..2K-1."""
        streams = FilterGroups.streams(width, tasks, device)
        order = streams.order + width * (streams.ids == 0)
        return dataclasses.replace(streams, order=order, width=2 * width)

    @staticmethod
    @_made_once
    def blocks(sizes: Sequence[int], names: tuple[str, ...], device: torch.device | None = None) -> FilterGroups:
        """Group g has `sizes[g]` rows that nobody else has (an image is one block)."""
        # torch.full fills on the device. A copy from host memory would wait for it, and can't be captured in a graph.
        ends = [0, *itertools.accumulate(sizes)]
        offsets = torch.stack([torch.full((), end, dtype=torch.int64, device=device) for end in ends])
        return FilterGroups(torch.arange(ends[-1], device=device), offsets, names, ends[-1], sizes=tuple(sizes))

    @staticmethod
    def joined(parts: Sequence[FilterGroups]) -> FilterGroups:
        """The groups of concatenated features: kernels are numbered on from part to part, each stays in its group. They
        have one row per kernel, or are full if any part is. Raises ValueError if the parts' groups differ, or have rows
        of their own."""
        names = parts[0].names
        if any(part.names != names or part.blocked for part in parts):
            raise ValueError(f"features of different kinds can't be concatenated: {', '.join(map(str, parts))}")
        width = sum(part.width for part in parts)
        full = any(part.full for part in parts)
        if full and any(part.assignment is None for part in parts):
            return FilterGroups.streams(width, names[1:], parts[0].order.device)
        gates = torch.cat([part.gates for part in parts])  # type: ignore[misc]
        if full:
            return FilterGroups.relaxed(gates, names[1:])
        assignment = torch.cat([part.assignment for part in parts])  # type: ignore[misc]
        order, offsets = sort_by_group(assignment, len(names))
        return FilterGroups(order, offsets, names, width, assignment, gates, any(part.all_gates for part in parts))

    def repeated(self, times: int) -> FilterGroups:
        """Groups in which `times` kernels, one behind the other, stand for each kernel here."""
        index = torch.arange(times, device=self.order.device)
        order = (self.order[:, None] * times + index).flatten()
        assignment, gates = (
            None if of is None else of.repeat_interleave(times, 0) for of in (self.assignment, self.gates)
        )
        offsets = self.offsets * times
        return FilterGroups(order, offsets, self.names, self.width * times, assignment, gates, self.all_gates)

    @staticmethod
    @_made_once
    def all_shared(width: int, tasks: int | Iterable[str], device: torch.device | None = None) -> FilterGroups:
        """Kernels that are all in the shared group, with constant gates: what is no feature of a layer has these."""
        return FilterGroups.from_assignment(torch.zeros(width, dtype=torch.int64, device=device), tasks)

    def taken(self, kernels: Tensor) -> FilterGroups:
        """The groups of some kernels in another order: int64 [L], kernel l of the result is kernel `kernels[l]`. Raises
        ValueError for groups with rows of their own (`blocks`)."""
        if self.blocked:
            raise ValueError(f"kernels can't be taken from {self}, expected features of a draw, or streams")
        if self.gates is None or self.assignment is None:
            return FilterGroups.streams(kernels.numel(), self.tasks, kernels.device)
        gates = self.gates.index_select(0, kernels)
        if self.full:
            return FilterGroups.relaxed(gates, self.tasks)
        assignment = self.assignment.index_select(0, kernels)
        order, offsets = sort_by_group(assignment, len(self.names))
        return FilterGroups(order, offsets, self.names, kernels.numel(), assignment, gates, self.all_gates)

    def without_undrawn(self) -> FilterGroups:
        """The same rows, of which no undrawn gates want a gradient."""
        groups = dataclasses.replace(self, all_gates=False)
        groups.known.update(self.known)
        return groups

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the T tasks."""
        return self.names[1:]

    @property
    def streams_of_groups(self) -> bool:
        """Has every group a tensor of its own, in which nothing is zeroed (`streams`)?"""
        return self.full and self.gates is None

    @property
    def full(self) -> bool:
        """One row for every (group, kernel) pair?"""
        return self.order.numel() == len(self.names) * self.width

    @property
    def blocked(self) -> bool:
        """Does every group have rows of its own (`blocks`)?"""
        return self.assignment is None and not self.full

    @property
    def alike(self) -> bool:
        """Does every group have as many rows of its own?"""
        return self.sizes is not None and len(set(self.sizes)) == 1

    @property
    def learns(self) -> bool:
        """Does any gate want a gradient?"""
        return self.gates is not None and self.gates.requires_grad

    @_computed_once
    def ends(self) -> list[int]:
        """`offsets` on the host."""
        return self.offsets.tolist()

    @_computed_once
    def ids(self) -> Tensor:
        """int64 [rows], the group of each row."""
        rows = torch.arange(self.order.numel(), device=self.order.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), rows, right=True)

    @_computed_once
    def rows_in_streams(self) -> Tensor:
        """int64 [rows], where each row stands among the (T+1)K rows of full groups."""
        return self.ids * self.width + self.order

    @_computed_once
    def inverse(self) -> Tensor:
        """int64 [K], kernel -> its row, for one row per kernel."""
        return torch.argsort(self.order)

    @_computed_once
    def undrawn_groups(self) -> Tensor:
        """int64 [groups - 1, rows], for one row per kernel: the groups of the undrawn rows of each row's kernel, which
        are all groups but the drawn one, the tasks in order, then shared."""
        last = len(self.names) - 1
        nth = torch.arange(last, device=self.ids.device)[:, None]
        place = torch.where(self.ids == 0, last, self.ids - 1)  # where the drawn group stands in that order
        return (nth + (nth >= place) + 1) % (last + 1)

    @property
    def undrawn_in_streams(self) -> Tensor:
        """int64 [groups - 1, rows], for one row per kernel: where the undrawn rows stand among the (T+1)K rows of full
        groups."""
        return self.undrawn_groups * self.width + self.order

    def by_kernel(self, drawn: Tensor | None, undrawn: Tensor | None, like: Tensor) -> Tensor:
        """Values [rows] of the drawn rows and [groups - 1, rows] of the undrawn rows -> [K, groups], shaped and typed
        as `like`, for one row per kernel; zero where the argument is None."""
        rows = torch.zeros_like(like)
        if drawn is not None:
            rows.scatter_(1, self.ids[:, None], drawn[:, None].to(rows.dtype))
        if undrawn is not None:
            rows.scatter_(1, self.undrawn_groups.t(), undrawn.t().to(rows.dtype))
        return rows.index_select(0, self.inverse)

    def index(self, group: int | str) -> int:
        """The number of a group that is given by number or name. Raises ValueError for an unknown one."""
        if isinstance(group, str):
            if group not in self.names:
                raise ValueError(f"group {group!r} is unknown, expected one of {', '.join(self.names)}")
            return self.names.index(group)
        if not 0 <= group < len(self.names):
            raise ValueError(f"group {group} is unknown, expected 0 (shared) to {len(self.names) - 1}")
        return group

    def same_as(self, other: FilterGroups) -> bool:
        """Does row r mean the same in both? (Identity is looked at first, because values on a GPU would need a
        wait.)"""
        if self is other or (self.order is other.order and self.gates is other.gates):
            return True
        if self.names != other.names or self.width != other.width or self.order.numel() != other.order.numel():
            return False
        if (self.assignment is None) != (other.assignment is None):
            return False
        return self.full or (torch.equal(self.order, other.order) and torch.equal(self.offsets, other.offsets))

    def map(self, fn: Callable[[Tensor], Tensor]) -> FilterGroups:
        """These groups with `fn` applied to each of their tensors."""
        leaves, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten([fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def __repr__(self) -> str:
        kind = "full" if self.full else "packed"
        return f"FilterGroups({kind}, groups={self.names}, kernels={self.width})"


def indices(numbers: tuple[int, ...], like: Tensor) -> Tensor:
    """`numbers` as a tensor on the device of `like`. It is kept for the next call, because a copy to a GPU would wait
    for the device, and can't be captured in a CUDA graph. In a compiled graph, and among fake tensors, it is not kept:
    it would later be taken for a real one."""
    if in_graph():
        return torch.tensor(numbers, device=like.device)
    return _kept_indices(numbers, like.device)


@functools.lru_cache(maxsize=1024)
def _kept_indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def sort_by_group(assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """int64 [K] -> order int64 [K], the kernels sorted by group (stably), and offsets int64 [groups + 1]."""
    onehot = assignment[:, None] == torch.arange(groups, device=assignment.device)
    return torch.argsort(assignment, stable=True), _offsets(onehot.sum(0))


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_TENSORS = ("order", "offsets", "assignment", "gates")
_REST = ("names", "width", "all_gates", "sizes")
pytree.register_pytree_node(
    FilterGroups,
    lambda groups: ([getattr(groups, name) for name in _TENSORS], tuple(getattr(groups, name) for name in _REST)),
    lambda children, context: FilterGroups(
        **dict(zip(_TENSORS, children, strict=True)), **dict(zip(_REST, context, strict=True))
    ),
    serialized_type_name="sfg_fast.FilterGroups",
    to_dumpable_context=list,
    from_dumpable_context=lambda context: (tuple(context[0]), *context[1:3], context[3] and tuple(context[3])),
)
