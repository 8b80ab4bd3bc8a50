"""Samplers give random axial slices, 3-D patches, or images, for training, as a function of the seed and the position
in the run alone.

So a resumed run needs no state, several processes share the work without talking to each other, and it doesn't matter
how many workers read ahead. Slices and patches are read through the memory maps of a few cases at a time, so that the
memory of a process does not grow with the cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from ..errors import InputError
from .cache import DTYPES, BlockArrays, Cache, CaseArrays

OPEN_CASES = 16  # small cohorts stay open; opening a case takes half a millisecond
OPEN_BLOCKS = 1024  # the images of a batch come from any block; an open block is nothing but a few maps


class _Sampler:
    """Batches of a split, each a function of the seed and the step. Several processes (`rank` of `ranks`) take turns:
    their batches of one step together are the batch of a single process with `batch * ranks` examples."""

    examples: str
    """What the examples are, in a word."""
    open_at_a_time: ClassVar[int]
    """How many cases, or blocks, stay open."""

    def __init__(self, cache: Cache, split: str, batch: int, seed: int, rank: int, ranks: int) -> None:
        self.names = cache.names(split)
        if not self.names:
            raise InputError(f"{cache.path}: no case in split {split}")
        self._cache = cache
        self._entries = [cache.cases[name] for name in self.names]
        self._targets = [target for name, target in cache.targets.items() if cache.has(name, split)]
        self.batch_size, self.seed = batch, seed
        self._rank, self._ranks = rank, ranks
        self._remember()

    def _remember(self) -> None:
        self._order = lru_cache(2)(self._new_order)
        self._open = lru_cache(self.open_at_a_time)(self._opened)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not hasattr(value, "cache_info")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def _opened(self, name: str) -> Any:
        raise NotImplementedError

    def _new_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self._in_an_epoch())

    def _in_an_epoch(self) -> int:
        raise NotImplementedError

    def _positions(self, step: int) -> range:
        """The positions in the run of this process's examples of a step."""
        first = (step * self._ranks + self._rank) * self.batch_size
        return range(first, first + self.batch_size)

    def _index(self, position: int) -> int:
        """Which case, or image, is at this position of the run."""
        epoch, place = divmod(position, self._in_an_epoch())
        return int(self._order(epoch)[place])


class SliceSampler(_Sampler):
    """Batches of random slices of a split, or of random 3-D patches of its volumes.

    The cases come up in a new random order in every epoch, each once. `patch` says what an example of a case is:
    (height, width), a random window of a slice; (depth, height, width), a random window of the volume; or None, a whole
    slice, which then needs one shape in all cases of the split. `foreground` is the share of examples (of cases with
    labels) that must show a labelled voxel, of any label map; the others are drawn uniformly. A slice, or volume, that
    is smaller than the window is centred in it and padded: the MR with the slice's, or volume's, own minimum per
    channel, intensities with their `Target.padding`, labels with 0, the mask with False.
    With `bias` the MR of each example is multiplied, on the scanner's scale, by a random field as a receive coil makes
    it: exp(bias * (a + b y + c x)), where a, b, c are standard normal and y, x go from -1 to 1 over the window. In 3-D
    patches the depth has a term of its own.

    Several processes (`rank` of `ranks`) take turns: their batches of one step together are the batch of a single
    process with `batch * ranks` examples. len() is the number of slices in the split. It is so for 3-D patches, too:
    as N of eq. 2 it gives the penalties the same weight in both. The sampler is a map-style dataset of steps for
    torch's DataLoader. Raises InputError for an empty split or values out of range, and at an example whose files have
    changed since its case was first opened.
    """

    examples = "slices"
    open_at_a_time = OPEN_CASES

    def __init__(
        self,
        cache: Cache,
        split: str,
        batch: int,
        patch: Sequence[int] | None,
        seed: int,
        bias: float = 0.0,
        foreground: float = 0.0,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(cache, split, batch, seed, rank, ranks)
        if cache.images is not None:
            raise InputError(f"{cache.path}: a cohort of images, expected one of volumes")
        good = patch is None or (len(patch) in (2, 3) and min(patch) >= 1)
        if batch < 1 or seed < 0 or not good or not 0 <= foreground <= 1:
            raise InputError(
                f"batch {batch}, patch {patch}, seed {seed}, foreground {foreground}: expected batch and patch >= 1, "
                "seed >= 0, foreground from 0 to 1, two or three numbers in patch"
            )
        if patch is None:
            patch = tuple(self._entries[0]["shape"][1:])
            for name, entry in zip(self.names, self._entries, strict=True):
                if tuple(entry["shape"][1:]) != patch:
                    raise InputError(
                        f"{cache.path}: slices of {self.names[0]} are {patch}, of {name} {tuple(entry['shape'][1:])}; "
                        "train on patches (patch=(height, width)) or resample to one shape"
                    )
        self.patch, self.bias, self.foreground = tuple(patch), bias, foreground
        if len(self.patch) == 3:
            self.examples = "patches"
        self._sizes = (1,) * (3 - len(self.patch)) + self.patch  # a slice is a window of depth 1

    def __len__(self) -> int:
        return sum(entry["shape"][0] for entry in self._entries)

    @override
    def _remember(self) -> None:
        super()._remember()
        self._minimum = lru_cache(None)(self._minimum_of)

    def _opened(self, name: str) -> CaseArrays:
        return self._cache.case(name)

    def _in_an_epoch(self) -> int:
        return len(self.names)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of a step: "inputs" float32 [N, C, H, W], "mask" bool [N, 1, H, W], "case" a list of N names. For
        3-D patches [D, H, W] stands in the place of [H, W].

        For each target that any case of the split has, the batch also holds, by the target's name, intensities float32
        [N, 1, H, W] or labels int64 [N, H, W], and "has_NAME" bool [N]. Where an example's case has no such target,
        "has_NAME" is False and the target is padding alone.
        """
        n = self.batch_size
        arrays: dict[str, np.ndarray] = {
            "inputs": np.empty((n, self._cache.in_channels, *self._sizes), np.float32),
            "mask": np.zeros((n, 1, *self._sizes), bool),
        }
        for target in self._targets:
            if target.kind == "labels":
                arrays[target.name] = np.zeros((n, *self._sizes), np.int64)
            else:
                arrays[target.name] = np.full((n, 1, *self._sizes), target.padding, np.float32)
        there = {f"has_{target.name}": np.zeros(n, bool) for target in self._targets}
        names = [
            self._example(position, {key: array[i : i + 1] for key, array in (arrays | there).items()})
            for i, position in enumerate(self._positions(step))
        ]
        found = {key: array.reshape(*array.shape[:-3], *self.patch) for key, array in arrays.items()} | there
        return {key: torch.from_numpy(array) for key, array in found.items()} | {"case": names}

    def _example(self, position: int, out: dict[str, np.ndarray]) -> str:
        """Writes the example at this position of the run to the arrays [1, .., D, H, W] of `out`; returns its case's
        name."""
        index = self._index(position)
        name, entry = self.names[index], self._entries[index]
        case = self._open(name)
        self._cache.check_unchanged(name)
        rng = np.random.default_rng([self.seed, 1, position])
        voxel, shape = self._labelled_voxel(rng, entry, case), case.mask.shape
        windows = [
            _window(rng, size, wanted, voxel and voxel[axis])
            for axis, (size, wanted) in enumerate(zip(shape, self._sizes, strict=True))
        ]
        (z, to_z), (y, to_y), (x, to_x) = windows
        place = (..., to_z, to_y, to_x)
        if any(size < wanted for size, wanted in zip(shape, self._sizes, strict=True)):
            lowest = case.inputs[z].min(axis=(0, 2, 3)) if len(self.patch) == 2 else self._minimum(name)
            out["inputs"][0] = lowest[:, None, None, None]
        out["inputs"][place] = case.inputs[z, :, y, x].swapaxes(0, 1)
        if self.bias:  # the field multiplies on the scanner's scale, whose zero is another number among z-scores
            zero = np.array([-one["mean"] / one["sd"] for one in entry["mr_foreground"]], np.float32)
            zero = zero[:, None, None, None]
            out["inputs"][0] = (out["inputs"][0] - zero) * _coil(rng, self.bias, self.patch) + zero
        out["mask"][place] = case.mask[z, y, x]
        for target, values in case.targets.items():
            out[target][place] = values[z, y, x]
            out[f"has_{target}"][0] = True
        return name

    def _minimum_of(self, name: str) -> np.ndarray:
        """The minimum [C] of each channel of a case's MR."""
        return self._open(name).inputs.min(axis=(0, 2, 3))

    def _labelled_voxel(
        self, rng: np.random.Generator, entry: dict[str, Any], case: CaseArrays
    ) -> tuple[int, int, int] | None:
        """Draws the place (z, y, x) of a labelled voxel that the window has to show; None if it may show anything. The
        slice is drawn first, so that the labels of this slice alone are read."""
        runs = entry["foreground_slices"]
        if not runs or rng.random() >= self.foreground:
            return None
        z = int(rng.choice(np.concatenate([np.arange(first, last) for first, last in runs])))
        maps = [array[z] for name, array in case.targets.items() if self._cache.targets[name].kind == "labels"]
        labelled = np.flatnonzero(np.any(maps, axis=0))
        y, x = divmod(int(labelled[rng.integers(len(labelled))]), case.mask.shape[2])
        return z, y, x


class ImageSampler(_Sampler):
    """Batches of random images of a split.

    All images come up in a new random order in every epoch, each once. With `flip` each is mirrored, left to right,
    with a probability of 1/2; with `shift` it is moved by up to so many pixels up or down and left or right, at random,
    and its edges are repeated. Processes share the work as those of a `SliceSampler` do. len() is the number of images
    in the split. Raises InputError for an empty split or values out of range, and at a batch with images of a block
    whose files have changed since it was first opened.
    """

    examples = "images"
    open_at_a_time = OPEN_BLOCKS

    def __init__(
        self,
        cache: Cache,
        split: str,
        batch: int,
        seed: int,
        *,
        flip: bool = False,
        shift: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(cache, split, batch, seed, rank, ranks)
        form = cache.images
        if form is None:
            raise InputError(f"{cache.path}: a cohort of volumes, expected one of images")
        if batch < 1 or seed < 0 or not 0 <= shift < min(form.size):
            raise InputError(
                f"batch {batch}, seed {seed}, shift {shift}: expected batch >= 1, seed >= 0, and 0 <= shift < "
                f"{min(form.size)}, the images' smaller side"
            )
        self.form, self.flip, self.shift = form, flip, shift
        self._ends = np.cumsum([entry["shape"][0] for entry in self._entries])  # index behind each block's last image

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _opened(self, name: str) -> BlockArrays:
        return self._cache.block(name)

    def _in_an_epoch(self) -> int:
        return len(self)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch of a step: "inputs" float32 [N, C, H, W], normalised, "case" a list of N names.

        For each target that any image of the split has, the batch also holds, by the target's name, numbers float32 [N]
        or classes int64 [N], and "has_NAME" bool [N]. Where an image lacks the target, "has_NAME" is False and the
        value 0.
        """
        n = self.batch_size
        pixels = np.empty((n, self.form.channels, *self.form.size), np.uint8)
        values = {target.name: np.empty(n, DTYPES[target.kind]) for target in self._targets}
        names, seen = [], set()
        for i, position in enumerate(self._positions(step)):
            index = self._index(position)
            number = int(np.searchsorted(self._ends, index, "right"))
            block, place = self._open(self.names[number]), index - int(self._ends[number])
            if number not in seen:
                self._cache.check_unchanged(self.names[number])
                seen.add(number)
            pixels[i] = self._moved(block.inputs[place], position)
            for target in self._targets:
                values[target.name][i] = block.targets[target.name][place]
            names.append(block.names[place].decode())
        batch: dict[str, Any] = {"inputs": torch.from_numpy(self.form.normalised(pixels)), "case": names}
        for target in self._targets:
            found = values[target.name]
            there = found >= 0 if target.kind == "class" else ~np.isnan(found)
            dtype = np.int64 if target.kind == "class" else np.float32
            batch[target.name] = torch.from_numpy(np.where(there, found, 0).astype(dtype))
            batch[f"has_{target.name}"] = torch.from_numpy(there)
        return batch

    def _moved(self, image: np.ndarray, position: int) -> np.ndarray:
        """The image [C, H, W], mirrored and shifted as the position in the run decides."""
        if not self.flip and not self.shift:
            return image
        rng = np.random.default_rng([self.seed, 1, position])
        if self.flip and rng.random() < 0.5:
            image = image[:, :, ::-1]
        if self.shift:
            down, right = rng.integers(-self.shift, self.shift + 1, 2)
            _, height, width = image.shape
            rows = (np.arange(height) - down).clip(0, height - 1)
            columns = (np.arange(width) - right).clip(0, width - 1)
            image = image[:, rows[:, None], columns]
        return image


def _window(rng: np.random.Generator, size: int, wanted: int, around: int | None) -> tuple[slice, slice]:
    """Draws a window along one axis: which part of the volume is taken (with `around` in it), and where in the window
    that part goes."""
    length = min(size, wanted)
    lowest, highest = 0, size - length
    if around is not None:
        lowest, highest = max(lowest, around - length + 1), min(highest, around)
    start = int(rng.integers(lowest, highest + 1))
    before = (wanted - length) // 2
    return slice(start, start + length), slice(before, before + length)


def _coil(rng: np.random.Generator, strength: float, sizes: tuple[int, ...]) -> np.ndarray:
    """A smooth positive field around 1, of these sizes."""
    level, *slopes = (strength * rng.normal(size=1 + len(sizes))).astype(np.float32)
    log = np.full(sizes, level, np.float32)
    for axis, (slope, size) in enumerate(zip(slopes, sizes, strict=True)):
        log += slope * _from_minus_one_to_one(size).reshape(-1, *[1] * (len(sizes) - 1 - axis))
    return np.exp(log)


@lru_cache(8)
def _from_minus_one_to_one(count: int) -> np.ndarray:
    return np.linspace(-1, 1, count, dtype=np.float32)
