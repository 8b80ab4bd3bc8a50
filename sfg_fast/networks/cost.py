"""What a network costs: weights, and operations of a prediction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .controls import draws_from_constant_p, evaluating, sfg_layers

DRAWS = 8
"""How many draws the mean cost of a grouping that is drawn from a constant p is taken over."""


def parameters(model: nn.Module) -> int:
    """How many weights are trained: numbers in parameters that require a gradient. Without the logits of the groupings,
    which choose kernels and are no part of what these compute (`logits`)."""
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
    """Floating point operations (two for a multiplication with an addition) of the prediction of one image, by argmax p
    or a fixed assignment; where p is constant, the mean over draws, which are the same every time.

    `example`: [N, C, H, W] on the model's device; the number is that of the pass divided by N. Counted are the
    convolutions and matrix products that the backend in force computes, which are nearly all of it: not normalisations,
    activations, poolings and cross-stitch units.
    """
    draws = DRAWS if draws_from_constant_p(model) else 1
    devices = [] if example.device.type == "cpu" else [example.device]
    with evaluating(model), torch.random.fork_rng(devices), FlopCounterMode(display=False) as counter:
        torch.manual_seed(0)
        for _ in range(draws):
            model(example)
    return counter.get_total_flops() / draws / len(example)
