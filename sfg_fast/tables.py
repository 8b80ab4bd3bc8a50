"""Numbers of many cases as text: mean (SD), and tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Table(NamedTuple):
    """A table of texts: its caption, the heading of each column, and the cells of each row, of which the first is the
    row's heading."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def markdown(part: Table) -> str:
    """The header and the rows of a table as Markdown with aligned columns; the text ends with a newline."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (part.header, *part.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        first, *rest = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |\n")
    return "".join(lines)


def heading(name: str) -> str:
    """The name of a region, organ or class as a column heading: `left_femur` -> `Left femur`; `CTV` stays."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def spread(numbers: Sequence[float]) -> dict[str, Any]:
    """{"mean", "sd", "n"} of numbers. The SD is the sample's (divided by n - 1), and 0 for n = 1; for n = 0 mean and SD
    are None."""
    if not len(numbers):
        return {"mean": None, "sd": None, "n": 0}
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    return {"mean": float(np.mean(numbers)), "sd": sd, "n": len(numbers)}


def cell(value: Mapping[str, Any], digits: int, n_cases: int, sd: bool = True) -> str:
    """A `spread` as text: `mean (SD)`, or the mean alone (`sd` is False), followed by `n=` where n isn't n_cases. For
    n = 0 it is a hyphen."""
    if value["n"] == 0:
        return "-"
    text = f"{value['mean']:.{digits}f}" + (f" ({value['sd']:.{digits}f})" if sd else "")
    return text if value["n"] == n_cases else f"{text} n={value['n']}"


def number_at(case: Mapping[str, Any], place: Sequence[str]) -> float | None:
    """The number at a place of a case's metrics, e.g. ("ct", "regions", "overall", "mae"); None where there is none."""
    value: Any = case
    for key in place:
        value = (value or {}).get(key)
    return value
