"""MetaImage and NRRD files: SimpleITK reads them where it is installed (pip install 'sfg_fast[itk]')."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import InputError
from ..files import one_line
from .stored import DEFLATE_LIMIT, Stored, check_affine

ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr")
_READERS = {".mha": "MetaImageIO", ".mhd": "MetaImageIO", ".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO"}
_HEADER_BYTES = 2**16  # the name of a data file is looked for in so many bytes of a header's text
_DATA_FILE = {
    "MetaImageIO": re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", re.M | re.I),
    "NrrdImageIO": re.compile(rb"\A(?:.+\n)*?data ?file:[ \t]*(.*?)[ \t\r]*$", re.M | re.I),  # before the empty line
}
_TO_RAS = np.diag([-1.0, -1, 1, 1])  # ITK's world is Left, Posterior, Superior


def data_file(path: Path) -> Path | None:
    """The file with the voxels of a header; None if they are in the header's own file. Raises InputError for a header
    that can't be read, or that names several files or one in another folder."""
    try:
        with path.open("rb") as file:
            found = _DATA_FILE[_READERS[path.suffix.lower()]].search(file.read(_HEADER_BYTES))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({one_line(error)})") from error
    name = found[1].decode("utf-8", "replace") if found else "LOCAL"
    if name.upper() == "LOCAL":
        return None
    if re.search(r"[/\\%\0]|^LIST|^\.*$", name):
        raise InputError(f"{path}: its voxels are in {name!r}, expected one file in the header's own folder")
    return path.with_name(name)


def opened(path: Path) -> Stored:
    """Reads the header of a file that ends in .mha, .mhd, .nrrd or .nhdr.

    Raises InputError if SimpleITK isn't installed or can't read the file, for voxels that aren't real numbers, and for
    axes that aren't at right angles, because the NIfTI file of a prediction couldn't have them.
    """
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise InputError(
            f"{path}: SimpleITK reads {path.suffix} files and is not installed, pip install 'sfg_fast[itk]'"
        ) from error
    data = data_file(path) or path
    if not data.is_file():
        raise InputError(f"{path}: its voxels are in {data.name}, but there is no such file")
    reader = sitk.ImageFileReader()
    reader.SetImageIO(_READERS[path.suffix.lower()])  # the ending decides, whatever the content says
    reader.SetFileName(str(path))
    with _one_line(sitk, path):
        reader.ReadImageInformation()
    shape = tuple(reader.GetSize())
    n = len(shape)
    types = {
        getattr(sitk, f"sitk{kind}{bits}"): f"{kind}{bits}" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)
    }
    types |= {sitk.sitkFloat32: "float32", sitk.sitkFloat64: "float64"}
    if (pixel := reader.GetPixelIDValue()) not in types:
        what = sitk.GetPixelIDValueAsString(pixel)
        raise InputError(f"{path}: voxels of type {what}, expected real numbers")
    affine = np.eye(4)
    if n >= 3:
        axes = np.reshape(reader.GetDirection(), (n, n))[:3, :3]
        if not np.abs(axes.T @ axes - np.eye(3)).max() < 1e-3:
            raise InputError(f"{path}: its axes {axes.tolist()} are not at right angles, expected a rotation")
        affine[:3, :3] = axes * reader.GetSpacing()[:3]
        affine[:3, 3] = reader.GetOrigin()[:3]
    check_affine(path, affine)

    def read(wanted: DTypeLike | None) -> np.ndarray:
        with _one_line(sitk, path):
            image = reader.Execute()
        return np.array(sitk.GetArrayViewFromImage(image), dtype=wanted).T  # a copy, because the image goes

    room = data.stat().st_size * DEFLATE_LIMIT
    return Stored(shape, np.dtype(types[pixel].lower()), _TO_RAS @ affine, None, room, (), read)


@contextmanager
def _one_line(sitk: Any, path: Path) -> Iterator[None]:
    """Turns SimpleITK's exceptions into InputErrors of one line that name the file, and silences its warnings, which
    name none."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except Exception as error:
        reason = re.sub(r".*ERROR: (\w+\(0x\w+\): )?", "", one_line(error))
        raise InputError(f"{path}: SimpleITK can't read it ({reason})") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
