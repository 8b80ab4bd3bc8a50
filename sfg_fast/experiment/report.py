"""What an experiment leaves to read: metrics.json, table.md, report.html, and its figures as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.cohort import Case, load_case
from ..evaluation import figures, html
from ..evaluation.predict import Predictor
from ..evaluation.report import activation_maps, telling_slice
from ..files import make_folder, read_text, replacing, write_json
from ..networks.controls import map_assignment, sfg_layers
from ..reference import SFGConv2d
from .config import ALL, ExperimentConfig, Job, reference_row
from .table import OVERALL, Scores, Section, comparisons, section, subject_means, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_results(
    config: ExperimentConfig,
    every: Sequence[Job],
    documents: Mapping[str, Mapping[int, Any]],
    subsets: Mapping[str, list[str]],
    shown: Case,
) -> None:
    """Write the results into `config.out`, each file whole or not at all.

    every: the jobs, all done; documents: {row: {seed: its metrics.json}}; subsets: {name: test cases}, all of them
    under "all"; shown: the case whose activation maps are drawn.
    """
    out, reference = Path(config.out), reference_row(config)
    scores = {row: {seed: document["cases"] for seed, document in seeds.items()} for row, seeds in documents.items()}
    conventions = next(iter(next(iter(documents.values())).values()))["conventions"]
    write_json(
        out / "metrics.json",
        {
            "conventions": conventions,
            "reference": reference,
            "subsets": subsets,
            "methods": {row: {str(seed): cases for seed, cases in seeds.items()} for row, seeds in scores.items()},
            "tests": {name: comparisons(scores, cases, reference) for name, cases in subsets.items()},
        },
    )
    label_names = conventions["label_names"]
    sections = [
        section(_title(name, len(cases)), scores, cases, label_names, reference) for name, cases in subsets.items()
    ]
    with replacing(out / "table.md") as partial:
        partial.write_text(to_markdown(sections, conventions["rules"]), encoding="utf-8")
    drawn = _figures(config, every, scores, subsets[ALL], shown)
    make_folder(out / "figures")
    for name, _, figure in drawn:
        figures.save(figure, out / "figures" / f"{name}.png")
    pictures = "".join(html.figure(caption, figure) for _, caption, figure in drawn)
    html.write_page(
        out / "report.html",
        f"sfg_fast: experiment {out.resolve().name}",
        [
            *map(_html, sections),
            html.section("Figures", pictures),
            html.section("Measures", html.conventions(conventions["rules"])),
        ],
        read_text(out / "experiment.yaml"),
    )


def _title(name: str, count: int) -> str:
    return f"All {count} test cases" if name == ALL else f"{name}: the first {count} test cases"


def _html(part: Section) -> str:
    return html.section(part.title, "".join(map(html.table, part.tables)) + html.bullets(part.notes))


def _figures(
    config: ExperimentConfig, every: Sequence[Job], scores: Scores, cases: Sequence[str], shown: Case
) -> list[tuple[str, str, Figure]]:
    """(file name, caption, figure): all subjects; and what every row that learns its grouping has learnt, with the
    first seed."""
    measures = [measure for measure in OVERALL if not measure.less_is_better]
    strips = {
        measure.title: dict(zip(scores, subject_means(scores, cases, measure.place).tolist(), strict=True))
        for measure in measures
    }
    drawn = [("subjects", "Each test case, averaged over seeds; a bar is a method's mean.", figures.subjects(strips))]
    for job in every:
        if job.trainings[0].network.method != "sfg" or job.seed != config.seeds[0]:
            continue
        predictor = Predictor(job.folder, config.train.device)
        history = predictor.history
        case = load_case(shown, {})
        z = telling_slice(case)
        maps = activation_maps(predictor, case.inputs, z)
        of = f"{job.row}, seed {job.seed}"
        drawn += [
            (
                f"allocation {job.row}",
                f"{of}: share of the kernels' probability in each group, by layer (paper, Fig. 3 left).",
                figures.allocation(history),
            ),
            (
                f"activation_maps {job.row}",
                f"{of}: activations of the kernels whose group is surest, lowest entropy first (paper, Fig. 3 right).",
                figures.activation_maps(case.inputs[0, z], maps, (case.grid.spacing[1], case.grid.spacing[2])),
            ),
            (
                f"allocation_over_training {job.row}",
                f"{of}: allocation over training.",
                figures.allocation_over_training(history),
            ),
            (f"entropy {job.row}", f"{of}: mean entropy of the grouping probabilities.", figures.entropy(history)),
            (
                f"architecture {job.row}",
                f"{of}: the most probable architecture: kernels of each group, and who reads them.",
                figures.architecture(_kernels(predictor), history["groups"]),
            ),
        ]
    return drawn


def _kernels(predictor: Predictor) -> dict[str, list[int]]:
    """Kernels of each group in every SFG layer of the most probable architecture, in network order."""
    best = map_assignment(predictor.model)
    by_logits = {layer.logits: best[name] for name, layer in sfg_layers(predictor.model).items()}
    return {
        name: torch.bincount(by_logits[module.logits], minlength=module.logits.shape[1]).tolist()
        for name, module in predictor.model.named_modules()
        if isinstance(module, SFGConv2d)
    }
