"""Does learning what to share pay? Problems whose best fixed grouping can be found by trying, and every way to share.

    python -m benchmarks.experiment.suite run FOLDER PROBLEM .. [--faces LIST] [--seeds 0 1 2] [--processes 2]
    python -m benchmarks.experiment.suite report FOLDER FILE.md

PROBLEM: digits, identical, related, disjoint, two_alike (`suite_cohorts.py` makes them) or faces (`utkface.yaml` says
where these are from). Each is an experiment in FOLDER/PROBLEM, whose rows are the ways to share; killed, the same
command goes on.

`report`: a row's gain is by how many percent it is better than hard sharing, the mean over tasks of the relative change
of MAE, or of the share of images that are wrong, on the test images. A row's regret is the gain of the best fixed
grouping minus its own. Which fixed grouping is the best, and which rate of dropout or exploring a row has, is chosen by
the gain on the validation images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from sfg_fast.experiment.config import ExperimentConfig, Job, jobs
from sfg_fast.experiment.run import run_experiment
from sfg_fast.files import read_json
from sfg_fast.tables import Table, markdown, number_at
from sfg_fast.tasks import from_json
from sfg_fast.tasks.task import Task
from sfg_fast.training.config import NetworkConfig, ObjectiveConfig, ScheduleConfig, TrainConfig

from . import suite_cohorts

LAYERS = 8  # of SFGVGG
HARD = "Hard sharing"
DROPOUT, EXPLORE = (0.05, 0.1), (0.05, 0.15)


class Problem(NamedTuple):
    """What is learnt, by how large a network, in how many steps; size: that images are resized to."""

    tasks: dict[str, dict[str, Any]]
    width: int = 8
    steps: int = 2000
    size: list[int] | None = None


def _numbers(count: int) -> dict[str, dict[str, Any]]:
    return {f"task{number}": {"kind": "regression", "loss": "rmse"} for number in range(1, count + 1)}


PROBLEMS = {
    "digits": Problem({place: {"kind": "classification"} for place in ("left", "right")}),
    "identical": Problem(_numbers(2)),
    "related": Problem(_numbers(2)),
    "disjoint": Problem(_numbers(2)),
    "two_alike": Problem(_numbers(3)),
    "faces": Problem(
        {
            "age": {"kind": "regression", "unit": "years", "scale": 100, "loss": "rmse"},
            "gender": {"kind": "classification", "classes": ["male", "female"]},
        },
        width=16,
        steps=3110,
        size=[48, 48],
    ),
}


# --- the ways to share ------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """A way to share: the rows of the experiment that are tried, of which the validation images choose one; fixed: is
    it a fixed grouping; more: has it more weights than the others?"""

    rows: dict[str, dict[str, Any]]
    fixed: bool = False
    more: bool = False


def ways(tasks: int) -> dict[str, Way]:
    """Every way to share among so many tasks, by its name."""

    def split(last: int) -> list[float]:
        return [1.0] * (LAYERS - last) + [0.0] * last

    fixed: dict[str, dict[str, Any]] = {
        HARD: {"method": "hard_sharing"},
        "Even split": {"method": "even_split"},
        "Constant mask": {"method": "constant_mask"},
        "Constant mask, half shared": {"method": "constant_mask", "network.shared": 0.5},
        "Shared but for the last layer": {"method": "constant_mask", "network.shared": split(1)},
        "Shared but for the last two": {"method": "constant_mask", "network.shared": split(2)},
        "Shared but for the last four": {"method": "constant_mask", "network.shared": split(4)},
    }
    noisy = (HARD, "Shared but for the last two")
    found = {
        "One-task": Way({"One-task": {"method": "one_task"}}, more=True),
        "Cross-stitch": Way({"Cross-stitch": {"method": "cross_stitch"}}, more=True),
        **{name: Way({name: row}, fixed=True) for name, row in fixed.items()},
    }
    for name in noisy:
        for what, rates in (("dropout", DROPOUT), ("explore", EXPLORE)):
            rows = {f"{name}, {what} {rate}": {**fixed[name], f"network.{what}": rate} for rate in rates}
            found[f"{name}, {what}"] = Way(rows, fixed=True)
    found["Constant p"] = Way({"Constant p": {"method": "constant_p"}})
    paper = {"network.init": [0.6] + [0.4 / tasks] * tasks, "schedule.draw_until": 1.0}  # of two: [.2, .6, .2]
    shared = {**paper, "network.init": "mostly_shared"}
    for name, row in (
        ("SFG, as in the paper", paper),
        ("SFG, p(shared) .9", shared),
        ("SFG, p(shared) .9 and never learnt", {**shared, "schedule.logits_factor": 0.0}),
    ):
        found[name] = Way({name: {"method": "sfg", **row}})
    learns = {"schedule.logits_factor": 30.0, "schedule.pooled": 1.0, "schedule.draw_until": 0.3}
    rates = (0.0, *EXPLORE)
    found["SFG"] = Way({f"SFG, explore {rate}": {"method": "sfg", **learns, "network.explore": rate} for rate in rates})
    anew = {"method": "retrain", "grouping_of": "SFG, explore 0.0"}
    found["SFG, trained anew"] = Way(
        {f"SFG, trained anew, explore {rate}": {**anew, "network.explore": rate} for rate in rates}
    )
    return found


def experiment(problem: str, cohort: Path, out: Path, seeds: Sequence[int], processes: int) -> ExperimentConfig:
    """The experiment of a problem."""
    about = PROBLEMS[problem]
    every = ways(len(about.tasks))
    train = TrainConfig(
        data=str(out / "cache"),
        out="",
        tasks=about.tasks,
        validation_slices=5000,
        log_every=500,
        checkpoint_every=about.steps,
        network=NetworkConfig(name="vgg", width=about.width),
        objective=ObjectiveConfig(lambda1=1e-6, lambda2=1e-5),
        schedule=ScheduleConfig(
            steps=about.steps,
            batch=16,
            learning_rate=1e-3,
            logits_factor=10,  # as in the rows of the paper; "SFG" has its own
            pooled=0,
            temperature_end=0.97,
            temperature_until=1.0,
        ),
    )
    return ExperimentConfig(
        cohort=str(cohort),
        out=str(out),
        train=train,
        methods={name: row for way in every.values() for name, row in way.rows.items()},
        seeds=list(seeds),
        reference=next(iter(every["SFG"].rows)),
        draws=8,
        size=about.size,
        processes=processes,
    )


def run(folder: Path, problem: str, faces: Path | None, seeds: Sequence[int], processes: int) -> None:
    if problem == "faces":
        if faces is None:
            raise SystemExit("faces: expected --faces FACES/faces.csv")
        cohort = faces
    else:
        cohort = folder / "cohorts" / problem
        if not cohort.exists():
            made = suite_cohorts.overlaid_digits() if problem == "digits" else suite_cohorts.textures(problem)
            suite_cohorts.write(cohort, made)
        cohort = cohort / "list.csv"
    run_experiment(experiment(problem, cohort, folder / problem, seeds, processes))


# --- report -----------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """Of a row: the numbers of each task (less is better) on the test and on the validation images, [seeds, tasks]; the
    FLOPs of a prediction; p(shared) by layer of what learns."""

    test: np.ndarray
    validation: np.ndarray
    flops: float
    shared: list[float]


def results(folder: Path, problem: str) -> tuple[dict[str, Task], dict[str, Result]]:
    """The tasks, and the result of every row whose runs are all there."""
    out = folder / problem
    saved = yaml.safe_load((out / "experiment.yaml").read_text())
    by_row: dict[str, list[Job]] = {}
    for job in jobs(experiment(problem, Path(saved["cohort"]), out, saved["seeds"], 1)):
        by_row.setdefault(job.row, []).append(job)
    tasks: dict[str, Task] = {}
    found = {}
    for row, its in by_row.items():
        if not all((job.folder / "metrics.json").exists() for job in its):
            continue
        documents = [read_json(job.folder / "metrics.json") for job in its]
        tasks = tasks or from_json(documents[0]["conventions"]["tasks"])
        found[row] = Result(
            np.array([[_number(document, task) for task in tasks.values()] for document in documents]),
            np.array([_on_validation(job, tasks) for job in its]),
            documents[0]["flops"],
            _shared(its),
        )
    return tasks, found


def _number(document: Mapping[str, Any], task: Task) -> float:
    """Of a task over all test images: its MAE, or the share of wrong ones in percent."""
    measure = task.relative
    values = [number_at(case, measure.place) for case in document["cases"].values()]
    mean = measure.factor * float(np.mean([value for value in values if value is not None]))
    return mean if measure.less_is_better else 100 - mean


def _on_validation(job: Job, tasks: Mapping[str, Task]) -> list[float]:
    """The same of each task on the validation images, at the end of training."""
    scores: dict[str, float] = {}
    for training in job.trainings:
        scores |= read_json(Path(training.out) / "summary.json")["validation"]["last"]["scores"]
    of_tasks = [(task, scores[f"{name}/{task.scores[0].name}"]) for name, task in tasks.items()]
    return [score if task.relative.less_is_better else 100 - score for task, score in of_tasks]


def _shared(its: Sequence[Job]) -> list[float]:
    """p(shared) of each layer at the end, the mean over seeds; of what learns alone."""
    if its[0].trainings[0].network.method not in ("sfg", "retrain"):
        return []
    p = [list(read_json(job.folder / "summary.json")["mean_p"].values()) for job in its]
    return np.array(p)[:, :, 0].mean(0).tolist()


class Chosen(NamedTuple):
    """The row of a way to share that the validation images chose, and its result."""

    row: str
    result: Result


def chosen(found: Mapping[str, Result]) -> dict[str, Chosen]:
    """Of every way that has been run, if hard sharing has."""
    best = {}
    if HARD not in found:
        return {}
    for name, way in ways(found[HARD].test.shape[1]).items():
        there = {row: found[row] for row in way.rows if row in found}
        if there:
            row = max(there, key=lambda row: gain_on_validation(there[row], found[HARD]))
            best[name] = Chosen(row, there[row])
    return best


def gains(result: Result, hard: Result) -> np.ndarray:
    """By how many percent better than the mean of hard sharing on the test images, the mean over tasks, by seed."""
    return 100 * (1 - result.test / hard.test.mean(0)).mean(1)


def gain_on_validation(result: Result, hard: Result) -> float:
    return float(100 * (1 - result.validation / hard.validation.mean(0)).mean())


def report(folder: Path, file: Path) -> None:
    """The tables of all problems that were run, in Markdown."""
    lines = [
        "# Does learning what to share pay?\n",
        "`python -m benchmarks.experiment.suite run FOLDER PROBLEM ..`, then `report FOLDER FILE`. Mean (SD) over "
        "seeds, on the test images, of the MAE, or of the percentage of images that are wrong. Gain: percent better "
        "than hard sharing, the mean over tasks. Regret: the gain of the best fixed grouping minus that of the row. "
        "The best fixed grouping, and rates of dropout and exploring, were chosen by the gain on validation images.\n",
    ]
    regrets: dict[str, dict[str, str]] = {}
    for problem in PROBLEMS:
        if not (folder / problem / "experiment.yaml").exists():
            continue
        tasks, found = results(folder, problem)
        best = chosen(found)
        if HARD not in best:
            continue
        table, by_way = _of_problem(problem, tasks, best)
        lines += [f"## {table.caption}\n", markdown(table)]
        for name, regret in by_way.items():
            regrets.setdefault(name, {})[problem] = regret
    problems = list(dict.fromkeys(problem for row in regrets.values() for problem in row))
    rows = [[name, *(row.get(problem, "-") for problem in problems)] for name, row in regrets.items()]
    lines += ["## Regret [percent]\n", markdown(Table("", ["", *problems], rows))]
    file.write_text("\n".join(lines))


def _of_problem(problem: str, tasks: Mapping[str, Task], best: Mapping[str, Chosen]) -> tuple[Table, dict[str, str]]:
    """The table of a problem, and the regret of every way with the SD over seeds of its gain."""
    hard = best[HARD].result
    every = ways(len(tasks))
    fixed = [name for name in best if every[name].fixed]
    winner = max(fixed, key=lambda name: gain_on_validation(best[name].result, hard))
    goal = gains(best[winner].result, hard)
    rows, regrets = [], {}
    for name, (row, result) in best.items():
        gained = gains(result, hard)
        mark = " **(the best fixed)**" if name == winner else " (more weights)" if every[name].more else ""
        numbers = [_cell(one.mean(), one, 2) for one in result.test.T]
        shared = " ".join(f"{value:.2f}" for value in result.shared)
        tried = "" if row == name else row.removeprefix(f"{name}, ")
        regret = goal.mean() - gained.mean()
        cells = [*numbers, _cell(gained.mean(), gained, 1), f"{regret:.1f}", f"{result.flops / hard.flops:.2f}"]
        rows.append([name + mark, tried, *cells, f"{gain_on_validation(result, hard):.1f}", shared])
        regrets[name] = _cell(regret, gained, 1)
    header = [
        "",
        "chosen",
        *tasks,
        "gain [%]",
        "regret [%]",
        "FLOPs / hard sharing's",
        "gain on validation",
        "p(shared) by layer",
    ]
    return Table(f"{problem}, {len(hard.test)} seed{'s' * (len(hard.test) > 1)}", header, rows), regrets


def _cell(mean: float, by_seed: np.ndarray, digits: int) -> str:
    """The mean, and the SD over seeds, if there are several."""
    return f"{mean:.{digits}f}" + (f" ({by_seed.std(ddof=1):.{digits}f})" if len(by_seed) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", help="problems to run, or the file of the report")
    parser.add_argument("--faces", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    if options.what == "report":
        report(options.folder, Path(options.names[0]))
        return
    for problem in options.names:
        if problem not in PROBLEMS:
            parser.error(f"{problem!r} is no problem, expected some of {', '.join(PROBLEMS)}")
    for problem in options.names:
        run(options.folder, problem, options.faces, options.seeds, options.processes)


if __name__ == "__main__":
    main()
