"""Metrics against values worked out by hand and against plain numpy formulas that share nothing with the module."""

import json
import math

import numpy as np
import pytest

from sfg_fast.errors import InputError
from sfg_fast.evaluation.metrics import case_metrics, metrics_document, summarise, summary_tables, table

NAMES = {"background": 0, "bladder": 1, "left_femur": 2}


def _psnr(mse: float) -> float:
    return 20 * math.log10(4024) - 10 * math.log10(mse)


def _random_case(seed: int = 0) -> dict[str, np.ndarray]:
    """A small volume with values beyond the clip, both labels, and a mask that cuts through everything."""
    rng = np.random.default_rng(seed)
    shape = (4, 5, 6)
    true = rng.uniform(-1500, 3500, shape)
    return {
        "ct_true": true,
        "ct_pred": true + rng.normal(0, 300, shape),
        "labels_true": rng.integers(0, 3, shape).astype(np.uint8),
        "labels_pred": rng.integers(0, 3, shape).astype(np.int16),
        "mask": rng.random(shape) < 0.6,
    }


def test_by_hand():
    true = np.array([0, 100, 250, 900, 0, 0, 0, 0], dtype=np.int16).reshape(2, 2, 2)
    pred = np.array([10, 90, 270, 900, 500, 500, 500, 500], dtype=np.float32).reshape(2, 2, 2)
    mask = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=np.uint8).reshape(2, 2, 2)
    found = case_metrics(true, pred, None, None, mask, NAMES)
    overall, bones = found["ct"]["overall"], found["ct"]["bones"]
    assert overall["voxels"] == 4
    assert overall["mae_hu"] == pytest.approx(10)
    assert overall["psnr_in_mask"] == pytest.approx(_psnr(600 / 4))
    assert overall["psnr_zero_outside"] == pytest.approx(_psnr(600 / 8))
    assert bones["voxels"] == 2
    assert bones["psnr_in_mask"] == pytest.approx(_psnr(400 / 2))
    # The mean of 0, 100, 250, 900 is 312.5.
    variance = (312.5**2 + 212.5**2 + 62.5**2 + 587.5**2) / 4
    assert found["ct_mean_baseline"] == {"psnr_in_mask": pytest.approx(_psnr(variance))}
    assert found["psnr_gain"] == pytest.approx(10 * math.log10(variance / 150))


def test_every_region_against_setting_the_outside_to_the_clip_minimum():
    case = _random_case()
    found = case_metrics(**case, label_names=NAMES)["ct"]
    true, pred = (np.clip(case[name], -1024, 3000) for name in ("ct_true", "ct_pred"))
    regions = {
        "overall": case["mask"],
        "bones": case["mask"] & (true > 200),
        "organs": case["mask"] & (case["labels_true"] > 0),
        "bladder": case["mask"] & (case["labels_true"] == 1),
        "left_femur": case["mask"] & (case["labels_true"] == 2),
    }
    assert list(found) == list(regions)
    for name, region in regions.items():
        zeroed = [np.where(region, volume, -1024.0) for volume in (true, pred)]
        assert found[name]["psnr_zero_outside"] == pytest.approx(_psnr(np.mean((zeroed[0] - zeroed[1]) ** 2)), abs=1e-4)
        assert found[name]["psnr_in_mask"] == pytest.approx(_psnr(np.mean((true - pred)[region] ** 2)), abs=1e-4)
        assert found[name]["mae_hu"] == pytest.approx(np.abs(true - pred)[region].mean(), abs=1e-3)
        assert found[name]["voxels"] == region.sum()


def test_beyond_the_clip_nothing_counts():
    true = np.array([[[-3000.0, 5000.0, 0.0]]])
    pred = np.array([[[-1024.0, 3000.0, 60.0]]])
    overall = case_metrics(true, pred, None, None, np.ones((1, 1, 3)), {})["ct"]["overall"]
    assert overall["mae_hu"] == pytest.approx(20)


def test_a_perfect_prediction_is_finite():
    true = np.full((1, 2, 2), 40.0)
    found = case_metrics(true, true, None, None, np.ones((1, 2, 2)), {})
    assert found["ct"]["overall"]["psnr_in_mask"] == pytest.approx(82.88, abs=0.01)
    assert found["ct"]["overall"]["mae_hu"] == 0
    assert found["psnr_gain"] == 0  # a constant CT: its mean is as good
    json.dumps(found, allow_nan=False)


def test_predicting_the_mean_gains_nothing():
    case = _random_case()
    true = np.clip(case["ct_true"], -1024, 3000)
    mean = np.full(true.shape, true[case["mask"]].mean())
    assert case_metrics(true, mean, None, None, case["mask"], {})["psnr_gain"] == pytest.approx(0, abs=1e-5)


def test_dice_against_counting():
    case = _random_case()
    found = case_metrics(**case, label_names=NAMES)
    for name, value in (("bladder", 1), ("left_femur", 2)):
        a, b = case["labels_true"] == value, case["labels_pred"] == value
        assert found["dice"][name] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)
    assert found["dice_mean"] == pytest.approx(sum(found["dice"].values()) / 2)


def test_dice_of_absent_organs():
    names = {"both_absent": 1, "only_predicted": 2, "only_true": 3, "half": 4}
    true = np.array([[[0, 0, 3, 4, 4, 4]]])
    pred = np.array([[[2, 0, 0, 4, 0, 0]]])
    found = case_metrics(None, None, true, pred, np.ones(true.shape), names)
    assert found == {
        "dice": {"both_absent": None, "only_predicted": 0, "only_true": 0, "half": pytest.approx(0.5)},
        "dice_mean": pytest.approx(0.5 / 3),
    }
    nothing = case_metrics(None, None, 0 * true, 0 * pred, np.ones(true.shape), names)
    assert nothing["dice_mean"] is None


def test_the_mask_does_not_bound_the_dice():
    labels = np.array([[[1, 1, 0, 0]]])
    assert (
        case_metrics(None, None, labels, labels[..., ::-1], np.array([[[1, 0, 0, 0]]]), NAMES)["dice"]["bladder"] == 0
    )


def test_a_missing_task_is_left_out():
    case = _random_case()
    assert set(case_metrics(**case | {"ct_pred": None}, label_names=NAMES)) == {"dice", "dice_mean"}
    found = case_metrics(**case | {"labels_pred": None}, label_names=NAMES)
    assert set(found) == {"ct", "ct_mean_baseline", "psnr_gain"}
    assert "bladder" in found["ct"]  # the true labels still are regions
    assert set(case_metrics(**case | {"labels_true": None}, label_names=NAMES)["ct"]) == {"overall", "bones"}


def test_an_empty_region_is_none():
    soft = np.full((1, 1, 4), 40.0)
    labels = np.array([[[0, 0, 0, 1]]])
    mask = np.array([[[1, 1, 1, 0]]])  # the only organ lies outside
    found = case_metrics(soft, soft + 1, labels, None, mask, NAMES)["ct"]
    empty = {"psnr_in_mask": None, "psnr_zero_outside": None, "mae_hu": None, "voxels": 0}
    assert found["bones"] == found["organs"] == found["bladder"] == empty


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ct_pred": np.zeros((1, 5, 6))}, "ct_pred has shape"),
        ({"mask": np.zeros((4, 5, 6))}, "mask is empty"),
        ({"ct_pred": np.full((4, 5, 6), np.nan)}, "ct_pred holds 120 voxels that are not finite"),
        ({"labels_pred": np.full((4, 5, 6), 7)}, "labels_pred holds label 7"),
        ({"labels_true": np.zeros((4, 5, 6))}, "labels_true has dtype float64"),
        ({"ct_true": None, "labels_pred": None}, "nothing to score"),
        ({"label_names": {"overall": 1, "bladder": 2}}, "'overall'"),
    ],
)
def test_bad_input_is_named(change, complaint):
    with pytest.raises(InputError, match=complaint):
        case_metrics(**{**_random_case(), "label_names": NAMES, **change})


def test_summary_by_hand():
    cases = {"a": {"x": {"y": 1.0}, "z": None}, "b": {"x": {"y": 2.0}, "z": 5}, "c": {"x": {"y": 6.0}, "z": None}}
    assert summarise(cases) == {
        "x": {"y": {"mean": pytest.approx(3), "sd": pytest.approx(math.sqrt((4 + 1 + 9) / 2)), "n": 3}},
        "z": {"mean": 5, "sd": 0, "n": 1},
    }
    assert summarise({"a": {"z": None}}) == {"z": {"mean": None, "sd": None, "n": 0}}
    with pytest.raises(InputError, match="no case"):
        summarise({})


def test_a_case_without_a_task_does_not_hide_it():
    full = case_metrics(**_random_case(), label_names=NAMES)
    bare = case_metrics(**_random_case() | {"labels_pred": None}, label_names=NAMES)
    summary = summarise({"bare": bare, "full": full})
    assert summary["dice"]["bladder"] == {"mean": full["dice"]["bladder"], "sd": 0, "n": 1}
    assert summary["psnr_gain"]["n"] == 2


@pytest.fixture(scope="module")
def document():
    cases = {f"case {seed}": case_metrics(**_random_case(seed), label_names=NAMES) for seed in range(3)}
    cases["case 2"]["dice"]["bladder"] = None
    return metrics_document(cases, NAMES)


def test_the_document_survives_strict_json(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    conventions = document["conventions"]
    assert (conventions["clip_hu"], conventions["range_hu"], conventions["bone_threshold_hu"]) == (
        [-1024, 3000],
        4024,
        200,
    )
    assert conventions["label_names"] == NAMES
    assert document["summary"] == summarise(document["cases"])


def test_tables_show_mean_and_sd(document):
    ct, dice = summary_tables(document)
    assert ct.header == ["", "Overall", "Bones", "Organs", "Bladder", "Left femur"]
    values = [case["ct"]["bones"]["mae_hu"] for case in document["cases"].values()]
    assert ct.rows[2][0] == "MAE [HU]"
    assert ct.rows[2][2] == f"{np.mean(values):.1f} ({np.std(values, ddof=1):.1f})"
    assert dice.header == ["", "Overall", "Bladder", "Left femur"]
    values = [document["cases"][f"case {seed}"]["dice"]["bladder"] for seed in (0, 1)]
    assert dice.rows[0][2] == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f}) n=2"


def test_markdown_lines_up(document):
    blocks = [block.splitlines() for block in table(document).split("\n\n")]
    assert [block[0] for block in blocks[::2]] == ["(a) CT synthesis, mean (SD)", "(b) Segmentation, mean (SD)"]
    for lines in blocks[1::2]:
        assert len({len(line) for line in lines}) == 1
        bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
        assert all(positions == bars[0] for positions in bars)


def test_table_of_one_task():
    case = case_metrics(**_random_case() | {"ct_true": None}, label_names={"blad|der": 1, "absent": 2})
    case["dice"]["absent"] = None
    text = table(metrics_document({"only": case}, NAMES))
    assert "CT" not in text
    assert r"Blad\|der" in text
    assert text.splitlines()[-1].split("|")[-2].strip() == "-"
