"""Everything that a training run is, and how it outlives its process: made, saved, resumed to the bit."""

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
from .folds import last_look, make_splits, read_fold
from .history import empty_history
from .objective import Objective
from .onlookers import Onlooker, tell
from .parallel import Processes, choose_device, merged_statistics, random_state, set_random_state, statistics_of
from .run import check_data, check_size, starting_network
from .schedule import build_optimiser
from .validation import held_out, titles


class TrainingState:
    """The network, objective and optimiser at a step, what was seen so far, and where the examples come from.

    Attributes:
        tasks: what is learnt, bound to the cohort's targets.
        step: optimiser steps done. `history`: see `history.empty_history`.
        best: the best row of the validation so far, or None; `stale`: how many looks ago, since groupings are fixed.
        sampler, validation: examples to train on, and of the validation split (None without one); `calibration`: those
            that running statistics are re-estimated from; `monitored`: a batch that is watched.
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
        if config.folds is not None:
            if config.fold is None:
                raise InputError(f"folds={config.folds!r}: a run is one fold, expected fold to be given")
            self.processes.main_does(lambda: make_splits(cache, config.folds or 0))
            cache = read_fold(cache, config.folds, config.fold)
        self._make_samplers(cache)
        described = cache.described("train")
        self.tasks = read_tasks(config.tasks, {**cache.targets, **described})
        for task in self.tasks.values():
            if not cache.has(task.target):
                raise InputError(f"{config.data}: task {task.name!r} needs {task.target}, and no training case has any")
        self.counts = {split: cache.count(split) for split in SPLITS}  # of cases or images

        resumes = resume and any(self.checkpoints.glob("*.pt"))
        if not resumes:
            self._choose_kernels()
        torch.manual_seed(config.seed)
        self.model = starting_network(config, cache.in_channels, self.tasks)
        check_size(self.model, config, cache)
        if config.same_assignment and self.processes.count > 1:
            synchronise(self.model)
        self.model.to(self.device)
        self.objective = Objective(self.tasks, config.objective).to(self.device)
        self.optimiser = build_optimiser(config.schedule, self.model, self.objective)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.stale = 0  # checkpoints since the best
        self.history = empty_history(self.model, self.tasks, titles(self.tasks))
        self.about_data: dict[str, Any] = {
            "in_channels": cache.in_channels,
            "channel_names": list(cache.channel_names),
            "targets": {name: target.to_json() for name, target in described.items()},
            "images": None if cache.images is None else cache.images.to_json(),
            "cases": {split: cache.names(split) for split in SPLITS},
            "fingerprint": cache.fingerprint(),
        }
        if resumes:
            self._resume()
        else:
            self._draw_apart(0)
            self.processes.main_does(lambda: self._claim(resume))
            self._save()  # a run that is killed before its first checkpoint can be resumed, too

    def _make_samplers(self, cache: Cache) -> None:
        config, processes = self.config, self.processes
        own: dict[str, Any] = {"rank": processes.rank, "ranks": processes.count}
        make: Callable[..., SliceSampler | ImageSampler]
        if cache.images is None:
            patch = None if config.patch is None else (config.patch[0], config.patch[1])
            make = functools.partial(SliceSampler, cache, batch=config.schedule.batch, patch=patch, seed=config.seed)
            augmented: dict[str, Any] = {"bias": config.bias, "foreground": config.foreground}
        else:
            make = functools.partial(ImageSampler, cache, batch=config.schedule.batch, seed=config.seed)
            augmented = {"flip": config.flip, "shift": config.shift}
        self.sampler = make(split="train", **augmented, **own)
        self.calibration = make(split="train", **augmented)  # the same in all processes
        self.validation = make(split="val", **own) if cache.names("val") else None
        self.monitored = held_out(cache)
        if config.schedule.patience is not None and self.validation is None:
            raise InputError(
                f"schedule.patience={config.schedule.patience!r}: {config.data} has no case of split val, expected one"
            )

    def _choose_kernels(self) -> None:
        """Which kernels CUDA tensors get, alike in all processes: the main one checks its GPU, if none did before."""
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

    def _claim(self, resume: bool) -> None:
        """A resumed run without a checkpoint was killed before it had any: it starts."""
        if not resume and ((self.out / "config.yaml").exists() or self.checkpoints.exists()):
            raise InputError(f"{self.out}: holds a run already, expected a new folder (or --resume)")
        make_folder(self.out)
        with replacing(self.out / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False), encoding="utf-8")
        write_json(self.out / "data.json", self.about_data)

    def _draw_apart(self, step: int) -> None:
        """Each process draws its own assignments, unless one draw for all is asked for."""
        if self.processes.rank and not self.config.same_assignment:
            torch.manual_seed(seed_of(self.config.seed, self.processes.rank, step))

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _state(self, drawn_statistics: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Everything that a run is. A finished one has `drawn_statistics`, for predictions by draws; `model` then has
        those of argmax p. Before that `model` has the mean over the processes, and each process's own are beside it."""
        own = {"rng": random_state(self.device), "statistics": statistics_of(self.model)}
        processes = self.processes.gathered(own)
        model = self.model.state_dict()
        if drawn_statistics is None and len(processes) > 1:
            model = {**model, **merged_statistics([one["statistics"] for one in processes])}
        return {
            "model": model,
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
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
        """What was chosen, and for which GPU, driver and versions; a CPU needs no choice."""
        if self.device.type != "cuda" or backends.current() != "auto":
            return []
        return [*kernel_choice.as_lists(kernel_choice.chosen(self.device)), kernel_choice.known(self.device)]

    def _take_kernels(self, kernels: list[Any]) -> None:
        """Those that a checkpoint was made with, whatever a check says by now, because others would give other bits.
        On another GPU, driver or version the bits are others anyway: there they are chosen anew."""
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
        write_json(self.out / "history.json", self.history)
        self._figure(lambda observe: observe(self.history, self.out))

    def _resume(self) -> None:
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
        self._take_kernels(state.get("kernels", []))
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
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


def check_finished(config: TrainConfig) -> None:
    """InputError if the finished run of a fold is of another configuration or cohort, or does not say how it ended."""
    assert config.folds is not None
    assert config.fold is not None
    cache = Cache(Path(config.data))
    make_splits(cache, config.folds)
    cache = read_fold(cache, config.folds, config.fold)
    final = checkpoint.load(Path(config.out) / "checkpoints" / "final.pt")
    _check_same(config, final, cache.fingerprint())
    last_look(Path(config.out))


def _check_same(config: TrainConfig, state: dict[str, Any], fingerprint: str) -> None:
    """InputError, naming the first difference, if the run in `config.out`, of which this is a checkpoint, began
    otherwise: configuration or cohort."""
    if found := difference(dataclasses.asdict(config), state["config"]):
        key, mine, saved = found
        raise InputError(f"{key}={mine!r}: the run to resume has {saved!r}, expected the same")
    check_data(Path(config.out), state["data"])
    if state["data"]["fingerprint"] != fingerprint:
        raise InputError(f"data={config.data!r}: the cohort has changed since the run began, expected the same")


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
