"""The tables against plain arithmetic, the tests against their textbook definitions."""

import itertools
import math
import re
import statistics

import numpy as np
import pytest

from sfg_fast.evaluation.html import table as html_table
from sfg_fast.experiment.table import comparisons, holm, section, subject_means, to_markdown, wilcoxon

NAMES = {"background": 0, "prostate": 1, "left_femoral_head": 2}
CASES = [f"case_{index}" for index in range(7)]
ROWS, SEEDS = ["A", "B", "C"], [3, 8]


def metrics_of(rng, shift):
    def region():
        return {
            "psnr_in_mask": 27 + shift + rng.normal(),
            "psnr_zero_outside": 33 + shift + rng.normal(),
            "mae_hu": 90 - 9 * shift + 5 * rng.normal(),
            "voxels": 5,
        }

    dice = {name: 0.6 + 0.1 * shift + 0.1 * rng.uniform() for name in ("prostate", "left_femoral_head")}
    regions = ("overall", "bones", "organs", "prostate", "left_femoral_head")
    return {
        "ct": {name: region() for name in regions},
        "dice": dice,
        "dice_mean": statistics.mean(dice.values()),
    }


@pytest.fixture
def scores():
    """C is the best, then B; one organ is missing in one case of one seed, and another in a case of every seed."""
    rng = np.random.default_rng(4)
    found = {
        row: {seed: {case: metrics_of(rng, shift) for case in CASES} for seed in SEEDS}
        for shift, row in enumerate(ROWS)
    }
    found["B"][3]["case_2"]["dice"]["prostate"] = None
    for seed in SEEDS:
        found["A"][seed]["case_4"]["ct"]["prostate"] = {"psnr_in_mask": None, "psnr_zero_outside": None, "mae_hu": None}
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
    found = section("x", scores, cases, NAMES, "C")
    psnr, outside, mae, dice, *_ = found.tables
    columns = {"Overall": "overall", "Bones": "bones", "Organs": "organs", "Prostate": "prostate"}
    columns["Left femoral head"] = "left_femoral_head"
    for table, key, digits in ((psnr, "psnr_in_mask", 2), (outside, "psnr_zero_outside", 2), (mae, "mae_hu", 1)):
        assert table.header == ["Method", *columns]
        assert [row[0] for row in table.rows] == ROWS
        for (row, column), text in cells(table).items():
            if column != "Method":
                values = by_subject(scores, row, cases, "ct", columns[column], key)
                expected = f"{statistics.mean(values):.{digits}f} ({statistics.stdev(values):.{digits}f})"
                missing = "" if len(values) == count else f" n={len(values)}"
                assert text.strip("*") == expected + missing
    assert cells(psnr)["A", "Prostate"].endswith(f"n={count - 1}")
    assert dice.header == ["Method", "Overall", "Prostate", "Left femoral head"]
    for row in ROWS:
        values = by_subject(scores, row, cases, "dice", "prostate")
        assert len(values) == count  # the other seed has a number
        text = f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})"
        assert cells(dice)[row, "Prostate"].strip("*") == text
        values = by_subject(scores, row, cases, "dice_mean")
        assert f"{statistics.mean(values):.3f} ({statistics.stdev(values):.3f})" in cells(dice)[row, "Overall"]


def test_best_is_bold_and_second_best_italic(scores):
    psnr, _, mae, *_ = section("x", scores, CASES, NAMES, "C").tables
    for table in (psnr, mae):  # more dB, fewer HU
        marks = {row: re.match(r"\**", cells(table)[row, "Overall"]).group() for row in ROWS}
        assert marks == {"A": "", "B": "*", "C": "**"}
    page = html_table(psnr)
    best, second = (cells(psnr)[row, "Overall"].strip("*") for row in "CB")
    assert f"<td><b>{best}</b></td>" in page
    assert f"<td><i>{second}</i></td>" in page


def test_what_reads_the_same_is_marked_the_same(scores):
    scores["D"] = scores["C"]
    table = section("x", scores, CASES, NAMES, "C").tables[0]
    assert [cells(table)[row, "Overall"].count("*") for row in "ABCD"] == [0, 2, 4, 4]


def test_without_ct_there_is_no_table_of_it(scores):
    for by_case in itertools.chain.from_iterable(row.values() for row in scores.values()):
        for metrics in by_case.values():
            del metrics["ct"]
    found = section("x", scores, CASES, NAMES, "C")
    assert [table.caption[:3] for table in found.tables] == ["(b)", "C m", "Spr"]
    assert found.tables[1].header == ["Against", "Dice: difference", "n", "p", "p (Holm)"]


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
    found = comparisons(scores, CASES, "C")
    assert [(row["measure"], row["method"]) for row in found] == list(
        itertools.product(("PSNR in mask [dB]", "MAE [HU]", "Dice"), ("A", "B"))
    )
    places = {
        "PSNR in mask [dB]": ("ct", "overall", "psnr_in_mask"),
        "MAE [HU]": ("ct", "overall", "mae_hu"),
        "Dice": ("dice_mean",),
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
        scores["A"][seed]["case_1"]["dice_mean"] = None
    found = {(row["measure"], row["method"]): row["n"] for row in comparisons(scores, CASES, "C")}
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
    assert any(said in note for note in section("x", scores, CASES[:count], NAMES, "C").notes)


def test_spread_over_seeds(scores):
    table = section("x", scores, CASES, NAMES, "C").tables[-1]
    for row in ROWS:
        means = [
            statistics.mean(scores[row][seed][case]["ct"]["overall"]["mae_hu"] for case in CASES) for seed in SEEDS
        ]
        assert cells(table)[row, "MAE [HU]"] == f"{statistics.mean(means):.1f} ({statistics.stdev(means):.1f})"


def test_subject_means_know_what_is_missing(scores):
    values = subject_means(scores, CASES, ("ct", "prostate", "mae_hu"))
    assert values.shape == (3, 7)
    assert [index for index in np.ndindex(3, 7) if math.isnan(values[index])] == [(0, 4)]


def test_markdown(scores):
    text = to_markdown([section("Some", scores, CASES, NAMES, "C")], {"mask": "the body"})
    assert "## Some\n" in text
    assert "- mask: the body\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| C ")]
    assert len(rows) == 5  # four tables of scores, and the spread over seeds
    assert all("**" in line for line in rows[:4])
