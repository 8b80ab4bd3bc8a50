"""What an honest comparison on a noisy machine needs besides taking turns (`sfg_fast.gpu.timing.interleaved`): ratios
round by round, where it ran, and memory."""

import platform
import statistics
from pathlib import Path

import torch


def ratio(times: dict[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of time(of) / time(to), round by round."""
    ratios = [a / b for a, b in zip(times[of], times[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def machine() -> str:
    """One line about where this ran."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def resident(what: str, pid: int | str = "self") -> float:
    """Memory of a process in MiB, now (VmRSS) or at the most (VmHWM); 0 if it has just ended. (The maximum of rusage
    would count the process that started it, too.)"""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(lines[what].split()[0]) / 1024
    except (OSError, KeyError):
        return 0.0
