"""The results of an experiment as files: metrics.json, table.md, report.html, and the figures as PNG."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.cohort import Case, load_case
from ..data.targets import Target
from ..evaluation import figures, html
from ..evaluation.metrics import captioned
from ..evaluation.predict import Predictor
from ..evaluation.report import activation_maps, course, telling_slice
from ..files import make_folder, read_text, replacing, write_json
from ..layer import SFGLayer
from ..networks.controls import map_assignment, sfg_layers
from ..tasks import Measure, measured_by, read_tasks, to_json
from .config import ALL, ExperimentConfig, Job, method_of, reference_row
from .table import FEW, Rows, Scores, Section, comparisons, section, subject_means, to_compare, to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_results(
    config: ExperimentConfig,
    every: Sequence[Job],
    documents: Mapping[str, Mapping[int, Any]],
    subsets: Mapping[str, list[str]],
    shown: Case | None,
    targets: Mapping[str, Target],
) -> None:
    """Write the results into `config.out`, each file whole or not at all.

    Args:
        config: the configuration of the experiment.
        every: the jobs; all are done.
        documents: {row: {seed: content of the job's metrics.json}}.
        subsets: the names of the test cases in each subset; "all" has all of them.
        shown: the case whose activation maps are drawn; None for none.
        targets: the cohort's targets.
    """
    out, reference = Path(config.out), reference_row(config)
    scores = {row: {seed: document["cases"] for seed, document in seeds.items()} for row, seeds in documents.items()}
    tasks = measured_by(read_tasks(config.train.tasks, targets), config.metrics)
    measures, about = to_compare(tasks), _about(config, documents)
    rules = {
        f"{name}: {term}" if len(tasks) > 1 else term: rule
        for name, task in tasks.items()
        for term, rule in task.rules().items()
    } | {"metrics": config.metrics, "predictions": _predicted_by(config)}
    write_json(
        out / "metrics.json",
        {
            "metrics": config.metrics,
            "tasks": to_json(tasks),
            "rules": rules,
            "reference": reference,
            "published": about.published,
            "parameters": about.parameters,
            "flops": about.flops,
            "subsets": subsets,
            "methods": {row: {str(seed): cases for seed, cases in seeds.items()} for row, seeds in scores.items()},
            "tests": {name: comparisons(scores, cases, measures, reference) for name, cases in subsets.items()},
        },
    )
    sections = [
        section(_title(name, len(cases), config.split), scores, cases, tasks, reference, about)
        for name, cases in subsets.items()
    ]
    with replacing(out / "table.md") as partial:
        partial.write_text(to_markdown(sections, rules), encoding="utf-8")
    drawn = _subjects(scores, subsets[ALL], measures, config.metrics) + _learnt(config, every, shown, targets)
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
            html.section("Measures", html.conventions(rules)),
        ],
        read_text(out / "experiment.yaml"),
    )


def _about(config: ExperimentConfig, documents: Mapping[str, Mapping[int, Any]]) -> Rows:
    methods = config.methods
    one_task = [name for name in methods if method_of(config, name) == "one_task"]
    return Rows(
        published={name: row["published"] for name, row in methods.items() if "published" in row},
        parameters={name: next(iter(seeds.values()))["parameters"] for name, seeds in documents.items()},
        flops={name: statistics.fmean(one["flops"] for one in seeds.values()) for name, seeds in documents.items()},
        single=one_task[0] if one_task else None,
    )


def _predicted_by(config: ExperimentConfig) -> str:
    drawn = f"over {config.draws} drawn ones"
    by = {
        "map": f"by the most probable architecture; where p is constant, the mean {drawn}",
        "draws": f"the mean {drawn}, where architectures or dropped channels are drawn at all",
        "mode": f"the mean of numbers and the most frequent class {drawn}, where any are drawn",
    }
    weights = {"final": "the last weights", "best": "those of the best look at the validation split"}
    own = {name: row["by"] for name, row in config.methods.items() if "by" in row}
    rows = "".join(f"; {name} by {way}" for name, way in own.items())
    return f"{by[config.by]}{rows}; {weights[config.checkpoint]}; normalised by {config.statistics} statistics"


def _title(name: str, count: int, split: str) -> str:
    return f"All {count} {split} cases" if name == ALL else f"{name}: the first {count} {split} cases"


def _html(part: Section) -> str:
    return html.section(part.title, "".join(map(html.table, part.tables)) + html.bullets(part.notes))


def _subjects(
    scores: Scores, cases: Sequence[str], measures: Sequence[Measure], profile: str
) -> list[tuple[str, str, Figure]]:
    """(file name, caption, figure) of the scores of all subjects; empty if there are too many to tell them apart."""
    if len(cases) > FEW:
        return []
    strips = {
        measure.title: dict(
            zip(scores, (measure.factor * subject_means(scores, cases, measure.place)).tolist(), strict=True)
        )
        for measure in measures
    }
    caption = captioned("Each test case, averaged over seeds; a bar is a method's mean", profile) + "."
    return [("subjects", caption, figures.subjects(strips))]


def _learnt(
    config: ExperimentConfig, every: Sequence[Job], shown: Case | None, targets: Mapping[str, Target]
) -> list[tuple[str, str, Figure]]:
    """(file name, caption, figure) of the groupings: those that the rows of method sfg have learnt with the first
    seed."""
    drawn = []
    for job in every:
        if config.methods[job.row].get("method") != "sfg" or job.seed != config.seeds[0]:
            continue
        predictor = Predictor(job.folder, config.train.device, config.checkpoint)
        history = course(job.folder, predictor)
        of = f"{job.row}, seed {job.seed}"
        drawn += [
            (
                f"allocation {job.row}",
                f"{of}: share of the kernels' probability in each group, by layer (paper, Fig. 3 left).",
                figures.allocation(history),
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
        if shown is not None:
            case = load_case(shown, targets)
            z = telling_slice(case, targets)
            seen, maps = activation_maps(predictor, case.inputs, z)
            caption = "activations of the kernels whose group is surest, lowest entropy first (paper, Fig. 3 right)."
            spacing = (case.grid.spacing[1], case.grid.spacing[2])
            picture = figures.activation_maps(seen, maps, spacing)
            drawn.append((f"activation_maps {job.row}", f"{of}: {caption}", picture))
    return drawn


def _kernels(predictor: Predictor) -> dict[str, list[int]]:
    """How many kernels each group has in every SFG layer of the most probable architecture, in network order."""
    best = map_assignment(predictor.model)
    by_logits = {layer.logits: best[name] for name, layer in sfg_layers(predictor.model).items()}
    return {
        name: torch.bincount(by_logits[module.logits], minlength=module.logits.shape[1]).tolist()
        for name, module in predictor.model.named_modules()
        if isinstance(module, SFGLayer)
    }
