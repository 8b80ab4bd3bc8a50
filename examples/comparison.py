"""Compares hard sharing, cross-stitch units (Misra et al., 2016) and SFG.

python examples/comparison.py [STEPS]
"""

import sys

import torch
from torch import Tensor, nn

from sfg_fast import assign, convert, parameter_groups, set_temperature
from sfg_fast.networks.controls import map_assignment

TASKS = ("blur", "edges")


def backbone() -> nn.Sequential:
    """A plain network of three convolutions, [N, 1, H, W] -> [N, 1, H, W]."""
    first = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 1, 1))


class HardSharing(nn.Module):
    """All layers are shared; each task has a head."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = backbone()[:-1]
        self.heads = nn.ModuleDict({task: nn.Conv2d(12, 1, 1) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: head(self.shared(x)) for task, head in self.heads.items()}


class CrossStitch(nn.Module):
    """Each task has a network. After every stage each network reads a learnt mixture of the features of all
    networks."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(backbone() for _ in TASKS)
        self.mix = nn.ParameterList(torch.full((2, 2), 0.1) + 0.8 * torch.eye(2) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.stack([x, x])
        for stage, mix in zip(range(0, 6, 3), self.mix, strict=True):
            h = torch.stack([net[stage : stage + 3](part) for net, part in zip(self.networks, h, strict=True)])
            h = torch.einsum("st,tnchw->snchw", mix, h)
        return {task: net[-1](part) for task, net, part in zip(TASKS, self.networks, h, strict=True)}


def batch(size: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise images [N, 1, 24, 24]; the tasks are to blur them and to find their edges."""
    x = torch.randn(size, 1, 24, 24)
    return x, {"blur": nn.functional.avg_pool2d(x, 3, 1, 1), "edges": x - nn.functional.avg_pool2d(x, 3, 1, 1)}


def sfg() -> nn.Module:
    """The backbone with SFG layers; at the start its kernels are mostly shared."""
    return convert(backbone(), TASKS, init=(0.9, 0.05, 0.05))


def train(network: nn.Module, steps: int) -> float:
    """Train a network. Returns its error on new images: the sum over tasks of the share of the targets' variance."""
    optimiser = torch.optim.Adam(parameter_groups(network, lr=3e-3, logits_factor=10))
    for step in range(steps):
        set_temperature(network, max(0.1, 1 - step / steps))
        if step == int(0.6 * steps):  # from here on only the weights of this architecture are trained
            assign(network, map_assignment(network))
        x, targets = batch()
        sum(nn.functional.mse_loss(y, targets[task]) for task, y in network(x).items()).backward()
        optimiser.step()
        optimiser.zero_grad()
    x, targets = batch(32)
    return sum(
        nn.functional.mse_loss(y, targets[t]).item() / targets[t].var().item() for t, y in network.eval()(x).items()
    )


def main(steps: int = 1000) -> dict[str, float]:
    """Train and print the three methods. Returns their errors."""
    errors = {}
    for name, make in {"hard sharing": HardSharing, "cross-stitch": CrossStitch, "SFG": sfg}.items():
        torch.manual_seed(0)
        errors[name] = train(make(), steps)
        print(f"{name:12s} error {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
