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
from torch.utils import _pytree as pytree

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


class _kept:
    """A property that is computed once. (`functools.cached_property` holds a lock in Python 3.11, which a compiled
    graph can't; there, and of fake tensors, it is computed where it is used.)"""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, groups: Any, owner: type) -> Any:
        if groups is None:
            return self
        if in_graph():
            return self.compute(groups)
        with torch.inference_mode(False):  # the groups may outlive the mode
            return groups.__dict__.setdefault(self.compute.__name__, self.compute(groups))


def _made_once(make: Callable[..., FilterGroups]) -> Callable[..., FilterGroups]:
    """Groups that hold nothing of a run are made once. On the CPU: what is made while a CUDA graph is captured has the
    graph's memory; and a compiled graph has its own."""
    kept = functools.lru_cache(maxsize=1024)(make)

    @functools.wraps(make)
    def groups(
        size: int | Sequence[int], names: int | Iterable[str], device: torch.device | None = None
    ) -> FilterGroups:
        names = names if isinstance(names, int | str) else tuple(names)  # (a text is refused by `group_names`)
        if in_graph() or device is None or device.type != "cpu":
            return make(size, names, device)
        with torch.inference_mode(False):
            return kept(size if isinstance(size, int) else tuple(size), names, device)

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
    """An assignment of kernels to groups, made usable: what the channels of a packed tensor are.

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
        all_gates: do the gates of the groups that a kernel was not drawn into want a gradient, too? Their rows are
            zero, and no part of the packed tensor.
        sizes: of `blocks`, the rows of each group.
    """

    order: Tensor
    offsets: Tensor
    names: tuple[str, ...]
    width: int
    assignment: Tensor | None = None
    gates: Tensor | None = None
    all_gates: bool = False
    sizes: tuple[int, ...] | None = None

    @staticmethod
    def from_assignment(
        assignment: Tensor | Sequence[int],
        tasks: int | Iterable[str] = 2,
        gates: Tensor | None = None,
        by_group: tuple[Tensor, Tensor, dict[str, Any]] | None = None,
        all_gates: bool = False,
    ) -> FilterGroups:
        """One row per kernel, from int [K]. `gates` [K, T+1] is its one-hot form by default. `by_group`: order,
        offsets and what else is kept of the groups (by name), if they are known already."""
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
        order, offsets, kept = (*sort_by_group(assignment, len(names)), {}) if by_group is None else by_group
        groups = FilterGroups(order, offsets, names, assignment.numel(), assignment, gates, all_gates)
        groups.__dict__.update(kept)
        return groups

    @staticmethod
    def relaxed(gates: Tensor, tasks: int | Iterable[str]) -> FilterGroups:
        """All (T+1)K rows, all live: a Gumbel-softmax draw `gates` [K, T+1]."""
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
        # Filled on the device: a copy from host memory would wait for it, and can't be captured in a graph.
        ends = [0, *itertools.accumulate(sizes)]
        offsets = torch.stack([torch.full((), end, dtype=torch.int64, device=device) for end in ends])
        return FilterGroups(torch.arange(ends[-1], device=device), offsets, names, ends[-1], sizes=tuple(sizes))

    @staticmethod
    def joined(parts: Sequence[FilterGroups]) -> FilterGroups:
        """Of concatenated features: kernels are numbered on from part to part, each stays in its group. One row per
        kernel, or full if any part is. ValueError if the groups differ, or have rows of their own."""
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

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.names[1:]

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

    @_kept
    def ends(self) -> list[int]:
        """`offsets` on the host."""
        return self.offsets.tolist()

    @_kept
    def ids(self) -> Tensor:
        """int64 [rows], the group of each row."""
        rows = torch.arange(self.order.numel(), device=self.order.device)
        return torch.searchsorted(self.offsets[1:].contiguous(), rows, right=True)

    @_kept
    def rows_in_streams(self) -> Tensor:
        """int64 [rows], where each row stands among the (T+1)K rows of full groups."""
        return self.ids * self.width + self.order

    @_kept
    def inverse(self) -> Tensor:
        """int64 [K], kernel -> its row, for one row per kernel."""
        return torch.argsort(self.order)

    @_kept
    def others(self) -> Tensor:
        """int64 [groups - 1, rows], for one row per kernel: the groups that the row's kernel was not drawn into, the
        tasks in order, then shared."""
        last = len(self.names) - 1
        nth = torch.arange(last, device=self.ids.device)[:, None]
        place = torch.where(self.ids == 0, last, self.ids - 1)  # of the row's own group in that order
        return (nth + (nth >= place) + 1) % (last + 1)

    def by_kernel(self, own: Tensor | None, others: Tensor | None, like: Tensor) -> Tensor:
        """Values [rows] of the rows' own groups and [groups - 1, rows] of their others -> [K, groups], shaped and typed
        `like`, for one row per kernel. Zero where there is None."""
        rows = torch.zeros_like(like)
        if own is not None:
            rows.scatter_(1, self.ids[:, None], own[:, None].to(rows.dtype))
        if others is not None:
            rows.scatter_(1, self.others.t(), others.t().to(rows.dtype))
        return rows.index_select(0, self.inverse)

    def index(self, group: int | str) -> int:
        """The number of a group given by index or name."""
        if isinstance(group, str):
            if group not in self.names:
                raise ValueError(f"group {group!r} is unknown, expected one of {', '.join(self.names)}")
            return self.names.index(group)
        if not 0 <= group < len(self.names):
            raise ValueError(f"group {group} is unknown, expected 0 (shared) to {len(self.names) - 1}")
        return group

    def same_as(self, other: FilterGroups) -> bool:
        """Does row r mean the same in both? (Identity is looked at first: values on a GPU would need a wait.)"""
        if self is other or (self.order is other.order and self.gates is other.gates):
            return True
        if self.names != other.names or self.width != other.width or self.order.numel() != other.order.numel():
            return False
        if (self.assignment is None) != (other.assignment is None):
            return False
        return self.full or (torch.equal(self.order, other.order) and torch.equal(self.offsets, other.offsets))

    def map(self, fn) -> FilterGroups:  # type: ignore[no-untyped-def]
        """`fn` applied to every tensor held."""
        leaves, spec = pytree.tree_flatten(self)
        return pytree.tree_unflatten([fn(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    def __repr__(self) -> str:
        kind = "full" if self.full else "packed"
        return f"FilterGroups({kind}, groups={self.names}, kernels={self.width})"


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
