"""What a run tells about its course: curves, and p of every layer (RUN/history.json, the figures of the report)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from ..errors import InputError
from ..files import read_json
from ..networks.controls import entropy, sfg_layers

CURVES = ("step", "objective", "psnr", "dice", "temperature", "learning_rate")
VALIDATION = ("step", "nll", "psnr", "dice")


class Curves(TypedDict):
    """A value for each recorded step."""

    step: list[int]
    objective: list[float]
    psnr: list[float | None]
    dice: list[float | None]
    temperature: list[float | None]
    learning_rate: list[float]
    nll: dict[str, list[float | None]]


class Allocation(TypedDict):
    """For each layer and each recorded step the mean p of each group, and the mean entropy."""

    step: list[int]
    p: dict[str, list[list[float]]]
    entropy: dict[str, list[float]]


class History(TypedDict):
    """What the figures of history.json are drawn from."""

    groups: list[str]
    curves: Curves
    allocation: Allocation


def read_history(path: Path) -> dict[str, Any]:
    """history.json of a run, to draw. InputError if it can't be, or is none."""
    history = read_json(path, History)
    curves, allocation, groups = history["curves"], history["allocation"], len(history["groups"])
    steps = len(curves["step"])
    lists = {f"curves.{name}": curves[name] for name in CURVES} | {"allocation.step": allocation["step"]}
    for place, named in (
        ("curves.nll", curves["nll"]),
        *((f"allocation.{n}", allocation[n]) for n in ("p", "entropy")),
    ):
        lists |= {f"{place}.{name}": values for name, values in named.items()}
    for place, values in lists.items():
        if len(values) != steps or not steps:
            raise InputError(
                f"{path}: {place} has {len(values)} values, expected one for each of {steps or 'the'} steps"
            )
    if allocation["p"].keys() != allocation["entropy"].keys():
        raise InputError(f"{path}: allocation.p and allocation.entropy are of different layers, expected the same")
    for name, rows in allocation["p"].items():
        if wrong := [row for row in rows if len(row) != groups]:
            raise InputError(
                f"{path}: allocation.p.{name} has {len(wrong[0])} shares, expected one for each of {groups}"
            )
    return history


def empty_history(model: nn.Module, tasks: list[str]) -> dict[str, Any]:
    """Lists to append to. `validation`: at every checkpoint, nll summed over tasks; `bad_steps`: what was left out."""
    names = list(sfg_layers(model))
    return {
        "groups": ["shared", *tasks],
        "curves": {**{name: [] for name in CURVES}, "nll": {task: [] for task in tasks}},
        "allocation": {"step": [], "p": {name: [] for name in names}, "entropy": {name: [] for name in names}},
        "validation": {name: [] for name in VALIDATION},
        "bad_steps": [],
    }


def record(history: dict[str, Any], model: nn.Module, row: dict[str, Any], nll: dict[str, float]) -> dict[str, float]:
    """Append a row of the curves and p of every layer. Returns what a tensorboard shows of it, by name."""
    curves, allocation = history["curves"], history["allocation"]
    for name in CURVES:
        curves[name].append(row[name])
    for task, value in nll.items():  # NaN, if no example of the batch has a target
        curves["nll"][task].append(None if math.isnan(value) else value)
    allocation["step"].append(row["step"])
    for name, layer in sfg_layers(model).items():
        # The learnt p, also while its argmax is fixed; the assignment itself where nothing is learnt.
        learnt = layer.estimator != "none" or not layer.assigned
        p = layer.log_p().detach().exp() if learnt else layer.probabilities()
        allocation["p"][name].append(p.mean(0).tolist())
        allocation["entropy"][name].append(entropy(layer).mean().item() if learnt else 0.0)
    scalars = {**row, **{f"nll/{task}": value for task, value in nll.items()}}
    shown = {name: value for name, value in scalars.items() if name != "step" and value is not None}
    for name, rows in allocation["p"].items():
        shown |= {f"allocation/{name}/{group}": p for group, p in zip(history["groups"], rows[-1], strict=True)}
    return {name: value for name, value in shown.items() if not math.isnan(value)}
