"""Does learning what to share pay? The suite tries every way to share on problems whose best fixed grouping can be
found.

    python -m benchmarks.experiment.suite run FOLDER PROBLEM .. [--faces LIST] [--seeds 0 1 2] [--processes 2]
    python -m benchmarks.experiment.suite report FOLDER FILE.md

PROBLEM is digits, identical, related, disjoint, two_alike (`suite_cohorts.py` makes them) or faces (`utkface.yaml` says
where these are from). Each problem is an experiment in FOLDER/PROBLEM, whose rows are the ways to share. If `run` is
killed, the same command goes on.

`report`: the gain of a row says by how many percent it is better than hard sharing on the test images. It is the mean
over tasks of the relative change of MAE, or of the share of images that are wrong. The regret of a row is the gain of
the best fixed grouping minus its own gain. The best fixed grouping, and a row's rate of dropout or exploring, are
chosen by the gain on the validation images. Beside FILE.md the report draws FILE.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from sfg_fast.data.targets import Target
from sfg_fast.experiment.config import ExperimentConfig, Job, jobs
from sfg_fast.experiment.run import run_experiment
from sfg_fast.experiment.table import bootstrap, holm
from sfg_fast.files import read_json
from sfg_fast.networks.cost import DRAWS
from sfg_fast.tables import Table, markdown, number_at
from sfg_fast.tasks import from_json, read_tasks
from sfg_fast.tasks.task import Task
from sfg_fast.training.config import NetworkConfig, ObjectiveConfig, ScheduleConfig, TrainConfig
from sfg_fast.training.run import AboutData, build_network

from . import suite_cohorts

LAYERS = 8  # of SFGVGG
HARD, LEARNT = "Hard sharing", "SFG"
DROPOUT, EXPLORE = (0.05, 0.1), (0.05, 0.15)


class Problem(NamedTuple):
    """A problem: its tasks, the width of the network, the number of steps, and the `size` that images are resized
    to."""

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
    """A way to share: the rows of the experiment that try it, of which the validation images choose one. `fixed` says
    whether it is a fixed grouping, `more` whether it has more weights than other ways."""

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
    tuned = (HARD, "Shared but for the last two")  # the other ways have the larger rate
    found = {
        "One-task": Way({"One-task": {"method": "one_task"}}, more=True),
        "Cross-stitch": Way({"Cross-stitch": {"method": "cross_stitch"}}, more=True),
        **{name: Way({name: row}, fixed=True) for name, row in fixed.items()},
    }
    for name in sorted(fixed, key=lambda name: name not in tuned):
        for what, rates in (("dropout", DROPOUT), ("explore", EXPLORE)):
            tried = rates if name in tuned else rates[-1:]
            rows = {f"{name}, {what} {rate}": {**fixed[name], f"network.{what}": rate} for rate in tried}
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
    learnt = {f"SFG, explore {rate}": {"method": "sfg", **learns, "network.explore": rate} for rate in rates}
    found[LEARNT] = Way(learnt)
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
        precision="float32",  # as all rows were trained, on a GPU, too
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
        reference=next(iter(every[LEARNT].rows)),
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
    """The result of a row.

    Attributes:
        errors: the error of each test image, [seeds, tasks, images].
        test: the mean error, [seeds, tasks]: the MAE, or the percentage of wrong images.
        validation: the same on the validation images.
        flops: the FLOPs of the prediction of an image.
        training: the FLOPs of all steps, with one image in a step, and those of the search that found its grouping.
        shared: p(shared) of each layer, of rows that learn it.
    """

    errors: np.ndarray
    validation: np.ndarray
    flops: float
    training: float
    shared: list[float]

    @property
    def test(self) -> np.ndarray:
        return self.errors.mean(2)


def results(folder: Path, problem: str) -> tuple[dict[str, Task], dict[str, Result]]:
    """The tasks, and the result of every row whose runs are all there."""
    out = folder / problem
    saved = yaml.safe_load((out / "experiment.yaml").read_text())
    by_row: dict[str, list[Job]] = {}
    for job in jobs(experiment(problem, Path(saved["cohort"]), out, saved["seeds"], 1)):
        by_row.setdefault(job.row, []).append(job)
    tasks: dict[str, Task] = {}
    found: dict[str, Result] = {}
    for row, its in by_row.items():
        if not all((job.folder / "metrics.json").exists() for job in its):
            continue
        searched = its[0].trainings[0].network.grouping
        if searched and _row_of(Path(searched)) not in found:
            continue
        documents = [read_json(job.folder / "metrics.json") for job in its]
        tasks = tasks or from_json(documents[0]["conventions"]["tasks"])
        flops = documents[0]["flops"]
        found[row] = Result(
            np.array([[_errors(document, task) for task in tasks.values()] for document in documents]),
            np.array([_on_validation(job, tasks) for job in its]),
            flops,
            training_flops(its[0], flops) + (found[_row_of(Path(searched))].training if searched else 0.0),
            _shared(its),
        )
    return tasks, found


def _row_of(run: Path) -> str:
    """OUT/runs/ROW/seed_S"""
    return run.parent.name


def _errors(document: Mapping[str, Any], task: Task) -> list[float]:
    """The errors of a task, for each test image in the order of their names."""
    measure = task.relative
    values = [number_at(case, measure.place) for _, case in sorted(document["cases"].items())]
    assert None not in values, "every image of the suite has every target"
    return [measure.factor * value if measure.less_is_better else 100 - measure.factor * value for value in values]


def _on_validation(job: Job, tasks: Mapping[str, Task]) -> list[float]:
    """The mean error of each task on the validation images, at the end of training."""
    scores: dict[str, float] = {}
    for training in job.trainings:
        scores |= read_json(Path(training.out) / "summary.json")["validation"]["last"]["scores"]
    of_tasks = [(task, scores[f"{name}/{task.scores[0].name}"]) for name, task in tasks.items()]
    return [score if task.relative.less_is_better else 100 - score for task, score in of_tasks]


def _shared(its: Sequence[Job]) -> list[float]:
    """p(shared) of each layer at the end, the mean over seeds; empty for a row that doesn't learn p."""
    if its[0].trainings[0].network.method not in ("sfg", "retrain"):
        return []
    p = [list(read_json(job.folder / "summary.json")["mean_p"].values()) for job in its]
    return np.array(p)[:, :, 0].mean(0).tolist()


def training_flops(job: Job, flops: float) -> float:
    """The FLOPs of all steps, with one image in a step. A step with a fixed grouping takes three times those of a
    prediction, less the gradient of the image. A step that draws is counted at the first p, as the mean over draws, and
    includes the gradients of the gates."""
    schedule = job.trainings[0].schedule
    fixed, drawn, share = 3 * flops, 0.0, 0.0
    for training in job.trainings:
        about: AboutData = read_json(Path(training.out) / "data.json")
        assert about["images"] is not None
        tasks = read_tasks(
            training.tasks, {name: Target.from_json(name, one) for name, one in about["targets"].items()}
        )
        torch.manual_seed(0)
        network = build_network(training, about["in_channels"], tasks).train()
        x = torch.randn(2, about["images"]["channels"], *about["images"]["size"])
        first = (m for m in network.modules() if getattr(m, "in_channels", None) == x.shape[1])
        fixed -= sum(2 * m.weight.numel() * x[0, 0].numel() for m in first if hasattr(m, "weight"))  # stride 1
        if training.network.method in ("sfg", "constant_p"):
            share = 1.0 if training.network.method == "constant_p" else schedule.draw_until
            with FlopCounterMode(display=False) as counter:
                for _ in range(DRAWS):
                    torch.stack([y.sum() for y in network(x).values()]).sum().backward()
            drawn += counter.get_total_flops() / DRAWS / len(x)
    return schedule.steps * (share * drawn + (1 - share) * fixed)


class Chosen(NamedTuple):
    """The row of a way to share that the validation images chose, and its result."""

    row: str
    result: Result


def chosen(found: Mapping[str, Result]) -> dict[str, Chosen]:
    """The chosen row of every way that has been run; empty if hard sharing has not."""
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
    """By how many percent a result is better than the mean of hard sharing on the test images: the mean over tasks,
    [seeds]."""
    return _gain(result.test, hard.test.mean(0))


def gain_on_validation(result: Result, hard: Result) -> float:
    return float(_gain(result.validation, hard.validation.mean(0)).mean())


def _gain(errors: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """The gain [n] in percent of errors [n, tasks] over those of hard sharing [tasks]."""
    return 100 * (1 - errors / hard).mean(1)


def tested(best: Mapping[str, Chosen]) -> dict[str, float]:
    """The p of SFG against every other way: a paired bootstrap over the test images of their gains, which are averaged
    over seeds first; p is corrected after Holm."""
    mean = best[HARD].result.test.mean(0)
    by_image = {name: _gain(way.result.errors.mean(0).T, mean) for name, way in best.items()}
    others = [name for name in best if name != LEARNT]
    p = holm([bootstrap(by_image[LEARNT] - by_image[name]) for name in others]) if LEARNT in best else []
    return dict(zip(others, p, strict=False))


def report(folder: Path, file: Path) -> None:
    """The tables of all problems that were run, in Markdown, and FILE.png beside it."""
    lines = [
        "# Does learning what to share pay?\n",
        "`python -m benchmarks.experiment.suite run FOLDER PROBLEM ..`, then `report FOLDER FILE`. Mean (SD over "
        "seeds) on the test images of the MAE, or of the percentage of images that are wrong. Gain: percent better "
        "than hard sharing, the mean over tasks. Regret: the gain of the best fixed grouping minus that of the row. "
        "The best fixed grouping, and rates of dropout and exploring, were chosen by the gain on validation images. "
        "SFG ahead: in how many of the seeds its gain is larger than the row's. p: of that difference, by a paired "
        "bootstrap over test images, seeds averaged first, corrected after Holm; it says nothing of other seeds. "
        "FLOPs: of a prediction, and of the training with the search for the grouping, over those of hard sharing.\n",
    ]
    of_problems: dict[str, dict[str, Chosen]] = {}
    regrets: dict[str, dict[str, str]] = {}
    for problem in PROBLEMS:
        if not (folder / problem / "experiment.yaml").exists():
            continue
        tasks, found = results(folder, problem)
        best = chosen(found)
        if HARD not in best:
            continue
        of_problems[problem] = best
        table, by_way = _of_problem(problem, tasks, best)
        lines += [f"## {table.caption}\n", markdown(table)]
        for name, regret in by_way.items():
            regrets.setdefault(name, {})[problem] = regret
    rows = [[name, *(row.get(problem, "not run") for problem in of_problems)] for name, row in regrets.items()]
    lines += ["## Regret [percent]\n", markdown(Table("", ["", *of_problems], rows))]
    file.write_text("\n".join(lines))
    draw(of_problems).savefig(file.with_suffix(".png"), dpi=110)


def best_fixed(best: Mapping[str, Chosen]) -> str:
    """The name of the fixed grouping that the validation images choose."""
    hard = best[HARD].result
    fixed = [name for name, way in ways(hard.test.shape[1]).items() if way.fixed and name in best]
    return max(fixed, key=lambda name: gain_on_validation(best[name].result, hard))


def _of_problem(problem: str, tasks: Mapping[str, Task], best: Mapping[str, Chosen]) -> tuple[Table, dict[str, str]]:
    """The table of a problem, and the regret of every way with the SD over seeds of its gain."""
    hard = best[HARD].result
    every = ways(len(tasks))
    winner = best_fixed(best)
    goal = gains(best[winner].result, hard).mean()
    p = tested(best)
    rows, regrets = [], {}
    for name, (row, result) in best.items():
        gained = gains(result, hard)
        mark = " **(the best fixed)**" if name == winner else " (more weights)" if every[name].more else ""
        numbers = [_cell(one.mean(), one, 2) for one in result.test.T]
        regret = goal - gained.mean()
        cells = [*numbers, _cell(gained.mean(), gained, 1), f"{regret:.1f}"]
        if name in p:
            ahead = int((gains(best[LEARNT].result, hard) > gained).sum())
            cells += [f"{ahead} of {len(gained)}", f"{p[name]:.2g}"]
        else:
            cells += ["", ""]
        cells += [f"{of / by:.2f}" for of, by in ((result.flops, hard.flops), (result.training, hard.training))]
        cells += [f"{gain_on_validation(result, hard):.1f}", " ".join(f"{value:.2f}" for value in result.shared)]
        rows.append([name + mark, "" if row == name else row.removeprefix(f"{name}, "), *cells])
        regrets[name] = "> 100" if regret > 100 else _cell(regret, gained, 1)
    header = [
        "",
        "chosen",
        *tasks,
        "gain [%]",
        "regret [%]",
        "SFG ahead",
        "p (Holm)",
        "FLOPs",
        "of training",
        "gain on validation",
        "p(shared) by layer",
    ]
    return Table(f"{problem}, {len(hard.test)} seed{'s' * (len(hard.test) > 1)}", header, rows), regrets


def _cell(mean: float, by_seed: np.ndarray, digits: int) -> str:
    """A cell with the mean, and the SD over seeds, if there are several."""
    return f"{mean:.{digits}f}" + (f" ({by_seed.std(ddof=1):.{digits}f})" if len(by_seed) > 1 else "")


def draw(of_problems: Mapping[str, Mapping[str, Chosen]]) -> Figure:
    """Draw the gain of every way on every problem: a dot for each seed, a line at the mean. Dots that are far off stand
    at the edge."""
    names = list(dict.fromkeys(name for best in of_problems.values() for name in best))
    figure = Figure(figsize=(2.6 + 2.1 * len(of_problems), 0.8 + 0.26 * len(names)), layout="constrained")
    every = np.atleast_1d(figure.subplots(1, max(1, len(of_problems)), sharey=True))
    for axes, (problem, best) in zip(every, of_problems.items(), strict=False):
        hard, winner = best[HARD].result, best_fixed(best)
        found = {name: gains(best[name].result, hard) for name in best}
        usual = np.concatenate([one for name, one in found.items() if name != "Constant p"])
        low, high = usual.min(), usual.max()
        low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
        axes.axvline(0, color="0.8", linewidth=1, zorder=0)
        for name, one in found.items():
            y = names.index(name)
            colour = "#d1495b" if name == LEARNT else "#1f6f8b" if name == winner else "0.45"
            seen = np.clip([*one, one.mean()], low, high)
            axes.plot(seen[:-1], [y] * len(one), "o", markersize=3.5, color=colour, alpha=0.6, clip_on=False)
            axes.plot([seen[-1]] * 2, [y - 0.32, y + 0.32], color=colour, linewidth=2.2)
        axes.set_xlim(low, high)
        axes.set_title(problem, fontsize=10)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    every[0].set_yticks(range(len(names)), names, fontsize=8)
    every[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("better than hard sharing by [%]; red: SFG, blue: the best fixed grouping", fontsize=9)
    return figure


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
