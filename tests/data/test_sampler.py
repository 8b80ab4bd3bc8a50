"""Slice sampling, against the volumes themselves."""

import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

from sfg_fast.data import Grid, SliceSampler, preprocess, write_volume
from sfg_fast.data.cache import CaseArrays
from sfg_fast.errors import InputError

from .small_cohort import AFFINE, SHAPES, write_cohort


def test_examples_of_cases_without_a_target(tmp_path):
    cohort = write_cohort(tmp_path / "cohort", leave_out=[("b", "ct")])
    batch = SliceSampler(preprocess(cohort, tmp_path / "cache", progress=False), "train", 20, (3, 3), 0)[0]
    assert set(batch) == {"inputs", "mask", "case", "ct", "has_ct", "labels", "has_labels"}
    assert batch["has_ct"].tolist() == [name == "a" for name in batch["case"]]
    assert set(batch["case"]) == {"a", "b"}
    assert batch["has_labels"].all()
    assert (batch["ct"][~batch["has_ct"]] == -1024).all()
    none = write_cohort(tmp_path / "none", leave_out=[("a", "ct"), ("b", "ct")])
    batch = SliceSampler(preprocess(none, tmp_path / "cache2", progress=False), "train", 2, (3, 3), 0)[0]
    assert set(batch) == {"inputs", "mask", "case", "labels", "has_labels"}


def place_of(window: np.ndarray, volume: np.ndarray) -> tuple[int, int, int]:
    """Where in the volume [Z, Y, X] the window [H, W] comes from; the voxels are unique."""
    (found,) = np.argwhere(volume == window[0, 0])
    return tuple(found)


def test_patches_are_pieces_of_the_volumes(cache):
    sampler = SliceSampler(cache, "train", batch=64, patch=(3, 4), seed=1)
    batch = sampler[0]
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
        np.testing.assert_array_equal(batch["ct"][i, 0], case.targets["ct"][(z, *piece)])
        np.testing.assert_array_equal(batch["labels"][i], case.targets["labels"][(z, *piece)])
        np.testing.assert_array_equal(batch["mask"][i, 0], case.mask[(z, *piece)])
    for name, found in places.items():  # every slice, row and column start comes up
        for axis, size in enumerate((SHAPES[name][0], SHAPES[name][1] - 2, SHAPES[name][2] - 3)):
            assert {place[axis] for place in found} == set(range(size))


def test_bias_field_multiplies_the_scanner_s_values_smoothly(cache):
    plain, biased = (SliceSampler(cache, "train", 1, (3, 4), 1, bias) for bias in (0.0, 0.3))
    planes = []
    for step in range(60):
        a, b = plain[step], biased[step]
        entry = cache.cases[a["case"][0]]["mr_foreground"]
        mean, sd = (np.array([one[key] for one in entry])[:, None, None] for key in ("mean", "sd"))
        raw, field = (mean + sd * batch["inputs"][0].numpy().astype(np.float64) for batch in (a, b))
        large = np.abs(raw) > 0.1 * np.abs(raw).max()
        logs = np.log(np.where(large, field / np.where(large, raw, 1), 1))
        y, x = np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 4), indexing="ij")
        design = np.stack([np.ones(12), y.ravel(), x.ravel()], 1)
        seen = large.any(0).ravel()
        logs = (logs.sum(0) / large.sum(0).clip(1)).ravel()  # one field for all channels
        plane, *_ = np.linalg.lstsq(design[seen], logs[seen], rcond=None)
        np.testing.assert_allclose(design[seen] @ plane, logs[seen], atol=1e-3)
        planes.append(plane)
        for key in ("ct", "labels", "mask"):
            assert torch.equal(a[key], b[key])
    np.testing.assert_allclose(np.std(planes, axis=0), 0.3, atol=0.12)


def test_small_slices_are_centred_and_padded(cache):
    """Case b, 5 x 9, in windows of 8 x 8: one row above, two below; a crop across."""
    batch = SliceSampler(cache, "train", batch=16, patch=(8, 8), seed=0)[3]
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
    np.testing.assert_array_equal(batch["ct"][i], np.pad(case.targets["ct"][piece], wide, constant_values=-1024))
    np.testing.assert_array_equal(batch["labels"][i], np.pad(case.targets["labels"][piece], wide)[0])
    np.testing.assert_array_equal(batch["mask"][i], np.pad(case.mask[piece], wide))


def test_whole_slices(cache):
    sampler = SliceSampler(cache, "test", batch=8, patch=None, seed=0)
    assert len(sampler) == 2
    batch = sampler[0]
    assert batch["inputs"].shape == (8, 2, 7, 6)
    inputs = cache.case("c").inputs
    which = [int(np.flatnonzero((inputs == one).all(axis=(1, 2, 3)))[0]) for one in batch["inputs"].numpy()]
    assert set(which) == {0, 1}


def test_batches_depend_on_seed_and_step_alone(cache):
    def pieces(seed, step, batch=4):
        return SliceSampler(cache, "train", batch, (4, 4), seed)[step]

    used = SliceSampler(cache, "train", 4, (4, 4), 7)
    for step in (0, 5, 2):
        used[step]
    fresh, again = pieces(7, 9), used[9]
    assert fresh["case"] == again["case"]
    for key in ("inputs", "ct", "labels", "mask"):
        assert torch.equal(fresh[key], again[key])
    for other in (pieces(7, 10), pieces(8, 9), pieces(8, 8)):
        assert not torch.equal(fresh["inputs"], other["inputs"])


def test_every_epoch_has_every_case_once_in_a_new_order(cache):
    names = SliceSampler(cache, "train", 400, (3, 3), 0)[0]["case"]
    epochs = [tuple(names[i : i + 2]) for i in range(0, 400, 2)]
    assert set(epochs) == {("a", "b"), ("b", "a")}
    assert 60 < epochs.count(("a", "b")) < 140  # 5 standard deviations


@pytest.mark.parametrize("patch", [(3, 3), (8, 8)])
def test_processes_share_the_batches_of_one(cache, patch):
    options = (cache, "train")
    whole = SliceSampler(*options, 6, patch, 5, 0.1, 0.5)
    parts = [SliceSampler(*options, 2, patch, 5, 0.1, 0.5, rank=rank, ranks=3) for rank in range(3)]
    for step in (0, 7):
        batches = [part[step] for part in parts]
        assert [name for batch in batches for name in batch["case"]] == whole[step]["case"]
        for key in ("inputs", "ct", "labels", "mask"):
            assert torch.equal(torch.cat([batch[key] for batch in batches]), whole[step][key])


def test_few_cases_are_open_at_a_time(cache, monkeypatch):
    """What a process holds is what it was asked for: arrays of the batch, and the maps of a few cases."""
    monkeypatch.setattr(SliceSampler, "open_at_a_time", 1)
    opened, case = [], cache.case
    monkeypatch.setattr(cache, "case", lambda name: opened.append(weakref.ref(found := case(name))) or found)
    sampler = SliceSampler(cache, "train", 4, (3, 3), 0, 0.1, 0.5)
    sampler[0]
    gc.collect()
    assert len(opened) >= 3
    assert sum(reference() is not None for reference in opened) == 1


def test_workers_get_the_same_batches(cache):
    sampler = SliceSampler(cache, "train", 2, (3, 3), 0, 0.1, 0.5)
    copied = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(copied[3]["inputs"], sampler[3]["inputs"])


def rare(tmp_path):
    """Case a: labels in slice 2 alone, and there in one corner."""
    cohort = write_cohort(tmp_path / "rare")
    z, y, x = SHAPES["a"]
    labels = np.zeros((z, y, x), np.uint8)
    labels[2, 0, 5] = 1
    write_volume(cohort.root / "a" / "labels.nii", labels, Grid(AFFINE, (x, y, z)), np.uint8)
    return preprocess(cohort, tmp_path / "rare_cache", progress=False)


@pytest.mark.parametrize(("patch", "by_chance"), [((3, 3), 1 / 4 / 5 / 4), ((7, 6), 1 / 4)])
def test_a_share_of_the_examples_shows_foreground(tmp_path, patch, by_chance):
    cache = rare(tmp_path)
    for share in (0.0, 0.5, 1.0):
        batch = SliceSampler(cache, "train", 1000, patch, 0, foreground=share)[0]
        seen = np.array([bool(labels.any()) for labels in batch["labels"]])[np.array(batch["case"]) == "a"]
        expected = share + (1 - share) * by_chance
        assert abs(seen.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(seen)) + 1e-9


def test_windows_around_foreground_are_everywhere_around_it(tmp_path):
    """The corner voxel (0, 5) of 7 x 6 is in windows of 3 x 3 at one place only; in case b labels are everywhere."""
    cache = rare(tmp_path)
    batch = SliceSampler(cache, "train", 200, (3, 3), 0, foreground=1.0)[0]
    places = {"a": set(), "b": set()}
    for inputs, name in zip(batch["inputs"], batch["case"], strict=True):
        places[name].add(place_of(inputs[0].numpy(), cache.case(name).inputs[:, 0]))
    assert places["a"] == {(2, 0, 3)}
    assert {place[1:] for place in places["b"]} == {(y, x) for y in range(3) for x in range(7)}


def test_a_batch_is_a_copy(cache):
    batch = SliceSampler(cache, "test", 1, None, 0)[0]
    batch["inputs"].zero_()
    assert cache.case("c").inputs.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("val", 1, (3, 3), 0), "no case in split val"),
        (("all", 1, (3, 3), 0), "unknown split 'all'"),
        (("train", 0, (3, 3), 0), "batch 0, .*expected batch and patch >= 1, seed >= 0"),
        (("train", 1, (3, 0), 0), r"patch \(3, 0\), .*expected"),
        (("train", 1, (3, 3), -1), "seed -1, .*expected"),
        (("train", 1, None, 0), r"slices of a are \(7, 6\), of b \(5, 9\); train on patches"),
    ],
)
def test_bad_sampling_is_refused(cache, arguments, message):
    with pytest.raises(InputError, match=message):
        SliceSampler(cache, *arguments)


# --- 3-D patches ------------------------------------------------------------------------------------------------------


def test_3d_patches_are_pieces_of_the_volumes(cache):
    batch = SliceSampler(cache, "train", batch=200, patch=(2, 3, 4), seed=1)[0]
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items() if key != "case"} == {
        "inputs": ((200, 2, 2, 3, 4), torch.float32),
        "ct": ((200, 1, 2, 3, 4), torch.float32),
        "labels": ((200, 2, 3, 4), torch.int64),
        "mask": ((200, 1, 2, 3, 4), torch.bool),
        "has_ct": ((200,), torch.bool),
        "has_labels": ((200,), torch.bool),
    }
    places = {"a": set(), "b": set()}
    for i, name in enumerate(batch["case"]):
        case = cache.case(name)
        z, y, x = place_of(batch["inputs"][i, 0, 0].numpy(), case.inputs[:, 0])
        places[name].add((z, y, x))
        piece = (slice(z, z + 2), slice(y, y + 3), slice(x, x + 4))
        for channel in (0, 1):
            np.testing.assert_array_equal(batch["inputs"][i, channel], case.inputs[:, channel][piece])
        np.testing.assert_array_equal(batch["ct"][i, 0], case.targets["ct"][piece])
        np.testing.assert_array_equal(batch["labels"][i], case.targets["labels"][piece])
        np.testing.assert_array_equal(batch["mask"][i, 0], case.mask[piece])
    for name, found in places.items():  # every start along every axis comes up
        for axis, (size, length) in enumerate(zip(SHAPES[name], (2, 3, 4), strict=True)):
            assert {place[axis] for place in found} == set(range(size - length + 1))


def test_small_volumes_are_centred_and_padded(cache):
    """Case b, 3 x 5 x 9, in patches of 6 x 5 x 4: a slice below, two above; a crop across."""
    batch = SliceSampler(cache, "train", batch=16, patch=(6, 5, 4), seed=0)[3]
    i, case = batch["case"].index("b"), cache.case("b")
    window = batch["inputs"][i].numpy()
    _, _, x = place_of(window[0, 1], case.inputs[:, 0])
    wide, piece = ((1, 2), (0, 0), (0, 0)), (..., slice(x, x + 4))
    for channel in (0, 1):
        volume = case.inputs[:, channel]
        expected = np.pad(volume[piece], wide, constant_values=volume.min())  # of the whole volume, not of the crop
        np.testing.assert_array_equal(window[channel], expected)
    ct = np.pad(case.targets["ct"][piece], wide, constant_values=-1024)
    np.testing.assert_array_equal(batch["ct"][i, 0], ct)
    np.testing.assert_array_equal(batch["labels"][i], np.pad(case.targets["labels"][piece], wide))
    np.testing.assert_array_equal(batch["mask"][i, 0], np.pad(case.mask[piece], wide))


def test_the_bias_field_of_a_3d_patch_has_a_slope_along_each_axis(cache):
    plain, biased = (SliceSampler(cache, "train", 1, (2, 3, 4), 1, bias) for bias in (0.0, 0.3))
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in (2, 3, 4)), indexing="ij")
    design = np.stack([np.ones(24), *(axis.ravel() for axis in axes)], 1)
    planes = []
    for step in range(60):
        a, b = plain[step], biased[step]
        one = cache.cases[a["case"][0]]["mr_foreground"][0]
        raw, field = (one["mean"] + one["sd"] * batch["inputs"][0, 0].double().numpy().ravel() for batch in (a, b))
        seen = np.abs(raw) > 0.1 * np.abs(raw).max()
        logs = np.log(field[seen] / raw[seen])
        plane, *_ = np.linalg.lstsq(design[seen], logs, rcond=None)
        np.testing.assert_allclose(design[seen] @ plane, logs, atol=1e-3)
        planes.append(plane)
        assert torch.equal(a["ct"], b["ct"])
    np.testing.assert_allclose(np.std(planes, axis=0), 0.3, atol=0.12)


def test_a_share_of_the_3d_patches_shows_foreground(tmp_path):
    """The voxel (2, 0, 5) of 4 x 7 x 6 is in windows at two of three depths, one of five rows, one of four columns."""
    cache = rare(tmp_path)
    for share in (0.0, 0.5, 1.0):
        batch = SliceSampler(cache, "train", 1000, (2, 3, 3), 0, foreground=share)[0]
        ours = np.array(batch["case"]) == "a"
        seen = batch["labels"].flatten(1).any(1).numpy()[ours]
        expected = share + (1 - share) * 2 / 3 / 5 / 4
        assert abs(seen.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / len(seen)) + 1e-9
    places = {place_of(one[0, 0].numpy(), cache.case("a").inputs[:, 0]) for one in batch["inputs"][ours]}
    assert places == {(1, 0, 3), (2, 0, 3)}


class Watched:
    """An array that writes down how many values are taken of it."""

    def __init__(self, array, taken):
        self.array, self.taken, self.shape = array, taken, array.shape

    def __getitem__(self, place):
        self.taken.append(self.array[place].size)
        return self.array[place]


def test_nothing_is_read_beside_the_patch_and_a_slice_of_labels(cache, monkeypatch):
    taken, case = {name: [] for name in ("inputs", "mask", "ct", "labels")}, cache.case

    def watched(name):
        found = case(name)
        targets = {key: Watched(array, taken[key]) for key, array in found.targets.items()}
        return CaseArrays(Watched(found.inputs, taken["inputs"]), targets, Watched(found.mask, taken["mask"]))

    monkeypatch.setattr(cache, "case", watched)
    SliceSampler(cache, "train", 1, (2, 3, 3), 0, foreground=1.0)[0]
    assert taken["inputs"] == [2 * 2 * 3 * 3]
    assert taken["mask"] == taken["ct"] == [2 * 3 * 3]
    assert taken["labels"] in ([7 * 6, 2 * 3 * 3], [5 * 9, 2 * 3 * 3])


def test_3d_patches_of_processes_and_workers_are_those_of_one(cache):
    whole = SliceSampler(cache, "train", 6, (4, 3, 3), 5, 0.1, 0.5)
    parts = [SliceSampler(cache, "train", 2, (4, 3, 3), 5, 0.1, 0.5, rank=rank, ranks=3) for rank in range(3)]
    whole[0]
    parts = pickle.loads(pickle.dumps(parts))
    for key in ("inputs", "ct", "labels", "mask"):
        assert torch.equal(torch.cat([part[7][key] for part in parts]), whole[7][key])
    assert len(whole) == 7  # slices, as N of eq. 2 in two dimensions
