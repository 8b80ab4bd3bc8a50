"""The objective, eq. 1 and 2 of the paper.

    L = -(N/M) sum_i sum_t log p(y_i^t | x_i, W) + lambda1 sum ||w||^2 - lambda2 sum H(p)

The likelihood p(y^t | x, W) of each task t is described with its kind, in `sfg_fast.tasks`. That of an image is taken
per voxel (the mean over its voxels), so that lambda1 and lambda2 mean the same at every image size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..networks.controls import penalties
from ..tasks import Task
from .config import ObjectiveConfig


class Objective(nn.Module):
    """Eq. 2 for tasks, each with its likelihood."""

    def __init__(self, tasks: Mapping[str, Task], config: ObjectiveConfig) -> None:
        super().__init__()
        self.likelihoods = nn.ModuleDict({name: task.likelihood() for name, task in tasks.items()})
        self.lambda1, self.lambda2 = config.lambda1, config.lambda2

    def forward(
        self,
        model: nn.Module,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        total: int,
        present: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(L of eq. 2, {task: mean negative log-likelihood}).

        outputs, targets: {task: tensor}; total: N, the number of training examples. present: {task: bool [M]}, which
        examples have a target: a missing one has no likelihood, in this batch as in the sum over all N, so what is left
        stays an unbiased estimate of it. (The mean of a task that none has is NaN.)
        """
        nll: dict[str, Tensor] = {}
        for task, likelihood in self.likelihoods.items():
            there = present[task]
            target = _where(there, targets[task])  # whatever stands in for a missing target, it is a number
            nll[task] = _where(there, -likelihood(outputs[task], target, there))
        examples = next(iter(nll.values())).numel()
        norms, entropies = penalties(model)
        data = total / examples * torch.stack([values.sum() for values in nll.values()]).sum()
        value = data + self.lambda1 * norms - self.lambda2 * entropies
        return value, {task: values.detach().sum() / present[task].sum() for task, values in nll.items()}


def _where(present: Tensor, values: Tensor) -> Tensor:
    """values [M, ...], zero where `present` [M] is not."""
    return values.where(present.view(-1, *[1] * (values.dim() - 1)), 0)
