"""The synthetic pelvis: anatomy in the right places, honest images, files that make a cohort."""

import hashlib
import itertools
import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from sfg_fast.data import body_mask, load_case, make_case, read_cohort, write_phantom
from sfg_fast.data.pelvis import FAT, MARROW, WALL, Solid, apart, both_sides, cut, ellipsoid, strap, tube, union, within
from sfg_fast.data.phantom import LABELS, _Field
from sfg_fast.errors import InputError

SEEDS = range(4)


@pytest.fixture(scope="module")
def cases():
    return [make_case(seed, 48, 16) for seed in SEEDS]


@pytest.fixture(scope="module")
def fine():
    """Difficulty -> cases of voxels of 4 x 4 x 12 mm."""
    return {difficulty: [make_case(seed, 96, 12, difficulty) for seed in range(3)] for difficulty in (0, 1)}


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


def core(case, name, shrunk=2):
    """The voxels of an organ that no other tissue shares."""
    return ndimage.binary_erosion(case.labels == LABELS[name], np.ones((1, 3, 3)), shrunk)


def test_tissues_have_their_hu(fine):
    for case in fine[0]:
        assert abs(np.median(case.ct[~case.mask]) + 1000) < 2
        assert abs(np.median(case.ct[core(case, "bladder", 3)])) < 25  # urine
        assert abs(np.median(case.ct[core(case, "prostate")]) - 41) < 25
        for side in ("left", "right"):
            assert 100 < np.median(case.ct[core(case, f"{side}_femoral_head")]) < 340  # marrow
        counts, edges = np.histogram(case.ct[case.mask], np.arange(-150, 150, 10))
        fat, muscle = (edges[part][counts[part].argmax()] + 5 for part in (slice(0, 15), slice(15, -1)))
        assert -115 < fat < -85
        assert 40 < muscle < 70
        assert 0.35 < (case.ct[case.mask] < -40).mean() < 0.55
        assert 0.06 < (case.ct[case.mask] > 150).mean() < 0.14
        assert 8 < case.ct[core(case, "bladder", 3)].std() < 30  # noise
    assert min(case.ct[case.labels == LABELS["rectum"]].min() for case in fine[0]) < -700  # gas


def test_tissues_have_their_brightness(fine):
    """Of a T2 image: urine, fat, marrow, muscle, cortical bone and gas."""
    for case in fine[0]:
        fat = np.median(case.mr[case.mask & (case.ct < -70) & (case.ct > -130)])
        head = np.median(case.mr[core(case, "right_femoral_head")]) / fat
        urine = np.median(case.mr[core(case, "bladder", 3)]) / fat
        muscle = np.median(case.mr[case.mask & (case.labels == 0) & (case.ct > 30) & (case.ct < 80)]) / fat
        bone = np.median(case.mr[case.ct > 800]) / fat
        assert urine > 1.1 > head > 0.5 > muscle > 0.25 > bone
        gas = case.mask & (case.ct < -700) & ndimage.binary_erosion(case.mask, np.ones((1, 9, 9)))
        assert not gas.any() or np.median(case.mr[gas]) / fat < 0.15


def test_what_only_the_mr_shows(fine):
    """The prostate's border: of a difficult patient it is none in the CT."""
    contrast = {0: [], 1: []}
    for difficulty, cases in fine.items():
        for case in cases:
            gland = case.labels == LABELS["prostate"]
            around = ndimage.binary_dilation(gland, np.ones((1, 3, 3)), 3)
            around &= ~ndimage.binary_dilation(case.labels > 0, np.ones((1, 3, 3)), 1)
            calm = np.abs(case.ct) < 150
            ct, mr = (np.median(image[gland & calm]) - np.median(image[around & calm]) for image in (case.ct, case.mr))
            contrast[difficulty].append((ct, mr / np.median(case.mr[around])))
    easy, hard = (np.abs(np.mean(contrast[difficulty], axis=0)) for difficulty in (0, 1))
    assert easy[0] > 80 > 50 > hard[0]
    assert hard[1] > 0.1


def test_what_only_the_ct_needs(fine):
    """Marrow is denser where the MR's texture is coarser: of a difficult patient only."""
    found = {}
    for difficulty, cases in fine.items():
        texture, density = [], []
        for case in cases:
            heads = ndimage.binary_erosion(case.labels >= LABELS["left_femoral_head"], np.ones((1, 3, 3)), 2)
            squares, means = (ndimage.uniform_filter(image, (1, 5, 5))[heads] for image in (case.mr**2, case.mr))
            texture += list(np.sqrt(squares - means**2) / means)
            density += list(case.ct[heads])
        found[difficulty] = np.corrcoef(texture, density)[0, 1]
    assert found[1] > max(0.35, found[0] + 0.25)


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
    again = make_case(SEEDS[0], 48, 16)
    for kind in ("mr", "ct", "labels", "mask"):
        assert np.array_equal(getattr(cases[0], kind), getattr(again, kind))
        assert not np.array_equal(getattr(cases[0], kind), getattr(cases[1], kind))
    overlap = [(a.labels == b.labels)[(a.labels > 0) | (b.labels > 0)].mean() for a, b in itertools.pairwise(cases)]
    assert max(overlap) < 0.8  # knowing one patient doesn't solve the next


def test_anatomy_does_not_depend_on_the_grid():
    coarse, fine = make_case(3, 64, 16, 1), make_case(3, 128, 32, 1)

    def averaged(image):
        return image.reshape(16, 2, 64, 2, 64, 2).mean(axis=(1, 3, 5))

    for value in LABELS.values():
        share, organ = averaged(fine.labels == value), coarse.labels == value
        assert abs(share.sum() / organ.sum() - 1) < 0.05
        assert 2 * share[organ].sum() / (share.sum() + organ.sum()) > 0.83
    for kind in ("mr", "ct"):  # texture and bias, too, but not the noise
        images = [image[coarse.mask] for image in (averaged(getattr(fine, kind)), getattr(coarse, kind))]
        assert np.corrcoef(images)[0, 1] > 0.95
        assert abs(images[0].mean() - images[1].mean()) < 0.02 * images[1].std()


def test_smooth_fields_are_splines():
    """Of the same coefficients, as SciPy has them; of mean 0 and SD 1, wherever they are looked at."""
    field = _Field(np.random.default_rng(0), (20, 15, 10))
    y, x = np.linspace(-200, 200, 33), np.linspace(-150, 120, 19)
    for z in (-71.0, 3.3):
        places = np.stack(np.broadcast_arrays((z + 72) / 20 + 1, (y[:, None] + 200) / 15 + 1, (x + 200) / 10 + 1))
        expected = ndimage.map_coordinates(field.coefficients, places, order=3, prefilter=False, mode="constant")
        np.testing.assert_allclose(field(np.array([z]), y, x), expected, atol=1e-12)
    everywhere = [field(np.array([z]), *[np.arange(-200.0, 200, 3)] * 2) for z in range(-72, 72, 8)]
    assert abs(np.mean(everywhere)) < 0.1
    assert abs(np.std(everywhere) - 1) < 0.1


def volume(shape):
    """cm3, by counting voxels of 1 mm."""
    x, front = np.meshgrid(np.arange(-60.0, 60) + 0.3, np.arange(-60.0, 60) + 0.4)
    planes = (shape(x, front, z) for z in np.arange(-60.0, 60) + 0.2)
    return sum((plane < 0).sum() for plane in planes if plane is not None) / 1000


def test_shapes_have_their_volumes():
    ball = ellipsoid((3, 4, 5), (20, 20, 20))
    assert volume(ball) == pytest.approx(4 / 3 * np.pi * 8, rel=0.01)
    assert volume(ellipsoid((0, 0, 0), (30, 20, 10))) == pytest.approx(4 / 3 * np.pi * 6, rel=0.01)
    assert volume(tube((0, 0, -20, 10), (0, 0, 20, 10))) == pytest.approx(np.pi * (4 + 4 / 3), rel=0.01)
    assert volume(tube((-20, 5, 3, 10), (20, 5, 3, 10))) == pytest.approx(np.pi * (4 + 4 / 3), rel=0.01)
    plate = strap({-10: [(-20, 0, 5), (20, 0, 5)], 10: [(-20, 0, 15), (20, 0, 15)]})  # stadiums of growing width
    area = [80 * r + np.pi * r**2 for r in np.linspace(5, 15, 2001)]
    assert volume(plate) == pytest.approx(20 * np.mean(area) / 1000, rel=0.06)
    assert volume(within(ball, lambda x, front, z: x - 3)) == pytest.approx(volume(ball) / 2, rel=0.03)
    assert volume(both_sides(ellipsoid((30, 0, 0), (10, 10, 10)))) == pytest.approx(8 / 3 * np.pi, rel=0.01)
    apart_by_far = union(ellipsoid((30, 0, 0), (10,) * 3), ellipsoid((-30, 0, 0), (10,) * 3))
    assert volume(apart_by_far) == pytest.approx(8 / 3 * np.pi, rel=0.01)


def test_distances_are_in_mm():
    x, front = np.meshgrid(np.arange(-40.0, 41), np.arange(-40.0, 41))
    from_axis = np.hypot(x, front)
    np.testing.assert_allclose(tube((0, 0, -9, 7), (0, 0, 9, 7))(x, front, 0.0), from_axis - 7, atol=1e-9)
    np.testing.assert_allclose(ellipsoid((0, 0, 0), (12,) * 3)(x, front, 0.0), from_axis - 12, atol=0.02)
    assert tube((0, 0, -9, 7), (0, 0, 9, 7))(x, front, 30.0) is None
    assert ellipsoid((0, 0, 0), (12,) * 3)(x, front, 18.0) is None
    pair = apart(tube((-10, 0, -9, 7), (-10, 0, 9, 7)), tube((10, 0, -9, 7), (10, 0, 9, 7)), gap=4, more=5)
    inside = x[40][pair(x, front, 0.0)[40] < 0]  # they meet at 0 and keep 2 mm each from there
    np.testing.assert_array_equal(inside, [*range(-21, -2), *range(3, 22)])


def test_solids_are_drawn_in_layers():
    x, front = np.meshgrid(np.arange(-40.0, 41), np.arange(-40.0, 41))
    ball, small = ellipsoid((0, 0, 0), (30,) * 3), ellipsoid((0, 0, 0), (10,) * 3)
    solids = [
        Solid(ball, ((FAT, 0), (WALL, 20))),
        Solid(small, ((MARROW, -5),), (4, 5), over=(FAT,)),
        Solid(small, (), (1, 2)),
    ]
    tissue, label, depth = cut(solids, x, front, 0.0)
    row = {at: (tissue[40, 40 + at], label[40, 40 + at]) for at in (-35, -25, -12, -8, 8, 12)}
    assert row == {-35: (0, 0), -25: (FAT, 0), -12: (MARROW, 0), -8: (WALL, 1), 8: (WALL, 2), 12: (MARROW, 0)}
    assert depth[40, 40] == pytest.approx(30, abs=0.05)
    assert depth[40, 60] == pytest.approx(10, abs=0.05)


@pytest.mark.parametrize(("seed", "size", "slices"), [(0, 48, 16), ((5, 1), 24, 4)])
def test_difficulty_adds_to_the_same_patient(seed, size, slices):
    """0 is the easy phantom to the bit: nothing more is drawn for it. At 1 it is the same patient, bent."""
    easy, hard = make_case(seed, size, slices), make_case(seed, size, slices, difficulty=1)
    again = make_case(seed, size, slices, difficulty=0)
    for kind in ("mr", "ct", "labels", "mask"):
        assert np.array_equal(getattr(easy, kind), getattr(again, kind))
        assert not np.array_equal(getattr(easy, kind), getattr(hard, kind))
    assert (hard.mask & easy.mask).sum() / (hard.mask | easy.mask).sum() > 0.8


def test_easy_phantom_is_what_it_was():
    digest = hashlib.sha256()
    for seed, size, slices in ((0, 48, 16), ((5, 1), 32, 8)):
        case = make_case(seed, size, slices)
        for kind in ("ct", "labels", "mask"):
            digest.update(np.rint(getattr(case, kind)).astype(np.int16).tobytes())
    assert digest.hexdigest() == "f035730d315933c6ce0ce417b386fc3e6f34786d535c07fdd3611789c05163b6"


def test_difficulty_brings_what_only_its_place_tells_apart():
    """The more difficult, the less of the CT the MR's intensity alone explains."""
    explained = {}
    for difficulty in (0, 0.5, 1):
        cases = [make_case(seed, 48, 8, difficulty) for seed in range(3)]
        mr, ct = (np.concatenate([getattr(case, kind)[case.mask] for case in cases]) for kind in ("mr", "ct"))
        bins = np.digitize(mr, np.quantile(mr, np.linspace(0, 1, 40)[1:-1]))
        means = np.bincount(bins, ct) / np.bincount(bins)
        explained[difficulty] = 1 - np.var(ct - means[bins]) / np.var(ct)
    assert explained[0] > explained[0.5] > explained[1]


@pytest.mark.parametrize(("size", "slices"), [(24, 6), (40, 7)])
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
