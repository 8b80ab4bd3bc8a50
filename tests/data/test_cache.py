"""Preprocessing and slice sampling, against plain numpy on volumes whose every voxel is known."""

import json
import mmap

import numpy as np
import pytest

from sfg_fast.data import Cache, preprocess
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
        np.testing.assert_array_equal(case.ct, raw["ct"])
        np.testing.assert_array_equal(case.labels, raw["labels"])
        np.testing.assert_array_equal(case.mask, raw["mask"] > 0)
        types = [array.dtype.name for array in (case.inputs, case.ct, case.labels, case.mask)]
        assert types == ["float32", "float32", "uint8", "bool"]
        grid = Grid.from_json(cache.cases[name]["grid"])
        assert grid.shape == shape[::-1]
        np.testing.assert_array_equal(grid.affine, AFFINE)
        for array in (case.inputs, case.ct, case.labels, case.mask):
            assert isinstance(origin(array), mmap.mmap)
            assert not array.flags.writeable


def test_manifest(cache):
    assert (cache.label_names, cache.in_channels) == (LABELS, 2)
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
    np.testing.assert_allclose(cache.class_frequencies(), counts / counts.sum())
    means = {name: arrays(name)["ct"][arrays(name)["mask"] > 0].mean() for name in "abc"}
    np.testing.assert_allclose(cache.mean_ct(), (means["a"] + means["b"]) / 2)
    np.testing.assert_allclose(cache.mean_ct("test"), means["c"])
    assert cache.rejected == {}


def test_mr_only(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", "c", [("c", kind) for kind in ("ct", "labels", "mask")])
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    assert cache.label_names == {}
    for statistic, message in ((cache.mean_ct, "no case of split test has a CT"), (cache.class_frequencies, "labels")):
        with pytest.raises(InputError, match=message):
            statistic("test")


BAD_MANIFESTS = {
    "not JSON": ("{", "not readable as JSON"),
    "a list": ("[]", "version None, expected 3; preprocess"),
    "version": ('{"version": 0}', "version 0, expected 3; preprocess"),
    "cut": ('{"version": 3}', "not a valid manifest .'label_names'.; preprocess"),
    "cases a list": (
        '{"version": 3, "label_names": {}, "channel_names": [], "rejected": {}, "cases": []}',
        "not a valid manifest",
    ),
    "case cut": (
        '{"version": 3, "label_names": {}, "channel_names": [], "rejected": {}, "cases": {"a": {"split": "train"}}}',
        "not a valid manifest",
    ),
    "case escapes": (
        '{"version": 3, "label_names": {}, "channel_names": [], "rejected": {}, "cases": {"../a": {"split": "train"}}}',
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
    "targets": [["mr"], ["ct", "ct"], ["ct"], 7],
    "mr_foreground": [[], [{"mean": 1}], [{"mean": 1, "sd": 0}] * 2, [{"mean": "x", "sd": 1}] * 2],
    "ct_body_mean": [None, "x", float("nan")],
    "label_voxels": [None, [1], [1, 2, -3], [1, 2, "x"]],
    "foreground_slices": [[[0, 9]], [[2, 2]], [3], "x"],
    "grid": [{}, {"affine": [[0] * 4] * 4, "shape": [6, 7, 4]}, None],
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
    np.testing.assert_array_equal(other.case("c").ct, cache.case("c").ct)
