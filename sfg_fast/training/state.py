"""The state of a training run: how it is made, saved, and resumed to the bit."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from .. import backends, kernel_choice
from ..data.cache import Cache
from ..data.cohort import SPLITS
from ..data.sampler import ImageSampler, SliceSampler
from ..errors import InputError
from ..files import make_folder, replacing, write_json
from ..gpu.gpu_check import gpu_check
from ..norm import synchronise
from ..tasks import read_tasks
from . import checkpoint
from .config import TrainConfig, check, difference
from .folds import last_look, make_splits, read_fold, splits_path
from .history import empty_history
from .objective import Objective
from .onlookers import Onlooker, tell
from .parallel import (
    Processes,
    choose_device,
    has_bfloat16,
    merged_statistics,
    random_state,
    set_random_state,
    statistics_of,
)
from .run import check_data, check_size, starting_network
from .schedule import build_optimiser, load_optimiser, optimiser_state
from .validation import held_out, titles


class TrainingState:
    """The network, objective and optimiser at a step, the history so far, and the source of the examples.

    Attributes:
        tasks: the tasks that are learnt, bound to the cohort's targets.
        step: how many optimiser steps are done.
        history: see `history.empty_history`.
        best: the row of the best look at the validation split so far, or None.
        stale: how many looks since then were worse. It counts once groupings are fixed (`schedule.draw_until`).
        sampler: the examples to train on.
        validation: the examples of the validation split; None without one.
        calibration: the examples that running statistics are re-estimated from.
        monitored: a held-out batch, whose scores the history shows.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume: bool = False,
        observe: Callable[[dict[str, Any], Path], None] = lambda history, folder: None,
    ) -> None:
        check(config)
        self.config, self.out = config, Path(config.out)
        self._figure = Onlooker("the figure of its progress", lambda: observe)
        device = choose_device(config.device)
        cache = Cache(Path(config.data))
        self.processes = Processes(device)
        self.device = self.processes.device
        if config.graph == "on" and not self.processes.one_gpu:
            raise InputError(
                "graph='on': expected auto or off, because steps are captured in one process on a GPU alone"
            )
        self._whole = cache  # `make_splits` needs the cases of all folds
        if config.folds is not None:
            if config.fold is None:
                raise InputError(f"folds={config.folds!r}: a run is one fold, expected fold to be given")
            cache = read_fold(cache, config.folds, config.fold)
        self._make_samplers(cache)
        described = cache.described("train")
        self.tasks = read_tasks(config.tasks, {**cache.targets, **described})
        for task in self.tasks.values():
            if not cache.has(task.target):
                raise InputError(f"{config.data}: task {task.name!r} needs {task.target}, and no training case has any")
        self.counts = {split: cache.count(split) for split in SPLITS}  # how many cases, or images

        torch.manual_seed(config.seed)
        self.model = starting_network(config, cache.in_channels, self.tasks)
        check_size(self.model, config, cache)
        if config.same_assignment and self.processes.count > 1:
            synchronise(self.model)
        self.model.to(self.device)
        if self.device.type == "cuda" and config.spatial_dims == 2:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = Objective(self.tasks, config.objective).to(self.device)
        self.optimiser = build_optimiser(config.schedule, self.model, self.objective, waits=not self.processes.one_gpu)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.stale = 0
        self.history = empty_history(self.model, self.tasks, titles(self.tasks))
        self.about_data: dict[str, Any] = {
            "in_channels": cache.in_channels,
            "channel_names": list(cache.channel_names),
            "targets": {name: target.to_json() for name, target in described.items()},
            "images": None if cache.images is None else cache.images.to_json(),
            "cases": {split: cache.names(split) for split in SPLITS},
            "fingerprint": cache.fingerprint(),
        }
        self._begun, self._may_resume = False, resume
        self._resumed_kernels: list[Any] | None = None  # of the checkpoint that the run goes on from
        if resume and any(self.checkpoints.glob("*.pt")):
            self._resume()
        else:
            self._choose_precision()
            self._draw_apart(0)
            self.processes.main_does(self._check_free)

    def begin(self) -> None:
        """Choose the kernels; of a new run also claim the folder `out` and write the checkpoint of step 0. Until then
        nothing is written to any disk. Called again, it does nothing.

        Raises InputError if the folder holds a run by now or can't be written to, OSError if the disk is full.
        """
        if self._begun:
            return
        if self.config.folds is not None:
            self.processes.main_does(self._write_folds)
        if self._resumed_kernels is not None:
            self._take_kernels(self._resumed_kernels)
        else:
            self._choose_kernels()
            self.processes.main_does(self._claim)
            self._save()  # so that a run which is killed before its first checkpoint can be resumed, too
        self._begun = True

    def _write_folds(self) -> None:
        """Write splits_final.json, if it is missing. Raises InputError if another run has divided the cases otherwise
        since this one was made."""
        folds, fold = self.config.folds, self.config.fold
        assert folds is not None
        assert fold is not None
        make_splits(self._whole, folds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fold that leaves out cases was told when the run was made
            now = read_fold(self._whole, folds, fold)
        if any(now.names(split) != self.about_data["cases"][split] for split in SPLITS):
            raise InputError(f"{splits_path(self._whole)}: fold {fold} has changed, expected it as it was before")

    def _make_samplers(self, cache: Cache) -> None:
        config, processes = self.config, self.processes
        own: dict[str, Any] = {"rank": processes.rank, "ranks": processes.count}
        make: Callable[..., SliceSampler | ImageSampler]
        if cache.images is None:
            make = functools.partial(
                SliceSampler, cache, batch=config.schedule.batch, patch=config.patch, seed=config.seed
            )
            augmented: dict[str, Any] = {"bias": config.bias, "foreground": config.foreground}
        else:
            make = functools.partial(ImageSampler, cache, batch=config.schedule.batch, seed=config.seed)
            augmented = {"flip": config.flip, "shift": config.shift}
        self.sampler = make(split="train", **augmented, **own)
        self.calibration = make(split="train", **augmented)  # the same in all processes
        self.validation = make(split="val", **own) if cache.names("val") else None
        self.monitored = held_out(cache, config.patch)
        if config.schedule.patience is not None and self.validation is None:
            raise InputError(
                f"schedule.patience={config.schedule.patience!r}: {config.data} has no case of split val, expected one"
            )

    def _choose_precision(self) -> None:
        """Put the precision that `auto` stands for into the configuration, the same in all processes."""
        if self.config.precision == "auto":
            lacking = self.processes.any(not has_bfloat16(self.device))
            self.config = dataclasses.replace(self.config, precision="float32" if lacking else "bfloat16")

    def _choose_kernels(self) -> None:
        """Choose the kernels for CUDA tensors, the same in all processes. The main process checks its GPU, if it was
        never checked."""
        if self.device.type != "cuda" or backends.current() != "auto":
            return
        kernel_choice.forget()
        lists: list[Any] = []
        if self.processes.main:
            choice = gpu_check(self.device) if self.config.gpu_check == "on" else kernel_choice.chosen(self.device)
            lists = kernel_choice.as_lists(choice)
        every = self.processes.gathered((lists, kernel_choice.known(self.device)))
        choice = kernel_choice.from_lists(every[0][0])
        if any(gpu != every[0][1] for _, gpu in every):
            choice = kernel_choice.Choice(why="the processes have different GPUs, drivers or versions")
        kernel_choice.choose(self.device, choice)

    def _check_free(self) -> None:
        """Raise InputError if the folder `out` holds a run. With `resume` a run without a checkpoint doesn't count: it
        was killed before it had any, and may start again."""
        taken = any(self.checkpoints.glob("*.pt"))
        if not self._may_resume:
            taken = (self.out / "config.yaml").exists() or self.checkpoints.exists()
        if taken:
            raise InputError(f"{self.out}: holds a run already, expected a new folder (or --resume)")

    def _claim(self) -> None:
        """Make the folder `out`, with config.yaml and data.json in it."""
        self._check_free()
        make_folder(self.out)
        with replacing(self.out / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False), encoding="utf-8")
        write_json(self.out / "data.json", self.about_data)

    def _draw_apart(self, step: int) -> None:
        """Give this process random numbers of its own, so that it draws its own assignments, unless `same_assignment`
        asks for one draw for all processes."""
        if self.processes.rank and not self.config.same_assignment:
            torch.manual_seed(seed_of(self.config.seed, self.processes.rank, step))

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.out / "checkpoints"

    def _state(self, drawn_statistics: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """The content of a checkpoint.

        `drawn_statistics` are the running statistics for predictions by draws. Only a finished run has them; its
        `model` holds the statistics of argmax p. In other checkpoints `model` holds the mean of the statistics over the
        processes, and `processes` holds those of each process.
        """
        own = {"rng": random_state(self.device), "statistics": statistics_of(self.model)}
        processes = self.processes.gathered(own)
        model = self.model.state_dict()
        if drawn_statistics is None and len(processes) > 1:
            model = {**model, **merged_statistics([one["statistics"] for one in processes])}
        return {
            "model": model,
            "objective": self.objective.state_dict(),
            "optimiser": optimiser_state(self.optimiser),
            "step": self.step,
            "finished": drawn_statistics is not None,
            "drawn_statistics": drawn_statistics,
            "processes": processes,
            "best": self.best,
            "stale": self.stale,
            "history": self.history,
            "config": dataclasses.asdict(self.config),
            "data": self.about_data,
            "kernels": self._kernels(),
        }

    def _kernels(self) -> list[Any]:
        """The chosen kernels, and the GPU, driver and versions that they were chosen for; empty on a CPU."""
        if self.device.type != "cuda" or backends.current() != "auto":
            return []
        return [*kernel_choice.as_lists(kernel_choice.chosen(self.device)), kernel_choice.known(self.device)]

    def _take_kernels(self, kernels: list[Any]) -> None:
        """Take the kernels that a checkpoint was made with, whatever a check says by now: others would give other bits.
        With another GPU, driver or version the bits differ anyway, so the kernels are chosen anew."""
        if self.device.type != "cuda" or backends.current() != "auto":
            return
        if kernels and kernels[2] is not None and kernels[2] == kernel_choice.known(self.device):
            kernel_choice.choose(self.device, kernel_choice.from_lists(kernels[:2]))
            return
        if self.processes.main:
            tell(f"{self.out}: the run began elsewhere; its kernels are chosen anew: not to the bit")
        self._choose_kernels()

    def _save(self) -> None:
        """Write a checkpoint to resume from."""
        state = self._state()

        def write() -> None:
            if self.best is not None and self.best["step"] == self.step:
                checkpoint.save(self.checkpoints / "best.pt", state)
            checkpoint.save(checkpoint.step_path(self.checkpoints, self.step), state)
            checkpoint.prune(self.checkpoints, self.config.keep)
            self._tell()

        self.processes.main_does(write)

    def _tell(self) -> None:
        """Write history.json, and show the history to `observe`."""
        write_json(self.out / "history.json", self.history)
        self._figure(lambda observe: observe(self.history, self.out))

    def _resume(self) -> None:
        """Restore the newest checkpoint. Raises InputError if the run is finished or has another configuration or
        cohort."""
        final = self.checkpoints / "final.pt"
        if final.exists():
            try:
                step = checkpoint.load(final)["step"]
            except InputError as error:
                warnings.warn(f"{error}; finishing again", stacklevel=3)
            else:
                raise InputError(f"{self.out}: this run is finished ({step} steps), there is nothing to resume")
        path, state = checkpoint.newest(self.checkpoints)
        _check_same(self.config, state, self.about_data["fingerprint"])
        self.config = dataclasses.replace(self.config, precision=state["config"]["precision"])
        self._resumed_kernels = state.get("kernels", [])
        self._restore(path, state)
        self.best, self.stale, self.history = state["best"], state["stale"], state["history"]
        processes = state["processes"]
        if len(processes) == self.processes.count:
            own = processes[self.processes.rank]
            self.model.load_state_dict(own["statistics"], strict=False)
            set_random_state(own["rng"], self.device)
        else:
            warnings.warn(
                f"{path}: of {len(processes)} processes, resumed by {self.processes.count}: not to the bit",
                stacklevel=3,
            )
            torch.manual_seed(seed_of(self.config.seed, 0, self.step))
            self._draw_apart(self.step)

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        checkpoint.load_weights(self.model, state["model"], path)
        self.objective.load_state_dict(state["objective"])
        load_optimiser(self.optimiser, state["optimiser"])
        self.step = state["step"]


def check_finished(config: TrainConfig) -> None:
    """Raise InputError if the finished run of a fold has another configuration or cohort, or no summary.json that tells
    how it ended."""
    assert config.folds is not None
    assert config.fold is not None
    cache = Cache(Path(config.data))
    make_splits(cache, config.folds)
    cache = read_fold(cache, config.folds, config.fold)
    final = checkpoint.load(Path(config.out) / "checkpoints" / "final.pt")
    _check_same(config, final, cache.fingerprint())
    last_look(Path(config.out))


def _check_same(config: TrainConfig, state: dict[str, Any], fingerprint: str) -> None:
    """Raise InputError, which names the first difference, if the run in `config.out` began with another configuration
    or cohort. `state` is a checkpoint of that run."""
    if found := difference(dataclasses.asdict(config), state["config"]):
        key, mine, saved = found
        raise InputError(f"{key}={mine!r}: the run to resume has {saved!r}, expected the same")
    check_data(Path(config.out), state["data"])
    if state["data"]["fingerprint"] != fingerprint:
        raise InputError(f"data={config.data!r}: the cohort has changed since the run began, expected the same")


def seed_of(*numbers: int) -> int:
    """A seed that depends on all of these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
