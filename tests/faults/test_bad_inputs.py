"""The corpus: bad files, headers, manifests, configurations and checkpoints, each with the one line that it must give.

Nothing else is accepted: exit code 2, one sentence that names the file or argument, no traceback, nothing half-written.
What the fuzzers (test_fuzz.py) find is added here.
"""

import gzip
import json
import math
import pickle
import shutil
import struct
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch

from sfg_fast.cli import main
from sfg_fast.data.cache import VERSION
from sfg_fast.training import checkpoint
from sfg_fast.training.history import CURVES

TINY = ["--network.width", "[3,4,4]", "--network.blocks", "1", "--network.residual", "routed"]
TINY += ["--schedule.steps", "2", "--schedule.batch", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    cohort, cache, run = (str(folder / name) for name in ("cohort", "cache", "run"))
    commands = [
        ["phantom", cohort, "--cases", "3", "--test", "1", "--size", "24", "--slices", "4"],
        ["preprocess", cohort, cache, "--processes", "1"],
        ["train", "--data", cache, "--out", run, *TINY],
    ]
    for command in commands:
        assert main(command) == 0
    return folder


# --- volumes: a function spoils a file of phantom_000, the first case -------------------------------------------------


def image(folder, name):
    return nib.load(folder / "cohort" / "phantom_000" / f"{name}.nii.gz")


def replaced(name, values=None, affine=None, ending=".nii.gz", **header):
    """Another array or affine, or fields of the header."""

    def spoil(folder):
        old = image(folder, name)
        array = values(old.get_fdata(dtype=np.float32)) if values else old.get_fdata(dtype=np.float32)
        new = nib.Nifti1Image(array, old.affine if affine is None else affine(old.affine))
        for field, value in header.items():
            new.header[field] = value
        path = folder / "cohort" / "phantom_000" / f"{name}{ending}"
        nib.save(new, path)

    return spoil


def raw(name, change):
    """Other bytes inside the gzip."""

    def spoil(folder):
        path = folder / "cohort" / "phantom_000" / f"{name}.nii.gz"
        path.write_bytes(gzip.compress(change(bytearray(gzip.decompress(path.read_bytes()))), 1))

    return spoil


def bytes_of(name, change):
    def spoil(folder):
        path = folder / "cohort" / "phantom_000" / f"{name}.nii.gz"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def packed(offset, kind, *values):
    def change(content):
        struct.pack_into("<" + kind, content, offset, *values)
        return content

    return change


def one_voxel(value):
    def change(array):
        array[3, 4, 1] = value
        return array

    return change


def extension(content):
    """The voxels start later, and before them is an extension that claims two billion bytes."""
    struct.pack_into("<f", content, 108, 400.0)
    return content[:348] + b"\1\0\0\0" + struct.pack("<ii", 2**31 - 8, 6) + bytes(40) + content[352:]


def with_labels(values):
    def spoil(folder):
        for case in ("phantom_000", "phantom_001", "phantom_002"):
            path = folder / "cohort" / case / "labels.nii.gz"
            old = nib.load(path)
            nib.save(nib.Nifti1Image(np.full(old.shape, values, np.uint8), old.affine), path)

    return spoil


def unnamed_gap(folder):
    (folder / "cohort" / "dataset.json").unlink()
    with_labels(3)(folder)


def plain_and_gz(folder):
    nib.save(image(folder, "mr"), folder / "cohort" / "phantom_000" / "mr.nii")


def only(name):
    def spoil(folder):
        for path in (folder / "cohort").glob(f"*/{name}.nii.gz"):
            path.unlink()

    return spoil


def second_channel(folder):
    case = folder / "cohort" / "phantom_000"
    (case / "mr.nii.gz").rename(case / "mr_0.nii.gz")
    shutil.copy(case / "mr_0.nii.gz", case / "mr_1.nii.gz")


VOLUMES = {
    "cut gzip": (bytes_of("mr", lambda c: c[: len(c) // 2]), "mr.nii.gz: the voxels can't be read"),
    "cut in the header": (bytes_of("mr", lambda c: c[:60]), "mr.nii.gz: not a readable NIfTI file"),
    "empty file": (bytes_of("ct", lambda c: b""), "ct.nii.gz: not a readable NIfTI file"),
    "no gzip": (bytes_of("ct", gzip.decompress), "ct.nii.gz: not a readable NIfTI file"),
    "checksum": (bytes_of("ct", lambda c: c[:-8] + b"\0" * 8), "ct.nii.gz: the voxels can't be read"),
    "not NIfTI": (bytes_of("mr", lambda c: gzip.compress(b"hello" * 999)), "mr.nii.gz: not a readable NIfTI file"),
    "voxels missing": (raw("mr", lambda c: c[:2000]), "mr.nii.gz: the voxels can't be read"),
    "gzip bomb": (raw("mr", packed(40, "hhhh", 3, 800, 800, 800)), "needs 2048000000 bytes, more than a file of"),
    "too many voxels": (raw("mr", packed(40, "hhhh", 3, 9000, 9000, 9000)), "more than the 536870912 voxels"),
    "negative size": (raw("mr", packed(40, "hhhh", 3, -5, 24, 4)), "mr.nii.gz: "),
    "no dimensions": (raw("mr", packed(40, "h", 0)), "mr.nii.gz: "),
    "eight dimensions": (raw("mr", packed(40, "h", 8)), "mr.nii.gz: "),
    "voxels far away": (raw("mr", packed(108, "f", 1e12)), "the voxels start at byte 1e+12, expected at most"),
    "voxels before": (raw("mr", packed(108, "f", -352.0)), "the voxels start at byte -352, expected at most"),
    "voxels nowhere": (raw("mr", packed(108, "f", float("nan"))), "the voxels start at byte nan, expected at most"),
    "long extension": (raw("mr", extension), "a header extension of 2147483640 bytes, expected at most"),
    "type": (raw("mr", packed(70, "h", 9999)), "mr.nii.gz: not a readable NIfTI file"),
    "2-D": (replaced("mr", lambda a: a[:, :, 0]), "mr.nii.gz: shape (24, 24), expected a 3-D volume"),
    "4-D": (replaced("mr", lambda a: np.stack([a, a], -1)), "(24, 24, 4, 2), expected a 3-D volume"),
    "no voxels": (raw("mr", packed(40, "hhhh", 3, 0, 24, 4)), "shape (0, 24, 4), an empty volume"),
    "complex": (replaced("mr", lambda a: a.astype(np.complex64)), "type complex64, expected real numbers"),
    "colour": (
        replaced("mr", lambda a: np.zeros(a.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
        "expected real numbers",
    ),
    "NaN": (replaced("ct", one_voxel(np.nan)), "ct.nii.gz: 1 of 2304 voxels are NaN or infinite"),
    "infinity": (replaced("mr", one_voxel(np.inf)), "mr.nii.gz: 1 of 2304 voxels are NaN or infinite"),
    "slope": (raw("mr", packed(112, "ff", 1e38, 1e38)), "mr.nii.gz: "),
    "singular": (raw("mr", packed(252, "hh24x12f", 0, 2, *[1.0] * 12)), "mr.nii.gz: the affine"),
    "NaN affine": (raw("mr", packed(252, "hh24x12f", 0, 2, *[float("nan")] * 12)), "mr.nii.gz: the affine"),
    "infinite axis, empty axis": (
        raw("mr", packed(252, "hh24x12f", 0, 2, float("inf"), *[0.0] * 9, 1.0, 0.0)),
        "mr.nii.gz: the affine",
    ),
    "immense affine": (raw("mr", packed(252, "hh24x12f", 0, 2, *[3e38] * 12)), "mr.nii.gz: the affine"),
    "other shape": (replaced("ct", lambda a: a[:-1]), "ct.nii.gz has shape (23, 24, 4)"),
    "shifted": (replaced("ct", affine=lambda a: a + np.eye(4)[:, [3, 3, 3, 0]] * 9), "ct.nii.gz has shape"),
    "other spacing": (replaced("labels", affine=lambda a: a @ np.diag([1.1, 1, 1, 1])), "labels.nii.gz has shape"),
    "unknown label": (replaced("labels", one_voxel(77)), "labels.nii.gz holds label value 77, expected one of"),
    "half a label": (replaced("labels", one_voxel(1.5)), "label value 1.5, expected whole numbers from 0 to 255"),
    "negative label": (replaced("labels", one_voxel(-1)), "label value -1, expected whole numbers"),
    "label NaN": (replaced("labels", one_voxel(np.nan)), "label value nan, expected whole numbers"),
    "all background": (with_labels(0), "the labels of every case are all background"),
    "gaps": (unnamed_gap, "the label files hold the values [3], expected 0, 1, 2, .. without gaps"),
    "empty mask": (replaced("mask", lambda a: a * 0), "mask.nii.gz is an empty mask, expected voxels above 0"),
    "no contrast": (replaced("mr", lambda a: a * 0 + 5), "MR channel 0 is constant in its foreground"),
    "CT of one value": (replaced("ct", lambda a: a * 0 + 7), "the CT's values are 7 to 7, expected HU"),
    "CT from 0 on": (replaced("ct", lambda a: a + 1024), "expected HU (air or fat below 0, bone above 100)"),
    "CT in thousands": (replaced("ct", lambda a: a / 1000), "expected HU (air or fat below 0, bone above 100)"),
    "twice": (plain_and_gz, "mr.nii and mr.nii.gz are there, expected one"),
    "no MR": (only("mr"), "case phantom_000 has no MR"),
    "more channels": (second_channel, "case phantom_001 has 1 MR channels, phantom_000 2"),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")  # it would stand before the one line
@pytest.mark.parametrize("what", VOLUMES)
def test_bad_volumes(made, tmp_path, capsys, what):
    spoil, message = VOLUMES[what]
    shutil.copytree(made / "cohort", tmp_path / "cohort")
    spoil(tmp_path)
    refused(capsys, preprocess(tmp_path / "cohort", tmp_path), message)
    assert not (tmp_path / "new" / "manifest.json").exists()
    assert not list(tmp_path.rglob("*partial*"))


def preprocess(cohort, folder):
    return ["preprocess", str(cohort), str(folder / "new"), "--processes", "1"]


def refused(capsys, arguments, message):
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("sfg-fast:")]
    assert len(lines) == 1, error
    assert message in lines[0], lines[0]
    assert "Traceback" not in error


# --- lists of cases, and what is said about them ----------------------------------------------------------------------

MR = "cohort/phantom_000/mr.nii.gz"
LABELLED = {"case": "a", "mr": MR, "labels": "cohort/phantom_000/labels.nii.gz"}
LISTS = {
    "no rows": ("list.csv", "case,mr\n", "no cases"),
    "empty file": ("list.csv", "", "no cases"),
    "no MR column": ("list.csv", f"case,ct\na,{MR}\n", "list.csv, line 2: case a has no MR"),
    "no case column": ("list.csv", f"mr\n{MR}\n", "list.csv, line 2: case name '' can't be a folder name"),
    "column twice": ("list.csv", f"case,mr,mr\na,{MR},{MR}\n", "a column is there twice in case, mr, mr"),
    "line breaks in a column": ("list.csv", '"case,mr\na,x\n",mr,mr\n', "a column is there twice in case,mr\\na,x"),
    "unknown column": ("list.csv", f"case,mr,pet\na,{MR},x\n", "line 2: unknown column 'pet'"),
    "ragged": ("list.csv", f"case,mr\na,{MR},x\n", "line 2: 3 values for 2 columns"),
    "case twice": ("list.csv", f"case,mr\na,{MR}\na,{MR}\n", "case a is there twice, expected unique names"),
    "escapes": ("list.csv", "case,mr\na,../mr.nii.gz\n", "mr ../mr.nii.gz is outside the list's folder"),
    "absolute": ("list.csv", "case,mr\na,/etc/passwd\n", "mr /etc/passwd is outside the list's folder"),
    "through a link": ("list.csv", "case,mr\na,link/mr.nii.gz\n", "mr link/mr.nii.gz is outside the list's folder"),
    "missing file": ("list.csv", "case,mr\na,no.nii.gz\n", "case a: no such file"),
    "a folder": ("list.csv", "case,mr\na,cohort\n", "case a: no such file"),
    "slash": ("list.csv", f"case,mr\na/b,{MR}\n", "case name 'a/b' can't be a folder name"),
    "dots": ("list.csv", f"case,mr\n..,{MR}\n", "case name '..' can't be a folder name"),
    "the manifest's name": ("list.csv", f"case,mr\nmanifest.json,{MR}\n", "'manifest.json' can't be a folder name"),
    "the marker's name": ("list.csv", f"case,mr\npreprocess.json,{MR}\n", "'preprocess.json' can't be a folder name"),
    "the folds' name": ("list.csv", f"case,mr\nsplits_final.json,{MR}\n", "can't be a folder name"),
    "long name": ("list.csv", f"case,mr\n{'a' * 300},{MR}\n", "can't be a folder name"),
    "split": ("list.csv", f"case,mr,split\na,{MR},dev\n", "unknown split 'dev', expected one of train, val, test"),
    "open quote": ("list.csv", f'case,mr\n"a,{MR}\n', "list.csv: not readable as CSV"),
    "encoding": ("list.csv", b"case,mr\n\xff\xfe,x\n", "list.csv: not readable as CSV"),
    "null byte": ("list.csv", b"case,mr\na,\0\n", "list.csv"),
    "ending": ("list.txt", "case,mr\n", "expected a folder, a .csv or a .json"),
    "wrong ending": ("list.csv", "case,mr\na,list.csv\n", "the file name must end in .nii or .nii.gz"),
    "channels with a gap": ("list.csv", f"case,mr_0,mr_2\na,{MR},{MR}\n", "expected mr, or mr_0, mr_1, .."),
    "not JSON": ("list.json", "{", "list.json: not readable as JSON"),
    "key twice": ("list.json", '{"cases": [], "labels": {}, "cases": []}', "list.json: the key 'cases' is there twice"),
    "key twice inside": (
        "list.json",
        '[{"case": "a", "mr": "x", "mr": "y"}]',
        "list.json: the key 'mr' is there twice, expected once",
    ),
    "deep JSON": ("list.json", "[" * 100_000, "list.json: not readable as JSON"),
    "long number": ("list.json", "[" + "9" * 10_000 + "]", "list.json: not readable as JSON"),
    "a number": ("list.json", "7", "list.json: expected a list of rows"),
    "rows of numbers": ("list.json", "[1, 2]", "list.json: expected a list of rows"),
    "value": ("list.json", json.dumps([{"case": "a", "mr": 7}]), "row 1: mr is 7, expected text"),
    "null in a path": ("list.json", json.dumps([{"case": "a", "mr": "a\0b"}]), "row 1: mr is 'a\\x00b', expected text"),
    "unknown entry": ("list.json", json.dumps({"cases": [], "colour": 1}), "unknown entry 'colour', expected labels"),
    "labels": ("list.json", json.dumps({"labels": [], "cases": [LABELLED]}), "labels [], expected"),
    "label gap": (
        "list.json",
        json.dumps({"labels": {"background": 0, "x": 2}, "cases": [LABELLED]}),
        "the values 0, 1, 2, .. once each",
    ),
    "no background": ("list.json", json.dumps({"labels": {"x": 0}, "cases": [LABELLED]}), '"background": 0 and'),
    "channel names": (
        "list.json",
        json.dumps({"channel_names": {"1": "T1"}, "cases": [LABELLED]}),
        'expected {"0": name, ..} for 1 MR channels',
    ),
}


@pytest.mark.parametrize("what", LISTS)
def test_bad_lists(made, tmp_path, capsys, what):
    name, content, message = LISTS[what]
    shutil.copytree(made / "cohort", tmp_path / "in" / "cohort")
    (tmp_path / "in" / "link").symlink_to(made / "cohort" / "phantom_000")
    (tmp_path / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, preprocess(tmp_path / "in" / name, tmp_path), message)
    assert not (tmp_path / "new").exists()


DATASETS = {
    "a list": ("[]", "dataset.json: expected a JSON object"),
    "split": ('{"split": 3}', "dataset.json: split 3, expected"),
    "unknown split": ('{"split": {"dev": []}}', "dataset.json: unknown split 'dev'"),
    "unknown case": ('{"split": {"train": ["x"]}}', "split train names 'x', but there is no such case"),
    "left out": ('{"split": {"train": ["phantom_000"]}}', "case phantom_001 is in no split"),
    "in two": (
        '{"split": {"train": ["phantom_000", "phantom_000"]}}',
        "case phantom_000 is listed twice, in split train and in train",
    ),
    "ignored label": ('{"labels": {"background": 0, "a": 1, "ignore": 2}}', "label 'ignore'"),
    "region as label": ('{"labels": {"background": 0, "bones": 1}}', "an organ is called 'bones'"),
    "label text": ('{"labels": {"background": "0"}}', "labels {'background': '0'}, expected"),
}


@pytest.mark.parametrize("what", DATASETS)
def test_bad_dataset_json(made, tmp_path, capsys, what):
    content, message = DATASETS[what]
    shutil.copytree(made / "cohort", tmp_path / "cohort")
    (tmp_path / "cohort" / "dataset.json").write_text(content)
    refused(capsys, preprocess(tmp_path / "cohort", tmp_path), message)
    assert not (tmp_path / "new").exists()


def test_bad_file_ending_of_nnunet(tmp_path, capsys):
    (tmp_path / "raw" / "imagesTr").mkdir(parents=True)
    (tmp_path / "raw" / "dataset.json").write_text('{"file_ending": ".png"}')
    refused(capsys, preprocess(tmp_path / "raw", tmp_path), "dataset.json: file_ending '.png', expected ")


# --- a preprocessed cohort that was tampered with ---------------------------------------------------------------------


def manifest(change):
    def spoil(folder):
        path = folder / "cache" / "manifest.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(change(content) or content))

    return spoil


def array(name, write):
    def spoil(folder):
        for path in (folder / "cache").glob(f"*/{name}.npy"):
            write(path)

    return spoil


def zipped(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


class Evil:
    """Unpickled it would write a file."""

    def __reduce__(self):
        return (exec, ("open('executed', 'w').close()",))


def evil(path):
    np.save(path, np.array([Evil()], dtype=object), allow_pickle=True)


def promises(path):
    """A header of a terabyte in front of nothing."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (4, 1, 2**19, 2**19)}
        )


def splits(content):
    return lambda folder: (folder / "cache" / "splits_final.json").write_text(content)


FOLDS = ["--folds", "2", "--fold", "0"]
CACHES = {
    "no manifest": (lambda f: (f / "cache" / "manifest.json").unlink(), [], "it has no manifest.json"),
    "not JSON": (lambda f: (f / "cache" / "manifest.json").write_text("{"), [], "not readable as JSON"),
    "other version": (
        manifest(lambda m: m.update(version=1)),
        [],
        f"version 1, expected {VERSION}; preprocess the cohort again",
    ),
    "cut": (manifest(lambda m: {"version": VERSION}), [], "not a valid manifest"),
    "escapes": (manifest(lambda m: m["cases"].update({"../x": m["cases"]["phantom_000"]})), [], "'../x' can't be a"),
    "absolute": (manifest(lambda m: m["cases"].update({"/x": m["cases"]["phantom_000"]})), [], "'/x' can't be a"),
    "huge": (manifest(lambda m: m["cases"]["phantom_000"].update(shape=[2**40] * 3)), [], "not a valid manifest"),
    "no case": (manifest(lambda m: m.update(cases={})), [], "no case in split train"),
    "case gone": (lambda f: shutil.rmtree(f / "cache" / "phantom_002"), [], "phantom_002: can't be read"),
    "array cut": (array("ct", lambda p: p.write_bytes(p.read_bytes()[:300])), [], "ct.npy: can't be read"),
    "array empty": (array("mask", lambda p: p.write_bytes(b"")), [], "mask.npy: can't be read"),
    "array of objects": (array("ct", evil), [], "ct.npy: can't be read"),
    "array zipped": (array("inputs", zipped), [], "inputs.npy: can't be read"),
    "array promised": (array("inputs", promises), [], "inputs.npy: can't be read"),
    "array of another type": (
        array("ct", lambda p: np.save(p, np.zeros((4, 24, 24)))),
        [],
        "ct.npy: float64 (4, 24, 24)",
    ),
    "array of another shape": (
        array("labels", lambda p: np.save(p, np.zeros(3, np.uint8))),
        [],
        "labels.npy: uint8 (3,)",
    ),
    "folds not JSON": (splits("["), FOLDS, "splits_final.json: not readable as JSON"),
    "folds an object": (splits("{}"), FOLDS, "splits_final.json: dict, expected 2 folds"),
    "other folds": (splits("[1]"), FOLDS, "splits_final.json: 1 folds, expected 2 folds"),
    "a fold": (splits("[1, 2]"), FOLDS, "fold 0 is 1, expected 2 folds"),
    "unknown case in a fold": (
        splits('[{"train": ["x"], "val": ["y"]}, 0]'),
        FOLDS,
        "train names 'x', expected a train",
    ),
    "test case in a fold": (
        splits('[{"train": ["phantom_002"], "val": ["phantom_000"]}, 0]'),
        FOLDS,
        "train names 'phantom_002', expected a train or val case",
    ),
    "in both": (
        splits('[{"train": ["phantom_000"], "val": ["phantom_000"]}, 0]'),
        FOLDS,
        "fold 0 has 'phantom_000' in train and in val, expected it in one",
    ),
    "no val": (splits('[{"train": ["phantom_000"], "val": []}, 0]'), FOLDS, "val is [], expected a list of cases"),
}


@pytest.mark.parametrize("what", CACHES)
def test_bad_caches(made, tmp_path, capsys, monkeypatch, what):
    spoil, options, message = CACHES[what]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "cache", tmp_path / "cache")
    spoil(tmp_path)
    refused(capsys, ["train", "--data", "cache", "--out", "new", *TINY, *options], message)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").glob("checkpoints/final.pt"))
    assert not (tmp_path / "executed").exists()


# --- configurations ---------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = {
    "unknown key": ("colour: green\n", "colour"),
    "unknown key inside": ("network: {colour: green}\n", "colour"),
    "a list": ("- 1\n- 2\n", "config"),
    "a word": ("hello\n", "config"),
    "not YAML": ("a: [1\n", "config"),
    "python object": ("out: !!python/object/apply:os.system ['touch executed']\n", "python/object"),
    "billion laughs": (LAUGHS + "tasks: *i\n", "its aliases stand for more than 10000 values"),
    "wrong type": ("schedule: {steps: many}\n", "steps"),
    "fraction": ("seed: 1.5\n", "seed"),
    "empty": ("", "config.yaml: the configuration is empty, expected options such as `data: ..`"),
    "comments": ("# seed: 1\n", "config.yaml: the configuration is empty"),
    "section without options": (
        "schedule:\n#  steps: 3\n",
        "config.yaml: the section 'schedule' is empty, expected options such as `steps: ..`",
    ),
    "section of a list": ("schedule: [1]\n", "the section 'schedule' is a list or a value, expected options"),
    "section of a number": ("network: 3\n", "the section 'network' is a list or a value, expected options"),
    "null for a number": ("schedule: {steps: null}\n", "schedule.steps is None, expected a whole number"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "config.yaml: not text in UTF-8"),
    "Latin-1": ("# \u00fc\nseed: 1\n".encode("latin-1"), "config.yaml: not text in UTF-8"),
}


@pytest.mark.parametrize("what", YAMLS)
def test_bad_configurations(made, tmp_path, capsys, monkeypatch, what):
    content, message = YAMLS[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["train", "--config", "config.yaml", "--data", str(made / "cache"), "--out", "new"]
    refused(capsys, arguments, message)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "executed").exists()


VALUES = [
    ("--tasks", "[]", "tasks="),
    ("--tasks", "[ct,ct]", "tasks=['ct', 'ct']"),
    ("--patch", "[0,4]", "patch=[0, 4]"),
    ("--patch", "[4]", "patch=[4]"),
    ("--patch", "[2,4,4]", "because network.name highresnet reads slices"),
    ("--folds", "1", "folds=1"),
    ("--fold", "0", "fold=0"),
    ("--folds", "99", "folds=99: "),
    ("--foreground", "-0.1", "foreground=-0.1"),
    ("--bias", "nan", "nan"),
    ("--seed", "-1", "seed=-1"),
    ("--device", "tpu", "device='tpu'"),
    ("--device", "cuda:99", "device='cuda:99'"),
    ("--precision", "float8", "precision='float8'"),
    ("--workers", "-1", "workers=-1"),
    ("--log-every", "0", "log_every=0"),
    ("--checkpoint-every", "0", "checkpoint_every=0"),
    ("--keep", "0", "keep=0"),
    ("--max-bad-steps", "-1", "max_bad_steps=-1"),
    ("--validation-slices", "0", "validation_slices=0"),
    ("--schedule.steps", "0", "schedule.steps=0"),
    ("--schedule.batch", "0", "schedule.batch=0"),
    ("--schedule.accumulate", "0", "schedule.accumulate=0"),
    ("--schedule.learning-rate", "nan", "nan"),
    ("--schedule.learning-rate", "inf", "inf"),
    ("--schedule.logits-factor", "-1", "schedule.logits_factor=-1"),
    ("--schedule.decay", "never", "schedule.decay='never'"),
    ("--schedule.draw-until", "1.1", "schedule.draw_until=1.1"),
    ("--schedule.temperature-end", "0", "schedule.temperature_end=0"),
    ("--schedule.clip", "0", "schedule.clip=0"),
    ("--schedule.patience", "0", "schedule.patience=0"),
    ("--schedule.patience", "2", "has no case of split val"),
    ("--network.width", "[1,2]", "width="),
    ("--network.width", "[0,2,2]", "network.width="),
    ("--network.norm", "group", "network.norm='group': expected one of auto, batch, instance, layer, or null"),
    ("--network.stages", "0", "network.stages=0"),
    ("--network.down", "pooled", "down='pooled': highresnet has no such option"),
    ("--network.init", "[0.5,0.5]", "init"),
    ("--network.estimator", "none", "network.estimator='none'"),
    ("--network.residual", "dense", "residual='dense'"),
    ("--tasks", "{ct: {noise: loud}}", "tasks.ct.noise='loud'"),
    ("--objective.lambda1", "-1", "objective.lambda1=-1"),
    ("--tasks", "{ct: {scale: 0}}", "tasks.ct.scale=0"),
    ("--objective.ct-noise", "learned", "ct_noise"),
    ("--bias", ".inf", "bias is inf, expected a finite number"),
    ("--seed", "99999999999999999999", "seed=99999999999999999999"),
    ("--transfer.freeze", "true", "transfer.run=None"),
    ("--transfer.run", "nowhere", "nowhere"),
]


@pytest.mark.parametrize(("option", "value", "message"), VALUES)
def test_values_that_can_not_be(made, tmp_path, capsys, option, value, message):
    arguments = ["train", "--data", str(made / "cache"), "--out", str(tmp_path / "new"), *TINY, option, value]
    refused(capsys, arguments, message)
    assert not (tmp_path / "new").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def saved(change):
    def spoil(path):
        state = torch.load(path, weights_only=True)
        checkpoint.save(path, change(state) or state)

    return spoil


def bomb(path):
    shutil.move(path, path.with_suffix(".old"))
    with zipfile.ZipFile(path.with_suffix(".old")) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data/0"):
                target.writestr(entry.filename, bytes(10**8), zipfile.ZIP_DEFLATED)
            else:
                target.writestr(entry, content)


def flipped(path):
    """One bit of a weight: torch alone would not see it."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        weights = max((archive.read(name) for name in archive.namelist() if "/data/" in name), key=len)
    content[content.index(weights) + len(weights) // 2] ^= 16
    path.write_bytes(content)


def tampered(path):
    state = torch.load(path, weights_only=True)
    state["model"]["heads.conv.weight"] += 1
    torch.save(state, path)


def in_history(*place, to):
    def change(state):
        part = state["history"]
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = to

    return saved(change)


def about(**change):
    """Another data.json."""

    def spoil(path):
        file = path.parents[1] / "data.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return spoil


def other_labels(**names):
    """Another data.json, whose labels are called otherwise."""

    def spoil(path):
        file = path.parents[1] / "data.json"
        content = json.loads(file.read_text())
        content["targets"]["labels"]["names"] |= names
        file.write_text(json.dumps(content))

    return spoil


def without_labels(path):
    """In the checkpoint and in data.json alike."""
    saved(lambda state: state["data"]["targets"].pop("labels") and None)(path)
    file = path.parents[1] / "data.json"
    content = json.loads(file.read_text())
    del content["targets"]["labels"]
    file.write_text(json.dumps(content))


NOTHING = {"ct/psnr": [], "organs/dice": []}
CHECKPOINTS = {
    "tampered with": (tampered, "its content has another digest than when it was written"),
    "missing": (lambda p: p.unlink(), "training stopped at step 2"),
    "empty": (lambda p: p.write_bytes(b""), "final.pt: not a readable checkpoint"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:5000]), "final.pt: not a readable checkpoint"),
    "one bit": (flipped, "final.pt: not a readable checkpoint"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"version": 2, "model": Evil()})), "not a readable checkpoint"),
    "pickle in a zip": (lambda p: torch.save({"version": 2, "model": Evil()}, p), "not a readable checkpoint"),
    "bomb": (bomb, "not a readable checkpoint (it unpacks to more than"),
    "other version": (saved(lambda s: s.update(version=1)), f"checkpoint version 1, expected {checkpoint.VERSION}"),
    "a tensor": (
        lambda p: torch.save(torch.zeros(3), p),
        f"checkpoint version 'Tensor', expected {checkpoint.VERSION}",
    ),
    "no model": (saved(lambda s: s.pop("model") and None), "a checkpoint without 'model', expected one of a run"),
    "other architecture": (saved(lambda s: s["config"]["network"].update(width=[3, 4, 5])), "another architecture"),
    "a weight lacks": (saved(lambda s: s["model"].pop("heads.conv.weight") is None), "lacks 'heads.conv.weight'"),
    "unknown option": (saved(lambda s: s["config"].update(colour=1)), "its configuration is not one of this version"),
    "impossible option": (saved(lambda s: s["config"]["network"].update(blocks="x")), "not one of this version"),
    "weights of text": (saved(lambda s: s.update(model="x")), "its weights are str, expected tensors by name"),
    "weights of another type": (
        saved(lambda s: s["model"].update({"heads.conv.weight": "x"})),
        "expected tensors by name",
    ),
    "not finished": (saved(lambda s: s.update(finished=False)), "training stopped at step 2"),
    "history a list": (saved(lambda s: s.update(history=[])), "final.pt: history is [], expected an object"),
    "history without groups": (saved(lambda s: s["history"].pop("groups") is None), "there is no 'history.groups'"),
    "history of text": (
        in_history("curves", "scores", "ct/psnr", to=["high"]),
        "final.pt: history.curves.scores.ct/psnr[0] is 'high', expected a number or null",
    ),
    "history of a curve too short": (in_history("curves", "nll", "ct", to=[]), "curves.nll.ct has 0 values, expected"),
    "history of no step": (
        in_history("curves", to={"nll": {"ct": [], "organs": []}, "scores": NOTHING} | {name: [] for name in CURVES}),
        "curves.step has 0 values, expected one for each of the steps",
    ),
    "history of other groups": (
        in_history("groups", to=["shared"]),
        "history.groups are shared, but curves.nll is of ct, organs; expected shared, then these",
    ),
    "history without a layer": (in_history("allocation", "entropy", to={}), "are of different layers"),
    "history of a step too large": (
        in_history("curves", "step", to=[10**400]),
        "curves.step[0] is a whole number of more than 300 digits, expected a finite number",
    ),
    "history of infinite p": (
        in_history("allocation", "p", to={"a": [[math.inf, 0.0, 0.0]]}),
        "allocation.p.a[0][0] is inf, expected a finite number",
    ),
    "history of p beyond 1": (
        in_history("allocation", to={"step": [2], "p": {"a": [[1.5, 0.0, -0.5]]}, "entropy": {"a": [0.0]}}),
        "allocation.p.a has the shares [1.5, 0.0, -0.5], expected shares of 1",
    ),
    "history of steps backwards": (
        in_history(
            "validation", to={"step": [4, 2], "nll": [1, 1], "scores": {"ct/psnr": [1, 1], "organs/dice": [1, 1]}}
        ),
        "validation.step is [4, 2], expected steps one after the other",
    ),
    "history of a look too few": (
        in_history("validation", to={"step": [], "nll": [], "scores": NOTHING | {"ct/psnr": [1.0]}}),
        "history.validation.scores.ct/psnr has 1 values",
    ),
    "history of other scores": (
        in_history("titles", to={"ct/psnr": "PSNR"}),
        "history.curves.scores are ct/psnr, organs/dice; expected those of titles: ct/psnr",
    ),
    "data of words": (saved(lambda s: s.update(data="x")), "final.pt: data is 'x', expected an object"),
    "data without channels": (
        saved(lambda s: s["data"].update(in_channels=0)),
        "final.pt: in_channels 0, expected the number of channels of the run's images",
    ),
    "data of too few names": (
        saved(lambda s: s["data"].update(channel_names=[])),
        "final.pt: channel_names [], expected the names of 1 channels",
    ),
    "data.json of another cohort": (
        about(fingerprint="0"),
        "data.json: fingerprint is '0', the run was trained with '",
    ),
    "data.json of other labels": (
        other_labels(bladder=1),
        "data.json: targets.labels.names.bladder is 1, the run was trained with 2, expected that",
    ),
    "targets that do not fit": (
        without_labels,
        "final.pt: its tasks don't fit its targets (tasks.organs: the cohort has no target 'labels'",
    ),
    "data.json gone": (lambda p: (p.parents[1] / "data.json").unlink(), "data.json: no such file"),
    "channels without names": (
        about(channel_names=[]),
        "data.json: channel_names is [], the run was trained with ['MR'], expected that",
    ),
    "no channels": (about(in_channels=0), "data.json: in_channels is 0, the run was trained with 1, expected that"),
    "channels of text": (about(in_channels="1"), "data.json: in_channels is '1', expected a whole number"),
    "labels of text": (other_labels(background="0"), "targets.labels.names.background is '0', expected a whole"),
    "cases a list": (about(cases=[]), "data.json: cases is [], expected an object"),
    "data.json empty": (
        lambda p: (p.parents[1] / "data.json").write_text("{}"),
        "data.json: there is no 'in_channels', expected a whole number",
    ),
    "data.json a list": (lambda p: (p.parents[1] / "data.json").write_text("[]"), "data.json: it is [], expected an"),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_bad_checkpoints(made, tmp_path, capsys, monkeypatch, what):
    spoil, message = CHECKPOINTS[what]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "run", tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoints" / "final.pt")
    refused(capsys, ["predict", "run", str(made / "cohort"), "new"], message)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "executed").exists()


OUTPUTS = [
    (["preprocess", "{cohort}", "{cohort}", "--processes", "1"], "already there and not an empty folder"),
    (["preprocess", "{cohort}", "{file}/new", "--processes", "1"], "can't be created"),
    (["preprocess", "{cohort}", "/proc/new", "--processes", "1"], "/proc/new: can't be created"),
    (["preprocess", "{cohort}", "{new}", "--processes", "-1"], "processes=-1"),
    (["preprocess", "{cohort}", "{new}", "--on-bad-case", "ignore"], "ignore"),
    (["preprocess", "{file}", "{new}"], "expected a folder, a .csv or a .json"),
    (["train", "--data", "{cache}", "--out", "{run}", *TINY], "already there and not an empty folder"),
    (["train", "--data", "{cache}", "--out", "{run}", "--resume", *TINY], "this run is finished (2 steps)"),
    (["train", "--data", "{cache}", "--out", "{file}/new", *TINY], "can't be created"),
    (["train", "--data", "{cache}", "--out", "/proc/new", *TINY], "/proc/new: can't be created"),
    (
        ["train", "--data", "{cache}", "--out", "{new}", *TINY, "--patch", "[1,1]", "--schedule.batch", "1"],
        "patch=[1, 1]",
    ),
    (["predict", "{run}", "{cohort}", "{new}", "--checkpoint", "best"], "no best.pt, because it had no validation"),
    (["predict", "{run}", "{cohort}", "{new}", "--checkpoint", "worst"], "worst"),
    (["predict", "{run}", "{cohort}", "/proc/new"], "/proc/new: can't be created"),
    (["predict", "{run}", "{cohort}", "{new}", "--draws", "-2"], "draws=-2"),
    (["predict", "{run}", "{cohort}", "{new}", "--by", "mean"], "by='mean'"),
    (["evaluate", "{cohort}", "{cohort}", "--out", "/proc/metrics.json"], "/proc/metrics.json: can't be written"),
    (["phantom", "/proc/new"], "/proc/new: can't be created"),
    (["freeze", "{run}", "/proc/new.pt2"], "/proc/new.pt2: can't be written"),
    (["freeze", "{run}", "/proc/new/network.pt2"], "/proc/new: can't be created"),
    (["freeze", "{run}", "{new}.pt2", "--tasks", "[]"], "tasks=[]: expected one or more"),
]


@pytest.mark.parametrize(("arguments", "message"), OUTPUTS)
def test_bad_places(made, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    names = {name: str(made / name) for name in ("cohort", "cache", "run")}
    names |= {"new": str(tmp_path / "new"), "file": str(tmp_path / "file")}
    refused(capsys, [argument.format(**names) for argument in arguments], message)
    assert not (tmp_path / "new").exists()


# --- what the product has written itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(made):
    """The run with its predictions and their metrics beside it."""
    assert main(["predict", str(made / "run"), str(made / "cohort"), str(made / "predictions"), "--draws", "0"]) == 0
    assert main(["evaluate", str(made / "predictions"), str(made / "cohort")]) == 0
    return made


def changed(*place, to=None):
    """Something else in one place of a JSON file; without `to` it is gone."""

    def change(text):
        content = part = json.loads(text)
        for key in place[:-1]:
            part = part[key]
        if to is None:
            del part[place[-1]]
        else:
            part[place[-1]] = to
        return json.dumps(content)

    return change


METRICS, CONFIG, TOLD = "metrics.json", "run/config.yaml", "predictions/predictions.json"
CASE = ("cases", "phantom_002")
NAMES = ("tasks", "organs", "about", "names")
WRITTEN = {
    "history {}": ("run/history.json", lambda t: "{}", "it is not the history in"),
    "history []": ("run/history.json", lambda t: "[]", "it is not the history in"),
    "history cut": ("run/history.json", lambda t: t[:100], "not readable as JSON"),
    "history of another step": ("run/history.json", lambda t: t.replace("2", "3", 1), "it is not the history in"),
    "metrics {}": (METRICS, lambda t: "{}", "there is no 'conventions', expected an object"),
    "metrics gone": (METRICS, None, "no such file"),
    "no rules": (METRICS, changed("conventions", to={}), "there is no 'conventions.tasks'"),
    "empty rules": (
        METRICS,
        changed("conventions", "tasks", "ct", "rules", to={}),
        "conventions.tasks.ct.rules is empty",
    ),
    "other summary": (METRICS, changed("summary", to={"ct": {}}), "summary is not that of its cases"),
    "number in the summary": (
        METRICS,
        changed("summary", "organs", "dice_mean", "mean", to=1),
        "summary is not that of its cases",
    ),
    "cases a list": (METRICS, changed("cases", to=[1]), "cases is [1], expected an object"),
    "no cases": (METRICS, changed("cases", to={}), "cases is empty"),
    "a case a number": (METRICS, changed(*CASE, to=3), "cases.phantom_002 is 3, expected an object"),
    "no overall CT": (METRICS, changed(*CASE, "ct", "regions", "overall"), "cases.phantom_002.ct is incomplete"),
    "no gain": (METRICS, changed(*CASE, "ct", "psnr_gain"), "cases.phantom_002.ct is incomplete"),
    "no mean Dice": (METRICS, changed(*CASE, "organs", "dice_mean"), "cases.phantom_002.organs is incomplete"),
    "a number in words": (
        METRICS,
        changed(*CASE, "ct", "regions", "bones", "mae", to="12"),
        "ct.regions.bones.mae is '12', expected a number or null",
    ),
    "a number of 400 digits": (
        METRICS,
        changed(*CASE, "ct", "regions", "bones", "mae", to=10**400),
        "ct.regions.bones.mae is a whole number of more than 300 digits, expected a finite number",
    ),
    "a number of 400 digits in the summary": (
        METRICS,
        changed("summary", "organs", "dice_mean", "mean", to=10**400),
        "summary is not that of its cases",
    ),
    "NaN": (METRICS, changed(*CASE, "organs", "dice_mean", to=math.nan), "dice_mean is nan, expected a finite number"),
    "infinity": (
        METRICS,
        changed(*CASE, "organs", "dice", "prostate", to=math.inf),
        "dice.prostate is inf, expected a finite",
    ),
    "a task of an unknown kind": (
        METRICS,
        changed("conventions", "tasks", "ct", "options", "kind", to="magic"),
        "conventions: tasks.ct.kind='magic': expected one of",
    ),
    "a task that is not described": (
        METRICS,
        changed("conventions", "tasks", "organs"),
        "cases.phantom_002 has 'organs', expected the tasks of conventions.tasks",
    ),
    "no hashes": (METRICS, changed("predictions"), "there is no 'predictions', expected an object"),
    "no hashes of the cohort": (METRICS, changed("cohort"), "there is no 'cohort', expected an object"),
    "other hashes of the cohort": (
        METRICS,
        changed("cohort", "phantom_002", "ct", to=["0"]),
        "case phantom_002 was compared with other files than those in",
    ),
    "config Latin-1": (CONFIG, lambda t: b"data: \xfc\n", "not text in UTF-8"),
    "config gone": (CONFIG, None, "no such file"),
    "config a list": (CONFIG, lambda t: "[1]", "its configuration is not one of this version (it: it is [1], expected"),
    "config not YAML": (CONFIG, lambda t: "a: [1", "not readable as YAML"),
    "config of another run": (
        CONFIG,
        lambda t: t.replace("seed: 0", "seed: 7"),
        "seed is 7, the run was trained with 0, expected that",
    ),
    "config with words": (
        CONFIG,
        lambda t: t.replace("seed: 0", "seed: none"),
        "seed is 'none', expected a whole number",
    ),
    "predictions []": (TOLD, lambda t: "[]", "it is [], expected an object"),
    "predictions of words": (TOLD, changed("draws", to="8"), "draws is '8', expected a whole number"),
    "tasks of predictions": (TOLD, changed("tasks", to=[]), "tasks is [], expected an object"),
    "negative labels of predictions": (
        TOLD,
        changed(*NAMES, to={"background": 0, "prostate": -1}),
        "expected the values 0, 1, 2, .. once each",
    ),
    "other labels of predictions": (
        TOLD,
        changed(*NAMES, to={"background": 0, "prostate": 1}),
        "predictions.json: tasks.organs.about.names",
    ),
    "predictions of another run": (TOLD, changed("digest", to="0"), "predicted by another run than"),
    "predictions of an unknown checkpoint": (
        TOLD,
        changed("checkpoint", to="worst"),
        "checkpoint is 'worst', expected final or best",
    ),
    "predictions of another MR": (
        TOLD,
        changed("cases", "phantom_002", to=["0"]),
        "case phantom_002 was predicted from another MR than",
    ),
    "predictions of no such case": (
        TOLD,
        changed("cases", to={}),
        "there is a folder phantom_002, but no such case is listed",
    ),
    "half a letter": (TOLD, changed("by", to="\ud800"), "not readable as JSON"),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_own_files_are_checked_when_they_are_read(evaluated, tmp_path, capsys, what):
    name, change, message = WRITTEN[what]
    for part in ("run", "predictions"):
        shutil.copytree(evaluated / part, tmp_path / part)
    shutil.copy(evaluated / "metrics.json", tmp_path)
    path = tmp_path / name
    if change is None:
        path.unlink()
    else:
        content = change(path.read_text())
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "new" / "report.html"
    places = [str(tmp_path / part) for part in ("predictions", "metrics.json")]
    command = ["report", str(tmp_path / "run"), str(evaluated / "cohort"), *places, "--out", str(out)]
    refused(capsys, command, f"{path}: ")
    refused(capsys, command, message)
    assert not out.parent.exists()
