"""Tasks whose outputs are classes: log p(y | x) of eq. 2 is that of a categorical distribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .task import Task

NOISES = ("fixed", "learned")


class CategoricalLikelihood(nn.Module):
    """log p(y | x) of a class for each voxel or image; `learned`: weighed against other tasks by its noise s,
    log p / s^2 - log s (Kendall, Gal, Cipolla 2018, eq. 10)."""

    def __init__(self, noise: str) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=noise == "learned")

    def forward(self, output: Tensor, target: Tensor, present: Tensor) -> Tensor:
        """output (logits) [M, classes, ..], target int64 [M, ..] -> mean log-likelihood per voxel of each example,
        [M]."""
        log_p = -F.cross_entropy(output, target, reduction="none")
        if log_p.dim() > 1:
            log_p = log_p.mean(tuple(range(1, log_p.dim())))
        return log_p * torch.exp(-2 * self.log_sigma) - self.log_sigma


@dataclasses.dataclass(frozen=True)
class ClassTask(Task):
    """A task of classes.

    Args:
        noise: "fixed", or "learned": a parameter that weighs the task by its noise.
    """

    noise: str = "fixed"

    def check(self) -> None:
        if self.noise not in NOISES:
            raise self.refuse("noise", self.noise, f"one of {', '.join(NOISES)}")

    @property
    def outputs(self) -> int:
        return max(self.of.names.values(), default=0) + 1

    def start(self) -> Tensor:
        frequencies = torch.as_tensor(self.of.statistics["frequencies"], dtype=torch.float32)
        return frequencies.clamp_min(1e-6).log()

    def likelihood(self) -> nn.Module:
        return CategoricalLikelihood(self.noise)

    def link(self, output: Tensor, votes: bool = False) -> Tensor:
        if votes:
            return F.one_hot(output.argmax(1), output.shape[1]).movedim(-1, 1).to(output.dtype)
        return output.softmax(1)

    def predicted(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """The uncertainty is the root of the summed variances of the classes' probabilities."""
        return {"": mean.argmax(1).numpy().astype(np.uint8), "uncertainty": variance.sum(1).sqrt().numpy()}

    @property
    def uncertainty_unit(self) -> str:
        return "probability"
