"""Metrics against values worked out by hand and against plain numpy formulas that share nothing with the package."""

import json
import math
import re

import numpy as np
import pytest

from sfg_fast.data.targets import Target
from sfg_fast.errors import InputError
from sfg_fast.evaluation.metrics import (
    case_metrics,
    columns,
    metrics_document,
    read_metrics,
    regions_of,
    rules_of,
    summarise,
    summary_tables,
    table,
    tasks_of,
)
from sfg_fast.files import write_json
from sfg_fast.tasks import profile_of, read_tasks
from sfg_fast.tasks.task import Scene

from .described import NAMES, ct_and_organs, of_images, scored


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


# --- CT and organs ----------------------------------------------------------------------------------------------------


def test_by_hand():
    true = np.array([0, 100, 250, 900, 0, 0, 0, 0], dtype=np.int16).reshape(2, 2, 2)
    pred = np.array([10, 90, 270, 900, 500, 500, 500, 500], dtype=np.float32).reshape(2, 2, 2)
    mask = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=np.uint8).reshape(2, 2, 2)
    found = scored(true, pred, mask=mask)["ct"]
    overall, bones = found["regions"]["overall"], found["regions"]["bones"]
    assert overall["voxels"] == 4
    assert overall["mae"] == pytest.approx(10)
    assert overall["psnr_in_mask"] == pytest.approx(_psnr(600 / 4))
    assert overall["psnr_zero_outside"] == pytest.approx(_psnr(600 / 8))
    assert bones["voxels"] == 2
    assert bones["psnr_in_mask"] == pytest.approx(_psnr(400 / 2))
    # The mean of 0, 100, 250, 900 is 312.5.
    variance = (312.5**2 + 212.5**2 + 62.5**2 + 587.5**2) / 4
    assert found["mean_baseline"] == {"psnr_in_mask": pytest.approx(_psnr(variance))}
    assert found["psnr_gain"] == pytest.approx(10 * math.log10(variance / 150))


def test_every_region_against_setting_the_outside_to_the_clip_minimum():
    case = _random_case()
    found = scored(**case)["ct"]["regions"]
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
        assert found[name]["mae"] == pytest.approx(np.abs(true - pred)[region].mean(), abs=1e-3)
        assert found[name]["voxels"] == region.sum()


def test_beyond_the_clip_nothing_counts():
    true = np.array([[[-3000.0, 5000.0, 0.0]]])
    pred = np.array([[[-1024.0, 3000.0, 60.0]]])
    overall = scored(true, pred, mask=np.ones((1, 1, 3)))["ct"]["regions"]["overall"]
    assert overall["mae"] == pytest.approx(20)


def test_a_perfect_prediction_is_finite():
    true = np.full((1, 2, 2), 40.0)
    found = scored(true, true, mask=np.ones((1, 2, 2)))["ct"]
    assert found["regions"]["overall"]["psnr_in_mask"] == pytest.approx(82.88, abs=0.01)
    assert found["regions"]["overall"]["mae"] == 0
    assert found["psnr_gain"] == 0  # a constant CT: its mean is as good
    json.dumps(found, allow_nan=False)


def test_predicting_the_mean_gains_nothing():
    case = _random_case()
    true = np.clip(case["ct_true"], -1024, 3000)
    mean = np.full(true.shape, true[case["mask"]].mean())
    assert scored(true, mean, mask=case["mask"])["ct"]["psnr_gain"] == pytest.approx(0, abs=1e-5)


def test_dice_against_counting():
    case = _random_case()
    found = scored(**case)["organs"]
    for name, value in (("bladder", 1), ("left_femur", 2)):
        a, b = case["labels_true"] == value, case["labels_pred"] == value
        assert found["dice"][name] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)
    assert found["dice_mean"] == pytest.approx(sum(found["dice"].values()) / 2)


def test_dice_of_absent_organs():
    names = {"background": 0, "both_absent": 1, "only_predicted": 2, "only_true": 3, "half": 4}
    true = np.array([[[0, 0, 3, 4, 4, 4]]])
    pred = np.array([[[2, 0, 0, 4, 0, 0]]])
    found = scored(labels_true=true, labels_pred=pred, mask=np.ones(true.shape), names=names)
    assert found == {
        "organs": {
            "dice": {"both_absent": None, "only_predicted": 0, "only_true": 0, "half": pytest.approx(0.5)},
            "dice_mean": pytest.approx(0.5 / 3),
        }
    }
    nothing = scored(labels_true=0 * true, labels_pred=0 * pred, mask=np.ones(true.shape), names=names)
    assert nothing["organs"]["dice_mean"] is None


def test_the_mask_does_not_bound_the_dice():
    labels = np.array([[[1, 1, 0, 0]]])
    found = scored(labels_true=labels, labels_pred=labels[..., ::-1], mask=np.array([[[1, 0, 0, 0]]]))
    assert found["organs"]["dice"]["bladder"] == 0


def test_a_missing_task_is_left_out():
    case = _random_case()
    assert set(scored(**case | {"ct_pred": None})) == {"organs"}
    found = scored(**case | {"labels_pred": None})
    assert set(found) == {"ct"}
    assert "bladder" in found["ct"]["regions"]  # the true labels still are regions
    assert set(scored(**case | {"labels_true": None})["ct"]["regions"]) == {"overall", "bones"}
    assert scored(**case | {"ct_true": None, "labels_pred": None}) == {}


def test_an_empty_region_is_none():
    soft = np.full((1, 1, 4), 40.0)
    labels = np.array([[[0, 0, 0, 1]]])
    mask = np.array([[[1, 1, 1, 0]]])  # the only organ lies outside
    found = scored(soft, soft + 1, labels, None, mask)["ct"]["regions"]
    empty = {"psnr_in_mask": None, "psnr_zero_outside": None, "mae": None, "voxels": 0}
    assert found["bones"] == found["organs"] == found["bladder"] == empty


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"ct_pred": np.zeros((1, 5, 6))},
            r"the predicted ct has shape (1, 5, 6), expected that of the mask, (4, 5, 6)",
        ),
        ({"labels_pred": np.zeros((4, 5, 7), int)}, "the predicted labels has shape (4, 5, 7)"),
        ({"mask": np.zeros((4, 5, 6))}, "the mask is empty"),
        ({"ct_pred": np.full((4, 5, 6), np.nan)}, "the predicted CT holds 120 voxels that are not finite"),
        ({"labels_pred": np.full((4, 5, 6), 7)}, "the predicted labels hold label 7"),
        ({"labels_true": np.zeros((4, 5, 6))}, "the true labels have dtype float64"),
    ],
)
def test_bad_input_is_named(change, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)):
        scored(**{**_random_case(), **change})


# --- any tasks --------------------------------------------------------------------------------------------------------


def _several():
    """Two volumes to synthesise, of which one has a unit of its own, and two label maps."""
    targets = {
        "ct": Target("ct", "intensities", "HU"),
        "pet": Target("pet", "intensities", "SUV"),
        "labels": Target("labels", "labels", names=NAMES),
        "vessels": Target("vessels", "labels", names={"background": 0, "artery": 1}),
    }
    tasks = {"ct": {}, "pet": {"kind": "synthesis"}, "organs": {}, "vessels": {"kind": "segmentation"}}
    return read_tasks(tasks, targets)


def test_several_volumes_and_label_maps_side_by_side():
    rng = np.random.default_rng(0)
    shape, mask = (3, 4, 5), np.ones((3, 4, 5), bool)
    ct, pet = rng.uniform(-900, 900, (2, *shape)), rng.uniform(1, 9, (2, *shape)).astype(np.float32)
    labels, vessels = rng.integers(0, 3, (2, *shape)), rng.integers(0, 2, (2, *shape))
    true = {"ct": ct[0], "pet": pet[0], "labels": labels[0], "vessels": vessels[0]}
    predicted = {"ct": ct[1], "pet": pet[1], "organs": labels[1], "vessels": vessels[1]}
    found = case_metrics(_several(), true, predicted, Scene(mask, {"organs": labels[0] > 0}, (1.0, 1.0, 1.0)))
    assert list(found) == ["ct", "pet", "organs", "vessels"]
    # What has no range has that of its truth as the peak, and no bones.
    assert list(found["pet"]["regions"]) == ["overall", "organs"]
    expected = 20 * math.log10(np.ptp(pet[0])) - 10 * math.log10(np.mean((pet[0] - pet[1]) ** 2))
    assert found["pet"]["regions"]["overall"]["psnr_in_mask"] == pytest.approx(expected)
    assert found["vessels"]["dice"] == {
        "artery": pytest.approx(2 * (vessels[0] & vessels[1]).sum() / (vessels[0].sum() + vessels[1].sum()))
    }
    document = metrics_document({"a": found}, _several())
    shown = summary_tables(document)
    assert [part.caption for part in shown] == [
        "(a) CT synthesis, mean (SD); metrics: paper",
        "(b) PET synthesis, mean (SD); metrics: paper",
        "(c) Segmentation of organs, mean (SD); metrics: paper",
        "(d) Segmentation of vessels, mean (SD); metrics: paper",
    ]
    assert [part.header for part in shown[:2]] == [["", "Overall", "Bones", "Organs"], ["", "Overall", "Organs"]]
    assert shown[1].rows[2][0] == "MAE [SUV]"
    names = [column.title for column in columns((task, task.measures) for task in _several().values())]
    assert "MAE [HU]" in names
    assert {"PSNR in mask [dB] (ct)", "PSNR in mask [dB] (pet)", "Dice (organs)", "Dice (vessels)"} < set(names)


def test_two_tasks_of_one_target_have_tables_of_their_own_names():
    target = {"ct": Target("ct", "intensities", "HU")}
    tasks = read_tasks({"sharp": {"kind": "synthesis", "target": "ct"}, "ct": {}}, target)
    true = np.array([[[0.0, 10.0, 500.0]]])
    found = case_metrics(
        tasks, {"ct": true}, {"sharp": true + 1, "ct": true + 2}, Scene(true > -1, {}, (1.0, 1.0, 1.0))
    )
    assert [found[name]["regions"]["overall"]["mae"] for name in ("sharp", "ct")] == [1, 2]
    captions = [part.caption for part in summary_tables(metrics_document({"a": found}, tasks))]
    assert captions == [
        f"({a}) CT synthesis ({name}), mean (SD); metrics: paper" for a, name in (("a", "sharp"), ("b", "ct"))
    ]


def _images():
    """Four images by hand: an age is missing in one, a gender in another."""
    true = [{"age": 30.0, "gender": 0}, {"age": 40.0, "gender": 1}, {"age": 50.0}, {"gender": 1}]
    predicted = [
        {"age": 33.0, "gender": 0},
        {"age": 39.0, "gender": 0},
        {"age": 44.0, "gender": 1},
        {"age": 1.0, "gender": 1},
    ]
    pairs = zip("abcd", true, predicted, strict=True)
    return {name: case_metrics(of_images(), its_true, its_predicted, None) for name, its_true, its_predicted in pairs}


def test_images_by_hand():
    cases = _images()
    assert cases["b"] == {
        "age": {"true": 40.0, "predicted": 39.0, "error": -1.0, "absolute_error": 1.0},
        "gender": {"true": "male", "predicted": "female", "correct": 0, "recall": {"male": 0}},
    }
    assert (list(cases["c"]), list(cases["d"])) == (["age"], ["gender"])
    document = metrics_document(cases, of_images())
    age, gender = document["summary"]["age"], document["summary"]["gender"]
    assert age["absolute_error"] == {
        "mean": pytest.approx(10 / 3),
        "sd": pytest.approx(np.std([3, 1, 6], ddof=1)),
        "n": 3,
    }
    assert age["error"]["mean"] == pytest.approx(-4 / 3)
    assert gender["correct"] == {"mean": pytest.approx(2 / 3), "sd": pytest.approx(np.std([1, 0, 1], ddof=1)), "n": 3}
    assert gender["recall"] == {
        "female": {"mean": 1, "sd": 0, "n": 1},
        "male": {"mean": 0.5, "sd": pytest.approx(0.5**0.5), "n": 2},
    }
    assert "true" not in gender
    ages, genders = summary_tables(document)
    assert ages == (
        "(a) Age, mean (SD); metrics: paper",
        ["", "MAE [years]", "Mean error [years]"],
        [["", "3.33 (2.52) n=3", "-1.33 (4.51) n=3"]],
    )
    assert genders.header == ["", "Accuracy [%]", "of female [%]", "of male [%]"]
    assert genders.rows == [["", "66.67 n=3", "100.00 n=1", "50.00 n=2"]]


# --- over the cases ---------------------------------------------------------------------------------------------------


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
    full = scored(**_random_case())
    bare = scored(**_random_case() | {"labels_pred": None})
    summary = summarise({"bare": bare, "full": full})
    assert summary["organs"]["dice"]["bladder"] == {"mean": full["organs"]["dice"]["bladder"], "sd": 0, "n": 1}
    assert summary["ct"]["psnr_gain"]["n"] == 2


@pytest.fixture(scope="module")
def document():
    cases = {f"case {seed}": scored(**_random_case(seed)) for seed in range(3)}
    cases["case 2"]["organs"]["dice"]["bladder"] = None
    return metrics_document(cases, ct_and_organs())


def test_the_document_survives_strict_json(document):
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert tasks_of(document) == ct_and_organs()
    assert regions_of(document) == ["organs", "bladder", "left_femur"]
    rules = rules_of(document)
    assert "[-1024, 3000] HU" in rules["ct: clip"]
    assert {"organs: dice", "sd"} < set(rules)
    assert document["summary"] == summarise(document["cases"])


def test_tables_show_mean_and_sd(document):
    ct, dice = summary_tables(document)
    assert ct.header == ["", "Overall", "Bones", "Organs", "Bladder", "Left femur"]
    values = [case["ct"]["regions"]["bones"]["mae"] for case in document["cases"].values()]
    assert ct.rows[2][0] == "MAE [HU]"
    assert ct.rows[2][2] == f"{np.mean(values):.1f} ({np.std(values, ddof=1):.1f})"
    assert dice.header == ["", "Overall", "Bladder", "Left femur"]
    values = [document["cases"][f"case {seed}"]["organs"]["dice"]["bladder"] for seed in (0, 1)]
    assert dice.rows[0][2] == f"{np.mean(values):.3f} ({np.std(values, ddof=1):.3f}) n=2"


def test_markdown_lines_up(document):
    blocks = [block.splitlines() for block in table(document).split("\n\n")]
    captions = [f"{what}, mean (SD); metrics: paper" for what in ("(a) CT synthesis", "(b) Segmentation of organs")]
    assert [block[0] for block in blocks[::2]] == captions
    for lines in blocks[1::2]:
        assert len({len(line) for line in lines}) == 1
        bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
        assert all(positions == bars[0] for positions in bars)


def test_table_of_one_task():
    names = {"background": 0, "blad|der": 1, "absent": 2}
    case = scored(**_random_case() | {"ct_true": None}, names=names)
    case["organs"]["dice"]["absent"] = None
    text = table(metrics_document({"only": case}, ct_and_organs(names)))
    assert "CT" not in text
    assert r"Blad\|der" in text
    assert text.splitlines()[-1].split("|")[-2].strip() == "-"


# --- metrics.json that is read back -----------------------------------------------------------------------------------


def _changed(document, *place, to):
    content = part = json.loads(json.dumps(document))
    for key in place[:-1]:
        part = part[key]
    if to is None:
        del part[place[-1]]
    else:
        part[place[-1]] = to
    return content


CASE, TASKS = ("cases", "case 0"), ("conventions", "tasks")


@pytest.mark.parametrize(
    ("place", "to", "said"),
    [
        (TASKS, {}, "conventions.tasks is empty"),
        ((*TASKS, "ct", "rules"), {}, "conventions.tasks.ct.rules is empty"),
        ((*TASKS, "ct", "options", "kind"), "dance", "conventions: tasks.ct.kind='dance': expected one of"),
        (("conventions", "metrics"), "mine", "conventions: metrics='mine': expected one of paper, synthrad2025"),
        (("conventions", "metrics"), "synthrad2025", "cases.case 0.ct is incomplete"),
        (("conventions", "metrics"), 3, "conventions.metrics is 3, expected text"),
        (
            (*TASKS, "organs", "about", "names"),
            {"background": 0, "bladder": 2},
            "names {'background': 0, 'bladder': 2}",
        ),
        ((*TASKS, "organs"), None, "cases.case 0 has 'organs', expected the tasks of conventions.tasks"),
        (("cases",), {}, "cases is empty"),
        ((*CASE, "ct", "psnr_gain"), None, "cases.case 0.ct is incomplete"),
        ((*CASE, "ct", "regions", "overall"), None, "cases.case 0.ct is incomplete"),
        ((*CASE, "organs", "dice", "bladder"), None, "cases.case 0.organs is incomplete"),
        ((*CASE, "ct", "regions", "bladder", "mae"), "12", "ct.regions.bladder.mae is '12', expected a number or null"),
        ((*CASE, "ct", "regions", "bladder"), 3, "ct.regions.bladder is 3, expected an object"),
        ((*CASE, "organs", "dice_mean"), math.inf, "organs.dice_mean is inf, expected a finite number"),
        ((*CASE, "organs", "dice_mean"), True, "organs.dice_mean is True, expected a number or null"),
        (("summary", "ct", "psnr_gain", "mean"), 1, "summary is not that of its cases"),
        (("summary", "organs"), None, "summary is not that of its cases"),
    ],
)
def test_a_document_that_is_none_is_refused(document, tmp_path, place, to, said):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(_changed(document, *place, to=to)))
    with pytest.raises(InputError, match=re.escape(f"{path}: ")) as refusal:
        read_metrics(path)
    assert said in str(refusal.value)


@pytest.mark.parametrize(("task", "to"), [("gender", "other"), ("gender", 3), ("age", "old"), ("age", None)])
def test_values_of_images_that_can_not_be_drawn_are_refused(tmp_path, task, to):
    content = _changed(metrics_document(_images(), of_images()), "cases", "a", task, "predicted", to=to)
    write_json(tmp_path / "m.json", content)
    with pytest.raises(InputError, match=f"m.json: .*{task}"):
        read_metrics(tmp_path / "m.json")


def test_a_document_is_read_as_it_was_written(document, tmp_path):
    for number, content in enumerate((document, metrics_document(_images(), of_images()))):
        write_json(tmp_path / f"{number}.json", content)
        assert read_metrics(tmp_path / f"{number}.json") == content


# --- the profile synthrad2025 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_the_field():
    cases = {f"case {seed}": scored(**_random_case(seed), profile="synthrad2025") for seed in range(2)}
    return metrics_document(cases, ct_and_organs(profile="synthrad2025"))


def test_the_profile_stands_beside_every_number(of_the_field, document):
    ct, organs = summary_tables(of_the_field)
    assert ct.caption == "(a) CT synthesis, mean (SD); metrics: synthrad2025"
    assert ct.header == ["", "MAE [HU]", "PSNR [dB]", "MS-SSIM"]
    maes = [case["ct"]["mae"] for case in of_the_field["cases"].values()]
    assert ct.rows[0][1] == f"{np.mean(maes):.1f} ({np.std(maes, ddof=1):.1f})"
    assert organs.caption == "(b) Segmentation of organs, mean (SD); metrics: synthrad2025"
    assert organs.header == ["", "Overall", "Bladder", "Left femur"]
    assert [row[0] for row in organs.rows] == ["Dice", "HD95 [mm]"]
    distances = [case["organs"]["hd95"]["bladder"] for case in of_the_field["cases"].values()]
    assert organs.rows[1][2] == f"{np.mean(distances):.2f} ({np.std(distances, ddof=1):.2f})"
    rules = rules_of(of_the_field)
    assert rules["metrics"] == of_the_field["conventions"]["metrics"] == "synthrad2025"
    assert "nothing is clipped" in rules["ct: mae"]
    assert "[-1024, 3071] HU" in rules["ct: psnr"]
    assert rules_of(document)["metrics"] == document["conventions"]["metrics"] == "paper"


def test_a_document_keeps_its_profile(of_the_field, document, tmp_path):
    write_json(tmp_path / "field.json", of_the_field)
    assert read_metrics(tmp_path / "field.json") == of_the_field
    assert profile_of(tasks_of(of_the_field)) == "synthrad2025"
    # One from before there were profiles is of the paper's.
    write_json(tmp_path / "old.json", _changed(document, "conventions", "metrics", to=None))
    old = read_metrics(tmp_path / "old.json")
    assert tasks_of(old) == ct_and_organs()
    assert table(old) == table(document)
    # A measure that is gone is missed.
    for place in (("ct", "ms_ssim"), ("organs", "hd95_mean"), ("organs", "hd95", "bladder")):
        write_json(tmp_path / "less.json", _changed(of_the_field, "cases", "case 0", *place, to=None))
        with pytest.raises(InputError, match=f"cases.case 0.{place[0]} is incomplete"):
            read_metrics(tmp_path / "less.json")
