"""What a cohort has to be learnt from: targets, each with a name, a kind, and a unit or names."""

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
"""CTs are clipped to this, to be learnt and before anything is measured, as in the SynthRAD challenge."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
# Columns of a list, files of a case and entries of a batch that are something else.
_TAKEN = re.compile(r"mr(_\d+)?|image|case|mask|split|inputs|noise|uncertainty|noise_.*|uncertainty_.*|has_.*", re.I)


class TargetAsJson(TypedDict):
    """A `Target` as a manifest or a checkpoint holds it."""

    kind: str
    unit: str
    names: dict[str, int]
    statistics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing that the cases of a cohort have.

    kind: of `TARGET_KINDS`. unit: of numbers, such as HU or years. names: of labels (0 is the background) and of
    classes, name -> value 0 .. n-1. statistics: over the training cases, where they were counted: "mean" and "sd" of
    numbers (of intensities in the body), or "frequencies", the share of each label or class.
    """

    name: str
    kind: str
    unit: str = ""
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def per_image(self) -> bool:
        """Is it one value for each image (not one for each voxel)?"""
        return self.kind in PER_IMAGE

    @property
    def padding(self) -> float:
        """What stands where a slice ends before the window does: air in a CT."""
        return CLIP_HU[0] if self.unit == HU else 0.0

    def to_json(self) -> TargetAsJson:
        return {"kind": self.kind, "unit": self.unit, "names": self.names, "statistics": self.statistics}

    @classmethod
    def from_json(cls, name: str, content: Mapping[str, Any]) -> Target:
        """What `to_json` gave (its shape was checked). InputError for a name, a kind or names that can't be."""
        if content["kind"] not in TARGET_KINDS:
            raise InputError(f"target {name!r}: kind {content['kind']!r}, expected one of {', '.join(TARGET_KINDS)}")
        check_target_name(name, "targets")
        if sorted(content["names"].values()) != list(range(len(content["names"]))):
            raise InputError(f"target {name!r}: names {content['names']!r}, expected the values 0, 1, 2, .. once each")
        return cls(name, content["kind"], content["unit"], dict(content["names"]), dict(content["statistics"]))


def check_target_name(name: Any, where: str) -> str:
    """InputError for a name that can't be a column, a file name and an entry of a batch of its own."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        raise InputError(
            f"{where}: {name!r} can't be the name of a target, expected letters, digits and _, "
            "and none of mr, image, case, mask, split, inputs, noise, uncertainty, has_.."
        )
    return name
