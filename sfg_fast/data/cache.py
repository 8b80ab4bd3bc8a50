"""What `preprocess` wrote, opened for reading: memory maps of slices, and the statistics that training starts from.

    CACHE/manifest.json     what there is, statistics and checksums; written last
    CACHE/CASE/inputs.npy   float32 [Z, C, Y, X], normalised MR (`preprocessing.normalise`)
    CACHE/CASE/ct.npy       float32 [Z, Y, X], HU
    CACHE/CASE/labels.npy   uint8 [Z, Y, X]
    CACHE/CASE/mask.npy     bool [Z, Y, X], the body
    CACHE/CASE/case.json    this case's entry in the manifest

Axes Z, Y, X as in `sfg_fast.data.volumes`.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import one_line, read_json
from .cohort import check_case_name, check_label_names, check_split
from .notes import is_note
from .stored import MAX_VOXELS
from .volumes import Grid

VERSION = 4
ENTRY = {
    "split",
    "shape",
    "spacing",
    "grid",
    "targets",
    "mask_from",
    "mr_foreground",
    "ct_body_mean",
    "label_voxels",
    "foreground_slices",
    "notes",
    "source",
    "checksums",
}
MAX_ENTRY_BYTES = 2**24  # of case.json
_Stamp = tuple[int, int, int, int]  # which file it is, how long, and when it was written
TARGETS: dict[str, np.dtype] = {"ct": np.dtype(np.float32), "labels": np.dtype(np.uint8)}


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """Read-only memory maps of one case: inputs float32 [Z, C, Y, X], mask bool [Z, Y, X], and where the case has
    them ct float32 [Z, Y, X] in HU and labels uint8 [Z, Y, X]."""

    inputs: np.ndarray
    ct: np.ndarray | None
    labels: np.ndarray | None
    mask: np.ndarray


class Cache:
    """A folder that `preprocess` wrote; opening it reads the manifest and no array.

    Attributes:
        cases: the manifest's entry of each case, by name; `rejected`: why a case is not there, by name.
        label_names: name -> value, empty where no case has labels. `in_channels`: of the MR.

    Raises InputError if the manifest is missing, isn't one, or preprocessing never came to its end.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        where = self.path / "manifest.json"
        if not where.is_file():
            raise InputError(
                f"{self.path}: not a preprocessed cohort, it has no manifest.json (has preprocess finished?)"
            )
        manifest = read_json(where)
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if version != VERSION:
            raise InputError(f"{where}: version {version!r}, expected {VERSION}; preprocess the cohort again")
        try:
            self.label_names: dict[str, int] = manifest["label_names"]
            self.channel_names = tuple(map(str, manifest["channel_names"]))
            self.in_channels = len(self.channel_names)
            if self.label_names:
                check_label_names(self.label_names, str(where))
            self.rejected: dict[str, str] = manifest["rejected"]
            self._stamps: dict[str, dict[str, _Stamp]] = {}  # of the files of each case that was opened, by name
            self.cases: dict[str, dict[str, Any]] = manifest["cases"]
            for name, entry in self.cases.items():
                check_case_name(name, str(where))
                check_split(entry["split"], str(where))
                self._check(name, entry)
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{where}: not a valid manifest ({one_line(error)}); preprocess the cohort again"
            ) from error

    def _check(self, name: str, entry: dict[str, Any]) -> None:
        """ValueError (or another that a wrong type gives): the entry can't be one that `preprocess` wrote."""
        z, y, x = entry["shape"]
        try:
            grid = Grid.from_json(entry["grid"])
        except InputError as error:
            raise ValueError(f"case {name}: {error}") from error
        counts, mean = entry["label_voxels"], entry["ct_body_mean"]
        good = (
            set(entry) == ENTRY
            and all(type(n) is int for n in (z, y, x))
            and 1 <= min(z, y, x) <= z * y * x <= MAX_VOXELS
            and grid.array_shape == (z, y, x)
            and len(set(entry["targets"])) == len(entry["targets"])
            and set(entry["targets"]) <= set(TARGETS)
            and len(entry["mr_foreground"]) == self.in_channels
            and all(math.isfinite(one["mean"]) and one["sd"] > 0 for one in entry["mr_foreground"])
            and (mean is None) == ("ct" not in entry["targets"])
            and (mean is None or math.isfinite(mean))
            and (counts is None) == ("labels" not in entry["targets"])
            and (counts is None or (len(counts) == len(self.label_names) and min(counts) >= 0))
            and all(0 <= first < last <= z for first, last in entry["foreground_slices"] or ())
            and isinstance(entry["notes"], list)
            and all(map(is_note, entry["notes"]))
        )
        if not good:
            raise ValueError(f"case {name}")

    def with_splits(self, splits: Mapping[str, Sequence[str]]) -> Cache:
        """The same arrays, only the named cases, each in the split that names it: {"train": [..], "val": [..]}."""
        other = copy.copy(self)
        other.cases = {
            name: {**self.cases[name], "split": check_split(split, "split")}
            for split, names in splits.items()
            for name in names
        }
        return other

    def names(self, split: str) -> list[str]:
        """The names of the cases in split train, val or test."""
        check_split(split, "split")
        return [name for name, entry in self.cases.items() if entry["split"] == split]

    def has(self, target: str, split: str = "train") -> bool:
        """Whether any case of the split has the target, ct or labels."""
        return any(target in self.cases[name]["targets"] for name in self.names(split))

    def case(self, name: str) -> CaseArrays:
        """Opens the memory maps of a case, all of one version of it. InputError: no such case, a file missing or not
        what the manifest says, or another than when the case was opened before."""
        if name not in self.cases:
            raise InputError(f"{self.path}: no case {name!r}")
        entry = self.cases[name]
        z, y, x = entry["shape"]
        kinds = {
            "inputs": ((z, self.in_channels, y, x), np.dtype(np.float32)),
            "mask": ((z, y, x), np.dtype(bool)),
        }
        kinds |= {target: ((z, y, x), TARGETS[target]) for target in entry["targets"]}
        arrays: dict[str, np.ndarray] = {}
        stamps: dict[str, _Stamp] = {}
        with self._folder(name) as folder:  # stays the same if another takes its name
            if name not in self._stamps:
                self._check_source(name, folder)
            for key, (shape, dtype) in kinds.items():
                file = os.path.join(self.path, name, f"{key}.npy")
                arrays[key], stamps[file] = _open(file, folder, shape, dtype)
        if self._stamps.setdefault(name, stamps) != stamps:
            raise self._changed(name)
        return CaseArrays(arrays["inputs"], arrays.get("ct"), arrays.get("labels"), arrays["mask"])

    def check_unchanged(self, name: str) -> None:
        """InputError if a file of a case is another than when it was opened: replaced, removed or written to. A few
        microseconds."""
        try:
            for file, stamp in self._stamps[name].items():
                if _stamp(os.stat(file)) != stamp:
                    raise self._changed(name)
        except OSError as error:
            raise self._changed(name) from error

    def _changed(self, name: str) -> InputError:
        return InputError(
            f"{self.path}: the arrays of case {name} have changed since they were opened, expected them to stay; "
            "preprocess the cohort again and train anew, or put the old files back and resume"
        )

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """A descriptor of the case's folder."""
        folder = os.path.join(self.path, name)
        try:
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{folder}: can't be read ({one_line(error)}); preprocess the cohort again") from error
        try:
            yield number
        finally:
            os.close(number)

    def _check_source(self, name: str, folder: int) -> None:
        """The case's own entry against the manifest's: of another version of its files the statistics are others."""
        where = self.path / name / "case.json"
        try:
            with open(os.open("case.json", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
                source = json.loads(file.read(MAX_ENTRY_BYTES))["source"]
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(f"{where}: can't be read ({one_line(error)}); preprocess the cohort again") from error
        if source != self.cases[name]["source"]:
            raise InputError(
                f"{where}: the case was written again from other files than the manifest says; preprocess the cohort "
                "again and train anew, or put the old files back and resume"
            )

    def fingerprint(self) -> str:
        """A hash of all cases, their files' contents and splits: two caches with the same one train alike."""
        content = [(name, entry["source"], entry["split"]) for name, entry in sorted(self.cases.items())]
        return hashlib.sha256(json.dumps([self.label_names, content]).encode()).hexdigest()

    def class_frequencies(self, split: str = "train") -> np.ndarray:
        """The share of each label among all voxels of the split, float64 [labels], summing to 1."""
        counts = [c for name in self.names(split) if (c := self.cases[name]["label_voxels"]) is not None]
        if not counts:
            raise InputError(f"{self.path}: no case of split {split} has labels")
        total = np.sum(counts, axis=0, dtype=np.float64)
        return total / total.sum()

    def mean_ct(self, split: str = "train") -> float:
        """The mean over the split's cases of the mean CT in the body mask, HU."""
        means = [m for name in self.names(split) if (m := self.cases[name]["ct_body_mean"]) is not None]
        if not means:
            raise InputError(f"{self.path}: no case of split {split} has a CT")
        return float(np.mean(means))


def _open(file: str, folder: int, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, _Stamp]:
    """The memory map of a file, found in the open folder, and its stamp."""
    try:
        # No stream: this is done for every slice.
        number = os.open(os.path.basename(file), os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            stamp = _stamp(os.fstat(number))
            start = os.read(number, 10)  # magic, version, and how long the header is
            found, dtype_found, offset = _header(start + os.read(number, int.from_bytes(start[8:], "little")))
            if (found, dtype_found) != (shape, dtype):
                raise InputError(f"{file}: {dtype_found} {found}, but the manifest says {dtype} {shape}")
            data = mmap.mmap(number, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(number)
        return np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape), stamp
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: can't be read ({one_line(error)}); preprocess the cohort again") from error


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(1024)
def _header(head: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and length of an npy header. A cohort has few different ones, and reading one is what costs most
    when a sampler opens another case for every slice: this is seven times as fast as numpy's open_memmap."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}, expected (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran or dtype.hasobject:
        raise ValueError("not plain numbers in C order")
    return shape, dtype, stream.tell()
