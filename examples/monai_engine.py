"""Converts a MONAI network and trains it in MONAI's engine, with dict batches, sliding windows and metrics.

python examples/monai_engine.py [EPOCHS]
"""

import sys

import torch
from monai.engines import SupervisedTrainer
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric, MAEMetric
from monai.networks.nets import BasicUNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sfg_fast import convert, parameter_groups, recalibrate


def case(seed: int) -> dict[str, Tensor]:
    """A case [1, 48, 48] of a disc of random place and size. The MR is the disc with noise, the CT is 1 minus the disc,
    and the label is the disc."""
    generator = torch.Generator().manual_seed(seed)
    centre, radius = 16 + 16 * torch.rand(2, 1, 1, generator=generator), 6 + 6 * torch.rand(1, generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij"))
    disc = ((grid - centre).square().sum(0) < radius**2).float()[None]
    return {"mr": disc + 0.3 * torch.randn(1, 48, 48, generator=generator), "ct": 1 - disc, "organs": disc}


class Loss(nn.Module):
    """The sum of the losses of both tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceCELoss(to_onehot_y=True, softmax=True)

    def forward(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(outputs["ct"], targets["ct"]) + self.dice(outputs["organs"], targets["organs"])


def prepare(batch: dict[str, Tensor], device: torch.device, non_blocking: bool, **_: object) -> tuple[Tensor, dict]:
    """The images of a batch, and its targets by task, as MONAI's engine wants them."""
    return batch["mr"].to(device), {task: batch[task].to(device) for task in ("ct", "organs")}


def main(epochs: int = 10) -> dict[str, float]:
    """Train and test. Returns the Dice of the labels and the mean absolute error of the CT on test cases."""
    torch.manual_seed(0)
    plain = BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 16, 8), norm=("batch", {}), upsample="nontrainable")
    network = convert(plain, {"ct": 1, "organs": 2}, init=[0.9, 0.05, 0.05])  # p at the start: mostly shared
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader([case(seed) for seed in range(32)], batch_size=8, shuffle=True),
        network=network,
        optimizer=torch.optim.Adam(parameter_groups(network), 1e-2),
        loss_function=Loss(),
        prepare_batch=prepare,
    )
    trainer.run()
    test = [case(seed) for seed in range(100, 108)]
    recalibrate(network, [torch.stack([one["mr"] for one in test])])
    dice, error = DiceMetric(include_background=False), MAEMetric()
    with torch.no_grad():
        for one in test:
            outputs = sliding_window_inference(one["mr"][None], (32, 32), 4, network.eval(), overlap=0.5)
            labels = nn.functional.one_hot(outputs["organs"].argmax(1), 2).movedim(-1, 1)
            dice(labels, nn.functional.one_hot(one["organs"].long(), 2).movedim(-1, 1))
            error(outputs["ct"], one["ct"][None])
    found = {"dice": dice.aggregate().item(), "mae": error.aggregate().item()}
    print(found)
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
