"""The kind `regression`: a number for every image, such as an age in years."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from ..tables import heading
from .numbers import NumberTask
from .task import Measure, Scatter, Scene, Score, ScoreRow

LOSSES = ("gaussian", "rmse")


class RootMeanSquare(nn.Module):
    """The root of the mean squared error of a mini-batch, which the longer paper takes for ages (Bragman, Tanno et al.,
    ICCV 2019). In eq. 2 it takes the place of the negative log-likelihood, though no distribution has this one."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, output: Tensor, target: Tensor, present: Tensor) -> Tensor:
        """output [M, 1] in units of `scale`, target [M] in its own unit -> one number for each example, [M]. The mean
        of these over the examples that are `present` is minus the RMSE, in units of `scale`."""
        squared = (output[:, 0] - target / self.scale).square()
        mean = torch.where(present, squared, 0).sum() / present.sum().clamp_min(1)
        return -squared / mean.clamp_min(torch.finfo(mean.dtype).tiny).sqrt()


@dataclasses.dataclass(frozen=True)
class Regression(NumberTask, kind="regression"):
    """A number for each image.

    Args:
        loss: "gaussian", the likelihood of a normal distribution in eq. 2; or "rmse", as in the longer paper.
        flips: whether a mirrored image has the same number.
    """

    reads = "number"

    loss: str = "gaussian"
    flips: bool = True

    @override
    def check(self) -> None:
        super().check()
        if self.loss not in LOSSES:
            raise self.refuse("loss", self.loss, f"one of {', '.join(LOSSES)}")
        if self.loss == "rmse" and self.noise != "fixed":
            raise self.refuse("noise", self.noise, "fixed, because the loss is rmse")

    @property
    @override
    def title(self) -> str:
        return heading(self.name)

    @override
    def likelihood(self) -> nn.Module:
        return RootMeanSquare(self.output_unit) if self.loss == "rmse" else super().likelihood()

    # --- while it is trained ------------------------------------------------------------------------------------------

    @property
    @override
    def scores(self) -> tuple[Score, ...]:
        return (Score("mae", f"mean absolute error{self.in_units}", "", self.digits),)

    @override
    def tally(self, output: Tensor, target: Tensor, there: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        error = (output[:, 0] * self.output_unit - target)[there].double()
        return {"absolute": error.abs().sum(), "images": there.sum().double()}

    @override
    def scored(self, sums: Mapping[str, Tensor]) -> dict[str, float | None]:
        some = bool(sums) and bool(sums["images"] > 0)
        return {"mae": (sums["absolute"] / sums["images"]).item() if some else None}

    # --- how good it is -----------------------------------------------------------------------------------------------

    def metrics(self, true: float, predicted: float, scene: Scene | None) -> dict[str, Any]:
        """{"true", "predicted", "error": predicted minus true, "absolute_error"}; all are in the target's unit."""
        error = float(predicted) - float(true)
        return {"true": float(true), "predicted": float(predicted), "error": error, "absolute_error": abs(error)}

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        mae = Measure(
            f"MAE{self.in_units}", self.place("absolute_error"), self.digits, True, unit=self.units, test="bootstrap"
        )
        bias = Measure(
            f"Mean error{self.in_units}", self.place("error"), self.digits, unit=self.units, signed=True, tested=False
        )
        return (mae, bias)

    @override
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        return [ScoreRow(self.title, "", self.measures)]

    @override
    def rules(self) -> dict[str, str]:
        return {
            "absolute_error": f"of each image{self.in_units}; MAE is its mean",
            "error": f"predicted minus true{self.in_units}",
        }

    # --- what it looks like -------------------------------------------------------------------------------------------

    @override
    def chart(self, cases: Iterable[Mapping[str, Any]]) -> Scatter:
        pairs = np.array([(case["true"], case["predicted"]) for case in cases], dtype=float).reshape(-1, 2)
        return Scatter(self.title, self.units, pairs[:, 0], pairs[:, 1])
