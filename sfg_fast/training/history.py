"""The history of a run: its curves, and p of every layer.

Every checkpoint holds the history, and the report draws it from there. RUN/history.json is a copy for other programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypedDict

from torch import nn

from ..errors import InputError
from ..files import check_shape, shown
from ..networks.controls import entropy, sfg_layers

CURVES = ("step", "objective", "temperature", "learning_rate")
SHARES_TOLERANCE = 1e-3  # shares are means of float32, so their sum is only about 1


class Curves(TypedDict):
    """The curves: a value for each recorded step. `nll` has the negative log-likelihood of each task; `scores` has each
    "TASK/SCORE" (`tasks.Score`). None stands for a value that is no number."""

    step: list[int]
    objective: list[float | None]
    temperature: list[float | None]
    learning_rate: list[float]
    nll: dict[str, list[float | None]]
    scores: dict[str, list[float | None]]


class Allocation(TypedDict):
    """For each layer and each recorded step: the mean p of each group, and the mean entropy of p in nats."""

    step: list[int]
    p: dict[str, list[list[float]]]
    entropy: dict[str, list[float]]


class Validation(TypedDict):
    """The values of each look at the validation split: its step, the nll summed over tasks, and the scores."""

    step: list[int]
    nll: list[float | None]
    scores: dict[str, list[float | None]]


class History(TypedDict):
    """The history of a run, from which its figures are drawn. `titles` has the title of each "TASK/SCORE"."""

    groups: list[str]
    titles: dict[str, str]
    curves: Curves
    allocation: Allocation
    validation: Validation


def check_history(history: Any, where: str) -> None:
    """Raise InputError unless `history` is that of a run which has recorded a step, so that figures can be drawn of it.
    `where` names its file, for the message."""
    check_shape(history, History, where, "history")
    curves, allocation, validation = history["curves"], history["allocation"], history["validation"]
    groups, steps = history["groups"], curves["step"]
    if groups != ["shared", *curves["nll"]]:
        found = f"{', '.join(groups)}, but curves.nll is of {', '.join(curves['nll'])}"
        raise InputError(f"{where}: history.groups are {found}; expected shared, then these")
    recorded = {f"curves.{name}": curves[name] for name in CURVES} | {"allocation.step": allocation["step"]}
    for place, named in (
        ("curves.nll", curves["nll"]),
        ("curves.scores", curves["scores"]),
        *((f"allocation.{n}", allocation[n]) for n in ("p", "entropy")),
    ):
        recorded |= {f"{place}.{name}": values for name, values in named.items()}
    looks = {f"validation.{name}": validation[name] for name in ("step", "nll")}
    looks |= {f"validation.scores.{name}": values for name, values in validation["scores"].items()}
    for place, named in (("curves", curves["scores"]), ("validation", validation["scores"])):
        if list(named) != list(history["titles"]):
            found, expected = ", ".join(named), ", ".join(history["titles"])
            raise InputError(f"{where}: history.{place}.scores are {found}; expected those of titles: {expected}")
    for lists, expected in ((recorded, steps), (looks, validation["step"])):
        for place, values in lists.items():
            if len(values) != len(expected) or not steps:
                raise InputError(
                    f"{where}: history.{place} has {len(values)} values, expected one for each of "
                    f"{len(expected) or 'the'} steps"
                )
    for place, values in (("curves", steps), ("allocation", allocation["step"]), ("validation", validation["step"])):
        if values != sorted(set(values)):
            raise InputError(f"{where}: history.{place}.step is {shown(values)}, expected steps one after the other")
    if allocation["p"].keys() != allocation["entropy"].keys():
        raise InputError(f"{where}: history.allocation.p and .entropy are of different layers, expected the same")
    for name, rows in allocation["p"].items():
        for row in rows:
            if len(row) != len(groups):
                raise InputError(
                    f"{where}: history.allocation.p.{name} has {len(row)} shares, expected one for each of "
                    f"{len(groups)} groups"
                )
            if min(row) < 0 or abs(sum(row) - 1) > SHARES_TOLERANCE:
                raise InputError(
                    f"{where}: history.allocation.p.{name} has the shares {shown(row)}, expected shares of 1"
                )


def empty_history(model: nn.Module, tasks: Iterable[str], titles: dict[str, str]) -> dict[str, Any]:
    """The history of a run that has not begun: empty lists to append to. `bad_steps` will list the steps that were left
    out, and the cases that are to blame."""
    names = list(sfg_layers(model))
    return {
        "groups": ["shared", *tasks],
        "titles": titles,
        "curves": {
            **{name: [] for name in CURVES},
            "nll": {task: [] for task in tasks},
            "scores": {name: [] for name in titles},
        },
        "allocation": {"step": [], "p": {name: [] for name in names}, "entropy": {name: [] for name in names}},
        "validation": {"step": [], "nll": [], "scores": {name: [] for name in titles}},
        "bad_steps": [],
    }


def record(history: dict[str, Any], model: nn.Module, row: dict[str, Any], nll: dict[str, float]) -> dict[str, float]:
    """Append a row to the curves, and p of every layer to the allocation. Returns the numbers that a tensorboard shows
    of the row, by name."""
    curves, allocation = history["curves"], history["allocation"]
    for name in CURVES:
        curves[name].append(_known(row[name]))
    for name, value in row["scores"].items():
        curves["scores"][name].append(_known(value))
    for task, value in nll.items():  # it is NaN if no example of the batch has the target
        curves["nll"][task].append(_known(value))
    allocation["step"].append(row["step"])
    for name, layer in sfg_layers(model).items():
        # This is the learnt p, also while its argmax is fixed; where nothing is learnt, it is the assignment itself.
        learnt = layer.estimator != "none" or not layer.assigned
        p = layer.log_p().detach().exp() if learnt else layer.probabilities()
        allocation["p"][name].append(p.mean(0).tolist())
        allocation["entropy"][name].append(entropy(layer).mean().item() if learnt else 0.0)
    scalars = {name: row[name] for name in CURVES[1:]} | row["scores"]
    scalars |= {f"nll/{task}": value for task, value in nll.items()}
    board = {name: value for name, value in scalars.items() if value is not None}
    for name, rows in allocation["p"].items():
        board |= {f"allocation/{name}/{group}": p for group, p in zip(history["groups"], rows[-1], strict=True)}
    return {name: value for name, value in board.items() if not math.isnan(value)}


def _known(value: float | None) -> float | None:
    """The value, or None if it isn't finite: JSON can't hold such a value, and a curve has a gap there."""
    return value if value is None or math.isfinite(value) else None
