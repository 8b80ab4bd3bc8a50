"""Times of a device: what gpu_suite.py and gpu_networks.py share. With --dry-run on the command line the CPU stands in
for the GPU, and its times mean nothing."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

DRY = "--dry-run" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
HALF = torch.float16 if DRY else torch.bfloat16  # the interpreter can't multiply bfloat16


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def eager_us(call: Callable[[int], object], sets: int, rounds: int) -> list[float]:
    """Microseconds of each call on the device, by events around all input sets."""
    times = []
    for turn in range(rounds + 2):
        if DRY:
            start = time.perf_counter()
            for index in range(sets):
                call(index)
            elapsed = (time.perf_counter() - start) * 1e6
        else:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for index in range(sets):
                call(index)
            after.record()
            torch.cuda.synchronize()
            elapsed = before.elapsed_time(after) * 1e3
        if turn >= 2:
            times.append(elapsed / sets)
    return times


def captured(call: Callable[[int], object], sets: int) -> Callable[[int], object]:
    """All input sets in one CUDA graph, as a call to time with one "set"."""
    if DRY:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(sets):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(index) for index in range(sets)]

    def replay(_: int) -> object:
        graph.replay()
        return kept

    return replay


def host_us(call: Callable[[int], object], calls: int) -> float:
    """Microseconds of the host's time for one call, the device far behind."""
    call(0)
    synchronize()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call(0)
        times.append((time.perf_counter() - start) / calls * 1e6)
        synchronize()
    return statistics.median(times)


def roofs() -> dict[str, float]:
    """GB/s of a copy (read + written) and TFLOP/s of a half-precision matrix product on random data."""
    size = 1 << (20 if DRY else 30)
    source = torch.randn(size // 2, device=DEVICE).to(torch.float16)
    target = torch.empty_like(source)
    n = 64 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(HALF) for _ in range(2))
    copy = statistics.median(eager_us(lambda _: target.copy_(source), 1, 10))
    product = statistics.median(eager_us(lambda _: a @ b, 1, 10))
    return {"copy_GB_s": 2 * size / copy / 1e3, "half_TFLOP_s": 2 * n**3 / product / 1e6}
