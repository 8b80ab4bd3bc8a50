"""Samplers, initial p, annealing, and the gates of a layer."""

import copy
import math

import pytest
import torch
from scipy import stats

import sfg_fast
from sfg_fast.draws import INITIAL, gumbel_noise, initial_probabilities, temperature_at
from sfg_fast.estimators import ESTIMATORS
from sfg_fast.gates import GroupGates, draw_together
from tests import oracle

DRAWS = 20000


def counts(gates, draws=DRAWS):
    """How often each group was drawn for a layer with the same p for all kernels."""
    return torch.bincount(
        torch.cat([gates.draw().assignment for _ in range(draws // gates.logits.shape[0])]), minlength=3
    )


@pytest.mark.parametrize("p", [[1 / 3] * 3, [0.6, 0.3, 0.1], [0.02, 0.9, 0.08]])
@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_draws_follow_p(p, estimator, temperature):
    """Chi-square against p. (Noise added to p instead of log p fails by far: it draws from softmax(p).)"""
    gates = GroupGates(1000, 2, p, estimator)
    gates.temperature = temperature
    found = counts(gates)
    assert stats.chisquare(found.numpy(), [DRAWS * value for value in p]).pvalue > 1e-3


@pytest.mark.parametrize("p", [[1.0, 0.0, 0.0], [0.6, 0.3, 0.1]])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["train", "sampling"])
def test_with_noise_on_p_draws_follow_its_softmax(p, estimator, mode):
    """As the authors' public code has it. p = [1, 0, 0] is drawn .58, .21, .21."""
    gates = GroupGates(1000, 2, p, estimator)
    gates.temperature, gates.noise_on, gates.sampling = 0.3, "p", mode == "sampling"
    gates.train(mode == "train")
    expected = [math.exp(value) / sum(map(math.exp, p)) for value in p]
    assert stats.chisquare(counts(gates).numpy(), [DRAWS * value for value in expected]).pvalue > 1e-3
    torch.testing.assert_close(gates.probabilities(), torch.tensor(p).expand(1000, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("noise_on", ["log_p", "p"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", ["train", "sampling"])
def test_a_share_of_the_draws_ignores_p(noise_on, estimator, mode):
    """p = [1, 0, 0] with explore = .3 is drawn .8, .1, .1; of softmax(p) likewise. p itself stays."""
    p = [1.0, 0.0, 0.0]
    gates = GroupGates(1000, 2, p, estimator)
    gates.temperature, gates.noise_on, gates.explore, gates.sampling = 0.3, noise_on, 0.3, mode == "sampling"
    gates.train(mode == "train")
    q = p if noise_on == "log_p" else [math.exp(value) / sum(map(math.exp, p)) for value in p]
    expected = [0.7 * value + 0.1 for value in q]
    assert stats.chisquare(counts(gates).numpy(), [DRAWS * value for value in expected]).pvalue > 1e-3
    torch.testing.assert_close(gates.probabilities(), torch.tensor(p).expand(1000, 3), atol=1e-4, rtol=0)
    gates.eval().sampling = False
    assert estimator == "none" or (gates.draw().assignment == 0).all()  # argmax p


@pytest.mark.parametrize("mode", ["train", "sampling", "eval"])
def test_a_fixed_assignment_is_explored_around_as_well(mode):
    """Of groups fixed at 2, with explore = .3, .8 of the draws stay; none leaves in evaluation, and p is one-hot."""
    gates = GroupGates(1000, 2, "uniform", "straight_through")
    gates.assign([2] * 1000)
    gates.explore, gates.sampling = 0.3, mode == "sampling"
    gates.train(mode == "train")
    found = counts(gates).numpy()
    if mode == "eval":
        assert found.tolist() == [0, 0, DRAWS]
    else:
        assert stats.chisquare(found, [0.1 * DRAWS, 0.1 * DRAWS, 0.8 * DRAWS]).pvalue > 1e-3
    assert not gates.draw().learns
    assert torch.equal(gates.probabilities(), torch.tensor([0.0, 0.0, 1.0]).expand(1000, 3))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_no_other_share_of_the_draws(share):
    gates = GroupGates(3, 2, "uniform", "straight_through")
    with pytest.raises(ValueError, match="expected a share of the draws, 0 to 1"):
        gates.explore = share
    assert gates.explore == 0


def test_with_noise_on_p_argmax_is_that_of_p():
    gates = GroupGates(300, 2, "dirichlet", "straight_through").eval()
    gates.noise_on = "p"
    assert torch.equal(gates.draw().assignment, gates.logits.argmax(1))


def test_noise_is_on_log_p_unless_it_is_asked_for():
    plain = GroupGates(300, 2, "dirichlet", "straight_through")
    asked, other = copy.deepcopy(plain), copy.deepcopy(plain)
    asked.noise_on, other.noise_on = "log_p", "p"
    assert plain.noise_on == "log_p"
    assert copy.deepcopy(other).noise_on == "p"
    drawn = []
    for gates in (plain, asked, other):
        torch.manual_seed(1)
        drawn.append(gates.draw().assignment)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="noise_on='logits' is unknown, expected one of log_p, p"):
        plain.noise_on = "logits"


def test_a_certain_kernel_is_never_drawn_elsewhere():
    gates = GroupGates(1000, 2, [0.0, 1.0, 0.0], "straight_through")
    assert counts(gates)[1] > DRAWS * 0.999


def test_gumbel_noise_is_gumbel():
    noise = gumbel_noise(torch.empty(20000, dtype=torch.float64))
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-3
    assert torch.isfinite(noise).all()


def assert_gates_of(gates, z, soft, estimator):
    """z is the relaxed draw `soft`, or one-hot where that is largest; its gradient is that of the relaxed draw."""
    weight = torch.randn_like(soft)
    expected = torch.autograd.grad((soft * weight).sum(), gates.logits)[0]
    torch.testing.assert_close(torch.autograd.grad((z * weight).sum(), gates.logits)[0], expected)
    if estimator == "gumbel_softmax":
        torch.testing.assert_close(z, soft)
    else:
        assert torch.equal(z, torch.nn.functional.one_hot(soft.argmax(1), 4).to(z.dtype))


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax"])
def test_gates_and_their_gradient_are_the_formula(estimator, float64):
    gates = GroupGates(7, 3, "dirichlet", estimator)
    gates.temperature = 0.4
    torch.manual_seed(3)
    z = gates.draw().gates
    torch.manual_seed(3)
    soft = oracle.relaxed(gates.logits, gumbel_noise(gates.logits), 0.4)
    assert_gates_of(gates, z, soft, estimator)


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax"])
def test_with_noise_on_p_the_formula_has_p_in_the_place_of_log_p(estimator, float64):
    gates = GroupGates(7, 3, "dirichlet", estimator)
    gates.temperature, gates.noise_on = 0.4, "p"
    torch.manual_seed(3)
    z = gates.draw().gates
    torch.manual_seed(3)
    p = torch.exp(gates.logits) / torch.exp(gates.logits).sum(1, keepdim=True)
    e = torch.exp((p + gumbel_noise(gates.logits)) / 0.4)
    soft = e / e.sum(1, keepdim=True)
    assert_gates_of(gates, z, soft, estimator)


def test_straight_through_is_one_hot_to_the_bit():
    gates = GroupGates(500, 2, "dirichlet", "straight_through")
    gates.temperature = 0.7
    z = gates.draw().gates
    assert torch.equal(z, z.round())
    assert torch.equal(z.sum(1), torch.ones(500))


@pytest.mark.parametrize("name", INITIAL)
def test_initial_p_is_a_distribution(name):
    p = initial_probabilities(name, 50, 4)
    assert p.shape == (50, 4)
    torch.testing.assert_close(p.sum(1), torch.ones(50))
    gates = GroupGates(50, 3, name, "straight_through")
    torch.testing.assert_close(gates.probabilities().sum(1), torch.ones(50))


def test_initial_p_values():
    torch.testing.assert_close(initial_probabilities("mostly_shared", 1, 3)[0], torch.tensor([0.9, 0.05, 0.05]))
    torch.testing.assert_close(initial_probabilities("mostly_specific", 1, 3)[0], torch.tensor([0.1, 0.45, 0.45]))
    torch.testing.assert_close(initial_probabilities("uniform", 1, 4)[0], torch.full((4,), 0.25))
    vertex = initial_probabilities("vertex", 300, 3)
    assert (vertex.max(1).values == 0.99).all()
    assert len(vertex.argmax(1).unique()) == 3
    dirichlet = initial_probabilities("dirichlet", 4000, 3)
    torch.testing.assert_close(dirichlet.mean(0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    torch.testing.assert_close(dirichlet.var(0), torch.full((3,), 1 / 18), atol=0.005, rtol=0)  # of a flat Dirichlet


def test_temperature_anneals_exponentially_to_a_floor():
    assert temperature_at(0.0) == 1.0
    assert math.isclose(temperature_at(0.4), math.sqrt(0.1))
    assert math.isclose(temperature_at(0.8), 0.1)
    assert temperature_at(1.0) == 0.1


def test_temperature_is_one_buffer():
    gates = GroupGates(3, 2, "uniform", "straight_through")
    held = gates.temperature
    gates.temperature = 0.25
    assert held == 0.25
    assert "_temperature" in gates.state_dict()


def test_estimator_none_freezes_the_logits():
    gates = GroupGates(3, 2, "uniform", "none")
    assert not gates.logits.requires_grad
    gates.estimator = "straight_through"
    assert gates.logits.requires_grad


def test_constant_p_is_drawn_also_in_eval():
    gates = GroupGates(300, 2, "uniform", "none").eval()
    assert len(gates.draw().assignment.unique()) == 3
    learnt = GroupGates(300, 2, "mostly_shared", "straight_through").eval()
    assert learnt.draw().assignment.unique().tolist() == [0]
    learnt.sampling = True
    assert len(learnt.draw().assignment.unique()) == 3


def test_sharing_a_grouping():
    owner, other = (GroupGates(4, 2, "uniform", "straight_through") for _ in range(2))
    other.share_grouping(owner)
    assert other.logits is owner.logits
    with pytest.raises(ValueError, match="shares another layer's grouping"):
        other.draw()
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        other.share_grouping(GroupGates(5, 2, "uniform", "straight_through"))


ON_P = ["all with noise on p", "one with noise on p"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "what",
    [
        "alike",
        "every",
        "no_grad",
        "eval",
        "one in eval",
        "one fixed",
        "one with every",
        *ON_P,
        "explores",
        "one explores",
    ],
)
def test_drawn_together_is_drawn_one_after_the_other(estimator, what):
    layers = [GroupGates(kernels, ["a", "b"], "dirichlet", estimator) for kernels in (5, 1, 8)]
    for number, layer in enumerate(layers):
        layer.temperature = 0.3 + number  # which may differ
        layer.every = 2 if what == "every" or (what == "one with every" and number == 1) else 1
        layer.noise_on = "p" if what == ON_P[0] or (what == ON_P[1] and number == 1) else "log_p"
        layer.explore = 0.2 if what == "explores" or (what == "one explores" and number == 1) else 0
        layer.train(what != "eval" and (what != "one in eval" or number != 1))
    if what == "one fixed":
        layers[1].assign([2])
    twins = copy.deepcopy(layers)
    for _ in range(3):
        with torch.set_grad_enabled(what != "no_grad"):
            torch.manual_seed(3)
            together = draw_together(layers)
            torch.manual_seed(3)
            one_by_one = [twin.draw() for twin in twins]
        for layer, twin, a, b in zip(layers, twins, together, one_by_one, strict=True):
            assert torch.equal(a.assignment, b.assignment)
            assert (a.full, a.all_gates, a.learns, a.ends) == (b.full, b.all_gates, b.learns, b.ends)
            torch.testing.assert_close(a.gates, b.gates)
            if not a.learns:
                continue
            weights = torch.randn_like(a.gates)
            expected = torch.autograd.grad((b.gates * weights).sum(), twin.logits)[0]
            found = torch.autograd.grad((a.gates * weights).sum(), layer.logits, retain_graph=True)[0]
            torch.testing.assert_close(found, expected)
        assert [layer.learning_steps.item() for layer in layers] == [twin.learning_steps.item() for twin in twins]
    assert draw_together([]) == []


def test_a_network_takes_one_softmax_for_all_its_draws():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Counting.count += function is torch.ops.aten._log_softmax.default
            return function(*args, **(kwargs or {}))

    model = sfg_fast.SFGHighResNet(1, {"a": 1}, width=(3, 3, 3), blocks=1, residual="routed")
    with Counting():
        model(torch.randn(1, 1, 8, 8))
    assert Counting.count == 1
