"""Cohorts of images: lists, what preprocessing makes of them, and batches, against Pillow and plain numpy."""

import csv
import json
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sfg_fast.cli import main
from sfg_fast.data import Cache, ImageSampler, SliceSampler, blocks, load_images, preprocess, preprocessing, read_cohort
from sfg_fast.errors import InputError

from .small_cohort import picture, row_of, small_images, write_list

COUNT = 20  # 12 to train, 4 to validate, 4 to test


@pytest.fixture
def faces(tmp_path) -> Path:
    return small_images(tmp_path / "faces")


@pytest.fixture
def cache(faces, tmp_path, monkeypatch) -> Cache:
    """In blocks of five."""
    monkeypatch.setattr(blocks, "BLOCK", 5)
    return preprocess(read_cohort(faces), tmp_path / "cache", progress=False)


def written(path: Path, text: str, **targets) -> Path:
    """A list beside which these targets are declared; the images need not be there."""
    path.write_text(text)
    (path.with_name("targets.json")).write_text(json.dumps(targets)) if targets else None
    return path


# --- lists ------------------------------------------------------------------------------------------------------------


def test_a_list_of_images(faces):
    cohort = read_cohort(faces)
    assert (cohort.images, cohort.root, cohort.source, cohort.channel_names) == (True, faces.parent, faces, ())
    assert [(one.name, one.kind, one.unit, one.names) for one in cohort.targets.values()] == [
        ("age", "number", "years", {}),
        ("gender", "class", "", {"male": 0, "female": 1}),
    ]
    assert len(cohort.cases) == COUNT
    for index, case in enumerate(cohort.cases):
        row = row_of(index, COUNT)
        values = {"age": float(row["age"])} if row["age"] else {}
        values |= {"gender": ["male", "female"].index(row["gender"])} if row["gender"] else {}
        assert (case.name, case.inputs, case.split) == (
            f"faces_{index:04d}.png",
            (faces.parent / row["image"],),
            row["split"],
        )
        assert case.values == values
        assert (case.targets, case.mask) == ({}, None)


def test_kinds_that_nobody_declared(tmp_path):
    text = "image,x,y,z,empty,case\na.png,1,b,,,one\nb.png,-2.5e1,10c,.5,,two\nc.png,,b,+3,,three\n"
    cohort = read_cohort(written(tmp_path / "l.csv", text))
    assert [(one.name, one.kind, one.names) for one in cohort.targets.values()] == [
        ("x", "number", {}),
        ("y", "class", {"10c": 0, "b": 1}),
        ("z", "number", {}),
    ]
    assert [case.values for case in cohort.cases] == [
        {"x": 1.0, "y": 1},
        {"x": -25.0, "y": 0, "z": 0.5},
        {"y": 1, "z": 3.0},
    ]
    assert [(case.name, case.split) for case in cohort.cases] == [
        ("one", "train"),
        ("two", "train"),
        ("three", "train"),
    ]


def test_a_json_list_of_images(tmp_path):
    rows = [
        {"image": "a.png", "age": 3, "kind": "x", "split": "test"},
        {"image": "b.png", "age": "4.5", "kind": None, "split": "val"},
        {"image": "c.png", "late": 1.5, "split": "val"},
    ]
    about = {"targets": {"kind": {"classes": ["y", "x"]}}, "cases": rows}
    (tmp_path / "l.json").write_text(json.dumps(about))
    cohort = read_cohort(tmp_path / "l.json")
    assert [(name, one.kind) for name, one in cohort.targets.items()] == [
        ("age", "number"),
        ("kind", "class"),
        ("late", "number"),
    ]
    assert [case.values for case in cohort.cases] == [{"age": 3.0, "kind": 1}, {"age": 4.5}, {"late": 1.5}]


def test_names_from_paths(tmp_path):
    text = "image\nx/y/a.png\n./.b.png\nx//..//c.png\n"
    assert [case.name for case in read_cohort(written(tmp_path / "l.csv", text)).cases] == [
        "x_y_a.png",
        "_.b.png",
        "x_c.png",
    ]


BAD = {
    "no path": ("image,age\n,3\n", {}, "l.csv, line 2: no image, expected its path in every row"),
    "case": ("image,case\na.png,x/y\n", {}, "l.csv, line 2: case name 'x/y' can't be a folder name"),
    "case twice": ("image,case\na.png,x\nb.png,x\n", {}, "line 3: case x is there twice, expected unique names"),
    "names that become one": ("image\na/b.png\na_b.png\n", {}, "line 3: case a_b.png is there twice"),
    "image twice": (
        "image,case\na.png,x\n./a.png,y\n",
        {},
        r"line 3: image ./a.png is there twice, expected a file of",
    ),
    "split": ("image,split\na.png,Train\n", {}, "line 2: unknown split 'Train'"),
    "a row without a split": ("image,split\na.png,\nb.png,test\n", {}, "line 2: no split, but other rows have one"),
    "another without one": ("image,split\na.png,test\nb.png,\n", {}, "line 3: no split, but other rows have one"),
    "text after numbers": ("image,x\na.png,1\nb.png,old\n", {}, "line 3: x is 'old', but other rows have numbers"),
    "numbers after text": ("image,x\na.png,\nb.png,old\nc.png,3\n", {}, "line 3: x is 'old', but other rows have numb"),
    "NaN": ("image,x\na.png,1\nb.png,nan\n", {}, "line 3: x is 'nan', but other rows have numbers"),
    "infinite": ("image,x\na.png,1e99\n", {}, r"line 2: x is '1e99', expected a finite number \(of float32\)"),
    "no number": ("image,x\na.png,old\n", {"x": {}}, "line 2: x is 'old', expected a finite number"),
    "an underscore": ("image,x\na.png,1_000\n", {"x": {"unit": "m"}}, "line 2: x is '1_000', expected a finite number"),
    "unknown class": ("image,x\na.png,c\n", {"x": {"classes": ["a", "b"]}}, "line 2: x is 'c', expected one of a, b"),
    "classes a text": ("image,x\na.png,c\n", {"x": {"classes": "ab"}}, "targets.json: target 'x': classes 'ab', expec"),
    "classes twice": (
        "image,x\na.png,a\n",
        {"x": {"classes": ["a", "a"]}},
        "target 'x': classes .*'a', 'a'.*, expected",
    ),
    "no classes": ("image,x\na.png,a\n", {"x": {"classes": []}}, r"target 'x': classes \[\], expected"),
    "classes and a unit": ("image,x\na.png,a\n", {"x": {"classes": ["a"], "unit": "m"}}, "'x' has classes and a unit"),
    "labels": ("image,x\na.png,a\n", {"x": {"labels": {}}}, "targets.json: target 'x' is {'labels': {}}, expected"),
    "another column": (
        "image,Age\na.png,3\n",
        {"age": {}},
        "target 'age' has no column in the list, did you mean 'Age'",
    ),
    "a name that is taken": ("image,mask\na.png,3\n", {}, "line 2: 'mask' can't be the name of a target"),
    "a name with a space": ("image,head size\na.png,3\n", {}, "line 2: 'head size' can't be the name of a target"),
    "column twice": ("image,x,x\na.png,3,3\n", {}, "a column is there twice"),
    "short row": ("image,x\na.png,3\nb.png\n", {}, "l.csv, line 3: 1 values for 2 columns"),
    "no rows": ("image,x\n", {}, "no cases"),
    "outside": ("image\n../a.png\n", {}, "line 2: image ../a.png is outside the list's folder; allow_outside=True"),
    "a folder": ("image\na/..\n", {}, "line 2: image a/.. is a folder, expected the path of a file"),
    "far outside": ("image\n/etc/passwd\n", {}, "line 2: image /etc/passwd is outside the list's folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_lists_are_refused(tmp_path, what):
    text, targets, message = BAD[what]
    path = written(tmp_path / "l.csv", text, **targets)
    with pytest.raises(InputError, match=message) as error:
        read_cohort(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"age": True}, "l.json, row 2: age is True, expected a number or the name of a class"),
        ({"age": [3]}, r"row 2: age is \[3\], expected a number or"),
        ({"image": 3}, "row 2: image is 3, expected text"),
        ({"image": "x\0"}, "row 2: image is 'x.x00', expected text"),
        ({"kind": " x"}, "row 2: kind is ' x', expected no spaces around it"),
    ],
)
def test_bad_rows_of_json_are_refused(tmp_path, row, message):
    rows = [{"image": "a.png", "age": 3, "kind": "x"}, {"image": "b.png", **row}]
    (tmp_path / "l.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        read_cohort(tmp_path / "l.json")


def test_too_many_texts_are_no_classes(tmp_path):
    text = "image,note\n" + "".join(f"{i}.png,text {i}\n" for i in range(2**15 + 1))
    with pytest.raises(
        InputError, match="column 'note' has 32769 different texts, expected numbers, or names of at most"
    ):
        read_cohort(written(tmp_path / "l.csv", text))


def test_a_folder_that_is_a_link_may_lead_outside_only_with_permission(tmp_path):
    faces = small_images(tmp_path / "elsewhere", 2)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "faces").symlink_to(faces.parent / "faces")
    path = Path(shutil.copy(faces, tmp_path / "here"))
    with pytest.raises(InputError, match=r"line 2: image faces/0000\.png is outside"):
        read_cohort(path)
    assert len(read_cohort(path, allow_outside=True).cases) == 2


def test_a_list_is_read_without_a_look_at_its_images(tmp_path, monkeypatch):
    """Twenty thousand rows, in one folder: the list alone is read."""
    text = "image,age\n" + "".join(f"faces/{i}.png,{i % 90}\n" for i in range(20_000))
    path = written(tmp_path / "l.csv", text)
    looks = Counter()
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda *path, **more: looks.update(["lstat"]) or lstat(*path, **more))
    assert len(read_cohort(path).cases) == 20_000
    assert looks["lstat"] < 100


# --- preprocessing ----------------------------------------------------------------------------------------------------


def training_rows() -> list[dict[str, str]]:
    return [row for index in range(COUNT) if (row := row_of(index, COUNT))["split"] == "train"]


def test_blocks_hold_the_images_of_one_split_in_their_order(cache):
    assert (cache.names("train"), cache.names("val")) == (["train_00000", "train_00001", "train_00002"], ["val_00000"])
    index = 0
    for name in cache.cases:
        block = cache.block(name)
        assert {file.name for file in (cache.path / name).iterdir()} == {
            *("inputs.npy", "age.npy", "gender.npy", "names.npy", "case.json")
        }
        assert [array.dtype for array in (block.inputs, *block.targets.values())] == [np.uint8, np.float32, np.int16]
        for place in range(len(block.inputs)):
            row = row_of(index, COUNT)
            np.testing.assert_array_equal(block.inputs[place], np.moveaxis(picture(index), -1, 0))
            assert block.names[place] == f"faces_{index:04d}.png".encode()
            np.testing.assert_equal(block.targets["age"][place], float(row["age"] or "nan"))
            assert block.targets["gender"][place] == ["male", "female", ""].index(row["gender"]) or row["gender"] == ""
            assert (block.targets["gender"][place] == -1) == (row["gender"] == "")
            assert not block.inputs.flags.writeable
            index += 1
    assert index == COUNT
    with pytest.raises(InputError, match="no case 'train_00000'"):
        cache.case("train_00000")
    with pytest.raises(InputError, match="no block 'x'"):
        cache.block("x")


def test_statistics_of_images(cache):
    pixels = np.stack([picture(index) for index in range(12)]).astype(np.float64)
    form = cache.images
    assert (form.size, form.resized, form.channels) == ((8, 6), False, 3)
    np.testing.assert_allclose(form.mean, pixels.mean((0, 1, 2)))
    np.testing.assert_allclose(form.sd, pixels.std((0, 1, 2)))
    rows = training_rows()
    ages = [float(row["age"]) for row in rows if row["age"]]
    described = cache.described()
    assert described["age"].statistics == {"mean": pytest.approx(np.mean(ages)), "sd": pytest.approx(np.std(ages))}
    genders = Counter(row["gender"] for row in rows if row["gender"])
    expected = [genders[name] / genders.total() for name in ("male", "female")]
    assert described["gender"].statistics["frequencies"] == pytest.approx(expected)
    assert (described["age"].unit, described["gender"].names) == ("years", {"male": 0, "female": 1})
    assert (cache.count(), cache.count("train"), cache.count("val")) == (20, 12, 4)
    assert cache.count("train", "age") == len(ages)
    assert cache.count("train", "gender") == genders.total()
    assert cache.channel_names == ("red", "green", "blue")
    other = cache.with_splits({"train": ["train_00001"], "val": ["val_00000"]})
    np.testing.assert_allclose(other.images.mean, pixels[5:10].mean((0, 1, 2)))


def test_grey_images(tmp_path):
    cache = preprocess(read_cohort(small_images(tmp_path / "c", 6, channels=1)), tmp_path / "cache", progress=False)
    assert (cache.channel_names, cache.images.channels) == (("grey",), 1)
    np.testing.assert_array_equal(cache.block("train_00000").inputs[1, 0], picture(1, channels=1))


def test_a_split_without_a_target_does_not_have_it(tmp_path):
    path = small_images(tmp_path / "c", 10)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    cohort = read_cohort(
        write_list(path, [{**row, "age": "" if row["split"] == "val" else row["age"]} for row in rows])
    )
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    assert [cache.has("age", split) for split in ("train", "val", "test")] == [True, False, True]
    assert list(cache.described("val")) == ["gender"]
    assert set(ImageSampler(cache, "val", 2, 0)[0]) == {"inputs", "case", "gender", "has_gender"}


def everything(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_processes_write_the_same_bytes(faces, tmp_path):
    for processes in (1, 2):
        preprocess(read_cohort(faces), tmp_path / f"{processes}", progress=False, processes=processes)
    assert everything(tmp_path / "1") == everything(tmp_path / "2")


def inodes(cache: Cache) -> dict[str, int]:
    return {name: os.stat(cache.path / name).st_ino for name in cache.cases}


def repainted(faces: Path) -> None:
    Image.fromarray(picture(99)).save(faces.parent / "faces" / "0007.png")


def touched(faces: Path) -> None:
    os.utime(faces.parent / "faces" / "0007.png", (1, 1))


def rewritten(change):
    def act(faces: Path) -> None:
        rows = list(csv.DictReader(faces.read_text().splitlines()))
        change(rows)
        write_list(faces, rows)

    return act


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda faces: None, []),
        (touched, []),
        (repainted, ["train_00001"]),
        (rewritten(lambda rows: rows[7].update(age="77")), ["train_00001"]),
        (rewritten(lambda rows: rows[12].update(gender="")), ["val_00000"]),
        (rewritten(lambda rows: rows[11].update(split="val")), ["train_00002", "val_00000"]),
        (rewritten(lambda rows: rows.pop()), ["test_00000"]),
    ],
)
def test_only_the_blocks_that_changed_are_redone(faces, cache, tmp_path, change, redone):
    before = inodes(cache)
    change(faces)
    again = preprocess(read_cohort(faces), cache.path, progress=False)
    assert [name for name, inode in inodes(again).items() if inode != before[name]] == redone
    fresh = preprocess(read_cohort(faces), tmp_path / "fresh", progress=False)
    assert everything(fresh.path) == everything(again.path)


@pytest.mark.parametrize("damage", ["age.npy", "names.npy", "case.json"])
def test_damaged_blocks_are_redone(faces, cache, damage):
    before = everything(cache.path)
    path = cache.path / "val_00000" / damage
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    preprocess(read_cohort(faces), cache.path, progress=False)
    assert everything(cache.path) == before


def test_an_interrupted_run_goes_on_where_it_was(faces, cache, tmp_path, monkeypatch):
    out, seen, load_image = tmp_path / "out", [], blocks.load_image

    def interrupted(case, *rest):
        if case.name == "faces_0008.png":
            raise KeyboardInterrupt
        return load_image(case, *rest)

    monkeypatch.setattr(blocks, "load_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(read_cohort(faces), out, progress=False)
    assert sorted(path.name for path in out.iterdir()) == ["preprocess.json", "train_00000"]
    monkeypatch.setattr(blocks, "load_image", lambda case, *rest: seen.append(case.name) or load_image(case, *rest))
    preprocess(read_cohort(faces), out, progress=False)
    assert seen == [f"faces_{index:04d}.png" for index in range(5, COUNT)]
    assert everything(out) == everything(cache.path)


def test_bad_images_are_skipped_and_told(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 5)
    (faces.parent / "faces" / "0000.png").unlink()  # the very first
    (faces.parent / "faces" / "0007.png").write_bytes(b"x")
    Image.fromarray(picture(8, (9, 6))).save(faces.parent / "faces" / "0008.png")
    for index in range(16, 20):  # all of the test split
        Image.fromarray(picture(index, channels=1)).save(faces.parent / "faces" / f"{index:04d}.png")
    cohort = read_cohort(faces)
    with pytest.raises(InputError, match=r"^case faces_0000.png: no such file .*0000.png"):
        preprocess(cohort, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    cache = preprocess(cohort, tmp_path / "out", progress=False, on_bad_case="skip")
    said = {name[6:10]: reason.partition(".png: ")[2].partition(".png: ")[2] for name, reason in cache.rejected.items()}
    grey = "an image of grey, expected one of red, green, blue"
    assert said.pop("0007").startswith("not readable as PNG or JPEG")
    assert said == {
        "0000": "",
        "0008": "9 x 6 pixels (height x width), expected 8 x 6 as the others; preprocess --size resizes images",
        **dict.fromkeys(("0016", "0017", "0018", "0019"), grey),
    }
    assert next(iter(cache.rejected)) == "faces_0000.png"
    assert (cache.count(), cache.names("test")) == (13, [])
    names = [name.decode() for block in cache.names("train") for name in cache.block(block).names]
    assert names == [f"faces_{index:04d}.png" for index in range(1, 12) if index not in (7, 8)]
    before = everything(cache.path)
    preprocess(cohort, cache.path, progress=False, on_bad_case="skip")
    assert everything(cache.path) == before
    with pytest.raises(InputError, match=r"^case faces_0000.png"):
        preprocess(cohort, cache.path, progress=False)
    Image.fromarray(picture(0)).save(faces.parent / "faces" / "0000.png")
    with pytest.raises(InputError, match=r"^case faces_0007.png"):  # though its block is there, without it
        preprocess(cohort, cache.path, progress=False)


def test_without_an_image_that_can_be_used_it_is_refused(faces, tmp_path):
    for file in (faces.parent / "faces").iterdir():
        file.write_bytes(b"x")
    with pytest.raises(InputError, match=r"case faces_0000.png: .*0000.png: not readable"):
        preprocess(read_cohort(faces), tmp_path / "out", progress=False, on_bad_case="skip")
    assert not (tmp_path / "out").exists()


def test_images_of_one_colour_are_refused(tmp_path):
    faces = small_images(tmp_path / "c", 5)
    for file in (tmp_path / "c" / "faces").iterdir():
        Image.new("RGB", (6, 8), (10, 20, 30)).save(file)
    cache = preprocess(read_cohort(faces), tmp_path / "out", progress=False)
    with pytest.raises(InputError, match="channel red is 10 in all images to train on, expected images with contrast"):
        print(cache.images)


def test_resized_images(faces, tmp_path):
    Image.fromarray(picture(0, (30, 40))).save(faces.parent / "faces" / "0000.png")
    cohort = read_cohort(faces)
    with pytest.raises(InputError, match=r"0001.png: 8 x 6 pixels .*, expected 30 x 40 .*--size resizes images"):
        preprocess(cohort, tmp_path / "out", progress=False)
    cache = preprocess(cohort, tmp_path / "out", progress=False, size=(5, 4))
    assert (cache.images.size, cache.images.resized) == ((5, 4), True)
    for index, size in ((0, (30, 40)), (1, (8, 6))):
        expected = Image.fromarray(picture(index, size)).resize((4, 5), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(
            cache.block("train_00000").inputs[index], np.moveaxis(np.asarray(expected), -1, 0)
        )
    before = inodes(cache)
    other = inodes(preprocess(cohort, cache.path, progress=False, size=(4, 5)))
    assert all(before[name] != other[name] for name in before)


@pytest.mark.parametrize("size", [(0, 4), (4,), (-1, -4), (2**20, 2**20), (1, 2, 3)])
def test_sizes_that_can_not_be(faces, tmp_path, size):
    said = re.escape(f"size={list(size)}: expected height and width in pixels")
    with pytest.raises(InputError, match=said):
        preprocess(read_cohort(faces), tmp_path / "out", progress=False, size=size)


def test_volumes_are_not_resized(tmp_path, cohort):
    with pytest.raises(InputError, match=r"size=\[4, 4\]: .*cohort has volumes, expected images to resize"):
        preprocess(cohort, tmp_path / "out", progress=False, size=(4, 4))


def test_blocks_are_as_large_as_memory_allows(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * 8 * 6 * 7 + 1)
    cache = preprocess(read_cohort(faces), tmp_path / "out", progress=False)
    assert [entry["shape"][0] for entry in cache.cases.values()] == [7, 5, 4, 4]
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)
    assert len(preprocess(read_cohort(faces), tmp_path / "out", progress=False).cases) == COUNT


def test_a_disk_that_is_too_full_is_refused_before_it_starts(faces, tmp_path, monkeypatch, capsys):
    needed = COUNT * (3 * 8 * 6 + 4 + 2)
    monkeypatch.setattr(preprocessing.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(InputError, match=r"2.93 KiB are needed for 3 blocks, but only 2.93 KiB are free"):
        preprocess(read_cohort(faces), tmp_path / "out")
    assert "3 of 3 blocks to write, 2.93 KiB" in capsys.readouterr().err


def test_the_command(faces, tmp_path, capsys):
    (faces.parent / "faces" / "0003.png").write_bytes(b"x")
    command = ["preprocess", str(faces), str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 2
    assert main([*command, "--on-bad-case", "skip", "--size", "[4,3]"]) == 0
    said = capsys.readouterr()
    assert "rejected: case faces_0003.png: " in said.err
    counts = "19 images in .*: 17 with age, 17 with gender, 11 train, 4 val, 4 test, 1 rejected"
    assert re.search(counts, said.out)


ENTRIES = {
    "shape": [[5, 3, 8], [0, 3, 8, 6], [5, 3, 8, 6.0], [5, 1, 8, 6], [5, 3, 8, 7], [5, 3, 2**20, 2**20], None],
    "split": ["all", None],
    "name_bytes": [0, "x"],
    "targets": [
        {},
        {"age": {"count": 1, "mean": 1.0, "sd": 1.0}},
        {"age": {"count": 1, "mean": 1.0, "sd": 1.0}, "gender": {"counts": [1]}},
        {"age": {"count": 6, "mean": 1.0, "sd": 1.0}, "gender": {"counts": [1, 1]}},
        {"age": {"count": 1.5, "mean": 1.0, "sd": 1.0}, "gender": {"counts": [1, 1]}},
        {"age": {"count": 1, "mean": 1.0, "sd": -1.0}, "gender": {"counts": [1, 1]}},
    ],
    "pixels": [{}, {"sum": [1, 2], "squares": [1, 2]}, {"sum": [1, 2, -3], "squares": [1, 2, 3]}],
    "rejected": [None],
    "notes": [[{"kind": "ct", "text": "x"}]],
    "colour": ["green"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ENTRIES.items() for value in values])
def test_manifests_that_preprocess_never_wrote(cache, key, value):
    path = cache.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cases"]["train_00001"][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: ") as error:
        Cache(cache.path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"images": None},
        {"images": {}},
        {"images": {"resized": "no"}},
        {"channel_names": ["grey"]},
        {"cases": {}},
        {"targets": {"age": {"kind": "labels", "unit": "", "names": {"background": 0}, "statistics": {}}}},
        {"targets": {"age": {"kind": "class", "unit": "", "names": {"a": 1}, "statistics": {}}}},
    ],
)
def test_manifests_that_contradict_themselves(cache, change):
    path = cache.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=r"manifest\.json: "):
        Cache(cache.path)


# --- batches ----------------------------------------------------------------------------------------------------------


def index_of(name: str) -> int:
    return int(name[6:10])


def normalised(index: int, cache: Cache) -> np.ndarray:
    form = cache.images
    return np.moveaxis((picture(index) - np.array(form.mean)) / np.array(form.sd), -1, 0)


def test_batches_are_images_and_what_is_known_of_them(cache):
    batch = ImageSampler(cache, "train", 12, 0)[0]
    assert list(batch) == ["inputs", "case", "age", "has_age", "gender", "has_gender"]
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items() if key != "case"} == {
        "inputs": ((12, 3, 8, 6), torch.float32),
        "age": ((12,), torch.float32),
        "gender": ((12,), torch.int64),
        "has_age": ((12,), torch.bool),
        "has_gender": ((12,), torch.bool),
    }
    for i, name in enumerate(batch["case"]):
        row = row_of(index_of(name), COUNT)
        np.testing.assert_allclose(batch["inputs"][i], normalised(index_of(name), cache), atol=1e-5)
        assert batch["age"][i] == float(row["age"] or 0)
        assert batch["gender"][i] == (row["gender"] == "female")
        assert (bool(batch["has_age"][i]), bool(batch["has_gender"][i])) == (row["age"] != "", row["gender"] != "")


def test_a_batch_is_what_is_predicted_from(cache, faces):
    cases = {case.name: case for case in read_cohort(faces).cases}
    batch = ImageSampler(cache, "test", 4, 0)[0]
    read = load_images([cases[name] for name in batch["case"]], cache.images)
    np.testing.assert_array_equal(batch["inputs"], read)


def test_every_epoch_has_every_image_once_in_a_new_order(cache):
    sampler = ImageSampler(cache, "train", 7, 3)
    names = [name for step in range(24) for name in sampler[step]["case"]]
    epochs = [names[start : start + 12] for start in range(0, 168, 12)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == len(sampler) == 12
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert len({epoch[0] for epoch in epochs}) > 4


OPTIONS = {"flip": True, "shift": 2}


def test_batches_depend_on_seed_and_step_alone(cache):
    used = ImageSampler(cache, "train", 4, 7, **OPTIONS)
    for step in (0, 5, 2):
        used[step]
    fresh = ImageSampler(cache, "train", 4, 7, **OPTIONS)[9]
    copied = pickle.loads(pickle.dumps(used))[9]
    for again in (used[9], copied):
        assert again["case"] == fresh["case"]
        for key in ("inputs", "age", "gender", "has_age", "has_gender"):
            assert torch.equal(fresh[key], again[key])
    for seed, step in ((7, 10), (8, 9)):
        assert not torch.equal(ImageSampler(cache, "train", 4, seed, **OPTIONS)[step]["inputs"], fresh["inputs"])


def test_processes_share_the_batches_of_one(cache):
    whole = ImageSampler(cache, "train", 6, 5, **OPTIONS)
    parts = [ImageSampler(cache, "train", 2, 5, **OPTIONS, rank=rank, ranks=3) for rank in range(3)]
    for step in (0, 7):
        batches = [part[step] for part in parts]
        assert [name for batch in batches for name in batch["case"]] == whole[step]["case"]
        for key in ("inputs", "age", "gender", "has_age"):
            assert torch.equal(torch.cat([batch[key] for batch in batches]), whole[step][key])


def test_workers_get_the_same_batches(cache):
    sampler = ImageSampler(cache, "train", 3, 0, **OPTIONS)
    loader = torch.utils.data.DataLoader(sampler, None, sampler=range(4), num_workers=1)
    for step, batch in enumerate(loader):
        assert batch["case"] == sampler[step]["case"]
        assert torch.equal(batch["inputs"], sampler[step]["inputs"])


def test_mirrored_and_shifted_images(cache):
    """Each is the image, mirrored or not, cut out of itself with repeated edges; all of these come up alike."""
    sampler = ImageSampler(cache, "train", 600, 0, flip=True, shift=1)
    found = Counter()
    plain = ImageSampler(cache, "train", 600, 0)[0]
    batch = sampler[0]
    assert batch["case"] == plain["case"]
    for image, name in zip(batch["inputs"].numpy(), batch["case"], strict=True):
        original = normalised(index_of(name), cache)
        ways = []
        for flipped in (False, True):
            turned = original[:, :, ::-1] if flipped else original
            wide = np.pad(turned, ((0, 0), (1, 1), (1, 1)), mode="edge")
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    window = wide[:, 1 - down : 9 - down, 1 - right : 7 - right]
                    if np.allclose(window, image, atol=1e-4):
                        ways.append((flipped, down, right))
        assert len(ways) == 1
        found[ways[0]] += 1
    assert len(found) == 18
    assert min(found.values()) > 600 / 18 - 5 * np.sqrt(600 / 18)
    mirrored = sum(count for (flipped, _, _), count in found.items() if flipped)
    assert abs(mirrored - 300) < 5 * np.sqrt(150)


def test_flips_alone_do_not_shift(cache):
    batch = ImageSampler(cache, "train", 40, 0, flip=True)[0]
    for image, name in zip(batch["inputs"].numpy(), batch["case"], strict=True):
        original = normalised(index_of(name), cache)
        assert np.allclose(image, original, atol=1e-4) or np.allclose(image, original[:, :, ::-1], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("train", 0, 0), {}, "batch 0, .*expected batch >= 1"),
        (("train", 1, -1), {}, "seed -1, .*expected"),
        (("train", 1, 0), {"shift": 6}, "shift 6: expected .* 0 <= shift < 6, the images' smaller side"),
        (("train", 1, 0), {"shift": -1}, "shift -1: expected"),
        (("all", 1, 0), {}, "unknown split 'all'"),
    ],
)
def test_bad_sampling_is_refused(cache, arguments, options, message):
    with pytest.raises(InputError, match=message):
        ImageSampler(cache, *arguments, **options)


def test_samplers_of_the_other_kind(cache, tmp_path, cohort):
    assert (ImageSampler.examples, SliceSampler.examples) == ("images", "slices")
    volumes = preprocess(cohort, tmp_path / "volumes", progress=False)
    with pytest.raises(InputError, match="a cohort of volumes, expected one of images"):
        ImageSampler(volumes, "train", 1, 0)
    with pytest.raises(InputError, match="a cohort of images, expected one of volumes"):
        SliceSampler(cache, "train", 1, None, 0)


def test_blocks_that_change_under_a_training_end_it(cache):
    sampler = ImageSampler(cache, "train", 12, 0)
    sampler[0]
    with (cache.path / "train_00001" / "age.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(InputError, match="the arrays of case train_00001 have changed since they were opened"):
        sampler[1]
    ImageSampler(cache, "val", 4, 0)[0]
