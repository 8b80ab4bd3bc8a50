"""The report of a run: what it learnt, how well it predicts, and pictures of every predicted case.

For a cohort of images the report shows numbers only, and no image has a row in it: images may be faces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ..data.cases import Case, Cohort, LoadedCase
from ..data.cohort import check_same_channels, check_same_targets, load_case
from ..data.preprocessing import normalise
from ..data.targets import Target
from ..errors import InputError
from ..files import make_folder, read_json, read_text
from ..layers.conv import Features
from ..networks.controls import entropy, sfg_layers
from ..tasks import Task
from ..training.config import difference, read_config
from ..training.run import load_run
from . import figures
from .evaluate import (
    ABOUT,
    about_predictions,
    about_tasks,
    predicted_cases,
    predicted_tasks,
    read_evaluated,
    read_prediction,
    read_uncertainty,
    tasks_differ,
)
from .html import write_report
from .predict import BY, Predictor, padded_to

Drawn = list[tuple[str, str, Figure]]  # (name of the file without .png, caption, figure)

KERNELS_SHOWN = 4  # how many kernels of each group `activation_maps` takes


def report_on(run: Path, cohort: Cohort, predictions: Path, metrics: Path, out: Path) -> None:
    """Write the report of a run as one HTML file, and its figures as PNG beside it in `figures/`.

    metrics: the metrics.json of `evaluate`. out: the HTML file.
    Raises InputError if one of these can't be read, or doesn't belong to the others: predictions of another run or
    cohort, metrics of other predictions or of another cohort. (Predictions that `predict` didn't make name no run, and
    are taken as they are.)
    """
    about = about_predictions(predictions)
    predictor = Predictor(run, checkpoint=about.get("checkpoint", "final"))
    history = _history(run, predictor)
    if about.get("digest", predictor.digest) != predictor.digest:
        where = run / "checkpoints" / f"{predictor.checkpoint}.pt"
        raise InputError(
            f"{predictions / ABOUT}: predicted by another run than {where}, expected that one (or predict again)"
        )
    if (said := about_tasks(about)) and (found := tasks_differ(said, predictor.tasks)):
        key, there, own = found
        raise InputError(f"{predictions / ABOUT}: tasks.{key} is {there!r}, the run's is {own!r}, expected the same")
    if cohort.images != (predictor.images is not None):
        kind = "images" if predictor.images is not None else "volumes"
        raise InputError(f"{cohort.root}: the run was trained on {kind}, expected a cohort of such")
    check_same_targets({task.target: task.of for task in predictor.tasks.values()}, cohort, str(run))
    check_same_channels(predictor.channel_names, cohort, str(cohort.root))
    shown = read_config(run / "config.yaml")
    if found := difference(dataclasses.asdict(shown), dataclasses.asdict(predictor.config)):
        key, there, trained = found
        raise InputError(
            f"{run / 'config.yaml'}: {key} is {there!r}, the run was trained with {trained!r}, expected that"
        )
    cases = predicted_cases(predictions, cohort, about)
    tasks, targets = predicted_tasks(predictions, cohort, cases, about)
    document = read_evaluated(metrics, predictions, cohort, cases, tasks)
    folder = out.parent / "figures"
    make_folder(folder)
    drawn = _learnt(history, predictor)
    if cohort.images:
        drawn += _charts(tasks, document)
    else:
        drawn += _cases(predictor, cases, predictions, tasks, targets)
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


def _learnt(history: dict[str, Any], predictor: Predictor) -> Drawn:
    """The figures of what the network learnt, and how."""
    whose = "held-out" if any(predictor.splits.get(split) for split in ("val", "test")) else "training"
    one = "patch" if predictor.config.spatial_dims == 3 else "slice"
    scored = f"a few {whose} images" if predictor.images is not None else f"one {whose} {one}"
    return [
        (
            "allocation",
            "Learned allocation: share of the kernels' probability in each group, by layer (paper, Fig. 3 left).",
            figures.allocation(history),
        ),
        ("allocation_over_training", "Allocation over training.", figures.allocation_over_training(history)),
        ("entropy", "Mean entropy of the grouping probabilities.", figures.entropy(history)),
        (
            "curves",
            f"Training. The scores of each task are of {scored}, to watch, not to report.",
            figures.curves(history),
        ),
    ]


def _charts(tasks: Mapping[str, Task], document: Mapping[str, Any]) -> Drawn:
    """The figures of each task's predictions against the truth, for all images."""
    drawn: Drawn = []
    for name, task in tasks.items():
        scored = [case[name] for case in document["cases"].values() if name in case]
        shown = task.chart(scored)
        if shown is not None and scored:
            caption = f"{task.title}: predictions against the truth, {len(scored)} images."
            drawn.append((f"task_{name}", caption, figures.chart(shown)))
    return drawn


def _cases(
    predictor: Predictor,
    cases: Sequence[Case],
    predictions: Path,
    tasks: Mapping[str, Task],
    targets: Mapping[str, Target],
) -> Drawn:
    """The figures of a slice of every predicted case, and of what kernels see in the first case."""
    drawn: Drawn = []
    for index, case in enumerate(cases):
        loaded = load_case(case, targets)
        predicted = read_prediction(predictions, case, loaded, tasks)
        uncertainty = read_uncertainty(predictions, case, loaded, tasks)
        z = telling_slice(loaded, targets)
        in_plane = loaded.grid.spacing[1:]
        if index == 0:
            seen, maps = activation_maps(predictor, loaded.inputs, z)
            caption = "Activations of the kernels whose group is surest, lowest entropy first (paper, Fig. 3 right)."
            drawn.append(("activation_maps", caption, figures.activation_maps(seen, maps, in_plane)))
        panels = [background := figures.mr_panel(loaded.inputs[0, z])]
        for name, task in tasks.items():
            panels += task.panels(background, _slice(loaded.targets, task.target, z), _slice(predicted, name, z))
        for name, volume in uncertainty.items():
            panels.append(figures.uncertainty_panel(volume[z], name, tasks[name].uncertainty_unit))
        panel = figures.case_panel(panels, in_plane, f"{case.name}, axial slice {z}")
        drawn.append((f"case_{case.name}", f"Case {case.name}.", panel))
    return drawn


def course(run: Path, predictor: Predictor) -> dict[str, Any]:
    """The history of a run to the end of its training, also if its best checkpoint predicts, which ends earlier."""
    return predictor.history if predictor.checkpoint == "final" else load_run(run).history


def _history(run: Path, predictor: Predictor) -> dict[str, Any]:
    """The history of the run to its end, as its last checkpoint has it. Raises InputError if history.json, which is
    there for people to read, says something else."""
    own = course(run, predictor)
    path = run / "history.json"
    if path.exists() and read_json(path) != own:
        where = run / "checkpoints" / "final.pt"
        raise InputError(f"{path}: it is not the history in {where}, expected that of this run, or no such file")
    return own


@torch.no_grad()
def activation_maps(
    predictor: Predictor, inputs: np.ndarray, z: int
) -> tuple[np.ndarray, dict[str, list[tuple[str, np.ndarray]]]]:
    """The normalised MR [Y, X] that the network sees, and the activations of the `KERNELS_SHOWN` kernels of lowest
    entropy in each group, from all layers: {group: [(title, activation [Y, X]), ..]}.

    inputs: the MR as scanned, [C, Z, Y, X]. z: the index of the slice. A network that was trained on 3-D patches sees a
    patch in the middle of this slice, of which that slice is shown. A kernel's group is argmax p, or a draw if p is
    constant.
    """
    volume, patch = torch.from_numpy(normalise(inputs))[None], predictor.config.patch
    if patch is None or predictor.config.spatial_dims == 2:
        x, at = volume[:, :, z], 0.0
    else:
        x, at = _patch_around(volume, patch, z)
    layers = sfg_layers(predictor.model)
    outputs: dict[str, Any] = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: outputs.__setitem__(name, out))
        for name, layer in layers.items()
    ]
    with torch.random.fork_rng():
        torch.manual_seed(predictor.config.seed)  # a network with a constant p draws its groups here
        predictor.model(x.to(predictor.device))
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
            activation = _plane(features.dense(group)[0, kernel], at)
            maps[group].append((f"{name} #{kernel}\nH = {value:.2f}", activation.cpu().numpy()))
    return _plane(x[0, 0], at).numpy(), maps


def _patch_around(volume: Tensor, patch: Sequence[int], z: int) -> tuple[Tensor, float]:
    """The patch in the middle of the slice z of a volume [1, C, Z, Y, X], and at which share of its depth the middle of
    that slice lies."""
    padded, inside = padded_to(volume, patch)
    middle = (z + inside[0].start, *(size // 2 for size in padded.shape[3:]))
    starts = [
        min(max(0, at - length // 2), size - length)
        for at, length, size in zip(middle, patch, padded.shape[2:], strict=True)
    ]
    window = [slice(start, start + length) for start, length in zip(starts, patch, strict=True)]
    return padded[(slice(None), slice(None), *window)], (middle[0] - starts[0] + 0.5) / patch[0]


def _plane(values: Tensor, at: float) -> Tensor:
    """The values [Y, X] themselves; of values [Z, Y, X] the slice at this share of the depth."""
    return values if values.dim() == 2 else values[int(at * len(values))]


def telling_slice(case: LoadedCase, targets: Mapping[str, Target]) -> int:
    """The index of the slice with most labelled voxels, or of the middle slice if there is none."""
    labels = [volume for name, volume in case.targets.items() if targets[name].kind == "labels"]
    counts = np.sum([(volume > 0).sum((1, 2)) for volume in labels], axis=0)
    return int(counts.argmax()) if np.any(counts) else case.inputs.shape[1] // 2


def _slice(volumes: Mapping[str, np.ndarray], name: str, z: int) -> np.ndarray | None:
    return volumes[name][z] if name in volumes else None


def _notes(predictor: Predictor, cases: int, about: Mapping[str, Any]) -> list[str]:
    """The notes of the report. cases: how many cases were predicted. about: what `predict` says of them."""
    config = predictor.config
    kind = config.network.residual  # None; a word of highresnet, or a bool of unet
    residual = f", residual blocks {kind}" if isinstance(kind, str) else ", residual encoder" if kind else ""
    of = "images" if predictor.images is not None else "cases"
    by = about.get("by", "")
    if by == "map" and predictor.constant_p:
        by = "draws"
    elif by in BY and not predictor.draws_anything:  # then all ways are the same, whatever was asked for
        by = "map"
    made = f"from {BY[by]}, checkpoint {about.get('checkpoint')}" if by in BY else "from elsewhere"
    notes = [
        f"Network {config.network.name}, method {config.network.method}{residual}, {config.schedule.steps} steps, "
        f"{cases} {of} predicted.",
        f"The predictions come {made}.",
        "The uncertainty is the SD over drawn architectures; it is no measure of all that can be wrong.",
    ]
    if about.get("statistics") == "batch":
        notes.append(
            "Features were normalised by the statistics of each batch that was predicted, not by those of training: a "
            "prediction depends on what else was in its batch."
        )
    if about.get("finished") is False:
        notes.append("predict was interrupted: some cases may lack.")
    if config.schedule.draw_until < 1 and config.network.method == "sfg":
        notes.append(
            f"Groupings were drawn in the first {config.schedule.draw_until:.0%} of the steps, then fixed at the most "
            "probable one. The paper draws to the end."
        )
    return notes
