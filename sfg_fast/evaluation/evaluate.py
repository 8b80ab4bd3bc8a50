"""Predictions on disk against a cohort's truth on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..data.cohort import (
    Case,
    Cohort,
    LoadedCase,
    check_label_names,
    check_same_labels,
    files,
    load_case,
    unnamed_labels,
)
from ..data.preprocessing import body_mask
from ..data.volumes import Grid, onto, read_labels, read_volume, volume_files
from ..errors import InputError
from ..files import read_json, sha256_of
from .metrics import Metrics, case_metrics, metrics_document, read_metrics

ABOUT = "predictions.json"
CHECKPOINTS = ("final", "best")
Hashes = dict[str, dict[str, list[str]]]  # for each case the SHA-256 of its files by what they are


class About(TypedDict, total=False):
    """predictions.json: what `predict` says of its predictions.

    labels, channels: names of label values and of MR channels. digest: of the checkpoint `checkpoint`; with `draws`,
    `by` and `patch` it says how the CT and the labels came about. cases: for each case the SHA-256 of its MR files;
    files: for each case the SHA-256 of the files in its folder, by name; both stand here before the folder appears.
    finished: whether all cases that were asked for are there.
    """

    labels: dict[str, int]
    channels: list[str]
    checkpoint: str
    digest: str
    draws: int
    by: str
    patch: list[int] | None
    cases: dict[str, list[str]]
    files: dict[str, dict[str, str]]
    finished: bool


class Evaluated(Metrics):
    """metrics.json of `evaluate`: for each predicted case also the SHA-256 of the files that were compared: of the
    prediction by name, of the cohort's by what they are."""

    predictions: dict[str, dict[str, str]]
    cohort: Hashes


def evaluate(predictions: Path, cohort: Cohort) -> dict[str, Any]:
    """Metrics of every case that has a folder in `predictions`; the content of metrics.json.

    InputError if nothing matches, or a prediction is unreadable, on another grid than its case, of other labels or MR
    files than the cohort's, or not as `predict` wrote it.
    """
    from tqdm import tqdm

    about = about_predictions(predictions)
    predicted = predicted_cases(predictions, cohort, about)
    if about.get("finished") is False:
        warnings.warn(f"{predictions}: predict was interrupted there, some cases may lack", stacklevel=2)
    if names := about.get("labels"):
        check_same_labels(names, cohort, str(predictions / ABOUT))
    label_names = cohort.label_names or _names_found(predictions, predicted)
    cases, read, compared = {}, {}, {}
    for case in tqdm(predicted, desc="evaluate", unit="case"):
        truth = load_case(case, label_names)
        ct, labels = read_prediction(predictions, case, truth)
        read[case.name] = _hashes(predictions / case.name)
        compared[case.name] = _hashes_of(case)
        if (ct is None or truth.ct is None) and (labels is None or truth.labels is None):
            continue  # nothing to compare with
        try:
            cases[case.name] = case_metrics(truth.ct, ct, truth.labels, labels, mask_of(truth), label_names)
        except InputError as error:
            raise InputError(f"case {case.name}: {error}") from error
    if not cases:
        raise InputError(f"{cohort.root}: no predicted case has a CT or labels to compare with")
    return {**metrics_document(cases, label_names), "predictions": read, "cohort": compared}


def read_evaluated(metrics: Path, predictions: Path, cohort: Cohort, predicted: Sequence[Case]) -> dict[str, Any]:
    """metrics.json of these very predictions, compared with this cohort. InputError if it can't be read, or is of other
    ones."""
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
    for case in predicted:
        if document["cohort"].get(case.name) != _hashes_of(case):
            where = case.inputs[0].parent
            raise InputError(
                f"{metrics}: case {case.name} was compared with other files than those in {where}; run evaluate again"
            )
    names = document["conventions"]["label_names"]
    if cohort.label_names and names != cohort.label_names:
        raise InputError(
            f"{metrics}: conventions.label_names {names}, the cohort's are {cohort.label_names}; run evaluate again"
        )
    return document


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files of a predicted case that are compared."""
    paths = [folder / f"{name}.nii.gz" for name in ("ct", "labels")]
    return {path.name: sha256_of(path) for path in paths if path.exists()}


def hashes_of_mr(case: Case) -> list[str]:
    """Of the case's MR files, and of those that hold their voxels."""
    return _hashes_of(case)["mr"]


def _hashes_of(case: Case) -> dict[str, list[str]]:
    return {
        role: [sha256_of(file) for path in paths for file in volume_files(path)] for role, paths in files(case).items()
    }


def predicted_cases(folder: Path, cohort: Cohort, about: About) -> list[Case]:
    """The cohort's cases that have a folder there. InputError if none has; or if `about`, what predict says of them,
    says that a case is of other MR files than the cohort's, or that its files are others."""
    predicted = [case for case in cohort.cases if (folder / case.name).is_dir()]
    if not predicted:
        what = "prediction of a case of the cohort (CASE/ct.nii.gz, CASE/labels.nii.gz)"
        raise InputError(f"{folder}: holds no {what}")
    for case in cohort.cases if "digest" in about else ():
        _check_as_predicted(folder, case, about)
    return predicted


def _check_as_predicted(folder: Path, case: Case, about: About) -> None:
    """InputError for a case that is there, but not as predict wrote it, or of another cohort; or that is gone."""
    path, listed = folder / case.name, case.name in about.get("cases", {})
    if not path.is_dir():
        if listed and about.get("finished"):
            raise InputError(f"{path}: no such folder, but {ABOUT} lists the case; predict --resume makes it again")
        return
    if not listed:
        where = f"{folder / ABOUT}: there is a folder {case.name}, but no such case is listed"
        raise InputError(f"{where}, expected the predictions of one run alone")
    if about["cases"][case.name] != hashes_of_mr(case):
        raise InputError(
            f"{folder / ABOUT}: case {case.name} was predicted from another MR than {case.inputs[0]}, expected the "
            "cohort that was predicted"
        )
    if wrong := file_that_differs(path, about.get("files", {}).get(case.name, {})):
        what = "not as predict wrote it" if wrong.exists() else f"no such file, but {ABOUT} lists it"
        raise InputError(f"{wrong}: {what}; predict --resume makes it again")


def file_that_differs(folder: Path, listed: Mapping[str, str]) -> Path | None:
    """The first file of a predicted case that is gone, another than `predict` listed with its hash, or not listed."""
    there = {path.name for path in folder.glob("*.nii.gz")}
    for name in sorted(there | listed.keys()):
        if name not in there or name not in listed or sha256_of(folder / name) != listed[name]:
            return folder / name
    return None


def about_predictions(folder: Path) -> About:
    """What `predict` says of its predictions. Nothing of others'. InputError if that can't be."""
    path = folder / ABOUT
    if not path.exists():
        return {}
    about: About = read_json(path, About)
    if names := about.get("labels"):
        check_label_names(names, str(path))
    if about.get("checkpoint", "final") not in CHECKPOINTS:
        raise InputError(f"{path}: checkpoint is {about['checkpoint']!r}, expected {' or '.join(CHECKPOINTS)}")
    return about


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
    ct, labels = _read(folder, "ct", read_volume, case, truth), _read(folder, "labels", read_labels, case, truth)
    if ct is None and labels is None:
        raise InputError(f"{folder / case.name}: holds neither ct.nii.gz nor labels.nii.gz")
    return ct, labels


def read_uncertainty(folder: Path, case: Case, truth: LoadedCase) -> np.ndarray | None:
    """The uncertainty of a predicted case, [Z, Y, X], None where there is none."""
    return _read(folder, "uncertainty", read_volume, case, truth)


def _read(
    folder: Path,
    name: str,
    read: Callable[[Path], tuple[np.ndarray, Grid]],
    case: Case,
    truth: LoadedCase,
) -> np.ndarray | None:
    path = folder / case.name / f"{name}.nii.gz"
    if not path.exists():
        return None
    array, grid = read(path)
    if (turned := onto(truth.grid, array, grid)) is None:
        raise InputError(f"{path}: grid {grid}, expected that of {case.inputs[0]}: {truth.grid}")
    return turned
