"""Where the time of a training step on the CPU goes: the share of each operation of the kernels, and how near it comes
to the machine's roofs.

    python -m benchmarks.profile_networks [FILE.md] [--networks routed separate vgg] [--sizes 96] [--rounds 15]

Networks and steps are those of networks.py. Operations are those of kernels/contract.py, timed inside whole
steps. FLOPs are what plain sums would take, for what is read alone: Winograd's products (kernels/cpu/winograd.h) do
with half of those of 3x3 kernels, so more than the sgemm roof is possible. Bytes are those of images, each read or
written once. Roofs are measured in turns with the steps: torch's sgemm, and copying (bytes read and written).
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sfg_fast.kernels import cpu
from sfg_fast.kernels.spec import RoutedConv, UndrawnFormula
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks.networks import Case, contestant
from benchmarks.timing import machine

CONVOLUTIONS = ("forward", "input_gradient", "input_and_gate_gradient", "gate_gradient", "weight_gradient")
OPERATIONS = (
    *CONVOLUTIONS,
    "normalise",
    "statistics",
    "normalise_gradient",
    "normalise_gradient_again",
    "sample",
)
ESTIMATORS = ("straight_through", "selected")
SGEMM, COPY = 1024, 32 << 20  # the size of the matrices; bytes that are copied


def sizes(ends: list[int]) -> list[int]:
    return [last - first for first, last in itertools.pairwise(ends)]


def read(spec: RoutedConv) -> int:
    """Pairs of an output's and an input's channel of which one reads the other."""
    rows, columns = sizes(spec.rows.ends), sizes(spec.columns.ends)
    return sum(rows[i] * columns[j] for i, reads in enumerate(spec.reads()) for j, one in enumerate(reads) if one)


def recomputed(formula: UndrawnFormula) -> int:
    """The same for undrawn rows; their product with the shared channels is kept."""
    rows, columns = sizes(formula.spec.rows.ends), sizes(formula.spec.columns.ends)
    first = 0 if formula.kept_product is None else 1
    return sum((sum(rows) - rows[g]) * columns[g] for g in range(first, min(len(rows), len(columns))))


def flops(name: str, given: dict[str, Any]) -> int:
    """Of one call."""
    if name not in CONVOLUTIONS:
        return 0
    formula = given.get("formula")
    spec = formula.spec if name == "gate_gradient" else given["spec"]
    pairs = 0 if formula is None else recomputed(formula)
    everything = spec.rows.order.numel() * spec.columns.order.numel()
    if name == "input_and_gate_gradient":
        pairs += read(spec) if formula is None else everything
    elif name == "input_gradient":
        pairs += everything if spec.columns.all_gates else read(spec)
    elif name != "gate_gradient":
        pairs += read(spec)
    kernel = (formula.packed if name == "gate_gradient" else given["packed"]).weight.shape[2:]
    if "dy" in given:
        n, _, height, width = given["dy"].shape
    else:
        x = formula.x if name == "gate_gradient" else given["x"]
        n, (height, width) = x.shape[0], spec.geometry.output_size(tuple(x.shape[2:]), tuple(kernel))
    return 2 * pairs * kernel.numel() * n * height * width


def image_bytes(name: str, given: dict[str, Any], result: Any) -> int:
    """Of all images in there, each once, those without memory of their own left out."""
    images = [given[one] for one in given if one not in ("packed", "formula")]
    images += [given["formula"].x, given["formula"].kept_product] if given.get("formula") else []
    images += [] if name == "weight_gradient" else [result]
    found = {}
    for leaf in pytree.tree_leaves(images):
        if isinstance(leaf, Tensor) and leaf.dim() == 4 and 0 not in leaf.stride():
            found[leaf.data_ptr()] = leaf.numel() * leaf.element_size()
    return sum(found.values())


class Profile:
    """Of the calls inside the `with`: by operation how many, seconds, FLOPs and bytes."""

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0, 0])
        self.inside, self.own = False, 0.0  # seconds that the profile takes itself

    def __enter__(self) -> Profile:
        self.real = {name: getattr(cpu, name) for name in OPERATIONS}
        for name, operation in self.real.items():
            setattr(cpu, name, self.timed(name, operation))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, operation in self.real.items():
            setattr(cpu, name, operation)

    def timed(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(operation)

        @functools.wraps(operation)
        def call(*args: Any, **options: Any) -> Any:
            if self.inside:  # one calls another
                return operation(*args, **options)
            self.inside, start = True, time.perf_counter()
            try:
                result = operation(*args, **options)
            finally:
                self.inside = False
            end = time.perf_counter()
            given = dict(signature.bind(*args, **options).arguments)
            for i, more in enumerate((1, end - start, flops(name, given), image_bytes(name, given, result))):
                self.found[name][i] += more
            self.own += time.perf_counter() - end
            return result

        return call


def roofs() -> tuple[float, float]:
    """FLOPs and bytes in a second."""
    a, b = torch.randn(2, SGEMM, SGEMM).unbind(0)
    product, source = torch.empty_like(a), torch.randn(COPY // 4)
    target = torch.empty_like(source)
    seconds = []
    for work in (lambda: torch.mm(a, b, out=product), lambda: target.copy_(source)):
        work()
        start = time.perf_counter()
        for _ in range(5):
            work()
        seconds.append((time.perf_counter() - start) / 5)
    return 2 * SGEMM**3 / seconds[0], 2 * COPY / seconds[1]


def table(case: Case, estimator: str, rounds: int) -> list[str]:
    step = contestant(case, estimator)
    for _ in range(3):
        step()
    shares, rates = defaultdict(list), []
    counts: dict[str, list[float]] = {}
    for _ in range(rounds):
        rates.append(roofs())
        with Profile() as profile:
            start = time.perf_counter()
            step()
            whole = time.perf_counter() - start - profile.own
        counts = profile.found
        for name, (_, seconds, work, moved) in profile.found.items():
            shares[name].append((seconds / whole, work / seconds / rates[-1][0], moved / seconds / rates[-1][1]))
        shares["outside the kernels"].append((1 - sum(found[1] for found in profile.found.values()) / whole, 0.0, 0.0))
    lines = [f"\n## {case}, {estimator}\n"]
    lines.append("| operation | calls | share of the step | GFLOP | of sgemm | MiB | of copying |\n|" + "---|" * 7)
    for name in sorted(shares, key=lambda name: -statistics.median(share[0] for share in shares[name])):
        share, arithmetic, memory = (statistics.median(column) for column in zip(*shares[name], strict=True))
        calls, _, work, moved = counts.get(name, [0, 0.0, 0, 0])
        cells = [name, f"{calls:.0f}" if calls else "", f"{share:.1%}"]
        cells += [f"{work / 1e9:.1f}", f"{arithmetic:.2f}"] if work else ["", ""]
        cells += [f"{moved / 2**20:.0f}", f"{memory:.2f}"] if moved else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--networks", nargs="+", default=["routed", "separate", "vgg"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    lines = [
        "# Where a training step's time goes\n",
        f"`python -m benchmarks.profile_networks --rounds {options.rounds}`. {machine()}. Batch {Case('', 0).batch}. "
        f"Medians of {options.rounds} steps. FLOPs: of plain sums, for what is read; Winograd's products take half. "
        "MiB: of images, each once.",
    ]
    for kind in options.networks:
        for size in options.sizes:
            for estimator in ESTIMATORS:
                lines += table(Case(kind, size), estimator, options.rounds)
                print(*lines[-14:], sep="\n", flush=True)
    if options.file:
        options.file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
