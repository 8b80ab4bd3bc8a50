"""Steps of training as `sfg-fast train` does them on one GPU: captured in CUDA graphs and eagerly.

gpu_jobs.py asks whether both give the same bits, and how long they take. On a CPU nothing is captured.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfg_fast import SFGHighResNet, set_estimator
from sfg_fast.data import Target
from sfg_fast.gpu.timing import synchronize
from sfg_fast.tasks import read_tasks
from sfg_fast.training.config import ObjectiveConfig, ScheduleConfig
from sfg_fast.training.graphs import CapturedSteps, CudaCapture
from sfg_fast.training.objective import Objective
from sfg_fast.training.schedule import apply_schedule, build_optimiser
from sfg_fast.training.step import Batch, Loss, Outcome, Step, Unread, on_device

TARGETS = {
    "ct": Target("ct", "intensities", "HU"),
    "labels": Target("labels", "labels", names={"background": 0, "a": 1, "b": 2}),
}


class NothingCaptured:
    """Stands for `CudaCapture` on a CPU: a replay runs the call itself."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def eagerly(self, call: Callable[[], Outcome]) -> Outcome:
        return call()

    def has_room(self) -> bool:
        return True

    def __call__(self, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
        return call


class Training:
    """A training of `SFGHighResNet` with routed blocks on images [batch, 1, side, side] of noise, which always begins
    with the same random numbers. options: of `SFGHighResNet`."""

    def __init__(
        self, device: torch.device, captured: bool, batch: int, side: int, every: int, precision: str, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.side = device, batch, side
        tasks = read_tasks(["ct", "organs"], TARGETS)
        self.model = SFGHighResNet(1, {"ct": 1, "organs": 3}, residual="routed", **options)
        set_estimator(self.model, "straight_through", every)
        self.model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = Objective(tasks, ObjectiveConfig()).to(device)
        self.schedule = ScheduleConfig(steps=1000)
        self.optimiser = build_optimiser(self.schedule, self.model, objective, waits=False)
        loss = Loss(self.model, objective, tasks, 1000, precision)
        self.eager = Step(loss, self.model, self.optimiser, self.schedule, ["ct", "labels"], waits=False)
        capture = CudaCapture(device) if device.type == "cuda" else NothingCaptured()
        self.captured = CapturedSteps(self.eager, capture, device, required=True) if captured else None
        self.number = 0
        self._unread: Unread | None = None

    def examples(self, poisoned: bool = False) -> Batch:
        """A mini-batch in (pinned) memory; `poisoned`: its first image has a value that is not finite."""
        shape = self.batch, 1, self.side, self.side
        random = torch.Generator().manual_seed(self.number)
        inputs = torch.randn(shape, generator=random)
        if poisoned:
            inputs[0, 0, 0, 0] = torch.nan
        labels = torch.randint(3, (self.batch, self.side, self.side), generator=random)
        there = torch.ones(self.batch, dtype=torch.bool)
        found = {"inputs": inputs, "ct": inputs.sign() * 400, "labels": labels, "has_ct": there, "has_labels": there}
        pins = self.device.type == "cuda"
        return {name: value.pin_memory() if pins else value for name, value in found.items()}

    def step(self, batch: Batch) -> Tensor | None:
        """Do a step, and read what the step before has told: its losses, None for the first."""
        apply_schedule(self.schedule, self.number, self.model, self.optimiser)
        self.model.train()
        outcome = self.captured([batch]) if self.captured else self.eager([on_device(batch, self.device)])
        unread = Unread(self.number, [[]], outcome)
        before, self._unread = self._unread, unread
        self.number += 1
        return None if before is None else before.read().losses

    def state(self) -> dict[str, Tensor]:
        """All that a step changes: weights, statistics, moments, and where the random generator stands."""
        found = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        for number, moments in enumerate(self.optimiser.state.values()):
            found |= {f"{name} {number}": value.cpu() for name, value in moments.items()}
        on_gpu = self.device.type == "cuda"
        found["random numbers"] = torch.cuda.get_rng_state(self.device) if on_gpu else torch.get_rng_state()
        return found


def captured_equals_eager(device: torch.device, **options: Any) -> str:
    """Twelve steps, of which every other one looks at undrawn gates and one is left out, end with the same bits."""
    ends, losses = [], []
    for captured in (True, False):
        training = Training(device, captured, every=2, precision="bfloat16", **options)
        losses.append([training.step(training.examples(poisoned=number == 7)) for number in range(12)])
        ends.append(training.state())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), f"captured steps gave another {name} than eager ones"
    for number, (one, other) in enumerate(zip(losses[0][1:], losses[1][1:], strict=True)):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), f"captured step {number} told another loss"
        assert bool(one.isfinite().all()) == (number != 7), f"step {number} has the loss {one}"
    return f"{len(ends[0])} tensors equal to the bit after {training.number} steps"


def measured(device: torch.device, rounds: int, **options: Any) -> dict[str, list[float]]:
    """Milliseconds of a step from the host's clock (quartiles of `rounds`, each of ten steps), with the copies of the
    mini-batches, and losses that are read one step late; without the reading of slices."""
    found = {}
    for name, captured in {"captured": True, "eager": False}.items():
        training = Training(device, captured, every=1, precision="bfloat16", **options)
        batch, times = training.examples(), []
        for _ in range(3):
            training.step(batch)
        for _ in range(rounds):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(10):
                training.step(batch)
            synchronize(device)
            times.append((time.perf_counter() - start) * 100)
        found[name] = [round(t, 2) for t in (statistics.quantiles(times, n=4) if len(times) > 1 else times * 3)]
    return found
