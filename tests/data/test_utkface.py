"""The example that lists UTKFace, on images of our own that are called as its files are."""

import csv
import json
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfg_fast.data import preprocess, read_cohort

SCRIPT = Path(__file__).parents[2] / "examples" / "utkface.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 of its names, some with the short ending, and files that don't fit."""
    root = tmp_path / "faces"
    root.mkdir()
    for index in range(40):
        ending = ".jpg" if index % 4 == 0 else ".jpg.chip.jpg"
        name = f"{index + 1}_{index % 2}_{index % 5}_2017010{index:010d}{ending}"
        noise = np.random.default_rng(index).integers(0, 255, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(noise).save(root / name, "JPEG")
    for name in ("61_1_20170109142408075.jpg.chip.jpg", "x.jpg", "44_2_0_20170109.jpg", "list.txt"):
        (root / name).write_bytes(b"")
    return root


def listed(monkeypatch, folder: Path, *options: str) -> list[dict[str, str]]:
    monkeypatch.setattr(sys, "argv", ["utkface.py", str(folder), "--out", str(folder / "list.csv"), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    with (folder / "list.csv").open() as file:
        return list(csv.DictReader(file))


def bare(name: str) -> str:
    return name.partition(".")[0]


def test_ages_and_genders_come_from_the_names(folder, monkeypatch, capsys):
    rows = listed(monkeypatch, folder)
    assert len(rows) == 40
    for row in rows:
        age, gender = row["image"].split("_")[:2]
        assert (row["age"], row["gender"]) == (age, ["male", "female"][int(gender)])
    assert Counter(row["split"] for row in rows) == {"train": 28, "val": 6, "test": 6}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [
        f"left out: {name}" for name in ("44_2_0_20170109.jpg", "61_1_20170109142408075.jpg.chip.jpg", "x.jpg")
    ]
    assert json.loads((folder / "targets.json").read_text()) == {
        "age": {"unit": "years"},
        "gender": {"classes": ["male", "female"]},
    }
    cache = preprocess(read_cohort(folder / "list.csv"), folder.parent / "cache", progress=False, size=(3, 3))
    assert (cache.count("train", "age"), cache.targets["gender"].names) == (28, {"male": 0, "female": 1})


def test_the_split_is_drawn_by_the_seed(folder, monkeypatch):
    first, again, other = (listed(monkeypatch, folder, "--seed", seed) for seed in ("0", "0", "1"))
    assert first == again != other


def test_a_share_of_the_training_images(folder, monkeypatch):
    rows, all_rows = listed(monkeypatch, folder, "--share", "0.25"), listed(monkeypatch, folder)
    assert Counter(row["split"] for row in rows) == {"train": 7, "val": 6, "test": 6}
    assert [row for row in all_rows if row in rows] == rows
    assert rows != listed(monkeypatch, folder, "--share", "0.25", "--seed", "1")


@pytest.mark.parametrize("header", ["id,split\n", ""])
def test_the_authors_split(folder, monkeypatch, capsys, header):
    names = sorted(path.name for path in folder.glob("*_2017010000*.jpg"))
    words = ["training", "validation", "inference", "train", "val", "test"]
    chosen = dict(zip(names[:36], words * 6, strict=True))
    lines = [f"{name if index % 2 else bare(name)},{word}" for index, (name, word) in enumerate(chosen.items())]
    (folder.parent / "split.csv").write_text(header + "\n".join([*lines, "1_1_1_1,test"]))
    rows = listed(monkeypatch, folder, "--split", str(folder.parent / "split.csv"))
    expected = {"train": "train", "val": "val", "test": "test", "training": "train", "validation": "val"}
    assert {row["image"]: row["split"] for row in rows} == {
        name: expected.get(word, "test") for name, word in chosen.items()
    }
    said = capsys.readouterr().err
    assert said.count("it is in no split") == 4
    assert "1 of its 37 images are not there" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1_1_1_1,dev\n", "line 1: '1_1_1_1,dev', expected a name and one of train, training"),
        ("1_1_1_1,test\n1_1_1_1.jpg,test\n", "line 2: '1_1_1_1.jpg' is there twice"),
        ("1_1_1_1,test\n", "names none of the images"),
    ],
)
def test_bad_splits_are_refused(folder, monkeypatch, text, message):
    (folder.parent / "split.csv").write_text(text)
    with pytest.raises(SystemExit, match=message):
        listed(monkeypatch, folder, "--split", str(folder.parent / "split.csv"))


def test_a_folder_of_something_else_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no images of UTKFace, expected files called age_gender_race_time"):
        listed(monkeypatch, tmp_path)
