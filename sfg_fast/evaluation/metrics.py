"""The figures of Table 1: PSNR and MAE of a synthetic CT, Dice of the organs; per case, and mean (SD) over the cases.

No PSNR means anything without its clip, its range and its mask, so all three are fixed here and travel with the
numbers (`metrics_document`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch

from ..data.cohort import CLIP_HU, RANGE_HU, WIDE_REGIONS, check_label_names
from ..errors import InputError
from ..files import finite, read_json

BONE_HU = 200
"""Region "bones": the voxels inside the mask where the true CT is above this."""

MSE_FLOOR_HU2 = 1 / 12
"""Least mean squared error counted in a PSNR: that of rounding to whole HU, as CTs are stored. It keeps the PSNR of a
perfect prediction finite (82.88 dB inside its region), so that it can stand in JSON and in a mean."""


def case_metrics(
    ct_true: np.ndarray | None,
    ct_pred: np.ndarray | None,
    labels_true: np.ndarray | None,
    labels_pred: np.ndarray | None,
    mask: np.ndarray,
    label_names: Mapping[str, int],
) -> dict[str, Any]:
    """The metrics of one case (the columns of Table 1).

    Args:
        ct_true, ct_pred: [Z, Y, X] in HU, any real dtype; without both, the CT is not scored.
        labels_true, labels_pred: [Z, Y, X], integers, 0 = background; without both, there is no Dice. The true labels
            alone still serve as regions of the CT.
        mask: [Z, Y, X], the patient's body: nonzero inside. It bounds the regions of the CT, not the Dice.
        label_names: name -> label value, as in nnU-Net's dataset.json; value 0, the background, may be left out.

    Returns:
        What JSON can hold; `ct*` and `psnr_gain`, or `dice*`, are absent where that task is not scored::

            {"ct": {region: {"psnr_in_mask": dB, "psnr_zero_outside": dB, "mae_hu": HU, "voxels": int}},
             "ct_mean_baseline": {"psnr_in_mask": dB}, "psnr_gain": dB,
             "dice": {organ: value}, "dice_mean": value}

        The regions are `overall` (the mask), `bones`, `organs` (all true labels) and each organ. A region without
        voxels has None for its values, and so has the Dice of an organ absent from truth and prediction.
        `ct_mean_baseline` predicts the case's mean true CT everywhere inside the mask, and `psnr_gain` is the
        overall PSNR minus that one: unlike a PSNR, it is 0 for a network that has learnt nothing.

    Raises:
        InputError: shapes differ, the mask is empty, a CT is not finite, a label has no name, or nothing to score.
    """
    _check_names(label_names)
    mask = np.asarray(mask) != 0
    if not mask.any():
        raise InputError("mask is empty: it must mark the voxels to score")
    volumes = {"ct_true": ct_true, "ct_pred": ct_pred, "labels_true": labels_true, "labels_pred": labels_pred}
    for name, volume in volumes.items():
        if volume is not None and volume.shape != mask.shape:
            raise InputError(f"{name} has shape {volume.shape}, but the mask has {mask.shape}")
    for name in ("labels_true", "labels_pred"):
        _check_labels(name, volumes[name], label_names)

    result: dict[str, Any] = {}
    if ct_true is not None and ct_pred is not None:
        true, pred = _clipped("ct_true", ct_true), _clipped("ct_pred", ct_pred)
        result |= _ct_metrics(true, pred, labels_true, mask, label_names)
    if labels_true is not None and labels_pred is not None:
        dice = {name: _dice(labels_true == v, labels_pred == v) for name, v in organ_values(label_names).items()}
        present = [value for value in dice.values() if value is not None]
        result |= {"dice": dice, "dice_mean": float(np.mean(present)) if present else None}
    if not result:
        raise InputError("nothing to score: neither both CTs nor both label volumes were given")
    return result


def summarise(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and SD over the cases of every number in their `case_metrics`.

    Args:
        cases: case name -> its `case_metrics`.

    Returns:
        The layout of one case with `{"mean", "sd", "n"}` in the place of each number. None (an empty region, an absent
        organ) is left out; n counts what is left. The SD is the sample's (divided by n - 1), 0 for n = 1; for n = 0
        both are None.

    Raises:
        InputError: no case.
    """
    if not cases:
        raise InputError("no case to summarise")
    return _summarise(list(cases.values()))


def metrics_document(cases: Mapping[str, Mapping[str, Any]], label_names: Mapping[str, int]) -> dict[str, Any]:
    """The content of metrics.json: `{"conventions": ..., "cases": cases, "summary": summarise(cases)}`.

    Strictly valid JSON (no NaN, no infinity), readable without this package: the conventions say in words what each
    number means. Raises InputError without a case.
    """
    low, high = CLIP_HU
    conventions = {
        "clip_hu": list(CLIP_HU),
        "range_hu": RANGE_HU,
        "bone_threshold_hu": BONE_HU,
        "label_names": dict(label_names),
        "rules": {
            "clip": f"both CTs are clipped to [{low:.0f}, {high:.0f}] HU, as in SynthRAD; the peak of every PSNR is "
            f"the width, {RANGE_HU:.0f} HU",
            "mask": "the patient's body; every region of the CT is intersected with it, the Dice is not",
            "regions": f"overall: the mask; bones: true CT above {BONE_HU} HU; organs: the union of the true labels",
            "psnr_in_mask": "from the mean squared error over the voxels of the region inside the mask",
            "psnr_zero_outside": f"both volumes are set to {low:.0f} HU outside the region inside the mask, and the "
            "mean squared error is over the whole volume",
            "psnr_floor": "the mean squared error inside a region counts as at least 1/12 HU² (rounding to whole HU)",
            "psnr_gain": "overall psnr_in_mask minus that of predicting the case's mean true CT inside the mask",
            "mae_hu": "mean absolute error over the voxels of the region inside the mask",
            "dice": "over the whole 3-D volume; an organ absent from truth and prediction is left out (null), absent "
            "from the truth alone it counts 0",
            "sd": "sample standard deviation over cases (divided by n - 1), 0 for one case; null is left out",
        },
    }
    return {"conventions": conventions, "cases": dict(cases), "summary": summarise(cases)}


class Region(TypedDict):
    psnr_in_mask: float | None
    psnr_zero_outside: float | None
    mae_hu: float | None
    voxels: int


class CaseMetrics(TypedDict, total=False):
    """One case of metrics.json, see `case_metrics`."""

    ct: dict[str, Region]
    psnr_gain: float
    dice: dict[str, float | None]
    dice_mean: float | None


class Conventions(TypedDict):
    label_names: dict[str, int]
    rules: dict[str, str]


class Metrics(TypedDict):
    """What is read back of a `metrics_document`."""

    conventions: Conventions
    cases: dict[str, CaseMetrics]
    summary: dict[str, Any]


def read_metrics(path: Path, shape: Any = Metrics) -> dict[str, Any]:
    """A `metrics_document` in a file (`shape`: with what was added to it). InputError if it can't be read, is none, has
    regions or organs that it doesn't name, or a summary that is not that of its cases."""
    document = read_json(path, shape)
    if not document["conventions"]["rules"]:
        raise InputError(f"{path}: conventions.rules is empty, expected how the numbers are measured")
    if not document["cases"]:
        raise InputError(f"{path}: cases is empty, expected the metrics of at least one case")
    if names := document["conventions"]["label_names"]:
        check_label_names(names, f"{path}: conventions")
    organs = organ_values(names).keys()
    regions = {"overall", "bones"}
    for name, case in document["cases"].items():
        # (with the CT, the regions of labels are there only where the case has any)
        found = {"ct": (case.get("ct", {}).keys(), regions), "dice": (case.get("dice", {}).keys(), organs)}
        for task, (there, needed) in found.items():
            if task in case and ({"ct": "psnr_gain", "dice": "dice_mean"}[task] not in case or not needed <= there):
                raise InputError(f"{path}: cases.{name}.{task} is incomplete, expected it as evaluate wrote it")
            if unknown := sorted(there - organs - ({*WIDE_REGIONS} if task == "ct" else set())):
                raise InputError(
                    f"{path}: cases.{name}.{task} has {unknown[0]!r}, expected the names of conventions.label_names"
                )
    if not _alike(document["summary"], summarise(document["cases"])):
        raise InputError(f"{path}: summary is not that of its cases, expected it as evaluate wrote it")
    return document


def _alike(a: Any, b: Any) -> bool:
    """The same numbers in the same places, but for rounding on another machine."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, int | float) and isinstance(b, int | float):
        if not finite(a) or not finite(b):
            return False
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a is None and b is None


class Table(NamedTuple):
    """One table in words: its caption, the heading of each column, and the rows' cells (first cell: row heading)."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def summary_tables(document: Mapping[str, Any]) -> list[Table]:
    """Table 1 of the paper for one method: (a) CT synthesis, (b) segmentation; a task that was not scored is left out.

    Cells are `mean (SD)` over the cases, followed by `n=` where some cases lack the region or organ.
    """
    summary, n_cases = document["summary"], len(document["cases"])
    tables = []
    if ct := summary.get("ct"):
        measures = {"psnr_in_mask": ("PSNR in mask [dB]", 2), "psnr_zero_outside": ("PSNR zero outside [dB]", 2)}
        measures["mae_hu"] = ("MAE [HU]", 1)
        rows = [
            [text, *(cell(values[key], digits, n_cases) for values in ct.values())]
            for key, (text, digits) in measures.items()
        ]
        tables.append(Table("(a) CT synthesis, mean (SD)", ["", *map(heading, ct)], rows))
    if "dice" in summary:
        dice = {"overall": summary["dice_mean"], **summary["dice"]}
        row = ["Dice", *(cell(value, 3, n_cases) for value in dice.values())]
        tables.append(Table("(b) Segmentation, mean (SD)", ["", *map(heading, dice)], [row]))
    return tables


def table(document: Mapping[str, Any]) -> str:
    """`summary_tables` as Markdown with aligned columns, fit for a terminal too; ends with a newline."""
    return "\n".join(f"{part.caption}\n\n{markdown(part)}" for part in summary_tables(document))


def markdown(part: Table) -> str:
    """The header and the rows of a table as Markdown with aligned columns; ends with a newline."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (part.header, *part.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        first, *rest = row
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(padded)} |\n")
    return "".join(lines)


def number_at(case: Mapping[str, Any], place: Sequence[str]) -> float | None:
    """The number at a place of a case's metrics, e.g. ("ct", "overall", "mae_hu"); None where there is none."""
    value: Any = case
    for key in place:
        value = (value or {}).get(key)
    return value


def heading(name: str) -> str:
    """The name of a region or organ as a column heading: `left_femur` -> `Left femur`; `CTV` stays."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def organ_values(label_names: Mapping[str, int]) -> dict[str, int]:
    """Name -> label value of each organ: `label_names` without the background, value 0."""
    return {name: value for name, value in label_names.items() if value != 0}


def _ct_metrics(
    true: np.ndarray, pred: np.ndarray, labels: np.ndarray | None, mask: np.ndarray, label_names: Mapping[str, int]
) -> dict[str, Any]:
    regions = {"overall": mask, "bones": mask & (true > BONE_HU)}
    if labels is not None:
        regions["organs"] = mask & (labels != 0)
        regions |= {name: mask & (labels == value) for name, value in organ_values(label_names).items()}
    ct = {name: _region_metrics(true[region], pred[region], mask.size) for name, region in regions.items()}
    inside = true[mask].astype(np.float64)
    baseline = _psnr(max(float(inside.var()), MSE_FLOOR_HU2))  # the variance is the error of predicting the mean
    overall = ct["overall"]["psnr_in_mask"]
    return {"ct": ct, "ct_mean_baseline": {"psnr_in_mask": baseline}, "psnr_gain": overall - baseline}


def _region_metrics(true: np.ndarray, pred: np.ndarray, volume_voxels: int) -> dict[str, Any]:
    """Metrics from the values of the n voxels of one region, [n] each, already clipped."""
    if true.size == 0:
        return {"psnr_in_mask": None, "psnr_zero_outside": None, "mae_hu": None, "voxels": 0}
    error = np.subtract(pred, true, dtype=np.float64)
    mse = max(float(np.mean(error**2)), MSE_FLOOR_HU2)
    return {
        "psnr_in_mask": _psnr(mse),
        # Outside the region both volumes hold the same value: those voxels only enlarge the denominator.
        "psnr_zero_outside": _psnr(mse * true.size / volume_voxels),
        "mae_hu": float(np.mean(np.abs(error))),
        "voxels": int(true.size),
    }


def _psnr(mse: float) -> float:
    return 10 * math.log10(RANGE_HU**2 / mse)


def _dice(true: np.ndarray, pred: np.ndarray) -> float | None:
    """Dice of two boolean volumes; None if both are empty."""
    if not true.any() and not pred.any():
        return None
    from monai.metrics import compute_dice

    y_pred, y = (torch.from_numpy(volume)[None, None] for volume in (pred, true))
    # MONAI would by default ignore an organ that is predicted where there is none; that is an error and counts 0.
    return float(compute_dice(y_pred, y, ignore_empty=False))


def _clipped(name: str, ct: np.ndarray) -> np.ndarray:
    if not np.isfinite(ct).all():
        raise InputError(f"{name} holds {np.count_nonzero(~np.isfinite(ct))} voxels that are not finite, expected HU")
    return np.clip(np.asarray(ct, dtype=np.float32), *CLIP_HU)


def _check_names(label_names: Mapping[str, int]) -> None:
    for name in WIDE_REGIONS:
        if name in label_names:
            raise InputError(f"label_names calls an organ {name!r}, but {WIDE_REGIONS} are regions of their own")


def _check_labels(name: str, labels: np.ndarray | None, label_names: Mapping[str, int]) -> None:
    if labels is None:
        return
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{name} has dtype {labels.dtype}, expected integers")
    unknown = set(np.unique(labels).tolist()) - {0, *label_names.values()}
    if unknown:
        raise InputError(f"{name} holds label {min(unknown)}, expected one of {dict(label_names)}")


def _summarise(values: list[Any]) -> dict[str, Any]:
    """`values`: what the cases hold in one place: all of them dicts (or missing), or all numbers (or None)."""
    branches = [value for value in values if isinstance(value, Mapping)]
    if branches:
        keys = dict.fromkeys(key for branch in branches for key in branch)
        return {key: _summarise([branch.get(key) for branch in branches]) for key in keys}
    return spread([value for value in values if value is not None])


def spread(numbers: Sequence[float]) -> dict[str, Any]:
    """{"mean", "sd", "n"} of numbers, as in `summarise`."""
    if not len(numbers):
        return {"mean": None, "sd": None, "n": 0}
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    return {"mean": float(np.mean(numbers)), "sd": sd, "n": len(numbers)}


def cell(value: Mapping[str, Any], digits: int, n_cases: int) -> str:
    """`mean (SD)` from a `spread`, followed by `n=` where that is not n_cases; a hyphen for n = 0."""
    if value["n"] == 0:
        return "-"
    text = f"{value['mean']:.{digits}f} ({value['sd']:.{digits}f})"
    return text if value["n"] == n_cases else f"{text} n={value['n']}"
