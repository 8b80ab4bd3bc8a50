"""Predictions on disk against a cohort's truth on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

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
from ..data.volumes import onto, read_labels, read_volume
from ..errors import InputError
from ..files import read_json, sha256_of
from .metrics import Metrics, case_metrics, metrics_document, read_metrics

ABOUT = "predictions.json"


class About(TypedDict, total=False):
    """predictions.json: what `predict` says of its predictions.

    labels, channels: names of label values and of MR channels. digest: of the checkpoint `checkpoint`; with `draws`,
    `by` and `patch` it says how the CT and the labels came about. cases: for each case the SHA-256 of its MR files; it
    stands here before the case's folder appears. finished: whether all cases that were asked for are there.
    """

    labels: dict[str, int]
    channels: list[str]
    checkpoint: str
    digest: str
    draws: int
    by: str
    patch: list[int] | None
    cases: dict[str, list[str]]
    finished: bool


class Evaluated(Metrics):
    """metrics.json of `evaluate`: for each predicted case also the SHA-256 of the files that were read, by name."""

    predictions: dict[str, dict[str, str]]


def evaluate(predictions: Path, cohort: Cohort) -> dict[str, Any]:
    """Metrics of every case that has a folder in `predictions`; the content of metrics.json.

    InputError if nothing matches, or a prediction is unreadable, on another grid than its case, or of other labels.
    """
    from tqdm import tqdm

    predicted = predicted_cases(predictions, cohort)
    about = about_predictions(predictions)
    if about.get("finished") is False:
        warnings.warn(f"{predictions}: predict was interrupted there, some cases may lack", stacklevel=2)
    if names := about.get("labels"):
        where = str(predictions / ABOUT)
        check_same_labels(check_label_names(names, where), cohort, where)
    label_names = cohort.label_names or _names_found(predictions, predicted)
    cases, read = {}, {}
    for case in tqdm(predicted, desc="evaluate", unit="case"):
        truth = load_case(case, label_names)
        ct, labels = read_prediction(predictions, case, truth)
        read[case.name] = _hashes(predictions / case.name)
        if (ct is None or truth.ct is None) and (labels is None or truth.labels is None):
            continue  # nothing to compare with
        try:
            cases[case.name] = case_metrics(truth.ct, ct, truth.labels, labels, mask_of(truth), label_names)
        except InputError as error:
            raise InputError(f"case {case.name}: {error}") from error
    if not cases:
        raise InputError(f"{cohort.root}: no predicted case has a CT or labels to compare with")
    return {**metrics_document(cases, label_names), "predictions": read}


def read_evaluated(metrics: Path, predictions: Path, predicted: Sequence[Case]) -> dict[str, Any]:
    """metrics.json of these very predictions. InputError if it can't be read, or is of other ones."""
    document = read_metrics(metrics, Evaluated)
    read, now = document["predictions"], {case.name: _hashes(predictions / case.name) for case in predicted}
    for name in sorted(read.keys() | now.keys()):
        if name not in read or name not in now:
            where, other = (predictions, metrics) if name in now else (metrics, predictions)
            raise InputError(f"{metrics}: case {name} is in {where}, but not in {other}; run evaluate again")
        for file in sorted(read[name].keys() | now[name].keys()):
            if read[name].get(file) != now[name].get(file):
                path = predictions / name / file
                raise InputError(f"{metrics}: it was not made from {path} as it is now; run evaluate again")
    return document


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files of a predicted case that are compared."""
    paths = [folder / f"{name}.nii.gz" for name in ("ct", "labels")]
    return {path.name: sha256_of(path) for path in paths if path.exists()}


def predicted_cases(folder: Path, cohort: Cohort) -> list[Case]:
    """The cohort's cases that have a folder there. InputError if none has."""
    predicted = [case for case in cohort.cases if (folder / case.name).is_dir()]
    if not predicted:
        what = "prediction of a case of the cohort (CASE/ct.nii.gz, CASE/labels.nii.gz)"
        raise InputError(f"{folder}: holds no {what}")
    return predicted


def about_predictions(folder: Path) -> About:
    """What `predict` says of its predictions. Nothing of others'."""
    path = folder / ABOUT
    return read_json(path, About) if path.exists() else {}


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
        if (turned := onto(truth.grid, array, grid)) is None:
            raise InputError(f"{path}: grid {grid}, expected that of {case.inputs[0]}: {truth.grid}")
        found.append(turned)
    if all(array is None for array in found):
        raise InputError(f"{folder / case.name}: holds neither ct.nii.gz nor labels.nii.gz")
    return found[0], found[1]
