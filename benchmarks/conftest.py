"""`pytest benchmarks/` measures on the device that there is, and prints one table of ratios with their spread at the
end.

    --device cpu|cuda    by default the GPU, if there is one
    --full               every case (otherwise a quick choice), also those that take long to compile

All contestants that do the same work are timed in turns in one process, on a GPU in device time. Ratios are medians
(quartiles) of the rounds. `--benchmark-json FILE` has them, too, as each benchmark's `extra_info`. pytest-benchmark's
own table has times, which say little on a shared machine; `--benchmark-verbose` prints it.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.timing import Spread, cell, machine


class Row(NamedTuple):
    """A line of the table, and the notes below the table on contestants that took no part."""

    case: str
    ours: str
    ratios: dict[str, Spread]
    memory: str
    left_out: Mapping[str, str]


ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of sfg_fast")
    group.addoption("--device", choices=("cpu", "cuda"), help="what to measure on; by default the GPU, if there is one")
    group.addoption("--full", action="store_true", help="every case, also what takes long to compile")


def pytest_configure(config: pytest.Config) -> None:
    there, device = torch.cuda.is_available(), config.getoption("device", None)
    if device == "cuda" and not there:
        raise pytest.UsageError("--device cuda: torch finds no GPU here, expected one (or --device cpu)")
    # `pytest .` reads this file too late for its options.
    config.option.device = device or ("cuda" if there else "cpu")
    config.option.full = config.getoption("full", False)
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the tests a warning is an error. Here it is shown, and the measurement goes on."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("device")


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("full")


@pytest.fixture(autouse=True)
def _left_as_it_was(device: str) -> Iterator[None]:
    """Let cuDNN choose its kernels by measuring. After each test give back the memory of CUDA graphs and forget
    compiled functions, because torch compiles a function for at most eight cases and runs it uncompiled for others."""
    torch.backends.cudnn.benchmark = device == "cuda"
    yield
    gc.collect()
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def record(pytestconfig: pytest.Config, benchmark: Any) -> Callable[..., None]:
    """A function that adds a line to the table and to the benchmark's JSON. It adds `numbers` to the JSON alone."""

    def add(
        case: str,
        ours: str,
        ratios: dict[str, Spread],
        memory: str = "",
        left_out: Mapping[str, str] | None = None,
        **numbers: Any,
    ) -> None:
        pytestconfig.stash[ROWS].append(Row(case, ours, ratios, memory, left_out or {}))
        spreads = {
            title: {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}
            for title, (median, low, high) in ratios.items()
        }
        where = machine(pytestconfig.getoption("device"))
        benchmark.extra_info |= {"case": case, "ours": ours, "where": where, "ratios": spreads, **numbers}

    return add


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("ratios of times: medians (quartiles) of rounds in turns")
    terminalreporter.write_line(machine(config.getoption("device")))
    for line in [*table(rows), *notes(rows)]:
        terminalreporter.write_line(line)


def table(rows: list[Row]) -> list[str]:
    """The table as Markdown, with the columns that any row has."""
    titles = list(dict.fromkeys(title for row in rows for title in row.ratios))
    cells = [["case", "ours", *titles, "memory"]]
    cells += [
        [row.case, row.ours, *(cell(row.ratios.get(title)) for title in titles), row.memory or "-"] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def notes(rows: list[Row]) -> list[str]:
    found = itertools.chain.from_iterable(((row.case, *item) for item in row.left_out.items()) for row in rows)
    return [f"{case}: {name} took no part: {why}" for case, name, why in found]
