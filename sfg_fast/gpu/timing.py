"""Device time: calls are captured in CUDA graphs, run in turns, and measured with events. On a CPU the host's clock
measures them."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..backends import backend
from ..layers.conv import SFGConv2d
from ..layers.streams import Heads

Call = Callable[[], object]
Result = TypeVar("Result")


def layers_at_work(
    work: str, width: int, name: str, device: torch.device, dtype: torch.dtype, batch: int, side: int
) -> Call:
    """A call that runs a small network on the backend `name`: a training step with the estimator `work`, or inference.

    The network has three SFG layers of `width` kernels with norm and ReLU, and heads of two tasks. It reads images
    [batch, 1, side, side]. A half-precision `dtype` is used by autocast.
    """
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
    """The seconds that the device takes for one call, between two events on its stream. On the CPU they are those of
    the host's clock."""
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
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def captured(call: Call, device: torch.device) -> Call:
    """A call that replays `call` as a CUDA graph, without the host's part of the time. On the CPU it is `call` itself.

    Raises RuntimeError if `call` can't be captured, e.g. because it waits for the device. Another reason may be an
    autograd graph that still belongs to another stream: capture a call before it was made elsewhere.
    """
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return capture(call, stream)


def capture(call: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None) -> Callable[[], Result]:
    """A call that replays `call` as a CUDA graph on the current stream, and returns the tensors that `call` returned
    while it was captured: each replay writes to them anew. `call` must have run on `stream` before.

    pool: of `torch.cuda.graph_pool_handle`: the graphs that are given it share memory. What one of them returns may
    then be overwritten when another one is replayed.

    Raises RuntimeError if `call` can't be captured. The random generator is as it was before, but a graph that was
    captured earlier no longer draws from it: don't replay such a graph any more.
    """
    graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # "thread_local", because threads of a DataLoader pin memory meanwhile, which "global" would refuse.
    context = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
    try:
        with warnings.catch_warnings(), context:
            warnings.filterwarnings("error", "The CUDA Graph is empty")  # the call went to another device
            results = call()
    except Exception:
        torch.cuda.set_stream(outside)  # torch leaves its `with` early if the capture can't be ended
        # After a failed capture the generator still waits for the capture's end, and every later draw would raise.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise

    def replay(call: Callable[[], Result] = call) -> Result:  # the default argument keeps the memory that is read
        graph.replay()
        return results

    return replay


def interleaved(
    calls: Mapping[str, Call], rounds: int = 15, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float]]:
    """The seconds of each call, by name, `rounds` of them. Every round runs all calls, one after the other, in another
    order, because a call leaves threads awake or asleep and caches full of its data for the next one. The first
    `warmup` rounds don't count."""
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
