"""The tables of an experiment: Table 1 for every row, and tests of the differences between rows.

The scores of a row are `{seed: {case: {task: metrics}}}`; `Scores` are those of all rows, in the order of the table.
Every number is first averaged over seeds, for each subject. Means, SDs and tests are then over subjects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.metrics import captioned, columns, letters, regions_of
from ..tables import Table, cell, markdown, number_at, spread
from ..tasks import Measure, Task, profile_of

Scores = Mapping[str, Mapping[int, Mapping[str, Any]]]

RESAMPLES = 9999
"""How often a bootstrap resamples. The least p that it can give is then 2 / 10,000."""
BOOTSTRAPPED = 100
"""A bootstrap is done for at least so many subjects."""
FEW = 50
"""A figure of single subjects is drawn for at most so many."""


class Section(NamedTuple):
    """Tables that are about the same cases, their common title, and sentences about them."""

    title: str
    tables: list[Table]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the tables show of each row beside its scores.

    Attributes:
        published: the published number of each task, {row: {task: number}}, where there is one.
        parameters: how many weights were trained, in all networks of the row.
        flops: the FLOPs of a prediction of one image, by all networks of the row.
        single: the row of one-task networks that relative changes are against; None without one.
    """

    published: Mapping[str, Mapping[str, float]]
    parameters: Mapping[str, int]
    flops: Mapping[str, float]
    single: str | None


def to_compare(tasks: Mapping[str, Task]) -> list[Measure]:
    """The measures whose differences between methods are tested. If two tasks have measures of the same title, the
    titles name the task."""
    tested = columns((task, [one for one in task.measures if one.tested]) for task in tasks.values())
    return [measure._replace(title=title) for title, measure in tested]


def section(
    title: str, scores: Scores, cases: Sequence[str], tasks: Mapping[str, Task], reference: str, about: Rows
) -> Section:
    """The section of these cases: an overview, the tables of each task (Table 1 (a) and (b)), the tests of the row
    `reference` against each other row, and the spread over seeds. A table for which no row has a score is left out."""
    tables = [_overview(scores, cases, tasks, about)]
    measured = [
        {"cases": {case: by_case[case] for case in cases}} for row in scores.values() for by_case in row.values()
    ]
    regions = list(dict.fromkeys(name for document in measured for name in regions_of(document)))
    for letter, task in zip(letters(), tasks.values(), strict=False):  # there is no last letter
        for row in task.rows(regions):
            caption = f"({letter}) {row.caption}" + (f": {row.title}" if row.title else "")
            tables.append(_score_table(caption, scores, cases, row.columns))
    measures = to_compare(tasks)
    compared = comparisons(scores, cases, measures, reference)
    tables += [_test_table(compared, measures, reference), _seed_table(scores, cases, measures)]
    seeds = len(next(iter(scores.values())))
    profile = profile_of(tasks)
    return Section(
        title,
        [table._replace(caption=captioned(table.caption, profile)) for table in tables if table.rows],
        [
            f"Cells are mean (SD) over {len(cases)} subjects, each averaged over {seeds} seeds first. Bold: best; "
            "italic: second best.",
            *_about_overview(tasks, about),
            *_about_tests(compared, measures, reference),
        ],
    )


def comparisons(
    scores: Scores, cases: Sequence[str], measures: Sequence[Measure], reference: str
) -> list[dict[str, Any]]:
    """Compare the row `reference` with each other row, for each measure that has a number.

    Returns a list of {"measure", "method", "n": subjects with both numbers, "difference": mean of reference minus
    other, as it is shown, "p": of a paired two-sided test over subjects (`Measure.test`), "p_holm": corrected for the
    comparisons of the measure}; the last three are None for n = 0.
    """
    found = []
    for measure in measures:
        values = subject_means(scores, cases, measure.place)
        if not np.isfinite(values).any():
            continue
        own = values[list(scores).index(reference)]
        rows: list[dict[str, Any]] = []
        for name, other in zip(scores, values, strict=True):
            if name != reference:
                difference = measure.factor * (own - other)[np.isfinite(own - other)]
                some = len(difference) > 0
                rows.append(
                    {
                        "measure": measure.title,
                        "method": name,
                        "n": len(difference),
                        "difference": float(difference.mean()) if some else None,
                        "p": TESTS[_test_of(measure, len(difference))](difference) if some else None,
                    }
                )
        tested_rows = [row for row in rows if row["p"] is not None]
        corrected = iter(holm([row["p"] for row in tested_rows]))
        found += [{**row, "p_holm": None if row["p"] is None else next(corrected)} for row in rows]
    return found


def _test_of(measure: Measure, subjects: int) -> str:
    """The test of a measure. With few subjects it is never a bootstrap, which would give too small a p."""
    return measure.test if subjects >= BOOTSTRAPPED else "wilcoxon"


def wilcoxon(differences: np.ndarray) -> float:
    """The p of the two-sided Wilcoxon signed-rank test of paired differences [n]; 1 if all are zero."""
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def bootstrap(differences: np.ndarray) -> float:
    """The p of the two-sided bootstrap test that the mean of paired differences [n] is 0: twice the share of resampled
    means on the other side of 0 (Efron, Tibshirani 1993), at least 2 / (RESAMPLES + 1). Resampling is seeded, so the
    same numbers give the same p."""
    from scipy import stats

    if len(differences) < 2 or not differences.any():
        return 1.0
    found = stats.bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", random_state=0
    )
    means = found.bootstrap_distribution
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))


TESTS = {"wilcoxon": wilcoxon, "bootstrap": bootstrap}


def holm(p: Sequence[float]) -> list[float]:
    """The p of several tests, corrected after Holm (1979), in the same order."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def relative_change(scores: Scores, cases: Sequence[str], tasks: Mapping[str, Task], single: str) -> np.ndarray:
    """Delta p, [rows, seeds], in percent: how much better a row is than the one-task networks of the same seed. It is
    the mean over tasks of the relative change of `Task.relative` (Maninis, Radosavovic, Kokkinos 2019, eq. 4), NaN
    where a task has no number."""
    changes = []
    for task in tasks.values():
        means = _mean(values_of(scores, cases, task.relative.place), 2)  # [rows, seeds]
        alone = means[list(scores).index(single)]
        with np.errstate(divide="ignore", invalid="ignore"):
            changes.append((-1 if task.relative.less_is_better else 1) * (means - alone) / alone)
    return 100 * np.mean(changes, axis=0)


def subject_means(scores: Scores, cases: Sequence[str], place: Sequence[str]) -> np.ndarray:
    """The number at a place of the metrics, [rows, cases], averaged over the seeds that have it; NaN if none has."""
    return _mean(values_of(scores, cases, place), 1)


def to_markdown(sections: Sequence[Section], rules: Mapping[str, str]) -> str:
    """The sections as a Markdown document. `rules` says how each number is measured."""
    parts = []
    for title, tables, notes in sections:
        parts.append(f"## {title}\n")
        parts += [f"{table.caption}\n\n{markdown(table)}" for table in tables]
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    parts.append("## How the numbers are measured\n")
    parts.append("\n".join(f"- {term}: {rule}" for term, rule in rules.items()) + "\n")
    return "\n".join(parts)


def values_of(scores: Scores, cases: Sequence[str], place: Sequence[str]) -> np.ndarray:
    """The number at a place of the metrics, [rows, seeds, cases]; NaN where there is none."""
    return np.array(
        [[[number_at(by_case[case], place) for case in cases] for by_case in row.values()] for row in scores.values()],
        dtype=float,
    )


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean along an axis of the values that aren't NaN; NaN where all are."""
    return np.ma.masked_invalid(values).mean(axis).filled(np.nan)


def _overview(scores: Scores, cases: Sequence[str], tasks: Mapping[str, Task], about: Rows) -> Table:
    """The table of each task's number with its SD over seeds, the published number, Delta p, and the cost of each
    row."""
    header, rows = ["Method"], [[name] for name in scores]

    def column(title: str, cells: Sequence[str]) -> None:
        header.append(title)
        for row, text in zip(rows, cells, strict=True):
            row.append(text)

    for name, task in tasks.items():
        measure = task.relative
        means = measure.factor * _mean(values_of(scores, cases, measure.place), 2)
        column(f"{name}: {measure.title}", _marked(means, measure))
        if any(name in row for row in about.published.values()):
            texts = [_number(about.published.get(row, {}).get(name), measure.digits) for row in scores]
            column(f"{name}: published", texts)
    if about.single is not None:
        column("Delta p [%]", _marked(relative_change(scores, cases, tasks, about.single), _DELTA))
    column("parameters", [f"{about.parameters[row]:,}" for row in scores])
    column("MFLOPs per image", [f"{about.flops[row] / 1e6:.1f}" for row in scores])
    return Table("Overview: mean (SD over seeds)", header, rows)


_DELTA = Measure("Delta p [%]", (), 1)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _marked(by_seed: np.ndarray, measure: Measure) -> list[str]:
    """The cells of a column from values [rows, seeds]. The best and the second best are marked."""
    spreads = [spread(row[np.isfinite(row)]) for row in by_seed]
    marks = _marks([one["mean"] for one in spreads], measure)
    texts = [_over_seeds(one, measure.digits, by_seed.shape[1]) for one in spreads]
    return [f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True)]


def _over_seeds(one: Mapping[str, Any], digits: int, seeds: int) -> str:
    """A cell with the mean and the SD over seeds; with one seed the mean alone."""
    return _number(one["mean"], digits) if seeds == 1 else cell(one, digits, seeds)


def _about_overview(tasks: Mapping[str, Task], about: Rows) -> list[str]:
    found = []
    if about.single is not None:
        numbers = " and ".join(f"{name}: {task.relative.title}" for name, task in tasks.items())
        found.append(
            f"Delta p: by how many percent a row is better than {about.single}, the mean over tasks of the relative "
            f"change ({numbers}), for each seed."
        )
    found.append(
        "Parameters: weights that were trained, of all networks of a row; MFLOPs: of one pass of all of them over one "
        "image, a multiplication and an addition counting as two."
    )
    return found


def _score_table(caption: str, scores: Scores, cases: Sequence[str], columns: Sequence[Measure]) -> Table:
    """A table with a row for each method. It has no rows if no method has a number in the first column."""
    cells = []
    for measure in columns:
        values = measure.factor * subject_means(scores, cases, measure.place)
        if measure is columns[0] and not np.isfinite(values).any():
            return Table(caption, [], [])
        spreads = [spread(row[np.isfinite(row)]) for row in values]
        marks = _marks([row["mean"] for row in spreads], measure)
        texts = [cell(row, measure.digits, len(cases), measure.sd) for row in spreads]
        cells.append([f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True)])
    rows = [[name, *row] for name, *row in zip(scores, *cells, strict=True)]
    return Table(caption, ["Method", *(measure.title for measure in columns)], rows)


def _marks(means: Sequence[float | None], measure: Measure) -> list[str]:
    """The mark of each mean: `**` for the best and `*` for the second best, else "". Means that are printed alike have
    the same mark. A measure with a sign has no marks."""
    if measure.signed:
        return [""] * len(means)
    shown = [None if mean is None else round(mean, measure.digits) for mean in means]
    ranking = sorted({value for value in shown if value is not None}, reverse=not measure.less_is_better)
    marks = dict(zip(ranking, ("**", "*"), strict=False))
    return ["" if value is None else marks.get(value, "") for value in shown]


def _test_table(compared: Sequence[Mapping[str, Any]], measures: Sequence[Measure], reference: str) -> Table:
    digits = {measure.title: measure.digits for measure in measures}
    header, rows = ["Against"], {row["method"]: [row["method"]] for row in compared}
    for title in dict.fromkeys(row["measure"] for row in compared):
        header += [f"{title}: difference", "n", "p", "p (Holm)"]
    for row in compared:
        p = ["-" if row[key] is None else f"{row[key]:.3g}" for key in ("p", "p_holm")]
        difference = "-" if row["difference"] is None else f"{row['difference']:+.{digits[row['measure']]}f}"
        rows[row["method"]] += [difference, str(row["n"]), *p]
    return Table(f"{reference} minus each other row", header, list(rows.values()))


def _about_tests(compared: Sequence[Mapping[str, Any]], measures: Sequence[Measure], reference: str) -> list[str]:
    """Sentences that say which tests were done, and the least p that so many subjects can give."""
    if not compared:
        return []
    n = max(row["n"] for row in compared)
    others = len({row["method"] for row in compared})
    compared_measures = [measure for measure in measures if measure.title in {row["measure"] for row in compared}]
    tests = {_test_of(measure, n) for measure in compared_measures}
    what = {
        "wilcoxon": "paired two-sided Wilcoxon signed-rank test over subjects",
        "bootstrap": f"paired two-sided bootstrap over subjects ({RESAMPLES} resamples)",
    }
    named = " or ".join(text for test, text in what.items() if test in tests)
    found = [
        f"Tests: {reference} against each other row, {named}, seeds averaged first (so they say nothing of other "
        f"seeds); p (Holm) is corrected for the {others} comparisons of a measure."
    ]
    if "wilcoxon" in tests:
        least = 2 / 2**n
        bound = f"With {n} subjects the least p is 2/2^{n} = {least:.3g}"
        if least > 0.05:
            found.append(f"{bound}: no difference, whatever its size, can reach 0.05.")
        elif others * least > 0.05:
            found.append(f"{bound}, corrected for {others} comparisons {others * least:.3g}: it cannot reach 0.05.")
        else:
            found.append(f"{bound}, corrected for {others} comparisons {min(1.0, others * least):.3g}.")
    return found


def _seed_table(scores: Scores, cases: Sequence[str], measures: Sequence[Measure]) -> Table:
    header, rows = ["Method"], [[name] for name in scores]
    for measure in measures:
        means = measure.factor * _mean(values_of(scores, cases, measure.place), 2)  # [rows, seeds]
        if np.isfinite(means).any():
            header.append(measure.title)
            for row, values in zip(rows, means, strict=True):
                row.append(_over_seeds(spread(values[np.isfinite(values)]), measure.digits, len(values)))
    return Table("Spread over seeds of the mean over subjects: mean (SD over seeds)", header, rows)
