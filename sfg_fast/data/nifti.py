"""NIfTI files: this module reads and writes them.

Everything that stands before the voxels is checked before a reader follows it. Files are written byte by byte, so that
their headers say where the voxels lie just as the header of the MR does.
"""

from __future__ import annotations

import gzip
import logging
import math
import struct
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError
from ..files import one_line, replacing
from .forms import Forms, millimetres
from .notes import Note
from .stored import DEFLATE_LIMIT, Stored, apart, check_affine, smallest_edge

ENDINGS = (".nii.gz", ".nii")
MAX_HEADER_BYTES = 2**24  # the most bytes before the voxels, extensions included
FORMS_TOLERANCE = 0.1  # of a voxel edge: two forms that differ less say the same place
_VERSIONS = {348: 1, 540: 2}  # the version by the header's length in bytes


def opened(path: Path) -> Stored:
    """Reads the header of a NIfTI-1 or -2 file (.nii, .nii.gz in any case of letters). Raises InputError if the file
    can't be one."""
    import nibabel as nib

    try:
        start = _start(path)
        version = _VERSIONS[len(start)]
        kind = nib.Nifti1Header if version == 1 else nib.Nifti2Header
        as_it_is = kind(start, check=False)
        header, notes = _mended(as_it_is.copy(), path)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        with np.errstate(over="ignore", invalid="ignore"):  # an affine that overflows is infinite, and refused
            affine = np.asarray(header.get_best_affine(), np.float64)
            affine[:3] *= millimetres(int(header["xyzt_units"]))
        check_affine(path, affine)
        forms = Forms.of_header(as_it_is, version)
    except InputError:
        raise
    except Exception as error:  # whatever a parser may raise on bytes from anywhere
        raise _refusal(path, error, "not a readable NIfTI file") from error

    def read(wanted: DTypeLike | None) -> np.ndarray:
        try:
            with _bytes(path) as file:
                voxels = np.asarray(nib.arrayproxy.ArrayProxy(file, header, mmap=False), dtype=wanted)
                if _zipped(path):
                    file.read(1)  # gzip compares the checksum at the end of the file, which nibabel never reaches
            return voxels
        except Exception as error:
            raise _refusal(path, error, "the voxels can't be read") from error

    room = path.stat().st_size * (DEFLATE_LIMIT if _zipped(path) else 1)
    notes += _doubts(path, header, forms, affine, shape)
    if path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.endswith((".nii", ".nii.gz")):
        notes += (Note("name", f"{path}: it is read as NIfTI, but other programs know small letters only"),)
    return Stored(shape, dtype, affine, forms, room, notes, read)


def write(path: Path, stored: np.ndarray, affine: np.ndarray, forms: Forms | None) -> None:
    """Writes voxels [x, y, z] as they are to be stored; the file is complete or absent.

    stored: the voxels, of a little-endian or one-byte type. affine: index to mm. forms: the forms of another file's
    header, which are written as they are; with None both forms say the affine, with code 1, in mm.
    Raises InputError if the header can't hold the shape or the affine.
    """
    import nibabel as nib

    header = (nib.Nifti2Header if forms and forms.version == 2 else nib.Nifti1Header)(endianness="<")
    try:
        header.set_data_shape(stored.shape)
        header.set_data_dtype(stored.dtype)
        header.set_slope_inter(1, 0)
        header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
        if forms is None:
            header.set_sform(affine, code=1)
            header.set_qform(affine, code=1)
            header.set_xyzt_units("mm")
        else:
            forms.put_into(header)
    except (nib.spatialimages.HeaderDataError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: a NIfTI header can't hold the grid ({one_line(error)})") from error
    if forms is None:
        far = max(apart(form, affine, stored.shape) for form in (header.get_sform(), header.get_qform()))
        if not far <= FORMS_TOLERANCE * smallest_edge(affine):
            raise InputError(
                f"{path}: the affine {affine.tolist()} can't be written as a qform, corners lie {far:.3g} mm off, "
                "expected axes at right angles"
            )
    with replacing(path) as partial, partial.open("wb") as file:
        # Neither time nor name goes into the archive, so that the same voxels give the same bytes.
        out = gzip.GzipFile("", "wb", 1, file, mtime=0) if _zipped(path) else file
        out.write(header.binaryblock + bytes(4))  # four zeros say that there are no extensions
        out.write(stored.tobytes(order="F"))
        out.close()


def _zipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _bytes(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if _zipped(path) else path.open("rb")


def _refusal(path: Path, error: Exception, what: str) -> InputError:
    """The error of one line for an exception of gzip or nibabel."""
    if isinstance(error, gzip.BadGzipFile) and "Not a gzipped" in str(error):
        with suppress(OSError), path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return InputError(f"{path}: other bytes follow the end of the gzip data, expected the end of the file")
    return InputError(f"{path}: {what} ({one_line(error)})")


def _start(path: Path) -> bytes:
    """The bytes of the header, 348 or 540. Raises InputError if the file says absurd numbers for the start of the
    voxels or the lengths of extensions, because a reader would follow them anywhere."""
    with _bytes(path) as file:
        start = file.read(540)
        sizes = {order: struct.unpack_from(order + "i", start.ljust(4, b"\0"))[0] for order in "<>"}
        order = next((order for order, size in sizes.items() if size in _VERSIONS), None)
        if order is None or len(start) < sizes[order]:
            raise InputError(f"{path}: not a readable NIfTI file (no header of 348 or 540 bytes)")
        header = sizes[order]
        kind, where = ("f", 108) if header == 348 else ("q", 168)  # NIfTI-1, NIfTI-2
        offset = struct.unpack_from(order + kind, start, where)[0]
        if not header <= offset <= MAX_HEADER_BYTES:  # NaN, too
            expected = f"expected at most {MAX_HEADER_BYTES}, and after the header of {header}"
            raise InputError(f"{path}: the voxels start at byte {offset:g}, {expected}")
        file.seek(header)
        extensions = file.read(int(offset) - header)
    position = 4
    while extensions[:1] not in (b"", b"\0") and position + 8 <= len(extensions):
        (length,) = struct.unpack_from(order + "i", extensions, position)
        if not 8 <= length <= len(extensions) - position:
            raise InputError(f"{path}: a header extension of {length} bytes, expected at most {len(extensions)}")
        position += length
    return start[:header]


class _Heard(logging.Handler):
    """Keeps what nibabel says of a header; nibabel's own logger would print it without the name of the file."""

    def __init__(self) -> None:
        super().__init__(level=1)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _mended(header: Any, path: Path) -> tuple[Any, tuple[Note, ...]]:
    """The header after nibabel's checks, and what they said as notes. The checks mend what they can, and raise for the
    rest."""
    heard, logger = _Heard(), logging.Logger("header of a file")
    logger.addHandler(heard)
    header.check_fix(logger, 40)
    return header, tuple(Note("header", f"{path}: {said}") for said in heard.said)


def _doubts(path: Path, header: Any, forms: Forms, affine: np.ndarray, shape: tuple[int, ...]) -> tuple[Note, ...]:
    """Notes of a place that other programs may read otherwise: the two forms differ, or neither says one."""
    codes = int(header["qform_code"]), int(header["sform_code"])
    if codes == (0, 0):
        what = "neither qform nor sform says where it lies (both codes are 0); it is read with axes towards Left, "
        return (Note("place", f"{path}: {what}Anterior, Superior, other programs may differ"),)
    if 0 in codes or len(shape) < 3:
        return ()
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            qform = np.asarray(header.get_qform(), np.float64)
            qform[:3] *= millimetres(forms.units)
    except Exception:  # numbers that are no quaternion may raise anything
        return (Note("forms", f"{path}: the qform is no rotation; the sform is used, both are written back"),)
    far = apart(qform, affine, (shape[0], shape[1], shape[2]))
    if far <= FORMS_TOLERANCE * smallest_edge(affine):
        return ()
    size = f"{far:.3g} mm" if math.isfinite(far) else "far"
    return (Note("forms", f"{path}: qform and sform lie {size} apart; the sform is used, and predictions have both"),)
