"""Tries two choices of the method on the phantom: the rule of normalisation, and how many draws a prediction needs.

    python -m benchmarks.phantom_study run FOLDER        trains (resumable: a finished run is not trained again)
    python -m benchmarks.phantom_study report FOLDER FILE.md     also draws FILE_normalisation.png, FILE_draws.png

Normalisation (sfg_fast/norm.py): with "drawn row" each kernel is normalised by the batch statistics of the row that it
was drawn into. They serve its other rows as constants, so that nothing dense has to be computed for these. With "every
row" every (group, kernel) has batch statistics of its own. Both rules run by dense masking (backend "reference") on the
demo's cohort and network, with three seeds. Draws: the same network is trained with draws to the end, and with the
grouping fixed in the last 40 % of the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfg_fast import backend, reference
from sfg_fast.data.cohort import Cohort, load_case, read_cohort
from sfg_fast.data.phantom import write_phantom
from sfg_fast.data.preprocessing import preprocess
from sfg_fast.demo import demo_config
from sfg_fast.errors import InputError
from sfg_fast.evaluation.evaluate import scene_of
from sfg_fast.evaluation.metrics import case_metrics, summarise
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.files import write_json
from sfg_fast.groups import FilterGroups
from sfg_fast.norm import KernelNorm
from sfg_fast.training.trainer import Trainer

RULES, RESIDUAL, SEEDS = ("drawn row", "every row"), ("routed", "separate"), range(3)
DRAW_UNTIL = (0.6, 1.0)
DRAWS = (1, 2, 4, 8, 16, 32)
normalise_drawn_row = reference.normalise
WINDOW = 10  # rows of the history in a moving average of mini-batch losses


def normalise_every_row(u: list[Tensor], norm: KernelNorm, groups: FilterGroups) -> list[Tensor]:
    """Normalise every (group, kernel) by statistics of its own. It takes the place of `reference.normalise`."""
    if not norm.training:
        return normalise_drawn_row(u, norm, groups)
    rows = u if len(u) > 1 else u * len(groups.names)  # one image for all groups
    out = []
    for group, x in enumerate(rows):
        norm.draws[group] += 1
        rate = max(1 / int(norm.draws[group, 0]), norm.momentum)
        mean, var = norm.running_mean[group], norm.running_var[group]
        out.append(torch.nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias, True, rate, norm.eps))
    return out


@contextlib.contextmanager
def rule(name: str) -> Iterator[None]:
    """Inside the `with` networks run by dense masking with this rule of normalisation."""
    reference.normalise = normalise_every_row if name == "every row" else normalise_drawn_row
    try:
        with backend("reference"):
            yield
    finally:
        reference.normalise = normalise_drawn_row


def scores(predictor: Predictor, cohort: Cohort, draws: int) -> dict[str, float]:
    """The means over the test cases of PSNR in the mask (dB), gain over the mean CT (dB) and Dice; draws = 0: argmax
    p."""
    cases = {}
    for case in cohort.split("test"):
        truth = load_case(case, cohort.targets)
        found = predictor.volume(truth.inputs, draws, "draws" if draws else "map")
        predicted = {task: volumes[""] for task, volumes in found.items()}
        scene = scene_of(truth, cohort.targets)
        cases[case.name] = case_metrics(predictor.tasks, truth.targets, predicted, scene)
    ct, organs = summarise(cases)["ct"], summarise(cases)["organs"]
    psnr = ct["regions"]["overall"]["psnr_in_mask"]["mean"]
    return {"psnr": psnr, "gain": ct["psnr_gain"]["mean"], "dice": organs["dice_mean"]["mean"]}


def train(folder: Path, name: str, seed: int, residual: str, steps: int, draw_until: float) -> Predictor:
    """Train a network as the demo does, or go on with a run that was stopped. Returns its predictor."""
    config = demo_config(folder, seed, steps)
    config = dataclasses.replace(
        config,
        out=str(folder / name),
        log_every=10,
        network=dataclasses.replace(config.network, residual=residual),
        schedule=dataclasses.replace(config.schedule, draw_until=draw_until),
    )
    with contextlib.suppress(InputError):  # a finished run has nothing to resume
        Trainer(config, resume=(folder / name).exists()).run()
    return Predictor(folder / name)


def run(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cache").exists():
        write_phantom(folder / "cohort", seed=7)
        preprocess(read_cohort(folder / "cohort"), folder / "cache")
    cohort = read_cohort(folder / "cohort")

    def record(name: str, what: dict[str, Any], predictor: Predictor, draws: tuple[int, ...]) -> None:
        history = json.loads((folder / name / "history.json").read_text())
        found = {str(s): scores(predictor, cohort, s) for s in draws}
        write_json(folder / f"{name}.json", {**what, "nll": history["curves"]["nll"], "scores": found})

    for residual, draw_until, seed in itertools.product(RESIDUAL, DRAW_UNTIL, SEEDS):
        name = f"draws {residual} {draw_until:g} {seed}"
        if not (folder / f"{name}.json").exists():
            what = {"study": "draws", "residual": residual, "draw_until": draw_until, "seed": seed, "steps": steps}
            record(name, what, train(folder, name, seed, residual, steps, draw_until), (0, *DRAWS))
    for residual, seed, how in itertools.product(RESIDUAL, SEEDS, RULES):
        name = f"normalisation {residual} {how} {seed}"
        if not (folder / f"{name}.json").exists():
            what = {"study": "normalisation", "residual": residual, "rule": how, "seed": seed, "steps": steps}
            with rule(how):
                predictor = train(folder, name, seed, residual, steps, 0.6)
            record(name, what, predictor, (0,))


# --- report -----------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ({deviation:.{digits}f})"


def smooth(values: list[float]) -> np.ndarray:
    """The moving average of the values: the mean of the last `WINDOW` of them."""
    sums = np.cumsum([0.0, *values])
    return (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW


def report(folder: Path, file: Path) -> None:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    steps = found[0]["steps"]
    widths = "/".join(map(str, demo_config(folder, 0, steps).network.width))
    lines = [
        "# Choices of the method, tried on the phantom\n",
        f"`python -m benchmarks.phantom_study run FOLDER --steps {steps}`, then `report FOLDER FILE.md`. The demo's "
        f"cohort (10 cases to train, 5 to test), widths {widths}, one block a stage; mean (SD) over three seeds. PSNR: "
        "gain in dB over each case's mean CT in the body.\n",
        "## Normalisation: statistics of the drawn row, or of every (group, kernel)\n",
        "| blocks | rule | loss CT, end | loss organs, end | PSNR gain | Dice |",
        "|---|---|---|---|---|---|",
    ]
    normalisation = [one for one in found if one["study"] == "normalisation"]
    for residual, how in itertools.product(RESIDUAL, RULES):
        runs = [one for one in normalisation if (one["residual"], one["rule"]) == (residual, how)]
        ends = [[float(smooth(one["nll"][task])[-1]) for one in runs] for task in ("ct", "organs")]
        final = [[one["scores"]["0"][key] for one in runs] for key in ("gain", "dice")]
        cells = [*(spread(values, 3) for values in ends), spread(final[0], 2), spread(final[1], 3)]
        lines.append(f"| {residual} | {how} | " + " | ".join(cells) + " |")
    names = [file.with_name(f"{file.stem}_{name}.png") for name in ("normalisation", "draws")]
    lines += [f"\n![Loss of the mini-batches, moving average; each line a seed]({names[0].name})\n"]
    lines += [
        "## Prediction by the mean over S drawn architectures, against argmax p\n",
        "Difference to argmax p of the same run.\n",
        "| blocks | drawn until | PSNR gain / Dice, argmax p | " + " | ".join(f"S = {s}" for s in DRAWS) + " |",
        "|---|---|---|" + "---|" * len(DRAWS),
    ]
    draws = [one for one in found if one["study"] == "draws"]
    for residual, until in itertools.product(RESIDUAL, DRAW_UNTIL):
        runs = [one for one in draws if (one["residual"], one["draw_until"]) == (residual, until)]
        best = [spread([one["scores"]["0"][key] for one in runs], digits) for key, digits in (("gain", 2), ("dice", 3))]
        cells = [
            " / ".join(f"{statistics.mean(change(runs, s, key)):+.{n}f}" for key, n in (("gain", 2), ("dice", 3)))
            for s in DRAWS
        ]
        lines.append(f"| {residual} | {until:.0%} of the steps | {' / '.join(best)} | " + " | ".join(cells) + " |")
    lines += [f"\n![Change by the number of draws]({names[1].name})"]
    file.write_text("\n".join(lines) + "\n")
    draw_curves(normalisation, steps, names[0])
    draw_draws(draws, names[1])


def change(runs: list[dict[str, Any]], draws: int, key: str) -> list[float]:
    return [one["scores"][str(draws)][key] - one["scores"]["0"][key] for one in runs]


def draw_curves(runs: list[dict[str, Any]], steps: int, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 5.5), sharex=True, layout="constrained")
    for (row, task), (column, residual) in itertools.product(enumerate(("ct", "organs")), enumerate(RESIDUAL)):
        axes = panels[row, column]
        for one in (one for one in runs if one["residual"] == residual):
            curve = smooth(one["nll"][task])
            colour = f"C{RULES.index(one['rule'])}"
            label = one["rule"] if one["seed"] == 0 else None
            axes.plot(np.linspace(10 * WINDOW, steps, len(curve)), curve, color=colour, linewidth=1, label=label)
        axes.set(yscale="log", title=f"{residual} blocks", ylabel=f"negative log-likelihood, {task}")
    for axes in panels[1]:
        axes.set_xlabel("step")
    panels[0, 0].legend()
    figure.savefig(file, dpi=130)


def draw_draws(runs: list[dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, key, unit in zip(panels, ("gain", "dice"), ("PSNR, dB", "Dice"), strict=True):
        for residual, until in itertools.product(RESIDUAL, DRAW_UNTIL):
            chosen = [one for one in runs if (one["residual"], one["draw_until"]) == (residual, until)]
            values = np.array([change(chosen, s, key) for s in DRAWS])
            label = f"{residual}, drawn until {until:.0%}"
            axes.errorbar(DRAWS, values.mean(1), values.std(1), marker="o", markersize=3, capsize=2, label=label)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(
            xscale="log", xticks=DRAWS, xticklabels=DRAWS, xlabel="drawn architectures", ylabel=f"change of {unit}"
        )
        axes.minorticks_off()
    panels[1].legend(fontsize=7)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path, nargs="?", help="of the report")
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.folder, arguments.steps)
    elif arguments.file is None:
        parser.error("report: expected FILE.md")
    else:
        report(arguments.folder, arguments.file)


if __name__ == "__main__":
    main()
