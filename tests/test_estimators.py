"""The estimators of the gradient to p: formulas written out, bias where all draws can be enumerated, and both forms of
the dense part against a literal transcription."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from sfg_fast import SFGConv2d, SFGHighResNet, backend, set_estimator
from sfg_fast.draws import gumbel_noise
from sfg_fast.estimators import ESTIMATORS, gumbel_rao, reinmax, straight_through
from sfg_fast.gates import GroupGates
from sfg_fast.networks.controls import sfg_layers
from tests import oracle
from tests.backends import EVERY
from tests.oracle import assert_close

LEARN = {name: estimator for name, estimator in ESTIMATORS.items() if estimator.gates is not None}
ONE_HOT = [name for name, estimator in LEARN.items() if not estimator.relaxed]
OF_ALL_GATES = [name for name in ONE_HOT if LEARN[name].all_gates]


def draw_many(p, draws):
    """log p with gradient for `draws` kernels of equal p, and their one-hot draws and noise."""
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    log_p = logits.log_softmax(0).expand(draws, -1)
    noise = gumbel_noise(log_p)
    return logits, log_p, F.one_hot((log_p + noise).argmax(1), len(p)).to(log_p.dtype), noise


def mean_gradient(formula, p, f, draws=40000, samples=0, temperature=1.0):
    """Mean over draws of the estimated gradient of E[f(z)], f(z) = sum_g f_g(z_g), and its standard error."""
    torch.manual_seed(1)
    _, log_p, drawn, noise = draw_many(p, draws)
    noise = torch.stack([noise, *(gumbel_noise(noise) for _ in range(samples))])
    leaf = log_p.detach().requires_grad_()
    z = formula(drawn, leaf, noise, torch.tensor(temperature))
    dz = torch.autograd.grad(f(z).sum(), z, retain_graph=True)[0]
    each = torch.autograd.grad(z, leaf, dz)[0]
    p = torch.tensor(p, dtype=torch.float64)
    each = each - p * each.sum(1, keepdim=True)  # through log_softmax
    return each.mean(0), each.std(0) / draws**0.5


P = [0.5, 0.3, 0.2]


def exact(f, p=P):
    logits = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    q = logits.softmax(0)
    return torch.autograd.grad(sum(q[g] * f(torch.eye(3, dtype=torch.float64)[None, g])[0] for g in range(3)), logits)[
        0
    ]


def linear(z):
    return (z * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)).sum(1)


def quadratic(z):
    a = torch.tensor([[2.0, 1, 0], [1, -1, 3], [0, 3, 1]], dtype=torch.float64)
    return torch.einsum("ni,ij,nj->n", z, a, z)


@pytest.mark.parametrize("loss", [linear, quadratic])
@pytest.mark.parametrize("name", LEARN)
def test_every_estimator_points_where_enumeration_does(name, loss, float64):
    """Over 40,000 draws. Biased estimators are shorter (`selected` has .29 of the length for the linear loss),
    but none turns by more than 7 degrees: .992."""
    gates = GroupGates(40000, 2, P, name)
    torch.manual_seed(1)
    mean = torch.autograd.grad(loss(gates.draw().gates).sum(), gates.logits)[0].mean(0)
    wanted = exact(loss)
    assert F.cosine_similarity(mean, wanted, 0) > 0.985
    assert 0.25 < mean.norm() / wanted.norm() < 1.05


def test_reinmax_is_unbiased_to_second_order():
    """Exact for a quadratic loss, where straight-through is not (Liu et al., section 3)."""
    mean, error = mean_gradient(reinmax, P, quadratic)
    assert ((mean - exact(quadratic)).abs() < 4 * error).all()
    mean, error = mean_gradient(straight_through, P, quadratic)
    assert ((mean - exact(quadratic)).abs() > 8 * error).any()


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gumbel_rao_has_the_mean_of_straight_through_and_less_variance(temperature):
    plain, error = mean_gradient(straight_through, P, quadratic, temperature=temperature)
    rao, smaller = mean_gradient(gumbel_rao, P, quadratic, samples=16, temperature=temperature)
    assert ((plain - rao).abs() < 4 * (error + smaller)).all()
    assert smaller.square().sum() < 0.85 * error.square().sum()


def test_where_some_draws_ignore_p_reinmax_is_of_the_mixture(float64):
    """Its gradient to the logits, where groups are drawn from q = .6 p + .4 / 3: exact for a quadratic loss."""
    kernels = 40000
    gates = GroupGates(kernels, 2, P, "reinmax")
    gates.explore = 0.4
    torch.manual_seed(1)
    each = torch.autograd.grad(quadratic(gates.draw().gates).sum(), gates.logits)[0]
    logits = torch.tensor(P).log().requires_grad_()
    q = 0.6 * logits.softmax(0) + 0.4 / 3
    wanted = torch.autograd.grad(sum(q[g] * quadratic(torch.eye(3)[None, g])[0] for g in range(3)), logits)[0]
    assert ((each.mean(0) - wanted).abs() < 4 * each.std(0) / kernels**0.5).all()


def test_with_noise_on_p_estimators_are_of_softmax_p(float64):
    """Their gradients to the logits, where groups are drawn from q = softmax(p): exact for reinmax and a quadratic
    loss, of one mean for straight_through and gumbel_rao."""
    kernels, found = 40000, {}
    for name in ("straight_through", "gumbel_rao", "reinmax"):
        gates = GroupGates(kernels, 2, P, name)
        gates.noise_on = "p"
        torch.manual_seed(1)
        each = torch.autograd.grad(quadratic(gates.draw().gates).sum(), gates.logits)[0]
        found[name] = each.mean(0), each.std(0) / kernels**0.5
    logits = torch.tensor(P).log().requires_grad_()
    q = logits.softmax(0).softmax(0)
    wanted = torch.autograd.grad(sum(q[g] * quadratic(torch.eye(3)[None, g])[0] for g in range(3)), logits)[0]
    mean, error = found["reinmax"]
    assert ((mean - wanted).abs() < 4 * error).all()
    (plain, error), (rao, smaller) = found["straight_through"], found["gumbel_rao"]
    assert ((plain - rao).abs() < 4 * (error + smaller)).all()
    assert smaller.square().sum() < 0.85 * error.square().sum()


def test_noise_given_the_draw_has_its_argmax_there():
    """The conditional noise of gumbel_rao: at a low temperature its relaxed samples are the draw itself."""
    _, log_p, drawn, noise = draw_many(P, 2000)
    noise = torch.stack([noise, gumbel_noise(noise)])
    relaxed = {}

    def spy(self, *args, **kwargs):
        relaxed["z"] = original(self, *args, **kwargs)
        return relaxed["z"]

    original = torch.Tensor.softmax
    try:
        torch.Tensor.softmax = spy
        gumbel_rao(drawn, log_p, noise, torch.tensor(1e-4))
    finally:
        torch.Tensor.softmax = original
    assert (relaxed["z"][0].argmax(1) == drawn.argmax(1)).all()


@pytest.mark.parametrize("name", ONE_HOT)
def test_one_hot_to_the_bit(name):
    gates = GroupGates(500, 2, "dirichlet", name)
    gates.temperature = 0.3
    z = gates.draw().gates
    assert torch.equal(z, z.round())
    assert torch.equal(z.sum(1), torch.ones(500))


@pytest.mark.parametrize("name", LEARN)
def test_no_gradient_blows_up_at_a_certain_p(name):
    gates = GroupGates(4, 2, [1.0, 0.0, 0.0], name)
    gates.temperature = 0.01
    with torch.no_grad():
        gates.logits[:, 0] += 200
    (gates.draw().gates * torch.randn(4, 3)).sum().backward()
    assert torch.isfinite(gates.logits.grad).all()


def test_selected_looks_at_the_drawn_gate_alone():
    torch.manual_seed(0)
    gates = GroupGates(50, 2, "dirichlet", "selected")
    groups = gates.draw()
    dz = torch.randn(50, 3)
    found = torch.autograd.grad(groups.gates, gates.logits, dz)[0]
    torch.manual_seed(0)
    plain = GroupGates(50, 2, "dirichlet", "straight_through")
    plain.load_state_dict(gates.state_dict())
    groups = plain.draw()
    only = dz * F.one_hot(groups.assignment, 3)
    torch.testing.assert_close(found, torch.autograd.grad(groups.gates, plain.logits, only)[0])
    assert groups.all_gates


@pytest.mark.parametrize("name", OF_ALL_GATES)
def test_every_nth_step_has_the_mean_of_all(name):
    """The same draw at n steps: `selected` n - 1 times, and the n-th adds n times the rest."""
    every = 3
    layers = [GroupGates(20, 2, "dirichlet", name) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].every = every
    dz, found, looked = torch.randn(20, 3), [], []
    for gates in layers:
        total = torch.zeros(20, 3)
        for _ in range(every):
            torch.manual_seed(7)
            groups = gates.draw()
            total += torch.autograd.grad(groups.gates, gates.logits, dz)[0] / every
            looked.append(groups.all_gates)
        found.append(total)
    torch.testing.assert_close(*found)
    assert looked == [True] * every + [False, False, True]


def test_every_goes_on_where_a_checkpoint_was():
    gates = GroupGates(3, 2, "uniform", "straight_through")
    gates.every = 3
    assert [gates.draw().all_gates for _ in range(4)] == [False, False, True, False]
    again = GroupGates(3, 2, "uniform", "straight_through")
    again.every = 3
    again.load_state_dict(gates.state_dict())
    assert [again.draw().all_gates for _ in range(4)] == [False, True, False, False]


def test_gumbel_softmax_every_nth_step_is_relaxed():
    gates = GroupGates(3, 2, "uniform", "gumbel_softmax")
    gates.every = 2
    assert [gates.draw().full for _ in range(4)] == [False, True, False, True]


def test_set_estimator():
    model = SFGHighResNet(1, {"a": 1, "b": 1}, 4, 1, "routed")
    set_estimator(model, "reinmax", every=4)
    assert {(layer.estimator, layer.every) for layer in sfg_layers(model).values()} == {("reinmax", 4)}
    set_estimator(model, dataclasses.replace(ESTIMATORS["gumbel_rao"], samples=3))
    assert model.stages[0]["sfg"].rule.estimator.samples == 3
    with pytest.raises(
        ValueError, match="estimator='best' is unknown, expected one of gumbel_softmax, straight_through"
    ):
        set_estimator(model, "best")
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"every={wrong!r}: expected a number of steps, at least 1"):
            set_estimator(model, "selected", every=wrong)


# --- both forms of the dense part -------------------------------------------------------------------------------------


def literal(layers, x, noises, tau, pool):
    """A chain of SFG layers with a shortcut around the last, two heads: the paper's formulas, T+1 dense tensors."""
    zs = []
    for layer, noise in zip(layers, noises, strict=True):
        soft = oracle.relaxed(layer.logits, noise, tau)
        z = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft.dtype)
        zs.append(z + soft - soft.detach())
    features = x
    for layer, z in zip(layers[:2], zs[:2], strict=True):
        norm = None if layer.norm is None else (layer.norm.weight, layer.norm.bias, layer.norm.eps)
        bias = layer.bias
        features = oracle.sfg_layer(features, layer.weight, bias, z, padding=1, relu=True, norm=norm)
        if pool:
            features = [F.avg_pool2d(f, 2) for f in features]
    last = layers[2]
    norm = None if last.norm is None else (last.norm.weight, last.norm.bias, last.norm.eps)
    inner = oracle.sfg_layer(features, last.weight, last.bias, zs[1], padding=2, dilation=2, norm=norm)
    features = [a + b for a, b in zip(features, inner, strict=True)]
    return [features[0] + task for task in features[1:]]


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        # On Triton chains without a norm: test_conv.py, test_chain_on_triton_against_dense_masking.
        pytest.param(name, norm, marks=[pytest.mark.slow] if name == "triton" and norm is None else [])
        for name in EVERY
        for norm in (None, "batch")
    ],
)
@pytest.mark.parametrize("form", ["fused", "expanded", "pooled"])
def test_straight_through_is_a_literal_transcription(name, norm, form, float64):
    """Through a chain, a shortcut and (average) pooling; fused, or expanded to T+1 dense tensors between the layers."""
    torch.manual_seed(0)
    options = {"padding": 1, "norm": norm, "bias": norm is None, "activation": "relu", "tasks": 2}
    layers = [SFGConv2d(2, 5, 3, **options), SFGConv2d(5, 6, 3, **options)]
    layers.append(SFGConv2d(6, 6, 3, padding=2, dilation=2, norm=norm, bias=norm is None, tasks=2))
    layers[2].share_grouping(layers[1])
    for layer in layers[:2]:
        layer.temperature = 0.7
    x = torch.randn(2, 2, 12, 10)
    parameters = [p for layer in layers for p in layer.parameters()]
    torch.manual_seed(5)
    noises = [gumbel_noise(layer.logits) for layer in layers[:2]]
    wanted = literal(layers, x, [*noises, noises[1]], 0.7, form == "pooled")
    targets = [torch.randn_like(y) for y in wanted]
    loss = sum((y - t).square().sum() for y, t in zip(wanted, targets, strict=True))
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)
    torch.manual_seed(5)
    with backend(name):
        h = x
        for layer in layers[:2]:
            h = layer(h)
            if form == "pooled" and name != "reference":
                h = h.channelwise(lambda t: F.avg_pool2d(t, 2))
            elif form == "pooled":
                h = type(h)([F.avg_pool2d(t, 2) for t in h], h.groups)
            elif form == "expanded" and layer is layers[0]:
                h = list(h)
        h = h + layers[2](h, groups=h.groups)
        found = [h.merged(1), h.merged(2)]
    loss = sum((y - t).square().sum() for y, t in zip(found, targets, strict=True))
    for (index, a), b in itertools.zip_longest(
        enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)), expected
    ):
        if b is not None:
            assert_close(a, b, what=f"parameter {index}")
