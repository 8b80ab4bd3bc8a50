"""A list of images: each row has an image, optionally a case and a split, and every other column is a target of numbers
or classes."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .cases import MAX_CLASSES, Case, Cohort, check_case_name, check_class_names, check_split
from .lists import Row, check_text, no_split, outside
from .targets import Target, check_target_name

_OWN = ("image", "case", "split")  # columns that are no target
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MOST = float(np.finfo(np.float32).max)


def image_cohort(
    path: Path,
    rows: Iterator[Row],
    declared: Mapping[str, Mapping[str, Any]],
    declared_in: Path,
    allow_outside: bool,
) -> Cohort:
    """The cohort of a list of images. Whether the images are there, and what they are, is checked when they are read.

    rows: the rows of the list, each with the place where it stands. declared: the targets that the file `declared_in`
    declares, {name: {"unit": ..} or {"classes": [..]}}. Any other column is a target of numbers if all its values are
    numbers, or else of classes, in alphabetical order. Without a column `case` the name of an image is its path as
    written, with _ for each /. allow_outside: images may lie outside the list's folder.
    Raises InputError, naming line, column and value, for anything else.
    """
    columns: dict[str, _Column] = {}
    names: dict[str, None] = {}
    files: dict[str, Path] = {}
    splits: list[str] = []
    with_split = without_split = ""  # where the first such row stands
    inside = _Inside(path.parent, allow_outside)
    for where, row in rows:
        written = check_text(row.get("image") or "", where, "image")
        if not written:
            raise InputError(f"{where}: no image, expected its path in every row")
        file = inside.check(written, where)
        name = check_case_name(check_text(row.get("case") or _as_name(written), where, "case"), where)
        if name in names:
            raise InputError(f"{where}: case {name} is there twice, expected unique names")
        if (same := os.path.normpath(file)) in files:
            raise InputError(f"{where}: image {written} is there twice, expected a file of its own for each row")
        split = row.get("split") or ""
        with_split, without_split = with_split or (split and where), without_split or ("" if split else where)
        if with_split and without_split:
            raise no_split(without_split)
        for key in row:
            if key not in columns and key not in _OWN:
                columns[key] = _Column(check_target_name(key, where), declared.get(key), declared_in, len(names))
        for key, column in columns.items():
            column.add(row.get(key), where)
        names[name] = None
        files[same] = Path(file)
        splits.append(check_split(split or "train", where))
    _check_declared(declared, columns, declared_in)
    targets = {key: found for key, column in columns.items() if (found := column.target(path)) is not None}
    values = zip(*(columns[key].values() for key in targets), strict=True) if targets else [()] * len(names)
    cases = tuple(
        Case(name, (file,), {}, None, split, {k: v for k, v in zip(targets, own, strict=True) if v is not None})
        for name, file, split, own in zip(names, files.values(), splits, values, strict=True)
    )
    return Cohort(path.parent, cases, targets, (), path, images=True)


class _Inside:
    """Whether images lie in the folder of their list. Links are followed once for each folder, not for each of a
    million images."""

    def __init__(self, root: Path, allow_outside: bool) -> None:
        self._root = str(root)
        self._real, self._allow_outside = Path(os.path.realpath(root)), allow_outside
        self._known: dict[str, bool] = {}

    def check(self, written: str, where: str) -> str:
        """The path of an image's file. Raises InputError if the file lies outside and may not, or if the path can be
        that of a folder only."""
        if os.path.basename(written) in ("", ".", ".."):
            raise InputError(f"{where}: image {written} is a folder, expected the path of a file")
        file = os.path.join(self._root, written)
        folder = os.path.dirname(file)
        if folder not in self._known:
            self._known[folder] = Path(os.path.realpath(folder)).is_relative_to(self._real)
        if not self._known[folder] and not self._allow_outside:
            raise outside(where, "image", written)
        return file


class _Column:
    """The values of one target, row by row; the first `before` rows have none.

    Whether a column that nobody declared has numbers or names of classes is known when all rows were added.
    """

    def __init__(self, name: str, about: Mapping[str, Any] | None, declared_in: Path, before: int) -> None:
        self.name, self.unit, self.names = name, "", dict[str, int]()
        self.kind = ""
        if about is not None:
            self.kind, self.unit = "class" if "classes" in about else "number", about.get("unit", "")
        if self.kind == "class":
            where = f"{declared_in}: target {name!r}"
            if self.unit:
                raise InputError(f"{where} has classes and a unit, expected one of them")
            assert about is not None
            self.names = check_class_names(about["classes"], where)
        self._texts = [""] * before
        self._known: dict[str, str] = {}  # each text is kept once: a million rows have few different ones
        self._number = self._other = ""  # the first text that is a number, and what to say of the first that is none

    def add(self, value: Any, where: str) -> None:
        """Adds the value of the next row (None or "": it has none). Raises InputError for a value that can't be."""
        text = "" if value is None else value if isinstance(value, str) else repr(value)
        if text and text not in self._known:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise InputError(f"{where}: {self.name} is {value!r}, expected a number or the name of a class")
            self._check(check_text(text, where, self.name), where)
        self._texts.append(self._known.setdefault(text, text) if text else "")

    def _check(self, text: str, where: str) -> None:
        said = f"{where}: {self.name} is {text!r}"
        if self.kind == "class":
            if text not in self.names:
                raise InputError(f"{said}, expected one of {', '.join(self.names)}")
        elif _NUMBER.fullmatch(text) and abs(float(text)) <= _MOST:
            self._number = self._number or text
        elif self.kind == "number" or _NUMBER.fullmatch(text):
            raise InputError(f"{said}, expected a finite number (of float32)")
        else:
            self._other = self._other or said
        if self._number and self._other:
            raise InputError(f"{self._other}, but other rows have numbers there; expected them in all rows, or in none")

    def target(self, path: Path) -> Target | None:
        """The target that the column is; None if no row has a value."""
        if not self._known:
            return None
        if self.kind == "number" or self._number:
            return Target(self.name, "number", self.unit)
        if not self.names:
            where = f"{path}: column {self.name!r}"
            if len(self._known) > MAX_CLASSES:
                raise InputError(
                    f"{where} has {len(self._known)} different texts, expected numbers, or names of at most "
                    f"{MAX_CLASSES} classes"
                )
            self.names = check_class_names(sorted(self._known), where)
        return Target(self.name, "class", names=self.names)

    def values(self) -> Iterator[float | int | None]:
        """The number, or the index of the class, of each row (None: it has none). Call `target` first: it numbers the
        classes."""
        known: dict[str, float | int] = {text: self.names[text] if self.names else float(text) for text in self._known}
        return map(known.get, self._texts)


def _check_declared(declared: Mapping[str, Any], columns: Mapping[str, Any], declared_in: Path) -> None:
    """Raises InputError for a declared target without a column, if there is a column of nearly its name."""
    others = {name.lower(): name for name in columns if name not in declared}
    for name in declared:
        if name not in columns and (near := difflib.get_close_matches(name.lower(), others, 1, 0.75)):
            raise InputError(
                f"{declared_in}: target {name!r} has no column in the list, did you mean {others[near[0]]!r}?"
            )


def _as_name(written: str) -> str:
    """The name of a case for an image's path: its parts joined by _, and no dot in front."""
    name = "_".join(part for part in re.split(r"[/\\]", written) if part not in ("", ".", ".."))
    return f"_{name}" if name.startswith(".") else name
