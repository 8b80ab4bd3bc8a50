"""Writes images to memory maps: the images of a split lie in blocks, and a block is a folder that is written as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import sha256_of
from .cache import BLOCK_ENTRY, DTYPES, VERSION
from .cases import SPLITS, Case, Cohort
from .images import load_image, read_image
from .targets import Target
from .written import complete, write

BLOCK = 4096  # the most images in a block
BLOCK_BYTES = 2**27  # the most bytes of pixels in a block (a single image may be larger)


@dataclass(frozen=True)
class Block:
    """Images of one split that are written together; `name` is the folder's."""

    name: str
    split: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Pixels:
    """What each image of a cache is: its size (height, width), its channels, and whether it is resized to that size."""

    size: tuple[int, int]
    channels: int
    resized: bool

    @property
    def bytes(self) -> int:
        """The bytes of one image: a byte for each pixel and channel."""
        return self.channels * self.size[0] * self.size[1]


def pixels_of(cohort: Cohort, size: tuple[int, int] | None, skip: bool) -> Pixels:
    """What all images of a cohort have to be: as the first one is, or resized to `size` (height, width).

    skip: images that can't be read are passed over. Raises InputError if the first image (with `skip`: every image)
    can't be read, or if there are no cases.
    """
    first: InputError | None = None
    for case in cohort.cases:
        try:
            channels, *found = read_image(case.inputs[0]).shape
            return Pixels(size or (found[0], found[1]), channels, size is not None)
        except InputError as error:
            first = first or InputError(f"case {case.name}: {error}")
            if not skip:
                break
    raise first or InputError(f"{cohort.root}: no cases")


def blocks_of(cohort: Cohort, pixels: Pixels) -> list[Block]:
    """The blocks of all splits, with the images in the cohort's order and as many in a block as fit."""
    count = max(1, min(BLOCK, BLOCK_BYTES // pixels.bytes))
    splits = {split: cohort.split(split) for split in SPLITS}
    return [
        Block(f"{split}_{start // count:05d}", split, cases[start : start + count])
        for split, cases in splits.items()
        for start in range(0, len(cases), count)
    ]


def process_block(
    targets: Mapping[str, Target], pixels: Pixels, skip: bool, out: Path, block: Block
) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Writes a block, unless its folder is already complete and up to date.

    Returns the block's entry in the manifest (None if no image can be used), and why images are refused, {case:
    reason}. Without `skip` the first refused image ends the work, and nothing is written.
    """
    source, folder = _content_hash(block, targets, pixels), out / block.name
    entry = complete(folder, source, BLOCK_ENTRY - {"split"}, {"inputs", "names", *targets})
    if entry is None:
        images = np.empty((len(block.cases), pixels.channels, *pixels.size), np.uint8)
        good: list[Case] = []
        rejected: dict[str, str] = {}
        for case in block.cases:
            try:
                images[len(good)] = load_image(case, pixels.size, pixels.channels, pixels.resized)
                good.append(case)
            except InputError as error:
                rejected[case.name] = str(error)
                if not skip:
                    break
        if not good or (rejected and not skip):
            return None, rejected
        entry = _write_block(good, images[: len(good)], targets, rejected, source, folder)
    return entry, entry["rejected"]


def _content_hash(block: Block, targets: Mapping[str, Target], pixels: Pixels) -> str:
    """The hash of the contents of all images, of their names and targets, and of all else that the arrays depend on."""
    about = [[name, target.kind, target.names] for name, target in targets.items()]
    rows = [[case.name, _sha256(case.inputs[0]), [case.values.get(name) for name in targets]] for case in block.cases]
    found = [VERSION, pixels.size, pixels.channels, pixels.resized, about, rows]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    """The hash of a file; None for a file that can't be read, which `load_image` will refuse."""
    try:
        return sha256_of(path) if path.is_file() else None
    except (InputError, OSError, ValueError):
        return None


def _write_block(
    cases: Iterable[Case],
    images: np.ndarray,
    targets: Mapping[str, Target],
    rejected: dict[str, str],
    source: str,
    folder: Path,
) -> dict[str, Any]:
    names = np.array([case.name.encode() for case in cases])
    arrays = {"inputs": images, "names": names}
    statistics: dict[str, dict[str, Any]] = {}
    for name, target in targets.items():
        missing = -1 if target.kind == "class" else np.nan
        values = np.array([case.values.get(name, missing) for case in cases], DTYPES[target.kind])
        arrays[name], there = values, values[values >= 0] if target.kind == "class" else values[~np.isnan(values)]
        if target.kind == "class":
            statistics[name] = {"counts": np.bincount(there, minlength=len(target.names)).tolist()}
        else:
            exact, some = there.astype(np.float64), bool(there.size)
            mean, sd = (float(exact.mean()), float(exact.std())) if some else (0.0, 0.0)
            statistics[name] = {"count": int(there.size), "mean": mean, "sd": sd}
    counts = np.zeros((images.shape[1], 256), np.int64)  # how many pixels have each value in each channel
    for image in images:
        counts += [np.bincount(channel.ravel(), minlength=256) for channel in image]
    entry = {
        "shape": list(images.shape),
        "name_bytes": names.dtype.itemsize,
        "targets": statistics,
        "pixels": {
            "sum": (counts @ np.arange(256)).tolist(),
            "squares": (counts @ np.arange(256) ** 2).tolist(),
        },
        "rejected": rejected,
        "notes": [],
    }
    return write(folder, arrays, entry, source, folder.with_name("manifest.json"))
