"""The report of a run: what it learnt, how well it predicts, and pictures of every predicted case."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..data.cohort import Cohort, LoadedCase, check_same_channels, check_same_labels, load_case
from ..data.preprocessing import normalise
from ..errors import InputError
from ..files import make_folder, read_json, read_text
from ..layers.conv import Features
from ..networks.controls import entropy, sfg_layers
from ..training.config import difference, read_config
from ..training.run import load_run
from . import figures
from .evaluate import ABOUT, about_predictions, predicted_cases, read_evaluated, read_prediction, read_uncertainty
from .html import write_report
from .predict import Predictor

KERNELS_SHOWN = 4


def report_on(run: Path, cohort: Cohort, predictions: Path, metrics: Path, out: Path) -> None:
    """Write the report of a run as one HTML file, and its figures as PNG beside it in `figures/`.

    InputError if one of them can't be read, or does not belong to the others: predictions of another run or cohort,
    metrics of other predictions or of another cohort. (Predictions that others made say of no run.)
    """
    about = about_predictions(predictions)
    predictor = Predictor(run, checkpoint=about.get("checkpoint", "final"))
    history = _history(run, predictor)
    if about.get("digest", predictor.digest) != predictor.digest:
        where = run / "checkpoints" / f"{predictor.checkpoint}.pt"
        raise InputError(
            f"{predictions / ABOUT}: predicted by another run than {where}, expected that one (or predict again)"
        )
    if about.get("labels", predictor.label_names) != predictor.label_names:
        raise InputError(
            f"{predictions / ABOUT}: labels are {about['labels']}, the run's are {predictor.label_names}, expected the "
            "same"
        )
    check_same_labels(predictor.label_names, cohort, str(run))
    check_same_channels(predictor.channel_names, cohort, str(cohort.root))
    shown = read_config(run / "config.yaml")
    if found := difference(dataclasses.asdict(shown), dataclasses.asdict(predictor.config)):
        key, there, trained = found
        raise InputError(
            f"{run / 'config.yaml'}: {key} is {there!r}, the run was trained with {trained!r}, expected that"
        )
    cases = predicted_cases(predictions, cohort, about)
    document = read_evaluated(metrics, predictions, cohort, cases)
    folder = out.parent / "figures"
    make_folder(folder)
    whose = "held-out" if any(predictor.splits.get(split) for split in ("val", "test")) else "training"
    drawn: list[tuple[str, str, Figure]] = [
        (
            "allocation",
            "Learned allocation: share of the kernels' probability in each group, by layer (paper, Fig. 3 left).",
            figures.allocation(history),
        ),
        ("allocation_over_training", "Allocation over training.", figures.allocation_over_training(history)),
        ("entropy", "Mean entropy of the grouping probabilities.", figures.entropy(history)),
        ("curves", f"Training. PSNR and Dice: one {whose} slice, to watch, not to report.", figures.curves(history)),
    ]
    for index, case in enumerate(cases):
        loaded = load_case(case, cohort.label_names)
        ct, labels = read_prediction(predictions, case, loaded)
        uncertainty = read_uncertainty(predictions, case, loaded)
        z = telling_slice(loaded)
        in_plane = loaded.grid.spacing[1:]
        if index == 0:
            image = loaded.inputs[0, z]
            maps = activation_maps(predictor, loaded.inputs, z)
            caption = "Activations of the kernels whose group is surest, lowest entropy first (paper, Fig. 3 right)."
            drawn.append(("activation_maps", caption, figures.activation_maps(image, maps, in_plane)))
        panel = figures.case_panel(
            loaded.inputs[0, z],
            _slice(loaded.ct, z),
            _slice(ct, z),
            _slice(loaded.labels, z),
            _slice(labels, z),
            _slice(uncertainty, z),
            in_plane,
            f"{case.name}, axial slice {z}",
            predictor.label_names,
            "HU" if "ct" in predictor.config.tasks else "probability",
        )
        drawn.append((f"case_{case.name}", f"Case {case.name}.", panel))
    for name, _, figure in drawn:
        figures.save(figure, folder / f"{name}.png")
    write_report(
        out,
        f"sfg_fast: {run.name}",
        config_yaml=read_text(run / "config.yaml"),
        document=document,
        figures=[(caption, figure) for _, caption, figure in drawn],
        notes=_notes(predictor, len(cases), about),
    )


def _history(run: Path, predictor: Predictor) -> dict[str, Any]:
    """The course of the run to its end, as its last checkpoint has it. InputError if history.json, which is there to be
    read by people, says something else."""
    own = predictor.history if predictor.checkpoint == "final" else load_run(run).history
    path = run / "history.json"
    if path.exists() and read_json(path) != own:
        where = run / "checkpoints" / "final.pt"
        raise InputError(f"{path}: it is not the history in {where}, expected that of this run, or no such file")
    return own


@torch.no_grad()
def activation_maps(predictor: Predictor, inputs: np.ndarray, z: int) -> dict[str, list[tuple[str, np.ndarray]]]:
    """For each group its `KERNELS_SHOWN` kernels of lowest entropy, all layers together: (title, activation [Y, X]).

    inputs: raw MR [C, Z, Y, X], z the slice. The assignment is argmax p, one draw if p is constant.
    """
    layers = sfg_layers(predictor.model)
    outputs: dict[str, Any] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name, layer in layers.items()
    ]
    with torch.random.fork_rng():
        torch.manual_seed(predictor.config.seed)  # a constant p is drawn
        predictor.model(torch.from_numpy(normalise(inputs)[None, :, z]).to(predictor.device))
    for hook in hooks:
        hook.remove()
    groups = next(iter(layers.values())).group_names
    ranked: dict[str, list[tuple[float, str, int]]] = {group: [] for group in groups}
    for name, layer in layers.items():
        certain = torch.zeros(layer.out_channels) if layer.assigned else entropy(layer)
        for kernel, group in enumerate(outputs[name].groups.assignment.tolist()):
            ranked[groups[group]].append((certain[kernel].item(), name, kernel))
    maps: dict[str, list[tuple[str, np.ndarray]]] = {}
    for group, kernels in ranked.items():
        maps[group] = []
        for value, name, kernel in sorted(kernels, key=lambda row: row[0])[:KERNELS_SHOWN]:
            features: Features = outputs[name]
            maps[group].append((f"{name} #{kernel}\nH = {value:.2f}", features.dense(group)[0, kernel].cpu().numpy()))
    return maps


def telling_slice(case: LoadedCase) -> int:
    """The slice with most labels, else the middle one."""
    if case.labels is None or not case.labels.any():
        return case.inputs.shape[1] // 2
    return int((case.labels > 0).sum((1, 2)).argmax())


def _slice(volume: np.ndarray | None, z: int) -> np.ndarray | None:
    return None if volume is None else volume[z]


def _notes(predictor: Predictor, cases: int, about: Mapping[str, Any]) -> list[str]:
    """`about`: what predict says of the predictions."""
    config = predictor.config
    averaged = predictor.constant_p or about.get("by") == "draws"
    whose = "the mean over drawn architectures" if averaged else "those of the most probable architecture"
    notes = [
        f"Method {config.network.method}, residual blocks {config.network.residual}, {config.schedule.steps} steps, "
        f"{cases} cases predicted.",
        f"CT and labels are {whose}, checkpoint {about.get('checkpoint', 'unknown')}.",
        "The uncertainty is the SD over drawn architectures; it is no measure of all that can be wrong.",
    ]
    if about.get("finished") is False:
        notes.append("predict was interrupted: some cases may lack.")
    if config.schedule.draw_until < 1 and config.network.method == "sfg":
        notes.append(
            f"Groupings were drawn in the first {config.schedule.draw_until:.0%} of the steps, then fixed at the most "
            "probable one. The paper draws to the end."
        )
    return notes
