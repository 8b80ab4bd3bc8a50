"""Targets: what can be learnt from a cohort. Each has a name, a kind, and a unit or names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypedDict

from ..errors import InputError

TARGET_KINDS = {
    "intensities": "a volume of numbers for each case",
    "labels": "a volume of label values for each case",
    "number": "a number for each image",
    "class": "a class for each image",
}
PER_IMAGE = ("number", "class")
NAMED = ("labels", "class")
HU = "HU"
CLIP_HU = (-1024.0, 3000.0)
"""CTs are clipped to this interval in HU before they are learnt and before anything is measured, as in the SynthRAD
challenge."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# Names that mean something else as the column of a list, the file of a case or the entry of a batch.
_TAKEN = re.compile(r"mr(_\d+)?|image|case|mask|split|inputs|noise|uncertainty|noise_.*|uncertainty_.*|has_.*", re.I)


class TargetAsJson(TypedDict):
    """A `Target` as a manifest or a checkpoint holds it."""

    kind: str
    unit: str
    names: dict[str, int]
    statistics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing that the cases of a cohort have and that can be learnt.

    kind: one of `TARGET_KINDS`. unit: the unit of intensities or numbers, such as HU or years. names: the labels (0 is
    the background) or the classes, {name: value}, with the values 0 .. n-1. statistics: what was counted over the
    training cases: "mean" and "sd" of numbers (those of intensities in the body), or "frequencies", the share of each
    label or class.
    """

    name: str
    kind: str
    unit: str = ""
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def per_image(self) -> bool:
        """Whether the target is one value for each image, not one for each voxel."""
        return self.kind in PER_IMAGE

    @property
    def padding(self) -> float:
        """The value that stands where a slice ends before the window does: air in a CT, else 0."""
        return CLIP_HU[0] if self.unit == HU else 0.0

    def to_json(self) -> TargetAsJson:
        """The target without its name as an object that JSON can hold, for `from_json`."""
        return {"kind": self.kind, "unit": self.unit, "names": self.names, "statistics": self.statistics}

    @classmethod
    def from_json(cls, name: str, content: Mapping[str, Any]) -> Target:
        """The target that `to_json` described; the types in `content` must have been checked. Raises InputError for a
        name, a kind or names that no target can have."""
        if content["kind"] not in TARGET_KINDS:
            raise InputError(f"target {name!r}: kind {content['kind']!r}, expected one of {', '.join(TARGET_KINDS)}")
        check_target_name(name, "targets")
        if sorted(content["names"].values()) != list(range(len(content["names"]))):
            raise InputError(f"target {name!r}: names {content['names']!r}, expected the values 0, 1, 2, .. once each")
        return cls(name, content["kind"], content["unit"], dict(content["names"]), dict(content["statistics"]))


def check_target_name(name: Any, where: str) -> str:
    """Returns the name of a target. Raises InputError, which starts with `where`, if a column, a file and an entry of a
    batch can't be called so, because they mean something else or need other characters."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        raise InputError(
            f"{where}: {name!r} can't be the name of a target, expected letters, digits and _, "
            "and none of mr, image, case, mask, split, inputs, noise, uncertainty, has_.."
        )
    return name
