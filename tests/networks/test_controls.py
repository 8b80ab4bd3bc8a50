"""Controls of whole networks: penalties, assignments, temperature, sampling, prediction, recalibration."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sfg_fast import (
    SFGConv2d,
    SFGHighResNet,
    assign,
    backend,
    parameter_groups,
    penalties,
    pool_gradients,
    predict,
    recalibrate,
    sampling,
    set_estimator,
    set_explore,
    set_temperature,
)
from sfg_fast.draws import gumbel_noise
from sfg_fast.networks.controls import map_assignment, sfg_layers
from tests import oracle
from tests.backends import FAST


def network(residual="routed", **options):
    return SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(4, 5, 6), blocks=1, residual=residual, **options)


def warmed(model, steps=4):
    for _ in range(steps):
        model(torch.randn(4, 1, 8, 8))
    return model


@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_penalties_are_the_sums_of_equation_2(residual, float64):
    """A literal transcription of eq. 1 and 2, kernel by kernel."""
    model = network(residual, init="dirichlet")
    norms = entropies = 0.0
    seen = set()
    for module in model.modules():
        if not isinstance(module, SFGConv2d):
            continue
        for kernel in range(module.out_channels):
            norms += sum(float(w) ** 2 for w in module.weight[kernel].detach().flatten())
            if id(module.logits) not in seen:
                p = [math.exp(float(v)) for v in module.logits[kernel].detach()]
                p = [value / sum(p) for value in p]
                entropies -= sum(value * math.log(value) for value in p)
        seen.add(id(module.logits))
    found = [value.item() for value in penalties(model)]
    assert math.isclose(found[0], norms, rel_tol=1e-10)
    assert math.isclose(found[1], entropies, rel_tol=1e-10)


def test_entropy_counts_only_where_logits_are_learnt():
    model = network()
    first = next(iter(sfg_layers(model).values()))
    before = penalties(model)[1]
    first.assign([0, 1, 2, 0])
    torch.testing.assert_close(before - penalties(model)[1], torch.tensor(4 * math.log(3)))
    set_estimator(model, "none")
    assert penalties(model)[1] == 0


def test_penalties_of_a_plain_network_are_zero():
    assert penalties(nn.Conv2d(1, 2, 3)) == (0, 0)


def test_assign_by_name():
    model = network(init="mostly_shared")
    name = next(iter(sfg_layers(model)))
    assign(model, {name: [0, 1, 2, 2]})
    assert map_assignment(model)[name].tolist() == [0, 1, 2, 2]
    with pytest.raises(KeyError, match="heads"):
        assign(model, {"heads": [0]})
    assign(model, None)
    assert not any(layer.assigned for layer in sfg_layers(model).values())


def test_temperature_and_estimator_reach_all_layers():
    model = network()
    set_temperature(model, 0.3)
    set_estimator(model, "gumbel_softmax")
    assert all(
        math.isclose(layer.temperature, 0.3, rel_tol=1e-6) and layer.estimator == "gumbel_softmax"
        for layer in sfg_layers(model).values()
    )


def test_a_share_of_exploring_draws_reaches_all_layers():
    model = network()
    set_explore(model, 0.2)
    assert {layer.explore for layer in sfg_layers(model).values()} == {0.2}
    with pytest.raises(ValueError, match=r"explore=2: expected a share of the draws, 0 to 1"):
        set_explore(model, 2)


def test_pooled_gradients_are_each_one_s_own_and_the_layer_s_mean(float64):
    """By hand for two layers; one that is fixed keeps its zeros, weights keep theirs."""
    model = network()
    layers = list(sfg_layers(model).values())
    layers[-1].assign([1] * layers[-1].out_channels)
    for layer in layers:
        layer.logits.grad, layer.weight.grad = torch.randn_like(layer.logits), torch.ones_like(layer.weight)
    before = [layer.logits.grad.clone() for layer in layers]
    pool_gradients(model, 0.5)
    for layer, own in zip(layers[:-1], before, strict=False):
        kernels = len(own)
        for kernel in range(kernels):
            mean = sum(own[other] for other in range(kernels)) / kernels
            oracle.assert_close(layer.logits.grad[kernel], own[kernel] + 0.5 * kernels**0.5 * mean, 1e-12)
    assert torch.equal(layers[-1].logits.grad, before[-1])
    assert all((layer.weight.grad == 1).all() for layer in layers)


def test_eval_is_deterministic_and_sampling_draws():
    model = warmed(network(init="dirichlet")).eval()
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(model(x)["ct"], model(x)["ct"])
    with sampling(model):
        outputs = [model(x)["ct"] for _ in range(6)]
    assert any(not torch.equal(outputs[0], other) for other in outputs)
    assert torch.equal(model(x)["ct"], model(x)["ct"])


def test_predict_is_the_mean_and_variance_over_draws():
    model = warmed(network(init="dirichlet"))
    x = torch.randn(2, 1, 8, 8)
    links = {"organs": lambda y: y.softmax(1)}
    torch.manual_seed(5)
    found = predict(model, x, draws=5, links=links)
    assert model.training
    torch.manual_seed(5)
    model.eval()
    with sampling(model), torch.no_grad():
        outputs = [model(x) for _ in range(5)]
    ct = torch.stack([y["ct"] for y in outputs])
    organs = torch.stack([y["organs"].softmax(1) for y in outputs])
    for task, drawn in (("ct", ct), ("organs", organs)):
        mean, variance = found[task]
        torch.testing.assert_close(mean, drawn.mean(0))
        torch.testing.assert_close(variance, drawn.var(0, correction=0))
    exact = torch.distributions.Categorical(probs=organs.mean(0).movedim(1, -1)).entropy()
    torch.testing.assert_close(found["organs"].entropy, exact)
    best = predict(model, x)
    with torch.no_grad():
        torch.testing.assert_close(best["ct"][0], model(x)["ct"])
    assert not best["ct"][1].any()


class Normalised(nn.Module):
    """SFG layers with a norm, and a plain one."""

    def __init__(self):
        super().__init__()
        options = {"norm": "batch", "bias": False, "activation": "relu", "padding": 1, "init": "dirichlet"}
        self.first, self.second = SFGConv2d(1, 5, 3, **options), SFGConv2d(5, 6, 3, **options)
        self.norm, self.head = nn.BatchNorm2d(6, momentum=None), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        h = self.second(self.first(x))
        return {"a": self.head(self.norm(h.merged(1))), "b": self.head(h.merged(2))}

    def plainly(self, x, gates):
        """With the statistics of the batch, written out."""
        for layer, z in zip((self.first, self.second), gates, strict=True):
            norm = layer.norm.weight, layer.norm.bias, layer.norm.eps
            x = oracle.sfg_layer(x, layer.weight, None, z, padding=1, relu=True, norm=norm)
        a, b = x[1] + x[0], x[2] + x[0]
        mean = a.mean((0, 2, 3), keepdim=True)
        a = (a - mean) / ((a - mean).square().mean((0, 2, 3), keepdim=True) + self.norm.eps).sqrt()
        a = a * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        return {"a": self.head(a), "b": self.head(b)}


@pytest.mark.parametrize("name", ["reference", *FAST])
@pytest.mark.parametrize("draws", [0, 3])
def test_predictions_with_batch_statistics(draws, name, float64):
    """As written out; and running statistics, modes and later predictions are what they were."""
    model = warmed(Normalised())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.norm.eval()  # whoever fine-tunes may have it so
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, layers = torch.randn(4, 1, 7, 6), (model.first, model.second)
    torch.manual_seed(5)
    each = []
    for _ in range(max(draws, 1)):
        log_p = [layer.logits.log_softmax(1) for layer in layers]
        noisy = [one + gumbel_noise(one) if draws else one for one in log_p]
        each.append(model.plainly(x, [F.one_hot(one.argmax(1), 3).to(x) for one in noisy]))
    torch.manual_seed(5)
    with backend(name):
        running = predict(model, x)
        torch.manual_seed(5)
        found = predict(model, x, draws=draws, statistics="batch")
        again = predict(model, x)
    for task in ("a", "b"):
        values = torch.stack([one[task] for one in each])
        oracle.assert_close(found[task].mean, values.mean(0))
        oracle.assert_close(found[task].variance, values.var(0, correction=0))
        assert torch.equal(again[task].mean, running[task].mean)
        assert not torch.equal(found[task].mean, running[task].mean)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [one.training for one in (model, model.first.norm, model.norm)] == [True, True, False]


def test_a_failed_prediction_with_batch_statistics_changes_nothing():
    model = warmed(network("separate", init="dirichlet"))
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fails(y):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        predict(model, torch.randn(2, 1, 8, 8), draws=2, links={"organs": fails}, statistics="batch")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="statistics='drawn' is unknown, expected 'running' or 'batch'"):
        predict(model, torch.randn(2, 1, 8, 8), statistics="drawn")


def test_map_warns_where_kernels_tie():
    with pytest.warns(UserWarning, match=r"tie for many kernels of 'stages.0.sfg' \(100%\)"):
        predict(network(init="uniform"), torch.randn(1, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(network(init="mostly_shared"), torch.randn(1, 1, 8, 8))


def test_constant_p_is_never_evaluated_by_argmax():
    model = network(method="constant_p")
    with pytest.raises(ValueError, match="constant p"):
        predict(model, torch.randn(1, 1, 8, 8))
    assert predict(model, torch.randn(1, 1, 8, 8), draws=4)["ct"][1].any()
    with pytest.raises(ValueError, match="draws=-1"):
        predict(model, torch.randn(1, 1, 8, 8), draws=-1)


@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_recalibrated_statistics_are_those_of_the_batches(residual, float64):
    """After recalibration on one batch, eval on that batch equals training mode with the same assignment (whose batch
    statistics are biased: the running ones are corrected by n / (n - 1))."""
    model = warmed(network(residual, init="dirichlet"))
    x = torch.randn(6, 1, 12, 12)
    recalibrate(model, [x])
    assert model.training
    assert not any(layer.assigned for layer in sfg_layers(model).values())
    best = map_assignment(model)
    model.eval()
    evaluated = model(x)
    model.train()
    assign(model, best)
    trained = model(x)
    for task in evaluated:
        torch.testing.assert_close(evaluated[task], trained[task], rtol=2e-2, atol=2e-3)


def test_recalibration_averages_all_batches_alike(float64):
    layer = SFGConv2d(1, 3, 1, norm="batch", init="mostly_shared", bias=False)
    batches = [torch.randn(5, 1, 4, 4) * scale for scale in (1, 2, 3)]
    for _ in range(5):
        layer(torch.randn(2, 1, 4, 4) + 10)
    recalibrate(layer, batches)
    means = torch.stack([torch.nn.functional.conv2d(x, layer.weight).mean((0, 2, 3)) for x in batches])
    torch.testing.assert_close(layer.norm.running_mean[0], means.mean(0))


def test_a_failed_recalibration_changes_nothing():
    model = warmed(network("separate", init="mostly_shared"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def broken():
        yield torch.randn(2, 1, 8, 8)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        recalibrate(model, broken())
    with pytest.raises(ValueError, match="no batch"):
        recalibrate(model, [], drawn=True)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.training


@pytest.mark.parametrize("residual", ["separate", "routed"])
def test_recalibration_for_draws_keeps_drawn_predictions_sane(residual):
    model = network(residual, init=[0.8, 0.1, 0.1])
    batches = [torch.randn(4, 1, 10, 10) for _ in range(30)]
    for batch in batches:
        model(batch)
    recalibrate(model, batches, drawn=True)
    mean, variance = predict(model, batches[0], draws=8)["ct"]
    assert variance.max() < 100
    assert mean.abs().max() < 100


# --- optimisers -------------------------------------------------------------------------------------------------------


def three_layers():
    torch.manual_seed(0)
    first, second = SFGConv2d(1, 4, 3, norm="batch"), SFGConv2d(4, 4, 3, init=[0.8, 0.1, 0.1])
    return nn.ModuleDict({"first": first, "second": second, "head": nn.Conv2d(4, 1, 1)})


def step(net, optimiser):
    optimiser.zero_grad()
    net.head(net.second(net.first(torch.randn(2, 1, 9, 9))).merged(1)).sum().backward()
    optimiser.step()


def test_parameter_groups_decay_weights_alone():
    net = three_layers()
    groups = {group["name"]: group for group in parameter_groups(net, 0.5, lr=1e-2, logits_factor=10)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.5,
        "not_decayed": 0.0,
        "logits": 0.0,
    }
    assert {name: group["lr"] for name, group in groups.items()} == {
        "weights": 0.01,
        "not_decayed": 0.01,
        "logits": 0.1,
    }
    named = {id(parameter): name for name, parameter in net.named_parameters()}
    members = {name: sorted(named[id(p)] for p in group["params"]) for name, group in groups.items()}
    assert members["logits"] == ["first.logits", "second.logits"]
    assert members["weights"] == ["first.weight", "head.weight", "second.weight"]
    assert sum(map(len, members.values())) == len(named)


def test_parameter_groups_without_decay():
    net = three_layers()
    net.second.assign([0] * 4)
    net.head.requires_grad_(False)
    groups = parameter_groups(net)
    assert [group["name"] for group in groups] == ["weights", "logits"]
    assert all("lr" not in group for group in groups)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="logits_factor=10: expected lr"):
        parameter_groups(net, logits_factor=10)


@pytest.mark.parametrize("how", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)])
def test_an_optimiser_that_decays_logits_is_told_of_once(how):
    net = three_layers()
    optimiser = how(net.parameters())
    with pytest.warns(
        UserWarning, match=r"weight_decay=0.\d+ is applied to the logits of 2 SFG layers.*parameter_groups"
    ):
        step(net, optimiser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(net, optimiser)


def test_logits_that_come_later_are_told_of():
    net = three_layers()
    optimiser = torch.optim.AdamW(net.head.parameters())
    step(net, optimiser)
    optimiser.add_param_group({"params": net.first.parameters()})
    with pytest.warns(UserWarning, match="the logits of 1 SFG layers"):
        step(net, optimiser)


def test_who_does_not_decay_logits_is_not_told():
    for groups in (lambda net: parameter_groups(net, 0.1), lambda net: net.head.parameters()):
        net = three_layers()
        optimiser = torch.optim.AdamW(groups(net), lr=0.1, weight_decay=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net.second.assign([0] * 4)
            before = net.second.log_p().detach().clone()
            step(net, optimiser)
        torch.testing.assert_close(net.second.log_p(), before)


def test_copies_of_networks_are_known_too():
    net = copy.deepcopy(three_layers())
    with pytest.warns(UserWarning, match="the logits of 2 SFG layers"):
        step(net, torch.optim.AdamW(net.parameters()))


# --- loaders ----------------------------------------------------------------------------------------------------------


def normalised():
    torch.manual_seed(0)
    net = nn.Sequential(SFGConv2d(1, 6, 3, norm="batch", init=[0.2, 0.5, 0.3]), SFGConv2d(6, 6, 3, norm="batch"))
    for layer in net:
        layer.assign([0, 1, 2, 0, 1, 2])
    return net


MR, CT, ORGANS = torch.randn(8, 1, 16, 16), 1000 * torch.rand(8, 1, 16, 16), torch.rand(8, 1, 16, 16)
LOADERS = {
    "triples": ([(MR, CT, ORGANS)], {}),
    "lists": ([[MR, CT, ORGANS]], {}),
    "a pair, the other way round": ([(CT, MR)], {"image": 1}),
    "dicts": ([{"mr": MR, "ct": CT, "case": ["a"] * 8}], {"image": "mr"}),
    "another dtype": ([MR.double()], {}),
    "a DataLoader": (DataLoader(TensorDataset(MR, CT, ORGANS), 8), {}),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_recalibrate_takes_loaders_as_people_have_them(loader):
    """Never a batch for the features of T+1 groups, which three tensors could be."""
    expected, net = normalised(), normalised()
    recalibrate(expected, [MR])
    batches, options = LOADERS[loader]
    recalibrate(net, batches, **options)
    for a, b in zip(net.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)


class OfVolumes(nn.Module):
    """Batch normalisation of volumes, with dropout in the place of drawn architectures."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm3d(2), nn.Conv3d(2, 1, 1)

    def forward(self, x):
        return {"ct": torch.rand(()).to(x) * self.head(self.norm(x))}


def test_volumes_are_recalibrated_and_predicted(float64):
    net, batches = OfVolumes(), [torch.randn(3, 2, 4, 5, 6), 2 + torch.randn(3, 2, 4, 5, 6)]
    recalibrate(net, batches)
    moments = [(x.mean((0, 2, 3, 4)), x.transpose(0, 1).flatten(1).var(1)) for x in batches]
    mean, variance = (sum(one) / 2 for one in zip(*moments, strict=True))
    torch.testing.assert_close(net.norm.running_mean, mean)
    torch.testing.assert_close(net.norm.running_var, variance)
    torch.manual_seed(5)
    found = predict(net, batches[0], draws=4)["ct"]
    torch.manual_seed(5)
    scales = torch.stack([torch.rand(()) for _ in range(4)])
    mean, variance = (one[:, None, None, None] for one in (mean, variance))
    y = ((batches[0] - mean) / (variance + net.norm.eps).sqrt() * net.head.weight[0]).sum(1, keepdim=True)
    y = (y + net.head.bias).detach()
    torch.testing.assert_close(found.mean, scales.mean() * y)
    torch.testing.assert_close(found.variance, scales.var(correction=0) * y.square())


@pytest.mark.parametrize(
    ("batches", "options", "said"),
    [
        ([{"mr": MR, "ct": CT}], {}, "a dict of 'mr', 'ct': expected image=<the key of the images>"),
        ([{"mr": MR}], {"image": "t1"}, "image='t1' is not in a batch that is a dict"),
        ([(MR,)], {"image": 3}, "image=3 is not in a batch that is a tuple"),
        ([(["a", "b"], MR)], {}, r"images have type list, expected a tensor \[N, C, H, W\] or \[N, C, D"),
        ([MR[0]], {}, r"images have shape \(1, 16, 16\), expected a tensor \[N, C, H, W\] or \[N, C, D"),
        ([MR.new_full(MR.shape, torch.nan)], {}, "NaN or infinite"),
        ([], {}, "no batch"),
    ],
)
def test_recalibrate_says_what_it_takes(batches, options, said):
    net = normalised()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(ValueError, match=said):
        recalibrate(net, batches, **options)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
