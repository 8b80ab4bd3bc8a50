"""What an honest comparison on a noisy machine needs besides taking turns (`sfg_fast.gpu.timing.interleaved`): ratios
round by round, where it ran, and memory."""

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
    """Median, lower and upper quartile of time(of) / time(to), round by round."""
    ratios = [a / b for a, b in zip(times[of], times[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def ratios(times: Mapping[str, list[float]], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Spread]:
    """By title, of the pairs that were timed: two contestants each, not the same."""
    return {
        title: ratio(times, *pair) for title, pair in pairs.items() if set(pair) <= set(times) and len(set(pair)) > 1
    }


def cell(value: Spread | None) -> str:
    """A ratio in a table."""
    return "-" if value is None else "{:.2f} ({:.2f}-{:.2f})".format(*value)


class Timed(NamedTuple):
    """Seconds of one call of each contestant in every round, and why the others took no part."""

    times: dict[str, list[float]]
    left_out: dict[str, str]


def timed(calls: Mapping[str, Callable[[], Any]], device: str, rounds: int, repeat: int = 1) -> Timed:
    """All contestants in turns. On a GPU in device time: of CUDA graphs that `repeat` the call, so that what it takes
    to launch one counts for little."""
    if device == "cpu":
        return Timed(interleaved(calls, rounds), {})
    where, graphs, left_out = torch.device(device), {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = captured(_repeated(call, repeat), where)
        except RuntimeError as error:  # it waits for the device, or the memory doesn't suffice: it takes no part
            left_out[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    found = interleaved(graphs, rounds, device=where)
    return Timed({name: [seconds / repeat for seconds in one] for name, one in found.items()}, left_out)


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            call()

    return several


def finished(call: Callable[[], Any], device: str) -> Callable[[], None]:
    """The call, and waiting until the device is done."""

    def run() -> None:
        call()
        synchronize(torch.device(device))

    return run


def machine(device: str = "cpu") -> str:
    """One line about where this ran."""
    if device == "cuda":
        model = torch.cuda.get_device_name()
        return f"{model}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    model = processor()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def resident(what: str, pid: int | str = "self") -> float:
    """Memory of a process in MiB, now (VmRSS) or at the most (VmHWM); 0 if it has just ended. (The maximum of rusage
    would count the process that started it, too.)"""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines[what].split()[0]) / 1024
    except (OSError, KeyError):
        return 0.0


def forget_most_resident() -> None:
    """The most that this process has resident (VmHWM) counts from now on. What lies idle in malloc's heap is given
    back, or it would be used again without being seen."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux, or not glibc
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def allocated(call: Callable[[], Any]) -> float:
    """MiB that a call has allocated on the GPU at the most, less what there is before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
