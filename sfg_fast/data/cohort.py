"""Which files make a cohort: `read_cohort` knows three layouts of volumes, and lists of images, and checks every file.

    folder   ROOT/CASE/mr.nii.gz, and optionally ct, labels, mask (any format of volumes.py; several MR channels: mr_0,
             mr_1, ..); optionally ROOT/dataset.json with "labels", "channel_names", "split", "targets"
    nnU-Net  ROOT/dataset.json, imagesTr/CASE_0000.nii.gz (channels _0000, _0001, ..), labelsTr/CASE.nii.gz, and as
             additions targetsTr/CASE.nii.gz (the CT) and masksTr/CASE.nii.gz; imagesTs, .. are the test split;
             "file_ending" in dataset.json may be that of any format that is read
    list     a .csv or .json of rows: case, mr (or mr_0, mr_1, ..), ct, labels, mask, split; all but case and mr are
             optional, paths are relative to the list; label names in labels.json beside it, {name: value}, or in the
             JSON itself: {"labels": {..}, "cases": [rows]}
    images   a list with a column image (PNG or JPEG) in place of mr; all columns but case and split are targets
             (image_list.py)

Beside the CT and the labels a cohort may have any other targets: "targets" in dataset.json or in the JSON list, or
targets.json beside a CSV, declares them:

    {"pet": {"unit": "SUV"}, "vessels": {"labels": {"background": 0, "artery": 1}}}

A target that has "labels" is a label map; any other target is a volume of intensities. The target `pet` has the files
CASE/pet.nii.gz (folder), petTr/CASE.nii.gz (nnU-Net), or those in the column `pet` (list).

Only the MR is needed to predict. A case is in the split `train` unless something says otherwise; a "split" in
dataset.json, {"train": [..], "val": [..], "test": [..]}, must place every case.

Nothing is left out without a word. These are refused:

- a file that has the name of one that is looked for, but a format that isn't read
- an entry of dataset.json whose name is nearly that of an entry that is read
- a file that is nearly called dataset.json, labels.json or targets.json, where that file isn't there
- a link that leads nowhere
- a number of cases that isn't the number announced
- a row without a split among rows that have one
- a file that stands for two things

A warning names other entries that nothing is read from, and images that nothing reads because of their names, their
formats or their folder's depth.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import read_json
from .cases import SPLITS, Case, Cohort, LoadedCase, check_case_name, check_label_names, check_split
from .image_list import image_cohort
from .lists import check_each_has_a_split, check_text, csv_rows, declared, json_rows, outside
from .targets import HU, Target
from .volumes import FORMATS, Grid, onto, read_labels, read_volume, volume_stem

__all__ = [
    "SPLITS",
    "USUAL",
    "WIDE_REGIONS",
    "Case",
    "Cohort",
    "LoadedCase",
    "check_case_name",
    "check_label_names",
    "check_same_channels",
    "check_same_targets",
    "check_split",
    "files",
    "load_case",
    "read_cohort",
    "unnamed_channels",
    "unnamed_labels",
]

WIDE_REGIONS = ("overall", "bones", "organs")  # regions of results beside each organ: no organ may be called so
USUAL = {"ct": Target("ct", "intensities", HU), "labels": Target("labels", "labels")}
"""The targets of volumes that need not be declared."""
# The folders of nnU-Net's layout, without Tr or Ts; those of other targets have the targets' names.
_FOLDERS = {"ct": "targets", "labels": "labels", "mask": "masks"}
_MR_COLUMN = re.compile(r"mr(_\d+)?")
# What may lie beside a volume and have its name: descriptions, transforms, pictures, but no voxels.
_BESIDE = re.compile(
    r"""\.(json|txt|csv|tsv|md|log|xml|ya?ml|toml|ini|pdf|html|rtf|docx?|xlsx?|od[st]|bval|bvec|tfm|mat|png|jpe?g|svg|gif
    |sha256|md5)""",
    re.X | re.I,
)
# Names of images, or of a slice of one, in formats that aren't read.
_UNREAD = re.compile(r".+\.(dcm|dicom|ima|mgz|mgh|mnc|hdr|img|nii\.(bz2|xz|zst|zip))", re.I)
DEPTH = 4  # how many folders deep images that nothing reads are looked for
_MEANING = ("labels", "split", "channel_names", "file_ending", "targets")  # entries of dataset.json that are read
# Entries of nnU-Net, of the Decathlon before it, and of the phantom, which say nothing that is needed here.
_KNOWN = re.compile(
    r"""name|description|dataset_name|tensorImageSize|reference|licen[cs]e|release|data_release|numTraining|numTest
    |training|test|modality|overwrite_image_reader_writer|dataset|citation|converted_by|regions_class_order|authors?
    |difficulty""",
    re.X,
)


def read_cohort(path: Path | str, allow_outside: bool = False) -> Cohort:
    """Finds the layout of a folder, .csv or .json (see the module's text) and lists its cases; it reads no volumes.

    allow_outside: a list may name files outside its own folder.
    Raises InputError, naming the case and file, for anything missing, ambiguous, doubled or malformed. Warns
    (UserWarning) of images in a folder that nothing reads, and of unknown entries in dataset.json.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        nnunet = any((path / name).is_dir() for name in ("imagesTr", "imagesTs"))
        meta_path = path / "dataset.json"
        _check_called(meta_path)
        meta = _read_object(meta_path) if os.path.lexists(meta_path) or nnunet else {}
        _check_entries(meta, meta_path)
        targets = _targets(meta, meta_path, meta_path)
        cases = _nnunet_cases(path, meta, targets) if nnunet else _folder_cases(path, targets)
        _tell_unread(path, cases)
        if "split" in meta:
            cases = _split_cases(cases, meta["split"], meta_path)
        return _checked(path, cases, targets, meta, meta_path)

    if path.suffix.lower() not in (".csv", ".json"):
        raise InputError(f"{path}: expected a folder, a .csv or a .json")
    rows, meta = csv_rows(path) if path.suffix.lower() == ".csv" else json_rows(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path.parent}: no cases")
    rows = itertools.chain([first], rows)
    if "image" in first[1] and not any(map(_MR_COLUMN.fullmatch, first[1])):
        meta, said = _beside(path, meta, "targets")
        about = declared(meta.get("targets", {}), said["targets"], "classes")
        return image_cohort(path, rows, about, said["targets"], allow_outside)
    meta, said = _beside(path, meta, "labels", "targets")
    targets, listed = _targets(meta, said["labels"], said["targets"]), list(rows)
    check_each_has_a_split(listed)
    cases = [_row_case(path, where, row, targets, allow_outside) for where, row in listed]
    return replace(_checked(path.parent, cases, targets, meta, path), source=path)


def _beside(path: Path, meta: dict[str, Any], *entries: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """What a list says besides its rows, and the file that said each of `entries`. An entry that the list doesn't have
    is read from the file of its name beside the list, if there is one."""
    said = {}
    for entry in entries:
        said[entry], beside = path, path.with_name(f"{entry}.json")
        if entry not in meta and beside != path:
            _check_called(beside, path)
            if os.path.lexists(beside):
                meta, said[entry] = {**meta, entry: read_json(beside)}, beside
    return meta, said


def _targets(meta: dict[str, Any], labels_path: Path, targets_path: Path) -> dict[str, Target]:
    """All targets that volumes may have, by name: the usual ones, and those that are declared."""
    found = dict(USUAL)
    if "labels" in meta:
        where = str(labels_path)
        names = _check_organ_names(check_label_names(meta["labels"], where), where)
        found["labels"] = replace(found["labels"], names=names)
    for name, about in declared(meta.get("targets", {}), targets_path, "labels").items():
        where = f"{targets_path}: target {name!r}"
        if name == "labels" and "labels" in meta:
            raise InputError(f"{where} is described, and names of labels are given beside it, expected one of them")
        if near := [other for other in found if other.lower() == name.lower() and other != name]:
            raise InputError(f"{where} differs from {near[0]!r} in capital letters alone, expected another name")
        if "labels" not in about:
            found[name] = Target(name, "intensities", about.get("unit", ""))
        elif "unit" in about:
            raise InputError(f"{where} has labels and a unit, expected one of them")
        elif about["labels"] == {}:
            found[name] = Target(name, "labels")
        else:
            names = _check_organ_names(check_label_names(about["labels"], where), where)
            found[name] = Target(name, "labels", names=names)
    return found


def files(case: Case) -> dict[str, tuple[Path, ...]]:
    """The files of a case by what they are: "mr", the name of each target, and "mask", if there is one."""
    targets = {name: (path,) for name, path in case.targets.items()}
    return {"mr": case.inputs} | targets | ({} if case.mask is None else {"mask": (case.mask,)})


def _roles(case: Case) -> Iterable[tuple[str, Path]]:
    """Gives (what it is, file) for every file of a case; MR channels are mr_0, mr_1, .. if there are several."""
    for role, paths in files(case).items():
        for index, path in enumerate(paths):
            yield role if len(paths) == 1 else f"{role}_{index}", path


def load_case(case: Case, targets: Mapping[str, Target]) -> LoadedCase:
    """Reads the MR, the mask and those targets of a case that are in `targets`, and checks them against each other.

    Raises InputError for whatever `read_volume` and `read_labels` refuse, for files on different grids, for a label
    value without a name where labels have names, and for an empty mask. Warns (UserWarning) of files that say two
    places; `LoadedCase.notes` has all that there is to tell.
    """
    try:
        loaded = _load(case, targets)
    except InputError as error:
        raise InputError(f"case {case.name}: {error}") from error
    for note in loaded.notes:
        if note.kind == "forms":
            warnings.warn(note.text, stacklevel=2)
    return loaded


def _check_organ_names(labels: dict[str, int], where: str) -> dict[str, int]:
    if "ignore" in labels:
        raise InputError(f"{where}: voxels to be ignored (label 'ignore') can't be left out, expected organs alone")
    if taken := [name for name in WIDE_REGIONS if name in labels]:
        raise InputError(f"{where}: an organ is called {taken[0]!r}, but results have a region of that name")
    return labels


def unnamed_labels(largest: int) -> dict[str, int]:
    """{name: value} for the labels of a cohort that names none: background, label_1, .. up to the value `largest`."""
    return {"background": 0} | {f"label_{value}": value for value in range(1, largest + 1)}


def unnamed_channels(count: int) -> tuple[str, ...]:
    """Names for the MR channels of a cohort that names none: MR, or MR_0, MR_1, .. if there are several."""
    return ("MR",) if count == 1 else tuple(f"MR_{index}" for index in range(count))


def check_same_targets(targets: Mapping[str, Target], cohort: Cohort, where: str) -> None:
    """Raises InputError if a target of a run and the one of its name in a cohort differ in kind or unit, or in the
    names or values of labels or classes. (Labels that nobody named can't differ.)"""
    for name, ours in targets.items():
        theirs = cohort.targets.get(name)
        if theirs is None:
            continue
        if ours.kind != theirs.kind:
            raise InputError(
                f"{where}: the run's {name} are {ours.kind}, the cohort's {theirs.kind}, expected the same"
            )
        if ours.unit and theirs.unit and ours.unit != theirs.unit:
            said = f"the run's {name} are in {ours.unit!r}, the cohort's in {theirs.unit!r}"
            raise InputError(f"{where}: {said}, expected the same")
        if ours.kind == "labels" and unnamed_labels(len(ours.names) - 1) in (ours.names, theirs.names):
            continue
        if theirs.names and ours.names != theirs.names:
            said = f"the run's {name} are {ours.names}, the cohort's {theirs.names}"
            more = " (targets.json beside its list can name all classes)" if ours.kind == "class" else ""
            raise InputError(f"{where}: {said}, expected the same{more}")


def check_same_channels(channels: tuple[str, ...], cohort: Cohort, where: str) -> None:
    """Raises InputError if the MR channels of a run and of a cohort differ in number, names or order. (The channels of
    images are checked when the images are read.)"""
    theirs = cohort.channel_names
    if cohort.images:
        return
    unnamed = unnamed_channels(len(channels)) in (channels, theirs)
    if len(channels) != len(theirs) or (channels != theirs and not unnamed):
        names = [", ".join(one) for one in (theirs, channels)]
        raise InputError(f"{where}: MR channels {names[0]}, the run was trained on {names[1]}, expected the same")


def _load(case: Case, targets: Mapping[str, Target]) -> LoadedCase:
    first, grid = read_volume(case.inputs[0])
    notes = list(grid.notes)

    def on_grid(read: Callable[[Path], tuple[np.ndarray, Grid]], path: Path) -> np.ndarray:
        array, other = read(path)
        if (array_here := onto(grid, array, other)) is None:
            raise InputError(f"{path} has {other}, but {case.inputs[0]} has {grid}; expected one grid for all files")
        notes.extend(other.notes)
        return array_here

    inputs = np.stack([first, *(on_grid(read_volume, path) for path in case.inputs[1:])])
    found = {}
    for name, path in case.targets.items():
        if name in targets:
            found[name] = on_grid(read_labels if targets[name].kind == "labels" else read_volume, path)
    mask = on_grid(read_labels, case.mask) > 0 if case.mask else None
    for name, array in found.items():
        if names := targets[name].names:
            unknown = np.setdiff1d(array, list(names.values()))
            if unknown.size:
                raise InputError(f"{case.targets[name]} holds label value {unknown[0]}, expected one of {names}")
    if mask is not None and not mask.any():
        raise InputError(f"{case.mask} is an empty mask, expected voxels above 0")
    return LoadedCase(inputs, found, mask, grid, tuple(notes))


def _check_called(path: Path, *others: Path) -> None:
    """Raises InputError if a file is not there, but one of nearly its name is, which is none of the `others`."""
    if os.path.lexists(path):
        return
    for child in sorted(path.parent.iterdir()):
        near = difflib.SequenceMatcher(None, child.stem.lower(), path.stem).ratio() >= 0.8
        if near and child.suffix.lower() in ("", ".json", ".yaml", ".yml") and child not in others and child.is_file():
            raise InputError(f"{child}: nothing is read from a file of this name, did you mean {path.name!r}?")


def _folder_cases(root: Path, targets: Mapping[str, Target]) -> list[Case]:
    roles = {name.lower() for name in (*targets, "mask")}
    for child in sorted(root.glob("[!.]*")):
        if not child.exists():
            raise InputError(f"{child}: a link that leads nowhere, expected the folder of a case")
    cases = []
    for folder in sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")):
        files: dict[str, Path] = {}
        entries = sorted(folder.iterdir())
        for file in entries:
            stem = volume_stem(file.name)
            if stem is None or not (_MR_COLUMN.fullmatch(stem) or stem in targets or stem == "mask"):
                continue
            if stem in files:
                raise InputError(f"case {folder.name}: both {files[stem]} and {file.name} are there, expected one")
            files[stem] = file
        for file in entries:
            role = file.name.partition(".")[0].lower()
            if (role in roles or _MR_COLUMN.fullmatch(role)) and role not in map(str.lower, files):
                _check_format(file, FORMATS)
        if files:  # other folders (overviews, documents) are no cases
            cases.append(_case(folder.name, files, targets, "train", str(folder)))
    if not cases:
        raise InputError(f"{root}: no cases; expected a folder per case with mr.nii.gz, imagesTr/, a .csv or a .json")
    return cases


def _check_format(file: Path, expected: str) -> None:
    """Raises InputError if a file has the name of one that is looked for, but is a folder, or a volume of a format that
    isn't read. Otherwise its case would lack that volume without a word."""
    if file.is_dir():
        raise InputError(f"{file}: a folder, expected a file that ends in {expected}")
    if volume_stem(file.name) is None and not _BESIDE.fullmatch(file.suffix):
        raise InputError(f"{file}: a format that isn't read, expected a file that ends in {expected}")


def _check_entries(meta: dict[str, Any], path: Path) -> None:
    """Raises InputError for an entry of dataset.json that is nearly called as one that is read; warns of other unknown
    entries."""
    unknown = sorted(key for key in meta if key not in _MEANING and not _KNOWN.fullmatch(key))
    for key in unknown:
        if near := difflib.get_close_matches(key.lower(), _MEANING, 1, 0.75):
            raise InputError(f"{path}: unknown entry {key!r}, did you mean {near[0]!r}?")
    if unknown:
        warnings.warn(f"{path}: nothing is read from {', '.join(map(repr, unknown))}", stacklevel=3)


def _tell_unread(root: Path, cases: list[Case]) -> None:
    """Warns of images that no case has.

    Without the warning a misspelt name would be taken for a missing target, and a folder that lies too deep would be a
    case less. An image in a format that isn't read is left out if one of the same name beside it is read.
    """
    read = {path for case in cases for paths in files(case).values() for path in paths}
    names = {path.with_name(volume_stem(path.name) or path.name) for path in read}
    unread = sorted(
        str(file.relative_to(root))
        for file in _visible_files(root, DEPTH)
        if (volume_stem(file.name) and file not in read)
        or (_UNREAD.fullmatch(file.name) and file.with_name(file.name.partition(".")[0]) not in names)
    )
    if unread:
        some = ", ".join(unread[:3]) + (", .." if len(unread) > 3 else "")
        why = "by their names, formats or places"
        warnings.warn(f"{root}: {len(unread)} images are not read, {why}: {some}", stacklevel=3)


def _visible_files(folder: Path, depth: int) -> Iterator[Path]:
    """Gives the files in a folder, and in its folders down to a depth. Of the hidden folders it enters only those right
    inside, where a case may have been hidden, and not their folders (a .git has thousands)."""
    for child in folder.iterdir():
        if child.is_dir():
            hidden = child.name.startswith(".")
            if depth > 0 and not (hidden and depth < DEPTH):
                yield from _visible_files(child, 0 if hidden else depth - 1)
        elif not child.name.startswith("."):  # such as the ._mr.nii.gz of macOS
            yield child


def _nnunet_cases(root: Path, meta: dict[str, Any], targets: Mapping[str, Target]) -> list[Case]:
    ending = meta.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or not ending.startswith(".") or volume_stem(ending) != "":
        raise InputError(f"{root / 'dataset.json'}: file_ending {ending!r}, expected {FORMATS}")
    if taken := [name for name in targets if name.lower() in ("images", "targets", "masks")]:
        raise InputError(
            f"{root / 'dataset.json'}: target {taken[0]!r}, but {taken[0]}Tr has another meaning, expected another name"
        )
    cases = []
    folders = {"images": "mr"} | {_FOLDERS.get(column, column): column for column in ("labels", "ct", "mask", *targets)}
    for suffix, split in (("Tr", "train"), ("Ts", "test")):
        found: dict[str, dict[str, Path]] = {}
        for kind, column in folders.items():
            for name, file in _with_ending(root / (kind + suffix), ending).items():
                key = column
                if column == "mr":
                    match = re.fullmatch(r"(.+)_(\d{4})", name)
                    if match is None:
                        raise InputError(f"{file}: expected CASE_0000{ending}, with four digits for the channel")
                    name, key = match[1], f"mr_{int(match[2])}"
                found.setdefault(name, {})[key] = file
        cases += [_case(name, files, targets, split, str(root)) for name, files in sorted(found.items())]
        announced = meta.get("numTraining", len(found))
        if suffix == "Tr" and (root / "imagesTr").is_dir() and announced != len(found):
            raise InputError(
                f"{root / 'dataset.json'}: numTraining {announced!r}, but {root / 'imagesTr'} has {len(found)} cases"
            )
    return cases


def _with_ending(folder: Path, ending: str) -> dict[str, Path]:
    """The files of one of nnU-Net's folders by their names without the ending. Raises InputError for a volume with
    another ending."""
    files: dict[str, Path] = {}
    others = []
    for file in sorted(folder.glob("[!.]*")):
        name = file.name[: -len(ending)]
        if not file.name.lower().endswith(ending.lower()) or not name:
            others.append(file)
        elif name in files:
            raise InputError(f"{folder}: both {files[name].name} and {file.name} are there, expected one")
        else:
            files[name] = file
    for file in others:
        if file.is_file() and not any(file.name.startswith(f"{name}.") for name in files):
            expected = f"{ending}, the file_ending of dataset.json"
            if volume_stem(file.name) is not None:
                raise InputError(f"{file}: expected a file that ends in {expected}")
            _check_format(file, expected)
    return files


def _split_cases(cases: list[Case], split: Any, source: Path) -> list[Case]:
    """The cases as the "split" of a dataset.json places them."""
    if not isinstance(split, dict) or not all(isinstance(names, list) for names in split.values()):
        raise InputError(f'{source}: split {split!r}, expected {{"train": [..], "val": [..], "test": [..]}}')
    place: dict[str, str] = {}
    known = {case.name for case in cases}
    for which, names in split.items():
        check_split(which, str(source))
        for name in names:
            if not isinstance(name, str) or name not in known:
                raise InputError(f"{source}: split {which} names {name!r}, but there is no such case")
            if name in place:
                raise InputError(f"{source}: case {name} is listed twice, in split {place[name]} and in {which}")
            place[name] = which
    for case in cases:
        if case.name not in place:
            raise InputError(f"{source}: case {case.name} is in no split; list every case once")
    return [replace(case, split=place[case.name]) for case in cases]


def _row_case(
    source: Path, where: str, row: dict[str, Any], targets: Mapping[str, Target], allow_outside: bool
) -> Case:
    unknown = [key for key in row if not (_MR_COLUMN.fullmatch(key) or key in ("case", "split", "mask", *targets))]
    if unknown:
        columns = ", ".join(("case, mr (mr_0, ..)", *targets, "mask", "split"))
        raise InputError(f"{where}: unknown column {unknown[0]!r}, expected {columns}")
    given = {key: value for key, value in row.items() if value not in ("", None)}
    for key, value in given.items():
        check_text(value, where, key)
    name = check_case_name(given.pop("case", ""), where)
    split = check_split(given.pop("split", "train"), where)
    files = {key: source.parent / value for key, value in given.items()}
    for key, file in files.items():
        if not allow_outside and not file.resolve().is_relative_to(source.parent.resolve()):
            raise outside(where, key, given[key])
    return _case(name, files, targets, split, where)


def _case(name: str, files: dict[str, Path], targets: Mapping[str, Target], split: str, where: str) -> Case:
    """A case from its files by column. Raises InputError unless the MR channels are mr, or mr_0 .. mr_n without
    gaps."""
    found = [key for key in files if _MR_COLUMN.fullmatch(key)]
    if not found:
        raise InputError(f"{where}: case {name} has no MR")
    channels = ["mr"] if found == ["mr"] else [f"mr_{index}" for index in range(len(found))]
    if set(found) != set(channels):
        raise InputError(f"{where}: case {name} has {', '.join(sorted(found))}, expected mr, or mr_0, mr_1, ..")
    inputs = tuple(files[key] for key in channels)
    return Case(name, inputs, {key: files[key] for key in targets if key in files}, files.get("mask"), split)


def _checked(
    root: Path, cases: list[Case], targets: Mapping[str, Target], meta: dict[str, Any], meta_path: Path
) -> Cohort:
    """The cohort, after the checks that hold for every layout."""
    if not cases:
        raise InputError(f"{root}: no cases")
    seen: set[str] = set()
    owners: dict[str, str] = {}
    channels = len(cases[0].inputs)
    for case in cases:
        check_case_name(case.name, str(root))
        if case.name in seen:
            raise InputError(f"{root}: case {case.name} is there twice, expected unique names")
        seen.add(case.name)
        if len(case.inputs) != channels:
            raise InputError(f"{root}: case {case.name} has {len(case.inputs)} MR channels, {cases[0].name} {channels}")
        for role, file in _roles(case):
            if not os.path.isfile(file):  # unlike Path.is_file it never raises
                raise InputError(f"case {case.name}: no such file {file}")
            owner = owners.setdefault(os.path.realpath(file), use := f"the {role} of case {case.name}")
            if owner != use:
                raise InputError(f"case {case.name}: {file} is {use} and {owner}, expected a file of its own for each")
    there = {name: one for name, one in targets.items() if any(name in case.targets for case in cases)}
    if nowhere := [name for name in targets if name not in there and name not in USUAL]:
        warnings.warn(f"{root}: no case has the declared target {nowhere[0]!r}, expected its files", stacklevel=3)
    return Cohort(root, tuple(cases), there, _channel_names(meta, meta_path, channels))


def _channel_names(meta: dict[str, Any], source: Path, channels: int) -> tuple[str, ...]:
    indices = [str(index) for index in range(channels)]
    if "channel_names" not in meta:
        return unnamed_channels(channels)
    names = meta["channel_names"]
    texts = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not texts or set(names) != set(indices):
        raise InputError(f'{source}: channel_names {names!r}, expected {{"0": name, ..}} for {channels} MR channels')
    return tuple(names[index] for index in indices)


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content
