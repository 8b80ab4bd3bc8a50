"""The kind `segmentation`: a label for every voxel, such as the organs at risk (paper, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..errors import InputError
from ..tables import heading
from .classes import ClassTask
from .task import Contours, Measure, Panel, Scene, Score, ScoreRow


@dataclasses.dataclass(frozen=True)
class Segmentation(ClassTask, kind="segmentation"):
    """The labels of the voxels; label 0 is the background."""

    reads = "labels"
    dtype = np.uint8

    @property
    def organs(self) -> dict[str, int]:
        """The label of each organ by name, without the background."""
        return {name: value for name, value in self.of.names.items() if value != 0}

    @property
    @override
    def title(self) -> str:
        return f"Segmentation of {self.name}"

    # --- while it is trained ------------------------------------------------------------------------------------------

    @property
    @override
    def scores(self) -> tuple[Score, ...]:
        return (Score("dice", "mean Dice", "", 3),)

    def tally(self, output: Tensor, target: Tensor, there: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Counts of voxels for each label, [classes]: those of the overlap, of the prediction and of the truth."""
        predicted, true = output.argmax(1)[there], target[there]
        parts = {"overlap": predicted[predicted == true], "predicted": predicted, "true": true}
        return {name: torch.bincount(x.flatten(), minlength=output.shape[1]).double() for name, x in parts.items()}

    def scored(self, sums: Mapping[str, Tensor]) -> dict[str, float | None]:
        """The mean Dice over those organs that the truth has."""
        if not sums or not (organs := sums["true"][1:] > 0).any():
            return {"dice": None}
        dice = 2 * sums["overlap"][1:] / (sums["predicted"] + sums["true"])[1:]
        return {"dice": dice[organs].mean().item()}

    # --- how good it is -----------------------------------------------------------------------------------------------

    def metrics(self, true: np.ndarray, predicted: np.ndarray, scene: Scene | None) -> dict[str, Any]:
        """The columns of Table 1 (b): {"dice": {organ: value}, "dice_mean": value}. The value is None for an organ that
        is absent from truth and prediction."""
        for which, labels in (("true", true), ("predicted", predicted)):
            if not np.issubdtype(labels.dtype, np.integer):
                raise InputError(f"the {which} {self.of.name} have dtype {labels.dtype}, expected integers")
            if unknown := set(np.unique(labels).tolist()) - {0, *self.of.names.values()}:
                expected = f"expected one of {dict(self.of.names)}"
                raise InputError(f"the {which} {self.of.name} hold label {min(unknown)}, {expected}")
        dice = {name: _dice(true == value, predicted == value) for name, value in self.organs.items()}
        there = [value for value in dice.values() if value is not None]
        return {"dice": dice, "dice_mean": float(np.mean(there)) if there else None}

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return (Measure("Dice", self.place("dice_mean"), 3),)

    @property
    @override
    def details(self) -> tuple[Measure, ...]:
        return tuple(Measure(heading(organ), self.place("dice", organ), 3) for organ in self.organs)

    @override
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        overall = Measure("Overall", self.place("dice_mean"), 3)
        return [ScoreRow(self.title, "Dice", (overall, *self.details))]

    @override
    def rules(self) -> dict[str, str]:
        return {
            "dice": "over the whole 3-D volume, also outside the mask; an organ absent from truth and prediction is "
            "left out (null), absent from the truth alone it counts 0",
        }

    # --- what it looks like -------------------------------------------------------------------------------------------

    def panels(self, background: Panel, true: np.ndarray | None, predicted: np.ndarray | None) -> list[Panel]:
        """The outlines of the labels on the MR; those of the truth are solid, those of the prediction are dashed."""
        if true is None and predicted is None:
            return []
        return [background._replace(title=self.name, contours=Contours(true, predicted, self.organs))]


def _dice(true: np.ndarray, predicted: np.ndarray) -> float | None:
    """The Dice of two boolean volumes; None if both are empty."""
    if not true.any() and not predicted.any():
        return None
    from monai.metrics import compute_dice

    y_pred, y = (torch.from_numpy(volume)[None, None] for volume in (predicted, true))
    # MONAI would by default ignore an organ that is predicted where there is none; that is an error and counts 0.
    return float(compute_dice(y_pred, y, ignore_empty=False))
