"""The table of estimators: its exact gradient, and what it may be counted on to show."""

import pytest
import torch

from benchmarks.estimators import GROUPS, Problem, configurations, estimate
from sfg_fast.estimators import ESTIMATORS
from sfg_fast.gates import GroupGates


def test_exact_gradient_is_that_of_the_score_function():
    """sum over z of q(z) L(z) d log q(z), and by differences."""
    problem = Problem.random()
    logits, z = problem.logits, problem.assignments()
    q = (z * logits.log_softmax(1)).sum((1, 2)).exp()
    assert q.sum() == pytest.approx(1)
    score = z - logits.softmax(1)
    torch.testing.assert_close(problem.exact(), torch.einsum("n,n,nkg->kg", q, problem.loss(z), score))

    def expected(at):
        return ((z * at.log_softmax(1)).sum((1, 2)).exp() * problem.loss(z)).sum()

    step = torch.zeros_like(logits)
    step[1, 2] = 1e-5
    slope = (expected(logits + step) - expected(logits - step)) / 2e-5
    assert problem.exact()[1, 2].item() == pytest.approx(slope.item(), rel=1e-6)


def test_gradient_of_gates_is_what_one_more_group_would_change():
    problem = Problem.random(1)
    z = problem.assignments()
    step = torch.zeros_like(z)
    step[:, 2, 1] = 1e-6
    slope = (problem.loss(z + step) - problem.loss(z - step)) / 2e-6
    torch.testing.assert_close(problem.gradients_of_gates()[:, 2, 1], slope, rtol=1e-5, atol=1e-7)


def test_a_relaxed_draw_loses_its_bias_with_the_temperature():
    problem = Problem.random()
    warm, cold = (estimate(problem, "gumbel_softmax", temperature, 1, 4000) for temperature in (1.0, 0.1))
    assert warm.bias > 8 * warm.error
    assert cold.bias < 4 * cold.error
    assert cold.deviation > 2 * warm.deviation


@pytest.mark.parametrize("name", ["straight_through", "gumbel_rao", "reinmax"])
def test_one_hot_estimators_point_the_right_way_and_selected_less_so(name):
    for seed in range(3):
        problem = Problem.random(seed)
        assert estimate(problem, name, 0.5, 1, 2000).cosine > 0.9
        everywhere, own = (estimate(problem, each, 0.5, 1, 2000) for each in (name, "selected"))
        assert own.bias > everywhere.bias


@pytest.mark.parametrize("name", ["straight_through", "gumbel_rao", "reinmax"])
def test_every_nth_step_has_the_same_bias(name):
    problem = Problem.random(2)
    one, four = (estimate(problem, name, 0.5, every, 6000) for every in (1, 4))
    assert abs(one.bias - four.bias) < 4 * (one.error + four.error)


def test_all_estimators_that_learn_are_in_the_table():
    assert {name for name, _, _ in configurations()} == {name for name, rule in ESTIMATORS.items() if rule.gates}


def test_constant_p_learns_nothing():
    layer = GroupGates(50, GROUPS - 1, "dirichlet", "none")
    assert not layer.draw().gates.requires_grad
