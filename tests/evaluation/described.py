"""Tasks as a cohort describes them once it is read, and the metrics of volumes made for a test."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfg_fast.data.targets import Target
from sfg_fast.evaluation.metrics import case_metrics
from sfg_fast.tasks import measured_by, read_tasks
from sfg_fast.tasks.task import Scene, Task

NAMES = {"background": 0, "bladder": 1, "left_femur": 2}
CT = Target("ct", "intensities", "HU")
AGE = Target("age", "number", "years")
GENDER = Target("gender", "class", names={"female": 0, "male": 1})
OF_IMAGES = {"age": {"kind": "regression"}, "gender": {"kind": "classification"}}


def ct_and_organs(names: Mapping[str, int] = NAMES, profile: str = "paper") -> dict[str, Task]:
    """Returns the paper's two tasks, measured by a profile of metrics. names: of the labels, name -> value."""
    tasks = read_tasks(["ct", "organs"], {"ct": CT, "labels": Target("labels", "labels", names=dict(names))})
    return measured_by(tasks, profile)


def of_images() -> dict[str, Task]:
    """Returns the tasks `age` (regression, years) and `gender` (classification) of images."""
    return read_tasks(OF_IMAGES, {"age": AGE, "gender": GENDER})


def scored(
    ct_true: np.ndarray | None = None,
    ct_pred: np.ndarray | None = None,
    labels_true: np.ndarray | None = None,
    labels_pred: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    names: Mapping[str, int] = NAMES,
    profile: str = "paper",
) -> dict[str, Any]:
    """Returns the metrics of a case of the paper's two tasks, {task: metrics}.

    CTs (HU), labels and the mask of the body are volumes [Z, Y, X] of voxels of 1 mm. The CT is measured in the regions
    of the true labels, too.
    """
    assert mask is not None
    regions: dict[str, np.ndarray] = {}
    if labels_true is not None:
        regions = {"organs": labels_true != 0}
        regions |= {name: labels_true == value for name, value in names.items() if value != 0}
    true, predicted = {"ct": ct_true, "labels": labels_true}, {"ct": ct_pred, "organs": labels_pred}
    return case_metrics(ct_and_organs(names, profile), true, predicted, Scene(mask != 0, regions, (1.0, 1.0, 1.0)))
