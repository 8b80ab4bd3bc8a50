"""One step of training: the gradients of its mini-batches, and the optimiser's step, unless a gradient is not finite.

It is written once, for the CPU, for several processes and for a GPU. On a GPU the host must not wait for it, so that
the whole step can be captured in a CUDA graph (`graphs.py`); there the device decides whether the step is left out, and
the host reads the `Outcome` one step late.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..networks.controls import norm_buffers, pool_gradients
from ..tasks import Task
from .config import ScheduleConfig
from .objective import Objective, levels

Batch = dict[str, Any]
"""A mini-batch: tensors by name, and the names of its M cases, `case`."""


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The mini-batch with its tensors on the device. On a GPU images [N, C, H, W] are channels_last, as the network is
    there. A network of volumes stays as it was made, and so do its batches."""
    images = device.type == "cuda" and batch["inputs"].dim() == 4
    return {
        name: value.to(
            device,
            non_blocking=True,
            memory_format=torch.channels_last if images and value.dim() == 4 else torch.preserve_format,
        )
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


class Loss(nn.Module):
    """Network and objective as one module, so that DistributedDataParallel averages the gradients of both."""

    def __init__(
        self, model: nn.Module, objective: Objective, tasks: Mapping[str, Task], total: int, precision: str
    ) -> None:
        super().__init__()
        self.model, self.objective, self.tasks = model, objective, tasks
        self.total, self.precision = total, precision

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Returns L of eq. 2 divided by N, the mean negative log-likelihood of each task, and the output of each task
        (with deep supervision that of all voxels).

        L is divided so that the learning rate doesn't depend on the cohort's size.
        """
        inputs = batch["inputs"]
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            outputs = self.model(inputs)
        outputs = {
            task: [y.to(torch.promote_types(y.dtype, torch.float32)) for y in levels(every)]
            for task, every in outputs.items()
        }
        targets = {name: batch[task.target] for name, task in self.tasks.items()}
        present = {name: batch[f"has_{task.target}"] for name, task in self.tasks.items()}
        value, nll = self.objective(self.model, outputs, targets, self.total, present)
        return value / self.total, nll, {task: every[0] for task, every in outputs.items()}


class Outcome(NamedTuple):
    """What a step has told, as tensors on the device.

    Attributes:
        losses: [mini-batches, 1 + T], of each mini-batch L of eq. 2 divided by N, and the mean negative log-likelihood
            of each task.
        good: bool [], is every gradient finite? Otherwise the step was left out.
        suspects: bool [mini-batches, M], the cases to blame for an L that is not finite: see `_suspects`.
    """

    losses: Tensor
    good: Tensor
    suspects: Tensor


class Statistics:
    """The running statistics of a network, which are many small tensors: they are read and written in few calls."""

    def __init__(self, model: nn.Module) -> None:
        self._by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for name in norm_buffers(model):
            buffer = model.get_buffer(name)
            self._by_dtype.setdefault(buffer.dtype, []).append(buffer)

    def values(self) -> list[Tensor]:
        """A copy of all values, one tensor for each dtype."""
        return [torch.cat([one.reshape(-1) for one in buffers]) for buffers in self._by_dtype.values()]

    def write(self, values: Iterable[Tensor]) -> None:
        """Write values, as `values` gave them, into the network's own tensors."""
        for flat, buffers in zip(values, self._by_dtype.values(), strict=True):
            parts = flat.split([one.numel() for one in buffers])
            torch._foreach_copy_(buffers, [part.view_as(one) for part, one in zip(parts, buffers, strict=True)])


class Step:
    """A step of training: `step(mini-batches)`.

    Args:
        loss: a `Loss`, which DistributedDataParallel may wrap.
        model: the network in it.
        optimiser: that of `schedule.build_optimiser`. Where the step does not wait, it is one that leaves out a step on
            the device.
        schedule: how many mini-batches a step has, and what is done to its gradients.
        targets: the names of the targets that are learnt.
        waits: whether the host waits until it knows that all gradients are finite, before the optimiser's step.
            Otherwise the device decides, and the host reads nothing.
    """

    def __init__(
        self,
        loss: nn.Module,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        schedule: ScheduleConfig,
        targets: Sequence[str],
        waits: bool,
    ) -> None:
        self.loss, self.model, self.optimiser, self.schedule = loss, model, optimiser, schedule
        self.targets, self.waits = targets, waits
        self._statistics = Statistics(model)

    def __call__(self, batches: Iterable[Batch]) -> Outcome:
        """Do a step with its `schedule.accumulate` mini-batches, which are on the network's device. A step with a
        gradient that isn't finite changes neither the weights, nor the optimiser, nor the running statistics."""
        accumulate = self.schedule.accumulate
        before = self._statistics.values()
        self.optimiser.zero_grad(set_to_none=True)
        losses, suspects = [], []
        for number, batch in enumerate(batches, 1):
            with self._averages(number == accumulate):
                value, nll, outputs = self.loss(batch)
                (value / accumulate).backward()
            losses.append(torch.stack([value, *nll.values()]).detach())
            suspects.append(self._suspects(batch, value.detach(), outputs))
        norm = nn.utils.clip_grad_norm_(self.optimiser.param_groups[0]["params"], self.schedule.clip)
        good = torch.isfinite(norm)
        for logits in (p for group in self.optimiser.param_groups[1:] for p in group["params"]):
            good = good & torch.isfinite(logits.grad).all()
        if self.waits:
            if good:
                self._change_weights()
            else:
                self._statistics.write(before)
        else:
            self._change_weights_if(good)
            after = self._statistics.values()
            self._statistics.write(torch.where(good, *both) for both in zip(after, before, strict=True))
        return Outcome(torch.stack(losses), good, torch.stack(suspects))

    def _averages(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Inside the `with` gradients are averaged over processes with the `last` mini-batch alone, for all of them."""
        several = isinstance(self.loss, nn.parallel.DistributedDataParallel)
        return self.loss.no_sync() if several and not last else contextlib.nullcontext()  # type: ignore[operator]

    def _suspects(self, batch: Batch, value: Tensor, outputs: dict[str, Tensor]) -> Tensor:
        """bool [M], the cases with values that aren't finite in their arrays; if there are none, those with such values
        in the outputs; else all cases. Where the host waits, it asks only if `value`, L of eq. 2, isn't finite."""
        inputs = batch["inputs"]
        if self.waits and math.isfinite(value):
            return inputs.new_zeros(len(inputs), dtype=torch.bool)
        given = _not_finite([inputs, *(batch[name] for name in self.targets)])
        made = _not_finite(list(outputs.values()))
        return torch.where(given.any(), given, made | ~made.any())

    def _change_weights(self) -> None:
        if self.schedule.pooled:
            pool_gradients(self.model, self.schedule.pooled)
        self.optimiser.step()

    def _change_weights_if(self, good: Tensor) -> None:
        """`_change_weights`, unless the device finds that a gradient is not finite. torch's fused Adam looks at
        `found_inf`, as its GradScaler does: if it is 1, weights, moments and the count of steps stay as they are."""
        optimiser: Any = self.optimiser
        optimiser.grad_scale, optimiser.found_inf = None, (~good).float()
        try:
            self._change_weights()
        finally:
            del optimiser.grad_scale, optimiser.found_inf


def _not_finite(tensors: Sequence[Tensor]) -> Tensor:
    """bool [M]: has the example a value that isn't finite in any of the tensors [M, ..]?"""
    return torch.stack([~torch.isfinite(tensor).reshape(len(tensor), -1).all(1) for tensor in tensors]).any(0)


class Unread:
    """The outcome of a step that the host has not read yet. It is on its way to the host, while the device goes on.

    step: the number of the step. cases: the names of the cases of each of its mini-batches.
    """

    def __init__(self, step: int, cases: list[list[str]], outcome: Outcome) -> None:
        self.step, self.cases = step, cases
        # A copy on the CPU, too, because the next replay of a graph writes to the same tensors.
        self._outcome = Outcome(*(one.to("cpu", non_blocking=True, copy=True) for one in outcome))
        self._copied: torch.cuda.Event | None = None
        if outcome.good.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(outcome.good.device))

    def read(self) -> Outcome:
        """The outcome, on the host. It waits until the step is done."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._outcome

    def suspects(self) -> list[str]:
        """The cases that are to blame for each mini-batch whose L isn't finite."""
        outcome = self.read()
        return [
            name
            for names, losses, blamed in zip(self.cases, outcome.losses, outcome.suspects.tolist(), strict=True)
            if not math.isfinite(losses[0])
            for name, is_bad in zip(names, blamed, strict=True)
            if is_bad
        ]
