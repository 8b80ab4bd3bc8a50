"""Likelihoods, scores and links of each kind, against torch's distributions and plain formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

from sfg_fast.data.targets import Target
from sfg_fast.tasks import read_tasks

AGE = Target("age", "number", "years", statistics={"mean": 33.0, "sd": 20.0})
GENDER = Target("gender", "class", names={"male": 0, "female": 1}, statistics={"frequencies": [0.25, 0.75]})
PET = Target("pet", "intensities", "SUV", statistics={"mean": 2.0, "sd": 1.5})


def task(name, target, **options):
    return read_tasks({name: options}, {target.name: target})[name]


def test_regression_is_a_normal_distribution(float64):
    age = task("age", AGE, kind="regression", noise="learned")
    likelihood = age.likelihood()
    likelihood.log_sigma.data.fill_(0.4)
    output, target = torch.randn(5, 1), torch.rand(5) * 90
    expected = Normal(output[:, 0], math.exp(0.4)).log_prob(target / 20)
    torch.testing.assert_close(likelihood(output, target, torch.ones(5).bool()), expected)


def test_the_rmse_of_the_longer_paper_and_its_gradient(float64):
    """Of those present alone; the mean of the shares is the RMSE, and so is its gradient."""
    likelihood = task("age", AGE, kind="regression", loss="rmse", scale=100).likelihood()
    output = torch.randn(6, 1, requires_grad=True)
    target, present = torch.rand(6) * 90, torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    (expected,) = torch.autograd.grad((output[present, 0] - target[present] / 100).square().mean().sqrt(), output)
    shares = -likelihood(output, target.where(present, 0), present)[present]
    exact = (output[present, 0] - target[present] / 100).square().mean().sqrt()
    torch.testing.assert_close(shares.mean(), exact)
    (found,) = torch.autograd.grad(shares.mean(), output)
    torch.testing.assert_close(found, expected)


def test_a_perfect_prediction_has_a_finite_rmse_gradient():
    likelihood = task("age", AGE, kind="regression", loss="rmse", scale=100).likelihood()
    output = torch.full((3, 1), 0.5, requires_grad=True)
    (-likelihood(output, torch.full((3,), 50.0), torch.ones(3).bool())).mean().backward()
    assert torch.isfinite(output.grad).all()


def test_classification_is_categorical(float64):
    likelihood = task("gender", GENDER, kind="classification").likelihood()
    output, target = torch.randn(7, 2), torch.randint(2, (7,))
    expected = Categorical(logits=output).log_prob(target)
    torch.testing.assert_close(likelihood(output, target, torch.ones(7).bool()), expected)


def test_heads_start_from_the_mean():
    assert task("age", AGE, kind="regression").start().tolist() == pytest.approx([33 / 20])
    assert task("age", AGE, kind="regression", noise="heteroscedastic").start().tolist() == pytest.approx([33 / 20, 0])
    torch.testing.assert_close(
        task("gender", GENDER, kind="classification").start().softmax(0), torch.tensor([0.25, 0.75])
    )


def test_scores_of_images_add_up_over_batches():
    age, gender = task("age", AGE, kind="regression"), task("gender", GENDER, kind="classification")
    output, years = torch.randn(9, 1), torch.rand(9) * 90
    logits, classes = torch.randn(9, 2), torch.randint(2, (9,))
    there = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 1]).bool()
    for one, y, target, expected in (
        (age, output, years, (output[:, 0] * 20 - years)[there].abs().mean().item()),
        (gender, logits, classes, 100 * (logits.argmax(1) == classes)[there].double().mean().item()),
    ):
        parts = [one.tally(y[part], target[part], there[part], None) for part in (slice(0, 4), slice(4, 9))]
        found = one.scored({name: parts[0][name] + parts[1][name] for name in parts[0]})
        assert next(iter(found.values())) == pytest.approx(expected)
        assert one.scored({}) == dict.fromkeys(found)
        nobody = one.tally(y, target, torch.zeros(9).bool(), None)
        assert one.scored(nobody) == dict.fromkeys(found)


def test_votes_average_to_the_mode():
    gender = task("gender", dataclasses.replace(GENDER, names={"a": 0, "b": 1, "c": 2}), kind="classification")
    logits = torch.randn(11, 5, 3)
    votes = torch.stack([gender.link(one, votes=True) for one in logits]).mean(0)
    mode = torch.mode(logits.argmax(2), dim=0).values  # (of equal counts both take the smaller class)
    assert torch.equal(torch.from_numpy(gender.predicted(votes, votes)[""]), mode)


def test_psnr_of_a_volume_without_a_range_has_the_width_of_its_truth():
    from sfg_fast.tasks.task import Scene

    pet = task("pet", PET, kind="synthesis")
    rng = np.random.default_rng(0)
    true, predicted = rng.random((2, 3, 8, 8)).astype(np.float32) * 5
    mask = np.zeros(true.shape, bool)
    mask[1:] = True
    found = pet.metrics(true, predicted, Scene(mask, {}, (1.0, 1.0, 1.0)))
    width = float(true[mask].max()) - float(true[mask].min())
    squared = ((true.astype(float) - predicted) ** 2)[mask].mean()
    expected = 20 * math.log10(width) - 10 * math.log10(squared)
    assert found["regions"]["overall"]["psnr_in_mask"] == pytest.approx(expected, abs=1e-4)
    assert found["regions"]["overall"]["mae"] == pytest.approx(np.abs(true - predicted)[mask].mean(), rel=1e-6)
    assert "bones" not in found["regions"]
    sums = pet.tally(
        torch.from_numpy(predicted)[:, None] / 1.5,
        torch.from_numpy(true)[:, None],
        torch.ones(3).bool(),
        torch.from_numpy(mask)[:, None],
    )
    assert pet.scored(sums)["psnr"] == pytest.approx(expected, abs=1e-4)


def test_what_is_deployed_is_in_the_units_of_users():
    age = task("age", AGE, kind="regression", noise="heteroscedastic", scale=10)
    output = torch.tensor([[2.0, 0.0]])
    assert age.deployed(output).tolist() == [[20.0, 10.0]]
    gender = task("gender", GENDER, kind="classification")
    torch.testing.assert_close(gender.deployed(torch.tensor([[0.0, math.log(3)]])), torch.tensor([[0.25, 0.75]]))


def test_a_truth_that_is_one_value_everywhere_has_an_mae_and_no_psnr():
    from sfg_fast.tasks.task import Scene

    pet = task("pet", PET, kind="synthesis")
    true, predicted = np.full((2, 4, 4), 3.0, np.float32), np.full((2, 4, 4), 3.5, np.float32)
    found = pet.metrics(true, predicted, Scene(np.ones(true.shape, bool), {}, (1.0, 1.0, 1.0)))
    overall = found["regions"]["overall"]
    assert (overall["mae"], overall["psnr_in_mask"], overall["psnr_zero_outside"]) == (0.5, None, None)
    assert found["psnr_gain"] is None


def test_errors_are_told_to_a_thousandth_of_the_targets_sd():
    for sd, digits in ((20.0, 2), (1.5, 3), (0.015, 5), (400.0, 1), (1e6, 0)):
        target = dataclasses.replace(PET, statistics={"mean": 0.0, "sd": sd})
        assert task("pet", target, kind="synthesis").relative.digits == digits
    hu = dataclasses.replace(PET, unit="HU")
    assert task("pet", hu, kind="synthesis").relative.digits == 1
