"""Trains two tasks in plain PyTorch, which learn the kernels that they share, then prints p.

python examples/multitask.py [STEPS]
"""

import sys

import torch
from torch import nn

from sfg_fast import SFGConv2d, parameter_groups, penalties, predict, recalibrate, set_temperature
from sfg_fast.layers.streams import Heads


def batch(size: int = 8) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Noise images [N, 1, 24, 24]; the tasks are to blur them and to find their edges."""
    x = torch.randn(size, 1, 24, 24)
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    return x, {"blur": blurred, "edges": x - blurred}


def main(steps: int = 300) -> float:
    """Train, and print p of each layer and the errors. Returns the error on new images, as a share of the variance."""
    torch.manual_seed(0)
    options = {"tasks": ["blur", "edges"], "padding": 1, "norm": "batch", "activation": "relu"}
    network = nn.Sequential(SFGConv2d(1, 12, 3, **options), SFGConv2d(12, 12, 3, **options))
    network.append(Heads(12, {"blur": 1, "edges": 1}))
    optimiser = torch.optim.AdamW(parameter_groups(network, weight_decay=1e-4, lr=3e-3, logits_factor=10))
    for step in range(steps):
        set_temperature(network, max(0.1, 1 - step / steps))
        x, targets = batch()
        outputs = network(x)  # the forward pass draws a grouping
        loss = sum(nn.functional.mse_loss(outputs[task], target) for task, target in targets.items())
        loss = loss - 1e-4 * penalties(network)[1]  # the entropy (eq. 2) keeps p open to every group
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    recalibrate(network, [batch()[0] for _ in range(8)])
    x, targets = batch(32)
    outputs = predict(network, x)  # by the most probable architecture
    for layer in (network[0], network[1]):
        print({group: f"{p:.2f}" for group, p in zip(layer.group_names, layer.probabilities().mean(0), strict=True)})
    errors = {task: nn.functional.mse_loss(outputs[task].mean, target).item() for task, target in targets.items()}
    print({task: f"{error:.4f} of {targets[task].var():.4f}" for task, error in errors.items()})
    return sum(errors.values()) / sum(target.var().item() for target in targets.values())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
