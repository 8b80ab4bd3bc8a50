"""Tasks whose outputs are classes. Their log p(y | x) in eq. 2 is that of a categorical distribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .task import Task

NOISES = ("fixed", "learned")


class CategoricalLikelihood(nn.Module):
    """log p(y | x) of a class for each voxel or image. With the noise `learned` it is log p / s^2 - log s, where the
    parameter s weighs the task against other tasks (Kendall, Gal, Cipolla 2018, eq. 10)."""

    def __init__(self, noise: str) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=noise == "learned")

    def forward(self, output: Tensor, target: Tensor, present: Tensor) -> Tensor:
        """output (logits) [M, classes, ..], target int64 [M, ..] -> log-likelihood [M] of each example, the mean over
        its voxels."""
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

    @override
    def check(self) -> None:
        if self.noise not in NOISES:
            raise self.refuse("noise", self.noise, f"one of {', '.join(NOISES)}")

    @property
    @override
    def outputs(self) -> int:
        return max(self.of.names.values(), default=0) + 1

    @override
    def start(self) -> Tensor:
        frequencies = torch.as_tensor(self.of.statistics["frequencies"], dtype=torch.float32)
        return frequencies.clamp_min(1e-6).log()

    @override
    def likelihood(self) -> nn.Module:
        return CategoricalLikelihood(self.noise)

    @override
    def link(self, output: Tensor, votes: bool = False) -> Tensor:
        if votes:
            return F.one_hot(output.argmax(1), output.shape[1]).movedim(-1, 1).to(output.dtype)
        return output.softmax(1)

    def predicted(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """The prediction, uint8 [N, ..], is the class with the largest mean. The uncertainty is the square root of the
        sum over classes of the variances of their probabilities."""
        return {"": mean.argmax(1).numpy().astype(np.uint8), "uncertainty": variance.sum(1).sqrt().numpy()}

    @property
    @override
    def uncertainty_unit(self) -> str:
        return "probability"
