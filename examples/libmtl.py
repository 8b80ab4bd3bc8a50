"""SFG layers in LibMTL, which splits a network into an encoder and decoders. The encoder gives each task its features.

python examples/libmtl.py [STEPS]

LibMTL's architectures call the encoder once, and decoder t with item t of the list that the encoder returns. So
`Encoder` below is an `encoder_class` for LibMTL's Trainer, with `architecture=HPS` and any weighting:

    Trainer(task_dict, weighting=.., architecture=HPS, encoder_class=Encoder, decoders=decoders(), rep_grad=False, ..)

`optim_param` should have no weight_decay, which would decay the logits. `train` does what LibMTL's Trainer does with
equal weights.
"""

import sys

import torch
from torch import nn

from sfg_fast import SFGConv2d, parameter_groups, recalibrate

TASKS = ("blur", "edges")


class Encoder(nn.Module):
    """Two SFG layers. They return a list of tensors [N, 12, H, W], one for each task."""

    def __init__(self) -> None:
        super().__init__()
        options = {"tasks": TASKS, "padding": 1, "norm": "batch", "activation": "relu"}
        self.layers = nn.Sequential(SFGConv2d(1, 12, 3, **options), SFGConv2d(12, 12, 3, **options))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.layers(x)
        return [features.merged(task) for task in TASKS]


def decoders() -> nn.ModuleDict:
    """The decoder of each task, [N, 12, H, W] -> [N, 1, H, W]."""
    return nn.ModuleDict({task: nn.Conv2d(12, 1, 1) for task in TASKS})


class Model(nn.Module):
    """A network like LibMTL's architecture HPS: decoder t reads item t."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoders = Encoder(), decoders()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {task: self.decoders[task](features) for task, features in zip(TASKS, self.encoder(x), strict=True)}


def batch(size: int = 8) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Noise images [N, 1, 24, 24]; the tasks are to blur them and to find their edges."""
    x = torch.randn(size, 1, 24, 24)
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    return x, {"blur": blurred, "edges": x - blurred}


def train(steps: int = 300) -> float:
    """Train the model. Returns the larger of the tasks' errors on new images, as a share of the targets' variance."""
    torch.manual_seed(0)
    model = Model()
    optimiser = torch.optim.AdamW(parameter_groups(model, 1e-4, lr=3e-3, logits_factor=10))
    for _ in range(steps):
        x, targets = batch()
        losses = {task: nn.functional.mse_loss(y, targets[task]) for task, y in model(x).items()}
        optimiser.zero_grad()
        sum(losses.values()).backward()
        optimiser.step()
    recalibrate(model, [batch()[0] for _ in range(8)])
    x, targets = batch(32)
    outputs = model.eval()(x)
    errors = {task: (nn.functional.mse_loss(outputs[task], y) / y.var()).item() for task, y in targets.items()}
    print({task: f"{error:.4f}" for task, error in errors.items()})
    return max(errors.values())


if __name__ == "__main__":
    train(*map(int, sys.argv[1:]))
