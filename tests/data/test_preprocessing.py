"""Preprocessing: what it writes, what it keeps, and what it refuses."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from sfg_fast.data import (
    Cache,
    Case,
    Cohort,
    Grid,
    body_mask,
    make_case,
    normalise,
    preprocess,
    preprocessing,
    read_cohort,
    write_volume,
)
from sfg_fast.data.cohort import USUAL
from sfg_fast.data.notes import told
from sfg_fast.errors import InputError
from sfg_fast.files import locked

from .small_cohort import AFFINE, LABELS, SHAPES, arrays, spoil, write_cohort


def test_preprocess_twice_gives_the_same_bytes(tmp_path, cohort, cache):
    preprocess(cohort, tmp_path / "again", progress=False)
    files = [path.relative_to(cache.path) for path in cache.path.rglob("*") if path.is_file()]
    assert len(files) == 17
    for file in files:
        assert (cache.path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def unnamed(cohort):
    return dataclasses.replace(cohort, targets=USUAL)


def test_unnamed_labels_get_names(tmp_path, cohort):
    cache = preprocess(unnamed(cohort), tmp_path / "cache", progress=False)
    assert cache.targets["labels"].names == {"background": 0, "label_1": 1, "label_2": 2}
    assert len(cache.described()["labels"].statistics["frequencies"]) == 3


def test_where_the_mask_comes_from(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", leave_out=[("a", "mask"), ("b", "mask"), ("b", "ct"), ("b", "labels")])
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(cache.case("a").mask, body_mask(arrays("a")["ct"]))
    assert cache.case("b").mask.all()
    assert [cache.cases[name]["mask_from"] for name in "abc"] == ["ct", "volume", "file"]
    assert cache.case("b").targets == {}
    assert (cache.has("ct"), cache.has("ct", "test"), cache.has("labels", "val")) == (True, True, False)


def test_body_mask_is_the_largest_part_with_its_gas_and_without_the_table():
    ct = np.full((3, 20, 20), -1000.0)
    body = np.zeros(ct.shape, bool)
    body[:, 5:15, 4:16] = True
    ct[body] = 40
    ct[:, 1, 2:18] = 200  # the table
    ct[1, 8:11, 8:11] = -900  # gas
    ct[2, 5:9, 8] = -900  # gas open to the air: no hole
    body[2, 5:9, 8] = False
    np.testing.assert_array_equal(body_mask(ct), body)
    assert body_mask(ct, threshold_hu=100).sum() == 3 * 16
    with pytest.raises(InputError, match=r"no voxel above 300 HU \(its maximum is 200\)"):
        body_mask(ct, threshold_hu=300)


@pytest.mark.parametrize("image", [np.full((3, 3, 3), 5.0), np.eye(3)[None] * 2])
def test_images_without_contrast_are_refused(image):
    good = np.random.default_rng(0).normal(size=image.shape)
    with pytest.raises(InputError, match="MR channel 1 is constant in its foreground"):
        normalise(np.stack([good, image]))


def test_normalise_is_blind_to_gain_and_offset():
    image = np.random.default_rng(0).gamma(2, 1, (2, 3, 4, 5)).astype(np.float32)
    moved = image * np.array([1000, 0.01], np.float32).reshape(2, 1, 1, 1) + 7
    z = normalise(image)
    assert z.dtype == np.float32
    np.testing.assert_allclose(normalise(moved), z, atol=1e-3)
    for raw, channel in zip(image, z, strict=True):
        bright = channel[raw > raw.mean()]
        np.testing.assert_allclose([bright.mean(), bright.std()], [0, 1], atol=1e-5)


def all_background(cohort):
    for name in "abc":
        spoil(cohort, "labels", 0, name)
    return cohort


def unnamed_gap(cohort):
    spoil(cohort, "labels", 200)
    return unnamed(cohort)


def no_body(cohort):
    spoil(cohort, "ct", -1000)
    return dataclasses.replace(cohort, cases=tuple(dataclasses.replace(case, mask=None) for case in cohort.cases))


BAD_COHORTS = {
    "first case": (lambda c: spoil(c, "mr_1", 5, "a"), "case a .*: MR channel 1 is constant"),
    "constant MR": (lambda c: spoil(c, "mr_1", 5), "case b .*: MR channel 1 is constant"),
    "unknown label": (lambda c: spoil(c, "labels", 3), "case b: .*labels.nii holds label value 3"),
    "no body": (no_body, "case b .*: the CT's values are .* expected HU"),
    "all background": (all_background, "the labels of every case are all background"),
    "gap": (unnamed_gap, r"hold the values \[0, 1, 2, 200\], expected 0, 1, 2, .. without gaps"),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("what", BAD_COHORTS)
def test_bad_cohorts_are_refused(tmp_path, cohort, what, there):
    make, message = BAD_COHORTS[what]
    bad, out = make(cohort), tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(InputError, match=message) as error:
        preprocess(bad, out, progress=False)
    assert "\n" not in str(error.value)
    assert not (out / "manifest.json").exists()
    if what == "first case":
        assert out.exists() == there
        assert not there or not any(out.iterdir())


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def watched(monkeypatch, act=lambda case: None):
    """The names of the cases that are read from now on."""
    seen = []

    def load(case, targets):
        act(case)
        seen.append(case.name)
        return load_case(case, targets)

    load_case = preprocessing.load_case
    monkeypatch.setattr(preprocessing, "load_case", load)
    return seen


@pytest.mark.parametrize("stop_at", ["a", "c"])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, cohort, cache, monkeypatch, stop_at):
    out = tmp_path / "out"

    def interrupt(case):
        if case.name == stop_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        watched(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            preprocess(cohort, out, progress=False)
    if stop_at == "a":
        assert not out.exists()
    else:
        assert sorted(p.name for p in out.iterdir()) == ["a", "b", "preprocess.json"]
        with pytest.raises(InputError, match=r"it has no manifest\.json"):
            Cache(out)
    seen = watched(monkeypatch)
    preprocess(cohort, out, progress=False)
    assert seen == list("abc"["abc".index(stop_at) :])
    assert everything(out) == everything(cache.path)


def touch(cohort, cache):
    os.utime(cohort.root / "a" / "ct.nii", (1, 1))


def change_a_voxel(cohort, cache):
    path = cohort.root / "a" / "ct.nii"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_names(cohort, cache):
    text = (cohort.root / "dataset.json").read_text()
    (cohort.root / "dataset.json").write_text(text.replace("bladder", "rectum"))


def other_split(cohort, cache):
    (cohort.root / "dataset.json").write_text(
        json.dumps({"labels": LABELS, "split": {"train": ["b"], "val": ["a", "c"]}})
    )


def lost_mask(cohort, cache):
    (cohort.root / "b" / "mask.nii").unlink()


def damaged_array(cohort, cache):
    with (cache.path / "c" / "ct.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")


def cut_entry(cohort, cache):
    (cache.path / "c" / "case.json").write_text("{")


def lost_array(cohort, cache):
    (cache.path / "c" / "mask.npy").unlink()


def left_over(cohort, cache):
    (cache.path / ".partial-1-a").mkdir()
    (cache.path / ".partial-1-a" / "ct.npy").write_bytes(b"half")


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda cohort, cache: None, ""),
        (touch, ""),
        (other_split, ""),
        (left_over, ""),
        (change_a_voxel, "a"),
        (lost_mask, "b"),
        (damaged_array, "c"),
        (cut_entry, "c"),
        (lost_array, "c"),
        (other_names, "abc"),
    ],
)
def test_only_what_changed_is_redone(tmp_path, cohort, cache, monkeypatch, change, redone):
    change(cohort, cache)
    seen = watched(monkeypatch)
    again = preprocess(read_cohort(cohort.root), cache.path, progress=False)
    assert "".join(seen) == redone
    monkeypatch.undo()
    fresh = preprocess(read_cohort(cohort.root), tmp_path / "fresh", progress=False)
    assert everything(again.path) == everything(fresh.path)


def test_a_case_that_left_the_cohort_leaves_the_cache(tmp_path, cohort, cache):
    without = dataclasses.replace(cohort, cases=cohort.cases[1:])
    assert set(preprocess(without, cache.path, progress=False).cases) == {"b", "c"}
    assert not (cache.path / "a").exists()


def test_while_a_case_is_replaced_there_is_no_manifest(cohort, cache, monkeypatch):
    change_a_voxel(cohort, cache)
    lost_mask(cohort, cache)

    def killed(case):
        if case.name == "b":
            raise KeyboardInterrupt

    watched(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        preprocess(read_cohort(cohort.root), cache.path, progress=False)
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Cache(cache.path)


def test_bad_cases_are_skipped_and_told(tmp_path, cohort, monkeypatch):
    spoil(cohort, "mr_1", 5)
    cache = preprocess(cohort, tmp_path / "out", progress=False, on_bad_case="skip")
    assert set(cache.cases) == {"a", "c"}
    assert list(cache.rejected) == ["b"]
    assert "MR channel 1 is constant" in cache.rejected["b"]
    spoil(cohort, "mr_1", 5, "a")  # was good, and is there
    assert set(preprocess(cohort, tmp_path / "out", progress=False, on_bad_case="skip").cases) == {"c"}
    assert not (tmp_path / "out" / "a").exists()
    spoil(cohort, "mr_1", 5, "c")
    with pytest.raises(InputError, match=r"no case can be used; the first: case a .*MR channel 1 is constant"):
        preprocess(cohort, tmp_path / "out", progress=False, on_bad_case="skip")


def test_a_bad_case_stops_and_what_is_complete_stays(tmp_path, cohort):
    spoil(cohort, "mr_1", 5)
    with pytest.raises(InputError, match="case b"):
        preprocess(cohort, tmp_path / "out", progress=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "preprocess.json"]


@pytest.mark.parametrize(("options", "said"), [({"on_bad_case": "ignore"}, "='ignore'"), ({"processes": 0}, "=0")])
def test_options_that_can_not_be(tmp_path, cohort, options, said):
    with pytest.raises(InputError, match=said):
        preprocess(cohort, tmp_path / "out", **options)


def test_processes_write_the_same_bytes(tmp_path, cohort, cache):
    spoil(cohort, "labels", 77, "a")
    with pytest.raises(InputError, match=r"case a: .*77"):
        preprocess(cohort, tmp_path / "out", progress=False, processes=2)
    shutil.rmtree(cohort.root)
    preprocess(write_cohort(cohort.root), tmp_path / "out", progress=False, processes=2)
    assert everything(tmp_path / "out") == everything(cache.path)


def test_a_disk_that_is_too_full_is_refused_before_it_starts(tmp_path, cohort, monkeypatch, capsys):
    voxels = {name: np.prod(shape) for name, shape in SHAPES.items()}
    needed = int(sum(voxels.values())) * (2 * 4 + 4 + 1 + 1)
    for free in (needed - 1, needed):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(preprocessing.shutil, "disk_usage", lambda path, usage=usage: usage)
        if free < needed:
            with pytest.raises(InputError, match=r"5.29 KiB are needed for 3 cases, but only 5.29 KiB are free"):
                preprocess(cohort, tmp_path / "out")
            assert not (tmp_path / "out").exists()
        else:
            preprocess(cohort, tmp_path / "out")
    assert "3 of 3 cases to write, 5.29 KiB" in capsys.readouterr().err
    written = sum(len(content) - 128 for path, content in everything(tmp_path / "out").items() if path.suffix == ".npy")
    assert written == needed  # but for numpy's headers


def test_few_processes_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(preprocessing.os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 340}.get)
    assert preprocessing._that_fit_in_memory(5000 * 34) == 2
    assert preprocessing._that_fit_in_memory(5001 * 34) == 1
    assert preprocessing._that_fit_in_memory(5000000 * 34) == 1


def test_folders_of_something_else_are_refused(tmp_path, cohort, cache):
    other = write_cohort(tmp_path / "other")
    before = everything(cache.path)
    with pytest.raises(InputError, match=r"already there, with preprocess.json saying .*name a new folder"):
        preprocess(other, cache.path, progress=False)
    assert everything(cache.path) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="already there and not an empty folder"):
        preprocess(cohort, tmp_path / "full", progress=False)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_two_at_once_are_refused(tmp_path, cohort, cache):
    with locked(cache.path / "preprocess.json"), pytest.raises(InputError, match="another process is writing to it"):
        preprocess(cohort, cache.path, progress=False)


def test_cts_are_clipped_to_what_is_scored(tmp_path):
    """Outside the field of view, and in metal, a CT holds anything."""
    cohort = write_cohort(tmp_path / "cohort")
    ct = arrays("b")["ct"].astype(np.float32)
    ct[0, 0, :2] = -32768, 30000
    z, y, x = ct.shape
    write_volume(cohort.root / "b" / "ct.nii", ct, Grid(AFFINE, (x, y, z)), np.float32)
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(cache.case("b").targets["ct"], ct.clip(-1024, 3000))
    inside = cache.case("b").targets["ct"][cache.case("b").mask]
    assert cache.cases["b"]["targets"]["ct"]["mean"] == pytest.approx(inside.mean())


def unscaled(padding):
    """A CT as stored, 0 .. 4095, with what the scanner puts outside its field of view."""
    ct = np.clip(arrays("b")["ct"].astype(np.float32) + 1024, 0, 4095)
    ct[0, 0] = padding
    return ct


def with_file(cohort, kind, array, case="b"):
    z, y, x = array.shape
    write_volume(cohort.root / case / f"{kind}.nii", array, Grid(AFFINE, (x, y, z)), np.float32)
    return cohort


def test_padding_does_not_make_hounsfield_units(tmp_path, cohort):
    with pytest.raises(InputError, match=r"values are \d+ to \d+ \(but for padding below -1024\), expected HU"):
        preprocess(with_file(cohort, "ct", unscaled(-2000)), tmp_path / "out", progress=False)


def test_a_ct_of_nothing_but_padding_is_refused(tmp_path, cohort):
    with pytest.raises(InputError, match=r"values are nan to nan .*expected HU"):
        preprocess(spoil(cohort, "ct", -2000), tmp_path / "out", progress=False)


def body(value):
    """A CT with air around a body of one value and two odd voxels, and its mask."""
    ct = np.full(SHAPES["b"], -1000, np.float32)
    ct[1:] = value
    ct[1, 0, :2] = -300, 1500
    return ct, (ct > -999).astype(np.float32)


@pytest.mark.parametrize(("value", "told"), [(40, False), (-450, False), (290, False), (1064, True), (-700, True)])
def test_a_ct_that_is_hardly_hu_is_told(tmp_path, cohort, value, told):
    ct, mask = body(value)
    cache = preprocess(with_file(with_file(cohort, "ct", ct), "mask", mask), tmp_path / "out", progress=False)
    texts = [note["text"] for note in cache.cases["b"]["notes"] if note["kind"] == "ct"]
    assert bool(texts) == told
    if told:
        assert f"ct.nii): the CT's median in the body is {value}, expected -500 to 300 of HU" in texts[0]


def bright(values):
    """An MR of 4096 voxels, some of them these."""
    mr = np.random.default_rng(0).gamma(2, 100, (16, 16, 16)).astype(np.float32)
    mr.ravel()[: len(values)] = values
    return mr


@pytest.mark.parametrize("values", [(1e6, 1e6 + 9), (1e6, 2e6), (1e6,), (1e5, 1e5, 3e5, 2e5)])
def test_an_mr_that_a_few_voxels_squash_is_refused(values):
    with pytest.raises(InputError, match=r"MR channel 0 (has a few voxels so bright \(up to|is constant)"):
        normalise(bright(values)[None])


def test_an_mr_that_a_few_voxels_scale_is_told(tmp_path, cohort):
    affine = Grid(AFFINE, (16, 16, 16))
    for values, expected in (((), []), ((1500,), []), ((3e4, 2e4), ["mr"])):
        write_volume(tmp_path / "mr.nii", bright(values), affine, np.float32)
        case = Case("x", (tmp_path / "mr.nii",), {}, None, "train")
        cache = preprocess(Cohort(tmp_path, (case,), {}, ("MR",)), tmp_path / f"out_{len(values)}", progress=False)
        assert [note["kind"] for note in cache.cases["x"]["notes"]] == expected
    assert f"case x ({tmp_path / 'mr.nii'}): a few voxels, up to 30000, decide" in cache.cases["x"]["notes"][0]["text"]


@pytest.mark.parametrize(
    ("share", "value", "said"),
    [
        (0, -1e9, "has voxels .* SDs from the mean of its foreground .-1e.09 to "),
        (0, -3e38, "has voxels .* SDs from the mean of its foreground .-3e.38 to "),
        (0, 3e38, "is constant in its foreground .1 of 4096 voxels are 3e.38, the lowest is "),
        (0.01, 1e9, "is constant in its foreground .40 of 4096 voxels are 1e.09"),
        (0.01, None, "has a few voxels so bright .up to 1e.09"),
    ],
)
def test_an_mr_with_voxels_that_are_none_is_refused(share, value, said):
    count = max(1, int(share * 4096))
    with pytest.raises(InputError, match="MR channel 0 " + said):
        normalise(bright(np.linspace(5e8, 1e9, count) if value is None else [value] * count)[None])


@pytest.mark.parametrize(
    ("share", "value", "said"),
    [
        (0.002, 32767, "a few voxels, up to 32767, decide how the MR is scaled"),
        (0.01, 32767, "a few voxels, up to 32767, decide how the MR is scaled"),
        (0.01, -32768, "the MR has voxels .* SDs from the mean of its foreground .-32768 to "),
        (0.3, -32768, "the MR has voxels .* SDs from the mean of its foreground .-32768 to "),
    ],
)
def test_an_mr_with_voxels_that_are_none_is_told(tmp_path, share, value, said):
    (text,) = notes_of(tmp_path, bright([value] * int(share * 4096)))
    assert re.search(said, text)


def test_an_mr_that_turned_negative_at_16_bits_is_told(tmp_path):
    mr = bright([])
    wrapped = (mr * (40_000 / mr.max())).astype(np.int64).astype(np.int16)
    (text,) = notes_of(tmp_path, wrapped)
    assert "the MR reaches both ends of 16 bits (-3" in text
    assert not notes_of(tmp_path, (mr * (32_000 / mr.max())).astype(np.int16))


def notes_of(folder, mr):
    """What is told of a case of this MR alone."""
    write_volume(folder / "mr.nii", mr, Grid(AFFINE, mr.shape[::-1]), mr.dtype)
    case = Case("x", (folder / "mr.nii",), {}, None, "train")
    out = Path(tempfile.mkdtemp(dir=folder))
    cache = preprocess(Cohort(folder, (case,), {}, ("MR",)), out, progress=False)
    return [note["text"] for note in cache.cases["x"]["notes"]]


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_of_a_phantom_nothing_is_told(tmp_path, difficulty):
    for index in range(3):
        assert not notes_of(tmp_path, make_case((0, index), 32, 8, difficulty).mr)


def test_a_body_that_fills_the_whole_volume_is_told(tmp_path, cohort):
    (cohort.root / "b" / "mask.nii").unlink()
    ct = np.full(SHAPES["b"], 100, np.float32)
    ct[1, 1, :2] = -300, 1500  # of something that is no HU
    found = read_cohort(with_file(cohort, "ct", ct).root)
    texts = [one["text"] for one in preprocess(found, tmp_path / "out", progress=False).cases["b"]["notes"]]
    assert [text for text in texts if "the body fills the whole volume (100%), expected air around it" in text]
    ct[:, 0] = -1000
    found = read_cohort(with_file(cohort, "ct", ct).root)
    assert not preprocess(found, tmp_path / "air", progress=False).cases["b"]["notes"]


def test_notes_of_all_files_are_in_the_manifest_and_told(tmp_path, cohort, recwarn):
    for name in "abc":
        for kind in ("mr_0", "ct", "labels"):
            path = cohort.root / name / f"{kind}.nii"
            image = nib.load(path)
            image.set_qform(image.affine + np.outer([0, 0, 9, 0], [0, 0, 0, 1]), 1)
            nib.save(nib.Nifti1Image(np.array(image.dataobj), None, image.header), path)
    cache = preprocess(cohort, tmp_path / "out", progress=False)
    assert not [one for one in recwarn if "qform" in str(one.message)]  # told once, from the manifest
    for name in "abc":
        texts = [note["text"] for note in cache.cases[name]["notes"] if note["kind"] == "forms"]
        files = [str(cohort.root / name / f"{kind}.nii") for kind in ("mr_0", "ct", "labels")]
        assert [text.partition(":")[0] for text in texts] == files
    lines = [line for line in told(cache.cases) if "form" in line]
    assert len(lines) == 6
    assert lines[0].startswith(f"note: {cohort.root / 'a' / 'mr_0.nii'}: qform and sform lie 9 mm apart")
    assert lines[5] == "note: .. and 4 more of this kind ('forms') in the manifest"


def test_voxels_beside_a_header_are_content_too(tmp_path, cohort):
    path = tmp_path / "mr.mhd"
    case = Case("x", (path,), {}, None, "train")
    found = []
    for seed in (0, 0, 1):
        voxels = np.random.default_rng(seed).gamma(2, 100, (4, 5, 6)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
        cache = preprocess(Cohort(tmp_path, (case,), {}, ("MR",)), tmp_path / "out", progress=False)
        found.append((cache.cases["x"]["source"], float(cache.case("x").inputs.max())))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1]
