"""Helps to compare fairly on a noisy machine: ratios round by round, a description of the machine, and memory.
Contestants take turns (`sfg_fast.gpu.timing.interleaved`)."""

import contextlib
import ctypes
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sfg_fast.configuration import processor
from sfg_fast.gpu.timing import captured, interleaved, synchronize

Spread = tuple[float, float, float]  # median, lower and upper quartile


def ratio(times: Mapping[str, list[float]], of: str, to: str) -> Spread:
    """The median, lower and upper quartile of the ratios time(of) / time(to) of all rounds."""
    ratios = [a / b for a, b in zip(times[of], times[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def ratios(times: Mapping[str, list[float]], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Spread]:
    """The ratio of each pair of contestants by its title. Pairs that were not timed, or of one contestant, are left
    out."""
    return {
        title: ratio(times, *pair) for title, pair in pairs.items() if set(pair) <= set(times) and len(set(pair)) > 1
    }


def cell(value: Spread | None) -> str:
    """The cell of a ratio in a table."""
    return "-" if value is None else "{:.2f} ({:.2f}-{:.2f})".format(*value)


class Timed(NamedTuple):
    """The seconds of one call of each contestant in every round, and the reasons why other contestants took no part."""

    times: dict[str, list[float]]
    left_out: dict[str, str]


def timed(calls: Mapping[str, Callable[[], Any]], device: str, rounds: int, repeat: int = 1) -> Timed:
    """Time all contestants in turns. On a GPU it is device time: a CUDA graph repeats the call `repeat` times, so that
    launching the graph counts for little."""
    if device == "cpu":
        return Timed(interleaved(calls, rounds), {})
    where, graphs, left_out = torch.device(device), {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = captured(_repeated(call, repeat), where)
        except RuntimeError as error:  # it waits for the device, or needs too much memory
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    found = interleaved(graphs, rounds, device=where)
    return Timed({name: [seconds / repeat for seconds in one] for name, one in found.items()}, left_out)


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            call()

    return several


def finished(call: Callable[[], Any], device: str) -> Callable[[], None]:
    """A call that also waits until the device is done."""

    def run() -> None:
        call()
        synchronize(torch.device(device))

    return run


def machine(device: str = "cpu") -> str:
    """One line that describes the machine."""
    if device == "cuda":
        model = torch.cuda.get_device_name()
        return f"{model}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    model = processor()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def resident(what: str, pid: int | str = "self") -> float:
    """The memory of a process in MiB, now (VmRSS) or at its peak (VmHWM); 0 if the process has just ended. (The maximum
    of rusage would count the process that started it, too.)"""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines[what].split()[0]) / 1024
    except (OSError, KeyError):
        return 0.0


def forget_most_resident() -> None:
    """Let the peak memory of this process (VmHWM) count from now on. Free memory in malloc's heap is given back: it
    would be used again without raising the peak."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux, or not glibc
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def allocated(call: Callable[[], Any]) -> float:
    """The peak in MiB of what a call allocates on the GPU, less what is allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
