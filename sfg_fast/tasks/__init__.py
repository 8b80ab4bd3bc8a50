"""The tasks that a network learns. A kind of task is described in one file; `read_tasks` makes tasks of a
configuration.

A new kind is a new file in this folder with a subclass of `Task` (docs/tasks.md shows one). No other file has to know
it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import nn

from ..data.targets import PER_IMAGE, Target, TargetAsJson, check_target_name
from ..errors import InputError
from ..files import check_shape
from .task import KINDS, PAPER, PROFILES, Measure, Task

for _module in pkgutil.iter_modules(__path__):  # each file registers its kind, or a profile of metrics
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "KINDS",
    "PAPER",
    "PROFILES",
    "Measure",
    "Task",
    "TaskAsJson",
    "TaskOptions",
    "check_profile",
    "file_stems",
    "from_json",
    "leading",
    "measured_by",
    "of_images",
    "own_tasks",
    "profile_of",
    "read_tasks",
    "to_json",
]

TaskOptions = list[str] | dict[str, dict[str, Any]]
"""What `tasks:` of a configuration may hold: names of `USUAL`, or name -> {kind: .., options of the kind}."""

USUAL: dict[str, dict[str, Any]] = {
    "ct": {"kind": "synthesis"},
    "organs": {"kind": "segmentation", "target": "labels"},
}
"""The paper's two tasks. A configuration may name them without a description."""

USUAL_KINDS = {
    "intensities": "synthesis",
    "labels": "segmentation",
    "number": "regression",
    "class": "classification",
}
"""The kind of task for each kind of target. `own_tasks` takes it for a target whose task nobody has described."""


def read_tasks(options: Any, targets: Mapping[str, Target] | None = None) -> dict[str, Task]:
    """The tasks of a configuration by name, in the configuration's order. If the targets of a cohort are given, each
    task is bound to its target.

    Raises InputError, which names the option, for an unknown kind or option, for a value that an option can't have, for
    tasks of images beside tasks of voxels, and for a target that the cohort lacks or has of another kind.
    """
    if isinstance(options, Sequence) and not isinstance(options, str):
        if len(set(map(str, options))) < len(options):
            raise InputError(f"tasks={list(options)!r}: expected each once")
        options = {name: {} for name in options}
    if not isinstance(options, Mapping) or not options:
        raise InputError(f"tasks={options!r}: expected names of tasks, or name -> {{kind: ..}}")
    found = {name: _task(name, chosen, targets) for name, chosen in options.items()}
    if len({task.per_image for task in found.values()}) > 1:
        kinds = ", ".join(f"{name}: {task.kind}" for name, task in found.items())
        raise InputError(f"tasks={{{kinds}}}: expected all of them of whole images, or all of voxels")
    stems = file_stems(found)
    for name, stem in stems.items():
        check_target_name(stem, f"tasks.{name}")
        if [one.casefold() for one in stems.values()].count(stem.casefold()) > 1:  # some disks do not tell A from a
            raise InputError(
                f"tasks.{name}: it would be written to files of the name {stem!r}, and so would another task"
            )
    return found


def _task(name: Any, chosen: Any, targets: Mapping[str, Target] | None) -> Task:
    plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name)
    if not plain or name == "shared" or hasattr(nn.ModuleDict(), name):  # an nn.ModuleDict holds the heads of a network
        expected = "letters, digits and _, and none of shared, type, values and other words of torch's modules"
        raise InputError(f"tasks: {name!r} can't be the name of a task, expected {expected}")
    chosen = {} if chosen is None else chosen  # YAML reads `ct:` alone as None
    if not isinstance(chosen, Mapping):
        raise InputError(f"tasks.{name}={chosen!r}: expected {{kind: .., options of the kind}}")
    given = {**USUAL.get(name, {}), **chosen}
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        expected = f"one of {', '.join(KINDS)}"
        if "kind" not in chosen and name not in USUAL:
            raise InputError(f"tasks={name!r}: expected one of {', '.join(USUAL)}, or {name}: {{kind: {expected}}}")
        raise InputError(f"tasks.{name}.kind={kind!r}: expected {expected}")
    hints = typing.get_type_hints(KINDS[kind])
    known = [one.name for one in dataclasses.fields(KINDS[kind]) if one.name not in ("name", "about")]
    for key, value in given.items():
        if key not in known:
            raise InputError(f"tasks.{name}.{key}={value!r}: expected options of {kind}: {', '.join(known)}")
        check_shape(value, hints[key], f"tasks.{name}", key)
    task = KINDS[kind](name, **{"target": name, **given})
    if targets is not None:
        task = dataclasses.replace(task, about=_target(task, targets))
    task.check()
    return task


def _target(task: Task, targets: Mapping[str, Target]) -> Target:
    if task.target not in targets:
        there = ", ".join(targets) or "nothing to learn"
        raise InputError(f"tasks.{task.name}: the cohort has no target {task.target!r}, it has {there}")
    target = targets[task.target]
    if target.kind != task.reads:
        expected = f"expected {task.reads} for {task.kind}"
        raise InputError(f"tasks.{task.name}: the cohort's target {task.target!r} is {target.kind}, {expected}")
    return target


def own_tasks(targets: Mapping[str, Target]) -> dict[str, Task]:
    """One task for each target of a cohort. It is for predictions whose tasks nobody has described."""
    usual = {options.get("target", name): name for name, options in USUAL.items()}
    options = {usual.get(name, name): {"kind": USUAL_KINDS[one.kind], "target": name} for name, one in targets.items()}
    return read_tasks(options, targets) if options else {}


class TaskAsJson(TypedDict):
    """A bound task as a JSON file holds it: its kind and options, and its target."""

    options: dict[str, Any]
    about: TargetAsJson


def to_json(tasks: Mapping[str, Task]) -> dict[str, TaskAsJson]:
    """Bound tasks as a JSON file holds them; `from_json` reads them back."""
    found: dict[str, TaskAsJson] = {}
    for name, task in tasks.items():
        options = {one.name: getattr(task, one.name) for one in dataclasses.fields(task)}
        options = {key: value for key, value in options.items() if key not in ("name", "about")}
        found[name] = {"options": {"kind": task.kind, **options}, "about": task.of.to_json()}
    return found


def from_json(content: Mapping[str, Any]) -> dict[str, Task]:
    """The bound tasks that `to_json` has written. `content` must have the shape of `TaskAsJson`, which is not checked.

    Raises InputError for a task that can't be, as `read_tasks` does.
    """
    bound = {}
    for name, one in content.items():
        target = one["options"].get("target", name)
        bound[str(target)] = Target.from_json(target, one["about"])
    return read_tasks({name: one["options"] for name, one in content.items()}, bound)


def check_profile(profile: Any) -> None:
    """Raise InputError unless `profile` is the name of a profile of metrics."""
    if profile not in PROFILES:
        raise InputError(f"metrics={profile!r}: expected one of {', '.join(PROFILES)}")


def measured_by(tasks: Mapping[str, Task], profile: str) -> dict[str, Task]:
    """The same tasks, measured by a profile of metrics.

    Raises InputError for an unknown profile, and for a kind of task that the profile does not measure.
    """
    check_profile(profile)
    measures, found = PROFILES[profile], {}
    for name, task in tasks.items():
        if task.kind not in measures:
            expected = f"expected tasks of kind {', '.join(measures)}, or metrics {PAPER}"
            raise InputError(f"metrics={profile!r}: task {name} is of kind {task.kind}, {expected}")
        fields = {one.name: getattr(task, one.name) for one in dataclasses.fields(task)}
        found[name] = measures[task.kind](**fields)
        found[name].check()
    return found


def profile_of(tasks: Mapping[str, Task]) -> str:
    """The profile of metrics that all of these tasks are measured by."""
    return next(iter(tasks.values())).profile


def file_stems(tasks: Mapping[str, Task]) -> dict[str, str]:
    """The name of the file, or the column, that holds each task's prediction, {task: name}: the name of its target, or
    that of the task where several tasks have the same target."""
    targets = [task.target for task in tasks.values()]
    return {name: task.target if targets.count(task.target) == 1 else name for name, task in tasks.items()}


def leading(tasks: Mapping[str, Task]) -> str:
    """The name of the task whose uncertainty is called "uncertainty" alone, without the task's name: the first task of
    numbers, else the first task."""
    numbers = [name for name, task in tasks.items() if task.reads in ("intensities", "number")]
    return (numbers or list(tasks))[0]


def of_images(tasks: Mapping[str, Task]) -> bool:
    """Are the tasks of whole images, not of voxels?"""
    return next(iter(tasks.values())).reads in PER_IMAGE
