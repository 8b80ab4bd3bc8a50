"""Hard sharing, cross-stitch units (Misra et al., 2016) and SFG compared: python examples/comparison.py [STEPS]"""

import sys

import torch
from torch import Tensor, nn

from sfg_fast import assign, convert, set_temperature
from sfg_fast.networks.controls import map_assignment, sfg_layers

TASKS = ("blur", "edges")


def backbone() -> nn.Sequential:
    first = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 1, 1))


class HardSharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = backbone()[:-1]
        self.heads = nn.ModuleDict({task: nn.Conv2d(12, 1, 1) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: head(self.shared(x)) for task, head in self.heads.items()}


class CrossStitch(nn.Module):  # a network for each task; after every stage each reads a learnt mixture of all
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
    x = torch.randn(size, 1, 24, 24)
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    return x, {"blur": blurred, "edges": x - blurred}


def train(network: nn.Module, steps: int) -> float:  # the error, as a share of the targets' variance
    logits = {id(layer.logits) for layer in sfg_layers(network).values()}
    groups = [{"params": [p], "lr": 3e-2 if id(p) in logits else 3e-3} for p in network.parameters()]
    optimiser = torch.optim.Adam(groups)
    for step in range(steps):
        set_temperature(network, max(0.1, 1 - step / steps))
        if step == int(0.6 * steps):  # the rest is for the weights of the most probable architecture
            assign(network, map_assignment(network))
        x, targets = batch()
        outputs = network(x)
        loss = sum(nn.functional.mse_loss(outputs[task], targets[task]) for task in TASKS)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    x, targets = batch(32)
    outputs = network.eval()(x)
    return sum(nn.functional.mse_loss(outputs[t], targets[t]).item() / targets[t].var().item() for t in TASKS)


def main(steps: int = 300) -> dict[str, float]:
    makers = {"hard sharing": HardSharing, "cross-stitch": CrossStitch, "SFG": lambda: convert(backbone(), TASKS)}
    errors = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        errors[name] = train(make(), steps)
        print(f"{name:12s} error {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
