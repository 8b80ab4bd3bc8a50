"""What changes with the step: learning rates, temperature, and whether groupings are still drawn."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..gates import temperature_at
from ..networks.controls import assign, map_assignment, parameter_groups, set_temperature, sfg_layers
from .config import ScheduleConfig


def learning_rate_at(schedule: ScheduleConfig, step: int) -> float:
    """Weights' rate: linear warm-up, constant, then the decay that was chosen."""
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
    """Adam; the logits, the second group, have a rate of their own, and nothing decays them."""
    return torch.optim.Adam(parameter_groups(nn.ModuleList([model, objective])), lr=schedule.learning_rate)


def apply_schedule(schedule: ScheduleConfig, step: int, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Set everything as it should be at this step; from `draw_until` on argmax p is the fixed assignment."""
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
