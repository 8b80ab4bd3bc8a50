"""A run of seconds on a cohort of a few tiny cases."""

from sfg_fast.data import preprocess, read_cohort, write_phantom
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig


def make_cache(folder, cases=3, test=1):
    write_phantom(folder / "cohort", cases=cases, test=test, size=24, slices=6, progress=False)
    preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)
    return folder / "cache"


def config(cache, out, steps=6, **options):
    network = NetworkConfig(**{"width": [3, 4, 4], "blocks": 1, "residual": "routed", **options.pop("network", {})})
    schedule = ScheduleConfig(**{"steps": steps, "batch": 2, **options.pop("schedule", {})})
    defaults = {"log_every": 2, "checkpoint_every": 2}
    return TrainConfig(str(cache), str(out), network=network, schedule=schedule, **{**defaults, **options})
