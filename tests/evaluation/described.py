"""Tasks as they are described once a cohort is read, and the metrics of volumes made for a test."""

from sfg_fast.data.targets import Target
from sfg_fast.evaluation.metrics import case_metrics
from sfg_fast.tasks import measured_by, read_tasks
from sfg_fast.tasks.task import Scene

NAMES = {"background": 0, "bladder": 1, "left_femur": 2}
CT = Target("ct", "intensities", "HU")
AGE = Target("age", "number", "years")
GENDER = Target("gender", "class", names={"female": 0, "male": 1})
OF_IMAGES = {"age": {"kind": "regression"}, "gender": {"kind": "classification"}}


def ct_and_organs(names=NAMES, profile="paper"):
    tasks = read_tasks(["ct", "organs"], {"ct": CT, "labels": Target("labels", "labels", names=dict(names))})
    return measured_by(tasks, profile)


def of_images():
    return read_tasks(OF_IMAGES, {"age": AGE, "gender": GENDER})


def scored(ct_true=None, ct_pred=None, labels_true=None, labels_pred=None, mask=None, names=NAMES, profile="paper"):
    """The metrics of a case of the paper's two tasks, which is measured in the labels of its truth."""
    regions = {}
    if labels_true is not None:
        regions = {"organs": labels_true != 0}
        regions |= {name: labels_true == value for name, value in names.items() if value != 0}
    true, predicted = {"ct": ct_true, "labels": labels_true}, {"ct": ct_pred, "organs": labels_pred}
    return case_metrics(ct_and_organs(names, profile), true, predicted, Scene(mask != 0, regions, (1.0, 1.0, 1.0)))
