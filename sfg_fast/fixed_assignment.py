"""A fixed assignment of kernels to groups, instead of a draw: a part of `GroupGates`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .draws import one_hot
from .tracing import in_graph


class FixedAssignment(nn.Module):
    """The fixed assignment of a layer's kernels, if it has one.

    Attributes:
        fixed_gates: float [K, T+1], the gates of a fixed assignment: 1 in the group of each kernel, else 0; all 0 where
            the groups are drawn. It is a buffer, so that a checkpoint of a constant mask is one. Averages of models
            (EMA, SWA) average these numbers, too; the group of a kernel is then that of its largest number.
    """

    fixed_gates: Tensor

    def __init__(self, kernels: int, groups: int, device: Any = None) -> None:
        super().__init__()
        self.register_buffer("fixed_gates", torch.empty(kernels, groups, device=device))
        self.forget_assignment()

    @property
    def assigned(self) -> bool:
        """Is there a fixed assignment? `fixed_gates` says so, also where somebody else has written to it (an average of
        models, a checkpoint, another process). A device is asked only if it has been written to since."""
        fixed = self.fixed_gates
        # A graph keeps what it was compiled for. Under DistributedDataParallel buffers are written to in every step.
        if in_graph() or fixed.is_meta or (self.training and not fixed.is_cpu):
            return self._assigned
        if _content(fixed) != self._seen:
            self._now_assigned(bool((fixed.amax(1) > 0).all()))
        return self._assigned

    @property
    def fixed_assignment(self) -> Tensor:
        """int64 [K], the fixed group of each kernel; -1: drawn."""
        most, group = self.fixed_gates.max(1)
        return group.where(most > 0, -1)

    def assign(self, assignment: Tensor | Sequence[int] | None) -> None:
        """Fixes the assignment, integers [K] of group numbers; None: the groups are drawn again. The logits then get no
        gradient (zeros). Raises ValueError for another shape or dtype, and for unknown groups."""
        if assignment is None:
            self.forget_assignment()
            return
        wanted = torch.as_tensor(assignment)
        kernels, groups = self.fixed_gates.shape
        if wanted.shape != (kernels,) or wanted.is_floating_point() or wanted.dtype == torch.bool:
            raise ValueError(
                f"assignment has shape {tuple(wanted.shape)} and dtype {wanted.dtype}, expected integers [{kernels}]"
            )
        if ((wanted < 0) | (wanted >= groups)).any():
            raise ValueError(f"assignment holds {wanted.tolist()}, expected groups 0 (shared) to {groups - 1}")
        fixed = self.fixed_gates
        fixed.copy_(one_hot(wanted.to(fixed.device, torch.int64), groups, fixed.dtype))
        self._now_assigned(True)

    def forget_assignment(self) -> None:
        """From now on the groups are drawn."""
        self.fixed_gates.zero_()
        self._now_assigned(False)

    def _now_assigned(self, assigned: bool) -> None:
        self._assigned, self._seen = assigned, _content(self.fixed_gates)


def _content(fixed: Tensor) -> Any:
    """Something that changes whenever anybody writes to the tensor `fixed`. Of a tensor in memory it is the bytes,
    because writing through `.data` does not raise torch's version counter. Of a tensor on a device, whose values one
    would have to wait for, it is the tensor's identity and its version counter, which torch documents as `_version`."""
    if fixed.is_cpu and not in_graph():
        return (fixed.float() if fixed.dtype is torch.bfloat16 else fixed).numpy().tobytes()
    return id(fixed), 0 if fixed.is_inference() else fixed._version
