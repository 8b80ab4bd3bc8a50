"""Preprocessing and slice sampling, against plain numpy on volumes whose every voxel is known."""

import json
import mmap
import os
import pickle
import shutil

import numpy as np
import pytest

from sfg_fast.data import Cache, SliceSampler, preprocess
from sfg_fast.data import cache as cache_module
from sfg_fast.data.volumes import Grid
from sfg_fast.errors import InputError

from .small_cohort import AFFINE, LABELS, SHAPES, arrays, write_cohort


def expected_inputs(name: str) -> np.ndarray:
    """[Z, C, Y, X] by the definition: z-score over the voxels above the mean."""
    channels = []
    for kind in ("mr_0", "mr_1"):
        voxels = arrays(name)[kind].astype(np.float64)
        bright = voxels[voxels > voxels.mean()]
        channels.append((voxels - bright.mean()) / bright.std())
    return np.stack(channels, axis=1)


def origin(array: np.ndarray) -> object:
    """What owns the memory of an array."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) else base


def test_preprocess_writes_what_was_read(cache):
    for name, shape in SHAPES.items():
        case, raw = cache.case(name), arrays(name)
        np.testing.assert_allclose(case.inputs, expected_inputs(name), atol=1e-4)
        np.testing.assert_array_equal(case.targets["ct"], raw["ct"])
        np.testing.assert_array_equal(case.targets["labels"], raw["labels"])
        np.testing.assert_array_equal(case.mask, raw["mask"] > 0)
        types = [array.dtype.name for array in (case.inputs, *case.targets.values(), case.mask)]
        assert types == ["float32", "float32", "uint8", "bool"]
        grid = Grid.from_json(cache.cases[name]["grid"])
        assert grid.shape == shape[::-1]
        np.testing.assert_array_equal(grid.affine, AFFINE)
        for array in (case.inputs, *case.targets.values(), case.mask):
            assert isinstance(origin(array), mmap.mmap)
            assert not array.flags.writeable


def test_manifest(cache):
    assert (cache.targets["labels"].names, cache.in_channels, cache.images) == (LABELS, 2, None)
    assert {name: (one.kind, one.unit) for name, one in cache.targets.items()} == {
        "ct": ("intensities", "HU"),
        "labels": ("labels", ""),
    }
    assert (cache.names("train"), cache.names("val"), cache.names("test")) == (["a", "b"], [], ["c"])
    assert (cache.has("ct"), cache.has("labels"), cache.has("ct", "val"), cache.has("mr")) == (True, True, False, False)
    with pytest.raises(InputError, match="unknown split 'all'"):
        cache.names("all")
    entry = cache.cases["b"]
    assert (entry["shape"], entry["spacing"], entry["mask_from"]) == ([3, 5, 9], [4, 3, 2], "file")
    raw = arrays("b")
    bright = raw["mr_0"][raw["mr_0"] > raw["mr_0"].mean()]
    np.testing.assert_allclose(
        [entry["mr_foreground"][0]["mean"], entry["mr_foreground"][0]["sd"]], [bright.mean(), bright.std()], rtol=1e-5
    )
    counts = sum(np.bincount(arrays(name)["labels"].ravel()) for name in "ab")
    described = cache.described()
    np.testing.assert_allclose(described["labels"].statistics["frequencies"], counts / counts.sum())
    inside = {name: arrays(name)["ct"][arrays(name)["mask"] > 0] for name in "abc"}
    assert described["ct"].statistics == {
        "mean": pytest.approx((inside["a"].mean() + inside["b"].mean()) / 2),
        "sd": pytest.approx((inside["a"].std() + inside["b"].std()) / 2),
    }
    assert cache.described("test")["ct"].statistics["mean"] == pytest.approx(inside["c"].mean())
    assert cache.described("val") == {}
    assert (cache.count(), cache.count("train"), cache.count("test", "ct"), cache.count("val", "ct")) == (3, 2, 1, 0)
    assert cache.rejected == {}


def test_mr_only(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", "c", [("c", kind) for kind in ("ct", "labels", "mask")])
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    assert cache.targets == cache.described("test") == {}


EMPTY = '{"version": 5, "targets": {}, "images": null, "channel_names": [], "rejected": {}, '
BAD_MANIFESTS = {
    "not JSON": ("{", "not readable as JSON"),
    "a list": ("[]", "version None, expected 5; preprocess"),
    "version": ('{"version": 0}', "version 0, expected 5; preprocess"),
    "cut": ('{"version": 5}', "not a valid manifest .'targets'.; preprocess"),
    "cases a list": (
        EMPTY + '"cases": []}',
        "not a valid manifest",
    ),
    "case cut": (
        EMPTY + '"cases": {"a": {"split": "train"}}}',
        "not a valid manifest",
    ),
    "case escapes": (
        EMPTY + '"cases": {"../a": {"split": "train"}}}',
        "case name '../a' can't be a folder name",
    ),
}


@pytest.mark.parametrize("what", BAD_MANIFESTS)
def test_bad_manifests_are_refused(tmp_path, what):
    content, message = BAD_MANIFESTS[what]
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        Cache(tmp_path)
    assert "manifest.json" in str(error.value)


def test_no_manifest(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"not a preprocessed cohort, it has no manifest\.json"):
            Cache(path)


def test_damaged_arrays_are_refused(cache):
    with pytest.raises(InputError, match="no case 'd'"):
        cache.case("d")
    np.save(cache.path / "a" / "ct.npy", np.zeros((4, 7, 5), np.float32))
    with pytest.raises(InputError, match=r"ct.npy: float32 \(4, 7, 5\), but the manifest says float32 \(4, 7, 6\)"):
        cache.case("a")
    np.save(cache.path / "a" / "ct.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"ct.npy: can't be read"):
        cache.case("a")
    (cache.path / "b" / "mask.npy").unlink()
    with pytest.raises(InputError, match=r"mask.npy: can't be read"):
        cache.case("b")


ENTRIES = {
    "shape": [[4, 7], [4, 7, 0], [4, 7, 6.0], [4, 7, 5], [2**20, 2**20, 2**20], "abc", None],
    "split": ["all", None, [1]],
    "targets": [
        {"mr": {}},
        ["ct"],
        7,
        {"ct": {"mean": 0.0, "sd": 1.0}},
        {"ct": {"mean": 0.0, "sd": -1.0}, "labels": {"counts": [1, 2, 3]}},
        {"ct": {"mean": float("nan"), "sd": 1.0}, "labels": {"counts": [1, 2, 3]}},
        {"ct": {"mean": 0.0}, "labels": {"counts": [1, 2, 3]}},
        *({"labels": {"counts": counts}} for counts in (None, [1], [1, 2, -3], [1, 2, "x"])),
    ],
    "mr_foreground": [[], [{"mean": 1}], [{"mean": 1, "sd": 0}] * 2, [{"mean": "x", "sd": 1}] * 2],
    "foreground_slices": [None, [[0, 9]], [[2, 2]], [3], "x"],
    "grid": [{}, {"affine": [[0] * 4] * 4, "shape": [6, 7, 4]}, None],
    "notes": [None, {}, ["x"], [{"kind": "ct"}], [{"kind": "ct", "text": 1}]],
    "colour": ["green"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ENTRIES.items() for value in values])
def test_manifests_that_preprocess_never_wrote(cache, key, value):
    path = cache.path / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cases"]["a"][key] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: ") as error:
        Cache(cache.path)
    assert "\n" not in str(error.value)


def test_a_zip_of_arrays_is_no_array(cache):
    with (cache.path / "a" / "ct.npy").open("wb") as file:
        np.savez(file, ct=np.zeros((4, 7, 6), np.float32))
    with pytest.raises(InputError, match=r"ct.npy: can't be read"):
        cache.case("a")


def test_other_splits(cache):
    other = cache.with_splits({"train": ["c"], "val": ["a"]})
    assert (other.names("train"), other.names("val"), other.names("test")) == (["c"], ["a"], [])
    assert cache.names("train") == ["a", "b"]
    np.testing.assert_array_equal(other.case("c").inputs, cache.case("c").inputs)


# --- arrays that change while they are used ---------------------------------------------------------------------------


def replaced_file(folder):
    """Another file of the same name, as a copy does; size and time may well be the same."""
    status = (folder / "ct.npy").stat()
    shutil.copy2(folder / "ct.npy", folder / "new.npy")
    os.replace(folder / "new.npy", folder / "ct.npy")
    os.utime(folder / "ct.npy", ns=(status.st_atime_ns, status.st_mtime_ns))


def written_in_place(folder):
    with (folder / "mask.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")


def appended(folder):
    status = (folder / "labels.npy").stat()
    with (folder / "labels.npy").open("ab") as file:
        file.write(b"x")
    os.utime(folder / "labels.npy", ns=(status.st_atime_ns, status.st_mtime_ns))


def replaced_folder(folder):
    """What `preprocess` does."""
    shutil.copytree(folder, folder.with_name("new"))
    shutil.rmtree(folder)
    os.replace(folder.with_name("new"), folder)


CHANGES = {
    "file replaced": replaced_file,
    "written in place": written_in_place,
    "appended": appended,
    "folder replaced": replaced_folder,
    "file removed": lambda folder: (folder / "inputs.npy").unlink(),
    "folder removed": shutil.rmtree,
}
CHANGED = "the arrays of case a have changed since they were opened, .*preprocess the cohort again and train anew"


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("worker", [False, True])
def test_arrays_that_change_under_a_training_end_it(cache, what, worker):
    for file in (cache.path / "a").iterdir():
        os.utime(file, ns=(0, 1000))  # so that no clock is too coarse for the test
    sampler = SliceSampler(cache, "train", 2, (3, 3), 0)
    sampler[0]
    sampler[1]
    if worker:  # what a worker process gets
        sampler = pickle.loads(pickle.dumps(sampler))
    CHANGES[what](cache.path / "a")
    said = "/a.*: can't be read .*; preprocess the cohort" if worker and "removed" in what else CHANGED
    with pytest.raises(InputError, match=said):
        list(map(sampler.__getitem__, range(4)))
    SliceSampler(cache, "test", 1, (3, 3), 0)[0]  # other cases are as they were


def test_opened_again_it_must_be_the_same(cache):
    cache.case("a")
    cache.case("a")
    replaced_folder(cache.path / "a")
    with pytest.raises(InputError, match=CHANGED):
        cache.with_splits({"train": ["a"]}).case("a")
    assert Cache(cache.path).case("a").targets


def test_a_case_of_other_files_than_the_manifest_says_is_refused(cohort, cache):
    """A second `preprocess` replaced it, before this process came to open it."""
    old = Cache(cache.path)
    preprocess(write_cohort_again(cohort), cache.path, progress=False)
    with pytest.raises(
        InputError, match=r"a/case\.json: the case was written again from other files than the manifest"
    ):
        old.case("a")
    assert old.case("b").targets
    assert Cache(cache.path).case("a").targets


def write_cohort_again(cohort):
    """One voxel of case a is another."""
    path = cohort.root / "a" / "ct.nii"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return cohort


def test_all_arrays_of_a_case_are_of_one_version(cache, monkeypatch):
    """While the case is being opened, another takes its folder's place."""
    other = cache.path.parent / "other"
    shutil.copytree(cache.path / "a", other)
    np.save(other / "ct.npy", np.full(SHAPES["a"], 7, np.float32))
    np.save(other / "labels.npy", np.full(SHAPES["a"], 1, np.uint8))
    before, opened = cache.case("a").targets["ct"].copy(), cache_module._open

    def swapped(file, *rest):
        found = opened(file, *rest)
        if other.exists():
            (cache.path / "a").rename(cache.path.parent / "old")
            other.rename(cache.path / "a")
        return found

    monkeypatch.setattr(cache_module, "_open", swapped)
    np.testing.assert_array_equal(Cache(cache.path).case("a").targets["ct"], before)


def test_a_case_without_its_own_entry_is_refused(cache):
    for content in (None, "{", "[]", "{}"):
        path = cache.path / "a" / "case.json"
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=r"case\.json: can't be read .*; preprocess the cohort again"):
            cache.case("a")


def test_nothing_stays_open(cache):
    """Of an opened case only the maps: no descriptor, also where it is refused."""
    before = set(os.listdir("/proc/self/fd"))
    cache.case("a")
    np.save(cache.path / "b" / "ct.npy", np.zeros(3))
    with pytest.raises(InputError, match="manifest says"):
        cache.case("b")
    assert set(os.listdir("/proc/self/fd")) == before
