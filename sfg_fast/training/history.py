"""What a run tells about its course: curves, and p of every layer (RUN/history.json, the figures of the report)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..networks.controls import entropy, sfg_layers

CURVES = ("step", "objective", "psnr", "dice", "temperature", "learning_rate")
VALIDATION = ("step", "nll", "psnr", "dice")


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


def record(history: dict[str, Any], model: nn.Module, row: dict[str, Any], nll: dict[str, float], board: Any) -> None:
    """Append a row of the curves and p of every layer, and show them on the tensorboard."""
    curves, allocation, step = history["curves"], history["allocation"], row["step"]
    for name in CURVES:
        curves[name].append(row[name])
    for task, value in nll.items():  # NaN, if no example of the batch has a target
        curves["nll"][task].append(None if math.isnan(value) else value)
    allocation["step"].append(step)
    for name, layer in sfg_layers(model).items():
        # The learnt p, also while its argmax is fixed; the assignment itself where nothing is learnt.
        learnt = layer.estimator != "none" or not layer.assigned
        p = layer.log_p().detach().exp() if learnt else layer.probabilities()
        allocation["p"][name].append(p.mean(0).tolist())
        allocation["entropy"][name].append(entropy(layer).mean().item() if learnt else 0.0)
    for name, value in {**row, **{f"nll/{task}": value for task, value in nll.items()}}.items():
        if name != "step" and value is not None and not math.isnan(value):
            board.add_scalar(name, value, step)
    for name in allocation["p"]:
        for group, share in zip(history["groups"], allocation["p"][name][-1], strict=True):
            board.add_scalar(f"allocation/{name}/{group}", share, step)
