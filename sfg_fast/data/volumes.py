"""Volumes as slice-first arrays: this module reads NIfTI, and MetaImage and NRRD where SimpleITK is installed.

Arrays are handed out as [Z, Y, X], whatever the orientation of the file. Each axis of the file becomes the patient axis
closest to it: axis 0 grows towards Superior (axial slices, inferior first), axis 1 towards Anterior, axis 2 towards the
patient's Right. (The world is NIfTI's, RAS+: +x is Right, +y Anterior, +z Superior, in mm, whatever unit the file has.)
Voxels are only permuted and flipped, never resampled. `Grid` remembers how the file was stored and how its header says
where it lies, so that results go back into the same place, for every program that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError
from . import itk, nifti
from .forms import Forms
from .notes import Note
from .stored import Stored, apart, check, invertible, smallest_edge

FORMATS = ".nii or .nii.gz (or .mha, .mhd, .nrrd, .nhdr with SimpleITK)"  # the formats that are read, for messages
GRID_TOLERANCE = 0.1  # of a voxel edge: how far apart the corner voxels of two grids may lie that count as the same
_LABEL_TOLERANCE = 1e-3  # integers that a header scales by a float32 scl_slope come back as 254.99998
_STORED_TYPES = tuple(np.dtype(name) for name in ("<f4", "u1", "<i2"))
_RAS = np.array([(0, 1), (1, 1), (2, 1)])  # nibabel's orientation of an array [x, y, z] with axes towards RAS


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie.

    affine (4 x 4 float64, index to mm) and shape (3-D) are those of the voxels as stored. forms: those of a NIfTI
    header (None: the file has another format, or the grid was made in code). notes: what a person should know of the
    file.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    forms: Forms | None = None
    notes: tuple[Note, ...] = ()

    def _orientation(self) -> np.ndarray:
        """nibabel's orientation [3, 2]: for each stored axis the patient axis closest to it, and its sign."""
        from nibabel.orientations import io_orientation

        return io_orientation(self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the axes of the array [Z, Y, X]."""
        z, y, x = np.linalg.norm(self.canonical_affine[:3, :3], axis=0)[::-1]
        return float(z), float(y), float(x)

    @property
    def array_shape(self) -> tuple[int, int, int]:
        """Shape of the array [Z, Y, X]."""
        x, y, z = (self.shape[axis] for axis in np.argsort(self._orientation()[:, 0]))
        return z, y, x

    @property
    def canonical_affine(self) -> np.ndarray:
        """The affine, 4 x 4, that maps the index (x, y, z, 1) of the voxel array[z, y, x] to its place (Right,
        Anterior, Superior) in mm."""
        from nibabel.orientations import inv_ornt_aff

        return self.affine @ inv_ornt_aff(self._orientation(), self.shape)

    def to_json(self) -> dict[str, Any]:
        """The grid without its notes as an object that JSON can hold, for `from_json`."""
        forms = self.forms and self.forms.to_json()
        return {"affine": self.affine.tolist(), "shape": list(self.shape), "forms": forms}

    @classmethod
    def from_json(cls, content: Any) -> Grid:
        """The grid that `to_json` described. Raises InputError for any other content."""
        try:
            affine = np.array(content["affine"], dtype=np.float64)
            x, y, z = content["shape"]
            forms = content.get("forms")
            grid = cls(affine, (int(x), int(y), int(z)), None if forms is None else Forms.from_json(forms))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"a grid needs an affine and a shape, not {content!r}") from error
        if affine.shape != (4, 4) or not invertible(affine) or min(grid.shape) < 1:
            raise InputError(f"a grid needs an invertible 4 x 4 affine and a 3-D shape, not {content!r}")
        return grid

    def __str__(self) -> str:
        affine = [[float(f"{value:.6g}") for value in row] for row in self.affine.tolist()]
        return f"shape {self.shape} and affine {affine} in mm"


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether two grids have the same voxels at the same places, in whatever order and direction each file stores them:
    no corner voxel may lie more than GRID_TOLERANCE voxel edges apart."""
    return _turn(a, b) is not None


def onto(reference: Grid, array: np.ndarray, grid: Grid) -> np.ndarray | None:
    """The array [Z, Y, X] that was read with `grid`, with its axes as those of `reference`; None if the two aren't the
    same grid. (The axes can differ between two files of one grid: where an axis lies halfway between two patient axes,
    at 45 degrees, rounding decides which it becomes.)"""
    from nibabel.orientations import apply_orientation

    if (turn := _turn(grid, reference)) is None:
        return None
    turned = apply_orientation(_as_stored(array, grid), turn)
    return np.ascontiguousarray(apply_orientation(turned, reference._orientation()).transpose(2, 1, 0))


def _turn(grid: Grid, reference: Grid) -> np.ndarray | None:
    """For each stored axis of the grid the axis of the reference that it runs along, and its sign: [3, 2]. None if the
    voxels aren't the same."""
    from nibabel.orientations import inv_ornt_aff

    # The files' own axes are compared, not the patient axes closest to them, which may be a matter of rounding.
    axes, theirs = (one.affine[:3, :3] / np.linalg.norm(one.affine[:3, :3], axis=0) for one in (grid, reference))
    cosines = theirs.T @ axes
    along = np.abs(cosines).argmax(0)
    if sorted(along) != [0, 1, 2] or tuple(grid.shape[axis] for axis in along.argsort()) != reference.shape:
        return None
    turn = np.stack([along, np.where(cosines[along, range(3)] < 0, -1, 1)], 1)
    far = apart(grid.affine @ inv_ornt_aff(turn, grid.shape), reference.affine, reference.shape)
    tolerance = GRID_TOLERANCE * min(smallest_edge(grid.affine), smallest_edge(reference.affine))
    return turn if far <= tolerance else None


def read_volume(path: Path | str) -> tuple[np.ndarray, Grid]:
    """Reads a volume: float32 [Z, Y, X] (see the module's text for the axes), scaled as its header says, and its grid.

    Raises InputError if there is no such file, if its format isn't read (FORMATS) or needs a SimpleITK that isn't
    installed, if the file can't be read, if the volume isn't 3-D (trailing axes of length 1 are accepted) or is empty,
    if it has more than MAX_VOXELS voxels or more than the file can hold, for a header of more than MAX_HEADER_BYTES, a
    singular affine, voxels that aren't real numbers, and NaN or infinite voxels.
    """
    path = Path(path)
    stored, grid = _read(path, np.float32)
    if not np.isfinite(stored).all():
        bad = int(np.count_nonzero(~np.isfinite(stored)))
        raise InputError(f"{path}: {bad} of {stored.size} voxels are NaN or infinite, expected finite values")
    return _to_array(stored, grid), grid


def read_labels(path: Path | str) -> tuple[np.ndarray, Grid]:
    """Reads a volume of labels: uint8 [Z, Y, X], and its grid.

    Raises InputError as `read_volume` does, and for any value that isn't a whole number from 0 to 255.
    """
    path = Path(path)
    stored, grid = _read(path, None)
    if stored.dtype != np.uint8:
        whole = np.rint(stored)
        with np.errstate(invalid="ignore"):  # inf - inf
            good = (np.abs(stored - whole) <= _LABEL_TOLERANCE) & (whole >= 0) & (whole <= 255)  # False for NaN
        if not good.all():
            raise InputError(f"{path}: label value {stored[~good][0]:g}, expected whole numbers from 0 to 255")
        stored = whole.astype(np.uint8)
    return _to_array(stored, grid), grid


def write_volume(path: Path | str, array: np.ndarray, grid: Grid, dtype: DTypeLike) -> None:
    """Writes an array [Z, Y, X] as .nii or .nii.gz in the grid's own stored orientation, affine and shape.

    The header says where the voxels lie as the grid's own file does (`Forms`); for a grid without forms it says it by
    both forms, with code 1, in mm. dtype: float32, uint8 or int16, stored without scaling; values for the latter two
    are rounded. The file is complete or absent.
    Raises InputError for another file ending or dtype, a shape that isn't the grid's, values that aren't finite or
    don't fit the dtype, axes that aren't at right angles in a grid without forms, and a place that can't be written to.
    """
    path, dtype = Path(path), np.dtype(dtype).newbyteorder("<")
    if not path.name.lower().endswith(nifti.ENDINGS):
        raise InputError(f"{path}: the file name must end in .nii or .nii.gz")
    if dtype not in _STORED_TYPES:
        raise InputError(f"{path}: can't store {np.dtype(dtype).name}, expected float32, uint8 or int16")
    if array.shape != grid.array_shape:
        raise InputError(f"{path}: the array has shape {array.shape}, its grid {grid.array_shape}")
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values = array if dtype.kind == "f" or array.dtype.kind in "biu" else np.rint(array)
    low, high = float(values.min()), float(values.max())  # NaN fails the comparison below
    if not limits.min <= low <= high <= limits.max:
        raise InputError(f"{path}: values from {low:g} to {high:g} don't fit {dtype.name}")
    nifti.write(path, _as_stored(values, grid).astype(dtype), grid.affine, grid.forms)


def volume_stem(name: str) -> str | None:
    """The file name without the ending of a format that is read, whatever the case of its letters; None for a file of
    any other ending."""
    for ending in (*nifti.ENDINGS, *itk.ENDINGS):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return None


def volume_files(path: Path) -> tuple[Path, ...]:
    """The file, and the one that holds its voxels if that is another (.mhd, .nhdr). Raises InputError as
    `itk.data_file` does."""
    data = itk.data_file(path) if path.name.lower().endswith(itk.ENDINGS) else None
    return (path,) if data is None else (path, data)


def volume_shape(path: Path) -> tuple[int, int, int]:
    """The shape [Z, Y, X] from the header alone. Raises InputError for whatever is wrong with the header."""
    return _open(path)[1].array_shape


def _open(path: Path) -> tuple[Stored, Grid]:
    """The file and its grid after every check of the header; nothing but the header was read."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if volume_stem(path.name) is None:
        raise InputError(f"{path}: the file name must end in {FORMATS}")
    stored = (nifti if path.name.lower().endswith(nifti.ENDINGS) else itk).opened(path)
    return stored, Grid(stored.affine, check(path, stored), stored.forms, stored.notes)


def _read(path: Path, dtype: DTypeLike | None) -> tuple[np.ndarray, Grid]:
    """The voxels [x, y, z] as stored, as dtype (None: as exact as the file has them), and their grid."""
    stored, grid = _open(path)
    with np.errstate(over="ignore", invalid="ignore"):  # a float64 beyond float32 becomes inf, refused later
        return stored.read(dtype).reshape(grid.shape), grid


def _to_array(stored: np.ndarray, grid: Grid) -> np.ndarray:
    """Turns voxels as stored into a contiguous array [Z, Y, X]."""
    from nibabel.orientations import apply_orientation

    return np.ascontiguousarray(apply_orientation(stored, grid._orientation()).transpose(2, 1, 0))


def _as_stored(array: np.ndarray, grid: Grid) -> np.ndarray:
    """Turns an array [Z, Y, X] into voxels [x, y, z] as stored; the result is a view."""
    from nibabel.orientations import apply_orientation, ornt_transform

    return apply_orientation(array.transpose(2, 1, 0), ornt_transform(_RAS, grid._orientation()))
