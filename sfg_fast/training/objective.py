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
    """log p(y | x) of a CT: normal around the prediction. Its SD: `fixed` at one unit; `learned`, one number for all
    voxels, which weighs the task against others by its noise (Kendall, Gal, Cipolla 2018, eq. 7); `heteroscedastic`,
    predicted for every voxel (Kendall, Gal 2017, eq. 8).

    The network's output is in units of `scale` HU; heteroscedastic, a second channel is the log of the SD.
    """

    def __init__(self, scale: float, noise: str) -> None:
        super().__init__()
        self.scale, self.noise = scale, noise
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=noise == "learned")  # in units

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output [M, 1 or 2, H, W] in units, target [M, 1, H, W] in HU -> mean log-likelihood per voxel of each image,
        [M].
        """
        mean = output
        log_sigma: Tensor = self.log_sigma
        if self.noise == "heteroscedastic":
            mean, log_sigma = output[:, :1], output[:, 1:]
        error = (mean - target / self.scale) * torch.exp(-log_sigma)
        return -(0.5 * error.square() + log_sigma + 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))


class CategoricalLikelihood(nn.Module):
    """log p(y | x) of a label map; `learned`: weighed against other tasks by its noise s, log p / s^2 - log s (Kendall,
    Gal, Cipolla 2018, eq. 10)."""

    def __init__(self, noise: str) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=noise == "learned")

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """output (logits) [M, classes, H, W], target int64 [M, H, W] -> mean log-likelihood per voxel, [M]."""
        log_p = -F.cross_entropy(output, target, reduction="none").mean((1, 2))
        return log_p * torch.exp(-2 * self.log_sigma) - self.log_sigma


class Objective(nn.Module):
    """Eq. 2 for the tasks `ct` and `organs`, each with its likelihood."""

    def __init__(self, tasks: tuple[str, ...], config: ObjectiveConfig) -> None:
        super().__init__()
        kinds: dict[str, nn.Module] = {
            "ct": GaussianLikelihood(config.ct_scale_hu, config.ct_noise),
            "organs": CategoricalLikelihood(config.organs_noise),
        }
        self.likelihoods = nn.ModuleDict({task: kinds[task] for task in tasks})
        self.lambda1, self.lambda2 = config.lambda1, config.lambda2

    def forward(
        self,
        model: nn.Module,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        total: int,
        present: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(L of eq. 2, {task: mean negative log-likelihood}).

        outputs, targets: {task: tensor}; total: N, the number of training examples. present: {task: bool [M]}, which
        examples have a target: a missing one has no likelihood, in this batch as in the sum over all N, so what is left
        stays an unbiased estimate of it. (The mean of a task that none has is NaN.)
        """
        if present is not None:  # whatever stands in for a missing target, it is a number
            targets = {task: _where(present[task], target) for task, target in targets.items()}
        nll = {task: -self.likelihoods[task](outputs[task], targets[task]) for task in self.likelihoods}
        examples = next(iter(nll.values())).numel()
        if present is not None:
            nll = {task: _where(present[task], values) for task, values in nll.items()}
        counts = {task: examples if present is None else present[task].sum() for task in nll}
        norms, entropies = penalties(model)
        data = total / examples * torch.stack([values.sum() for values in nll.values()]).sum()
        value = data + self.lambda1 * norms - self.lambda2 * entropies
        return value, {task: values.detach().sum() / counts[task] for task, values in nll.items()}


def _where(present: Tensor, values: Tensor) -> Tensor:
    """values [M, ...], zero where `present` [M] is not."""
    return values.where(present.view(-1, *[1] * (values.dim() - 1)), 0)
