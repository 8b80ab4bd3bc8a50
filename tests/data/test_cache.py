"""Preprocessing and slice sampling, against plain numpy on volumes whose every voxel is known."""

import json
import os

import numpy as np
import pytest
import torch

from sfg_fast.data import (
    Cache,
    Case,
    Cohort,
    Grid,
    SliceSampler,
    body_mask,
    normalise,
    preprocess,
    read_cohort,
    write_volume,
)
from sfg_fast.data import cache as cache_module
from sfg_fast.errors import InputError

LABELS = {"background": 0, "prostate": 1, "bladder": 2}
SHAPES = {"a": (4, 7, 6), "b": (3, 5, 9), "c": (2, 7, 6)}  # Z, Y, X
AFFINE = np.diag([-2.0, -3, 4, 1])  # stored LPS


def arrays(name: str) -> dict[str, np.ndarray]:
    """Random volumes of a case: two MR channels, CT, labels, mask."""
    rng = np.random.default_rng(ord(name))
    shape = SHAPES[name]
    return {
        "mr_0": rng.gamma(2, 100, shape).astype(np.float32),
        "mr_1": rng.normal(50, 3, shape).astype(np.float32),
        "ct": rng.integers(-1000, 2000, shape).astype(np.int16),
        "labels": rng.integers(0, 3, shape).astype(np.uint8),
        "mask": rng.integers(0, 2, shape).astype(np.uint8),
    }


def write_cohort(root, names="abc", leave_out=()) -> Cohort:
    """Cases in folders; c is the test split. leave_out: pairs (case, file)."""
    for name in names:
        (root / name).mkdir(parents=True)
        for kind, array in arrays(name).items():
            if (name, kind) not in leave_out:
                z, y, x = array.shape
                write_volume(root / name / f"{kind}.nii", array, Grid(AFFINE, (x, y, z)), array.dtype)
    split = {"train": [name for name in names if name != "c"], "test": [name for name in names if name == "c"]}
    (root / "dataset.json").write_text(json.dumps({"labels": LABELS, "split": split}))
    return read_cohort(root)


@pytest.fixture
def cohort(tmp_path) -> Cohort:
    return write_cohort(tmp_path / "cohort")


@pytest.fixture
def cache(tmp_path, cohort) -> Cache:
    return preprocess(cohort, tmp_path / "cache", progress=False)


def expected_inputs(name: str) -> np.ndarray:
    """[Z, C, Y, X] by the definition: z-score over the voxels above the mean."""
    channels = []
    for kind in ("mr_0", "mr_1"):
        voxels = arrays(name)[kind].astype(np.float64)
        bright = voxels[voxels > voxels.mean()]
        channels.append((voxels - bright.mean()) / bright.std())
    return np.stack(channels, axis=1)


def test_normalise_is_blind_to_gain_and_offset():
    image = np.random.default_rng(0).gamma(2, 1, (2, 3, 4, 5)).astype(np.float32)
    moved = image * np.array([1000, 0.01], np.float32).reshape(2, 1, 1, 1) + 7
    z = normalise(image)
    assert z.dtype == np.float32
    np.testing.assert_allclose(normalise(moved), z, atol=1e-3)
    for raw, channel in zip(image, z, strict=True):
        bright = channel[raw > raw.mean()]
        np.testing.assert_allclose([bright.mean(), bright.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize("image", [np.full((3, 3, 3), 5.0), np.eye(3)[None] * 2])
def test_images_without_contrast_are_refused(image):
    good = np.random.default_rng(0).normal(size=image.shape)
    with pytest.raises(InputError, match="MR channel 1 is constant in its foreground"):
        normalise(np.stack([good, image]))


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


def test_preprocess_writes_what_was_read(cache):
    for name, shape in SHAPES.items():
        case, raw = cache.case(name), arrays(name)
        np.testing.assert_allclose(case.inputs, expected_inputs(name), atol=1e-4)
        np.testing.assert_array_equal(case.ct, raw["ct"])
        np.testing.assert_array_equal(case.labels, raw["labels"])
        np.testing.assert_array_equal(case.mask, raw["mask"] > 0)
        types = [array.dtype.name for array in (case.inputs, case.ct, case.labels, case.mask)]
        assert types == ["float32", "float32", "uint8", "bool"]
        assert case.grid.shape == shape[::-1]
        np.testing.assert_array_equal(case.grid.affine, AFFINE)
        for array in (case.inputs, case.ct, case.labels, case.mask):
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable


def test_manifest(cache):
    assert (cache.label_names, cache.in_channels) == (LABELS, 2)
    assert (cache.names("train"), cache.names("val"), cache.names("test")) == (["a", "b"], [], ["c"])
    assert (cache.has("ct"), cache.has("labels"), cache.has("ct", "val"), cache.has("mr")) == (True, True, False, False)
    with pytest.raises(InputError, match="unknown split 'all'"):
        cache.names("all")
    entry = cache.manifest["cases"]["b"]
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
    assert json.loads(json.dumps(cache.manifest)) == cache.manifest


def test_where_the_mask_comes_from(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", leave_out=[("a", "mask"), ("b", "mask"), ("b", "ct"), ("b", "labels")])
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(cache.case("a").mask, body_mask(arrays("a")["ct"]))
    assert cache.case("b").mask.all()
    assert [cache.manifest["cases"][name]["mask_from"] for name in "abc"] == ["ct", "volume", "file"]
    assert (cache.case("b").ct, cache.case("b").labels) == (None, None)
    assert (cache.has("ct"), cache.has("ct", "test"), cache.has("labels", "val")) == (True, True, False)


def test_examples_of_cases_without_a_target(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", leave_out=[("b", "ct")])
    batch = SliceSampler(preprocess(cohort, tmp_path / "cache", progress=False), "train", 20, (3, 3), 0).batch(0)
    assert set(batch) == {"inputs", "mask", "case", "ct", "has_ct", "labels", "has_labels"}
    assert batch["has_ct"].tolist() == [name == "a" for name in batch["case"]]
    assert set(batch["case"]) == {"a", "b"}
    assert batch["has_labels"].all()
    assert (batch["ct"][~batch["has_ct"]] == -1024).all()
    none = write_cohort(tmp_path / "none", leave_out=[("a", "ct"), ("b", "ct")])
    batch = SliceSampler(preprocess(none, tmp_path / "cache2", progress=False), "train", 2, (3, 3), 0).batch(0)
    assert set(batch) == {"inputs", "mask", "case", "labels", "has_labels"}


def test_unnamed_labels_get_names(tmp_path, cohort):
    unnamed = Cohort(cohort.root, cohort.cases, {}, cohort.channel_names)
    cache = preprocess(unnamed, tmp_path / "cache", progress=False)
    assert cache.label_names == {"background": 0, "label_1": 1, "label_2": 2}
    assert len(cache.class_frequencies()) == 3


def test_mr_only(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", "c", [("c", kind) for kind in ("ct", "labels", "mask")])
    cache = preprocess(cohort, tmp_path / "cache", progress=False)
    assert cache.label_names == {}
    for statistic, message in ((cache.mean_ct, "no case of split test has a CT"), (cache.class_frequencies, "labels")):
        with pytest.raises(InputError, match=message):
            statistic("test")


def test_preprocess_twice_gives_the_same_bytes(tmp_path, cohort, cache):
    preprocess(cohort, tmp_path / "again", progress=False)
    files = [path.relative_to(cache.path) for path in cache.path.rglob("*") if path.is_file()]
    assert len(files) == 13
    for file in files:
        assert (cache.path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def spoil(cohort: Cohort, file: str, value, case="b") -> Cohort:
    z, y, x = SHAPES[case]
    write_volume(cohort.root / case / f"{file}.nii", np.full((z, y, x), value), Grid(AFFINE, (x, y, z)), np.float32)
    return cohort


def all_background(cohort):
    for name in "abc":
        spoil(cohort, "labels", 0, name)
    return cohort


def unnamed_gap(cohort):
    spoil(cohort, "labels", 200)
    return Cohort(cohort.root, cohort.cases, {}, cohort.channel_names)


def no_body(cohort):
    spoil(cohort, "ct", -1000)
    return Cohort(
        cohort.root,
        tuple(Case(c.name, c.inputs, c.ct, c.labels, None, c.split) for c in cohort.cases),
        cohort.label_names,
        cohort.channel_names,
    )


BAD_COHORTS = {
    "constant MR": (lambda c: spoil(c, "mr_1", 5), "case b .*: MR channel 1 is constant"),
    "unknown label": (lambda c: spoil(c, "labels", 3), "case b: .*labels.nii holds label value 3"),
    "no body": (no_body, "case b .*: the CT has no voxel above -500 HU"),
    "all background": (all_background, "the labels of every case are all background"),
    "gap": (unnamed_gap, r"hold the values \[0, 1, 2, 200\], expected 0, 1, 2, .. without gaps"),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("what", BAD_COHORTS)
def test_a_bad_cohort_leaves_nothing(tmp_path, cohort, what, there):
    make, message = BAD_COHORTS[what]
    bad, out = make(cohort), tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(InputError, match=message) as error:
        preprocess(bad, out, progress=False)
    assert "\n" not in str(error.value)
    assert out.exists() == there
    assert not there or not any(out.iterdir())


def test_an_interrupted_preprocess_leaves_nothing(tmp_path, cohort, monkeypatch):
    seen = []

    def interrupted(case, label_names):
        seen.append(sorted(os.listdir(tmp_path / "out")))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return load_case(case, label_names)

    load_case = cache_module.load_case
    monkeypatch.setattr(cache_module, "load_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(cohort, tmp_path / "out", progress=False)
    assert seen == [[], ["a"], ["a", "b"]]  # each case at once, the manifest last
    assert not (tmp_path / "out").exists()


def test_preprocess_refuses_a_full_folder(cohort, cache):
    before = (cache.path / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="already there and not an empty folder"):
        preprocess(cohort, cache.path, progress=False)
    assert (cache.path / "manifest.json").read_bytes() == before


BAD_MANIFESTS = {
    "not JSON": ("{", "not readable as JSON"),
    "a list": ("[]", "version None, expected 1; preprocess"),
    "version": ('{"version": 0}', "version 0, expected 1; preprocess"),
    "cut": ('{"version": 1}', "not a valid manifest .'label_names'.; preprocess"),
    "cases a list": ('{"version": 1, "label_names": {}, "channel_names": [], "cases": []}', "not a valid manifest"),
    "case cut": (
        '{"version": 1, "label_names": {}, "channel_names": [], "cases": {"a": {"split": "train"}}}',
        "not a valid manifest",
    ),
    "case escapes": (
        '{"version": 1, "label_names": {}, "channel_names": [], "cases": {"../a": {"split": "train"}}}',
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


def place_of(window: np.ndarray, volume: np.ndarray) -> tuple[int, int, int]:
    """Where in the volume [Z, Y, X] the window [H, W] comes from; the voxels are unique."""
    (found,) = np.argwhere(volume == window[0, 0])
    return tuple(found)


def test_patches_are_pieces_of_the_volumes(cache):
    sampler = SliceSampler(cache, "train", batch=64, patch=(3, 4), seed=1)
    batch = sampler.batch(0)
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items() if key != "case"} == {
        "inputs": ((64, 2, 3, 4), torch.float32),
        "ct": ((64, 1, 3, 4), torch.float32),
        "labels": ((64, 3, 4), torch.int64),
        "mask": ((64, 1, 3, 4), torch.bool),
        "has_ct": ((64,), torch.bool),
        "has_labels": ((64,), torch.bool),
    }
    places = {"a": set(), "b": set()}
    for i, name in enumerate(batch["case"]):
        case = cache.case(name)
        z, y, x = place_of(batch["inputs"][i, 0].numpy(), case.inputs[:, 0])
        places[name].add((z, y, x))
        piece = (slice(y, y + 3), slice(x, x + 4))
        np.testing.assert_array_equal(batch["inputs"][i], case.inputs[(z, slice(None), *piece)])
        np.testing.assert_array_equal(batch["ct"][i, 0], case.ct[(z, *piece)])
        np.testing.assert_array_equal(batch["labels"][i], case.labels[(z, *piece)])
        np.testing.assert_array_equal(batch["mask"][i, 0], case.mask[(z, *piece)])
    for name, found in places.items():  # every slice, row and column start comes up
        for axis, size in enumerate((SHAPES[name][0], SHAPES[name][1] - 2, SHAPES[name][2] - 3)):
            assert {place[axis] for place in found} == set(range(size))


def test_bias_field_multiplies_the_scanner_s_values_smoothly(cache):
    plain, biased = (SliceSampler(cache, "train", 1, (3, 4), 1, bias) for bias in (0.0, 0.3))
    planes = []
    for step in range(60):
        a, b = plain.batch(step), biased.batch(step)
        entry = cache.manifest["cases"][a["case"][0]]["mr_foreground"]
        mean, sd = (np.array([one[key] for one in entry])[:, None, None] for key in ("mean", "sd"))
        raw, field = (mean + sd * batch["inputs"][0].numpy().astype(np.float64) for batch in (a, b))
        large = np.abs(raw) > 0.1 * np.abs(raw).max()
        ratio = np.where(large, field / np.where(large, raw, 1), np.nan)
        y, x = np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 4), indexing="ij")
        design = np.stack([np.ones(12), y.ravel(), x.ravel()], 1)
        logs = np.nanmean(np.log(ratio), 0).ravel()  # one field for all channels
        seen = np.isfinite(logs)
        plane, *_ = np.linalg.lstsq(design[seen], logs[seen], rcond=None)
        np.testing.assert_allclose(design[seen] @ plane, logs[seen], atol=1e-3)
        planes.append(plane)
        for key in ("ct", "labels", "mask"):
            assert torch.equal(a[key], b[key])
    np.testing.assert_allclose(np.std(planes, axis=0), 0.3, atol=0.12)


def test_small_slices_are_centred_and_padded(cache):
    """Case b, 5 x 9, in windows of 8 x 8: one row above, two below; a crop across."""
    batch = SliceSampler(cache, "train", batch=16, patch=(8, 8), seed=0).batch(3)
    i = batch["case"].index("b")
    case = cache.case("b")
    window = batch["inputs"][i].numpy()
    z, y, x = place_of(window[0, 1:], case.inputs[:, 0])
    assert y == 0
    assert x in (0, 1)
    wide = ((0, 0), (1, 2), (0, 0))
    piece = (slice(z, z + 1), slice(None), slice(x, x + 8))
    np.testing.assert_array_equal(window[:, 1:6], case.inputs[z, :, :, x : x + 8])
    for channel in (0, 1):
        assert (window[channel, [0, 6, 7]] == case.inputs[z, channel].min()).all()
    np.testing.assert_array_equal(batch["ct"][i], np.pad(case.ct[piece], wide, constant_values=-1024))
    np.testing.assert_array_equal(batch["labels"][i], np.pad(case.labels[piece], wide)[0])
    np.testing.assert_array_equal(batch["mask"][i], np.pad(case.mask[piece], wide))


def test_whole_slices(cache):
    sampler = SliceSampler(cache, "test", batch=8, patch=None, seed=0)
    assert len(sampler) == 2
    batch = sampler.batch(0)
    assert batch["inputs"].shape == (8, 2, 7, 6)
    inputs = cache.case("c").inputs
    which = [int(np.flatnonzero((inputs == one).all(axis=(1, 2, 3)))[0]) for one in batch["inputs"].numpy()]
    assert set(which) == {0, 1}


def test_batches_depend_on_seed_and_step_alone(cache):
    def pieces(seed, step, batch=4):
        return SliceSampler(cache, "train", batch, (4, 4), seed).batch(step)

    used = SliceSampler(cache, "train", 4, (4, 4), 7)
    for step in (0, 5, 2):
        used.batch(step)
    fresh, again = pieces(7, 9), used.batch(9)
    assert fresh["case"] == again["case"]
    for key in ("inputs", "ct", "labels", "mask"):
        assert torch.equal(fresh[key], again[key])
    for other in (pieces(7, 10), pieces(8, 9), pieces(8, 8)):
        assert not torch.equal(fresh["inputs"], other["inputs"])


def test_cases_come_up_equally_whatever_their_length(cache):
    names = SliceSampler(cache, "train", 400, (3, 3), 0).batch(0)["case"]
    assert abs(names.count("a") - 200) < 50  # 5 standard deviations; by slices it would be 229


def test_a_batch_is_a_copy(cache):
    batch = SliceSampler(cache, "test", 1, None, 0).batch(0)
    batch["inputs"].zero_()
    assert cache.case("c").inputs.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("val", 1, (3, 3), 0), "no case in split val"),
        (("all", 1, (3, 3), 0), "unknown split 'all'"),
        (("train", 0, (3, 3), 0), "batch 0, .*expected batch and patch >= 1, seed >= 0"),
        (("train", 1, (3, 0), 0), r"patch \(3, 0\), .*expected"),
        (("train", 1, (3, 3), -1), "seed -1: expected"),
        (("train", 1, None, 0), r"slices of a are \(7, 6\), of b \(5, 9\); train on patches"),
    ],
)
def test_bad_sampling_is_refused(cache, arguments, message):
    with pytest.raises(InputError, match=message):
        SliceSampler(cache, *arguments)
