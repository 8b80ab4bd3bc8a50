"""The profile `synthrad2025`: CTs and labels measured as the SynthRAD2025 challenge's public evaluation measures them.

The challenge measures in one region, the mask, and so does this profile: nobody could compare numbers of bones or
organs that carry the challenge's name. Unlike the challenge, this profile measures no dose, and it scores the labels
that the network predicts, not those of a segmentation of the synthetic CT.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from ..data.targets import HU
from ..errors import InputError
from ..tables import heading
from .segmentation import Segmentation
from .synthesis import ROUNDING_HU2, Synthesis, decibels
from .task import PAPER, Measure, Scene, ScoreRow

NAME = "synthrad2025"
RANGE_HU = (-1024.0, 3071.0)
WIDTH_HU = RANGE_HU[1] - RANGE_HU[0]

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""The weight of each scale in MS-SSIM, from the finest scale on (Wang, Simoncelli, Bovik 2003)."""
WINDOW = 7
LEAST_SIZE = 97
"""So many voxels along each axis are needed. Then, at the coarsest scale, one voxel is a window's radius away from all
borders."""


class SynthRADSynthesis(Synthesis, profile=NAME):
    """A CT, measured as in SynthRAD2025. The option `range` is ignored."""

    @override
    def check(self) -> None:
        super().check()
        if self.about is not None and self.units != HU:
            expected = f"expected one in {HU}, or metrics {PAPER}"
            raise InputError(f"metrics={NAME!r}: task {self.name} is of a volume in {self.units!r}, {expected}")

    def metrics(self, true: np.ndarray, predicted: np.ndarray, scene: Scene | None) -> dict[str, Any]:
        """{"mae": HU, "psnr": dB, "ms_ssim": 0 to 1, "voxels": of the mask}. The MS-SSIM is None if at some scale no
        voxel of the mask is far enough from the volume's borders."""
        assert scene is not None
        mask, true, predicted = scene.mask, self._finite("the true", true), self._finite("the predicted", predicted)
        error = np.subtract(predicted[mask], true[mask], dtype=np.float64)
        clipped = np.subtract(*(volume[mask].clip(*RANGE_HU) for volume in (predicted, true)), dtype=np.float64)
        return {
            "mae": float(np.mean(np.abs(error))),
            "psnr": decibels(max(float(np.mean(clipped**2)), ROUNDING_HU2), WIDTH_HU),
            # The challenge stores volumes towards Left, Posterior and Superior, and halves them from the start on.
            "ms_ssim": ms_ssim(*(volume[:, ::-1, ::-1] for volume in (true, predicted, mask))),
            "voxels": int(mask.sum()),
        }

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("MAE [HU]", self.place("mae"), 1, True, unit=HU),
            Measure("PSNR [dB]", self.place("psnr"), 2, unit="dB"),
            Measure("MS-SSIM", self.place("ms_ssim"), 3),
        )

    @property
    @override
    def relative(self) -> Measure:
        return self.measures[0]

    @property
    @override
    def details(self) -> tuple[Measure, ...]:
        return ()

    @override
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        return [ScoreRow(self.title, "", self.measures)]

    @override
    def rules(self) -> dict[str, str]:
        low, high = RANGE_HU
        return {
            "mask": "the mask of the case, else the patient's body; outside it both volumes are -1024 HU; there is no "
            "other region, as in the challenge",
            "mae": "mean absolute error [HU] over the voxels of the mask; nothing is clipped",
            "psnr": f"both volumes are clipped to [{low:.0f}, {high:.0f}] HU; from the mean squared error over the "
            "voxels of the mask, which counts as at least 1/12 HU² (rounding to whole HU); the peak is "
            f"{WIDTH_HU:.0f} HU",
            "ms_ssim": "both volumes are clipped likewise and shifted to start at 0; a short axis is made "
            f"{LEAST_SIZE} voxels long by repeating its borders; at each of {len(SCALE_WEIGHTS)} scales the SSIM of "
            f"every voxel (uniform window of {WINDOW} voxels, luminance at every scale, at least 0) to the power of "
            f"the scale's weight ({', '.join(map(str, SCALE_WEIGHTS))}) is averaged over the mask without the "
            f"outermost {WINDOW // 2} voxels of the volume; MS-SSIM is the product of the means; null where nothing is "
            "left of the mask",
        }


class SynthRADSegmentation(Segmentation, profile=NAME):
    """Labels, measured as in SynthRAD2025."""

    def metrics(self, true: np.ndarray, predicted: np.ndarray, scene: Scene | None) -> dict[str, Any]:
        """{"dice": {organ: value}, "dice_mean": value, "hd95": {organ: mm}, "hd95_mean": mm}. Both values are None for
        an organ that is absent from the truth; the HD95 is None for one that is absent from the prediction. The means
        leave such organs out."""
        assert scene is not None
        dice, distances = super().metrics(true, predicted, scene)["dice"], {}
        for name, value in self.organs.items():
            there, found = true == value, predicted == value
            if not there.any():
                dice[name] = None
            distances[name] = hd95(there, found, scene.spacing) if there.any() and found.any() else None
        return {"dice": dice, "dice_mean": _mean(dice), "hd95": distances, "hd95_mean": _mean(distances)}

    @property
    @override
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("Dice", self.place("dice_mean"), 3),
            Measure("HD95 [mm]", self.place("hd95_mean"), 2, True, unit="mm"),
        )

    @property
    @override
    def details(self) -> tuple[Measure, ...]:
        return tuple(
            one._replace(title=f"{one.title}: {row.title}") for row in self.rows(()) for one in row.columns[1:]
        )

    @override
    def rows(self, regions: Sequence[str]) -> list[ScoreRow]:
        found = []
        for key, measure in zip(("dice", "hd95"), self.measures, strict=True):
            organs = [measure._replace(title=heading(one), place=self.place(key, one)) for one in self.organs]
            found.append(ScoreRow(self.title, measure.title, (measure._replace(title="Overall"), *organs)))
        return found

    @override
    def rules(self) -> dict[str, str]:
        return {
            "dice": "over the whole 3-D volume, also outside the mask; an organ absent from the truth is left out "
            "(null), whatever is predicted; absent from the prediction alone it counts 0",
            "hd95": "in mm, over the whole volume: the 95th percentile of the distances from each surface voxel of the "
            "one to the nearest of the other, in the direction in which it is larger; an organ absent from the truth, "
            "or from the prediction (which the Dice alone tells), is left out (null), as in the challenge",
        }


def ms_ssim(true: np.ndarray, predicted: np.ndarray, mask: np.ndarray) -> float | None:
    """The MS-SSIM of two volumes in HU over the voxels of a mask, all [a, b, c]; `SynthRADSynthesis.rules` defines it.
    None if at some scale no voxel of the mask is far enough from the borders."""
    from scipy.ndimage import uniform_filter

    missing = [max(LEAST_SIZE - size, 0) for size in mask.shape]
    margins = [(one // 2, one - one // 2) for one in missing]
    mask = np.pad(mask, margins, mode="edge")
    x, y = (
        np.pad(volume.clip(*RANGE_HU).astype(np.float64) - RANGE_HU[0], margins, mode="edge") * mask
        for volume in (true, predicted)
    )
    found = 1.0
    for weight in SCALE_WEIGHTS:
        inside = (slice(WINDOW // 2, -(WINDOW // 2)),) * 3
        if not mask[inside].any():
            return None
        similarity = _ssim(x, y, inside, mask[inside])
        found *= min(float(np.mean(similarity**weight)), 1.0)
        # Each voxel becomes the mean of itself and the one before it along every axis (0 before the first); of these
        # every second one is kept.
        x, y = (uniform_filter(volume, 2, mode="constant")[::2, ::2, ::2] for volume in (x, y))
        mask = mask[::2, ::2, ::2]
    return found


def _ssim(x: np.ndarray, y: np.ndarray, inside: tuple[slice, ...], mask: np.ndarray) -> np.ndarray:
    """The SSIM, at least 0, of the n voxels of the mask, [n]. `inside` is the part of the volumes that the mask covers;
    their borders are outside of it."""
    from scipy.ndimage import uniform_filter

    def mean(volume: np.ndarray) -> np.ndarray:
        return uniform_filter(volume, WINDOW)[inside][mask]

    sample = WINDOW**3 / (WINDOW**3 - 1)  # makes variances of a sample of variances of the window
    mean_x, mean_y = mean(x), mean(y)
    variances = sample * (mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2)
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * WIDTH_HU) ** 2, (0.03 * WIDTH_HU) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * np.maximum((2 * covariance + c2) / (variances + c2), 0)


def _mean(by_organ: Mapping[str, float | None]) -> float | None:
    there = [value for value in by_organ.values() if value is not None]
    return float(np.mean(there)) if there else None


def hd95(true: np.ndarray, predicted: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """The 95th percentile of the Hausdorff distance in mm of two boolean volumes [Z, Y, X], neither of them empty."""
    from monai.metrics import compute_hausdorff_distance

    y_pred, y = (torch.from_numpy(volume)[None, None] for volume in (predicted, true))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of a call that it makes itself
        return float(compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing))
