"""The tables of an experiment: Table 1 for every row, and how sure its differences are.

Scores of a row are `{seed: {case: case_metrics}}`; `Scores` are those of all rows, in the order of the table. Whatever
is averaged, the seeds are averaged first, for each subject; then mean and SD are over subjects, and so are the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.metrics import Table, cell, heading, markdown, number_at, organ_values, spread

Scores = Mapping[str, Mapping[int, Mapping[str, Any]]]


class Measure(NamedTuple):
    """A column: its heading, where its number is in a case's metrics, decimals, and whether less is better."""

    title: str
    place: tuple[str, ...]
    digits: int
    less_is_better: bool = False


class Section(NamedTuple):
    """Tables of the same cases under a title, and sentences about them."""

    title: str
    tables: list[Table]
    notes: list[str]


OVERALL = (
    Measure("PSNR in mask [dB]", ("ct", "overall", "psnr_in_mask"), 2),
    Measure("MAE [HU]", ("ct", "overall", "mae_hu"), 1, less_is_better=True),
    Measure("Dice", ("dice_mean",), 3),
)
"""What is tested."""

_CT_TABLES = (
    ("(a) CT synthesis: PSNR in the mask [dB]", "psnr_in_mask", 2, False),
    ("(a) CT synthesis: PSNR with zero outside [dB]", "psnr_zero_outside", 2, False),
    ("(a) CT synthesis: MAE [HU]", "mae_hu", 1, True),
)


def section(
    title: str, scores: Scores, cases: Sequence[str], label_names: Mapping[str, int], reference: str
) -> Section:
    """Table 1 (a) and (b), the tests of the row `reference` against each other row, and the spread over seeds, for
    these cases. What nobody was scored for is left out."""
    organs = list(organ_values(label_names))
    tables = []
    for caption, key, digits, less in _CT_TABLES:
        regions = ["overall", "bones", "organs", *organs]
        columns = [Measure(heading(region), ("ct", region, key), digits, less) for region in regions]
        tables.append(_score_table(caption, scores, cases, columns))
    columns = [Measure("Overall", ("dice_mean",), 3)]
    columns += [Measure(heading(organ), ("dice", organ), 3) for organ in organs]
    tables.append(_score_table("(b) Segmentation: Dice", scores, cases, columns))
    compared = comparisons(scores, cases, reference)
    seeds = len(next(iter(scores.values())))
    return Section(
        title,
        [table for table in (*tables, _test_table(compared, reference), _seed_table(scores, cases)) if table.rows],
        [
            f"Cells are mean (SD) over {len(cases)} subjects, each averaged over {seeds} seeds first. Bold: best; "
            "italic: second best.",
            *_about_tests(compared, reference),
        ],
    )


def comparisons(scores: Scores, cases: Sequence[str], reference: str) -> list[dict[str, Any]]:
    """The row `reference` against each other row, for each measure of `OVERALL` that there is.

    Returns a list of {"measure", "method", "n": subjects with both numbers, "difference": mean of reference minus
    other, "p": of a paired two-sided Wilcoxon signed-rank test, "p_holm": corrected for the comparisons of the
    measure}; the last three are None for n = 0.
    """
    found = []
    for measure in OVERALL:
        values = subject_means(scores, cases, measure.place)
        if not np.isfinite(values).any():
            continue
        own = values[list(scores).index(reference)]
        rows: list[dict[str, Any]] = []
        for name, other in zip(scores, values, strict=True):
            if name != reference:
                difference = (own - other)[np.isfinite(own - other)]
                some = len(difference) > 0
                rows.append(
                    {
                        "measure": measure.title,
                        "method": name,
                        "n": len(difference),
                        "difference": float(difference.mean()) if some else None,
                        "p": wilcoxon(difference) if some else None,
                    }
                )
        tested = [row for row in rows if row["p"] is not None]
        corrected = iter(holm([row["p"] for row in tested]))
        found += [{**row, "p_holm": None if row["p"] is None else next(corrected)} for row in rows]
    return found


def wilcoxon(differences: np.ndarray) -> float:
    """p of the two-sided Wilcoxon signed-rank test of paired differences [n]; 1 where all are zero."""
    from scipy import stats

    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p of several tests, corrected after Holm (1979), in the same order."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def subject_means(scores: Scores, cases: Sequence[str], place: Sequence[str]) -> np.ndarray:
    """[rows, cases]: the number at a place of the metrics, averaged over the seeds that have one; NaN without any."""
    return _mean(_values(scores, cases, place), 1)


def to_markdown(sections: Sequence[Section], rules: Mapping[str, str]) -> str:
    """Sections as a Markdown document. rules: how the numbers are measured, from a `metrics_document`."""
    parts = []
    for title, tables, notes in sections:
        parts.append(f"## {title}\n")
        parts += [f"{table.caption}\n\n{markdown(table)}" for table in tables]
        parts.append("\n".join(f"- {note}" for note in notes) + "\n")
    parts.append("## How the numbers are measured\n")
    parts.append("\n".join(f"- {term}: {rule}" for term, rule in rules.items()) + "\n")
    return "\n".join(parts)


def _values(scores: Scores, cases: Sequence[str], place: Sequence[str]) -> np.ndarray:
    """[rows, seeds, cases], NaN where there is no number."""
    return np.array(
        [[[number_at(by_case[case], place) for case in cases] for by_case in row.values()] for row in scores.values()],
        dtype=float,
    )


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Over what is no NaN; NaN where everything is."""
    return np.ma.masked_invalid(values).mean(axis).filled(np.nan)


def _score_table(caption: str, scores: Scores, cases: Sequence[str], columns: Sequence[Measure]) -> Table:
    """A row for each method; without any rows, if no method has a number in the first column."""
    cells = []
    for measure in columns:
        values = subject_means(scores, cases, measure.place)
        if measure is columns[0] and not np.isfinite(values).any():
            return Table(caption, [], [])
        spreads = [spread(row[np.isfinite(row)]) for row in values]
        marks = _marks([row["mean"] for row in spreads], measure)
        texts = [cell(row, measure.digits, len(cases)) for row in spreads]
        cells.append([f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True)])
    rows = [[name, *row] for name, *row in zip(scores, *cells, strict=True)]
    return Table(caption, ["Method", *(measure.title for measure in columns)], rows)


def _marks(means: Sequence[float | None], measure: Measure) -> list[str]:
    """`**` for the best and `*` for the second best, as they are printed: what reads the same is marked the same."""
    shown = [None if mean is None else round(mean, measure.digits) for mean in means]
    ranking = sorted({value for value in shown if value is not None}, reverse=not measure.less_is_better)
    marks = dict(zip(ranking, ("**", "*"), strict=False))
    return ["" if value is None else marks.get(value, "") for value in shown]


def _test_table(compared: Sequence[Mapping[str, Any]], reference: str) -> Table:
    digits = {measure.title: measure.digits for measure in OVERALL}
    header, rows = ["Against"], {row["method"]: [row["method"]] for row in compared}
    for title in dict.fromkeys(row["measure"] for row in compared):
        header += [f"{title}: difference", "n", "p", "p (Holm)"]
    for row in compared:
        p = ["-" if row[key] is None else f"{row[key]:.3g}" for key in ("p", "p_holm")]
        difference = "-" if row["difference"] is None else f"{row['difference']:+.{digits[row['measure']]}f}"
        rows[row["method"]] += [difference, str(row["n"]), *p]
    return Table(f"{reference} minus each other row", header, list(rows.values()))


def _about_tests(compared: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    """What the tests are, and what so many subjects can show at all."""
    if not compared:
        return []
    n = max(row["n"] for row in compared)
    others = len({row["method"] for row in compared})
    least = 2 / 2**n
    first = (
        f"Tests: {reference} against each other row, paired two-sided Wilcoxon signed-rank test over subjects, seeds "
        f"averaged first; p (Holm) is corrected for the {others} comparisons of a measure."
    )
    bound = f"With {n} subjects the least p is 2/2^{n} = {least:.3g}"
    if least > 0.05:
        return [first, f"{bound}: no difference, whatever its size, can reach 0.05."]
    if others * least > 0.05:
        return [first, f"{bound}, corrected for {others} comparisons {others * least:.3g}: it cannot reach 0.05."]
    return [first, f"{bound}, corrected for {others} comparisons {min(1.0, others * least):.3g}."]


def _seed_table(scores: Scores, cases: Sequence[str]) -> Table:
    header, rows = ["Method"], [[name] for name in scores]
    for measure in OVERALL:
        means = _mean(_values(scores, cases, measure.place), 2)  # [rows, seeds]
        if np.isfinite(means).any():
            header.append(measure.title)
            for row, values in zip(rows, means, strict=True):
                row.append(cell(spread(values[np.isfinite(values)]), measure.digits, len(values)))
    return Table("Spread over seeds of the mean over subjects: mean (SD over seeds)", header, rows)
