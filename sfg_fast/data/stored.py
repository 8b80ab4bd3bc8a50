"""A volume as its file stores it, before any voxel is read, and the checks that hold for every format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError
from .forms import Forms
from .notes import Note

# Refused from the header alone, before any memory is taken:
MAX_VOXELS = 2**29  # 2 GiB as float32; 1024 x 1024 x 512
DEFLATE_LIMIT = 1032  # no gzip file holds more than this times its own size


@dataclass(frozen=True, eq=False)
class Stored:
    """The header of a file, and a function that reads its voxels.

    shape: the shape as stored, trailing axes included. dtype: the type of the voxels in the file. affine: 4 x 4
    float64, from the index to (Right, Anterior, Superior) in mm. forms: how a NIfTI header says this (None: another
    format). room: the most bytes of voxels that a file of this size can hold. notes: what a person should know of the
    file. read: returns the voxels as a dtype (None: as exact as the file has them), or raises InputError.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    forms: Forms | None
    room: int
    notes: tuple[Note, ...]
    read: Callable[[DTypeLike | None], np.ndarray]


def check(path: Path, stored: Stored) -> tuple[int, int, int]:
    """The shape without trailing axes of length 1. Raises InputError if that isn't 3-D, if the volume is empty, larger
    than MAX_VOXELS or than the file can hold, or if its voxels aren't real numbers."""
    shape = stored.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"{path}: shape {shape}, expected a 3-D volume")
    if min(shape) < 1:
        raise InputError(f"{path}: shape {shape}, an empty volume")
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{path}: shape {shape} is more than the {MAX_VOXELS} voxels that are accepted")
    if stored.dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {stored.dtype}, expected real numbers")
    if (needed := math.prod(shape) * stored.dtype.itemsize) > stored.room:
        raise InputError(
            f"{path}: shape {shape} of {stored.dtype} needs {needed} bytes, more than a file of {path.stat().st_size} "
            "can hold"
        )
    return shape


def check_affine(path: Path, affine: np.ndarray) -> None:
    """Raises InputError unless the axes of a file's affine are finite and independent."""
    if not invertible(affine):
        raise InputError(f"{path}: the affine {affine.tolist()} is singular, expected three independent axes in mm")


def invertible(affine: np.ndarray) -> bool:
    """Whether the axes of a 4 x 4 affine are finite and independent."""
    if not np.isfinite(affine).all():
        return False
    axes = affine[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes inf or NaN, which compares as False
        volume_of_box = np.prod(np.linalg.norm(axes, axis=0))
        return bool(volume_of_box > 0 and abs(np.linalg.det(axes)) > 1e-6 * volume_of_box)


def apart(a: np.ndarray, b: np.ndarray, shape: tuple[int, int, int]) -> float:
    """The largest distance in mm between the places where two affines put the same corner voxel of a volume of this
    stored shape."""
    x, y, z = (n - 1 for n in shape)
    corners = np.array([(i, j, k, 1) for i in (0, x) for j in (0, y) for k in (0, z)], dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        distances = np.linalg.norm(corners @ (a - b).T, axis=1)
    return float(distances.max())


def smallest_edge(affine: np.ndarray) -> float:
    """The smallest edge in mm of the voxels of an affine."""
    return float(np.linalg.norm(affine[:3, :3], axis=0).min())
