"""Compares a training step of `backend("reference")` with a plain script of the same network, and our backend with
both.

python -m pytest benchmarks/bench_reference.py        on the CPU or a GPU: rows of the table that conftest.py prints
python -m benchmarks.bench_reference FILE.md          the CPU's table; also writes it
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import pytest

from benchmarks.layers import fastest
from benchmarks.networks import HALF, Case, Step, ours, step
from benchmarks.plain_network import PlainNetwork
from benchmarks.timing import Spread, cell, finished, machine, ratios, timed

CASES = {
    f"{name}, {kind}": Case(kind, *shape)
    for name, shape in {"demo": (48, 4, (8, 16, 16), 1), "paper": (96, 2, (16, 32, 64), 3)}.items()
    for kind in ("separate", "routed")
}
PAIRS = {"dense masking / ours": ("plain script", "ours"), "reference / plain script": ("reference", "plain script")}


def contestants(case: Case) -> dict[str, Step]:
    """Training steps (forward, backward) of the plain script, of the reference backend, and of the fastest backend."""
    last = case.device == "cuda"
    script = PlainNetwork((1, 6), case.widths, case.blocks, case.kind)
    return {
        "plain script": step(script, case, last=last),
        "reference": step(ours(case), case, "reference", last),
        "ours": step(ours(case), case, fastest(case.device), last),
    }


@pytest.mark.parametrize("name", CASES)
def test_reference_is_as_fast_as_a_plain_script(benchmark: Any, record: Any, device: str, name: str) -> None:
    benchmark.group = "networks, training"
    case = CASES[name]._replace(device=device, half=HALF[device])
    run = contestants(case)
    times, left_out = timed(run, device, rounds=5)
    benchmark.pedantic(finished(run["ours"], device), rounds=3, warmup_rounds=1)
    assert not left_out
    found = ratios(times, PAIRS)
    slices = case.batch / statistics.median(times["ours"])
    what = f"straight_through ({fastest(device)}), {slices:.1f} slices/s"
    record(f"{name}, {case.size}x{case.size}: training", what, found, slices_per_s=slices)
    # The limit is wide, because times on a shared machine vary. The table in results/ tells small differences.
    assert found["reference / plain script"][0] < 1.5


def row(name: str) -> str:
    found: dict[str, Spread] = ratios(timed(contestants(CASES[name]), "cpu", rounds=25).times, PAIRS)
    cells = [cell(found[title]) for title in ("reference / plain script", "dense masking / ours")]
    return f"| {name.replace(', ', ' | ')} | {cells[0]} | {cells[1]} |"


HEADER = """| network | residual | reference / plain script | plain script / auto (speed-up) |
|---|---|---|---|"""


if __name__ == "__main__":
    lines = [row(name) for name in CASES]
    text = "\n".join(
        [
            "# Training step: reference backend against a plain script of dense masking",
            "",
            f"`python -m benchmarks.bench_reference`. {machine()}. Medians (quartiles) of 25 rounds.",
            "",
            HEADER,
            *lines,
            "",
        ]
    )
    print(text)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            file.write(text)
