"""Cases and cohorts: the files of patients or images and what is known of them, before anything is read."""

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
MAX_CLASSES = 2**15  # an int16 holds their indices
_TAKEN = ("manifest.json", "preprocess.json", "splits_final.json", "predictions.json")  # names of files beside cases


@dataclass(frozen=True, slots=True)
class Case:
    """One patient: the files of its MR channels (at least one) and, where there are any, of targets and the body mask.

    Or one image: its file, and `values`, those of its targets (of a class its index), without those that are missing.
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

    targets: what the cases have to be learnt from, by name, without those that no case has; the names of labels are
    empty where nobody named them. channel_names: of the MR; none of images, which say themselves what they are.
    source: the list, if it is one.
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
    """The voxels of one case on one grid: inputs float32 [C, Z, Y, X] as scanned; targets [Z, Y, X], those that were
    asked for and are there, intensities float32, labels uint8; mask bool [Z, Y, X], None where the case has none."""

    inputs: np.ndarray
    targets: dict[str, np.ndarray]
    mask: np.ndarray | None
    grid: Grid
    notes: tuple[Note, ...] = ()  # of all files


def check_split(name: Any, where: str) -> str:
    if name not in SPLITS:
        raise InputError(f"{where}: unknown split {name!r}, expected one of {', '.join(SPLITS)}")
    return name


def check_case_name(name: Any, where: str) -> str:
    """Case names become folder names: no separators, nothing hidden, not too long, no name of a file beside them."""
    plain = isinstance(name, str) and name.isprintable() and re.fullmatch(r"[^./\\][^/\\]*", name)
    if not plain or len(name.encode()) > 200 or name in _TAKEN:
        raise InputError(f"{where}: case name {name!r} can't be a folder name")
    return name


def check_label_names(labels: Any, where: str) -> dict[str, int]:
    """{name: value} with "background" 0 and the values 0 .. n-1 once each (they index the network's outputs)."""
    if not isinstance(labels, dict) or not all(type(value) is int for value in labels.values()):
        raise InputError(f'{where}: labels {labels!r}, expected {{"background": 0, "prostate": 1, ..}}')
    if labels.get("background") != 0 or sorted(labels.values()) != list(range(len(labels))) or len(labels) > 256:
        raise InputError(f'{where}: labels {labels!r}, expected "background": 0 and the values 0, 1, 2, .. once each')
    return labels


def check_class_names(names: Any, where: str) -> dict[str, int]:
    """{name: index} of the classes of images, from their list. InputError for anything but different texts."""
    good = isinstance(names, list | tuple) and all(
        isinstance(name, str) and name and name.isprintable() and name == name.strip() for name in names
    )
    if not good or not 0 < len(names) == len(set(names)):
        raise InputError(f'{where}: classes {names!r}, expected a list of different names, such as ["female", "male"]')
    if len(names) > MAX_CLASSES:
        raise InputError(f"{where}: {len(names)} classes, expected at most {MAX_CLASSES}")
    return {name: index for index, name in enumerate(names)}
