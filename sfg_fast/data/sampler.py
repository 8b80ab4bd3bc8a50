"""Random axial slices for training, as a function of the seed and the position in the run alone.

So a resumed run needs no state, several processes share the work without talking to each other, and it doesn't matter
how many workers read ahead. Slices are read through the memory maps of a few cases at a time: the memory of a process
does not grow with the cohort.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .cache import TARGETS, Cache, CaseArrays
from .cohort import CLIP_HU

AIR_HU = CLIP_HU[0]
OPEN_CASES = 16  # small cohorts stay open; opening a case takes half a millisecond


class SliceSampler:
    """Batches of random slices of a split.

    The cases come up in a new random order in every epoch, each once; an example is a slice of its case, and with
    `patch` (height, width) a random window of the slice. `foreground` is the share of examples (of cases with labels)
    that must show a labelled voxel; the rest are drawn uniformly. A slice smaller than the window is centred in it and
    padded: MR with the slice's own minimum per channel, CT with AIR_HU, labels with 0, mask with False. Without `patch`
    whole slices are given, which then need one shape in all cases of the split.
    With `bias` the MR of each example is multiplied by a random field as a receive coil makes it, on the scanner's
    scale: exp(bias * (a + b y + c x)), a, b, c standard normal and y, x from -1 to 1 over the window.

    Several processes (`rank` of `ranks`) take turns: batch `step` of all of them together is what one process with
    `batch * ranks` examples has. len() is the number of slices in the split; as a map-style dataset of steps it
    serves torch's DataLoader. Raises InputError for an empty split or values out of range, and at an example whose
    arrays are others than when its case was first opened.
    """

    def __init__(
        self,
        cache: Cache,
        split: str,
        batch: int,
        patch: tuple[int, int] | None,
        seed: int,
        bias: float = 0.0,
        foreground: float = 0.0,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.names = cache.names(split)
        if not self.names:
            raise InputError(f"{cache.path}: no case in split {split}")
        if batch < 1 or seed < 0 or (patch is not None and min(patch) < 1) or not 0 <= foreground <= 1:
            raise InputError(
                f"batch {batch}, patch {patch}, seed {seed}, foreground {foreground}: expected batch and patch >= 1, "
                "seed >= 0, foreground from 0 to 1"
            )
        self._cache = cache
        self._entries = [cache.cases[name] for name in self.names]
        self._targets = [target for target in TARGETS if cache.has(target, split)]
        if patch is None:
            patch = tuple(self._entries[0]["shape"][1:])
            for name, entry in zip(self.names, self._entries, strict=True):
                if tuple(entry["shape"][1:]) != patch:
                    raise InputError(
                        f"{cache.path}: slices of {self.names[0]} are {patch}, of {name} {tuple(entry['shape'][1:])}; "
                        "train on patches (patch=(height, width)) or resample to one shape"
                    )
        self.batch_size, self.patch, self.seed, self.bias, self.foreground = batch, patch, seed, bias, foreground
        self._rank, self._ranks = rank, ranks
        self._remember()

    def __len__(self) -> int:
        return sum(entry["shape"][0] for entry in self._entries)

    def _remember(self) -> None:
        self._order = lru_cache(2)(self._new_order)
        self._open = lru_cache(OPEN_CASES)(self._cache.case)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_order", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of a step: "inputs" float32 [N, C, H, W], "mask" bool [N, 1, H, W], "case" a list of N names, and
        if any case of the split has them "ct" float32 [N, 1, H, W] in HU and "labels" int64 [N, H, W], with "has_ct"
        and "has_labels" bool [N]: an example of a case without holds AIR_HU, or 0."""
        n, (h, w) = self.batch_size, self.patch
        arrays: dict[str, np.ndarray] = {
            "inputs": np.empty((n, self._cache.in_channels, h, w), np.float32),
            "mask": np.zeros((n, 1, h, w), bool),
        }
        if "ct" in self._targets:
            arrays["ct"] = np.full((n, 1, h, w), AIR_HU, np.float32)
        if "labels" in self._targets:
            arrays["labels"] = np.zeros((n, h, w), np.int64)
        arrays |= {f"has_{target}": np.zeros(n, bool) for target in self._targets}
        first = (step * self._ranks + self._rank) * n
        names = [self._example(first + i, {key: array[i : i + 1] for key, array in arrays.items()}) for i in range(n)]
        return {key: torch.from_numpy(array) for key, array in arrays.items()} | {"case": names}

    def _example(self, position: int, out: dict[str, np.ndarray]) -> str:
        """Writes the example at this position of the run to `out`, arrays [1, ..]; returns its case."""
        epoch, place = divmod(position, len(self.names))
        index = int(self._order(epoch)[place])
        entry, case = self._entries[index], self._open(self.names[index])
        self._cache.check_unchanged(self.names[index])
        rng = np.random.default_rng([self.seed, 1, position])
        (height, width), (h, w) = case.mask.shape[1:], self.patch
        z, around = self._slice(rng, entry, case)
        from_y, to_y = _window(rng, height, h, around and around[0])
        from_x, to_x = _window(rng, width, w, around and around[1])
        inputs = case.inputs[z]
        if height < h or width < w:
            out["inputs"][0] = inputs.min(axis=(1, 2), keepdims=True)
        out["inputs"][0, :, to_y, to_x] = inputs[:, from_y, from_x]
        if self.bias:  # on the scanner's scale, whose zero lies elsewhere among z-scores
            zero = np.array([-one["mean"] / one["sd"] for one in entry["mr_foreground"]], np.float32)[:, None, None]
            out["inputs"][0] = (out["inputs"][0] - zero) * _coil(rng, self.bias, h, w) + zero
        out["mask"][0, ..., to_y, to_x] = case.mask[z, from_y, from_x]
        for target in self._targets:
            if (values := getattr(case, target)) is not None:
                out[target][0, ..., to_y, to_x] = values[z, from_y, from_x]
                out[f"has_{target}"][0] = True
        return self.names[index]

    def _new_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.names))

    def _slice(
        self, rng: np.random.Generator, entry: dict[str, Any], case: CaseArrays
    ) -> tuple[int, tuple[int, int] | None]:
        """Which slice, and the place (y, x) of a labelled voxel that has to be in the window, or None."""
        runs = entry["foreground_slices"]
        if not runs or rng.random() >= self.foreground:
            return int(rng.integers(entry["shape"][0])), None
        z = int(rng.choice(np.concatenate([np.arange(first, last) for first, last in runs])))
        assert case.labels is not None
        labelled = np.flatnonzero(case.labels[z])
        y, x = divmod(int(labelled[rng.integers(len(labelled))]), case.mask.shape[2])
        return z, (y, x)


def _window(rng: np.random.Generator, size: int, wanted: int, around: int | None) -> tuple[slice, slice]:
    """Along one axis: which part of a slice to take, at random (with `around` in it), and where in the window it
    goes."""
    length = min(size, wanted)
    lowest, highest = 0, size - length
    if around is not None:
        lowest, highest = max(lowest, around - length + 1), min(highest, around)
    start = int(rng.integers(lowest, highest + 1))
    before = (wanted - length) // 2
    return slice(start, start + length), slice(before, before + length)


def _coil(rng: np.random.Generator, strength: float, height: int, width: int) -> np.ndarray:
    """A smooth positive field [height, width] around 1."""
    level, slope_y, slope_x = (strength * rng.normal(size=3)).astype(np.float32)
    return np.exp(level + slope_y * _from_minus_one_to_one(height)[:, None] + slope_x * _from_minus_one_to_one(width))


@lru_cache(8)
def _from_minus_one_to_one(count: int) -> np.ndarray:
    return np.linspace(-1, 1, count, dtype=np.float32)
