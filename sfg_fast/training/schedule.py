"""The schedule sets what changes with the step: learning rates, temperature, and whether groupings are still drawn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..draws import temperature_at
from ..networks.controls import assign, map_assignment, parameter_groups, set_temperature, sfg_layers
from .config import ScheduleConfig


def learning_rate_at(schedule: ScheduleConfig, step: int) -> float:
    """The learning rate of the weights: it warms up linearly, stays constant, then falls as `schedule.decay` says."""
    share = step / schedule.steps
    rate = schedule.learning_rate * min(1.0, (step + 1) / max(schedule.warmup, 1))
    if share > schedule.decay_from:
        t = (share - schedule.decay_from) / (1 - schedule.decay_from)
        if schedule.decay == "cosine":
            rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * t))
        elif schedule.decay == "polynomial":
            rate *= (1 - t) ** 0.9
    return rate


def temperature_of(schedule: ScheduleConfig, step: int) -> float:
    """The temperature of the relaxation in this step."""
    start, end, until = schedule.temperature_start, schedule.temperature_end, schedule.temperature_until
    return temperature_at(step / schedule.steps, start, end, until)


def build_optimiser(
    schedule: ScheduleConfig, model: nn.Module, objective: nn.Module, waits: bool = True
) -> torch.optim.Optimizer:
    """Adam for network and objective. The logits, the last group, have a learning rate of their own
    (`apply_schedule`).

    waits: see `step.Step`. For a step that does not wait Adam is torch's fused one, which can leave out a step on the
    device, and can be captured in a CUDA graph; learning rates are then tensors on the device.
    """
    groups = parameter_groups(nn.ModuleList([model, objective]))
    if waits:
        return torch.optim.Adam(groups, lr=schedule.learning_rate)
    optimiser = torch.optim.Adam(groups, lr=schedule.learning_rate, fused=True, capturable=True)
    for group in optimiser.param_groups:
        group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=group["params"][0].device)
    return optimiser


# What Adam notes in its groups of how it computes. A checkpoint holds what a plain Adam has there.
_HOW: dict[str, Any] = {"foreach": None, "capturable": False, "fused": None}


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an Adam of `build_optimiser`, which is the same on every device: learning rates are numbers."""
    state = optimiser.state_dict()
    groups = [group | _HOW | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimiser_state` gave. How the optimiser computes stays as it is, and so do tensors of learning rates,
    which CUDA graphs read; `apply_schedule` sets them before a step."""
    own = [{name: group[name] for name in ("lr", *_HOW)} for group in optimiser.param_groups]
    groups = [group | mine for group, mine in zip(state["param_groups"], own, strict=True)]
    optimiser.load_state_dict(state | {"param_groups": groups})
    for group, mine in zip(optimiser.param_groups, own, strict=True):
        group["lr"] = mine["lr"]  # the tensor itself, not a copy
    for parameter, moments in optimiser.state.items():
        for name, value in moments.items():
            if (
                value.shape == parameter.shape
            ):  # its layout has to be the parameter's, whatever it was where it was saved
                moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def apply_schedule(schedule: ScheduleConfig, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Set the learning rates and the temperature for this step. From `draw_until` on also fix the assignment argmax
    p."""
    share = step / schedule.steps
    drawing = share < schedule.draw_until
    layers = sfg_layers(model).values()
    if not drawing and not all(layer.assigned or layer.estimator == "none" for layer in layers):
        assign(model, map_assignment(model))
    set_temperature(model, temperature_of(schedule, step))
    rate = learning_rate_at(schedule, step)
    warm = min(1.0, (step + 1) / max(schedule.warmup, 1))
    for group in optimiser.param_groups:
        logits_rate = schedule.learning_rate * schedule.logits_factor * warm if drawing else 0.0
        chosen = rate if group["name"] == "weights" else logits_rate
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(chosen)
        else:
            group["lr"] = chosen
