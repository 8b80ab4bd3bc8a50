"""Writes report.html: one file that a colleague can open from a mail, with numbers, figures and the configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replacing
from ..tables import Table
from ..tasks import Measure, Task, of_images, profile_of
from .figures import to_data_uri
from .metrics import captioned, columns, number_of, rules_of, summary_tables, summary_value, tasks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6876; --line: #dde3e9; --tint: #f4f7f9; --accent: #2f6ca8; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: #fff; color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 1.5rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .9rem; padding-bottom: .3rem; font-size: 1.25rem; border-bottom: 1px solid var(--line); }
.cards { display: flex; flex-wrap: wrap; gap: .9rem; }
.card { flex: 1 1 11rem; padding: .9rem 1.1rem; background: var(--tint); border-top: 3px solid var(--accent); }
.card b { display: block; font-size: 1.65rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { display: block; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; margin-bottom: 1.4rem; }
table { border-collapse: collapse; min-width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; text-align: left; font-weight: 600; }
th, td { padding: .4rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 500; }
tbody tr:hover { background: var(--tint); }
.conventions { padding: .8rem 1.1rem; background: var(--tint); color: var(--soft); font-size: .85rem; }
.conventions dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .4rem 0 0; }
.conventions dt { font-family: ui-monospace, Menlo, Consolas, monospace; color: var(--ink); }
.conventions dd { margin: 0; }
figure { margin: 0 0 2.2rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .9rem; }
summary { cursor: pointer; }
pre { padding: 1rem; overflow-x: auto; background: var(--tint); font-size: .85rem; line-height: 1.45; }
@media print { .card, figure, tr { break-inside: avoid; } }
"""


def write_report(
    path: Path,
    title: str,
    *,
    config_yaml: str,
    document: Mapping[str, Any] | None,
    figures: Sequence[tuple[str, Figure]],
    notes: Sequence[str],
) -> None:
    """Writes the report of one run as a single HTML page without script or link, whole or not at all.

    Args:
        path: the HTML file; its folder must exist.
        title: heading of the page.
        config_yaml: the run's configuration, which is shown as it is.
        document: what `sfg_fast.evaluation.metrics.metrics_document` gave (or metrics.json); None: the page has no
            numbers.
        figures: (caption, figure) in the order of the page; they are embedded as PNG.
        notes: sentences that the reader should know before the numbers.
    """
    sections = []
    if document:
        sections.append(_cards(document))
    if notes:
        sections.append(section("Notes", bullets(notes)))
    if document:
        tables = "".join(map(table, summary_tables(document)))
        sections.append(section("Results", tables + conventions(rules_of(document))))
    if figures:
        sections.append(section("Figures", "".join(figure(caption, drawn) for caption, drawn in figures)))
    if document and not of_images(tasks_of(document)):  # images have no rows: they may be thousands, and show persons
        sections.append(section("Cases", table(_case_table(document))))
    write_page(path, title, sections, config_yaml)


def write_page(path: Path, title: str, sections: Sequence[str], config_yaml: str) -> None:
    """Writes a page of sections in HTML, whole or not at all. The configuration becomes the last section."""
    configuration = f"<details><summary>Show the configuration</summary><pre>{escape(config_yaml)}</pre></details>"
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *sections, section("Configuration", configuration)])
        + "\n</body>\n</html>\n"
    )
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")


def section(title: str, content: str) -> str:
    """A section of the page in HTML. title: plain text. content: HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def bullets(sentences: Sequence[str]) -> str:
    """Sentences as a list in HTML."""
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _cards(document: Mapping[str, Any]) -> str:
    """The headline numbers in HTML: the mean over the cases, and the SD beneath."""
    cards = [_card(task, measure, document) for task in _scored(document) for measure in task.measures]
    return f'<div class="cards">{"".join(cards)}</div>'


def _scored(document: Mapping[str, Any]) -> list[Task]:
    return [task for name, task in tasks_of(document).items() if name in document["summary"]]


def _card(task: Task, measure: Measure, document: Mapping[str, Any]) -> str:
    value = summary_value(document, measure)
    unit = f" {escape(measure.unit)}" if measure.unit else ""
    n, kind = value["n"], "image" if task.per_image else "case"
    mean = _number(value["mean"], measure)
    sd = f"SD {_number(value['sd'], measure._replace(signed=False))}{unit}, " if measure.sd else ""
    about = captioned(f"{sd}{n} {kind}{'' if n == 1 else 's'}", task.profile)
    name = f"{task.title}: {measure.title.partition(' [')[0]}"
    return f'<div class="card"><span>{escape(name)}</span><b>{mean}{unit}</b><span>{about}</span></div>'


def conventions(rules: Mapping[str, str]) -> str:
    """A box in HTML that says how the numbers are measured. rules: those of `rules_of`."""
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(rule)}</dd>" for term, rule in rules.items())
    return f'<aside class="conventions"><strong>How these numbers are measured</strong><dl>{terms}</dl></aside>'


def _case_table(document: Mapping[str, Any]) -> Table:
    """A table with one row per case: the headline numbers and the details of each task, or a hyphen where there is no
    number."""
    shown = columns((task, (*task.measures, *task.details)) for task in _scored(document))
    rows = [
        [name, *(_number(number_of(case, measure), measure) for _, measure in shown)]
        for name, case in document["cases"].items()
    ]
    return Table(captioned("Each case", profile_of(tasks_of(document))), ["Case", *(one.title for one in shown)], rows)


def table(part: Table) -> str:
    """A table with its caption in HTML. Cells (but not the first of a row) may be **bold** or *italic* as in
    Markdown."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in part.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{_emphasised(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in part.rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(part.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _emphasised(cell: str) -> str:
    for mark, tag in (("**", "b"), ("*", "i")):
        if cell.startswith(mark) and cell.endswith(mark):
            return f"<{tag}>{escape(cell.strip('*'))}</{tag}>"
    return escape(cell)


def figure(caption: str, drawn: Figure) -> str:
    """A figure in HTML: a PNG inside the page, and the caption beneath."""
    text = escape(caption)
    return f'<figure><img src="{to_data_uri(drawn)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _number(value: float | None, measure: Measure) -> str:
    return "-" if value is None else format(value, f"{'+' if measure.signed else ''}.{measure.digits}f")
