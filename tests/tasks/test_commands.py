"""Every command on made-up images: any number of tasks, killed and resumed, a kind of task that the documentation adds,
all methods."""

import csv
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml

from sfg_fast.cli import main
from sfg_fast.data import read_cohort
from sfg_fast.networks.methods import METHODS
from sfg_fast.tasks import KINDS
from sfg_fast.training import checkpoint
from sfg_fast.training.run import load_run

from ..data.small_cohort import small_images
from ..processes import launch

TWO = {"age": {"kind": "regression", "loss": "rmse", "scale": 100}, "gender": {"kind": "classification"}}
TRAIN = {
    "network": {"name": "vgg", "width": 2},
    "schedule": {"steps": 4, "batch": 4},
    "log_every": 2,
    "checkpoint_every": 2,
    "flip": True,
    "shift": 1,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """20 images, and their cache."""
    made = tmp_path_factory.mktemp("images")
    small_images(made, 20, (32, 32))
    assert main(["preprocess", str(made / "list.csv"), str(made / "cache"), "--processes", "1"]) == 0
    return made / "list.csv"


def train(cohort, out, tasks, *options):
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**TRAIN, "tasks": tasks}))
    return main(["train", "--config", str(path), "--data", str(cohort.parent / "cache"), "--out", str(out), *options])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def whole_job(cohort, out, tasks):
    """Train, predict, evaluate, report, freeze; what metrics.json says."""
    predictions = str(out / "predictions")
    assert train(cohort, out, tasks) == 0
    assert main(["predict", str(out), str(cohort), predictions, "--draws", "2"]) == 0
    assert main(["evaluate", predictions, str(cohort)]) == 0
    assert main(["report", str(out), str(cohort), predictions, str(out / "metrics.json")]) == 0
    assert main(["freeze", str(out), str(out / "network.onnx")]) == 0
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow), 5])
def test_any_number_of_tasks(cohort, tmp_path, count):
    options = {f"age{i}": {"kind": "regression", "target": "age"} for i in range(count - 1)} | {"gender": TWO["gender"]}
    found = whole_job(cohort, tmp_path / "run", options)
    test = list(read_cohort(cohort).split("test"))
    table = rows(tmp_path / "run" / "predictions" / "predictions.csv")
    assert [row["case"] for row in table] == [case.name for case in test]
    known = {task: [case for case in test if options[task].get("target", task) in case.values] for task in options}
    for task, cases in known.items():
        assert [name for name, case in found["cases"].items() if task in case] == [case.name for case in cases]
    if count > 2:
        pairs = [(float(row["age0"]), case) for row, case in zip(table, test, strict=True)]
        errors = [abs(predicted - case.values["age"]) for predicted, case in pairs if "age" in case.values]
        assert found["summary"]["age0"]["absolute_error"]["mean"] == pytest.approx(np.mean(errors), rel=1e-5)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(task.capitalize() in page for task in options)
    network = onnxruntime.InferenceSession(tmp_path / "run" / "network.onnx")
    assert [one.name for one in network.get_outputs()] == list(options)
    run = load_run(tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32)).astype(np.float32)
    exported = dict(zip(options, network.run(None, {"image": pixels}), strict=True))
    with torch.no_grad():
        outputs = run.model.eval()(torch.from_numpy(run.images.normalised(pixels)))
    for name, task in run.tasks.items():
        expected = outputs[name].softmax(1) if task.kind == "classification" else outputs[name] * task.output_unit
        np.testing.assert_allclose(exported[name], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_a_kind_from_the_documentation_needs_nothing_else(cohort, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "tasks.md"
    exec(re.search(r"```python\n(.*?)```", page.read_text(), re.S)[1], {"__name__": "a_kind_of_ones_own"})
    try:
        found = whole_job(cohort, tmp_path / "run", {"age": {"kind": "robust_regression"}, "gender": TWO["gender"]})
        assert found["conventions"]["tasks"]["age"]["options"]["kind"] == "robust_regression"
        run = load_run(tmp_path / "run")
        likelihood = run.tasks["age"].likelihood()
        expected = torch.distributions.Laplace(torch.tensor([0.5]), 1.0).log_prob(torch.tensor([2.0]))
        scale = run.tasks["age"].output_unit
        there = torch.tensor([True])
        torch.testing.assert_close(likelihood(torch.tensor([[0.5]]), torch.tensor([2.0 * scale]), there), expected)
    finally:
        del KINDS["robust_regression"]


def killed_at_step(number, arguments):
    from sfg_fast.training.trainer import Trainer

    original = Trainer._train_step

    def step(trainer):
        if trainer.step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer)

    Trainer._train_step = step
    train(*arguments)


def test_killed_and_resumed_to_the_bit(cohort, tmp_path):
    assert train(cohort, tmp_path / "whole", TWO) == 0
    assert launch(killed_at_step, 3, (cohort, tmp_path / "killed", TWO)) == [-signal.SIGKILL]
    assert train(cohort, tmp_path / "killed", TWO, "--resume") == 0
    whole, killed = (checkpoint.load(tmp_path / name / "checkpoints" / "final.pt") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed["model"][name]) for name, value in whole["model"].items())
    assert killed["history"]["curves"] == whole["history"]["curves"]


def test_an_experiment_of_all_methods(cohort, tmp_path):
    methods = {name: {"method": name} for name in METHODS}
    methods["retrain"] |= {"grouping_of": "sfg"}
    methods["sfg"] |= {"published": {"age": 8.54, "gender": 87.01}}
    methods["sfg on p"] = {"method": "sfg", "network.noise_on": "p"}
    content = {
        "cohort": str(cohort),
        "out": str(tmp_path / "out"),
        "seeds": [0],
        "draws": 2,
        "by": "mode",
        "statistics": "batch",
        "checkpoint": "best",
        "methods": methods,
        "train": {**TRAIN, "tasks": TWO},
    }
    path = tmp_path / "faces.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["experiment", str(path)]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    overview = [line for line in table.splitlines() if line.startswith("|")][: 2 + len(methods)]
    header = [cell.strip() for cell in overview[0].strip("|").split("|")]
    assert header == [
        "Method",
        "age: MAE [years]",
        "age: published",
        "gender: Accuracy [%]",
        "gender: published",
        "Delta p [%]",
        "parameters",
        "MFLOPs per image",
    ]
    assert [line.split("|")[1].strip() for line in overview[2:]] == list(methods)
    runs = tmp_path / "out" / "runs"
    sfg, again = (load_run(runs / name / "seed_0") for name in ("sfg", "retrain"))
    from sfg_fast.networks.controls import map_assignment

    learnt, fixed = map_assignment(sfg.model), map_assignment(again.model)
    assert all(torch.equal(fixed[name], groups) for name, groups in learnt.items())
    started = checkpoint.load(runs / "retrain" / "seed_0" / "checkpoints" / "step_00000002.pt")["model"]
    for name, groups in learnt.items():  # fixed from the start
        assert torch.equal(started[f"{name}.fixed_gates"].argmax(1), groups)
    how = {name: json.loads((runs / name / "seed_0" / "metrics.json").read_text())["how"] for name in methods}
    assert how["sfg"] == {"draws": 2, "by": "mode", "statistics": "batch", "checkpoint": "best"}
    assert how["hard_sharing"] == {"draws": 0, "by": "map", "statistics": "batch", "checkpoint": "best"}
    assert not [path for path in (tmp_path / "out" / "figures").iterdir() if "activation" in path.name]
    assert "the most frequent class over 2 drawn ones" in table
    (tmp_path / "out" / "table.md").unlink()
    assert main(["experiment", str(path)]) == 0  # all is done: it is only written again
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--patch", "[8, 8]"], "patch=[8, 8]: it is for cohorts of volumes, expected none for these tasks"),
        (["--folds", "3"], "folds=3: it is for cohorts of volumes"),
        (
            ["--network.name", "highresnet"],
            "network.name='highresnet': it gives a value per voxel, expected vgg for age",
        ),
        (["--network.blocks", "2"], "blocks=2"),
        (["--network.width", "[2, 3, 4]"], "width="),
        (["--network.method", "retrain"], "network.grouping=None: expected the folder of a run"),
        (["--network.grouping", "run"], "network.grouping='run': expected null, or network.method retrain"),
        (["--network.noise_on", "q"], "network.noise_on='q': expected one of log_p, p"),
        (["--shift", "-1"], "shift=-1: expected a number, at least 0"),
    ],
)
def test_what_can_not_be_is_one_line(cohort, tmp_path, capsys, options, said):
    assert train(cohort, tmp_path / "run", TWO, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert not (tmp_path / "run").exists()


def test_flips_where_a_task_does_not_allow_them(cohort, tmp_path, capsys):
    assert train(cohort, tmp_path / "run", {"age": {"kind": "regression", "flips": False}}) == 2
    assert "flip=True: a mirrored image has another age (tasks.age.flips), expected false" in capsys.readouterr().err


def test_a_grouping_of_another_network_is_refused(cohort, tmp_path, capsys):
    assert train(cohort, tmp_path / "one", {"age": TWO["age"]}) == 0
    options = ["--network.method", "retrain", "--network.grouping", str(tmp_path / "one")]
    assert train(cohort, tmp_path / "run", TWO, *options) == 2
    assert "network.grouping=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"a": {"method": "retrain"}}, "methods['a']: grouping_of=None, expected a row of method sfg"),
        ({"a": {"method": "sfg", "grouping_of": "a"}}, "grouping_of='a', expected it with method retrain alone"),
        ({"a": {"method": "retrain", "grouping_of": "b"}}, "grouping_of='b', expected the name of a row of method sfg"),
        (
            {"a": {"method": "retrain", "grouping_of": "b"}, "b": {"method": "one_task"}},
            "grouping_of='b', expected the name of a row of method sfg",
        ),
        (
            {"a": {"method": "retrain", "grouping_of": "b", "network.width": 3}, "b": {"method": "sfg"}},
            "methods['a']: network.width=3, expected 2 as 'b', whose grouping it takes",
        ),
        ({"a": {"method": "sfg", "published": {"age": "x"}}}, "published.age is 'x', expected a number"),
        ({"a": {"method": "sfg", "published": 3}}, "published is 3, expected an object"),
        ({"a": {"method": "sfg", "published": {"agee": 3}}}, "published has 'agee', expected tasks: age, gender"),
    ],
)
def test_rows_that_can_not_be_are_refused_before_anything_is_trained(cohort, tmp_path, capsys, methods, said):
    content = {
        "cohort": str(cohort),
        "out": str(tmp_path / "out"),
        "methods": methods,
        "train": {**TRAIN, "tasks": TWO},
    }
    path = tmp_path / "faces.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert main(["experiment", str(path)]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_images_that_are_too_small_for_the_network(cohort, tmp_path, capsys):
    small = tmp_path / "small"
    assert main(["preprocess", str(cohort), str(small), "--size", "[16, 20]", "--processes", "1"]) == 0
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**TRAIN, "tasks": TWO}))
    assert main(["train", "--config", str(path), "--data", str(small), "--out", str(tmp_path / "run")]) == 2
    said = "its images are 16 x 20, expected at least 32 x 32 for network vgg (preprocess --size)"
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({"age": {"kind": "regression", "scale": 10}}, "task 'age' has output unit 10, the run's 'age' has 100"),
        ({"age": {"kind": "regression", "scale": 100}}, None),
    ],
)
def test_a_head_is_transferred_to_what_means_the_same(cohort, tmp_path, capsys, tasks, said):
    assert train(cohort, tmp_path / "source", TWO) == 0
    found = train(cohort, tmp_path / "run", tasks, "--transfer.run", str(tmp_path / "source"))
    assert found == (0 if said is None else 2)
    assert said is None or said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_frozen_file_says_what_its_outputs_are(cohort, tmp_path):
    assert train(cohort, tmp_path / "run", TWO) == 0
    assert main(["freeze", str(tmp_path / "run"), str(tmp_path / "a.onnx")]) == 0
    network = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    about = json.loads(network.get_modelmeta().custom_metadata_map["tasks"])
    assert about["gender"]["about"]["names"] == {"male": 0, "female": 1}
    assert about["age"]["about"]["unit"] == "years"
    assert main(["freeze", str(tmp_path / "run"), str(tmp_path / "a.pt2"), "--tasks", "[age]"]) == 0
    extra = {"tasks.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert list(json.loads(extra["tasks.json"])) == ["age"]
