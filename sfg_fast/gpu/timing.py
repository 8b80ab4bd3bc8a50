"""Device time: calls captured in CUDA graphs, in turns, measured with events. On a CPU the host's clock is taken."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..backends import backend
from ..layers.conv import SFGConv2d
from ..layers.streams import Heads

Call = Callable[[], object]


def layers_at_work(
    work: str, width: int, name: str, device: torch.device, dtype: torch.dtype, batch: int, side: int
) -> Call:
    """A training step with the estimator `work`, or inference, of three SFG layers of `width` kernels with norm and
    ReLU, and heads of two tasks, on the backend `name`; half precision by autocast."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"padding": 1, "norm": "batch", "activation": "relu", "bias": False}
    estimator = "straight_through" if work == "inference" else work
    layers = [SFGConv2d(c, width, 3, estimator=estimator, **options) for c in (1, width, width)]
    model = nn.Sequential(*layers, Heads(width, {"task1": 1, "task2": 1}))
    for layer in layers:
        nn.init.normal_(layer.logits)
    model = model.to(device).to(memory_format=torch.channels_last).train(work != "inference")  # type: ignore[call-overload]
    x = torch.randn(batch, 1, side, side, device=device)

    def run() -> object:
        for parameter in model.parameters():
            parameter.grad = None
        enabled = dtype != torch.float32
        with backend(name), torch.autocast(device.type, dtype, enabled), torch.set_grad_enabled(work != "inference"):
            y = model(x)
        if work != "inference":
            torch.stack([one.float().square().mean() for one in y.values()]).sum().backward()
        return y

    return run


def elapsed(call: Call, device: torch.device) -> float:
    """Seconds that the device takes for one call: between two events on its stream. On the CPU: of the host."""
    if device.type != "cuda":
        before = time.perf_counter()
        call()
        return time.perf_counter() - before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def captured(call: Call, device: torch.device) -> Call:
    """The call as the replay of a CUDA graph, in which the host's part of the time is gone. On the CPU: the call.

    Raises RuntimeError if it can't be captured, e.g. because it waits for the device. What an autograd graph of another
    stream still holds may be the reason: capture before the call was made elsewhere.
    """
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with warnings.catch_warnings(), torch.cuda.graph(graph, stream=stream):
            warnings.filterwarnings("error", "The CUDA Graph is empty")  # the call went to another device
            results = call()
    except Exception:
        # A capture that failed leaves the generator waiting for its end: every later draw would raise.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise

    def replay(call: Call = call) -> object:  # which holds the memory that the graph reads
        graph.replay()
        return results

    return replay


def interleaved(
    calls: Mapping[str, Call], rounds: int = 15, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, by name: every round runs all of them, one after the other, in another order. (What ran
    just before leaves its threads awake or asleep, and the caches full of its own.)"""
    device = device or torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(warmup + rounds):
        shuffle(order)
        for name in order:
            seconds = elapsed(calls[name], device)
            if turn >= warmup:
                times[name].append(seconds)
    return times
