"""From NIfTI to training batches: `preprocess` writes slice-first memory maps once, `SliceSampler` reads slices.

    OUT/manifest.json       what there is, and the statistics that training starts from; written last
    OUT/CASE/inputs.npy     float32 [Z, C, Y, X], normalised MR (see `normalise`)
    OUT/CASE/ct.npy         float32 [Z, Y, X], HU
    OUT/CASE/labels.npy     uint8 [Z, Y, X]
    OUT/CASE/mask.npy       bool [Z, Y, X], the body

Axes Z, Y, X as in `sfg_fast.data.volumes`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..files import new_folder, read_json, write_json
from .cohort import (
    Case,
    Cohort,
    LoadedCase,
    check_case_name,
    check_label_names,
    check_split,
    load_case,
    unnamed_labels,
)
from .volumes import Grid

VERSION = 1
AIR_HU = -1024.0
_ENTRY = {"split", "shape", "spacing", "grid", "targets", "mr_foreground", "ct_body_mean", "label_voxels"}
_TARGETS: dict[str, np.dtype] = {"ct": np.dtype(np.float32), "labels": np.dtype(np.uint8)}


def foreground_statistics(inputs: np.ndarray) -> list[tuple[float, float]]:
    """Mean and SD of each channel of inputs [C, ...] over its foreground, the voxels above the channel's own mean.

    Raises InputError where the image or its foreground is constant.
    """
    statistics = []
    for index, channel in enumerate(inputs):
        foreground = channel[channel > channel.mean(dtype=np.float64)]
        deviation = float(foreground.std(dtype=np.float64)) if foreground.size else 0.0
        if deviation == 0:
            raise InputError(f"MR channel {index} is constant in its foreground, expected an image with contrast")
        statistics.append((float(foreground.mean(dtype=np.float64)), deviation))
    return statistics


def normalise(inputs: np.ndarray) -> np.ndarray:
    """MR [C, Z, Y, X] -> float32 z-scores, per channel over its foreground (see `foreground_statistics`).

    It needs nothing but the MR, so training and prediction see the same values.
    """
    normalised = np.empty(inputs.shape, np.float32)
    for channel, (mean, deviation), out in zip(inputs, foreground_statistics(inputs), normalised, strict=True):
        np.subtract(channel, mean, out=out)
        out /= deviation
    return normalised


def body_mask(ct: np.ndarray, threshold_hu: float = -500.0) -> np.ndarray:
    """The patient in a CT [Z, Y, X] in HU, bool: the largest connected part above the threshold (not the table),
    its holes (gas) filled slice by slice. Raises InputError if nothing lies above the threshold."""
    from scipy import ndimage

    parts, count = ndimage.label(ct > threshold_hu)
    if count == 0:
        raise InputError(f"the CT has no voxel above {threshold_hu:g} HU (its maximum is {ct.max():g})")
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    body = parts == sizes.argmax()
    return np.stack([ndimage.binary_fill_holes(one) for one in body])


def preprocess(cohort: Cohort, out: Path | str, progress: bool = True) -> Cache:
    """Reads, checks and normalises every case of the cohort and writes the cache to folder `out` (new or empty).

    The body mask is the case's own file, else `body_mask` of its CT, else the whole volume. Labels that nobody named
    become "label_1", "label_2", ..
    Raises InputError, naming the case, for whatever `load_case` refuses, an MR or CT without contrast, labels that
    are background in every case, label values with gaps that nobody named, and a folder that isn't empty. Then, and
    when interrupted, nothing of the output remains.
    """
    from tqdm import tqdm

    out = Path(out)
    entries: dict[str, dict[str, Any]] = {}
    counts: dict[str, np.ndarray] = {}
    with new_folder(out):
        for case in tqdm(cohort.cases, desc="preprocess", unit="case", disable=not progress):
            loaded = load_case(case, cohort.label_names)
            partial = out / ".partial"
            partial.mkdir()
            entries[case.name] = _write_case(case, loaded, partial)
            os.replace(partial, out / case.name)
            if loaded.labels is not None:
                counts[case.name] = np.bincount(loaded.labels.ravel(), minlength=256)
        label_names = _named(cohort, counts)
        for name, entry in entries.items():
            entry["label_voxels"] = counts[name][: len(label_names)].tolist() if name in counts else None
        write_json(
            out / "manifest.json",
            {
                "version": VERSION,
                "label_names": label_names,
                "channel_names": list(cohort.channel_names),
                "cases": entries,
            },
        )
    return Cache(out)


def _write_case(case: Case, loaded: LoadedCase, folder: Path) -> dict[str, Any]:
    """Writes the arrays of one case; returns its entry in the manifest."""
    try:
        statistics = foreground_statistics(loaded.inputs)
        if loaded.mask is not None:
            mask, source = loaded.mask, "file"
        elif loaded.ct is not None:
            mask, source = body_mask(loaded.ct), "ct"
        else:
            mask, source = np.ones(loaded.inputs.shape[1:], bool), "volume"
    except InputError as error:
        raise InputError(f"case {case.name} ({case.inputs[0].parent}): {error}") from error
    np.save(folder / "inputs.npy", np.ascontiguousarray(normalise(loaded.inputs).swapaxes(0, 1)))
    np.save(folder / "mask.npy", mask)
    if loaded.ct is not None:
        np.save(folder / "ct.npy", loaded.ct)
    if loaded.labels is not None:
        np.save(folder / "labels.npy", loaded.labels)
    return {
        "split": case.split,
        "shape": list(mask.shape),
        "spacing": list(loaded.grid.spacing),
        "grid": loaded.grid.to_json(),
        "targets": [target for target in _TARGETS if getattr(loaded, target) is not None],
        "mask_from": source,
        "mr_foreground": [{"mean": mean, "sd": deviation} for mean, deviation in statistics],
        "ct_body_mean": None if loaded.ct is None else float(loaded.ct[mask].mean(dtype=np.float64)),
    }


def _named(cohort: Cohort, counts: dict[str, np.ndarray]) -> dict[str, int]:
    """The cohort's label names, or label_1, label_2, .. for the values found."""
    if not counts:
        return {}
    values = np.flatnonzero(sum(counts.values())).tolist()
    if values == [0]:
        raise InputError(f"{cohort.root}: the labels of every case are all background, expected at least one organ")
    if cohort.label_names:
        return cohort.label_names
    if values[-1] != len(set(values) | {0}) - 1:
        raise InputError(f"{cohort.root}: the label files hold the values {values}, expected 0, 1, 2, .. without gaps")
    return unnamed_labels(values[-1])


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """Read-only memory maps of one case: inputs float32 [Z, C, Y, X], mask bool [Z, Y, X], and where the case has
    them ct float32 [Z, Y, X] in HU and labels uint8 [Z, Y, X]."""

    inputs: np.ndarray
    ct: np.ndarray | None
    labels: np.ndarray | None
    mask: np.ndarray
    grid: Grid


class Cache:
    """A folder that `preprocess` wrote. Raises InputError if its manifest is missing or isn't one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        where = self.path / "manifest.json"
        if not where.is_file():
            raise InputError(f"{self.path}: not a preprocessed cohort, it has no manifest.json")
        self.manifest: dict[str, Any] = read_json(where)
        version = self.manifest.get("version") if isinstance(self.manifest, dict) else None
        if version != VERSION:
            raise InputError(f"{where}: version {version!r}, expected {VERSION}; preprocess the cohort again")
        try:
            self.label_names: dict[str, int] = self.manifest["label_names"]
            self.in_channels = len(self.manifest["channel_names"])
            if self.label_names:
                check_label_names(self.label_names, str(where))
            self._cases: dict[str, dict[str, Any]] = self.manifest["cases"]
            for name, entry in self._cases.items():
                check_case_name(name, str(where))
                check_split(entry["split"], str(where))
                if len(entry["shape"]) != 3 or not set(entry["targets"]) <= set(_TARGETS) or not set(entry) >= _ENTRY:
                    raise ValueError(f"case {name}")
                Grid.from_json(entry["grid"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not a valid manifest ({error}); preprocess the cohort again") from error

    def names(self, split: str) -> list[str]:
        """The names of the cases in split train, val or test."""
        check_split(split, "split")
        return [name for name, entry in self._cases.items() if entry["split"] == split]

    def has(self, target: str, split: str = "train") -> bool:
        """Whether any case of the split has the target, ct or labels."""
        return any(target in self._cases[name]["targets"] for name in self.names(split))

    def case(self, name: str) -> CaseArrays:
        """Opens the memory maps of a case. InputError: no such case, a file missing or not what the manifest says."""
        if name not in self._cases:
            raise InputError(f"{self.path}: no case {name!r}")
        entry = self._cases[name]
        z, y, x = entry["shape"]

        def target(key: str) -> np.ndarray | None:
            return self._open(name, key, (z, y, x), _TARGETS[key]) if key in entry["targets"] else None

        inputs = self._open(name, "inputs", (z, self.in_channels, y, x), np.dtype(np.float32))
        mask = self._open(name, "mask", (z, y, x), np.dtype(bool))
        return CaseArrays(inputs, target("ct"), target("labels"), mask, Grid.from_json(entry["grid"]))

    def class_frequencies(self, split: str = "train") -> np.ndarray:
        """The share of each label among all voxels of the split, float64 [labels], summing to 1."""
        counts = [c for name in self.names(split) if (c := self._cases[name]["label_voxels"]) is not None]
        if not counts:
            raise InputError(f"{self.path}: no case of split {split} has labels")
        total = np.sum(counts, axis=0, dtype=np.float64)
        return total / total.sum()

    def mean_ct(self, split: str = "train") -> float:
        """The mean over the split's cases of the mean CT in the body mask, HU."""
        means = [m for name in self.names(split) if (m := self._cases[name]["ct_body_mean"]) is not None]
        if not means:
            raise InputError(f"{self.path}: no case of split {split} has a CT")
        return float(np.mean(means))

    def _open(self, name: str, key: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        file = self.path / name / f"{key}.npy"
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{file}: can't be read ({error}); preprocess the cohort again") from error
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{file}: {array.dtype} {array.shape}, but the manifest says {dtype} {shape}")
        return array


class SliceSampler:
    """Random axial slices of a split, as a function of (seed, step) alone, so that a resumed run needs no state.

    Each of the `batch` examples is a case, drawn uniformly, then a slice of it, then with `patch` (height, width) a
    random window of the slice. A slice smaller than the window is centred in it and padded: MR with the slice's own
    minimum per channel, CT with AIR_HU, labels with 0, mask with False. Without `patch` whole slices are given,
    which then need one shape in all cases of the split.
    With `bias` the MR of each example is multiplied by a random field as a receive coil makes it, on the scanner's
    scale: exp(bias * (a + b y + c x)), a, b, c standard normal and y, x from -1 to 1 over the window.
    len() is the number of slices in the split. Raises InputError for an empty split or values out of range.
    """

    def __init__(
        self, cache: Cache, split: str, batch: int, patch: tuple[int, int] | None, seed: int, bias: float = 0.0
    ) -> None:
        self.names = cache.names(split)
        if not self.names:
            raise InputError(f"{cache.path}: no case in split {split}")
        if batch < 1 or seed < 0 or (patch is not None and min(patch) < 1):
            raise InputError(f"batch {batch}, patch {patch}, seed {seed}: expected batch and patch >= 1, seed >= 0")
        self._cases = [cache.case(name) for name in self.names]
        self._targets = [target for target in _TARGETS if cache.has(target, split)]
        if patch is None:
            patch = self._cases[0].mask.shape[1:]
            for name, case in zip(self.names, self._cases, strict=True):
                if case.mask.shape[1:] != patch:
                    raise InputError(
                        f"{cache.path}: slices of {self.names[0]} are {patch}, of {name} {case.mask.shape[1:]}; "
                        "train on patches (patch=(height, width)) or resample to one shape"
                    )
        self.batch_size, self.patch, self.seed, self.bias = batch, patch, seed, bias
        # Where zero of the scanner lies among z-scores, per case and channel.
        self._zero = [
            np.array([-one["mean"] / one["sd"] for one in cache.manifest["cases"][name]["mr_foreground"]], np.float32)
            for name in self.names
        ]

    def __len__(self) -> int:
        return sum(len(case.mask) for case in self._cases)

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step: "inputs" float32 [N, C, H, W], "mask" bool [N, 1, H, W], "case" a list of N names, and
        if any case of the split has them "ct" float32 [N, 1, H, W] in HU and "labels" int64 [N, H, W], with "has_ct"
        and "has_labels" bool [N]: an example of a case without holds AIR_HU, or 0."""
        rng = np.random.default_rng([self.seed, step])
        n, (h, w) = self.batch_size, self.patch
        channels = self._cases[0].inputs.shape[1]
        arrays: dict[str, np.ndarray] = {
            "inputs": np.empty((n, channels, h, w), np.float32),
            "mask": np.zeros((n, 1, h, w), bool),
        }
        if "ct" in self._targets:
            arrays["ct"] = np.full((n, 1, h, w), AIR_HU, np.float32)
        if "labels" in self._targets:
            arrays["labels"] = np.zeros((n, h, w), np.int64)
        arrays |= {f"has_{target}": np.zeros(n, bool) for target in self._targets}
        names = []
        for i in range(n):
            index = int(rng.integers(len(self._cases)))
            case = self._cases[index]
            z = int(rng.integers(len(case.mask)))
            height, width = case.mask.shape[1:]
            from_y, to_y = _window(rng, height, h)
            from_x, to_x = _window(rng, width, w)
            inputs = case.inputs[z]
            if height < h or width < w:
                arrays["inputs"][i] = inputs.min(axis=(1, 2), keepdims=True)
            arrays["inputs"][i, :, to_y, to_x] = inputs[:, from_y, from_x]
            if self.bias:
                zero = self._zero[index][:, None, None]
                arrays["inputs"][i] = (arrays["inputs"][i] - zero) * _coil(rng, self.bias, h, w) + zero
            arrays["mask"][i, ..., to_y, to_x] = case.mask[z, from_y, from_x]
            for target in self._targets:
                if (values := getattr(case, target)) is not None:
                    arrays[target][i, ..., to_y, to_x] = values[z, from_y, from_x]
                    arrays[f"has_{target}"][i] = True
            names.append(self.names[index])
        return {key: torch.from_numpy(array) for key, array in arrays.items()} | {"case": names}


def _window(rng: np.random.Generator, size: int, wanted: int) -> tuple[slice, slice]:
    """Along one axis: which part of a slice to take, at random, and where in the window it goes."""
    length = min(size, wanted)
    start = int(rng.integers(size - length + 1))
    before = (wanted - length) // 2
    return slice(start, start + length), slice(before, before + length)


def _coil(rng: np.random.Generator, strength: float, height: int, width: int) -> np.ndarray:
    """A smooth positive field [height, width] around 1."""
    level, slope_y, slope_x = rng.normal(size=3)
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    return np.exp(strength * (level + slope_y * y + slope_x * x)).astype(np.float32)
