"""The cost of a network: its weights, and the operations of a prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .controls import draws_from_constant_p, evaluating, sfg_layers

DRAWS = 8
"""For a constant p the cost is the mean over so many draws."""


def parameters(model: nn.Module) -> int:
    """How many weights are trained: the numbers in parameters that require a gradient. The logits of the groupings
    don't count: they choose kernels, but no output is computed with them (see `logits`)."""
    chosen = _logits(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in chosen)


def logits(model: nn.Module) -> int:
    """How many logits of groupings are trained."""
    chosen = _logits(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) in chosen)


def _logits(model: nn.Module) -> set[int]:
    return {id(layer.logits) for layer in sfg_layers(model).values()}


@torch.no_grad()
def flops(model: nn.Module, example: Tensor) -> float:
    """How many floating point operations the prediction of one image takes; a multiplication with an addition counts
    two.

    The network predicts by argmax p or its fixed assignment. For a constant p the number is the mean over draws, which
    are the same in every call. Convolutions and matrix products count, as the current backend computes them: they are
    nearly all of the work. Normalisations, activations, poolings and cross-stitch units don't count.

    `example` is [N, C, H, W] or [N, C, D, H, W] on the model's device; the operations of the pass are divided by N.
    """
    draws = DRAWS if draws_from_constant_p(model) else 1
    devices = [] if example.device.type == "cpu" else [example.device]
    with evaluating(model), torch.random.fork_rng(devices), FlopCounterMode(display=False) as counter:
        torch.manual_seed(0)
        for _ in range(draws):
            model(example)
    return counter.get_total_flops() / draws / len(example)
