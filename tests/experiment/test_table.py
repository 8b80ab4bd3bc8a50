"""The tables against plain arithmetic, the tests against their textbook definitions."""

import itertools
import math
import re
import statistics

import numpy as np
import pytest

from sfg_fast.data.targets import Target
from sfg_fast.evaluation.html import table as html_table
from sfg_fast.experiment.table import (
    RESAMPLES,
    Rows,
    bootstrap,
    comparisons,
    holm,
    relative_change,
    section,
    subject_means,
    to_compare,
    to_markdown,
    wilcoxon,
)
from sfg_fast.tasks import read_tasks

NAMES = {"background": 0, "prostate": 1, "left_femoral_head": 2}
CASES = [f"case_{index}" for index in range(7)]
ROWS, SEEDS = ["A", "B", "C"], [3, 8]
TASKS = read_tasks(
    ["ct", "organs"], {"ct": Target("ct", "intensities", "HU"), "labels": Target("labels", "labels", names=NAMES)}
)
ABOUT = Rows({}, dict.fromkeys("ABCD", 1234), dict.fromkeys("ABCD", 5.6e7), None)


def metrics_of(rng, shift):
    def region():
        return {
            "psnr_in_mask": 27 + shift + rng.normal(),
            "psnr_zero_outside": 33 + shift + rng.normal(),
            "mae": 90 - 9 * shift + 5 * rng.normal(),
            "voxels": 5,
        }

    dice = {name: 0.6 + 0.1 * shift + 0.1 * rng.uniform() for name in ("prostate", "left_femoral_head")}
    regions = ("overall", "bones", "organs", "prostate", "left_femoral_head")
    return {
        "ct": {"regions": {name: region() for name in regions}},
        "organs": {"dice": dice, "dice_mean": statistics.mean(dice.values())},
    }


@pytest.fixture
def scores():
    """C is the best, then B; one organ is missing in one case of one seed, and another in a case of every seed."""
    rng = np.random.default_rng(4)
    found = {
        row: {seed: {case: metrics_of(rng, shift) for case in CASES} for seed in SEEDS}
        for shift, row in enumerate(ROWS)
    }
    found["B"][3]["case_2"]["organs"]["dice"]["prostate"] = None
    for seed in SEEDS:
        nothing = {"psnr_in_mask": None, "psnr_zero_outside": None, "mae": None}
        found["A"][seed]["case_4"]["ct"]["regions"]["prostate"] = nothing
    return found


def by_subject(scores, row, cases, *place):
    """Plain lists: the mean over seeds of every subject that has a number."""
    found = []
    for case in cases:
        values = []
        for seed in SEEDS:
            value = scores[row][seed][case]
            for key in place:
                value = value[key]
            if value is not None:
                values.append(value)
        if values:
            found.append(sum(values) / len(values))
    return found


def cells(table):
    return {(row[0], column): text for row in table.rows for column, text in zip(table.header, row, strict=True)}


@pytest.mark.parametrize("count", [5, 7])
def test_cells_are_mean_and_sd_over_subjects(scores, count):
    cases = CASES[:count]
    found = section("x", scores, cases, TASKS, "C", ABOUT)
    _, psnr, outside, mae, dice, *_ = found.tables
    columns = {"Overall": "overall", "Bones": "bones", "Organs": "organs", "Prostate": "prostate"}
    columns["Left femoral head"] = "left_femoral_head"
    for table, key, digits in ((psnr, "psnr_in_mask", 2), (outside, "psnr_zero_outside", 2), (mae, "mae", 1)):
        assert table.header == ["Method", *columns]
        assert [row[0] for row in table.rows] == ROWS
        for (row, column), text in cells(table).items():
            if column != "Method":
                values = by_subject(scores, row, cases, "ct", "regions", columns[column], key)
                expected = f"{statistics.mean(values):.{digits}f} ({statistics.stdev(values):.{digits}f})"
                missing = "" if len(values) == count else f" n={len(values)}"
                assert text.strip("*") == expected + missing
    assert cells(psnr)["A", "Prostate"].endswith(f"n={count - 1}")
    assert dice.header == ["Method", "Overall", "Prostate", "Left femoral head"]
    for row in ROWS:
        values = by_subject(scores, row, cases, "organs", "dice", "prostate")
        assert len(values) == count  # the other seed has a number
        text = f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"
        assert cells(dice)[row, "Prostate"].strip("*") == text
        values = by_subject(scores, row, cases, "organs", "dice_mean")
        assert f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})" in cells(dice)[row, "Overall"]


def test_best_is_bold_and_second_best_italic(scores):
    _, psnr, _, mae, *_ = section("x", scores, CASES, TASKS, "C", ABOUT).tables
    for table in (psnr, mae):  # more dB, fewer HU
        marks = {row: re.match(r"\**", cells(table)[row, "Overall"]).group() for row in ROWS}
        assert marks == {"A": "", "B": "*", "C": "**"}
    page = html_table(psnr)
    best, second = (cells(psnr)[row, "Overall"].strip("*") for row in "CB")
    assert f"<td><b>{best}</b></td>" in page
    assert f"<td><i>{second}</i></td>" in page


def test_what_reads_the_same_is_marked_the_same(scores):
    scores["D"] = scores["C"]
    table = section("x", scores, CASES, TASKS, "C", ABOUT).tables[1]
    assert [cells(table)[row, "Overall"].count("*") for row in "ABCD"] == [0, 2, 4, 4]


def test_without_ct_there_is_no_table_of_it(scores):
    for by_case in itertools.chain.from_iterable(row.values() for row in scores.values()):
        for metrics in by_case.values():
            del metrics["ct"]
    found = section("x", scores, CASES, TASKS, "C", ABOUT)
    assert [table.caption[:3] for table in found.tables] == ["Ove", "(b)", "C m", "Spr"]
    assert found.tables[2].header == ["Against", "Dice: difference", "n", "p", "p (Holm)"]


def textbook_wilcoxon(differences):
    """Exact two-sided p of the signed-rank test, by all 2^n signs (no zeros, no ties)."""
    order = sorted(range(len(differences)), key=lambda index: abs(differences[index]))
    rank = {index: position + 1 for position, index in enumerate(order)}
    total = sum(rank.values())
    seen = sum(rank[index] for index, value in enumerate(differences) if value > 0)
    as_far = 0
    for signs in itertools.product((0, 1), repeat=len(differences)):
        positive = sum(position * sign for position, sign in zip(rank.values(), signs, strict=True))
        as_far += abs(positive - total / 2) >= abs(seen - total / 2)
    return as_far / 2 ** len(differences)


def textbook_holm(p):
    """Reject in order of p while p_(i) <= alpha / (m - i + 1): the least alpha at which each is rejected."""
    order = sorted(range(len(p)), key=lambda index: p[index])
    corrected = {}
    for i, index in enumerate(order):
        needed = [(len(p) - j) * p[order[j]] for j in range(i + 1)]  # all before it must be rejected, too
        corrected[index] = min(1.0, max(needed))
    return [corrected[index] for index in range(len(p))]


def test_holm_on_a_known_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    rng = np.random.default_rng(0)
    for count in range(1, 8):
        p = rng.uniform(size=count).round(2).tolist()
        assert holm(p) == pytest.approx(textbook_holm(p))


@pytest.mark.parametrize("count", [5, 8, 12])
def test_wilcoxon(count):
    rng = np.random.default_rng(count)
    for shift in (0.0, 0.5, 5.0):
        differences = rng.normal(shift, 1, count)
        assert wilcoxon(differences) == pytest.approx(textbook_wilcoxon(differences.tolist()))
    assert wilcoxon(np.arange(1.0, count + 1)) == pytest.approx(2 / 2**count)
    assert wilcoxon(np.zeros(count)) == 1


def test_comparisons(scores):
    found = comparisons(scores, CASES, to_compare(TASKS), "C")
    assert [(row["measure"], row["method"]) for row in found] == list(
        itertools.product(("PSNR in mask [dB]", "MAE [HU]", "Dice"), ("A", "B"))
    )
    places = {
        "PSNR in mask [dB]": ("ct", "regions", "overall", "psnr_in_mask"),
        "MAE [HU]": ("ct", "regions", "overall", "mae"),
        "Dice": ("organs", "dice_mean"),
    }
    for measure, place in places.items():
        rows = [row for row in found if row["measure"] == measure]
        own = by_subject(scores, "C", CASES, *place)
        for row in rows:
            other = by_subject(scores, row["method"], CASES, *place)
            differences = [a - b for a, b in zip(own, other, strict=True)]
            assert row["difference"] == pytest.approx(statistics.mean(differences))
            assert row["p"] == pytest.approx(textbook_wilcoxon(differences))
            assert row["n"] == 7
        assert [row["p_holm"] for row in rows] == pytest.approx(textbook_holm([row["p"] for row in rows]))


def test_only_subjects_with_both_numbers_are_compared(scores):
    for seed in SEEDS:
        scores["A"][seed]["case_1"]["organs"]["dice_mean"] = None
    found = {(row["measure"], row["method"]): row["n"] for row in comparisons(scores, CASES, to_compare(TASKS), "C")}
    assert (found["Dice", "A"], found["Dice", "B"], found["MAE [HU]", "A"]) == (6, 7, 7)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (5, "the least p is 2/2^5 = 0.0625: no difference, whatever its size, can reach 0.05."),
        (6, "the least p is 2/2^6 = 0.0312, corrected for 2 comparisons 0.0625: it cannot reach 0.05."),
        (7, "the least p is 2/2^7 = 0.0156, corrected for 2 comparisons 0.0312."),
    ],
)
def test_what_so_few_subjects_can_show_is_said(scores, count, said):
    assert any(said in note for note in section("x", scores, CASES[:count], TASKS, "C", ABOUT).notes)


def test_spread_over_seeds(scores):
    table = section("x", scores, CASES, TASKS, "C", ABOUT).tables[-1]
    for row in ROWS:
        means = [
            statistics.mean(scores[row][seed][case]["ct"]["regions"]["overall"]["mae"] for case in CASES)
            for seed in SEEDS
        ]
        assert cells(table)[row, "MAE [HU]"] == f"{statistics.mean(means):.1f} ({statistics.stdev(means):.1f})"


def test_subject_means_know_what_is_missing(scores):
    values = subject_means(scores, CASES, ("ct", "regions", "prostate", "mae"))
    assert values.shape == (3, 7)
    assert [index for index in np.ndindex(3, 7) if math.isnan(values[index])] == [(0, 4)]


def test_markdown(scores):
    text = to_markdown([section("Some", scores, CASES, TASKS, "C", ABOUT)], {"mask": "the body"})
    assert "## Some\n" in text
    assert "- mask: the body\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| C ")]
    assert len(rows) == 6  # the overview, four tables of scores, and the spread over seeds
    assert all("**" in line for line in rows[:5])


# --- the overview -----------------------------------------------------------------------------------------------------


def test_the_overview_has_every_task_what_was_published_and_what_a_row_costs(scores):
    about = Rows({"B": {"organs": 0.812}}, {"A": 1234, "B": 5, "C": 6}, {"A": 5.6e7, "B": 1e6, "C": 1e6}, "A")
    table = section("x", scores, CASES, TASKS, "C", about).tables[0]
    columns = ["ct: MAE [HU]", "organs: Dice", "organs: published", "Delta p [%]", "parameters", "MFLOPs per image"]
    assert table.header == ["Method", *columns]
    found = cells(table)
    assert [found[row, "organs: published"] for row in ROWS] == ["-", "0.812", "-"]
    assert (found["A", "parameters"], found["A", "MFLOPs per image"]) == ("1,234", "56.0")
    for row in ROWS:
        by_seed = [statistics.mean(scores[row][seed][case]["organs"]["dice_mean"] for case in CASES) for seed in SEEDS]
        expected = f"{statistics.mean(by_seed):.3f} ({statistics.stdev(by_seed):.3f})"
        assert found[row, "organs: Dice"].strip("*") == expected


def test_delta_p_is_the_mean_relative_change_against_one_task(scores):
    found = relative_change(scores, CASES, TASKS, "A")
    assert found.shape == (3, 2)
    assert found[0].tolist() == [0, 0]
    for index, row in enumerate(ROWS):
        for number, seed in enumerate(SEEDS):

            def mean(of, *place, seed=seed):
                values = []
                for case in CASES:
                    value = scores[of][seed][case]
                    for key in place:
                        value = value[key]
                    values.append(value)
                return statistics.mean(values)

            mae, alone = (mean(one, "ct", "regions", "overall", "mae") for one in (row, "A"))
            dice, dice_alone = (mean(one, "organs", "dice_mean") for one in (row, "A"))
            expected = 100 * ((alone - mae) / alone + (dice - dice_alone) / dice_alone) / 2
            assert found[index, number] == pytest.approx(expected)


# --- thousands of images ----------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_t_test_on_many_normal_differences():
    from scipy import stats

    rng = np.random.default_rng(1)
    for shift in (0.0, 0.03, 0.06):
        differences = rng.normal(shift, 1, 2000)
        expected = stats.ttest_1samp(differences, 0).pvalue
        assert bootstrap(differences) == pytest.approx(expected, abs=0.02)
    assert bootstrap(np.ones(20)) == pytest.approx(2 / (RESAMPLES + 1))
    assert bootstrap(np.zeros(20)) == 1
    assert bootstrap(differences) == bootstrap(differences)


def test_images_are_tested_by_bootstrap_and_shown_in_percent():
    rng = np.random.default_rng(2)
    names = [f"image_{index}" for index in range(120)]
    gender = Target("gender", "class", names={"male": 0, "female": 1})
    tasks = read_tasks({"gender": {"kind": "classification"}}, {"gender": gender})

    def right(share):
        drawn = (rng.uniform(size=120) < share).astype(int).tolist()
        return {name: {"gender": {"correct": one, "recall": {}}} for name, one in zip(names, drawn, strict=True)}

    scores = {"A": {0: right(0.5)}, "C": {0: right(0.95)}}
    found = section("x", scores, names, tasks, "C", ABOUT)
    accuracy = statistics.mean(case["gender"]["correct"] for case in scores["A"][0].values())
    assert cells(found.tables[1])["A", "Accuracy [%]"].strip("*") == f"{100 * accuracy:.2f}"  # no SD of right and wrong
    (row,) = comparisons(scores, names, to_compare(tasks), "C")
    assert row["difference"] == pytest.approx(
        100
        * statistics.mean(
            scores["C"][0][n]["gender"]["correct"] - scores["A"][0][n]["gender"]["correct"] for n in names
        )
    )
    assert row["p"] < 0.01
    assert any("paired two-sided bootstrap over subjects" in note for note in found.notes)
    assert not any("least p is" in note for note in found.notes)


def test_a_few_images_are_not_bootstrapped():
    """Of three differences of one sign every resample has that sign."""
    tasks = read_tasks({"age": {"kind": "regression"}}, {"age": Target("age", "number", "years")})

    def of(errors):
        return {f"image_{i}": {"age": {"absolute_error": error}} for i, error in enumerate(errors)}

    scores = {"A": {0: of([5.0, 6.0, 8.0])}, "C": {0: of([1.0, 2.0, 3.0])}}
    (row,) = comparisons(scores, ["image_0", "image_1", "image_2"], to_compare(tasks), "C")
    assert row["p"] == pytest.approx(2 / 2**3)
    found = section("x", scores, ["image_0", "image_1", "image_2"], tasks, "C", ABOUT)
    assert any("Wilcoxon" in note for note in found.notes)
    assert not any("bootstrap" in note for note in found.notes)
