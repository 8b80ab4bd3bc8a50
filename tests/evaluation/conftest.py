"""Training runs that take seconds: of volumes with four tasks, and of images with two. Tests only read them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfg_fast.data import preprocess, read_cohort, read_volume, write_phantom, write_volume
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig
from sfg_fast.training.trainer import Trainer

from ..data.small_cohort import small_images

TARGETS = {"pet": {"unit": "SUV"}, "vessels": {"labels": {"background": 0, "artery": 1}}}
TASKS: dict[str, Any] = {
    "ct": {"kind": "synthesis"},
    "pet": {"kind": "synthesis", "noise": "heteroscedastic"},
    "organs": {"kind": "segmentation", "target": "labels"},
    "vessels": {"kind": "segmentation"},
}
SCHEDULE = ScheduleConfig(steps=3, batch=4)
OFTEN: dict[str, Any] = {"device": "cpu", "log_every": 1, "checkpoint_every": 3}


def with_pet_and_vessels(cohort: Path) -> None:
    """Adds a second volume, in SUV, and a second label map to each phantom but the last, which has no vessels."""
    for folder in sorted(cohort.glob("phantom_*")):
        ct, grid = read_volume(folder / "ct.nii.gz")
        write_volume(folder / "pet.nii.gz", 5 + ct / 500, grid, np.float32)
        if folder.name != "phantom_003":
            write_volume(folder / "vessels.nii.gz", ct > 300, grid, np.uint8)
    about = json.loads((cohort / "dataset.json").read_text())
    (cohort / "dataset.json").write_text(json.dumps(about | {"targets": TARGETS}))


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns FOLDER, with FOLDER/cohort (phantom_002 and phantom_003 are test cases) and FOLDER/run."""
    folder = tmp_path_factory.mktemp("volumes")
    write_phantom(folder / "cohort", cases=4, test=2, size=24, slices=6, progress=False)
    with_pet_and_vessels(folder / "cohort")
    preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)
    network = NetworkConfig(width=[3, 4, 4], blocks=1, residual="routed", init="dirichlet")
    places = str(folder / "cache"), str(folder / "run")
    Trainer(TrainConfig(*places, tasks=TASKS, network=network, schedule=SCHEDULE, **OFTEN)).run()
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns FOLDER, with FOLDER/cohort/list.csv of 40 images of 36 x 33 pixels, whose last 8 are test images, and
    FOLDER/run."""
    folder = tmp_path_factory.mktemp("images")
    cohort = read_cohort(small_images(folder / "cohort", 40, (36, 33)))
    preprocess(cohort, folder / "cache", progress=False)
    network = NetworkConfig(name="vgg", width=2, init="dirichlet")
    tasks = {"age": {"kind": "regression"}, "gender": {"kind": "classification"}}
    places = str(folder / "cache"), str(folder / "run")
    Trainer(TrainConfig(*places, tasks=tasks, network=network, schedule=SCHEDULE, **OFTEN)).run()
    return folder
