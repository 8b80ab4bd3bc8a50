"""Targets beside a CT and labels: declared, read in every layout, written, described and sampled by their names."""

import dataclasses
import json
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from sfg_fast.data import Cache, Cohort, SliceSampler, Target, body_mask, load_case, preprocess, read_cohort
from sfg_fast.data.cohort import USUAL, check_same_targets
from sfg_fast.errors import InputError

from .small_cohort import LABELS, SHAPES, arrays, volume, write_cohort

DECLARED = {
    "pet": {"unit": "SUV"},
    "t2": {},
    "cbct": {"unit": "HU"},
    "vessels": {"labels": {"background": 0, "artery": 1, "vein": 2}},
    "lesions": {"labels": {}},
}
# Case c has none of them.
THERE = {"a": ("pet", "t2", "cbct", "vessels"), "b": ("pet", "vessels", "lesions"), "c": ()}


def more(name: str) -> dict[str, np.ndarray]:
    """The volumes of a case's further targets: a PET with values that no CT may have, and so on."""
    rng = np.random.default_rng(100 + ord(name))
    shape = SHAPES[name]
    found = {
        "pet": rng.gamma(1, 3000, shape).astype(np.float32),
        "t2": np.full(shape, 7, np.float32),
        "cbct": rng.integers(-3000, 5000, shape).astype(np.float32),
        "vessels": rng.integers(0, 3, shape).astype(np.float32),
        "lesions": (rng.random(shape) < 0.2).astype(np.float32),
    }
    return {target: found[target] for target in THERE[name]}


def folders(root: Path, targets=DECLARED) -> Path:
    write_cohort(root)
    for name in THERE:
        for target, array in more(name).items():
            volume(root / name / f"{target}.nii", array)
    path = root / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "targets": targets}))
    return root


def nnunet(root: Path, targets=DECLARED) -> Path:
    flat = folders(root.with_name("flat"))
    places = {"ct": "targets", "labels": "labels", "mask": "masks", "mr_0": "images", "mr_1": "images"}
    for file in sorted(flat.glob("*/*.nii")):
        name, stem = file.parent.name, file.stem
        folder = root / (places.get(stem, stem) + ("Ts" if name == "c" else "Tr"))
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / (f"{name}_000{stem[3:]}.nii" if stem.startswith("mr_") else f"{name}.nii"))
    about = {"labels": LABELS, "file_ending": ".nii", "targets": targets}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def rows(root: Path) -> list[dict[str, str]]:
    return [
        {"case": name, "split": "test" if name == "c" else "train"}
        | {file.stem: f"{name}/{file.name}" for file in sorted((root / name).glob("*.nii"))}
        for name in THERE
    ]


def table(root: Path, targets=DECLARED) -> Path:
    found = rows(folders(root))
    columns = ["case", "split", "mr_0", "mr_1", "ct", "labels", "mask", *DECLARED]
    lines = [columns, *([row.get(column, "") for column in columns] for row in found)]
    (root / "list.csv").write_text("\n".join(map(",".join, lines)))
    (root / "labels.json").write_text(json.dumps(LABELS))
    (root / "targets.json").write_text(json.dumps(targets))
    return root / "list.csv"


def as_json(root: Path, targets=DECLARED) -> Path:
    found = rows(folders(root))
    (root / "list.json").write_text(json.dumps({"labels": LABELS, "targets": targets, "cases": found}))
    return root / "list.json"


LAYOUTS = {"folders": folders, "nnunet": nnunet, "csv": table, "json": as_json}


@pytest.fixture
def many(tmp_path) -> Cache:
    return preprocess(read_cohort(folders(tmp_path / "many")), tmp_path / "many_cache", progress=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_targets_in_every_layout(tmp_path, layout):
    cohort = read_cohort(LAYOUTS[layout](tmp_path / "cohort"))
    assert [(one.name, one.kind, one.unit, one.names) for one in cohort.targets.values()] == [
        ("ct", "intensities", "HU", {}),
        ("labels", "labels", "", LABELS),
        ("pet", "intensities", "SUV", {}),
        ("t2", "intensities", "", {}),
        ("cbct", "intensities", "HU", {}),
        ("vessels", "labels", "", {"background": 0, "artery": 1, "vein": 2}),
        ("lesions", "labels", "", {}),
    ]
    assert {case.name: tuple(case.targets)[2:] for case in cohort.cases} == THERE
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    for name in THERE:
        case, raw = cache.case(name), {**arrays(name), **more(name)}
        assert list(case.targets) == ["ct", "labels", *THERE[name]]
        for target, array in case.targets.items():
            expected = raw[target].clip(-1024, 3000) if target == "cbct" else raw[target]
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == (np.uint8 if cache.targets[target].kind == "labels" else np.float32)
    assert cache.targets["lesions"].names == {"background": 0, "label_1": 1}
    assert [cache.count("train", target) for target in ("pet", "t2", "lesions", "tau")] == [2, 1, 1, 0]


def test_statistics_of_every_target(many):
    described = many.described()
    masks = {name: arrays(name)["mask"] > 0 for name in "ab"}
    pets = [more(name)["pet"][masks[name]].astype(np.float64) for name in "ab"]
    assert described["pet"].statistics == {
        "mean": pytest.approx(np.mean([pet.mean() for pet in pets])),
        "sd": pytest.approx(np.mean([pet.std() for pet in pets])),
    }
    assert described["t2"].statistics == {"mean": 7.0, "sd": 0.0}
    counts = sum(np.bincount(more(name)["vessels"].astype(int).ravel()) for name in "ab")
    assert described["vessels"].statistics["frequencies"] == pytest.approx(counts / counts.sum())
    share = more("b")["lesions"].mean()
    assert described["lesions"].statistics["frequencies"] == pytest.approx([1 - share, share])
    assert list(many.described("test")) == ["ct", "labels"]


def test_batches_of_every_target(many):
    batch = SliceSampler(many, "train", 40, (3, 12), 0)[0]  # wider than any slice
    names = ["ct", "labels", *DECLARED]
    assert list(batch) == ["inputs", "mask", *names, *(f"has_{name}" for name in names), "case"]
    for i, case in enumerate(batch["case"]):
        stored = many.case(case)
        for name in names:
            array, there = batch[name][i].numpy(), bool(batch[f"has_{name}"][i])
            padding = {"ct": -1024, "cbct": -1024}.get(name, 0)
            assert there == (name in stored.targets)
            width = SHAPES[case][2]
            before = (12 - width) // 2
            inside = array[..., before : before + width]
            assert (array == padding).sum() >= array.size - inside.size
            if not there:
                assert (array == padding).all()
            else:
                planes = stored.targets[name][:, :, :].reshape(-1, width)
                assert all((planes == row).all(1).any() for row in inside.reshape(-1, width))


def test_the_body_is_found_in_the_first_target_in_hu(tmp_path):
    """Of a: the CT; without it the cone beam CT; of b without either: the whole volume, PET or not."""
    for leave_out, expected in ((), "ct"), ((("a", "ct"),), "cbct"), ((("a", "ct"), ("a", "cbct")), "volume"):
        root = folders(tmp_path / expected)
        for name, file in (("a", "mask"), *leave_out):
            (root / name / f"{file}.nii").unlink()
        nowhere = expected == "volume"
        with pytest.warns(UserWarning, match="no case has the declared target 'cbct'") if nowhere else nullcontext():
            found = read_cohort(root)
        cache = preprocess(found, tmp_path / f"{expected}_cache", progress=False)
        assert cache.cases["a"]["mask_from"] == expected
        voxels = {**arrays("a"), **more("a")}
        mask = np.ones(SHAPES["a"], bool) if expected == "volume" else body_mask(voxels[expected].clip(-1024, 3000))
        np.testing.assert_array_equal(cache.case("a").mask, mask)


def test_only_hounsfield_units_are_checked(tmp_path, cohort):
    volume(cohort.root / "b" / "ct.nii", np.full(SHAPES["b"], 5000, np.float32))
    with pytest.raises(InputError, match=r"case b \(.*b/ct.nii\): the CT's values are 5000 to 5000, expected HU"):
        preprocess(read_cohort(cohort.root), tmp_path / "out", progress=False)
    about = {"labels": LABELS, "targets": {"ct": {"unit": ""}}}
    (cohort.root / "dataset.json").write_text(json.dumps(about))
    cache = preprocess(read_cohort(cohort.root), tmp_path / "out", progress=False)
    assert (cache.case("b").targets["ct"] == 5000).all()
    assert cache.targets["ct"].unit == ""


def test_foreground_is_any_label_map(tmp_path):
    """Case a: labels in slice 1 at one voxel, vessels in slice 3 at another; b has labels everywhere."""
    root = folders(tmp_path / "cohort")
    for target, place in (("labels", (1, 0, 5)), ("vessels", (3, 6, 0))):
        array = np.zeros(SHAPES["a"], np.float32)
        array[place] = 1
        volume(root / "a" / f"{target}.nii", array)
    cache = preprocess(read_cohort(root), tmp_path / "cache", progress=False)
    assert cache.cases["a"]["foreground_slices"] == [[1, 2], [3, 4]]
    batch = SliceSampler(cache, "train", 200, (2, 2), 0, foreground=1.0)[0]
    found = [
        (bool(batch["labels"][i].any()), bool(batch["vessels"][i].any()))
        for i, name in enumerate(batch["case"])
        if name == "a"
    ]
    assert set(found) == {(True, False), (False, True)}
    assert 0.3 < np.mean([labels for labels, _ in found]) < 0.7


def test_only_the_targets_that_are_named_are_read(tmp_path):
    cohort = read_cohort(folders(tmp_path))
    case = cohort.cases[0]
    case.targets["ct"].write_bytes(b"damaged")
    loaded = load_case(case, {"pet": cohort.targets["pet"]})
    assert list(loaded.targets) == ["pet"]
    with pytest.raises(InputError, match=r"case a: .*ct\.nii"):
        load_case(case, cohort.targets)


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({}, ""),
        ({"vessels": {"labels": {"background": 0, "artery": 1, "nerve": 2}}}, "ab"),
        ({"lesions": {"labels": {"background": 0, "lesion": 1}}}, "b"),
        ({"cbct": {"unit": ""}}, "a"),
        ({"tau": {}}, ""),
    ],
)
def test_another_declaration_redoes_the_cases_that_have_the_target(many, tmp_path, change, redone):
    before = {name: os.stat(many.path / name).st_ino for name in "abc"}
    root = tmp_path / "many"
    about = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**about, "targets": {**DECLARED, **change}}))
    with pytest.warns(UserWarning, match="target 'tau', expected its files") if "tau" in change else nullcontext():
        cohort = read_cohort(root)
    preprocess(cohort, many.path, progress=False)
    assert "".join(name for name in "abc" if os.stat(many.path / name).st_ino != before[name]) == redone


def test_a_target_of_skipped_cases_alone_is_not_there(tmp_path):
    root = folders(tmp_path / "cohort")
    volume(root / "b" / "mr_0.nii", np.ones(SHAPES["b"], np.float32))  # without contrast
    cache = preprocess(read_cohort(root), tmp_path / "cache", progress=False, on_bad_case="skip")
    assert "lesions" not in cache.targets
    assert "pet" in cache.targets


def test_gaps_in_labels_that_nobody_named_are_refused(tmp_path):
    root = folders(tmp_path / "cohort")
    volume(root / "b" / "lesions.nii", np.full(SHAPES["b"], 3, np.float32))
    with pytest.raises(InputError, match=r"the label files of 'lesions' hold the values \[3\], expected 0, 1, 2, .."):
        preprocess(read_cohort(root), tmp_path / "cache", progress=False)


def declared(**entries):
    return folders, {**DECLARED, **entries}


BAD = {
    "a list": (folders, ["pet"], r"dataset.json: targets are \['pet'\], expected an object"),
    "no object": (*declared(pet="SUV"), "dataset.json: target 'pet' is 'SUV', expected {} or"),
    "an unknown entry": (*declared(pet={"units": "SUV"}), "target 'pet' is {'units': 'SUV'}, expected"),
    "classes": (*declared(pet={"classes": ["a", "b"]}), "target 'pet' is {'classes': .*, expected"),
    "a unit that is none": (*declared(pet={"unit": 7}), "target 'pet': unit 7, expected a short text"),
    "labels and a unit": (*declared(vessels={"labels": LABELS, "unit": "HU"}), "has labels and a unit"),
    "labels with a gap": (
        *declared(vessels={"labels": {"background": 0, "a": 2}}),
        "'vessels': labels .* once each",
    ),
    "an organ overall": (
        *declared(vessels={"labels": {"background": 0, "overall": 1}}),
        "an organ is called 'overall'",
    ),
    "a name that is taken": (*declared(mask={}), "targets: 'mask' can't be the name of a target"),
    "a name with a dot": (*declared(**{"a.b": {}}), "'a.b' can't be the name of a target"),
    "capital letters": (*declared(CT={}), "target 'CT' differs from 'ct' in capital letters alone"),
    "labels twice": (*declared(labels={"labels": LABELS}), "target 'labels' is described, and names of labels"),
    "in nnU-Net's folder": (nnunet, {**DECLARED, "images": {}}, "target 'images', but imagesTr has another meaning"),
    "in targets.json": (table, {"pet": 3}, "targets.json: target 'pet' is 3"),
    "in a JSON list": (as_json, {"pet": 3}, "list.json: target 'pet' is 3"),
    "a column that is not declared": (
        table,
        {"pet": {}},
        "list.csv, line 2: unknown column 't2', expected case, mr .*, pet",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_declarations_are_refused(tmp_path, what):
    layout, targets, message = BAD[what]
    path = layout(tmp_path / "cohort", targets)
    with pytest.raises(InputError, match=message) as error:
        read_cohort(path)
    assert "\n" not in str(error.value)


def test_a_file_of_a_target_in_a_format_that_is_not_read_is_refused(tmp_path):
    root = folders(tmp_path)
    (root / "c" / "PET.dcm").write_bytes(b"x")
    with pytest.raises(InputError, match=r"PET.dcm: a format that isn't read"):
        read_cohort(root)


def test_files_that_are_nearly_called_targets_json_are_refused(tmp_path):
    path = table(tmp_path)
    (tmp_path / "targets.json").rename(tmp_path / "target.json")
    with pytest.raises(InputError, match=r"target\.json: nothing is read .* did you mean 'targets.json'"):
        read_cohort(path)


def of(cohort: Cohort, **targets: Target) -> Cohort:
    return dataclasses.replace(cohort, targets=targets)


def test_the_targets_of_a_run_are_those_of_a_cohort(cohort):
    ct, labels = cohort.targets["ct"], cohort.targets["labels"]
    other = Target("labels", "labels", names={"background": 0, "bladder": 1, "prostate": 2})
    unnamed = Target("labels", "labels", names={"background": 0, "label_1": 1, "label_2": 2})
    age, sex = Target("sex", "class", names={"male": 0, "female": 1}), Target("sex", "class", names={"male": 0})
    for run, theirs in (
        ({"ct": ct, "labels": labels}, {"ct": ct, "labels": labels}),
        ({"labels": unnamed}, {"labels": labels}),
        ({"labels": labels}, {"labels": unnamed}),
        ({"labels": labels}, {"labels": USUAL["labels"]}),
        ({"labels": labels}, {"ct": ct}),
        ({"ct": dataclasses.replace(ct, unit="")}, {"ct": ct}),
    ):
        check_same_targets(run, of(cohort, **theirs), "run")
    for run, theirs, message in (
        ({"labels": labels}, {"labels": other}, "^run: the run's labels are {.*, the cohort's {.*, expected the same$"),
        ({"ct": ct}, {"ct": dataclasses.replace(ct, unit="SUV")}, "the run's ct are in 'HU', the cohort's in 'SUV'"),
        ({"ct": ct}, {"ct": Target("ct", "labels")}, "the run's ct are intensities, the cohort's labels"),
        ({"sex": age}, {"sex": sex}, r"the run's sex are .*expected the same \(targets.json .* can name all classes\)"),
    ):
        with pytest.raises(InputError, match=message):
            check_same_targets(run, of(cohort, **theirs), "run")


def test_a_declared_target_that_no_case_has_is_told(tmp_path):
    cohort = write_cohort(tmp_path / "cohort")
    path = cohort.root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"targets": {"pet": {"unit": "SUV"}}}))
    with pytest.warns(UserWarning, match="no case has the declared target 'pet', expected its files"):
        assert "pet" not in read_cohort(cohort.root).targets
