"""A training run that takes seconds, on a cohort of a few tiny cases."""

from pathlib import Path
from typing import Any

import pytest

from sfg_fast.data import preprocess, read_cohort, write_phantom
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig
from sfg_fast.training.trainer import Trainer


def make_cache(folder: Path, cases: int = 3, test: int = 1) -> Path:
    """Writes FOLDER/cohort of tiny phantoms, whose last `test` are test cases; returns FOLDER/cache, made of it."""
    write_phantom(folder / "cohort", cases=cases, test=test, size=24, slices=6, progress=False)
    preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)
    return folder / "cache"


def config(cache: Path | str, out: Path | str, steps: int = 6, **options: Any) -> TrainConfig:
    """Returns the configuration of a run. options: of TrainConfig; those of its network and schedule are dicts."""
    network = NetworkConfig(**{"width": [3, 4, 4], "blocks": 1, "residual": "routed", **options.pop("network", {})})
    schedule = ScheduleConfig(**{"steps": steps, "batch": 2, **options.pop("schedule", {})})
    defaults: dict[str, Any] = {"log_every": 2, "checkpoint_every": 2}
    return TrainConfig(str(cache), str(out), network=network, schedule=schedule, **{**defaults, **options})


def killed_behind(trainer: Trainer, stop: int) -> None:
    """Runs a training that is killed behind the checkpoint of step `stop`."""
    save = trainer._save

    def killed() -> None:
        save()
        if trainer.step == stop:
            raise KeyboardInterrupt

    trainer._save = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
