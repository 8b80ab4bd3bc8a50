"""A run folder read back: the configured network, and what it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import InputError
from ..files import read_json
from ..networks.controls import set_estimator
from ..networks.highresnet import SFGHighResNet
from . import checkpoint
from .config import NetworkConfig, ObjectiveConfig, ScheduleConfig, TrainConfig, TransferConfig


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


class Run(NamedTuple):
    """A finished run. `model`, on the CPU, holds the running statistics of argmax p; `drawn_statistics` are those of
    predictions by draws; `label_names`: name -> label value; `in_channels`: of the MR."""

    config: TrainConfig
    model: SFGHighResNet
    drawn_statistics: dict[str, Tensor]
    label_names: dict[str, int]
    in_channels: int


def load_run(folder: Path) -> Run:
    """Read a finished run. Raises InputError for a folder that is no run, is not finished, or is of another version."""
    path = folder / "checkpoints" / "last.pt"
    state = checkpoint.load(path)
    if not state["finished"]:
        raise InputError(
            f"{folder}: training stopped at step {state['step']}, expected a finished run (train --resume)"
        )
    config = _config(state["config"], path)
    data = read_json(folder / "data.json")
    model = build_network(config, data["in_channels"], max(data["labels"].values(), default=0) + 1)
    checkpoint.load_weights(model, state["model"], path)
    return Run(config, model, state["drawn_statistics"], data["labels"], data["in_channels"])


def _config(saved: dict[str, Any], path: Path) -> TrainConfig:
    try:
        parts = {
            "network": NetworkConfig(**saved["network"]),
            "objective": ObjectiveConfig(**saved["objective"]),
            "schedule": ScheduleConfig(**saved["schedule"]),
            "transfer": TransferConfig(**saved.get("transfer", {})),
        }
        return TrainConfig(**{**saved, **parts})
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its configuration is not one of this version ({error})") from error
