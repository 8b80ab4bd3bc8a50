"""How a NIfTI header says where its voxels lie: by two forms (qform and sform), a unit, and voxel sizes.

They are kept as they stand in an MR's file, so that the file of a prediction says the same in the same way. Programs
differ in which form they read, and in what they make of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ..errors import InputError

_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # the header's unit of length (metre, mm, micron) in mm
_QFORM = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_SFORM = ("srow_x", "srow_y", "srow_z")


def millimetres(units: int) -> float:
    """The header's unit of length, from its xyzt_units, in mm. A header without a unit means mm."""
    return _MM.get(units & 7, 1.0)


@dataclass(frozen=True)
class Forms:
    """Where a NIfTI header says that its voxels lie; all lengths are in the file's own unit.

    version: 1 or 2, for NIfTI-1 and -2. units: the header's xyzt_units. pixdim: qfac and the three voxel sizes.
    qform: quaternion (b, c, d) and three offsets. sform: the three rows of four numbers, one after the other.
    qform_code, sform_code: 0 if the form says nothing.
    """

    version: int
    units: int
    pixdim: tuple[float, ...]
    qform_code: int
    qform: tuple[float, ...]
    sform_code: int
    sform: tuple[float, ...]

    @classmethod
    def of_header(cls, header: Any, version: int) -> Forms:
        """The forms of a header of nibabel that holds the file's own bytes, with nothing mended.

        Raises ValueError if a form with a code, or a voxel size, isn't finite. In a form whose code is 0, numbers that
        aren't finite become 0.
        """
        qform, sform = (_numbers(header, names) for names in (_QFORM, _SFORM))
        qfac, *sizes = np.asarray(header["pixdim"], np.float64)[:4].tolist()
        for what, values, counts in (
            ("qform", qform, int(header["qform_code"]) != 0),
            ("sform", sform, int(header["sform_code"]) != 0),
            ("pixdim", sizes, True),
        ):
            if counts and not np.isfinite(values).all():
                raise ValueError(f"the {what} holds {values}, expected finite numbers")
        return cls(
            version,
            int(header["xyzt_units"]),
            (qfac if np.isfinite(qfac) else 1.0, *sizes),
            int(header["qform_code"]),
            tuple(np.nan_to_num(qform, posinf=0, neginf=0).tolist()),
            int(header["sform_code"]),
            tuple(np.nan_to_num(sform, posinf=0, neginf=0).tolist()),
        )

    def put_into(self, header: Any) -> None:
        """Writes the forms into a header of nibabel, which must be of the same version."""
        header["xyzt_units"] = self.units
        header["pixdim"][:4] = self.pixdim
        header["qform_code"], header["sform_code"] = self.qform_code, self.sform_code
        for name, value in zip(_QFORM, self.qform, strict=True):
            header[name] = value
        for name, row in zip(_SFORM, np.reshape(self.sform, (3, 4)), strict=True):
            header[name] = row

    def to_json(self) -> dict[str, Any]:
        """The forms as an object that JSON can hold, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Forms:
        """The forms that `to_json` described. Raises InputError for any other content."""
        lengths = {"pixdim": 4, "qform": 6, "sform": 12}
        try:
            found: dict[str, Any] = {
                name: tuple(map(float, value)) if name in lengths else value
                for name, value in content.items()
                if name not in lengths or not isinstance(value, str)
            }
            good = set(found) == {field.name for field in fields(cls)} and all(
                len(value) == lengths[name] and np.isfinite(value).all() if name in lengths else type(value) is int
                for name, value in found.items()
            )
        except (AttributeError, TypeError, ValueError, OverflowError):
            good = False
        if not good or found["version"] not in (1, 2):
            raise InputError(f"a grid needs forms as in a NIfTI header, not {content!r}")
        return cls(**found)


def _numbers(header: Any, names: tuple[str, ...]) -> list[float]:
    return np.concatenate([np.atleast_1d(np.asarray(header[name], np.float64)) for name in names]).tolist()
