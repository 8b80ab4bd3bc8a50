"""Compares ways to predict with the networks of a finished experiment on images: argmax p, the mean or the mode of
draws, each with running or batch statistics. The table has each task's number over the scored images, the mean over
seeds.

    python -m benchmarks.experiment.ways OUT [--draws 16] [--rows MT-SFG ..] [--seeds 0 ..]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from sfg_fast.data import Case, read_cohort
from sfg_fast.data.images import load_images
from sfg_fast.evaluation.metrics import case_metrics
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.tables import Table, markdown, number_at
from sfg_fast.tasks import Task

WAYS = list(itertools.product(("map", "draws", "mode"), ("running", "batch")))


def numbers(
    predictors: list[Predictor], cases: list[Case], draws: int, way: tuple[str, str]
) -> tuple[dict[str, Task], dict[str, float]]:
    """The tasks of one row with one seed (with one-task of several networks), and each task's number over the
    images."""
    by, statistics = way
    tasks: dict[str, Task] = {}
    predicted: dict[str, np.ndarray] = {}
    for predictor in predictors:
        tasks |= predictor.tasks
        assert predictor.images is not None
        images = load_images(cases, predictor.images)
        found = predictor.of_images(images, 0 if by == "map" else draws, by, statistics)
        predicted |= {name: parts[""] for name, parts in found.items()}
    scored = [
        case_metrics(tasks, case.values, {name: values[i] for name, values in predicted.items()}, None)
        for i, case in enumerate(cases)
    ]
    return tasks, {name: _mean(task, scored) for name, task in tasks.items()}


def _mean(task: Task, scored: list[dict[str, Mapping[str, float]]]) -> float:
    values = [value for one in scored if (value := number_at(one, task.relative.place)) is not None]
    return task.relative.factor * float(np.mean(values))


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int)
    options = parser.parse_args()
    config = yaml.safe_load((options.out / "experiment.yaml").read_text())
    cases = list(read_cohort(config["cohort"]).split(config["split"]))
    header: list[str] = []
    rows = []
    seeds = options.seeds or config["seeds"]
    for row in tqdm(options.rows or list(config["methods"])):
        folders = [options.out / "runs" / row / f"seed_{seed}" for seed in seeds]
        alone = config["methods"][row]["method"] == "one_task"
        of_seeds = [
            [Predictor(one.parent, "cpu") for one in sorted(folder.glob("*/config.yaml" if alone else "config.yaml"))]
            for folder in folders
        ]
        for way in WAYS:
            draws_nothing = not any(one.draws_anything for one in of_seeds[0])
            if (way[0] != "map" and draws_nothing) or (way[0] == "map" and of_seeds[0][0].constant_p):
                continue
            found = [numbers(predictors, cases, options.draws, way) for predictors in of_seeds]
            tasks = found[0][0]
            header = ["Row", "by", "statistics", *(f"{name}: {one.relative.title}" for name, one in tasks.items())]
            means = [float(np.mean([numbers_of[name] for _, numbers_of in found])) for name in tasks]
            rows.append([row, *way, *(f"{mean:.2f}" for mean in means)])
    command = f"python -m benchmarks.experiment.ways OUT --draws {options.draws}"
    print(f"`{command}`: seeds {seeds}, {len(cases)} images of split {config['split']}\n")
    print(markdown(Table("", header, rows)))


if __name__ == "__main__":
    main()
