"""Writes a cohort of three small cases whose every voxel is known, and a cohort of small images."""

import csv
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from sfg_fast.data import Cohort, Grid, read_cohort, write_volume

LABELS = {"background": 0, "prostate": 1, "bladder": 2}
SHAPES = {"a": (4, 7, 6), "b": (3, 5, 9), "c": (2, 7, 6)}  # Z, Y, X
AFFINE = np.diag([-2.0, -3, 4, 1])  # mm, RAS; the voxels lie in the order LPS


def arrays(name: str) -> dict[str, np.ndarray]:
    """Returns the random volumes [Z, Y, X] of a case by file: two MR channels, CT (HU), labels, mask."""
    rng = np.random.default_rng(ord(name))
    shape = SHAPES[name]
    return {
        "mr_0": rng.gamma(2, 100, shape).astype(np.float32),
        "mr_1": rng.normal(50, 3, shape).astype(np.float32),
        "ct": rng.integers(-1000, 2000, shape).astype(np.int16),
        "labels": rng.integers(0, 3, shape).astype(np.uint8),
        "mask": rng.integers(0, 2, shape).astype(np.uint8),
    }


def write_cohort(root: Path, names: Sequence[str] = "abc", leave_out: Collection[tuple[str, str]] = ()) -> Cohort:
    """Writes the cases, each in its folder below ROOT, and reads the cohort. Case c is the test split.

    leave_out: pairs (case, file) that are not written.
    """
    for name in names:
        (root / name).mkdir(parents=True)
        for kind, array in arrays(name).items():
            if (name, kind) not in leave_out:
                z, y, x = array.shape
                write_volume(root / name / f"{kind}.nii", array, Grid(AFFINE, (x, y, z)), array.dtype)
    split = {"train": [name for name in names if name != "c"], "test": [name for name in names if name == "c"]}
    (root / "dataset.json").write_text(json.dumps({"labels": LABELS, "split": split}))
    return read_cohort(root)


def volume(path: Path, array: np.ndarray) -> None:
    """Writes an array [Z, Y, X] as float32 on the cohort's grid."""
    z, y, x = array.shape
    write_volume(path, array, Grid(AFFINE, (x, y, z)), np.float32)


def spoil(cohort: Cohort, file: str, value: ArrayLike, case: str = "b") -> Cohort:
    """Overwrites one file of a case, and returns the cohort. value: of all voxels, or what broadcasts to [Z, Y, X]."""
    volume(cohort.root / case / f"{file}.nii", np.full(SHAPES[case], value))
    return cohort


# --- images -----------------------------------------------------------------------------------------------------------


def picture(index: int, size: tuple[int, int] = (8, 6), channels: int = 3) -> np.ndarray:
    """Returns a uint8 image [H, W, C] (of one channel [H, W]) of noise; each index has a brightness of its own."""
    rng = np.random.default_rng(index)
    shape = (*size, channels) if channels > 1 else size
    return (rng.integers(0, 120, shape) + 4 * (index % 34)).astype(np.uint8)


def row_of(index: int, count: int) -> dict[str, str]:
    """Returns the row of image `index` in a list of `count` images.

    The first 60 % are training images, then 20 % validation and 20 % test images. Every tenth age and every seventh
    gender is missing.
    """
    return {
        "image": f"faces/{index:04d}.png",
        "split": "train" if index < 0.6 * count else "val" if index < 0.8 * count else "test",
        "age": "" if index % 10 == 9 else str(20 + index % 34),
        "gender": "" if index % 7 == 6 else ("male", "female")[index % 2],
    }


def small_images(
    root: Path, count: int = 20, size: tuple[int, int] = (8, 6), channels: int = 3, ending: str = ".png"
) -> Path:
    """Writes ROOT/list.csv, ROOT/targets.json (age in years; gender: male, female) and the images `picture(index)`.

    size: (height, width) of the images. Returns the path of the list.
    """
    (root / "faces").mkdir(parents=True)
    rows = [row_of(index, count) for index in range(count)]
    for index, row in enumerate(rows):
        row["image"] = row["image"].replace(".png", ending)
        Image.fromarray(picture(index, size, channels)).save(root / row["image"])
    (root / "targets.json").write_text('{"age": {"unit": "years"}, "gender": {"classes": ["male", "female"]}}')
    return write_list(root / "list.csv", rows)


def write_list(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes the rows as a CSV file with a header, and returns its path."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
