"""Compares whole networks with everything that one could use instead: a training step, inference, and memory.

    python -m pytest benchmarks/bench_networks.py    on the CPU or a GPU: rows of the table that conftest.py prints
    python -m benchmarks.bench_networks [FILE.md] [--networks routed vgg unet ..] [--sizes 96 128 160] [--rounds 9]

networks.py has the cases and the contestants. Ratios are medians (quartiles) of interleaved rounds; each contestant has
its faster memory format. The memory is the peak of a process of its own in a training step (or inference), less what
the process has before; on a GPU it is the peak of what a step allocates.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.layers import fastest
from benchmarks.networks import CASES, EVERY, LAST, Case, Step, cases, contestant, faster, inferences, names
from benchmarks.timing import allocated, finished, forget_most_resident, machine, ratio, ratios, resident, timed
from sfg_fast.gpu.timing import interleaved

OURS = {"training": "straight_through", "inference": "network"}


def training(case: Case, rounds: int) -> list[str]:
    times = faster(interleaved({name: contestant(case, name) for name in names(case.kind)}, rounds))
    pairs = [
        ("dense faster", "straight_through"),
        ("dense faster", f"straight_through={EVERY}"),
        ("dense faster", "selected"),
        ("dense faster", "masked"),
        ("straight_through", "one plain"),
        ("straight_through", "one plain faster"),
        ("straight_through", "MONAI" if "MONAI" in times else "one plain"),
        ("dense", "dense faster"),
    ]
    return [str(case), *("{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, *pair)) for pair in pairs)]


def inference(case: Case, rounds: int) -> list[str]:
    times = faster(interleaved(inferences(case), rounds))
    cells = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, name, "two plain")) for name in ("frozen", "network")]
    return [str(case), *cells]


def peak(case: Case, name: str, phase: str = "training") -> float:
    """The peak memory in MiB of a contestant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_networks", "--peak", phase, case.kind, str(case.size), name]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


def peak_here(case: Case, name: str, phase: str) -> float:
    def make(case: Case) -> Step:
        fast = fastest(case.device)
        return contestant(case, name, fast) if phase == "training" else inferences(case, fast)[name]

    make(case._replace(size=32))()  # libraries are loaded at first use
    run = make(case)
    forget_most_resident()
    before = resident("VmRSS")
    for _ in range(2):
        run()
    return resident("VmHWM") - before


def memory(case: Case) -> list[str]:
    found = {name: peak(case, name) for name in ("dense", "masked", "straight_through", "selected", "one plain")}
    cells = [f"{found['dense']:.0f}"]
    cells += [f"{found[name] / found['dense']:.2f}" for name in ("straight_through", "selected", "masked", "one plain")]
    return [str(case), *cells]


# ---------------------------------------------------------------------------------------------------------- with pytest


def pytest_generate_tests(metafunc: Any) -> None:
    some = [
        pytest.param(case, phase, id=f"{case.kind}-{case.size}-{phase}")
        for case in cases(metafunc.config.getoption("device"), metafunc.config.getoption("full"))
        for phase in OURS
    ]
    metafunc.parametrize(("case", "phase"), some)


def test_network(benchmark: Any, record: Any, device: str, full: bool, case: Case, phase: str) -> None:
    """Time all contestants in turns, in device time. pytest-benchmark times our network alone, as Python calls it."""
    benchmark.group = f"networks, {phase}"
    ours, fast = OURS[phase], fastest(device)
    if phase == "training":
        run = {name: contestant(case, name, fast) for name in names(case.kind, device, full)}
    else:
        run = inferences(case, fast)
    times, left_out = timed(run, device, 9 if full else 5)
    assert ours in times, left_out[ours]
    benchmark.pedantic(finished(run[ours], device), rounds=3, warmup_rounds=1)
    times = faster(times)
    if "dense compiled" in times:
        times["eager dense"] = times["dense"]
    pairs = {
        "dense masking / ours": ("dense faster", ours),
        "eager dense masking / ours": ("eager dense", ours),
        "ours / one plain": (ours, "one plain faster"),
        "masked / ours": ("masked", ours),
        "dense masking / selected": ("dense faster", "selected"),
        f"dense masking / every={EVERY}": ("dense faster", f"straight_through={EVERY}"),
        "ours / MONAI": (ours, "MONAI"),
        "frozen / ours": ("frozen", ours),
    }
    slices = case.batch / statistics.median(times[ours])
    most = most_memory(case, phase, run)
    record(
        f"{case}: {phase}",
        f"{ours} ({fast}), {slices:.1f} slices/s",
        ratios(times, pairs),
        f"{most[ours]:.0f} MiB, {most[ours] / most['dense']:.2f} of dense" if most["dense"] else "",
        left_out,
        slices_per_s=slices,
        memory_MiB=most,
    )


def most_memory(case: Case, phase: str, run: Mapping[str, Step]) -> dict[str, float]:
    """The memory of dense masking and of our network in MiB."""
    both = ("dense", OURS[phase])
    if case.device == "cpu":
        return {name: peak(case, name, phase) for name in both}
    return {name: allocated(run[name + LAST if name + LAST in run else name]) for name in both}


# ----------------------------------------------------------------------------------------------------------- the tables

TABLES = {
    "Training step": (
        training,
        "network | dense / straight_through | dense / every=4 | dense / selected | dense / masked | straight_through / "
        "one plain | / the faster of one plain and it compiled | / MONAI (else: one plain) | dense: eager / faster",
    ),
    "Inference": (inference, "network | frozen / two plain networks | itself in `eval()` / two plain networks"),
    "Memory": (
        lambda case, rounds: memory(case),
        "network | dense, MiB | straight_through / dense | selected / dense | masked / dense | one plain / dense",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--networks", nargs="+", default=["routed", "separate", "vgg", "unet"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 128, 160])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", nargs="+", default=list(TABLES))
    parser.add_argument("--peak", nargs=4, metavar=("PHASE", "KIND", "SIZE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        phase, kind, size, name = options.peak
        print(peak_here(Case(kind, int(size)), name, phase))
        return
    lines = [
        "# Whole networks\n",
        f"`python -m benchmarks.bench_networks`. {machine()}. Batch {Case('', 0).batch}. Medians (quartiles) of "
        f"{options.rounds} interleaved rounds.",
    ]
    for title in options.tables:
        make, header = TABLES[title]
        lines += [f"\n## {title}\n", f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
        for case in CASES["cpu"]:
            if case.kind in options.networks and case.size in options.sizes:
                lines.append("| " + " | ".join(make(case, options.rounds)) + " |")
                print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.file:
        options.file.write_text(text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
