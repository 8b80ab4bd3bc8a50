"""Compares predictions on disk with a cohort's truth on disk."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..data.cases import Case, Cohort, LoadedCase
from ..data.cohort import check_same_targets, files, load_case, unnamed_labels
from ..data.lists import csv_rows
from ..data.preprocessing import body_mask
from ..data.targets import HU, Target
from ..data.volumes import Grid, onto, read_labels, read_volume, volume_files
from ..errors import InputError
from ..files import read_json, sha256_of
from ..tasks import PAPER, Task, TaskAsJson, check_profile, file_stems, from_json, leading, measured_by, own_tasks
from ..tasks.task import Scene
from ..training.config import difference
from .metrics import Metrics, case_metrics, metrics_document, read_metrics, tasks_of

ABOUT = "predictions.json"
TABLE = "predictions.csv"
CHECKPOINTS = ("final", "best")
Hashes = dict[str, dict[str, list[str]]]  # {case: {what the files are: the SHA-256 of each}}


class About(TypedDict, total=False):
    """The content of predictions.json: what `predict` says of its predictions.

    tasks: the tasks that were predicted. channels: the names of the inputs' channels. digest: the digest of the
    checkpoint `checkpoint`; together with `draws`, `by`, `statistics` and `patch` it says how the predictions were
    made. cases: for each case the SHA-256 of its MR files, or of its image. files: for each case the SHA-256 of the
    files in its folder, by name. Both are written before the folder appears. table: the SHA-256 of predictions.csv,
    which images have; it is written before the table appears. finished: whether all cases that were asked for are
    there.
    """

    channels: list[str]
    checkpoint: str
    digest: str
    draws: int
    by: str
    statistics: str
    patch: list[int] | None
    tasks: dict[str, TaskAsJson]
    cases: dict[str, list[str]]
    files: dict[str, dict[str, str]]
    table: str
    finished: bool


class Evaluated(Metrics):
    """The content of metrics.json as `evaluate` makes it: the metrics, and what was compared.

    predictions: for each predicted case the SHA-256 of its files, by name; for images that of their table, under "".
    cohort: for each case the SHA-256 of its files by what they are; for an image its true values.
    """

    predictions: dict[str, dict[str, str]]
    cohort: Hashes


# --- metrics.json -----------------------------------------------------------------------------------------------------


def evaluate(predictions: Path, cohort: Cohort, metrics: str = PAPER) -> dict[str, Any]:
    """Measures every case that has a prediction in the folder `predictions`; returns the content of metrics.json.

    metrics: the profile that says what is measured, and how (`tasks.PROFILES`: "paper", "synthrad2025").
    Raises InputError if there is nothing to compare, if a prediction can't be read, lies on another grid than its case,
    belongs to other targets or files than the cohort's, or isn't as `predict` wrote it; and for a profile that there
    is not, or that doesn't measure one of the tasks.
    """
    check_profile(metrics)  # an unknown profile is refused before files are read
    about = about_predictions(predictions)
    predicted = predicted_cases(predictions, cohort, about)
    if about.get("finished") is False:
        warnings.warn(f"{predictions}: predict was interrupted there, some cases may lack", stacklevel=2)
    described, targets = predicted_tasks(predictions, cohort, predicted, about)
    tasks = measured_by(described, metrics)
    score = _score_images if cohort.images else _score_volumes
    cases = {name: found for name, found in score(predictions, predicted, tasks, targets).items() if found}
    if not cases:
        raise InputError(f"{cohort.root}: no predicted case has anything to compare with")
    return {
        **metrics_document(cases, tasks),
        "predictions": _hashes(predictions, predicted, tasks),
        "cohort": {case.name: _compared(case) for case in predicted},
    }


def _score_volumes(
    folder: Path, cases: Sequence[Case], tasks: Mapping[str, Task], targets: Mapping[str, Target]
) -> dict[str, Any]:
    from tqdm import tqdm

    scored = {}
    for case in tqdm(cases, desc="evaluate", unit="case"):
        truth = load_case(case, targets)
        predicted = read_prediction(folder, case, truth, tasks)
        try:
            scored[case.name] = case_metrics(tasks, truth.targets, predicted, scene_of(truth, targets))
        except InputError as error:
            raise InputError(f"case {case.name}: {error}") from error
    return scored


def _score_images(
    folder: Path, cases: Sequence[Case], tasks: Mapping[str, Task], targets: Mapping[str, Target]
) -> dict[str, Any]:
    path, stems = folder / TABLE, file_stems(tasks)
    columns, rows = read_table(path)
    if not any(stem in columns for stem in stems.values()):
        expected = f"expected case and {' or '.join(stems.values())}"
        raise InputError(f"{path}: columns {', '.join(columns)}, {expected}")
    scored = {}
    for case in cases:
        cells = dict(zip(columns, rows[case.name], strict=True))
        predicted = {}
        for name, stem in stems.items():
            if cell := cells.get(stem):
                try:
                    predicted[name] = tasks[name].value(cell)
                except ValueError as error:
                    expected = (
                        f"one of {', '.join(tasks[name].of.names)}" if tasks[name].of.names else "a finite number"
                    )
                    said = f"{stem} of case {case.name} is {cell!r}, expected {expected}"
                    raise InputError(f"{path}: {said}") from error
        scored[case.name] = case_metrics(tasks, case.values, predicted, None)
    return scored


def read_evaluated(
    metrics: Path, predictions: Path, cohort: Cohort, predicted: Sequence[Case], tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """The content of a metrics.json. Raises InputError if the file can't be read, or wasn't made from these very
    predictions and this very cohort.

    predicted: the cases that have predictions. tasks: the tasks that the metrics must be of.
    """
    document = read_metrics(metrics, Evaluated)
    read, now = document["predictions"], _hashes(predictions, predicted, tasks)
    for name in sorted(read.keys() | now.keys()):
        if name not in read or name not in now:
            where, other = (predictions, metrics) if name in now else (metrics, predictions)
            raise InputError(f"{metrics}: case {name} is in {where}, but not in {other}; run evaluate again")
        for file in sorted(read[name].keys() | now[name].keys()):
            if read[name].get(file) != now[name].get(file):
                path = predictions / name / file
                raise InputError(f"{metrics}: it was not made from {path} as it is now; run evaluate again")
    for case in predicted:
        if document["cohort"].get(case.name) != _compared(case):
            what = f"values than those of {cohort.source}"
            if not cohort.images:
                what = f"files than those in {case.inputs[0].parent}"
            raise InputError(f"{metrics}: case {case.name} was compared with other {what}; run evaluate again")
    if found := tasks_differ(tasks_of(document), tasks):
        key, there, own = found
        raise InputError(f"{metrics}: conventions.tasks.{key} is {there!r}, the cohort's {own!r}; run evaluate again")
    return document


def tasks_differ(these: Mapping[str, Task], others: Mapping[str, Task]) -> tuple[str, Any, Any] | None:
    """The first place in which two descriptions of tasks differ, such as "ct.kind", and what each has there; None if
    they are the same."""
    here, there = ({name: dataclasses.asdict(task) for name, task in tasks.items()} for tasks in (these, others))
    return difference(here, there)


def _hashes(folder: Path, cases: Sequence[Case], tasks: Mapping[str, Task]) -> dict[str, dict[str, str]]:
    """The SHA-256 of the predictions' files that are compared: {case: {name: hash}}, for images {"": {TABLE: hash}}."""
    if next(iter(tasks.values())).per_image:
        return {"": {TABLE: sha256_of(folder / TABLE)}}
    names = [file_name(tasks, name) for name in tasks]
    paths = {case.name: [folder / case.name / name for name in names] for case in cases}
    return {case: {path.name: sha256_of(path) for path in found if path.exists()} for case, found in paths.items()}


def _compared(case: Case) -> dict[str, list[str]]:
    """What predictions of a case are compared with: the hashes of its files, or the values of an image."""
    if case.values:
        return {target: [repr(value)] for target, value in case.values.items()}
    return {
        role: [sha256_of(file) for path in paths for file in volume_files(path)] for role, paths in files(case).items()
    }


def hashes_of_inputs(case: Case) -> list[str]:
    """The SHA-256 of the case's MR files, and of the files that hold their voxels; or of its image."""
    return [sha256_of(file) for path in case.inputs for file in volume_files(path)]


# --- what is there ----------------------------------------------------------------------------------------------------


def predicted_cases(folder: Path, cohort: Cohort, about: About) -> list[Case]:
    """The cohort's cases that have a prediction in `folder`: a folder of their name, or for images a row of the table.

    about: what `predict` says of the predictions. Raises InputError if no case has a prediction, if a case was
    predicted from other files than the cohort's, or if a prediction is no longer as `predict` wrote it.
    """
    if cohort.images:
        return _predicted_images(folder, cohort, about)
    predicted = [case for case in cohort.cases if (folder / case.name).is_dir()]
    if not predicted:
        names = about_tasks(about) or own_tasks(cohort.targets)
        what = ", ".join(f"CASE/{file_name(names, name)}" for name in names)
        raise InputError(f"{folder}: holds no prediction of a case of the cohort ({what})")
    for case in cohort.cases if "digest" in about else ():
        _check_as_predicted(folder, case, about)
    return predicted


def _predicted_images(folder: Path, cohort: Cohort, about: About) -> list[Case]:
    path = folder / TABLE
    if not path.exists() and about.get("finished") is False:
        raise InputError(f"{folder}: predict was interrupted there, expected {TABLE}; predict --resume goes on")
    if "digest" in about and about.get("table") != sha256_of(path):
        raise InputError(f"{path}: not as predict wrote it; predict --resume makes it again")
    _, rows = read_table(path)
    predicted = [case for case in cohort.cases if case.name in rows]
    if not predicted:
        raise InputError(f"{path}: holds no prediction of an image of the cohort")
    for case in predicted if "digest" in about else ():
        if about.get("cases", {}).get(case.name) != hashes_of_inputs(case):
            raise _of_another("image", folder, case)
    return predicted


def read_table(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The columns of a table of predictions of images, and the cells of each row by case. Raises InputError for a table
    that can't be read, has no column `case`, or has a case twice."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    columns: list[str] = []
    rows: dict[str, list[str]] = {}
    for where, row in csv_rows(path)[0]:
        columns = list(row)
        if "case" not in row:
            raise InputError(f"{path}: columns {', '.join(columns)}, expected one that is called case")
        if row["case"] in rows:
            raise InputError(f"{where}: case {row['case']} is there twice, expected once")
        rows[row["case"]] = list(row.values())
    return columns, rows


def _check_as_predicted(folder: Path, case: Case, about: About) -> None:
    """Raises InputError for a predicted case that isn't as `predict` wrote it, that belongs to another cohort, or that
    is gone."""
    path, listed = folder / case.name, case.name in about.get("cases", {})
    if not path.is_dir():
        if listed and about.get("finished"):
            raise InputError(f"{path}: no such folder, but {ABOUT} lists the case; predict --resume makes it again")
        return
    if not listed:
        where = f"{folder / ABOUT}: there is a folder {case.name}, but no such case is listed"
        raise InputError(f"{where}, expected the predictions of one run alone")
    if about["cases"][case.name] != hashes_of_inputs(case):
        raise _of_another("MR", folder, case)
    if wrong := file_that_differs(path, about.get("files", {}).get(case.name, {})):
        what = "not as predict wrote it" if wrong.exists() else f"no such file, but {ABOUT} lists it"
        raise InputError(f"{wrong}: {what}; predict --resume makes it again")


def _of_another(what: str, folder: Path, case: Case) -> InputError:
    said = f"case {case.name} was predicted from another {what} than {case.inputs[0]}"
    return InputError(f"{folder / ABOUT}: {said}, expected the cohort that was predicted")


def file_that_differs(folder: Path, listed: Mapping[str, str]) -> Path | None:
    """The first file of a predicted case that is gone, that isn't listed, or whose hash is another than listed; None if
    there is none. listed: {name: SHA-256}."""
    there = {path.name for path in folder.glob("*.nii.gz")}
    for name in sorted(there | listed.keys()):
        if name not in there or name not in listed or sha256_of(folder / name) != listed[name]:
            return folder / name
    return None


# --- what it is -------------------------------------------------------------------------------------------------------


def about_predictions(folder: Path) -> About:
    """What `predict` says of its predictions; {} for a folder that `predict` didn't make. Raises InputError if
    predictions.json can't be read, or can't be what `predict` wrote."""
    path = folder / ABOUT
    if not path.exists():
        return {}
    about: About = read_json(path, About)
    try:
        about_tasks(about)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if about.get("checkpoint", "final") not in CHECKPOINTS:
        raise InputError(f"{path}: checkpoint is {about['checkpoint']!r}, expected {' or '.join(CHECKPOINTS)}")
    return about


def about_tasks(about: About) -> dict[str, Task]:
    """The tasks that `predict` says it predicted; {} for predictions that it didn't make."""
    return from_json(about["tasks"]) if "tasks" in about else {}


def predicted_tasks(
    folder: Path, cohort: Cohort, predicted: Sequence[Case], about: About
) -> tuple[dict[str, Task], dict[str, Target]]:
    """The tasks of predictions, and the cohort's targets.

    The tasks are those that `predict` says it predicted, else there is one for each target of the cohort. Labels that
    the cohort doesn't name get the names of the run, else label_1, label_2, .. as in preprocessing.
    Raises InputError if the tasks learnt other targets than the cohort's, or if the cohort has no target.
    """
    tasks = about_tasks(about) or own_tasks(cohort.targets)
    if not tasks:
        raise InputError(f"{cohort.root}: it has no target, expected something to compare with")
    check_same_targets({task.target: task.of for task in tasks.values()}, cohort, str(folder / ABOUT))
    targets = dict(cohort.targets)
    for key, target in targets.items():
        if target.kind == "labels" and not target.names:
            own = {name: task for name, task in tasks.items() if task.target == key}
            names = next((task.of.names for task in own.values()), {})
            if names == unnamed_labels(len(names) - 1) or not names:
                files = [folder / case.name / file_name(tasks, name) for case in predicted for name in own]
                files = [path for path in files if path.exists()]
                files += [case.targets[key] for case in predicted if key in case.targets]
                names = unnamed_labels(max((int(read_labels(path)[0].max()) for path in files), default=0))
            targets[key] = dataclasses.replace(target, names=names)
    for name, task in tasks.items():
        if task.of.kind == "labels" and task.target in targets:
            about_it = dataclasses.replace(task.of, names=targets[task.target].names)
            tasks[name] = dataclasses.replace(task, about=about_it)
    return tasks, targets


def file_name(tasks: Mapping[str, Task], name: str, key: str = "") -> str:
    """The name of a file in the folder of a case: that of a task's prediction, or with `key` that of what else the task
    predicts (a key of `Task.predicted`, such as "uncertainty")."""
    stem = file_stems(tasks)[name]
    if not key:
        return f"{stem}.nii.gz"
    return f"{key}.nii.gz" if name == leading(tasks) else f"{key}_{stem}.nii.gz"


# --- volumes ----------------------------------------------------------------------------------------------------------


def scene_of(case: LoadedCase, targets: Mapping[str, Target]) -> Scene:
    """Where the volumes of a case are measured: its body mask, regions from its first label map, and the spacing of its
    grid."""
    regions = {}
    name = next((name for name, target in targets.items() if target.kind == "labels"), None)
    if name is not None and name in case.targets:
        labels = case.targets[name]
        regions = {"organs": labels != 0}
        regions |= {label: labels == value for label, value in targets[name].names.items() if value != 0}
    return Scene(mask_of(case, targets), regions, case.grid.spacing)


def mask_of(case: LoadedCase, targets: Mapping[str, Target]) -> np.ndarray:
    """The body mask, bool [Z, Y, X], as in preprocessing: the case's own, else that of its CT, else everything."""
    if case.mask is not None:
        return case.mask
    for name, volume in case.targets.items():
        if targets[name].unit == HU:
            return body_mask(volume)
    return np.ones(case.inputs.shape[1:], bool)


def read_prediction(folder: Path, case: Case, truth: LoadedCase, tasks: Mapping[str, Task]) -> dict[str, np.ndarray]:
    """The predictions of a case that are there, by task, [Z, Y, X] with the axes of `truth`. Raises InputError if there
    is none, or if one can't be read or lies on another grid."""
    names = {name: file_name(tasks, name) for name in tasks}
    reader = {name: read_labels if task.reads == "labels" else read_volume for name, task in tasks.items()}
    found = {name: _read(folder / case.name / file, reader[name], case, truth) for name, file in names.items()}
    there = {name: array for name, array in found.items() if array is not None}
    if not there:
        what = ("neither " if len(names) > 1 else "no ") + " nor ".join(names.values())
        raise InputError(f"{folder / case.name}: holds {what}")
    return there


def read_uncertainty(folder: Path, case: Case, truth: LoadedCase, tasks: Mapping[str, Task]) -> dict[str, np.ndarray]:
    """The uncertainty of the predictions of a case, by task, [Z, Y, X], where there is one. Raises InputError as
    `read_prediction` does, but not if there is none."""
    paths = {name: folder / case.name / file_name(tasks, name, "uncertainty") for name in tasks}
    found = {name: _read(path, read_volume, case, truth) for name, path in paths.items()}
    return {name: array for name, array in found.items() if array is not None}


def _read(
    path: Path, read: Callable[[Path], tuple[np.ndarray, Grid]], case: Case, truth: LoadedCase
) -> np.ndarray | None:
    if not path.exists():
        return None
    array, grid = read(path)
    if (turned := onto(truth.grid, array, grid)) is None:
        raise InputError(f"{path}: grid {grid}, expected that of {case.inputs[0]}: {truth.grid}")
    return turned
