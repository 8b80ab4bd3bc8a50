"""Cases and cohorts: the files of patients or images, and what is known of them before any is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .notes import Note
from .targets import Target
from .volumes import Grid

SPLITS = ("train", "val", "test")
MAX_CLASSES = 2**15  # the indices of classes are stored as int16
# Files of these names stand beside the folders of cases.
_TAKEN = ("manifest.json", "preprocess.json", "splits_final.json", "predictions.json")


@dataclass(frozen=True, slots=True)
class Case:
    """One patient, or one image.

    A patient has the files of its MR channels (`inputs`, at least one), of those targets that are there (`targets`, by
    name), and of its body mask (None: there is none). An image has its file (`inputs`), and `values`: the number, or
    the index of the class, of each target that is not missing, by name.
    """

    name: str
    inputs: tuple[Path, ...]
    targets: dict[str, Path]
    mask: Path | None
    split: str
    values: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """Cases of patients, or of images.

    root: the folder that the cohort lies in. targets: what can be learnt from the cases, by name, without targets that
    no case has; labels that nobody named have no `names`. channel_names: the names of the MR channels; empty for
    images, whose files say how many channels they have. source: the .csv or .json that lists the cases; None for a
    folder. images: whether the cases are images.
    """

    root: Path
    cases: tuple[Case, ...]
    targets: dict[str, Target]
    channel_names: tuple[str, ...]
    source: Path | None = None
    images: bool = False

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of split train, val or test, in the cohort's order."""
        check_split(name, "split")
        return tuple(case for case in self.cases if case.split == name)


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """The voxels of one case, all on one grid.

    inputs: float32 [C, Z, Y, X], as scanned. targets: those that were asked for and that the case has, by name,
    [Z, Y, X] each; intensities are float32, labels uint8. mask: bool [Z, Y, X]; None if the case has none. notes: what
    a person should know of its files.
    """

    inputs: np.ndarray
    targets: dict[str, np.ndarray]
    mask: np.ndarray | None
    grid: Grid
    notes: tuple[Note, ...] = ()


def check_split(name: Any, where: str) -> str:
    """Returns the name of a split. Raises InputError, which starts with `where`, unless it is train, val or test."""
    if name not in SPLITS:
        raise InputError(f"{where}: unknown split {name!r}, expected one of {', '.join(SPLITS)}")
    return name


def check_case_name(name: Any, where: str) -> str:
    """Returns the name of a case. Raises InputError, which starts with `where`, if no folder can be called so: a name
    with a separator, a hidden or too long one, or that of a file that stands beside the cases."""
    plain = isinstance(name, str) and name.isprintable() and re.fullmatch(r"[^./\\][^/\\]*", name)
    if not plain or len(name.encode()) > 200 or name in _TAKEN:
        raise InputError(f"{where}: case name {name!r} can't be a folder name")
    return name


def check_label_names(labels: Any, where: str) -> dict[str, int]:
    """Returns the labels {name: value}. Raises InputError unless "background" is 0 and each of the values 0 .. n-1 is
    there once, because they index the network's outputs."""
    if not isinstance(labels, dict) or not all(type(value) is int for value in labels.values()):
        raise InputError(f'{where}: labels {labels!r}, expected {{"background": 0, "prostate": 1, ..}}')
    if labels.get("background") != 0 or sorted(labels.values()) != list(range(len(labels))) or len(labels) > 256:
        raise InputError(f'{where}: labels {labels!r}, expected "background": 0 and the values 0, 1, 2, .. once each')
    return labels


def check_class_names(names: Any, where: str) -> dict[str, int]:
    """Returns {name: index} for a list of names of classes. Raises InputError for anything but a list of different
    texts, `MAX_CLASSES` at most."""
    good = isinstance(names, list | tuple) and all(
        isinstance(name, str) and name and name.isprintable() and name == name.strip() for name in names
    )
    if not good or not 0 < len(names) == len(set(names)):
        raise InputError(f'{where}: classes {names!r}, expected a list of different names, such as ["female", "male"]')
    if len(names) > MAX_CLASSES:
        raise InputError(f"{where}: {len(names)} classes, expected at most {MAX_CLASSES}")
    return {name: index for index, name in enumerate(names)}
