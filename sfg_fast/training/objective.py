"""The objective, eq. 1 and 2 of the paper.

    L = -(N/M) sum_i sum_t log p(y_i^t | x_i, W) + lambda1 sum ||w||^2 - lambda2 sum H(p)

Each kind of task defines its likelihood p(y^t | x, W), in `sfg_fast.tasks`. The log-likelihood of an image is the mean
over its voxels, so that lambda1 and lambda2 mean the same at every image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..networks.controls import penalties
from ..tasks import Task
from .config import ObjectiveConfig

Output: TypeAlias = Tensor | Sequence[Tensor]
"""What a network gives for a task: its output; or, with deep supervision, the output of all voxels, that of every
second voxel along each axis, of every fourth, and so on."""


def levels(output: Output) -> list[Tensor]:
    """The outputs of a task, that of all voxels first."""
    return [output] if isinstance(output, Tensor) else list(output)


class Objective(nn.Module):
    """L of eq. 2. With deep supervision the log-likelihood of a task is the mean over its outputs, weighed by 1, 1/2,
    1/4 ..; an output of every n-th voxel is compared with the target of these voxels. (nnU-Net has the same weights,
    but leaves out the coarsest output.)

    `likelihoods` has the module that computes the likelihood of each task (`Task.likelihood`)."""

    def __init__(self, tasks: Mapping[str, Task], config: ObjectiveConfig) -> None:
        super().__init__()
        self.likelihoods = nn.ModuleDict({name: task.likelihood() for name, task in tasks.items()})
        self.lambda1, self.lambda2 = config.lambda1, config.lambda2

    def forward(
        self,
        model: nn.Module,
        outputs: Mapping[str, Output],
        targets: Mapping[str, Tensor],
        total: int,
        present: Mapping[str, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns L of eq. 2, and the mean negative log-likelihood of each task over the examples that have its target
        (NaN if none has); with deep supervision that of the weighed mean.

        Args:
            model: the network, for the penalties on its kernels and on p.
            outputs: the network's output for each task, [M, outputs, ..], or a list of them.
            targets: the target of each task, [M, ..].
            total: N, the number of training examples.
            present: which examples have the target of each task, bool [M]. An example without the target adds nothing,
                neither to the sum over the batch nor to that over all N; so the former stays an unbiased estimate.
        """
        nll: dict[str, Tensor] = {}
        for task, likelihood in self.likelihoods.items():
            there = present[task]
            target = _where(there, targets[task])  # a missing target becomes 0, which is finite
            every = levels(outputs[task])
            weights = [0.5**level for level in range(len(every))]
            found = [
                weight / sum(weights) * likelihood(output, _every(target, 2**level), there)
                for level, (output, weight) in enumerate(zip(every, weights, strict=True))
            ]
            nll[task] = _where(there, -torch.stack(found).sum(0))
        examples = next(iter(nll.values())).numel()
        norms, entropies = penalties(model)
        data = total / examples * torch.stack([values.sum() for values in nll.values()]).sum()
        value = data + self.lambda1 * norms - self.lambda2 * entropies
        return value, {task: values.detach().sum() / present[task].sum() for task, values in nll.items()}


def _every(target: Tensor, stride: int) -> Tensor:
    """Every `stride`-th voxel along each axis of a target [M, 1, H, W] of numbers, or [M, H, W] of labels (or of
    volumes)."""
    if stride == 1:
        return target
    first = 2 if target.is_floating_point() else 1
    return target[(slice(None),) * first + (slice(None, None, stride),) * (target.dim() - first)]


def _where(present: Tensor, values: Tensor) -> Tensor:
    """The values [M, ...]; those of examples that are not `present` [M] are zero."""
    return values.where(present.view(-1, *[1] * (values.dim() - 1)), 0)
