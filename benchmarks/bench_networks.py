"""Whole networks: a training step, inference and memory, against everything one could use instead.

    python -m benchmarks.bench_networks [FILE.md] [--networks routed separate vgg] [--sizes 96 160] [--rounds 9]

Batches of 4; networks and contestants: networks.py. Ratios are medians (quartiles) of interleaved rounds. Each is taken in
its faster memory format. Memory: the most that a process of its own has resident in a training step, less what it has
before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

from benchmarks.networks import EVERY, Case, contestant, faster, inferences, names
from benchmarks.timing import machine, ratio, resident
from sfg_fast.gpu.timing import interleaved


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


def peak(case: Case, name: str) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_networks", "--peak", case.kind, str(case.size), name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_here(case: Case, name: str) -> float:
    contestant(case._replace(size=32), name)()  # what is loaded at first use
    run = contestant(case, name)
    before = resident("VmRSS")
    for _ in range(2):
        run()
    return resident("VmHWM") - before


def memory(case: Case) -> list[str]:
    found = {name: peak(case, name) for name in ("dense", "masked", "straight_through", "selected", "one plain")}
    cells = [f"{found['dense']:.0f}"]
    cells += [f"{found[name] / found['dense']:.2f}" for name in ("straight_through", "selected", "masked", "one plain")]
    return [str(case), *cells]


TABLES = {
    "Training step": (
        training,
        "network | dense / straight_through | dense / every=4 | dense / selected | dense / masked | straight_through / "
        "one plain | / the faster of one plain and it compiled | / MONAI (VGG: one plain) | dense: eager / faster",
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
    parser.add_argument("--networks", nargs="+", default=["routed", "separate", "vgg"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 160])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", nargs="+", default=list(TABLES))
    parser.add_argument("--peak", nargs=3, metavar=("KIND", "SIZE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        kind, size, name = options.peak
        print(peak_here(Case(kind, int(size)), name))
        return
    lines = [
        "# Whole networks\n",
        f"`python -m benchmarks.bench_networks`. {machine()}. Batch {Case('', 0).batch}. Medians (quartiles) of "
        f"{options.rounds} interleaved rounds.",
    ]
    for title in options.tables:
        make, header = TABLES[title]
        lines += [f"\n## {title}\n", f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
        for kind in options.networks:
            for size in options.sizes:
                lines.append("| " + " | ".join(make(Case(kind, size), options.rounds)) + " |")
                print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.file:
        options.file.write_text(text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
