"""`CrossStitch`: written out plainly from its parameters, and that it is a multi-task network as the others are."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sfg_fast import (
    SFGVGG,
    SFGHighResNet,
    assign,
    backend,
    freeze,
    parameter_groups,
    penalties,
    predict,
    recalibrate,
    sampling,
)
from sfg_fast.groups import FilterGroups
from sfg_fast.layers.streams import StreamBlock
from sfg_fast.networks.controls import draws_from_constant_p, map_assignment, sfg_layers
from sfg_fast.networks.cross_stitch import CrossStitch, CrossStitchUnit
from sfg_fast.networks.parts import ResidualBlock
from sfg_fast.reference import DenseFeatures
from tests.backends import FAST
from tests.oracle import assert_close

TASKS = {1: {"ct": 2}, 2: {"ct": 1, "organs": 3}, 3: {"a": 1, "b": 2, "c": 1}}
SIZES = {
    "separate": (SFGHighResNet, {"width": (3, 4, 5), "blocks": 2, "residual": "separate"}),
    "routed": (SFGHighResNet, {"width": (3, 4, 5), "blocks": 1, "residual": "routed"}),
    "vgg": (SFGVGG, {"width": 2}),
}


def network(name, tasks=2, **options):
    torch.manual_seed(1)
    kind, sizes = SIZES[name]
    model = CrossStitch(kind, 2, TASKS[tasks], **sizes, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # no zero biases, no equal mixtures
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def image(name, n=3):
    return torch.randn(n, 2, *((34, 37) if name == "vgg" else (9, 8)))


# --- written plainly --------------------------------------------------------------------------------------------------


def plainly(name, model, x):
    """Each network for itself, without norms; after each stage the mixtures."""
    p, count = dict(model.named_parameters()), len(model.outputs)

    def conv(prefix, x, dilation=1):
        return F.conv2d(x, p[f"{prefix}.weight"], p[f"{prefix}.bias"], 1, dilation, dilation)

    def stage(number, t, x):
        prefix, dilation = f"columns.{t}.stages.{number}", 2**number
        x = conv(f"{prefix}.0", x).relu()
        if name == "vgg":
            x = conv(f"{prefix}.1", x).relu() if number > 1 else x
            return F.max_pool2d(x, 2)
        if name == "routed":
            return x + conv(f"{prefix}.1.conv2", conv(f"{prefix}.1.conv1", x, dilation).relu(), dilation)
        for block in (2, 3):
            h = x if block == 2 else x.relu()
            h = conv(f"{prefix}.{block}.conv1", h, dilation).relu()
            x = x + conv(f"{prefix}.{block}.conv2", h, dilation)
        return x

    xs = [x] * count
    for number in range(5 if name == "vgg" else 3):
        ys = [stage(number, t, x) for t, x in enumerate(xs)]
        alpha = p[f"units.{number}.alpha"]
        xs = [sum(alpha[t, s].view(-1, 1, 1) * ys[s] for s in range(count)) for t in range(count)]
    out = {}
    for t, task in enumerate(model.outputs):
        weight, bias = p[f"heads.{task}.weight"], p[f"heads.{task}.bias"]
        if name == "vgg":
            out[task] = xs[t].mean((2, 3)) @ weight.t() + bias
        else:
            h = conv(f"columns.{t}.final.1", conv(f"columns.{t}.final.0", xs[t]).relu()).relu()
            out[task] = F.conv2d(h, weight, bias)
    return out


@pytest.mark.parametrize("kernels", ["reference", *FAST])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", SIZES)
def test_equals_itself_written_plainly(name, tasks, kernels, float64):
    model, x = network(name, tasks, norm=None), image(name)
    expected = plainly(name, model, x)
    with backend(kernels):
        found = model(x)
    assert list(found) == list(TASKS[tasks])
    learnt = {key: p for key, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for y in (found, expected):
        loss = sum((one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in y.values())
        gradients.append(torch.autograd.grad(loss, list(learnt.values())))
    for task in expected:
        assert_close(found[task], expected[task], what=task)
    for key, a, b in zip(learnt, *gradients, strict=True):
        assert_close(a, b, 1e-9, key)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("first", [True, False])
def test_a_residual_block_is_one_stream_of_a_stream_block(first, mode, float64):
    """Of one with two streams, the other of which has nothing to do with it."""
    plain, both = ResidualBlock(3, 2, first, "batch"), StreamBlock(3, ["a"], 2, first)
    for key, value in plain.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
            both.state_dict()[key][3:] = value
    x = torch.randn(2, 3, 7, 8)
    with backend("reference"):
        streams = DenseFeatures([torch.randn_like(x), x], FilterGroups.streams(3, ["a"]))
        found = both.train(mode == "train")(streams)[1]
    assert_close(found, plain.train(mode == "train")(x))


@pytest.mark.parametrize(("tasks", "rest"), [(1, 0), (2, 0.1), (3, 0.05)])
def test_units_start_at_the_paper_s_mixture(tasks, rest):
    alpha = CrossStitchUnit(tasks, 4).alpha
    assert alpha.shape == (tasks, tasks, 4)
    own = 0.9 if tasks > 1 else 1.0
    expected = torch.full((tasks, tasks), rest) + (own - rest) * torch.eye(tasks)
    torch.testing.assert_close(alpha[..., 2], expected)
    torch.testing.assert_close(alpha.sum(1), torch.ones(tasks, 4))


def test_without_mixing_the_networks_know_nothing_of_one_another():
    model, x = network("routed"), image("routed")
    for unit in model.units:
        unit.alpha.data = torch.eye(2)[:, :, None].expand_as(unit.alpha).clone()
    model(x)["ct"].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.columns[1].parameters())
    assert any(p.grad.any() for p in model.columns[0].parameters() if p.requires_grad)


# --- as the others ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_every_kernel_is_in_the_group_of_its_network_s_task(name):
    model = network(name, 3)
    layers = sfg_layers(model)
    assert len(layers) == 3 * {"separate": 5, "routed": 8, "vgg": 8}[name]
    for key, layer in layers.items():
        group = 1 + int(key.split(".")[1])
        assert layer.group_names == ("shared", "a", "b", "c")
        assert set(layer.fixed_assignment.tolist()) == {group}
        assert (layer.probabilities().argmax(1) == group).all()
    assert not draws_from_constant_p(model)
    assert not any(layer.learns_grouping or layer.logits.requires_grad for layer in layers.values())
    assert {key: set(one.tolist()) for key, one in map_assignment(model).items()} == {
        key: {1 + int(key.split(".")[1])} for key in layers
    }
    assign(model, map_assignment(model))
    squares, entropies = penalties(model)
    assert entropies == 0
    assert squares >= sum(layer.weight.square().sum() for layer in layers.values()) * (1 - 1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_copies_states_and_modes(name):
    model, x = network(name), image(name)
    model(x)
    again = network(name)
    again.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), again):
        a, b = model.eval()(x), other.eval()(x)
        assert all(torch.equal(a[task], b[task]) for task in a)
    with sampling(model):  # nothing is drawn
        assert torch.equal(model(x)["ct"], a["ct"])
    assert predict(model, x, draws=2)["ct"].variance.max() < 1e-10


@pytest.mark.parametrize("name", SIZES)
def test_recalibrated_statistics_are_those_of_the_batch(name, float64):
    model, x = network(name), image(name, 6)
    for _ in range(3):
        model(torch.randn_like(x) + 1)
    recalibrate(model, [x])
    with torch.no_grad():
        evaluated, trained = model.eval()(x), model.train()(x)
    by_batch = predict(model, x, statistics="batch")
    for task in evaluated:
        torch.testing.assert_close(by_batch[task].mean, trained[task])
        if name != "vgg":  # running variances are corrected by n / (n - 1); the last stage of vgg has six values
            torch.testing.assert_close(evaluated[task], trained[task], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", SIZES)
def test_frozen_for_all_tasks_or_some(name, tasks):
    model, x = network(name, tasks).double(), image(name).double()
    recalibrate(model, [x])
    model.eval()
    for wanted in (None, list(TASKS[tasks])[-1:]):
        frozen = freeze(model, tasks=wanted)
        with torch.no_grad():
            found, expected = frozen(x), model(x)
        assert list(found) == (wanted or list(TASKS[tasks]))
        for task, y in found.items():
            torch.testing.assert_close(y, expected[task], rtol=1e-10, atol=1e-10)


def test_nothing_decays_the_mixtures():
    model = network("vgg")
    groups = {group["name"]: group for group in parameter_groups(model, 0.1)}
    mixtures = {id(unit.alpha) for unit in model.units}
    assert not mixtures & {id(p) for p in groups["weights"]["params"]}
    assert mixtures <= {id(p) for p in groups["not_decayed"]["params"]}
    assert groups["not_decayed"]["weight_decay"] == 0
    assert [group["name"] for group in parameter_groups(model)] == ["weights"]  # their rate is the weights'


def test_mixtures_are_learnt():
    """With all the rest."""
    torch.manual_seed(0)
    model = CrossStitch(SFGVGG, 1, {"a": 1, "b": 1}, width=2)
    x = torch.randn(16, 1, 32, 32)
    target = x.square().mean((1, 2, 3))
    before = [unit.alpha.detach().clone() for unit in model.units]
    optimiser, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(15):
        y = model(x)
        losses.append(sum((one[:, 0] - target).square().mean() for one in y.values()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all((unit.alpha - old).abs().max() > 1e-3 for unit, old in zip(model.units, before, strict=True))


def test_what_can_t_be_is_refused():
    with pytest.raises(ValueError, match=r"the image has size \(31, 40\), expected at least \(32, 32\)"):
        network("vgg")(torch.zeros(1, 2, 31, 40))
    with pytest.raises(ValueError, match="residual='dense' is unknown"):
        CrossStitch(SFGHighResNet, 1, {"a": 1}, residual="dense")
