"""k-fold cross-validation: the folds, in nnU-Net's splits_final.json, and the summary of the runs of all folds."""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ..data.cache import Cache
from ..errors import InputError
from ..files import read_json, write_json


def splits_path(cache: Cache) -> Path:
    """The file that holds the folds of a cache."""
    return cache.path / "splits_final.json"


def make_splits(cache: Cache, folds: int) -> None:
    """Write the folds of `divide` to splits_final.json, unless that file is there already.

    Raises InputError if there are fewer cases than folds.
    """
    if not splits_path(cache).exists():
        write_json(splits_path(cache), divide(cache, folds))


def divide(cache: Cache, folds: int) -> list[dict[str, list[str]]]:
    """Folds of the train and val cases, divided at random, but always alike: {"train": names, "val": names} for each.

    Raises InputError if there are fewer cases than folds.
    """
    names = sorted(cache.names("train") + cache.names("val"))
    if len(names) < folds:
        raise InputError(
            f"folds={folds!r}: {cache.path} has {len(names)} train and val cases, expected at least {folds}"
        )
    order = np.random.default_rng(12345).permutation(len(names))
    parts = [{names[i] for i in part} for part in np.array_split(order, folds)]
    return [
        {"train": [name for name in names if name not in part], "val": [name for name in names if name in part]}
        for part in parts
    ]


def read_fold(cache: Cache, folds: int, fold: int) -> Cache:
    """The cache with the train and val cases of this fold: of splits_final.json, or of `divide` where there is no such
    file yet.

    Raises InputError if splits_final.json does not fit the cohort; warns if the fold leaves cases out.
    """
    path = splits_path(cache)
    splits: Any = read_json(path) if path.exists() else divide(cache, folds)
    expected = f'expected {folds} folds {{"train": [..], "val": [..]}}'
    if not isinstance(splits, list) or len(splits) != folds:
        found = f"{len(splits)} folds" if isinstance(splits, list) else type(splits).__name__
        raise InputError(f"{path}: {found}, {expected}")
    split = splits[fold]
    if not isinstance(split, dict) or set(split) != {"train", "val"}:
        raise InputError(f"{path}: fold {fold} is {str(split)[:80]}, {expected}")
    known = {*cache.names("train"), *cache.names("val")}
    for which, names in split.items():
        if not isinstance(names, list) or not names:
            raise InputError(f"{path}: fold {fold}, {which} is {str(names)[:80]}, expected a list of cases")
        for name in names:
            if not isinstance(name, str) or name not in known:
                raise InputError(f"{path}: fold {fold}, {which} names {name!r}, expected a train or val case")
    if both := set(split["train"]) & set(split["val"]):
        raise InputError(f"{path}: fold {fold} has {sorted(both)[0]!r} in train and in val, expected it in one")
    if left_out := sorted(known - set(split["train"]) - set(split["val"])):
        warnings.warn(
            f"{path}: fold {fold} leaves out {', '.join(left_out)} (was the cohort smaller when the folds were made?); "
            "without that file they are made anew",
            stacklevel=3,
        )
    return cache.with_splits(split)


class Look(TypedDict):
    """A look at the validation split; None for a number that was not measured."""

    nll: float | None
    scores: dict[str, float | None]


class Validation(TypedDict):
    """The part of a run's summary.json about the validation split; None where there was no look at it."""

    last: Look | None


class Summary(TypedDict):
    """The part of a run's summary.json that is read back."""

    validation: Validation


def last_look(fold: Path) -> dict[str, Any] | None:
    """The last look at the validation split of a finished fold; None if there was none. Raises InputError if its
    summary.json does not tell."""
    return read_json(fold / "summary.json", Summary)["validation"]["last"]


def summarise(out: Path, folds: int) -> dict[str, Any]:
    """Write OUT/summary.json, and return its content: the last look of every fold, and the mean and SD over the folds.
    All folds must be finished."""
    found = {f"fold_{fold}": last_look(out / f"fold_{fold}") for fold in range(folds)}
    looks = [one for one in found.values() if one]
    names = dict.fromkeys(name for one in looks for name in one["scores"])
    spread = {"nll": _spread([one["nll"] for one in looks])}
    spread |= {name: _spread([one["scores"].get(name) for one in looks]) for name in names}
    document = {"folds": found, "summary": spread}
    write_json(out / "summary.json", document)
    return document


def _spread(numbers: list[float | None]) -> dict[str, float | None] | None:
    """The mean and the SD of the numbers that were measured; None if none was."""
    values = [value for value in numbers if value is not None]
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "sd": sd} if values else None
