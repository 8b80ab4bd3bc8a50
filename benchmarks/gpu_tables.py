"""Tables of the results of gpu_suite.py in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sfg_fast.gpu.isolated import Outcome
from sfg_fast.kernel_choice import PRECISIONS


def report(outcomes: list[Outcome]) -> str:
    """The tables of all results so far, as Markdown."""
    found = {one.name: one.value for one in outcomes if one.error is None}
    where = found["where"]
    lines = [f"# The Triton kernels on {where['device']}", "", ", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += checks(outcomes)
    layers = {name: value for name, value in found.items() if name.startswith("layer ")}
    if layers:
        lines += passes(layers)
    for what in ("network", "inference"):
        cases = {name: value for name, value in found.items() if name.startswith(what + " ")}
        lines += networks(cases) if cases else []
    if "training steps" in found:
        rows = [[size, *(ms[1] for ms in times.values())] for size, times in found["training steps"].items()]
        head = ["milliseconds of a step", *next(iter(found["training steps"].values()))]
        lines += ["", "## Steps as `sfg-fast train` does them on one GPU", "", *table(head, rows)]
    varied = {name: value for name, value in found.items() if name.startswith("variants of ")}
    lines += variants(varied) if varied else []
    if "host" in found:
        lines += ["", "## The host", "", "Microseconds of the host for a call of three layers:", ""]
        lines += [f"- {name}: {us:.0f}" for name, us in found["host"].items()]
    return "\n".join([*lines, ""])


def checks(outcomes: list[Outcome]) -> list[str]:
    """Lines on the checks: how many were right, the largest error of each precision, and every job that failed."""
    lines = ["## Checks", ""]
    precisions: dict[str, list[float]] = {}
    for one in outcomes:
        if one.error is None and isinstance(one.value, dict) and one.name.split()[0] in PRECISIONS:
            precisions.setdefault(one.name.split()[0], []).append(max(one.value.values()))
    for name, errors in precisions.items():
        lines.append(f"- {name}: {len(errors)} right, largest relative error {max(errors):.1e}")
    lines += [
        f"- {one.name}: {one.value}" for one in outcomes if one.name.startswith(("memory", "graph")) and one.value
    ]
    left = [one.name for one in outcomes if one.error is not None and "the time was up" in one.error]
    lines += [f"- not done in time: {len(left)} ({', '.join(left[:5])} ..)"] if left else []
    failed = [one for one in outcomes if one.error is not None and one.name not in left]
    return [*lines, *(f"- WRONG {one.name}: {one.error}" for one in failed)]


def passes(layers: dict[str, Any]) -> list[str]:
    roof = next(iter(layers.values()))["roofs"]
    lines = ["", "## Passes of a layer", "", f"Roofs: {', '.join(f'{k} {v:.0f}' for k, v in roof.items())}.", ""]
    rows = []
    for layer, value in layers.items():
        for name, row in value["passes"].items():
            others = {who: us[1] for who, us in row.items() if isinstance(us, list) and who != "ours"}
            deterministic = others.pop("cuDNN, deterministic", None)
            (low, ours, high), best = row["ours"], min(others.values(), default=None)
            predicted = row.get("predicted")
            beside = [row.get("floor"), predicted, ours, f"{low:.0f}-{high:.0f}", predicted and ours / predicted]
            rows.append([layer, name, *beside, best, best and best / ours, deterministic])
    head = ["layer", "pass", "floor", "predicted", "measured", "quartiles", "measured / predicted", "cuDNN"]
    head += ["cuDNN / ours", "cuDNN that gives the same bits every time"]
    return [*lines, *table(head, rows), "", "Microseconds."]


def networks(cases: dict[str, Any]) -> list[str]:
    lines = []
    for name, case in cases.items():
        graph, eager = case["graph_us"], case["eager_us"]
        ours = graph.get("straight_through", graph.get("network"))
        rows = [
            [who, us[1] / 1e3, f"{us[0] / 1e3:.2f}-{us[2] / 1e3:.2f}", eager[who][1] / 1e3, case["batch"] * 1e6 / us[1],
             us[1] / ours[1] if ours else None, case["memory_MiB"].get(who)]
            for who, us in graph.items()
        ]  # fmt: skip
        head = ["", "graph, ms", "quartiles", "eager, ms", "slices/s in a graph", "time / ours", "MiB"]
        lines += ["", f"## {name[0].upper()}{name[1:]}, batch {case['batch']}", "", *table(head, rows)]
        lines += [f"- {who}: {error}" for who, error in case["failed"].items()]
    return lines


def variants(varied: dict[str, Any]) -> list[str]:
    """One table for each width: the time of each variant over that of the current choice."""
    lines = ["", "## Variants", "", "Microseconds as chosen, and the time of each variant over it."]
    for title, found in varied.items():
        usual = found.get("as chosen")
        if not isinstance(usual, dict):
            continue
        rows = [["as chosen", *(us[1] for us in usual.values())]]
        for name, value in found.items():
            if isinstance(value, dict) and value is not usual:
                rows.append([name, *(value[one][1] / usual[one][1] for one in usual)])
        lines += ["", *table([title, *usual], rows), ""]
        lines += [f"- {name}: {value}" for name, value in found.items() if isinstance(value, str)]
    return lines


def table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if value < 10 else f"{value:.0f}"
        return "" if value is None else str(value)

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)]
