"""The objective, eq. 1 and 2 of the paper.

    L = -(N/M) sum_i [log p(y_i^ct | x_i, W) + log p(y_i^organs | x_i, W)] + lambda1 sum ||w||^2 - lambda2 sum H(p)

The log-likelihood of an image is taken per voxel (the mean over its voxels), so that lambda1 and lambda2 mean the
same at every image size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks.controls import penalties
from .config import ObjectiveConfig


class GaussianLikelihood(nn.Module):
    """log p(y | x) of a CT: normal around the prediction, the noise SD fixed at one unit or learned.

    The network's output is in units of `scale` HU.
    """

    def __init__(self, scale: float, learned: bool) -> None:
        super().__init__()
        self.scale = scale
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=learned)  # in units

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output [M, 1, H, W] in units, target [M, 1, H, W] in HU -> mean log-likelihood per voxel of each image,
        [M].
        """
        error = (output - target / self.scale) * torch.exp(-self.log_sigma)
        return -(0.5 * error.square() + self.log_sigma + 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))


class CategoricalLikelihood(nn.Module):
    """log p(y | x) of a label map."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output (logits) [M, classes, H, W], target int64 [M, H, W] -> mean log-likelihood per voxel, [M]."""
        return -F.cross_entropy(output, target, reduction="none").mean((1, 2))


class Objective(nn.Module):
    """Eq. 2 for the tasks `ct` and `organs`, each with its likelihood."""

    def __init__(self, tasks: tuple[str, ...], config: ObjectiveConfig) -> None:
        super().__init__()
        kinds: dict[str, nn.Module] = {
            "ct": GaussianLikelihood(config.ct_scale_hu, config.ct_noise == "learned"),
            "organs": CategoricalLikelihood(),
        }
        self.likelihoods = nn.ModuleDict({task: kinds[task] for task in tasks})
        self.lambda1, self.lambda2 = config.lambda1, config.lambda2

    def forward(
        self, model: nn.Module, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], total: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(L of eq. 2, {task: mean negative log-likelihood}).

        outputs, targets: {task: tensor}; total: N, the number of training examples.
        """
        nll = {task: -self.likelihoods[task](outputs[task], targets[task]) for task in self.likelihoods}
        examples = next(iter(nll.values())).numel()
        norms, entropies = penalties(model)
        data = total / examples * torch.stack([values.sum() for values in nll.values()]).sum()
        value = data + self.lambda1 * norms - self.lambda2 * entropies
        return value, {task: values.detach().mean() for task, values in nll.items()}
