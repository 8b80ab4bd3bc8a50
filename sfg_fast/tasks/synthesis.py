"""The kind `synthesis`: a number for every voxel, such as a CT in HU from an MR (paper, section 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ..data.targets import CLIP_HU, HU
from ..errors import InputError
from ..tables import heading
from .numbers import NumberTask
from .task import Measure, Panel, Scene, Score, ScoreRow

BONE_HU = 200
"""The region "bones" of a CT holds the voxels inside the mask where the true CT is above this value."""

ROUNDING_HU2 = 1 / 12
"""A PSNR of CTs counts a mean squared error of at least this many HU^2. CTs are stored as whole HU, and rounding makes
this error. So the PSNR of a perfect prediction is finite (82.88 dB inside its region): JSON and a mean can hold it."""

LEVELS = 2**16
"""For volumes other than CTs the least error is that of rounding their range to so many levels."""

CT_WINDOW_HU = (-400, 1000)
"""The display window of CTs. It shows fat, muscle and bone apart, and gas as black."""


@dataclasses.dataclass(frozen=True)
class Synthesis(NumberTask, kind="synthesis"):
    """Another volume from the MR: a CT, a PET, another contrast.

    Args:
        range: the lowest and the highest value of the target that count. Both volumes are clipped to this range before
            they are measured, and its width is the peak of the PSNR. null: of a CT -1024 and 3000 HU, as in
            SynthRAD2023; of other volumes nothing is clipped, and the peak is the width of the true values in the mask.
    """

    reads = "intensities"

    range: list[float] | None = None

    @override
    def check(self) -> None:
        super().check()
        if self.range is not None and not (len(self.range) == 2 and self.range[0] < self.range[1]):
            raise self.refuse("range", self.range, "null, or the lowest and the highest value")

    @property
    def limits(self) -> tuple[float, float] | None:
        """The range that volumes are clipped to before they are measured; None: they are not clipped."""
        if self.range is not None:
            return self.range[0], self.range[1]
        return CLIP_HU if self.units == HU else None

    @property
    def what(self) -> str:
        """The target's name in a heading: CT for `ct`, Flair for `flair`."""
        name = self.of.name
        return name.upper() if len(name) <= 3 else heading(name)

    @property
    @override
    def title(self) -> str:
        return f"{self.what} synthesis"

    # --- while it is trained ------------------------------------------------------------------------------------------

    @property
    @override
    def scores(self) -> tuple[Score, ...]:
        return (Score("psnr", "PSNR in mask [dB]", "dB", 2),)

    def tally(self, output: Tensor, target: Tensor, there: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Over the voxels in the mask: the sum of squared errors, the number of voxels, and the peak of the PSNR times
        that number."""
        assert mask is not None
        inside = mask & there.view(-1, *[1] * (mask.dim() - 1))
        true = target[inside]
        error = (output[:, :1] * self.output_unit - target)[inside].double()
        return {"squared": error.square().sum(), "voxels": inside.sum().double()} | self._width(true)

    def _width(self, true: Tensor) -> dict[str, Tensor]:
        """The peak of the PSNR times the number of voxels. Sums of both over batches give a mean peak."""
        if self.limits is not None:
            peak = true.new_tensor(self.limits[1] - self.limits[0], dtype=torch.float64)
        else:
            peak = (true.max() - true.min()).double() if true.numel() else true.new_tensor(0.0, dtype=torch.float64)
        return {"peak": peak * true.numel()}

    @override
    def scored(self, sums: Mapping[str, Tensor]) -> dict[str, float | None]:
        if not sums or not sums["voxels"] > 0:
            return {"psnr": None}
        mean, peak = (sums["squared"] / sums["voxels"]).item(), (sums["peak"] / sums["voxels"]).item()
        good = math.isfinite(mean) and peak > 0
        return {"psnr": 10 * math.log10(peak**2 / max(mean, 1e-12)) if good else None}

    # --- how good it is -----------------------------------------------------------------------------------------------

    def metrics(self, true: np.ndarray, predicted: np.ndarray, scene: Scene | None) -> dict[str, Any]:
        """The columns of Table 1 (a)::

            {"regions": {region: {"psnr_in_mask": dB, "psnr_zero_outside": dB, "mae": unit, "voxels": int}},
             "mean_baseline": {"psnr_in_mask": dB}, "psnr_gain": dB}

        The regions are `overall` (the mask), `bones` (of a CT), and those of the scene. A region without voxels has
        None for its values, and so has the PSNR of a truth that is one value everywhere. `mean_baseline` predicts the
        case's mean true value everywhere inside the mask, and `psnr_gain` is the overall PSNR minus that of
        `mean_baseline`: unlike a PSNR, the gain is 0 for a network that has learnt nothing.
        """
        assert scene is not None
        mask, (true, predicted) = (
            scene.mask,
            (self._clipped("the true", true), self._clipped("the predicted", predicted)),
        )
        inside = true[mask].astype(np.float64)
        width = self._peak(inside)
        floor = ROUNDING_HU2 if self.units == HU else (width / LEVELS) ** 2 / 12
        regions = {"overall": mask} | ({"bones": mask & (true > BONE_HU)} if self.units == HU else {})
        regions |= {name: mask & region for name, region in scene.regions.items()}
        found = {
            name: _in_region(true[region], predicted[region], mask.size, width, floor)
            for name, region in regions.items()
        }
        baseline = decibels(max(float(inside.var()), floor), width)  # the variance is the error of predicting the mean
        overall = found["overall"]["psnr_in_mask"]
        gain = None if overall is None or baseline is None else overall - baseline
        return {"regions": found, "mean_baseline": {"psnr_in_mask": baseline}, "psnr_gain": gain}

    def _peak(self, inside: np.ndarray) -> float:
        if self.limits is not None:
            return self.limits[1] - self.limits[0]
        return float(inside.max() - inside.min())

    def _clipped(self, which: str, volume: np.ndarray) -> np.ndarray:
        volume = self._finite(which, volume)
        return volume if self.limits is None else np.clip(volume, *self.limits)

    def _finite(self, which: str, volume: np.ndarray) -> np.ndarray:
        """The volume as float32. Raises InputError if a voxel is not finite."""
        if not np.isfinite(volume).all():
            bad = np.count_nonzero(~np.isfinite(volume))
            raise InputError(f"{which} {self.what} holds {bad} voxels that are not finite, expected{self.in_units} all")
        return np.asarray(volume, dtype=np.float32)

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        mae = Measure(
            f"MAE{self.in_units}", self.place("regions", "overall", "mae"), self.digits, True, unit=self.units
        )
        psnr = Measure("PSNR in mask [dB]", self.place("regions", "overall", "psnr_in_mask"), 2, unit="dB")
        gain = Measure(
            f"PSNR gained over the mean {self.what} [dB]",
            self.place("psnr_gain"),
            2,
            unit="dB",
            signed=True,
            tested=False,
        )
        return (psnr, gain, mae)

    @property
    @override
    def relative(self) -> Measure:
        return self.measures[2]

    @property
    @override
    def details(self) -> tuple[Measure, ...]:
        bones = Measure("PSNR of bones [dB]", self.place("regions", "bones", "psnr_in_mask"), 2)
        return (bones,) if self.units == HU else ()

    @override
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        names = ["overall", *(["bones"] if self.units == HU else []), *regions]
        kinds = (
            ("PSNR in mask [dB]", "psnr_in_mask", 2, False),
            ("PSNR zero outside [dB]", "psnr_zero_outside", 2, False),
            (f"MAE{self.in_units}", "mae", self.digits, True),
        )
        return [
            ScoreRow(
                self.title,
                title,
                tuple(Measure(heading(name), self.place("regions", name, key), digits, less) for name in names),
            )
            for title, key, digits, less in kinds
        ]

    @override
    def rules(self) -> dict[str, str]:
        unit = f" {self.units}" if self.units else ""
        rounding = f"rounding to {LEVELS} levels"
        if self.limits is None:
            outside = 0.0
            clip = "nothing is clipped; the peak of every PSNR is the width of the true values inside the mask"
        else:
            outside, high = self.limits
            source = ", as in SynthRAD2023" if self.limits == CLIP_HU else ""
            clip = (
                f"both volumes are clipped to [{outside:.0f}, {high:.0f}]{unit}{source}; the peak of every PSNR is the "
                f"width, {high - outside:.0f}{unit}"
            )
        bones = ""
        if self.units == HU:
            rounding, bones = "1/12 HU² (rounding to whole HU)", f"bones: true CT above {BONE_HU} HU; "
        mean = f"predicting the case's mean true {self.what} inside the mask"
        return {
            "clip": clip,
            "mask": "the patient's body, or the whole volume where a case has neither a mask nor a volume in HU to "
            "find it in; every region is intersected with it",
            "regions": f"overall: the mask; {bones}organs: the union of the true labels",
            "psnr_in_mask": "from the mean squared error over the voxels of the region inside the mask",
            "psnr_zero_outside": f"both volumes are set to {outside:.0f}{unit} outside the region inside the mask, and "
            "the mean squared error is over the whole volume",
            "psnr_floor": f"the mean squared error inside a region counts as at least {rounding}",
            "psnr_gain": f"overall psnr_in_mask minus that of {mean}",
            "mae": f"mean absolute error{self.in_units} over the voxels of the region inside the mask",
        }

    # --- what it looks like -------------------------------------------------------------------------------------------

    def panels(self, background: Panel, true: np.ndarray | None, predicted: np.ndarray | None) -> list[Panel]:
        """The truth, the prediction, and their difference on a scale that is symmetric about 0."""
        first = true if true is not None else predicted
        if first is None:
            return []
        low, high = self.limits or np.percentile(first, (0.5, 99.5)).tolist()
        if self.units == HU:
            low, high = CT_WINDOW_HU
        scale = {"cmap": "gray", "vmin": low, "vmax": high}
        found = []
        if true is not None:
            found.append(Panel(self.what, true, scale, self.units))
        if predicted is not None:
            found.append(Panel(f"synthetic {self.what}", predicted, scale, self.units))
        if true is not None and predicted is not None:
            difference = np.subtract(predicted, true, dtype=np.float32)
            title = f"synthetic {self.what} - {self.what}"
            found.append(Panel(title, difference, _difference_scale(difference), self.units))
        return found


def _in_region(true: np.ndarray, predicted: np.ndarray, voxels: int, width: float, floor: float) -> dict[str, Any]:
    """The metrics of one region of n voxels. `true` and `predicted` are its values [n], already clipped; `voxels` is
    the number of voxels of the whole volume."""
    if true.size == 0:
        return {"psnr_in_mask": None, "psnr_zero_outside": None, "mae": None, "voxels": 0}
    error = np.subtract(predicted, true, dtype=np.float64)
    squared = max(float(np.mean(error**2)), floor)
    return {
        "psnr_in_mask": decibels(squared, width),
        # Outside the region both volumes hold the same value: those voxels only enlarge the denominator.
        "psnr_zero_outside": decibels(squared * true.size / voxels, width),
        "mae": float(np.mean(np.abs(error))),
        "voxels": int(true.size),
    }


def decibels(squared: float, width: float) -> float | None:
    """The PSNR in dB of a mean squared error, with the peak `width`; None for a truth that is one value everywhere,
    which has no peak."""
    return None if width <= 0 else 10 * math.log10(width**2 / squared)


def _difference_scale(difference: np.ndarray) -> dict[str, Any]:
    """A colour scale for a difference, symmetric about 0. Its limit is rounded up to hundreds (of HU) or to one digit,
    so that slices of similar quality have the same scale."""
    most = float(np.percentile(np.abs(difference), 99))
    step = 100.0 if most > 10 else 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    limit = step * max(1, math.ceil(most / step))
    return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
