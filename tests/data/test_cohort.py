"""Which files make a cohort: the three layouts, and every way in which they can be wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from sfg_fast.data import Case, Grid, Target, load_case, read_cohort, write_volume
from sfg_fast.data.cohort import USUAL
from sfg_fast.errors import InputError

GRID = Grid(np.diag([2.0, 2, 3, 1]), (4, 3, 2))
SHAPE = GRID.array_shape
LABELS = {"background": 0, "prostate": 1, "bladder": 2}
NAMED = {**USUAL, "labels": Target("labels", "labels", names=LABELS)}


def nifti(path: Path, value=0, grid=GRID, dtype="uint8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, np.broadcast_to(np.asarray(value), grid.array_shape), grid, dtype)
    return path


def folders(root: Path) -> Path:
    """a: everything; b: MR only, uncompressed; a folder and a file that are no case."""
    for name in ("mr", "ct", "labels", "mask"):
        nifti(root / "a" / f"{name}.nii.gz", 1)
    nifti(root / "b" / "mr.nii")
    (root / "overview").mkdir()
    (root / "overview" / "picture.png").write_bytes(b"")
    (root / "readme.txt").write_text("x")
    return root


def nnunet(root: Path) -> Path:
    """Two channels; train b and a, test c; a has everything."""
    for folder, case in (("imagesTr", "b"), ("imagesTr", "a"), ("imagesTs", "c")):
        for channel in (0, 1):
            nifti(root / folder / f"{case}_000{channel}.nii.gz")
    for folder, case in (("labelsTr", "a"), ("targetsTr", "a"), ("masksTr", "a"), ("targetsTs", "c")):
        nifti(root / folder / f"{case}.nii.gz", 1)
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": 2}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def table(root: Path) -> Path:
    """case,mr,ct,labels,split: the files of `folders`, in the order b, a."""
    folders(root)
    (root / "list.csv").write_text(
        "case, mr, ct, labels, split\nb,b/mr.nii,,,test\n\na ,a/mr.nii.gz,a/ct.nii.gz, a/labels.nii.gz,train\n"
    )
    (root / "labels.json").write_text(json.dumps(LABELS))
    return root / "list.csv"


def as_json(root: Path, rows=None, **more) -> Path:
    folders(root)
    rows = [{"case": "a", "mr": "a/mr.nii.gz", "labels": "a/labels.nii.gz", "split": "val"}] if rows is None else rows
    (root / "list.json").write_text(json.dumps({"labels": LABELS, "cases": rows, **more}))
    return root / "list.json"


def change(path: Path, **entries) -> Path:
    """Changes entries of a JSON object; returns its folder."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))
    return path.parent


def test_folder_layout(tmp_path):
    cohort = read_cohort(folders(tmp_path))
    a, b = tmp_path / "a", tmp_path / "b"
    assert cohort.cases == (
        Case(
            "a",
            (a / "mr.nii.gz",),
            {"ct": a / "ct.nii.gz", "labels": a / "labels.nii.gz"},
            a / "mask.nii.gz",
            "train",
        ),
        Case("b", (b / "mr.nii",), {}, None, "train"),
    )
    assert (cohort.root, cohort.targets, cohort.channel_names) == (tmp_path, USUAL, ("MR",))
    assert not cohort.images


def test_folder_layout_with_dataset_json(tmp_path):
    root = change(
        folders(tmp_path) / "dataset.json",
        labels=LABELS,
        channel_names={"0": "T2"},
        split={"train": ["b"], "test": ["a"]},
    )
    cohort = read_cohort(str(root))
    assert [(case.name, case.split) for case in cohort.cases] == [("a", "test"), ("b", "train")]
    assert (cohort.targets["labels"].names, cohort.channel_names) == (LABELS, ("T2",))
    assert [[case.name for case in cohort.split(name)] for name in ("train", "val", "test")] == [["b"], [], ["a"]]
    with pytest.raises(InputError, match="unknown split 'Test'"):
        cohort.split("Test")


def test_nnunet_layout(tmp_path):
    cohort = read_cohort(nnunet(tmp_path))
    a, b, c = cohort.cases
    assert [(case.name, case.split) for case in (a, b, c)] == [("a", "train"), ("b", "train"), ("c", "test")]
    assert a.inputs == (tmp_path / "imagesTr" / "a_0000.nii.gz", tmp_path / "imagesTr" / "a_0001.nii.gz")
    assert a.targets == {"ct": tmp_path / "targetsTr" / "a.nii.gz", "labels": tmp_path / "labelsTr" / "a.nii.gz"}
    assert (a.mask, c.targets) == (tmp_path / "masksTr" / "a.nii.gz", {"ct": tmp_path / "targetsTs" / "c.nii.gz"})
    assert (b.targets, b.mask) == ({}, None)
    assert (cohort.targets["labels"].names, cohort.channel_names) == (LABELS, ("T1", "T2"))


def test_csv_layout(tmp_path):
    cohort = read_cohort(table(tmp_path))
    assert [(case.name, case.split) for case in cohort.cases] == [("b", "test"), ("a", "train")]
    assert cohort.cases[1].targets["labels"] == tmp_path / "a" / "labels.nii.gz"
    assert (cohort.cases[0].targets, cohort.targets["labels"].names) == ({}, LABELS)


def test_json_layouts(tmp_path):
    path = as_json(tmp_path, channel_names={"0": "T2"})
    cohort = read_cohort(path)
    assert [(case.name, case.split) for case in cohort.cases] == [("a", "val")]
    assert (cohort.targets["labels"].names, cohort.channel_names) == (LABELS, ("T2",))
    path.write_text(json.dumps([{"case": "b", "mr_1": "a/mr.nii.gz", "mr_0": "b/mr.nii", "ct": None}]))
    cohort = read_cohort(path)
    assert cohort.cases == (Case("b", (tmp_path / "b" / "mr.nii", tmp_path / "a" / "mr.nii.gz"), {}, None, "train"),)
    assert cohort.channel_names == ("MR_0", "MR_1")


def test_label_names_without_labels_are_dropped(tmp_path):
    rows = [{"case": "b", "mr": "b/mr.nii"}]
    assert read_cohort(as_json(tmp_path, rows)).targets == {}


def test_files_outside_need_permission(tmp_path):
    folders(tmp_path)
    inside = tmp_path / "lists"
    inside.mkdir()
    for mr in ("../a/mr.nii.gz", str(tmp_path / "a" / "mr.nii.gz")):
        (inside / "l.csv").write_text(f"case,mr\na,{mr}\n")
        with pytest.raises(InputError, match=r"l.csv, line 2: mr .* is outside the list's folder; allow_outside=True"):
            read_cohort(inside / "l.csv")
        assert read_cohort(inside / "l.csv", allow_outside=True).cases[0].inputs[0].samefile(tmp_path / "a/mr.nii.gz")


def rows_json(*rows):
    return lambda root: as_json(root, list(rows))


def csv(text: str):
    def make(root: Path) -> Path:
        path = table(root)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def with_file(layout, name: str):
    def make(root: Path) -> Path:
        path = layout(root)
        nifti(root / name)
        return path

    return make


def without(layout, *names: str):
    def make(root: Path) -> Path:
        path = layout(root)
        for name in names:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
            else:
                (root / name).unlink()
        return path

    return make


def dataset(layout, **entries):
    return lambda root: change(layout(root) / "dataset.json", **entries)


def text(name: str, content: str):
    def make(root: Path) -> Path:
        (root / name).write_text(content)
        return root / name

    return make


def empty_folder(root: Path) -> Path:
    return root


def broken_dataset(root: Path) -> Path:
    text("dataset.json", "{")(root)
    return folders(root)


def dangling_link(root: Path) -> Path:
    folders(root)
    (root / "b" / "ct.nii.gz").symlink_to(root / "gone.nii.gz")
    return root


def split(**lists):
    return dataset(folders, split=lists)


BAD_COHORTS = {
    "missing": (lambda root: root / "none", "none: no such file or folder"),
    "empty folder": (empty_folder, "no cases; expected a folder per case with mr.nii.gz, imagesTr/, a .csv or a .json"),
    "other file": (text("list.txt", ""), "expected a folder, a .csv or a .json"),
    "no MR in a folder": (without(folders, "a/mr.nii.gz"), "a: case a has no MR"),
    "two of one kind": (with_file(folders, "a/ct.nii"), "case a: both .*ct.nii and ct.nii.gz are there"),
    "mr and mr_0": (with_file(folders, "a/mr_0.nii.gz"), "case a has mr, mr_0, expected mr, or mr_0, mr_1"),
    "channel gap": (rows_json({"case": "a", "mr_0": "x", "mr_2": "x"}), "case a has mr_0, mr_2, expected"),
    "channels differ": (with_file(without(folders, "b/mr.nii"), "b/mr_1.nii"), "case b has mr_1, expected"),
    "channel missing": (without(nnunet, "imagesTr/b_0001.nii.gz"), "case b has 1 MR channels, a 2"),
    "link to nothing": (dangling_link, "case b: no such file .*b/ct.nii.gz"),
    "dataset.json not JSON": (broken_dataset, "dataset.json: not readable as JSON"),
    "dataset.json a list": (lambda root: text("dataset.json", "[]")(folders(root)).parent, "expected a JSON object"),
    "labels a list": (dataset(folders, labels=["prostate"]), "labels .'prostate'., expected"),
    "labels of version 1": (dataset(folders, labels={"0": "background"}), "labels .*'0': 'background'.*, expected"),
    "labels a region": (dataset(folders, labels={"background": 0, "all": [1, 2]}), "labels .*, expected"),
    "labels a truth": (dataset(folders, labels={"background": 0, "a": True}), "labels .*, expected"),
    "no background": (dataset(folders, labels={"a": 0, "b": 1}), '"background": 0 and the values 0, 1, 2'),
    "labels with a gap": (dataset(folders, labels={"background": 0, "a": 2}), "the values 0, 1, 2, .. once each"),
    "labels doubled": (dataset(folders, labels={"background": 0, "a": 1, "b": 1}), "the values 0, 1, 2, .. once each"),
    "labels none": (dataset(folders, labels={}), '"background": 0 and the values'),
    "channel names": (dataset(nnunet, channel_names={"0": "T1"}), "channel_names .* for 2 MR channels"),
    "channel names a list": (dataset(nnunet, channel_names=["T1", "T2"]), "channel_names .* for 2 MR channels"),
    "channel names numbers": (dataset(folders, channel_names={"0": 1}), "channel_names .* for 1 MR channels"),
    "split unknown": (
        split(train=["a"], testing=["b"]),
        "dataset.json: unknown split 'testing', expected one of train",
    ),
    "split names nobody": (split(train=["a", "b", "c"]), "split train names 'c', but there is no such case"),
    "split names a number": (split(train=["a", "b", 1]), "split train names 1, but there is no such case"),
    "split twice": (split(train=["a", "b"], test=["b"]), "case b is listed twice, in split train and in test"),
    "split forgets": (split(train=["a"]), "case b is in no split; list every case once"),
    "split a list": (dataset(folders, split=["a", "b"]), "split .*, expected"),
    "split of text": (split(train="ab"), "split .*, expected"),
    "nnunet without dataset.json": (without(nnunet, "dataset.json"), "dataset.json: no such file"),
    "nnunet without images": (without(nnunet, "imagesTs", "targetsTs", "imagesTr/b_0000.nii.gz"), "case b has mr_1"),
    "nnunet labels only": (with_file(nnunet, "labelsTr/d.nii.gz"), "case d has no MR"),
    "nnunet no channel": (with_file(nnunet, "imagesTr/d.nii.gz"), "d.nii.gz: expected CASE_0000.nii.gz"),
    "nnunet in both": (
        with_file(with_file(nnunet, "imagesTs/a_0000.nii.gz"), "imagesTs/a_0001.nii.gz"),
        "a is there twice",
    ),
    "nnunet ending": (dataset(nnunet, file_ending=".dcm"), "file_ending '.dcm', expected .nii or .nii.gz .or .mha"),
    "nnunet other ending": (
        dataset(nnunet, file_ending=".nii"),
        r"a_0000.nii.gz: expected a file that ends in .nii, the file_ending of dataset.json",
    ),
    "csv empty": (csv(""), "no cases"),
    "csv header only": (csv("case,mr\n"), "no cases"),
    "csv column": (
        csv("case,mr,image\na,a/mr.nii.gz,x\n"),
        "list.csv, line 2: unknown column 'image', expected case, mr",
    ),
    "csv column twice": (csv("case,mr,mr\na,a/mr.nii.gz,x\n"), "a column is there twice"),
    "csv short row": (csv("case,mr,ct\na,a/mr.nii.gz\n"), "list.csv, line 2: 2 values for 3 columns"),
    "csv long row": (csv("case,mr\na,a/mr.nii.gz,b\n"), "line 2: 3 values for 2 columns"),
    "csv quotes": (csv('case,mr\na,"a/mr.nii.gz\n'), "list.csv: not readable as CSV"),
    "csv not text": (csv(b"case,mr\n\xff,x\n"), "list.csv: not readable as CSV"),
    "csv nul": (csv("case,mr\na,a\0b\n"), "not readable as CSV|mr is 'a"),
    "csv no name": (csv("case,mr\n,a/mr.nii.gz\n"), "line 2: case name '' can't be a folder name"),
    "csv no MR": (csv("case,ct\na,a/ct.nii.gz\n"), "line 2: case a has no MR"),
    "csv split": (csv("case,mr,split\na,a/mr.nii.gz,Train\n"), "line 2: unknown split 'Train'"),
    "csv twice": (csv("case,mr\na,a/mr.nii.gz\na,a/mr.nii.gz\n"), "case a is there twice"),
    "csv file": (csv("case,mr\na,a/no.nii.gz\n"), "case a: no such file .*a/no.nii.gz"),
    "csv folder": (csv("case,mr\na,a\n"), "case a: no such file"),
    "csv endless name": (csv("case,mr\na," + "x" * 5000 + "\n"), "case a: no such file"),
    "json broken": (text("list.json", "{"), "list.json: not readable as JSON"),
    "json number": (text("list.json", "3"), "expected a list of rows"),
    "json of text": (text("list.json", '["a"]'), "expected a list of rows"),
    "json no cases": (text("list.json", '{"labels": {}}'), "expected a list of rows"),
    "json unknown entry": (
        lambda root: as_json(root, spilt={}),
        "unknown entry 'spilt', expected labels, channel_names",
    ),
    "json labels": (lambda root: as_json(root, labels={"prostate": 1}), "list.json: labels .*, expected"),
    "json no rows": (rows_json(), "no cases"),
    "json number as path": (rows_json({"case": "a", "mr": 3}), "list.json, row 1: mr is 3, expected text"),
    "json nul": (rows_json({"case": "a", "mr": "a\0b"}), "row 1: mr is 'a.x00b', expected text"),
    **{
        f"case name {name!r}": (rows_json({"case": name, "mr": "a/mr.nii.gz"}), "can't be a folder name")
        for name in ("../a", "a/b", "a\\b", ".", "..", ".hidden", "a\nb", "manifest.json")
    },
}


@pytest.mark.parametrize("case", BAD_COHORTS)
def test_bad_cohorts_are_refused(tmp_path, case):
    make, message = BAD_COHORTS[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read_cohort(path)
    assert "\n" not in str(error.value)


def test_bad_labels_json_beside_a_table(tmp_path):
    path = table(tmp_path)
    (tmp_path / "labels.json").write_text('{"prostate": 1}')
    with pytest.raises(InputError, match=r"labels\.json: labels .*, expected"):
        read_cohort(path)


@pytest.fixture
def case(tmp_path) -> Case:
    """Two channels, and everything else, each file with voxels of its own."""
    numbers = np.arange(24).reshape(SHAPE)
    return Case(
        "p1",
        (nifti(tmp_path / "mr_0.nii", numbers / 2, dtype="float32"), nifti(tmp_path / "mr_1.nii", numbers)),
        {
            "ct": nifti(tmp_path / "ct.nii.gz", numbers - 1000, dtype="int16"),
            "labels": nifti(tmp_path / "labels.nii.gz", numbers % 3),
        },
        nifti(tmp_path / "mask.nii.gz", (numbers > 5) * 255),
        "train",
    )


def test_load_case(case):
    loaded = load_case(case, NAMED)
    numbers = np.arange(24).reshape(SHAPE)
    np.testing.assert_array_equal(loaded.inputs, np.stack([numbers / 2, numbers]))
    np.testing.assert_array_equal(loaded.targets["ct"], numbers - 1000)
    np.testing.assert_array_equal(loaded.targets["labels"], numbers % 3)
    np.testing.assert_array_equal(loaded.mask, numbers > 5)
    types = [array.dtype.name for array in (loaded.inputs, *loaded.targets.values(), loaded.mask)]
    assert types == ["float32", "float32", "uint8", "bool"]
    assert loaded.grid.shape == GRID.shape


def test_load_case_with_mr_only(case):
    loaded = load_case(Case("p2", case.inputs[:1], {}, None, "test"), USUAL)
    assert loaded.inputs.shape == (1, *SHAPE)
    assert (loaded.targets, loaded.mask) == ({}, None)


def test_files_of_a_case_may_be_stored_in_different_orientations(case):
    """The CT mirrored on disk, voxel by voxel the same place."""
    before = load_case(case, USUAL).targets["ct"]
    affine = GRID.affine.copy()
    affine[0] = [-2, 0, 0, 6]
    write_volume(case.targets["ct"], before, Grid(affine, GRID.shape), "int16")
    np.testing.assert_array_equal(load_case(case, USUAL).targets["ct"], before)


SHIFTED = Grid(GRID.affine + np.outer([0, 1, 0, 0], [0, 0, 0, 1]), GRID.shape)
LONGER = Grid(GRID.affine, (4, 3, 3))
BAD_FILES = {
    "second channel": (1, {"grid": LONGER}, r"mr_1.nii has shape \(4, 3, 3\) .* but .*mr_0.nii has shape \(4, 3, 2\)"),
    "ct moved": ("ct", {"grid": SHIFTED}, r"ct.nii.gz has shape .*1.0\].* but .*mr_0.nii has .*0.0\]"),
    "labels longer": ("labels", {"grid": LONGER}, "expected one grid for all files"),
    "mask moved": ("mask", {"grid": SHIFTED, "value": 1}, "expected one grid for all files"),
    "unknown label": ("labels", {"value": 7}, r"labels.nii.gz holds label value 7, expected one of .*'prostate': 1"),
    "empty mask": ("mask", {}, "mask.nii.gz is an empty mask"),
    "labels not whole": (
        "labels",
        {"value": 0.5, "dtype": "float32"},
        "labels.nii.gz: label value 0.5, expected whole",
    ),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_cases_are_refused(case, what):
    which, content, message = BAD_FILES[what]
    paths = {"mask": case.mask, **case.targets, 1: case.inputs[1]}
    nifti(paths[which], **content)
    with pytest.raises(InputError, match=f"^case p1: .*{message}"):
        load_case(case, NAMED)


def test_without_names_any_label_passes(case):
    nifti(case.targets["labels"], 7)
    assert load_case(case, USUAL).targets["labels"].max() == 7


def test_a_broken_file_names_the_case(case):
    case.targets["ct"].write_bytes(case.targets["ct"].read_bytes()[:40])
    with pytest.raises(InputError, match=r"^case p1: .*ct.nii.gz: "):
        load_case(case, NAMED)


def test_volumes_with_other_names_are_told(tmp_path):
    for name in ("a/mr", "a/ct", "a/label", "b/MR"):
        nifti(tmp_path / f"{name}.nii")
    with pytest.warns(UserWarning, match="2 images are not read, by their names, .*: a/label.nii, b/MR.nii"):
        assert [case.name for case in read_cohort(tmp_path).cases] == ["a"]


def test_volumes_in_other_folders_of_nnunet_are_told(tmp_path):
    for name in ("imagesTr/a_0000", "labelsTr/a", "targetTr/a"):
        nifti(tmp_path / f"{name}.nii")
    (tmp_path / "dataset.json").write_text('{"file_ending": ".nii"}')
    with pytest.warns(UserWarning, match="1 images are not read, by their names, .*: targetTr/a.nii"):
        assert list(read_cohort(tmp_path).cases[0].targets) == ["labels"]


UNREAD = {
    "deeper": ["site/c/mr.nii.gz", "c/2020/mr.nii.gz"],
    "higher": ["c_mr.nii.gz"],
    "hidden": [".c/mr.nii.gz"],
    "slices": ["c/IM0001.dcm", "c/IM0002.DCM"],
    "other formats": ["b/label.dcm", "b/seg.nii.bz2"],
}


@pytest.mark.parametrize("what", UNREAD)
def test_images_that_nothing_reads_are_told(tmp_path, what):
    folders(tmp_path)
    for name in UNREAD[what]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    some = f"{len(UNREAD[what])} images are not read, by their names, formats or places: "
    with pytest.warns(UserWarning, match=some + ", ".join(sorted(UNREAD[what]))):
        assert [case.name for case in read_cohort(tmp_path).cases] == ["a", "b"]


def test_what_is_no_lost_image_is_not_told(tmp_path, recwarn):
    """Another format beside a volume, what macOS and git leave, documents, and what lies deeper than anybody's case."""
    folders(tmp_path)
    for name in ("a/ct.dcm", "a/._mr.nii.gz", ".git/objects/x/mr.nii.gz", "docs/a.png", "1/2/3/4/5/mr.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    read_cohort(tmp_path)
    assert not recwarn


def beside(layout, *names: str):
    """Files (or folders, with a slash at the end) that are no volume that is read."""

    def make(root: Path) -> Path:
        path = layout(root)
        for name in names:
            if name.endswith("/"):
                (root / name).mkdir()
            else:
                (root / name).write_bytes(b"x")
        return path

    return make


def linked(layout, name: str):
    """A link that leads nowhere."""

    def make(root: Path) -> Path:
        path = layout(root)
        (root / name).symlink_to(root / "gone")
        return path

    return make


def as_csv(root: Path) -> Path:
    """A table, and no labels.json beside it."""
    path = table(root)
    (root / "labels.json").unlink()
    return path


def twice(file: str, key: str, first: str, second: str):
    def make(root: Path) -> Path:
        path = folders(root) if file == "dataset.json" else as_json(root)
        content = path / file if file == "dataset.json" else path
        content.write_text(f'{{"{key}": {first}, "{key}": {second}}}')
        return path

    return make


ROWS = '[{"case": "a", "mr": "a/mr.nii.gz"}]'
LOST = {
    "DICOM": (beside(folders, "b/ct.dcm"), "ct.dcm: a format that isn't read, expected .* .nii or .nii.gz .or .mha"),
    "bzip2": (beside(folders, "b/labels.nii.bz2"), "labels.nii.bz2: a format that isn't read"),
    "no ending": (beside(folders, "b/CT"), "b/CT: a format that isn't read"),
    "MR": (beside(folders, "overview/mr_0.mgz"), "overview/mr_0.mgz: a format that isn't read"),
    "folder of slices": (beside(folders, "b/ct/"), "b/ct: a folder, expected a file that ends in .nii or"),
    "nnunet DICOM": (
        beside(nnunet, "targetsTr/b.dcm"),
        "b.dcm: a format that isn't read, expected .* .nii.gz, the file_end",
    ),
    "nnunet another ending": (
        with_file(nnunet, "labelsTr/b.nii"),
        "b.nii: expected a file that ends in .nii.gz, the file",
    ),
    "nnunet both": (
        beside(nnunet, "labelsTr/a.NII.GZ"),
        "labelsTr: both a.NII.GZ and a.nii.gz are there, expected one",
    ),
    "split": (dataset(folders, spilt={}), "dataset.json: unknown entry 'spilt', did you mean 'split'"),
    "splits": (dataset(folders, Splits={}), "unknown entry 'Splits', did you mean 'split'"),
    "label": (dataset(folders, label={}), "unknown entry 'label', did you mean 'labels'"),
    "channel names": (dataset(folders, channelNames={}), "'channelNames', did you mean 'channel_names'"),
    "ending": (dataset(nnunet, file_endings=".nii"), "'file_endings', did you mean 'file_ending'"),
    "numTraining": (dataset(nnunet, numTraining=3), "dataset.json: numTraining 3, but .*imagesTr has 2 cases"),
    "one file for two": (
        rows_json({"case": "a", "mr": "a/mr.nii.gz"}, {"case": "b", "mr": "overview/../a/mr.nii.gz"}),
        "case b: .*mr.nii.gz is the mr of case b and the mr of case a, expected a file of its own",
    ),
    "one file twice": (
        rows_json({"case": "a", "mr": "b/mr.nii", "ct": "b/mr.nii"}),
        "is the ct of case a and the mr of",
    ),
    "one channel twice": (
        rows_json({"case": "a", "mr_0": "b/mr.nii", "mr_1": "b/mr.nii"}),
        "is the mr_1 of .* the mr_0",
    ),
    "labels twice": (twice("dataset.json", "labels", '{"background": 0}', "{}"), "the key 'labels' is there twice"),
    "dataset.json a link": (
        linked(folders, "dataset.json"),
        "dataset.json: no such file",
    ),
    "a case a link": (linked(folders, "c"), "c: a link that leads nowhere, expected the folder of a case"),
    **{
        name: (beside(folders, name), f"{name}: nothing is read from a file of this name, did you mean 'dataset.json'")
        for name in ("Dataset.json", "datset.json", "dataset.yaml", "dataset")
    },
    **{
        name: (
            lambda root, name=name: as_csv(root) if (root / name).write_text("{}") else root,
            f"{name}: nothing is read from a file of this name, did you mean 'labels.json'",
        )
        for name in ("label.json", "Labels.json", "labels.yml")
    },
    "labels.json a link": (linked(as_csv, "labels.json"), "labels.json: no such file"),
    "a row without a split": (
        csv("case,mr,split\na,a/mr.nii.gz,test\nb,b/mr.nii, \n"),
        "list.csv, line 3: no split, but other rows have one; expected one in every row, or in none",
    ),
    "a row of JSON without a split": (
        rows_json({"case": "a", "mr": "a/mr.nii.gz", "split": "val"}, {"case": "b", "mr": "b/mr.nii"}),
        "list.json, row 2: no split, but other rows have one",
    ),
    "a space in JSON": (rows_json({"case": "a ", "mr": "a/mr.nii.gz"}), "case is 'a ', expected no spaces around it"),
    "half a letter": (rows_json({"case": "a", "mr": "\ud800.nii.gz"}), "list.json: not readable as JSON"),
    "split twice": (twice("dataset.json", "split", "{}", "{}"), "dataset.json: the key 'split' is there twice"),
    "cases twice": (twice("list.json", "cases", "[]", ROWS), "list.json: the key 'cases' is there twice"),
}


@pytest.mark.parametrize("what", LOST)
def test_nothing_is_lost_without_a_word(tmp_path, what):
    make, message = LOST[what]
    with pytest.raises(InputError, match=message) as error:
        read_cohort(make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_name_twice_in_labels_json_is_refused(tmp_path):
    path = table(tmp_path)
    (tmp_path / "labels.json").write_text('{"background": 0, "prostate": 1, "prostate": 2}')
    with pytest.raises(InputError, match=r"labels\.json: the key 'prostate' is there twice"):
        read_cohort(path)


def test_what_may_lie_beside_a_volume(tmp_path):
    """Descriptions of it, other formats of it, the voxels of its header."""
    make = beside(folders, "a/mr.json", "a/ct.dcm", "b/ct.json", "b/mr.raw", "b/labels.PNG")
    assert ["ct" in case.targets for case in read_cohort(make(tmp_path)).cases] == [True, False]
    make = beside(nnunet, "imagesTr/a_0000.json", "labelsTr/a.raw", "targetsTr/b.txt")
    assert read_cohort(make(tmp_path / "nnunet")).cases[1].targets == {}


def test_unknown_entries_are_told_and_known_ones_are_not(tmp_path, recwarn):
    known = {"name": "x", "licence": "CC", "numTest": 9, "reference": "", "tensorImageSize": "3D", "modality": {}}
    read_cohort(dataset(nnunet, **known)(tmp_path))
    assert not recwarn
    with pytest.warns(UserWarning, match="dataset.json: nothing is read from 'colour', 'site'"):
        read_cohort(dataset(nnunet, colour=1, site="x")(tmp_path))


def test_endings_in_any_case_of_letters(tmp_path):
    folders(tmp_path)
    (tmp_path / "a" / "ct.nii.gz").rename(tmp_path / "a" / "ct.NII.GZ")
    (tmp_path / "b" / "mr.nii").rename(tmp_path / "b" / "mr.Nii")
    a, b = read_cohort(tmp_path).cases
    assert (a.targets["ct"].name, b.inputs[0].name) == ("ct.NII.GZ", "mr.Nii")
    assert load_case(a, USUAL).targets["ct"].max() == 1
    assert load_case(b, {}).inputs.shape == (1, *SHAPE)
    assert (
        "labels"
        in read_cohort(beside(without(nnunet, "labelsTr/a.nii.gz"), "labelsTr/a.NII.gz")(tmp_path / "n"))
        .cases[0]
        .targets
    )


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr"])
def test_other_formats_in_both_layouts(tmp_path, ending):
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(SHAPE))
    for name in ("mr", "ct", "labels"):
        (tmp_path / "folder" / "a").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / "folder" / "a" / f"{name}{ending}"))
    for folder, name in (("imagesTr", "a_0000"), ("targetsTr", "a"), ("labelsTr", "a")):
        (tmp_path / "nnunet" / folder).mkdir(parents=True)
        sitk.WriteImage(image, str(tmp_path / "nnunet" / folder / f"{name}{ending}"))
    change(tmp_path / "nnunet" / "dataset.json", file_ending=ending)
    for layout in ("folder", "nnunet"):
        (case,) = read_cohort(tmp_path / layout).cases
        loaded = load_case(case, USUAL)
        np.testing.assert_array_equal(loaded.targets["ct"], loaded.inputs[0])
        np.testing.assert_array_equal(loaded.targets["labels"], loaded.inputs[0])
        assert loaded.targets["ct"].max() == 23
