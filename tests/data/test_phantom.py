"""The synthetic pelvis: anatomy in the right places, honest images, files that make a cohort."""

import hashlib
import itertools
import json

import nibabel as nib
import numpy as np
import pytest

from sfg_fast.data import body_mask, load_case, make_case, read_cohort, write_phantom
from sfg_fast.data.phantom import LABELS
from sfg_fast.errors import InputError

SEEDS = range(4)


@pytest.fixture(scope="module")
def cases():
    return [make_case(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "cohort"
    write_phantom(root, cases=3, test=1, size=32, slices=8, seed=5, progress=False)
    return root


def test_arrays(cases):
    for case in cases:
        arrays = (case.mr, case.ct, case.labels, case.mask)
        assert [array.dtype.name for array in arrays] == ["float32", "float32", "uint8", "bool"]
        assert {array.shape for array in arrays} == {(16, 48, 48)}
        assert (case.mr > 0).all()
        assert np.isfinite(case.mr).all()
        assert -1024 <= case.ct.min() < -950
        assert 700 < case.ct.max() < 1500


@pytest.mark.parametrize(("size", "slices"), [(24, 4), (40, 7)])
def test_every_organ_is_in_every_case_at_any_size(size, slices):
    for seed in range(8):
        counts = np.bincount(make_case(seed, size, slices).labels.ravel(), minlength=6)
        assert (counts > 0).all(), (seed, counts)


def test_organs_lie_where_they_belong(cases):
    """Centres along Superior, Anterior, Right."""
    for case in cases:
        centre = {name: np.argwhere(case.labels == value).mean(axis=0) for name, value in LABELS.items()}
        assert centre["left_femoral_head"][2] + 15 < centre["right_femoral_head"][2]
        assert centre["left_femoral_head"][2] < centre["prostate"][2] < centre["right_femoral_head"][2]
        assert centre["bladder"][0] > centre["prostate"][0] + 2
        assert centre["rectum"][1] + 2 < centre["prostate"][1]
        assert case.mask[case.labels > 0].all()


def test_left_and_right_in_the_world_of_the_files(written):
    """NIfTI's world: +x is the patient's right, whatever the order of the array."""
    for folder in written.glob("phantom_*"):
        image = nib.load(folder / "labels.nii.gz")
        labels = np.asarray(image.dataobj)
        for name, side in (("left_femoral_head", -1), ("right_femoral_head", 1)):
            index = np.argwhere(labels == LABELS[name]).mean(axis=0)
            x, _, _ = nib.affines.apply_affine(image.affine, index)
            assert 60 < side * x < 150


def test_bone_and_gas_look_alike_in_the_mr_only():
    dark = {"bone": [], "gas": []}
    for seed in range(8):
        case = make_case(seed, size=96, slices=6)
        muscle_mr = np.median(case.mr[case.mask & (case.ct > 20) & (case.ct < 80)])
        for name, which in (("bone", case.ct > 700), ("gas", case.mask & (case.labels == 3) & (case.ct < -600))):
            if which.sum() > 10:
                dark[name].append(np.median(case.mr[which]) / muscle_mr)
    assert len(dark["bone"]) >= 6
    assert len(dark["gas"]) >= 3
    for values in dark.values():
        assert 0.1 < np.mean(values) < 0.6


def test_the_mask_is_the_body_of_the_ct(cases):
    for case in cases:
        found = body_mask(case.ct)
        assert 2 * (found & case.mask).sum() / (found.sum() + case.mask.sum()) > 0.97
        assert 0.3 < case.mask.mean() < 0.65


def test_noise_is_rician_in_the_air(cases):
    """Magnitude noise: the mean of the air is sqrt(pi/2) sigma, its SD sqrt(2 - pi/2) sigma."""
    for case in cases:
        air = case.mr[:, :4, :4]
        np.testing.assert_allclose(air.mean() / air.std(), np.sqrt(np.pi / (4 - np.pi)), rtol=0.15)


def test_cases_differ_and_repeat(cases):
    again = make_case(SEEDS[0])
    for kind in ("mr", "ct", "labels", "mask"):
        assert np.array_equal(getattr(cases[0], kind), getattr(again, kind))
        assert not np.array_equal(getattr(cases[0], kind), getattr(cases[1], kind))
    overlap = [(a.labels == b.labels)[(a.labels > 0) | (b.labels > 0)].mean() for a, b in itertools.pairwise(cases)]
    assert max(overlap) < 0.8  # knowing one patient doesn't solve the next


def test_anatomy_does_not_depend_on_the_grid():
    coarse, fine = make_case(3, 40, 8), make_case(3, 80, 16)
    shares = [np.bincount(case.labels.ravel(), minlength=6) / case.labels.size for case in (coarse, fine)]
    np.testing.assert_allclose(shares[0], shares[1], rtol=0.2)


@pytest.mark.parametrize(("seed", "size", "slices"), [(0, 48, 16), ((5, 1), 24, 4)])
def test_difficulty_adds_to_the_same_patient(seed, size, slices):
    """0 is the easy phantom to the bit: nothing more is drawn for it. At 1 it is the same patient, bent."""
    easy, hard = make_case(seed, size, slices), make_case(seed, size, slices, difficulty=1)
    again = make_case(seed, size, slices, difficulty=0)
    for kind in ("mr", "ct", "labels", "mask"):
        assert np.array_equal(getattr(easy, kind), getattr(again, kind))
        assert not np.array_equal(getattr(easy, kind), getattr(hard, kind))
    assert (hard.mask & easy.mask).sum() / (hard.mask | easy.mask).sum() > 0.75


def test_easy_phantom_is_what_it_was():
    digest = hashlib.sha256()
    for seed, size, slices in ((0, 48, 16), ((5, 1), 32, 8)):
        case = make_case(seed, size, slices)
        for kind in ("ct", "labels", "mask"):
            digest.update(np.rint(getattr(case, kind)).astype(np.int16).tobytes())
    assert digest.hexdigest() == "00498c49ed4ea6274adb1f86c3b7d587a58437e877fe4bb7386839b9482ce0cc"


def test_difficulty_brings_what_only_its_place_tells_apart():
    """The more difficult, the less of the CT the MR's intensity alone explains."""
    explained = {}
    for difficulty in (0, 0.5, 1):
        cases = [make_case(seed, difficulty=difficulty) for seed in range(6)]
        mr, ct = (np.concatenate([getattr(case, kind)[case.mask] for case in cases]) for kind in ("mr", "ct"))
        bins = np.digitize(mr, np.quantile(mr, np.linspace(0, 1, 40)[1:-1]))
        means = np.bincount(bins, ct) / np.bincount(bins)
        explained[difficulty] = 1 - np.var(ct - means[bins]) / np.var(ct)
    assert explained[0] > explained[0.5] > explained[1]


@pytest.mark.parametrize(("size", "slices"), [(24, 4), (40, 7)])
def test_every_organ_is_in_every_difficult_case(size, slices):
    for seed in range(8):
        counts = np.bincount(make_case(seed, size, slices, difficulty=1).labels.ravel(), minlength=6)
        assert (counts > 0).all(), (seed, counts)


def test_difficulty_is_written_down(tmp_path):
    write_phantom(tmp_path / "hard", 2, 1, 24, 4, seed=5, progress=False, difficulty=0.5)
    assert json.loads((tmp_path / "hard" / "dataset.json").read_text())["difficulty"] == 0.5
    loaded = load_case(read_cohort(tmp_path / "hard").cases[0], LABELS)
    np.testing.assert_array_equal(loaded.inputs[0], make_case((5, 0), 24, 4, 0.5).mr)


def test_written_cohort(written):
    cohort = read_cohort(written)
    assert cohort.targets["labels"].names == LABELS
    assert [(case.name, case.split) for case in cohort.cases] == [
        ("phantom_000", "train"),
        ("phantom_001", "train"),
        ("phantom_002", "test"),
    ]
    for index, case in enumerate(cohort.cases):
        expected, loaded = make_case((5, index), 32, 8), load_case(case, cohort.targets)
        np.testing.assert_array_equal(loaded.inputs[0], expected.mr)
        np.testing.assert_array_equal(loaded.targets["ct"], np.rint(expected.ct))
        np.testing.assert_array_equal(loaded.targets["labels"], expected.labels)
        np.testing.assert_array_equal(loaded.mask, expected.mask)
        np.testing.assert_allclose(loaded.grid.spacing, (18, 12.5, 12.5))
        types = [nib.load(path).get_data_dtype().name for path in (*case.inputs, *case.targets.values(), case.mask)]
        assert types == ["float32", "int16", "uint8", "uint8"]


def test_the_same_seed_writes_the_same_bytes(tmp_path, written):
    write_phantom(tmp_path / "again", 3, 1, 32, 8, seed=5, progress=False)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) == 13
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (written / file).read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 23},
        {"slices": 3},
        {"test": 5},
        {"test": -1},
        {"cases": 0, "test": 0},
        {"seed": -1},
        {"difficulty": 1.1},
    ],
)
def test_bad_arguments_are_refused(tmp_path, wrong):
    with pytest.raises(InputError, match="expected size >= 24, slices >= 4, 0 <= test < cases, seed >= 0"):
        write_phantom(tmp_path / "out", **{"cases": 5, "test": 2, "progress": False} | wrong)
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="already there and not an empty folder"):
        write_phantom(tmp_path, 2, 1, 24, 4, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_phantom_leaves_nothing(tmp_path, monkeypatch):
    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sfg_fast.data.phantom.write_json", fails)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "out", 2, 1, 24, 4, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    write_phantom(tmp_path / "out", 2, 0, 24, 4, progress=False)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["split"]["test"] == []
