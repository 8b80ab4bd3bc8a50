"""The configuration of an experiment: one training, the rows of its table, the seeds. One YAML file holds it."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import check_shape, one_line
from ..networks.methods import METHODS
from ..tasks import PAPER, TaskOptions, check_profile, of_images, read_tasks
from ..training.config import TrainConfig
from ..training.config import check as check_training

PAPER_ROWS: dict[str, dict[str, Any]] = {
    "One-task (HighResNet)": {"method": "one_task"},
    "MT-hard sharing": {"method": "hard_sharing"},
    "MT-constant mask": {"method": "constant_mask"},
    "MT-constant p": {"method": "constant_p"},
    "MT-SFG": {"method": "sfg"},
}
"""The rows of Table 1."""

PER_RUN = {"data", "out", "seed", "folds", "fold"}
"""Options of a training that the experiment sets itself."""

TAKEN = ("network.method", "network.grouping")
"""Options of a training that a row can't set itself, because its `method` and `grouping_of` set them."""

OF_ROWS = ("method", "grouping_of", "runs_of", "by", "published")
"""The keys of a row that are no options of a training."""

ALL = "all"
"""The name of the set of all test cases; `subsets` name others."""


@dataclasses.dataclass
class ExperimentConfig:
    """An experiment.

    Args:
        cohort: folder or list, as for `sfg-fast preprocess`, with train and test cases that have the tasks' targets.
        out: folder to be made: cache/, runs/, metrics.json, table.md, report.html, figures/.
        train: the training of every row: the options of `sfg-fast train`.
        methods: the rows of the table in their order: name -> {method: .., and options of `train` that this row has
            otherwise, such as network.estimator: reinmax}. A row of method retrain names, as grouping_of, the row whose
            learnt grouping it trains anew with the same seed. A row with runs_of in place of a method names another
            row, whose runs it takes: they are not trained again, only predict otherwise. A row may hold `by`, what
            predicts in this row; and, as published, {task: value}: numbers that the overview prints beside the row's
            own (an MAE, a Dice, an accuracy in percent).
        seeds: seeds of weights, draws and examples; each row is trained once with each.
        reference: the row that is tested against each other row; null: the one of method sfg without options of its
            own, else the last.
        split: which cases are predicted and scored: "test"; or "val", to choose settings by.
        subsets: name -> n: the first n of these cases have tables of their own, beside the tables of all cases.
        draws: how many drawn architectures a prediction is the mean (or mode) of. It counts with `by` draws or mode,
            and always where p is constant.
        by: what predicts in all rows but those that say it themselves: "map", the most probable architecture; "draws",
            the mean over drawn ones; "mode", the mean of numbers and the most frequent class, as in the authors' code.
        statistics: "running"; or "batch", normalise with the statistics of what is predicted, as in the authors' code.
        checkpoint: "final", or "best", which is that of the best look at the validation split.
        metrics: what is measured, and how: "paper", as in the paper; "synthrad2025", as in that challenge (CTs and
            labels).
        size: height and width that images are resized to; null for none.
        processes: trainings (and cases of preprocessing) at a time on the CPU. On GPUs: one training for each.
    """

    cohort: str
    out: str
    train: TrainConfig
    methods: dict[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: copy.deepcopy(PAPER_ROWS))
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    reference: str | None = None
    split: str = "test"
    subsets: dict[str, int] = dataclasses.field(default_factory=dict)
    draws: int = 16
    by: str = "map"
    statistics: str = "running"
    checkpoint: str = "final"
    metrics: str = PAPER
    size: list[int] | None = None
    processes: int = 1


class Job(NamedTuple):
    """One row with one seed.

    Attributes:
        row, seed: the name of the row, and the seed.
        folder: the folder of its scores, and of its trainings unless they belong to another row.
        trainings: one training for each task with the method one_task, else one.
        by: what predicts, as `ExperimentConfig.by`.
    """

    row: str
    seed: int
    folder: Path
    trainings: list[TrainConfig]
    by: str


def add_arguments(parser: Any) -> None:
    """Add the options of an experiment to a parser of jsonargparse. `from_options` takes what the parser finds."""
    parser.add_class_arguments(ExperimentConfig, skip={"train"})
    parser.add_class_arguments(TrainConfig, "train", skip=PER_RUN, instantiate=False)


def instantiated(parser: Any, parsed: Any) -> Any:
    """The options that a parser of jsonargparse has found, with objects in place of the options of classes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jsonargparse has renamed the method in 4.49; older ones have only this name
        return parser.instantiate_classes(parsed)


def from_options(options: dict[str, Any]) -> ExperimentConfig:
    """The configuration, from the options that a parser with `add_arguments` has found. Raises InputError as
    `check`."""
    train = TrainConfig(data=str(Path(options["out"]) / "cache"), out="", **options["train"])
    config = ExperimentConfig(**{**options, "train": train})
    check(config)
    return config


def check(config: ExperimentConfig) -> None:
    """Raise InputError, which names the option, for a value that it can't have. (The networks check their own
    options.)"""

    def refuse(key: str, value: Any, expected: str) -> None:
        raise InputError(f"{key}={value!r}: expected {expected}")

    check_shape(dataclasses.asdict(config), ExperimentConfig, "the configuration")
    if not config.methods:
        refuse("methods", config.methods, "at least one row, name -> {method: ..}")
    for name, row in config.methods.items():
        if len(name.encode()) > 100 or not name.isprintable() or not re.fullmatch(r"[^./\\ ]([^/\\]*[^./\\ ])?", name):
            refuse("methods", name, "names that can be folder names, of at most 100 bytes")
        if "runs_of" not in row and row.get("method") not in METHODS:
            refuse(f"methods[{name!r}].method", row.get("method"), f"one of {', '.join(METHODS)}")
        _check_row(config, name, row)
    folded = [name.casefold() for name in config.methods]
    if twice := [name for name in config.methods if folded.count(name.casefold()) > 1]:
        refuse("methods", twice, "names that differ in more than upper and lower case")
    if not config.seeds or min(config.seeds) < 0 or len(set(config.seeds)) < len(config.seeds):
        refuse("seeds", config.seeds, "at least one number, each at least 0 and there once")
    if config.reference is not None and config.reference not in config.methods:
        refuse("reference", config.reference, f"null, or one of {', '.join(config.methods)}")
    for name, count in config.subsets.items():
        if name == ALL or count < 1:
            refuse("subsets", {name: count}, f"a name (not {ALL}) and a number of test cases, at least 1")
    ways = [(f"methods[{name!r}].by", row["by"]) for name, row in config.methods.items() if "by" in row]
    for key, value, choices in (
        ("split", config.split, ("test", "val")),
        *((key, by, ("map", "draws", "mode")) for key, by in [("by", config.by), *ways]),
        ("statistics", config.statistics, ("running", "batch")),
        ("checkpoint", config.checkpoint, ("final", "best")),
    ):
        if value not in choices:
            refuse(key, value, f"one of {', '.join(choices)}")
    check_profile(config.metrics)
    if config.size is not None and (len(config.size) != 2 or min(config.size) < 1):
        refuse("size", config.size, "null, or height and width in pixels")
    if config.size is not None and not of_images(read_tasks(config.train.tasks)):
        refuse("size", config.size, "null, because the tasks are of volumes")
    for key, count in (("draws", config.draws), ("processes", config.processes)):
        if count < 1:
            refuse(key, count, "at least 1")
    jobs(config)


def _check_row(config: ExperimentConfig, name: str, row: dict[str, Any]) -> None:
    """Raise InputError for a value that the keys `OF_ROWS` of a row can't have."""
    where = f"methods[{name!r}]"
    if "runs_of" in row:
        _check_other_runs(config, where, row)
    elif (row["method"] == "retrain") != ("grouping_of" in row):
        given = repr(row.get("grouping_of"))
        expected = "a row of method sfg" if row["method"] == "retrain" else "it with method retrain alone"
        raise InputError(f"{where}: grouping_of={given}, expected {expected}")
    if "grouping_of" in row:
        learnt = config.methods.get(str(row["grouping_of"]), {})
        if learnt.get("method") != "sfg":
            raise InputError(f"{where}: grouping_of={row['grouping_of']!r}, expected the name of a row of method sfg")
        for key in ("name", "width", "blocks", "residual", "stages"):
            option = f"network.{key}"
            common = getattr(config.train.network, key)
            if (mine := row.get(option, common)) != (theirs := learnt.get(option, common)):
                expected = f"{theirs!r} as {row['grouping_of']!r}, whose grouping it takes"
                raise InputError(f"{where}: {option}={mine!r}, expected {expected}")
    published = row.get("published", {})
    check_shape(published, dict[str, float], where, "published")
    tasks = read_tasks(config.train.tasks)
    if unknown := [task for task in published if task not in tasks]:
        raise InputError(f"{where}: published has {unknown[0]!r}, expected tasks: {', '.join(tasks)}")


def _check_other_runs(config: ExperimentConfig, where: str, row: dict[str, Any]) -> None:
    """Raise InputError if a row with `runs_of` can't take the runs of the row that it names."""
    other = config.methods.get(str(row["runs_of"]), {})
    if "method" not in other:
        raise InputError(f"{where}: runs_of={row['runs_of']!r}, expected the name of a row that has a method")
    if more := sorted(row.keys() - {"runs_of", "by", "published"}):
        raise InputError(f"{where}: {more[0]}={row[more[0]]!r}, expected runs_of, by and published alone in such a row")


def method_of(config: ExperimentConfig, name: str) -> str:
    """The method of a row: its own, or that of the row whose runs it takes."""
    row = config.methods[name]
    return str(config.methods[row["runs_of"]]["method"] if "runs_of" in row else row["method"])


def reference_row(config: ExperimentConfig) -> str:
    """The row that is tested against the others."""
    rows = {name: row.keys() - {"published"} for name, row in config.methods.items()}
    plain = [name for name, keys in rows.items() if keys == {"method"} and config.methods[name]["method"] == "sfg"]
    return config.reference or (plain or list(config.methods))[-1]


def jobs(config: ExperimentConfig) -> list[Job]:
    """The jobs of all rows and seeds. They are ordered by seed, so that the first whole table is there early.

    Raises InputError for a row with an option that a training does not have, or a value that it can't have.
    """
    of_rows = {name: _training(config, name) for name, row in config.methods.items() if "runs_of" not in row}
    found = []
    for seed in config.seeds:
        folders = {name: Path(config.out) / "runs" / name / f"seed_{seed}" for name in config.methods}
        for name, row in config.methods.items():
            trained = row.get("runs_of", name)
            folder, train = folders[trained], of_rows[trained]
            if (of := config.methods[trained].get("grouping_of")) is not None:
                train = dataclasses.replace(
                    train, network=dataclasses.replace(train.network, grouping=str(folders[of]))
                )
            parts: dict[Path, Any] = {folder: train.tasks}
            if train.network.method == "one_task":
                parts = {folder / task: _only(task, train.tasks) for task in read_tasks(train.tasks)}
            trainings = [
                dataclasses.replace(train, out=str(out), tasks=tasks, seed=seed) for out, tasks in parts.items()
            ]
            found.append(Job(name, seed, folders[name], trainings, row.get("by", config.by)))
    return found


def _only(task: str, tasks: TaskOptions) -> TaskOptions:
    """The options of one of the tasks."""
    return {task: tasks[task]} if isinstance(tasks, dict) else [task]


def waves(every: Sequence[Job]) -> list[list[Job]]:
    """The jobs in waves; the jobs of a wave don't wait for each other. First come those that learn, then those that
    take a learnt grouping, last those that take the runs of other rows."""
    parts: list[list[Job]] = [[], [], []]
    for job in every:
        training = job.trainings[0]
        others = not Path(training.out).is_relative_to(job.folder)
        parts[2 if others else int(training.network.grouping is not None)].append(job)
    return [part for part in parts if part]


def _training(config: ExperimentConfig, name: str) -> TrainConfig:
    """The training of a row: that of the experiment with the row's own options. Raises InputError for an option that a
    training lacks, or a value that it can't have."""
    from jsonargparse import ArgumentError, ArgumentParser

    where, train = f"methods[{name!r}]", config.train
    row = {key: value for key, value in config.methods[name].items() if key not in OF_ROWS}
    options = {key: value for key, value in dataclasses.asdict(train).items() if key not in PER_RUN}
    for key, value in row.items():
        *parents, last = key.split(".")
        part: Any = options
        for parent in parents:
            part = part.get(parent) if isinstance(part, dict) else None
        if not isinstance(part, dict) or last not in part or isinstance(part[last], dict) or key in TAKEN:
            raise InputError(f"{where}: {key}={value!r}, expected options of a training such as network.estimator")
        part[last] = value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, skip=PER_RUN)
    try:
        parsed = instantiated(parser, parser.parse_object(options))
    except ArgumentError as error:
        raise InputError(f"{where}: {one_line(error)}") from error
    found = TrainConfig(data=train.data, out=train.out, **parsed.as_dict())
    found.network.method = config.methods[name]["method"]
    if found.network.method == "retrain":
        # `jobs` puts the folder of the same seed in its place.
        found.network.grouping = str(Path(config.out) / "runs" / config.methods[name]["grouping_of"])
    if found.network.method == "one_task" and isinstance(found.network.init, list):
        found.network.init = "uniform"  # its grouping is fixed, and probabilities of three groups do not fit its two
    try:
        check_training(found)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return found
