"""The ways of predicting of an experiment on images that is done: argmax p, the mean or the mode of draws, running or
batch statistics, the last or the best weights; each task's number over the scored images, the mean over seeds.

    python -m benchmarks.experiment.ways OUT [--draws 16] [--rows MT-SFG ..]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from sfg_fast.data import Case, read_cohort
from sfg_fast.evaluation.metrics import case_metrics
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.tables import Table, markdown, number_at
from sfg_fast.tasks import Task

WAYS = list(itertools.product(("final", "best"), ("map", "draws", "mode"), ("running", "batch")))


def numbers(
    folders: list[Path], cases: list[Case], draws: int, way: tuple[str, str, str]
) -> tuple[dict[str, Task], dict[str, float]]:
    """The tasks of one row with one seed (one-task: of several networks), and the mean of each one's number."""
    checkpoint, by, statistics = way
    tasks: dict[str, Task] = {}
    predicted: dict[str, np.ndarray] = {}
    for folder in folders:
        predictor = Predictor(folder, "cpu", checkpoint)
        tasks |= predictor.tasks
        drawn = draws if predictor.draws_anything and by != "map" else 0
        drawn = draws if predictor.constant_p else drawn
        found = predictor.of_images(cases, drawn, by if drawn else "map", statistics)
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
    options = parser.parse_args()
    config = yaml.safe_load((options.out / "experiment.yaml").read_text())
    cases = list(read_cohort(config["cohort"]).split(config["split"]))
    header: list[str] = []
    rows = []
    for row, way in tqdm(list(itertools.product(options.rows or config["methods"], WAYS))):
        alone = config["methods"][row]["method"] == "one_task"
        by_seed = []
        for seed in config["seeds"]:
            folder = options.out / "runs" / row / f"seed_{seed}"
            folders = sorted(one.parent for one in folder.glob("*/config.yaml")) if alone else [folder]
            if not (folder / "metrics.json").exists():
                continue
            tasks, found = numbers(folders, cases, options.draws, way)
            header = [
                "Row",
                "weights",
                "by",
                "statistics",
                *(f"{name}: {t.relative.title}" for name, t in tasks.items()),
            ]
            by_seed.append(found)
        if by_seed:
            means = {name: np.mean([one[name] for one in by_seed]) for name in by_seed[0]}
            rows.append([row, *way, *(f"{means[name]:.2f}" for name in means)])
    command = f"python -m benchmarks.experiment.ways OUT --draws {options.draws}"
    print(f"`{command}` ({json.dumps(config['seeds'])}: seeds, {len(cases)} images of split {config['split']})\n")
    print(markdown(Table("", header, rows)))


if __name__ == "__main__":
    main()
