"""Steps of training that are captured in CUDA graphs. A GPU replays a graph without waiting for Python, which takes
longer than the GPU for the many small operations of a step.

A graph does again what the device was told while it was captured. What the host decides has to be the same, so every
kind of step (`CapturedSteps._key`) has a graph of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import backends, kernel_choice
from ..errors import InputError
from ..files import one_line
from ..gpu.timing import capture
from ..networks.controls import sfg_layers
from .onlookers import tell
from .step import Batch, Outcome, Step, on_device

MOST_GRAPHS = 8  # each takes the time of a capture, and memory for its operations and its mini-batches


class Capture(Protocol):
    """What captures steps."""

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Inside the `with` work goes to the stream that steps are captured on."""

    def eagerly(self, call: Callable[[], Outcome]) -> Outcome:
        """What `call`, an eager step, returns. How much memory it takes is noted."""

    def has_room(self) -> bool:
        """Is there memory for an eager step beside that of the graphs?"""

    def __call__(self, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """A call that does again what `call` told the device to do, which is not done now. It writes to the same
        tensors. Raises any exception if `call` can't be captured."""


class CudaCapture:
    """Captures steps in CUDA graphs, which share their memory.

    Every step runs on one stream, also those that are not captured, because autograd remembers the stream on which it
    saw a parameter first, and would draw this stream into the capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool, self._needed = torch.cuda.graph_pool_handle(), 0

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Inside the `with` work goes to the stream of the steps. It waits for what came before, and is waited for."""
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def eagerly(self, call: Callable[[], Outcome]) -> Outcome:
        """See `Capture.eagerly`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        outcome = call()
        self._needed = max(self._needed, torch.cuda.max_memory_allocated(self._device) - before)
        return outcome

    def has_room(self) -> bool:
        """See `Capture.has_room`. Memory that torch keeps for later is given back first."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0] >= self._needed

    def __call__(self, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """See `gpu.timing.capture`."""
        return capture(call, self._stream, self._pool)


class _Kind:
    """Steps of one kind: their mini-batches, always in the same tensors, and the graph, once there is one."""

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        self.batches = [on_device(batch, device) for batch in batches]
        self.replay: Callable[[], Outcome] | None = None
        self.moved: list[int] = []  # by how much a replay moves the `phase` of each layer

    def take(self, batches: list[Batch]) -> None:
        """Copy mini-batches into the tensors that the graph reads."""
        for mine, batch in zip(self.batches, batches, strict=True):
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    mine[name].copy_(value, non_blocking=True)


class CapturedSteps:
    """Does steps as `step` does, but from the second of a kind on by replaying a CUDA graph.

    The first step of a kind is done eagerly: it is the warm-up that torch asks for, and makes the optimiser's tensors.
    (A warm-up with made-up data would change weights, moments, statistics and random numbers, all of which would have
    to be put back.) The second one is captured, and then replayed. A step gives the same bits both ways, so it doesn't
    matter to a resumed run which steps were captured.

    Args:
        step: a step that does not wait.
        capture: captures it.
        device: the device of the step's tensors.
        required: whether a step that can't be captured is an error. Otherwise a line on stderr says so, and all steps
            are done eagerly from then on.
    """

    def __init__(self, step: Step, capture: Capture, device: torch.device, required: bool) -> None:
        self._step, self._capture, self._device, self._required = step, capture, device, required
        self._layers = list(sfg_layers(step.model).values())
        self._parameters = list(step.loss.parameters())
        self._kinds: dict[Hashable, _Kind] = {}
        self._most, self._told = MOST_GRAPHS, False

    def __call__(self, batches: Iterable[Batch]) -> Outcome:
        """Do a step with these mini-batches, which are in (pinned) memory of the host. The next step writes to the
        tensors of the outcome.

        Raises InputError if the step is `required` to be captured and can't be.
        """
        batches = list(batches)
        with self._capture.beside():
            key = self._key(batches)
            kind = self._kinds.get(key)
            if kind is None:
                return self._first(key, batches)
            kind.take(batches)
            if kind.replay is None:
                self._try_to_capture(kind)
            if kind.replay is None:
                return self._step(kind.batches)
            for layer, moved in zip(self._layers, kind.moved, strict=True):
                layer.phase = (layer.phase + moved) % layer.every
            return kind.replay()

    def _first(self, key: Hashable, batches: list[Batch]) -> Outcome:
        """The first step of a kind, which is eager. It can't use the memory of the graphs: if there is none left
        beside, all are dropped, and captured anew when they are wanted."""
        replayed = [kind for kind in self._kinds.values() if kind.replay is not None]
        if replayed and not self._capture.has_room():
            for kind in replayed:
                kind.replay = None
        kind = _Kind(batches, self._device)
        if self._may_keep():
            self._kinds[key] = kind
        return self._capture.eagerly(lambda: self._step(kind.batches))

    def forget(self) -> None:
        """Let go of all graphs. They must not be replayed once the optimiser has other tensors."""
        self._kinds.clear()

    def _key(self, batches: list[Batch]) -> Hashable:
        """What the host decides for a step, as far as it may change in a run: the shapes of the mini-batches, what each
        layer does (`GroupGates.host_decides`), which parameters learn, and which kernels compute.

        Temperatures and learning rates are tensors on the device. The precision is the same in the whole run, and all
        modules are in train().
        """
        shapes = tuple(
            (name, value.shape, value.dtype)
            for batch in batches
            for name, value in batch.items()
            if isinstance(value, Tensor)
        )
        layers = tuple(layer.host_decides(len(batches)) for layer in self._layers)
        learns = tuple(parameter.requires_grad for parameter in self._parameters)
        kernels: Any = backends.current()
        if kernels == "auto" and self._device.type == "cuda":
            kernels = kernel_choice.chosen(self._device)
        return shapes, layers, learns, kernels

    def _may_keep(self) -> bool:
        """May another kind be captured? The first one that may not is told."""
        if len(self._kinds) < self._most:
            return True
        if not self._told:
            self._told = True
            tell(
                f"\ntraining has more than {MOST_GRAPHS} kinds of steps; other kinds are not captured, which is slower"
            )
        return False

    def _try_to_capture(self, kind: _Kind) -> None:
        """Make the graph of a kind. If that fails, no step is captured any more."""
        phases = [layer.phase for layer in self._layers]
        try:
            kind.replay = self._capture(lambda: self._step(kind.batches))
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)[:200]}"
            if self._required:
                raise InputError(f"graph='on': the step can't be captured ({reason}), expected auto or off") from error
            tell(f"\nthe step can't be captured in a CUDA graph ({reason}); training goes on without, which is slower")
            # Graphs that there are would draw random numbers of their own from now on (`gpu.timing.capture`).
            self._kinds.clear()
            self._most, self._told = 0, True
        finally:  # the layers have counted draws, though none was done
            after = [layer.phase for layer in self._layers]
            kind.moved = [now - before for now, before in zip(after, phases, strict=True)]
            for layer, phase in zip(self._layers, phases, strict=True):
                layer.phase = phase
