"""The configured network: how training starts it, and how it is read back from the folder of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch import Tensor, nn

from ..data.cache import Cache
from ..data.images import ImageForm
from ..data.targets import Target, TargetAsJson
from ..errors import InputError
from ..files import check_shape, one_line, read_json, shown
from ..networks.build import build, head_biases, least_size
from ..networks.controls import assign, draws_from_constant_p, map_assignment, set_estimator, sfg_layers
from ..networks.transfer import transfer
from ..tasks import Task, read_tasks
from . import checkpoint
from .config import TrainConfig, TransferConfig, difference, from_saved
from .history import check_history


def build_network(config: TrainConfig, in_channels: int, tasks: Mapping[str, Task]) -> nn.Module:
    """The configured network for images of `in_channels` channels. Raises InputError for options that it can't have."""
    network = config.network
    try:
        model = build(
            network.name,
            in_channels,
            {name: task.outputs for name, task in tasks.items()},
            width=network.width,
            blocks=network.blocks,
            residual=network.residual,
            stages=network.stages,
            down=network.down,
            deep_supervision=network.deep_supervision,
            method=network.method,
            norm=network.norm,
            init=network.init,
            estimator=network.estimator,
            noise_on=network.noise_on,
            explore=network.explore,
            shared=network.shared,
            dropout=network.dropout,
            spatial_dims=3 if config.spatial_dims == 3 else None,
        )
        if network.method == "sfg":
            set_estimator(model, network.estimator, network.every)
        return model
    except ValueError as error:
        raise InputError(f"network: {error}") from error


class AboutData(TypedDict):
    """The data that a run is trained on, as data.json and each checkpoint hold it. `targets` have the statistics of the
    training cases; `images` is their `ImageForm`, None for volumes; `cases` are the names in each split."""

    in_channels: int
    channel_names: list[str]
    targets: dict[str, TargetAsJson]
    images: dict[str, Any] | None
    cases: dict[str, list[str]]
    fingerprint: str


class Run(NamedTuple):
    """A finished run.

    Attributes:
        config: the configuration of the run.
        model: the network, on the CPU, with the running statistics of argmax p.
        tasks: its tasks, bound to the targets that the run was trained on.
        drawn_statistics: the running statistics for predictions by draws.
        channel_names: the names of the MR's channels.
        images: how images are prepared; None for volumes.
        cases: the names of the cases in each split, as the run (or fold) had them.
        history: the course of the run (`history.empty_history`).
        digest: the digest of the checkpoint.
    """

    config: TrainConfig
    model: nn.Module
    tasks: dict[str, Task]
    drawn_statistics: dict[str, Tensor]
    channel_names: tuple[str, ...]
    images: ImageForm | None
    cases: dict[str, list[str]]
    history: dict[str, Any]
    digest: str


def load_run(folder: Path, which: str = "final") -> Run:
    """Read a finished run from its folder: the "final" network, or that which was "best" on the validation split.

    Raises InputError for a folder that holds no run, a run that is not finished or of another version, a run without a
    best network, and a data.json of another run.
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
    channels, images = tuple(data["channel_names"]), data["images"]
    tasks = _tasks(config, data, path)
    model = build_network(config, data["in_channels"], tasks)
    checkpoint.load_weights(model, state["model"], path)
    return Run(
        config,
        model,
        tasks,
        state["drawn_statistics"],
        channels,
        None if images is None else ImageForm.from_json(images),
        data["cases"],
        state["history"],
        state["digest"],
    )


def check_data(folder: Path, trained: dict[str, Any]) -> None:
    """Raise InputError, which names the first difference, if a run's data.json differs from `trained`, what its
    checkpoint says."""
    path = folder / "data.json"
    if found := difference(read_json(path, AboutData), trained):
        key, there, own = found
        raise InputError(f"{path}: {key} is {shown(there)}, the run was trained with {shown(own)}, expected that")


def _about_data(found: Any, path: Path) -> dict[str, Any]:
    """`found`, what a checkpoint says of the data, once it is checked. Raises InputError if it can't be."""
    check_shape(found, AboutData, str(path), "data")
    channels, names = found["in_channels"], found["channel_names"]
    if channels < 1:
        raise InputError(f"{path}: in_channels {channels!r}, expected the number of channels of the run's images")
    if len(names) != channels:
        raise InputError(f"{path}: channel_names {names!r}, expected the names of {channels} channels")
    return found


def _tasks(config: TrainConfig, data: dict[str, Any], path: Path) -> dict[str, Task]:
    """The tasks of a run, bound to the targets that it was trained on."""
    try:
        return read_tasks(config.tasks, {name: Target.from_json(name, one) for name, one in data["targets"].items()})
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its tasks don't fit its targets ({one_line(error)}), expected those of a run"
        ) from error


# --- the start --------------------------------------------------------------------------------------------------------


def check_size(model: Any, config: TrainConfig, cache: Cache) -> None:
    """Raise InputError if images, or patches, are smaller than the network takes."""
    size = config.patch if cache.images is None else list(cache.images.size)
    least = least_size(model)
    if size is not None and min(size) < least:
        what = f"{config.data}: its images are" if config.patch is None else "patch is"
        found, expected = (" x ".join(map(str, sizes)) for sizes in (size, [least] * len(size)))
        how = " (preprocess --size)" if config.patch is None else ""
        raise InputError(f"{what} {found}, expected at least {expected} for network {config.network.name}{how}")


def starting_network(config: TrainConfig, in_channels: int, tasks: Mapping[str, Task]) -> nn.Module:
    """The configured network as training starts it: its heads predict the targets' means, and it has the filters or the
    grouping of another run, if the configuration says so. Raises InputError for options that it can't have."""
    model = build_network(config, in_channels, tasks)
    for name, task in tasks.items():
        for bias in head_biases(model, name):
            bias.copy_(task.start())
    if config.transfer.run is not None:
        _transfer(model, config.transfer, tasks)
    if config.network.grouping is not None:
        _take_grouping(model, config.network.grouping)
    return model


def _take_grouping(model: nn.Module, run: str) -> None:
    """Fix the network's grouping to the most probable assignment of another run."""
    learnt = load_run(Path(run)).model
    try:
        if draws_from_constant_p(learnt):
            raise ValueError("its grouping is drawn from a constant p")
        own, theirs = ({n: layer.group_names for n, layer in sfg_layers(one).items()} for one in (model, learnt))
        if own != theirs:
            raise ValueError(f"its SFG layers and their groups are {theirs}, those of this network {own}")
        assign(model, map_assignment(learnt))
    except ValueError as error:
        expected = "a run of the same network and tasks that learnt its grouping"
        raise InputError(f"network.grouping={run!r}: {one_line(error)}; expected {expected}") from error


def _check_same_meaning(theirs: Mapping[str, Task], mine: Mapping[str, Task], config: TransferConfig) -> None:
    """Raise ValueError for a task that would take the head of a task which means something else: one of another kind,
    unit or order of classes."""
    pairs = {name: name for name in mine if name in theirs} if config.tasks is None else config.tasks
    for name, of in pairs.items():
        if name not in mine or of not in theirs:
            continue  # `transfer` refuses these
        task, source = mine[name], theirs[of]
        for what, own, other in (
            ("kind", task.kind, source.kind),
            ("output unit", task.output_unit, source.output_unit),
            ("unit", task.of.unit, source.of.unit),
            ("names", task.of.names, source.of.names),
        ):
            if own != other:
                raise ValueError(f"task {name!r} has {what} {own!r}, the run's {of!r} has {other!r}: expected the same")


def _transfer(model: nn.Module, config: TransferConfig, tasks: Mapping[str, Task]) -> None:
    """Copy another run's filters into the network. A resumed run does so, too, because this freezes filters; it loads
    its own weights afterwards."""
    assert config.run is not None
    source = load_run(Path(config.run))
    try:
        _check_same_meaning(source.tasks, tasks, config)
        transfer(source.model, model, config.tasks, config.freeze)
    except ValueError as error:
        raise InputError(f"transfer.run={config.run!r}: {str(error).removeprefix('transfer: ')}") from error
