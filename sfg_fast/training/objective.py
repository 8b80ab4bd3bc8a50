"""The objective, eq. 1 and 2 of the paper.

    L = -(N/M) sum_i sum_t log p(y_i^t | x_i, W) + lambda1 sum ||w||^2 - lambda2 sum H(p)

Each kind of task defines its likelihood p(y^t | x, W), in `sfg_fast.tasks`. The log-likelihood of an image is the mean
over its voxels, so that lambda1 and lambda2 mean the same at every image size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..networks.controls import penalties
from ..tasks import Task
from .config import ObjectiveConfig


class Objective(nn.Module):
    """L of eq. 2. `likelihoods` has the module that computes the likelihood of each task (`Task.likelihood`)."""

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
        """Returns L of eq. 2, and the mean negative log-likelihood of each task over the examples that have its target
        (NaN if none has).

        Args:
            model: the network, for the penalties on its kernels and on p.
            outputs: the network's output for each task, [M, outputs, ..].
            targets: the target of each task, [M, ..].
            total: N, the number of training examples.
            present: which examples have the target of each task, bool [M]. An example without the target adds nothing,
                neither to the sum over the batch nor to that over all N; so the former stays an unbiased estimate.
        """
        nll: dict[str, Tensor] = {}
        for task, likelihood in self.likelihoods.items():
            there = present[task]
            target = _where(there, targets[task])  # a missing target becomes 0, which is finite
            nll[task] = _where(there, -likelihood(outputs[task], target, there))
        examples = next(iter(nll.values())).numel()
        norms, entropies = penalties(model)
        data = total / examples * torch.stack([values.sum() for values in nll.values()]).sum()
        value = data + self.lambda1 * norms - self.lambda2 * entropies
        return value, {task: values.detach().sum() / present[task].sum() for task, values in nll.items()}


def _where(present: Tensor, values: Tensor) -> Tensor:
    """The values [M, ...]; those of examples that are not `present` [M] are zero."""
    return values.where(present.view(-1, *[1] * (values.dim() - 1)), 0)
