"""The configured network: as training starts from it, and read back from a run folder with what it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..data.cache import Cache
from ..data.cohort import check_label_names
from ..errors import InputError
from ..files import check_shape, read_json, shown
from ..networks.controls import set_estimator
from ..networks.highresnet import SFGHighResNet
from ..networks.transfer import transfer
from . import checkpoint
from .config import TrainConfig, TransferConfig, difference, from_saved
from .history import check_history


def build_network(config: TrainConfig, in_channels: int, organs: int) -> SFGHighResNet:
    """The configured network for images of `in_channels` channels and `organs` classes. InputError if it can't be."""
    sizes = {"ct": 2 if config.objective.ct_noise == "heteroscedastic" else 1, "organs": organs}
    outputs = {task: sizes[task] for task in config.tasks}
    network = config.network
    try:
        model = SFGHighResNet(
            in_channels,
            outputs,
            network.width,
            network.blocks,
            network.residual,
            method=network.method,
            norm=network.norm,
            init=network.init,
            estimator=network.estimator,
        )
        if network.method == "sfg":
            set_estimator(model, network.estimator, network.every)
        return model
    except ValueError as error:
        raise InputError(f"network: {error}") from error


class AboutData(TypedDict):
    """What a run is trained on, in data.json and in each of its checkpoints; `cases`: those of each split."""

    in_channels: int
    channel_names: list[str]
    labels: dict[str, int]
    cases: dict[str, list[str]]
    fingerprint: str


class Run(NamedTuple):
    """A finished run. `model`, on the CPU, holds the running statistics of argmax p; `drawn_statistics` are those of
    predictions by draws; `label_names`: name -> label value; `channel_names`: of the MR;
    `cases`: the names of those in each split, as the run (or fold) had them; `history`: of its course, to draw;
    `digest`: of the checkpoint."""

    config: TrainConfig
    model: SFGHighResNet
    drawn_statistics: dict[str, Tensor]
    label_names: dict[str, int]
    channel_names: tuple[str, ...]
    cases: dict[str, list[str]]
    history: dict[str, Any]
    digest: str


def load_run(folder: Path, which: str = "final") -> Run:
    """Read a finished run: its `final` network, or the `best` on the validation split.

    Raises InputError for a folder that is no run, is not finished, has no best, is of another version, or whose
    data.json is of another run.
    """
    path = folder / "checkpoints" / f"{which}.pt"
    if not path.exists() and (left := checkpoint.steps(path.parent)):
        if (path.parent / "final.pt").exists():
            raise InputError(f"{folder}: the run has no {path.name}, because it had no validation split")
        step = checkpoint.load(left[0])["step"]
        raise InputError(f"{folder}: training stopped at step {step}, expected a finished run (train --resume)")
    state = checkpoint.load(path)
    if not state["finished"]:
        raise InputError(
            f"{folder}: training stopped at step {state['step']}, expected a finished run (train --resume)"
        )
    config = from_saved(state["config"], path)
    data = _about_data(state["data"], path)
    check_data(folder, data)
    check_history(state["history"], str(path))
    labels, channels = data["labels"], tuple(data["channel_names"])
    model = build_network(config, len(channels), max(labels.values(), default=0) + 1)
    checkpoint.load_weights(model, state["model"], path)
    return Run(
        config,
        model,
        state["drawn_statistics"],
        labels,
        channels,
        data["cases"],
        state["history"],
        state["digest"],
    )


def check_data(folder: Path, trained: dict[str, Any]) -> None:
    """InputError, naming the first difference, if data.json of a run says something else than its checkpoint."""
    path = folder / "data.json"
    if found := difference(read_json(path, AboutData), trained):
        key, there, own = found
        raise InputError(f"{path}: {key} is {shown(there)}, the run was trained with {shown(own)}, expected that")


def _about_data(found: Any, path: Path) -> dict[str, Any]:
    """What a checkpoint says that the run was trained on. InputError if that can't be."""
    check_shape(found, AboutData, str(path), "data")
    channels, names, labels = found["in_channels"], found["channel_names"], found["labels"]
    if channels < 1:
        raise InputError(f"{path}: in_channels {channels!r}, expected the number of MR channels of the run")
    if len(names) != channels:
        raise InputError(f"{path}: channel_names {names!r}, expected the names of {channels} MR channels")
    if labels:
        check_label_names(labels, str(path))
    return found


# --- the start --------------------------------------------------------------------------------------------------------


def starting_network(config: TrainConfig, cache: Cache) -> SFGHighResNet:
    """The configured network as training starts from it: heads at the mean CT and the classes' frequencies, filters of
    another run where they are transferred. InputError if it can't be."""
    model = build_network(config, cache.in_channels, max(cache.label_names.values(), default=0) + 1)
    _start_from_the_mean(model, cache, config)
    if config.transfer.run is not None:
        _transfer(model, config.transfer)
    return model


def _start_from_the_mean(model: SFGHighResNet, cache: Cache, config: TrainConfig) -> None:
    """Head biases: the mean CT, and the classes' frequencies."""
    if "ct" in config.tasks:
        _head_bias(model, "ct")[0] = cache.mean_ct("train") / config.objective.ct_scale_hu
    if "organs" in config.tasks:
        frequencies = torch.as_tensor(cache.class_frequencies("train"), dtype=torch.float32)
        _head_bias(model, "organs").copy_(frequencies.clamp_min(1e-6).log())


def _transfer(model: SFGHighResNet, config: TransferConfig) -> None:
    """Start from another run's filters. (A resumed run does so, too, and then loads its own; the frozen stay.)"""
    assert config.run is not None
    try:
        transfer(load_run(Path(config.run)).model, model, config.tasks, config.freeze)
    except ValueError as error:
        raise InputError(f"transfer.run={config.run!r}: {str(error).removeprefix('transfer: ')}") from error


def _head_bias(model: SFGHighResNet, task: str) -> Tensor:
    bias = model.heads.conv.bias
    assert bias is not None
    return bias.data[model.heads.rows(task)]
