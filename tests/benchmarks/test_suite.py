"""The suite's cohorts are what they are called, and its report says by hand what gains and regrets are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.experiment import suite, suite_cohorts
from sfg_fast.data import read_cohort
from sfg_fast.data.targets import Target
from sfg_fast.experiment.config import check, jobs
from sfg_fast.files import write_json
from sfg_fast.networks.cost import flops
from sfg_fast.tasks import read_tasks
from sfg_fast.training.run import build_network


@pytest.mark.parametrize("kind", suite_cohorts.TEACHERS)
def test_teachers_are_related_as_their_kind_says(kind):
    generator = torch.Generator().manual_seed(3)
    x, other = torch.randn(2, 200, 3, 16, 16, generator=generator)
    teachers = suite_cohorts.teachers(kind)
    said = torch.stack([teacher(x) for teacher in teachers])
    correlation = torch.corrcoef(said).fill_diagonal_(0).abs()
    if kind == "identical":
        assert torch.equal(said[0], said[1])
    elif kind == "related":
        assert correlation[0, 1] < 0.9
        assert torch.equal(teachers[0].layers[0][0], teachers[1].layers[0][0])
        assert not torch.equal(teachers[0].layers[1][0], teachers[1].layers[1][0])
    elif kind == "disjoint":  # the first sees red alone, the second blue
        for teacher, colour in zip(teachers, (0, 2), strict=True):
            changed = other.clone()
            changed[:, colour] = x[:, colour]
            torch.testing.assert_close(teacher(changed), teacher(x))
            assert not torch.allclose(teacher(other), teacher(x))
    else:
        assert correlation[0, 1] > 0.9
        assert correlation[2].max() < 0.5


def test_textures_become_a_cohort(tmp_path, monkeypatch):
    """Of images and two numbers each; targets have mean 0 and SD 1, those to train on are noisy besides."""
    monkeypatch.setattr(suite_cohorts, "TEXTURES", {"train": 300, "val": 2, "test": 300})
    made = suite_cohorts.textures("identical")
    suite_cohorts.write(tmp_path / "made", made)
    cohort = read_cohort(tmp_path / "made" / "list.csv")
    assert {split: len(cohort.split(split)) for split in ("train", "val", "test")} == suite_cohorts.TEXTURES
    tasks = read_tasks(suite.PROBLEMS["identical"].tasks, cohort.targets)
    assert [task.kind for task in tasks.values()] == ["regression"] * 2
    first, second = made["train"].targets.values()
    noise = first - second  # of equal teachers
    assert abs(np.std(noise) / (2**0.5 * suite_cohorts.NOISE) - 1) < 0.1
    clean = made["test"].targets["task1"]
    assert np.array_equal(clean, made["test"].targets["task2"])
    assert abs(np.std(clean) - 1) < 0.15
    case = cohort.split("test")[0]
    assert case.values["task1"] == pytest.approx(float(clean[0]), abs=1e-5)


def test_digits_of_one_split_are_in_no_other():
    pytest.importorskip("sklearn")
    splits = suite_cohorts.overlaid_digits()
    assert {name: len(one.pixels) for name, one in splits.items()} == suite_cohorts.DIGITS
    for one in splits.values():
        assert one.pixels.shape[1:] == (32, 32)
        assert not one.pixels[:, :8, 25:].any()  # left is up, right is down
        assert {*one.targets["left"].tolist()} == set(range(10))


@pytest.mark.parametrize("problem", ["two_alike", "faces"])
def test_a_problem_is_an_experiment(problem, tmp_path):
    config = suite.experiment(problem, tmp_path / "list.csv", tmp_path / "out", [0, 1], 2)
    check(config)
    named = [row for way in suite.ways(len(config.train.tasks)).values() for row in way.rows]
    assert list(config.methods) == named
    assert len(set(named)) == len(named)


def result(test, validation, training=30.0):
    """test: [seeds, tasks] of two images, one 1 better and one 1 worse than the mean."""
    errors = np.array(test, float)[..., None] + np.array([-1, 1])
    return suite.Result(errors, np.array([validation] * 2, float), 10.0, training, [])


def test_gain_and_regret_by_hand():
    """Two tasks, two seeds. Hard sharing: 10 and 4 on average. The validation images choose the even split, though
    hard sharing is better on the test images than it; and of SFG's rates the second."""
    found = {
        "Hard sharing": result([[9, 4], [11, 4]], [10, 4]),
        "Even split": result([[11, 4], [11, 4]], [9, 4]),
        "SFG, explore 0.0": result([[1, 1], [1, 1]], [10, 4.1]),
        "SFG, explore 0.05": result([[8, 4], [10, 2]], [8, 4.2], training=24.0),
    }
    best = suite.chosen(found)
    assert best["SFG"].row == "SFG, explore 0.05"
    assert suite.gains(found["SFG, explore 0.05"], found["Hard sharing"]).tolist() == pytest.approx([10, 25])
    table, regrets = suite._of_problem("digits", {"left": None, "right": None}, best)
    assert regrets["Even split"] == "0.0 (0.0)"
    assert regrets["Hard sharing"] == "-5.0 (7.1)"  # 0 against -5; 5 and -5 by seed
    assert regrets["SFG"] == "-22.5 (10.6)"
    rows = {row[0]: row for row in table.rows}
    assert "Even split **(the best fixed)**" in rows
    assert rows["SFG"][1:5] == ["explore 0.05", "9.00 (1.41)", "3.00 (1.41)", "17.5 (10.6)"]
    assert rows["Hard sharing"][6:10] == [
        "2 of 2",
        "0.0004",
        "1.00",
        "1.00",
    ]  # 10 and 25 against 5 and -5; twice the least p
    assert rows["SFG"][6:10] == ["", "", "1.00", "0.80"]


@pytest.mark.parametrize("method", ["hard_sharing", "even_split", "one_task"])
def test_flops_of_a_training_with_a_fixed_grouping_are_those_of_its_steps(method, tmp_path):
    """3 times a prediction's, less the gradient of the image: as torch counts a step."""
    config = suite.experiment("identical", tmp_path / "list.csv", tmp_path / "out", [0], 1)
    job = next(job for job in jobs(config) if job.trainings[0].network.method == method)
    number = {"kind": "number", "unit": "", "names": {}, "statistics": {"mean": 0.0, "sd": 1.0}}
    x, images = torch.randn(2, 3, 32, 32), {"channels": 3, "size": [32, 32]}
    prediction = step = 0.0
    for training in job.trainings:
        about = {"in_channels": 3, "images": images, "targets": {"task1": number, "task2": number}}
        Path(training.out).mkdir(parents=True)
        write_json(Path(training.out) / "data.json", about)
        targets = {name: Target.from_json(name, number) for name in about["targets"]}
        network = build_network(training, 3, read_tasks(training.tasks, targets))
        prediction += flops(network, x)
        with FlopCounterMode(display=False) as counter:
            torch.stack([y.sum() for y in network.train()(x).values()]).sum().backward()
        step += counter.get_total_flops() / len(x)
    assert suite.training_flops(job, prediction) == pytest.approx(step * config.train.schedule.steps)


def test_the_figure_has_a_row_for_every_way(tmp_path):
    names = ("One-task", "Hard sharing", "Even split", "Constant p", "SFG")
    best = {name: suite.Chosen(name, result([[9, 4 + i], [11, 4]], [10, 4])) for i, name in enumerate(names)}
    figure = suite.draw({"digits": best, "faces": dict(list(best.items())[1:])})
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == list(names)
    assert len(first.lines) == 2 * len(names) + 1
    assert len(second.lines) == 2 * (len(names) - 1) + 1
