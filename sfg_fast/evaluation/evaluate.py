"""Predictions on disk against a cohort's truth on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..data.cohort import (
    Case,
    Cohort,
    LoadedCase,
    check_label_names,
    check_same_labels,
    load_case,
    unnamed_labels,
)
from ..data.preprocessing import body_mask
from ..data.volumes import read_labels, read_volume, same_grid
from ..errors import InputError
from ..files import read_json
from .metrics import case_metrics, metrics_document

ABOUT = "predictions.json"


def evaluate(predictions: Path, cohort: Cohort) -> dict[str, Any]:
    """Metrics of every case that has a folder in `predictions`; the content of metrics.json.

    InputError if nothing matches, or a prediction is unreadable, on another grid than its case, or of other labels.
    """
    from tqdm import tqdm

    predicted = predicted_cases(predictions, cohort)
    about = about_predictions(predictions)
    if about.get("finished") is False:
        warnings.warn(f"{predictions}: predict was interrupted there, some cases may lack", stacklevel=2)
    if labels := about.get("labels"):
        where = str(predictions / ABOUT)
        check_same_labels(check_label_names(labels, where), cohort, where)
    label_names = cohort.label_names or _names_found(predictions, predicted)
    cases = {}
    for case in tqdm(predicted, desc="evaluate", unit="case"):
        truth = load_case(case, label_names)
        ct, labels = read_prediction(predictions, case, truth)
        if (ct is None or truth.ct is None) and (labels is None or truth.labels is None):
            continue  # nothing to compare with
        try:
            cases[case.name] = case_metrics(truth.ct, ct, truth.labels, labels, mask_of(truth), label_names)
        except InputError as error:
            raise InputError(f"case {case.name}: {error}") from error
    if not cases:
        raise InputError(f"{cohort.root}: no predicted case has a CT or labels to compare with")
    return metrics_document(cases, label_names)


def predicted_cases(folder: Path, cohort: Cohort) -> list[Case]:
    """The cohort's cases that have a folder there. InputError if none has."""
    predicted = [case for case in cohort.cases if (folder / case.name).is_dir()]
    if not predicted:
        what = "prediction of a case of the cohort (CASE/ct.nii.gz, CASE/labels.nii.gz)"
        raise InputError(f"{folder}: holds no {what}")
    return predicted


def about_predictions(folder: Path) -> dict[str, Any]:
    """What `predict` says of its predictions: names of labels, checkpoint, draws, by, finished. Nothing of others'."""
    path = folder / ABOUT
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object")
    return found


def _names_found(predictions: Path, cases: list[Case]) -> dict[str, int]:
    """For a cohort that doesn't name its labels: label_1, label_2, .. as in preprocessing."""
    paths = [predictions / case.name / "labels.nii.gz" for case in cases]
    paths = [path for path in paths if path.exists()] + [case.labels for case in cases if case.labels is not None]
    return unnamed_labels(max(int(read_labels(path)[0].max()) for path in paths)) if paths else {}


def mask_of(case: LoadedCase) -> np.ndarray:
    """The body mask bool [Z, Y, X] as in preprocessing: the case's own, else from its CT, else everything."""
    if case.mask is not None:
        return case.mask
    if case.ct is not None:
        return body_mask(case.ct)
    return np.ones(case.inputs.shape[1:], bool)


def read_prediction(folder: Path, case: Case, truth: LoadedCase) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(ct in HU, labels) of a predicted case, [Z, Y, X], None where there is no such file."""
    found: list[np.ndarray | None] = []
    for name, reader in (("ct", read_volume), ("labels", read_labels)):
        path = folder / case.name / f"{name}.nii.gz"
        if not path.exists():
            found.append(None)
            continue
        array, grid = reader(path)
        if not same_grid(grid, truth.grid):
            raise InputError(f"{path}: grid {grid}, expected that of {case.inputs[0]}: {truth.grid}")
        found.append(array)
    if all(array is None for array in found):
        raise InputError(f"{folder / case.name}: holds neither ct.nii.gz nor labels.nii.gz")
    return found[0], found[1]
