"""The profile synthrad2025 against values worked out by hand, plain float64 formulas, and what the challenge's own
public evaluation gave for the same volume."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from sfg_fast.data.targets import Target
from sfg_fast.errors import InputError
from sfg_fast.tasks import KINDS, PROFILES, measured_by, profile_of, read_tasks
from sfg_fast.tasks.synthesis import Synthesis
from sfg_fast.tasks.synthrad2025 import SynthRADSynthesis
from sfg_fast.tasks.task import Scene

CT = Target("ct", "intensities", "HU")
LABELS = Target("labels", "labels", names={"background": 0, "bladder": 1, "rectum": 2, "prostate": 3, "femur": 4})
MM = (1.0, 1.0, 1.0)


def measured(*options):
    return measured_by(read_tasks(*options), "synthrad2025")


def ct(true, predicted, mask=None):
    mask = np.ones(true.shape, bool) if mask is None else mask
    return measured(["ct"], {"ct": CT})["ct"].metrics(true, predicted, Scene(mask, {}, MM))


def organs(true, predicted, spacing=MM):
    scene = Scene(np.zeros(true.shape, bool), {}, spacing)  # labels are measured everywhere
    return measured(["organs"], {"labels": LABELS})["organs"].metrics(true, predicted, scene)


# --- CT ---------------------------------------------------------------------------------------------------------------


def test_a_constant_offset_by_hand():
    true = np.linspace(-500, 500, 24, dtype=np.float32).reshape(2, 3, 4)
    found = ct(true, true + 50)
    assert found["mae"] == pytest.approx(50, rel=1e-6)
    assert found["psnr"] == pytest.approx(20 * math.log10(4095 / 50), rel=1e-6)
    assert found["voxels"] == 24


def test_beyond_3071_the_mae_counts_and_the_psnr_does_not():
    true = np.array([[[3071.0, 4071.0, -1024.0, 0.0]]], np.float32)
    predicted = np.array([[[3571.0, 3071.0, -2024.0, 8.0]]], np.float32)
    found = ct(true, predicted)
    assert found["mae"] == pytest.approx((500 + 1000 + 1000 + 8) / 4)
    assert found["psnr"] == pytest.approx(20 * math.log10(4095) - 10 * math.log10(8**2 / 4))


def test_a_perfect_prediction_is_finite():
    rng = np.random.default_rng(0)
    true = rng.uniform(-900, 3500, (30, 20, 40)).astype(np.float32)
    found = ct(true, true.copy())
    assert (found["mae"], found["ms_ssim"]) == (0, pytest.approx(1, abs=1e-12))
    assert found["psnr"] == pytest.approx(20 * math.log10(4095) + 10 * math.log10(12))
    json.dumps(found, allow_nan=False)


def plain_ms_ssim(true, predicted, mask):
    """Voxel by voxel of the mask, window by window; luminance, contrast and structure each by itself."""
    x, y = (
        np.where(mask, np.clip(volume.astype(np.float64), -1024, 3071), -1024) + 1024 for volume in (true, predicted)
    )
    for axis, size in enumerate(mask.shape):
        missing = max(97 - size, 0)
        places = np.clip(np.arange(size + missing) - missing // 2, 0, size - 1)
        x, y, mask = (volume.take(places, axis) for volume in (x, y, mask))
    steps = np.indices((7, 7, 7)).reshape(3, -1) - 3
    product = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363, 0.1333):
        voxels = np.argwhere(mask)
        voxels = voxels[((voxels >= 3) & (voxels < np.array(mask.shape) - 3)).all(1)]
        where = tuple(voxels[:, :, None].transpose(1, 0, 2) + steps[:, None])  # 3 x [voxels, 343]
        a, b = x[where], y[where]
        (mean_a, mean_b), (sd_a, sd_b) = (a.mean(1), b.mean(1)), (a.std(1, ddof=1), b.std(1, ddof=1))
        covariance = ((a - mean_a[:, None]) * (b - mean_b[:, None])).sum(1) / 342
        c1, c2 = (0.01 * 4095) ** 2, (0.03 * 4095) ** 2
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        contrast = (2 * sd_a * sd_b + c2) / (sd_a**2 + sd_b**2 + c2)
        structure = np.maximum((covariance + c2 / 2) / (sd_a * sd_b + c2 / 2), 0)
        product *= (luminance**weight * contrast**weight * structure**weight).mean()
        half = []
        for volume in (x, y):
            shifted = np.pad(volume, ((1, 1),) * 3)
            parts = [shifted[i::2, j::2, k::2] for i, j, k in np.ndindex(2, 2, 2)]
            z, y_, x_ = ((size + 1) // 2 for size in volume.shape)
            half.append(sum(part[:z, :y_, :x_] for part in parts) / 8)
        (x, y), mask = half, mask[::2, ::2, ::2]
    return product


def test_ms_ssim_against_its_definition():
    """Volumes of which one axis is long enough, with values beyond the range and structure that is turned over; a mask
    of scattered voxels, some at the borders. The challenge's volumes run towards Left, Posterior, Superior."""
    rng = np.random.default_rng(1)
    shape = (40, 30, 130)
    true = 900 * rng.standard_normal(shape) + 100 * np.arange(130) % 700
    predicted = np.where(np.arange(130) < 45, -true, true) + 200 * rng.standard_normal(shape) + 60
    mask = rng.random(shape) < 0.004
    mask[14:26, 8:20, 30:90] = True
    found = ct(true.astype(np.float32), predicted.astype(np.float32), mask)["ms_ssim"]
    expected = plain_ms_ssim(*(volume[:, ::-1, ::-1] for volume in (true, predicted, mask)))
    assert 0.1 < expected < 0.9
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_numbers_of_the_challenges_own_evaluation():
    z, y, x = np.mgrid[:30, :100, :110]
    true = np.round(700 * np.sin(x / 7) * np.cos(y / 9 + z / 5) + 150 + 3000 * ((x + 2 * y + 3 * z) % 97 == 0))
    predicted = np.round(true + 120 * np.sin(x * y / 40) + 80 * np.cos(z + y / 3) - 30)
    mask = (z / 15 - 1) ** 2 + (y / 50 - 1) ** 2 + (x / 50 - 1.2) ** 2 < 0.9
    found = ct(true.astype(np.int16), predicted.astype(np.int16), mask)
    assert found["mae"] == pytest.approx(87.87860746194141, rel=1e-6)
    assert found["psnr"] == pytest.approx(31.744629711730454, rel=1e-6)
    assert found["ms_ssim"] == pytest.approx(0.9925178735513838, rel=1e-8)


def test_outside_the_mask_nothing_counts():
    rng = np.random.default_rng(2)
    true = rng.uniform(-900, 900, (20, 24, 28)).astype(np.float32)
    predicted = true + rng.normal(0, 90, true.shape).astype(np.float32)
    mask = np.zeros(true.shape, bool)
    mask[4:16, 5:20, 6:22] = True
    other = [np.where(mask, volume, rng.uniform(-900, 4000, mask.shape)) for volume in (true, predicted)]
    assert ct(*other, mask) == ct(true, predicted, mask)


def test_a_mask_that_no_voxel_is_left_of_has_no_ms_ssim():
    true = np.zeros((20, 24, 28), np.float32)
    mask = np.zeros(true.shape, bool)
    mask[9, 12, 13] = True  # at the coarsest scale one voxel is looked at, which is another
    assert ct(true, true + 9, mask) == {"mae": 9, "psnr": pytest.approx(53.16, abs=0.01), "ms_ssim": None, "voxels": 1}


def test_values_that_are_not_finite_are_named():
    true = np.zeros((2, 2, 2), np.float32)
    with pytest.raises(InputError, match="the predicted CT holds 8 voxels that are not finite"):
        ct(true, np.full_like(true, np.inf))


def test_a_range_of_the_task_has_no_say():
    true, predicted = np.array([[[0.0, 900.0]]]), np.array([[[0.0, 1900.0]]])
    task = measured({"ct": {"range": [-100, 1000]}}, {"ct": CT})["ct"]
    found = task.metrics(true, predicted, Scene(true > -1, {}, MM))
    assert (found["mae"], found["psnr"]) == (500, pytest.approx(20 * math.log10(4095) - 10 * math.log10(1000**2 / 2)))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_hd95_of_single_voxels_by_hand():
    true, predicted = np.zeros((2, 8, 8, 8), np.uint8)
    true[1, 2, 3] = predicted[4, 2, 3] = 1  # three slices apart
    true[6, 1, 1] = predicted[6, 5, 4] = 2  # 4 rows and 3 columns
    found = organs(true, predicted, (2.5, 1.0, 1.0))
    assert found["hd95"]["bladder"] == pytest.approx(7.5)
    assert found["hd95"]["rectum"] == pytest.approx(5)
    assert found["hd95_mean"] == pytest.approx(6.25)
    assert organs(true, predicted, (2.5, 1.0, 2.0))["hd95"]["rectum"] == pytest.approx(math.sqrt(4**2 + 6**2))
    assert (found["dice"]["bladder"], found["dice_mean"]) == (0, 0)
    same = organs(true, true)
    assert (same["dice_mean"], same["hd95_mean"]) == (1, 0)


def surface(volume):
    """The places of voxels of which one of the six neighbours is outside; [n, 3]."""
    whole = np.pad(volume, 1)
    inner = np.logical_and.reduce([np.roll(whole, step, axis) for axis in range(3) for step in (-1, 1)])
    return np.argwhere(whole & ~inner)


def test_dice_and_hd95_against_all_pairs():
    rng = np.random.default_rng(3)
    spacing = np.array([3.0, 0.8, 1.1])
    true, predicted = np.zeros((2, 12, 20, 20), np.uint8)
    for value in (1, 2):
        low, size = rng.integers(0, 8, 3) + 1, rng.integers(3, 9, 3)
        for volume, shift in ((true, 0), (predicted, 2)):
            start = low + shift * rng.integers(0, 2, 3)
            volume[tuple(slice(a, a + b) for a, b in zip(start, size, strict=True))] = value
    predicted[11, 19, 19] = 1  # an outlier, that the 95th percentile leaves out
    found = organs(true, predicted, tuple(spacing.tolist()))
    for name, value in (("bladder", 1), ("rectum", 2)):
        a, b = true == value, predicted == value
        assert found["dice"][name] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)
        one, other = (surface(volume) * spacing for volume in (a, b))
        apart = np.linalg.norm(one[:, None] - other[None], axis=-1)
        both = [np.percentile(apart.min(axis), 95) for axis in (0, 1)]
        assert found["hd95"][name] == pytest.approx(max(both), rel=1e-6)
    assert found["hd95"]["bladder"] < 10  # mm


def test_absent_organs():
    """In the truth alone: Dice 0, no distance. In the prediction alone, or nowhere: left out."""
    true, predicted = np.zeros((2, 6, 6, 6), np.uint8)
    true[1:3, 1:3, 1:3] = predicted[1:3, 1:3, 1:3] = 1
    true[4, 4, 4], predicted[5, 5, 5] = 2, 3
    found = organs(true, predicted)
    assert found == {
        "dice": {"bladder": 1, "rectum": 0, "prostate": None, "femur": None},
        "dice_mean": 0.5,
        "hd95": {"bladder": 0, "rectum": None, "prostate": None, "femur": None},
        "hd95_mean": 0,
    }
    nothing = organs(0 * true, predicted)
    assert (nothing["dice_mean"], nothing["hd95_mean"]) == (None, None)
    with pytest.raises(InputError, match="the predicted labels hold label 9"):
        organs(true, np.full_like(true, 9))


# --- which tasks it measures ------------------------------------------------------------------------------------------


def test_tasks_keep_everything_but_their_measures():
    options = {"ct": {"noise": "learned", "scale": 300.0}, "organs": {}}
    tasks = read_tasks(options, {"ct": CT, "labels": LABELS})
    found = measured_by(tasks, "synthrad2025")
    assert (profile_of(tasks), profile_of(found)) == ("paper", "synthrad2025")
    for name, task in tasks.items():
        assert dataclasses.asdict(found[name]) == dataclasses.asdict(task)
        assert (found[name].kind, found[name].title) == (task.kind, task.title)
        assert KINDS[task.kind] is type(task)
    assert measured_by(found, "paper") == tasks
    assert [measure.title for measure in found["ct"].measures] == ["MAE [HU]", "PSNR [dB]", "MS-SSIM"]
    assert [measure.title for measure in found["organs"].measures] == ["Dice", "HD95 [mm]"]
    assert [task.relative.title for task in found.values()] == ["MAE [HU]", "Dice"]


def test_a_kind_of_ones_own_is_measured_once_it_says_how(monkeypatch):
    monkeypatch.setitem(PROFILES, "paper", {**KINDS})
    monkeypatch.setitem(PROFILES, "synthrad2025", {**PROFILES["synthrad2025"]})

    @dataclasses.dataclass(frozen=True)
    class Robust(Synthesis):
        kind = "robust"
        sharpness: float = 2.0

    tasks = {"ct": Robust("ct", sharpness=3.0, about=CT)}
    with pytest.raises(InputError, match="task ct is of kind robust, expected tasks of kind synthesis, segmentation"):
        measured_by(tasks, "synthrad2025")

    class Measured(SynthRADSynthesis, Robust, profile="synthrad2025"):
        pass

    found = measured_by(tasks, "synthrad2025")["ct"]
    assert (type(found), found.sharpness, found.measures[2].title) == (Measured, 3.0, "MS-SSIM")


@pytest.mark.parametrize(
    ("profile", "options", "target", "said"),
    [
        ("synthrad", {"ct": {}}, CT, "metrics='synthrad': expected one of paper, synthrad2025"),
        (
            "synthrad2025",
            {"pet": {"kind": "synthesis"}},
            Target("pet", "intensities", "SUV"),
            "metrics='synthrad2025': task pet is of a volume in 'SUV', expected one in HU, or metrics paper",
        ),
        (
            "synthrad2025",
            {"age": {"kind": "regression"}},
            Target("age", "number", "years"),
            "metrics='synthrad2025': task age is of kind regression, "
            "expected tasks of kind synthesis, segmentation, or metrics paper",
        ),
        (
            "synthrad2025",
            {"sex": {"kind": "classification"}},
            Target("sex", "class", names={"female": 0, "male": 1}),
            "task sex is of kind classification",
        ),
    ],
)
def test_what_it_does_not_measure_is_refused(profile, options, target, said):
    with pytest.raises(InputError, match=re.escape(said)):
        measured_by(read_tasks(options, {target.name: target}), profile)
