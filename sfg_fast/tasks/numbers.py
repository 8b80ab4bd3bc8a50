"""Tasks whose outputs are numbers. Their log p(y | x) in eq. 2 is that of a normal distribution around the output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from ..data.targets import HU
from .task import Task

NOISES = ("fixed", "learned", "heteroscedastic")
SCALE_HU = 400.0


class GaussianLikelihood(nn.Module):
    """log p(y | x) of a normal distribution around the prediction, whose SD is chosen by `noise`: "fixed" is one unit
    of the output; "learned" is one parameter for all examples, which weighs the task against others (Kendall, Gal,
    Cipolla 2018, eq. 7); "heteroscedastic" is predicted for every voxel or image (Kendall, Gal 2017, eq. 8).

    The network's output is in units of `scale`. With "heteroscedastic" a second channel is the log of the SD.
    """

    def __init__(self, scale: float, noise: str) -> None:
        super().__init__()
        self.scale, self.noise = scale, noise
        self.log_sigma = nn.Parameter(torch.zeros(()), requires_grad=noise == "learned")  # the SD is in output units

    def forward(self, output: Tensor, target: Tensor, present: Tensor) -> Tensor:
        """output [M, 1 or 2, ..] in units of `scale`, target [M, 1, ..] or [M] in its own unit -> log-likelihood [M] of
        each example, the mean over its voxels."""
        mean = output
        log_sigma: Tensor = self.log_sigma
        if self.noise == "heteroscedastic":
            mean, log_sigma = output[:, :1], output[:, 1:]
        error = (mean - target.view_as(mean) / self.scale) * torch.exp(-log_sigma)
        log_p = 0.5 * error.square() + log_sigma + 0.5 * math.log(2 * math.pi)
        return -log_p.mean(tuple(range(1, log_p.dim())))


@dataclasses.dataclass(frozen=True)
class NumberTask(Task):
    """A task of numbers.

    Args:
        unit: the unit of the target, such as HU or years; "": the unit that the cohort names.
        scale: one unit of the network's output, in the unit of the target. It is also the SD of the Gaussian likelihood
            while that is fixed. null: 400 HU, or the target's SD over the training cases.
        noise: the SD of the likelihood: "fixed"; "learned", a parameter that weighs the task against others; or
            "heteroscedastic", which the network predicts for every voxel or image.
    """

    unit: str = ""
    scale: float | None = None
    noise: str = "fixed"

    @override
    def check(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise self.refuse("scale", self.scale, "a positive number, or null")
        if self.noise not in NOISES:
            raise self.refuse("noise", self.noise, f"one of {', '.join(NOISES)}")
        if self.about is not None and self.unit and self.about.unit and self.unit != self.about.unit:
            raise self.refuse("unit", self.unit, f"{self.about.unit!r}, as the cohort says")

    @property
    def units(self) -> str:
        """The unit of the target, "" for none."""
        return self.unit or self.of.unit

    @property
    def in_units(self) -> str:
        """The unit as a heading ends with it, " [HU]"; "" where there is no unit."""
        return f" [{self.units}]" if self.units else ""

    @property
    def digits(self) -> int:
        """How many decimals tables show of an error: 1 for HU; else so many that they show a thousandth of the target's
        SD, or 2 where the SD is not known."""
        if self.units == HU:
            return 1
        sd = self.of.statistics.get("sd")
        return min(max(3 - math.floor(math.log10(sd)), 0), 9) if sd else 2

    @property
    @override
    def outputs(self) -> int:
        return 2 if self.noise == "heteroscedastic" else 1

    @property
    @override
    def output_unit(self) -> float:
        if self.scale is not None:
            return self.scale
        return SCALE_HU if self.units == HU else float(self.of.statistics["sd"]) or 1.0

    @override
    def start(self) -> Tensor:
        start = torch.zeros(self.outputs)
        start[0] = self.of.statistics["mean"] / self.output_unit
        return start

    @override
    def likelihood(self) -> nn.Module:
        return GaussianLikelihood(self.output_unit, self.noise)

    def link(self, output: Tensor, votes: bool = False) -> Tensor:
        """The output itself. Where it has two channels, the second, the log of the SD, becomes the SD."""
        return output if output.shape[1] == 1 else torch.cat([output[:, :1], output[:, 1:].exp()], 1)

    def predicted(self, mean: Tensor, variance: Tensor) -> dict[str, np.ndarray]:
        """All arrays are in the unit of the target. A heteroscedastic task adds "noise", the SD that the network itself
        predicts."""
        found: dict[str, Any] = {"": mean[:, 0].numpy() * self.output_unit}
        found["uncertainty"] = (variance[:, 0].sqrt() * self.output_unit).numpy()
        if self.noise == "heteroscedastic":
            found["noise"] = mean[:, 1].numpy() * self.output_unit
        return found

    @property
    @override
    def uncertainty_unit(self) -> str:
        return self.units
