"""The schedule sets what changes with the step: learning rates, temperature, and whether groupings are still drawn."""

from __future__ import annotations

import math

import torch
from torch import nn

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


def build_optimiser(schedule: ScheduleConfig, model: nn.Module, objective: nn.Module) -> torch.optim.Optimizer:
    """Adam for network and objective. The logits, the last group, have a learning rate of their own
    (`apply_schedule`)."""
    return torch.optim.Adam(parameter_groups(nn.ModuleList([model, objective])), lr=schedule.learning_rate)


def apply_schedule(schedule: ScheduleConfig, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Set the learning rates and the temperature for this step. From `draw_until` on also fix the assignment argmax
    p."""
    share = step / schedule.steps
    drawing = share < schedule.draw_until
    layers = sfg_layers(model).values()
    if not drawing and not all(layer.assigned or layer.estimator == "none" for layer in layers):
        assign(model, map_assignment(model))
    set_temperature(
        model, temperature_at(share, schedule.temperature_start, schedule.temperature_end, schedule.temperature_until)
    )
    rate = learning_rate_at(schedule, step)
    warm = min(1.0, (step + 1) / max(schedule.warmup, 1))
    for group in optimiser.param_groups:
        logits_rate = schedule.learning_rate * schedule.logits_factor * warm if drawing else 0.0
        group["lr"] = rate if group["name"] == "weights" else logits_rate
