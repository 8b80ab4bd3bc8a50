"""NIfTI volumes as slice-first arrays.

Arrays are handed out as [Z, Y, X], whatever the orientation of the file: the axes are the closest to patient axes,
axis 0 grows towards Superior (axial slices, inferior first), axis 1 towards Anterior, axis 2 towards the patient's
Right. (NIfTI's world is RAS+: +x is Right, +y Anterior, +z Superior, in mm.) Voxels are only permuted and flipped,
never resampled; `Grid` remembers how the file was stored, so that results go back into the same place.
"""

from __future__ import annotations

import gzip
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError
from ..files import one_line, replacing

# Refused from the header alone, before any memory is taken:
MAX_VOXELS = 2**29  # 2 GiB as float32; 1024 x 1024 x 512
MAX_HEADER_BYTES = 2**24  # everything before the voxels, extensions included
DEFLATE_LIMIT = 1032  # no gzip file holds more than this times its own size
GRID_TOLERANCE_MM = 0.1  # how far apart the corner voxels of two grids may lie that count as the same
_LABEL_TOLERANCE = 1e-3  # integers behind a float32 scl_slope come back as 254.99998
_STORED_TYPES = tuple(np.dtype(name) for name in ("float32", "uint8", "int16"))


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie: its affine (4 x 4 float64, index to mm) and its 3-D shape, both as stored."""

    affine: np.ndarray
    shape: tuple[int, int, int]

    def _orientation(self) -> np.ndarray:
        """nibabel's orientation: for each stored axis the patient axis closest to it, and its sign. [3, 2]"""
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
        """Maps the index (x, y, z, 1) of voxel array[z, y, x] to its place (Right, Anterior, Superior) in mm."""
        from nibabel.orientations import inv_ornt_aff

        return self.affine @ inv_ornt_aff(self._orientation(), self.shape)

    def to_json(self) -> dict[str, Any]:
        return {"affine": self.affine.tolist(), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, content: Any) -> Grid:
        """The grid that `to_json` described. InputError if content is anything else."""
        try:
            affine = np.array(content["affine"], dtype=np.float64)
            x, y, z = content["shape"]
            grid = cls(affine, (int(x), int(y), int(z)))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"a grid needs an affine and a shape, not {content!r}") from error
        if affine.shape != (4, 4) or not _invertible(affine) or min(grid.shape) < 1:
            raise InputError(f"a grid needs an invertible 4 x 4 affine and a 3-D shape, not {content!r}")
        return grid

    def __str__(self) -> str:
        return f"shape {self.shape} and affine {np.round(self.affine, 4).tolist()}"


def same_grid(a: Grid, b: Grid) -> bool:
    """Whether the arrays [Z, Y, X] of both match voxel by voxel: the same shape, and no corner voxel more than
    GRID_TOLERANCE_MM apart. Files stored in different orientations can be on the same grid."""
    if a.array_shape != b.array_shape:
        return False
    z, y, x = (n - 1 for n in a.array_shape)
    corners = np.array([(i, j, k, 1) for i in (0, x) for j in (0, y) for k in (0, z)], dtype=np.float64)
    apart = corners @ (a.canonical_affine - b.canonical_affine).T
    return bool(np.linalg.norm(apart, axis=1).max() <= GRID_TOLERANCE_MM)


def read_volume(path: Path | str) -> tuple[np.ndarray, Grid]:
    """The volume as float32 [Z, Y, X] (see the module's text for the axes), scaled as its header says, and its grid.

    Raises InputError: no such file, another ending than .nii or .nii.gz, not a readable NIfTI file, not 3-D (trailing
    axes of length 1 are accepted), empty, more than MAX_VOXELS voxels or more than the file can hold, a header of more
    than MAX_HEADER_BYTES, a singular affine, voxels that aren't real numbers, NaN or infinite voxels.
    """
    path = Path(path)
    stored, grid = _read(path, np.float32)
    if not np.isfinite(stored).all():
        bad = int(np.count_nonzero(~np.isfinite(stored)))
        raise InputError(f"{path}: {bad} of {stored.size} voxels are NaN or infinite, expected finite values")
    return _to_array(stored, grid), grid


def read_labels(path: Path | str) -> tuple[np.ndarray, Grid]:
    """The label volume as uint8 [Z, Y, X] and its grid.

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
    """Writes array [Z, Y, X] as .nii or .nii.gz in the grid's own stored orientation, affine and shape.

    dtype: float32, uint8 or int16, stored without scaling; values for the latter two are rounded. The file is
    complete or absent. Raises InputError: another file ending or dtype, a shape that isn't the grid's, values that
    aren't finite or don't fit the dtype, a place that can't be written to.
    """
    import nibabel as nib
    from nibabel.orientations import apply_orientation, ornt_transform

    path, dtype = Path(path), np.dtype(dtype)
    if nifti_stem(path.name) is None:
        raise InputError(f"{path}: the file name must end in .nii or .nii.gz")
    if dtype not in _STORED_TYPES:
        raise InputError(f"{path}: can't store {dtype}, expected float32, uint8 or int16")
    if array.shape != grid.array_shape:
        raise InputError(f"{path}: the array has shape {array.shape}, its grid {grid.array_shape}")
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values = array if dtype.kind == "f" or array.dtype.kind in "biu" else np.rint(array)
    low, high = float(values.min()), float(values.max())  # NaN fails the comparison below
    if not limits.min <= low <= high <= limits.max:
        raise InputError(f"{path}: values from {low:g} to {high:g} don't fit {dtype}")

    ras = np.array([(0, 1), (1, 1), (2, 1)])
    stored = apply_orientation(values.transpose(2, 1, 0), ornt_transform(ras, grid._orientation()))
    image = nib.Nifti1Image(stored.astype(dtype), grid.affine)
    image.set_sform(grid.affine, code=1)
    image.set_qform(grid.affine, code=1)
    image.header.set_xyzt_units("mm")
    with replacing(path) as partial:
        nib.save(image, partial)


def nifti_stem(name: str) -> str | None:
    """The file name without .nii or .nii.gz; None for any other file."""
    for ending in (".nii.gz", ".nii"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return None


def volume_shape(path: Path) -> tuple[int, int, int]:
    """The shape [Z, Y, X] from the header alone; raises InputError for whatever is wrong with the header."""
    _, grid = _open(path)
    return grid.array_shape


def _open(path: Path) -> tuple[Any, Grid]:
    """nibabel's image, of which nothing but the header was read, after every check of the header."""
    import nibabel as nib

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if nifti_stem(path.name) is None:
        raise InputError(f"{path}: the file name must end in .nii or .nii.gz")
    try:
        _check_start(path)
        image = nib.load(path, mmap=False)
    except InputError:
        raise
    except Exception as error:  # whatever a parser may raise on bytes from anywhere
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)})") from error
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(f"{path}: a {type(image).__name__}, expected a NIfTI file")

    stored_shape = shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"{path}: shape {shape}, expected a 3-D volume")
    if min(shape) < 1:
        raise InputError(f"{path}: shape {shape}, an empty volume")
    if math.prod(shape) > MAX_VOXELS:
        raise InputError(f"{path}: shape {shape} is more than the {MAX_VOXELS} voxels that are accepted")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels of type {dtype}, expected real numbers")
    size, needed = path.stat().st_size, math.prod(stored_shape) * dtype.itemsize
    if needed > size * (DEFLATE_LIMIT if path.suffix == ".gz" else 1):
        raise InputError(f"{path}: shape {shape} of {dtype} needs {needed} bytes, more than a file of {size} can hold")
    # Headers hold float32; an affine computed from the quaternion is rounded to what a written file will hold.
    with np.errstate(over="ignore"):  # infinite then, and refused
        affine = np.asarray(image.affine, dtype=np.float32).astype(np.float64)
    if not _invertible(affine):
        raise InputError(f"{path}: the affine {affine.tolist()} is singular, expected three independent axes in mm")
    return image, Grid(affine, shape)


def _check_start(path: Path) -> None:
    """Where the voxels start, and the extensions before them, are numbers in the file that a reader would follow to
    anywhere: InputError if they are absurd."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        start = file.read(540)
        sizes = {order: struct.unpack_from(order + "i", start.ljust(4, b"\0"))[0] for order in "<>"}
        order = next((order for order, size in sizes.items() if size in (348, 540)), None)
        if order is None or len(start) < sizes[order]:
            return  # no NIfTI: nibabel says so
        header = sizes[order]
        kind, where = ("f", 108) if header == 348 else ("q", 168)  # NIfTI-1, NIfTI-2
        offset = struct.unpack_from(order + kind, start, where)[0]
        if not 0 <= offset <= MAX_HEADER_BYTES:  # NaN, too
            raise InputError(f"{path}: the voxels start at byte {offset:g}, expected at most {MAX_HEADER_BYTES}")
        file.seek(header)
        extensions = file.read(max(int(offset) - header, 0))
    position = 4
    while extensions[:1] not in (b"", b"\0") and position + 8 <= len(extensions):
        (length,) = struct.unpack_from(order + "i", extensions, position)
        if not 8 <= length <= len(extensions) - position:
            raise InputError(f"{path}: a header extension of {length} bytes, expected at most {len(extensions)}")
        position += length


def _read(path: Path, dtype: DTypeLike | None) -> tuple[np.ndarray, Grid]:
    """The voxels as stored, as dtype (None: as exact as the file has them)."""
    image, grid = _open(path)
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                content = file.read(image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize)
                file.read(1)  # the checksum is compared at the end of the file, where nibabel never comes
            image = type(image).from_bytes(content)
        with np.errstate(over="ignore", invalid="ignore"):  # a float64 beyond float32 becomes inf, refused later
            stored = np.asarray(image.dataobj, dtype=dtype)
    except Exception as error:
        raise InputError(f"{path}: the voxels can't be read ({one_line(error)})") from error
    return stored.reshape(grid.shape), grid


def _to_array(stored: np.ndarray, grid: Grid) -> np.ndarray:
    """Voxels as stored -> contiguous [Z, Y, X]."""
    from nibabel.orientations import apply_orientation

    return np.ascontiguousarray(apply_orientation(stored, grid._orientation()).transpose(2, 1, 0))


def _invertible(affine: np.ndarray) -> bool:
    if not np.isfinite(affine).all():
        return False
    axes = affine[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):  # infinite then, or no number: neither is
        volume_of_box = np.prod(np.linalg.norm(axes, axis=0))
        return bool(volume_of_box > 0 and abs(np.linalg.det(axes)) > 1e-6 * volume_of_box)
