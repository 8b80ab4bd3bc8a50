"""The numbers of a cohort: the metrics of each task for each case, and mean (SD) over the cases.

A PSNR means nothing without its clip, its range and its mask. So the rules of every task travel with the numbers
(`metrics_document`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ..errors import InputError
from ..files import finite, one_line, read_json, shown
from ..tables import Table, cell, markdown, number_at, spread
from ..tasks import PAPER, Task, TaskAsJson, from_json, measured_by, profile_of, to_json
from ..tasks.task import Measure, Scene

SD_RULE = "sample standard deviation over cases (divided by n - 1), 0 for one case; null is left out"
_OWN_REGIONS = ("overall", "bones")  # regions that come from the volume itself, not from labels


def case_metrics(
    tasks: Mapping[str, Task], true: Mapping[str, Any], predicted: Mapping[str, Any], scene: Scene | None
) -> dict[str, Any]:
    """The metrics of one case: {task: `Task.metrics`}, without the tasks that lack their truth or their prediction.

    Args:
        tasks: the tasks by name; each is measured by its own profile (`tasks.measured_by`).
        true: the truth by the names of targets: volumes [Z, Y, X], or the values of an image.
        predicted: the predictions by the names of tasks: volumes [Z, Y, X], or the values of an image.
        scene: where volumes are measured; None for images.

    Raises:
        InputError: shapes differ, the mask is empty, or a task can't score the values.
    """
    pairs = {
        name: (true[task.target], predicted[name])
        for name, task in tasks.items()
        if true.get(task.target) is not None and predicted.get(name) is not None
    }
    if scene is not None:
        if not scene.mask.any():
            raise InputError("the mask is empty, expected voxels to score")
        for name, pair in pairs.items():
            for which, volume in zip(("true", "predicted"), pair, strict=True):
                if volume.shape != scene.mask.shape:
                    what = f"the {which} {tasks[name].target} has shape {volume.shape}"
                    raise InputError(f"{what}, expected that of the mask, {scene.mask.shape}")
    return {name: tasks[name].metrics(*pair, scene) for name, pair in pairs.items()}


def summarise(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean and SD over the cases of every number in their `case_metrics`.

    Args:
        cases: case name -> its `case_metrics`.

    Returns:
        The layout of one case with `{"mean", "sd", "n"}` in the place of each number. None (an empty region, an absent
        organ) and words are left out; n counts the numbers that are left. The SD is the sample's (divided by n - 1),
        and 0 for n = 1; for n = 0 mean and SD are None.

    Raises:
        InputError: there is no case.
    """
    if not cases:
        raise InputError("no case to summarise")
    return _summarise(list(cases.values()))


def _summarise(values: list[Any]) -> dict[str, Any]:
    """The summary of one place of the layout. values: what the cases hold there, all of them dicts (or missing), or all
    of them numbers (or None)."""
    branches = [value for value in values if isinstance(value, Mapping)]
    if branches:
        keys = dict.fromkeys(key for branch in branches for key in branch)
        found = {key: [branch.get(key) for branch in branches] for key in keys}
        return {
            key: _summarise(below) for key, below in found.items() if not any(isinstance(one, str) for one in below)
        }
    return spread([value for value in values if value is not None])


# --- metrics.json -----------------------------------------------------------------------------------------------------


class TaskConventions(TaskAsJson):
    """What a task is, and in words what it is called in tables and how its numbers are measured."""

    title: str
    rules: dict[str, str]


class Measured(TypedDict, total=False):
    """The profile of the numbers. Files from before there were several profiles lack it; theirs is the paper's."""

    metrics: str


class Conventions(Measured):
    """What the numbers of a `metrics_document` mean: its tasks by name, its profile, and the rules that all tasks have
    in common."""

    tasks: dict[str, TaskConventions]
    rules: dict[str, str]


class Metrics(TypedDict):
    """What is read back of a `metrics_document`. cases: the `case_metrics` of each case, by name."""

    conventions: Conventions
    cases: dict[str, dict[str, dict[str, Any]]]
    summary: dict[str, Any]


def metrics_document(cases: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The content of metrics.json: `{"conventions": ..., "cases": cases, "summary": summarise(cases)}`.

    It is strictly valid JSON (no NaN, no infinity) and can be read without this package: the conventions say in words
    what each number means, name the profile of metrics that the tasks are measured by, and describe the tasks. Raises
    InputError if there is no case.
    """
    about = {
        name: {"title": tasks[name].title, **one, "rules": tasks[name].rules()} for name, one in to_json(tasks).items()
    }
    conventions = {"metrics": profile_of(tasks), "tasks": about, "rules": {"sd": SD_RULE}}
    return {"conventions": conventions, "cases": dict(cases), "summary": summarise(cases)}


def read_metrics(path: Path, shape: Any = Metrics) -> dict[str, Any]:
    """Reads a `metrics_document` from a file. shape: its type, `Metrics` or one with more in it.

    Raises InputError if the file can't be read or is no such document, if it names a profile of metrics that there is
    not, if a case has a task that the document doesn't describe, or lacks numbers of a task, or if the summary is not
    that of the cases.
    """
    document = read_json(path, shape)
    conventions = document["conventions"]
    if not conventions["tasks"]:
        raise InputError(f"{path}: conventions.tasks is empty, expected the tasks that were measured")
    for name, about in conventions["tasks"].items():
        if not about["rules"]:
            raise InputError(f"{path}: conventions.tasks.{name}.rules is empty, expected how the numbers are measured")
    try:
        tasks = tasks_of(document)
    except InputError as error:
        raise InputError(f"{path}: conventions: {error}") from error
    if not document["cases"]:
        raise InputError(f"{path}: cases is empty, expected the metrics of at least one case")
    regions = regions_of(document)
    shown_of = {name: [one for row in task.rows(regions) for one in row.columns] for name, task in tasks.items()}
    for name, case in document["cases"].items():
        if unknown := sorted(case.keys() - tasks.keys()):
            raise InputError(f"{path}: cases.{name} has {unknown[0]!r}, expected the tasks of conventions.tasks")
        for task in case:
            needed = [*tasks[task].measures, *tasks[task].details]
            for measure in needed:
                if not _is_there(case, measure.place):
                    raise InputError(f"{path}: cases.{name}.{task} is incomplete, expected it as evaluate wrote it")
            for measure in (*needed, *shown_of[task]):
                _check_number(case, measure.place, f"{path}: cases.{name}")
    for name, task in tasks.items():
        try:
            task.chart([case[name] for case in document["cases"].values() if name in case])
        except (KeyError, TypeError, ValueError) as error:
            said = f"the values of {name} in its cases can't be drawn ({one_line(error)})"
            raise InputError(f"{path}: {said}, expected them as evaluate wrote them") from error
    if not _alike(document["summary"], summarise(document["cases"])):
        raise InputError(f"{path}: summary is not that of its cases, expected it as evaluate wrote it")
    return document


def _is_there(case: Any, place: tuple[str, ...]) -> bool:
    for key in place:
        if not isinstance(case, dict) or key not in case:
            return False
        case = case[key]
    return True


def _check_number(case: Any, place: tuple[str, ...], where: str) -> None:
    """Raises InputError if something else than a number or null stands in a place, or something else than an object or
    null above it."""
    for depth, key in enumerate(place, 1):
        case = case.get(key)
        last = depth == len(place)
        if case is None:
            return
        number = isinstance(case, int | float) and not isinstance(case, bool)
        if number if not last else isinstance(case, dict) or not number or not finite(case):
            expected = "a finite number" if last and number else "a number or null" if last else "an object"
            raise InputError(f"{where}.{'.'.join(place[:depth])} is {shown(case)}, expected {expected}")


def _alike(a: Any, b: Any) -> bool:
    """Whether both have the same numbers in the same places, but for rounding on another machine."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, int | float) and isinstance(b, int | float):
        if not finite(a) or not finite(b):
            return False
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a is None and b is None


# --- what is shown of it ----------------------------------------------------------------------------------------------


def tasks_of(document: Mapping[str, Any]) -> dict[str, Task]:
    """The tasks that a `metrics_document` describes, measured by its profile."""
    conventions = document["conventions"]
    return measured_by(from_json(conventions["tasks"]), conventions.get("metrics", PAPER))


def regions_of(document: Mapping[str, Any]) -> list[str]:
    """The names of the regions of true labels (`Scene.regions`) that any case was measured in."""
    found = (task.get("regions", {}) for case in document["cases"].values() for task in case.values())
    return [name for name in dict.fromkeys(name for one in found for name in one) if name not in _OWN_REGIONS]


def rules_of(document: Mapping[str, Any]) -> dict[str, str]:
    """How the numbers of a `metrics_document` are measured, in words: {"task: number": rule}."""
    conventions = document["conventions"]
    profile = {"metrics": profile_of(tasks_of(document))}
    of_tasks = {
        f"{name}: {term}": rule for name, about in conventions["tasks"].items() for term, rule in about["rules"].items()
    }
    return {**profile, **of_tasks, **conventions["rules"]}


def captioned(caption: str, profile: str) -> str:
    """A caption that names the profile of metrics of the numbers below it."""
    return f"{caption}; metrics: {profile}"


class Column(NamedTuple):
    """A measure, and its heading in a table that shows other tasks, too."""

    title: str
    measure: Measure


def columns(tasks: Iterable[tuple[Task, Iterable[Measure]]]) -> list[Column]:
    """The columns for measures of several tasks side by side. Where two measures have the same title, the headings name
    the tasks, too."""
    pairs = [(task, measure) for task, measures in tasks for measure in measures]
    times = Counter(measure.title for _, measure in pairs)
    return [Column(one.title if times[one.title] == 1 else f"{one.title} ({task.name})", one) for task, one in pairs]


def summary_tables(document: Mapping[str, Any]) -> list[Table]:
    """Table 1 of the paper for one method: a table (a), (b), .. for each task that was scored.

    Cells are `mean (SD)` over the cases, followed by `n=` where some cases lack the region or organ.
    """
    summary, n_cases = document["summary"], len(document["cases"])
    tasks, regions = tasks_of(document), regions_of(document)
    captions = Counter(task.title for name, task in tasks.items() if name in summary)
    tables, letter = [], letters()
    for name, task in tasks.items():
        if name not in summary:
            continue
        rows = task.rows(regions)
        cells = [
            [row.title, *(cell(summary_value(document, one), one.digits, n_cases, one.sd) for one in row.columns)]
            for row in rows
        ]
        caption = task.title if captions[task.title] == 1 else f"{task.title} ({name})"
        header = ["", *(one.title for one in rows[0].columns)]
        what = "mean (SD)" if any(one.sd for row in rows for one in row.columns) else "mean"
        tables.append(Table(captioned(f"({next(letter)}) {caption}, {what}", task.profile), header, cells))
    return tables


def letters() -> Iterator[str]:
    """Gives a .. z, aa, ab, .., without end."""
    names = [""]
    while True:
        names = [first + chr(ord("a") + last) for first in names for last in range(26)]
        yield from names


def number_of(case: Mapping[str, Any], measure: Measure) -> float | None:
    """The number of a measure in a case's metrics, times the measure's factor; None where there is no number."""
    number = number_at(case, measure.place)
    return None if number is None else number * measure.factor


def summary_value(document: Mapping[str, Any], measure: Measure) -> Mapping[str, Any]:
    """The `spread` of a measure over the cases, times the measure's factor; n is 0 where no case has a number."""
    found: Any = number_at(document["summary"], measure.place) or spread([])
    if found["n"] == 0:
        return found
    return {"mean": found["mean"] * measure.factor, "sd": found["sd"] * measure.factor, "n": found["n"]}


def table(document: Mapping[str, Any]) -> str:
    """The `summary_tables` as Markdown with aligned columns, for files and terminals; the text ends with a newline."""
    return "\n".join(f"{part.caption}\n\n{markdown(part)}" for part in summary_tables(document))
