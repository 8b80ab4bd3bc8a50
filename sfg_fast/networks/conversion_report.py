"""The report of a conversion: what became of every convolution of the network, and why."""

from __future__ import annotations

from typing import NamedTuple

SFG, HEAD, COPIED, PLAIN, UNREACHED = "SFG layer", "head", "copied for each task", "left plain", "not reached"


class Row(NamedTuple):
    """What became of a convolution: its name, a description of the layer, one of the words above, and the reason."""

    name: str
    layer: str
    becomes: str
    why: str


class Report(list[Row]):
    """A row for each convolution of a converted network. `str` makes a table of it."""

    @property
    def coverage(self) -> tuple[int, int]:
        """How many convolutions are SFG layers or heads now, and how many convolutions there are in all."""
        return sum(row.becomes in (SFG, HEAD) for row in self), len(self)

    def __str__(self) -> str:
        rows = [Row("name", "layer", "becomes", "why"), *self]
        widths = [max(len(row[column]) for row in rows) for column in range(len(Row._fields))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "{} of {} convolutions are SFG layers or heads".format(*self.coverage)])
