"""SFG layers in LibMTL, with its Trainer, its architecture HPS and its weightings of the tasks' losses.

pip install LibMTL==1.1.5 scipy
python examples/libmtl.py [--weighting NAME] [any other option of LibMTL]

LibMTL splits a network into an encoder that the tasks share and a decoder for each task. It calls the encoder once, and
decoder t with item t of the list that the encoder returns. `Encoder` makes such an encoder of any network that returns
features of SFG layers. LibMTL's weight_decay is 0 here, because it would decay the logits, too.
"""

import sys

import torch
from torch import nn

from sfg_fast import SFGConv2d, recalibrate

# LibMTL 1.1.5 takes load_state_dict_from_url from a module that torchvision no longer has.
sys.modules.setdefault("torchvision.models.utils", torch.hub)
try:
    import LibMTL
except ImportError as error:
    sys.exit(f"This example needs LibMTL and what LibMTL needs ({error}): pip install LibMTL==1.1.5 scipy")

TASKS = ("direction", "spacing", "contrast")


class Encoder(nn.Module):
    """A network of SFG layers as an encoder of LibMTL: images -> a list of tensors [N, K, H, W], one for each task."""

    def __init__(self, network: nn.Module, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.tasks = network, tasks

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.network(x)
        return [features.merged(task) for task in self.tasks]

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set the gradients to zero. LibMTL 1.1.5 writes into them afterwards, so they have to be tensors."""
        super().zero_grad(set_to_none)


class Trainer(LibMTL.Trainer):
    """LibMTL's Trainer. That of LibMTL 1.1.5 sets its device to a GPU even where there is none."""

    device = property(lambda _: torch.device("cuda:0" if torch.cuda.is_available() else "cpu"), lambda *_: None)


class Batches:
    """An endless loader of images of stripes [16, 1, 24, 24], and of the class 0 or 1 that each task is to find."""

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        labels = {task: torch.randint(2, (16,)) for task in TASKS}
        direction, spacing, contrast = (label.view(-1, 1, 1, 1) for label in labels.values())
        place = torch.where(direction == 0, torch.arange(24.0), torch.arange(24.0)[:, None])
        x = (0.5 + contrast) * torch.sin((0.6 + 0.6 * spacing) * place + 6 * torch.rand(16, 1, 1, 1))
        return x + 0.2 * torch.randn_like(x), labels

    next = __next__  # LibMTL 1.1.5 calls it by this name


def made(arguments: list[str] | None = None) -> Trainer:
    """A Trainer as LibMTL's options say."""
    (parser := LibMTL.config.LibMTL_args).set_defaults(lr=1e-2, weight_decay=0.0)
    options = parser.parse_args(arguments)
    if (name := options.weighting) not in LibMTL.weighting.__all__:
        parser.error(f"--weighting {name}, expected one of {', '.join(LibMTL.weighting.__all__)}")
    weights, optimiser, scheduler = LibMTL.config.prepare_args(options)
    torch.manual_seed(options.seed)
    how = {"tasks": TASKS, "padding": 1, "norm": "batch", "activation": "relu"}
    network = nn.Sequential(SFGConv2d(1, 12, 3, **how), SFGConv2d(12, 12, 3, **how), nn.AdaptiveAvgPool2d(1))
    scores = {"metrics": ["Acc"], "weight": [1]}
    return Trainer(
        {t: {**scores, "metrics_fn": LibMTL.metrics.AccMetric(), "loss_fn": LibMTL.loss.CELoss()} for t in TASKS},
        getattr(LibMTL.weighting, name), LibMTL.architecture.HPS, lambda: Encoder(network, TASKS),
        nn.ModuleDict({task: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)) for task in TASKS}),
        options.rep_grad, options.multi_input, optimiser, scheduler, **weights,
    )  # fmt: skip


def main(arguments: list[str] | None = None, epochs: int = 3) -> dict[str, float]:
    """Train. Returns the accuracy of each task on new images."""
    trainer, batches = made(arguments), Batches()
    trainer.train(batches, batches, epochs)
    recalibrate(trainer.model, [next(batches)[0].to(trainer.device) for _ in range(8)])
    x, labels = next(batches)
    outputs = trainer.model.eval()(x.to(trainer.device))
    return {task: (outputs[task].argmax(1).cpu() == y).float().mean().item() for task, y in labels.items()}


if __name__ == "__main__":
    print(main())
