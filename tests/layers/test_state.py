"""Whoever copies, averages, moves or makes anew what a layer holds gets a layer that works."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sfg_fast import SFGConv2d, backend, reference
from sfg_fast.norm import KernelNorm

WANTED = [0, 1, 2, 2, 1, 0]


def layer(**options):
    return SFGConv2d(3, 6, 3, norm="batch", **options)


def used(model, x=None):
    """The assignment that a forward pass takes."""
    found = model.eval()(torch.randn(1, 3, 5, 5) if x is None else x)
    return found.groups.assignment.tolist()


AVERAGES = {
    "SWA": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "EMA of buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", ["auto", "reference"])
def test_averages_of_models_take_the_fixed_assignment(average, kind):
    torch.manual_seed(0)
    model = layer()
    averaged = AveragedModel(model, **AVERAGES[average])
    averaged.update_parameters(model)
    with backend(kind):
        model.assign(WANTED)
        for _ in range(3):
            averaged.update_parameters(model)
        assert used(averaged) == WANTED
        assert averaged.module.assigned
        if "use_buffers" not in AVERAGES[average]:  # buffers are copied, also where it samples again
            model.assign(None)
            averaged.update_parameters(model)
            assert not averaged.module.assigned


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_models_know_which_groups_were_drawn(average):
    """A count of draws that is cut to 0 would make `eval()` take the pooled statistics instead of the group's own."""
    torch.manual_seed(0)
    model = layer(init=[0.2, 0.4, 0.4])
    averaged = AveragedModel(model, **AVERAGES[average])
    averaged.update_parameters(model)
    for _ in range(4):
        model.train()(torch.randn(4, 3, 8, 8))
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.norm.draws > 0, model.norm.draws > 0)
    if "use_buffers" not in AVERAGES[average]:
        assert torch.equal(averaged.module.norm.draws, model.norm.draws)
    assert (model.norm.draws.sum(0) == 4).all()


WRITERS = {
    "copy_": lambda own, given: own.copy_(given),  # DistributedDataParallel, timm
    "data.copy_": lambda own, given: own.data.copy_(given.data),  # which counts no version
    "data": lambda own, given: setattr(own, "data", given.data.clone()),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("train", [False, True])
def test_who_writes_to_the_buffers_is_noticed(how, train):
    """Tensor by tensor, an assignment over none and none over an assignment."""
    source, target = layer().train(train), layer().train(train)
    for wanted in (WANTED, None, WANTED[::-1]):
        source.assign(wanted)
        target(torch.randn(2, 3, 5, 5))
        for own, given in zip(target.buffers(), source.buffers(), strict=True):
            WRITERS[how](own, given)
        assert target.assigned == source.assigned == (wanted is not None)
        if wanted is not None:
            assert target(torch.randn(2, 3, 5, 5)).groups.assignment.tolist() == wanted


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state", "assigned state"])
def test_copies_have_the_assignment(way):
    source = layer()
    source.assign(WANTED)
    target = layer()
    if way == "deepcopy":
        target = copy.deepcopy(source)
    elif way == "pickle":
        target = pickle.loads(pickle.dumps(source))
    else:
        target.load_state_dict(source.state_dict(), assign=way == "assigned state")
    assert target.assigned
    assert used(target) == WANTED
    target.assign(None)
    assert source.assigned == (way != "assigned state")  # which shares its tensors
    assert not target.assigned


def test_a_state_of_the_version_before():
    """It had the groups' numbers, -1: sampled, and counted draws in whole numbers."""
    source, target = layer(), layer()
    source.assign(WANTED)
    state = source.state_dict()
    del state["fixed_gates"]
    state["fixed_assignment"] = torch.tensor(WANTED)
    state["norm.draws"] = torch.full((3, 6), 7)
    state._metadata[""]["version"] = 1
    target.load_state_dict(state)
    assert target.fixed_assignment.tolist() == WANTED
    assert target.assigned
    assert (target.norm.draws == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_keeps_the_assignment(dtype):
    model = layer()
    model.assign(WANTED)
    assert model.to(dtype).fixed_assignment.tolist() == WANTED


# --- made anew --------------------------------------------------------------------------------------------------------


def test_reset_parameters_is_a_layer_as_it_is_made():
    """The usual loop between the folds of a cross-validation: the numbers of a new layer from the same seed."""
    torch.manual_seed(0)
    net = nn.Sequential(layer(init="dirichlet", activation=nn.PReLU()), nn.Conv2d(6, 3, 1))
    net[0].assign(WANTED)
    net[0].train()(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    net[0].temperature = 0.3
    torch.manual_seed(7)
    fresh = layer(init="dirichlet", activation=nn.PReLU())
    torch.manual_seed(7)
    net.apply(lambda m: m.reset_parameters() if isinstance(m, SFGConv2d) else None)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(net[0].state_dict()[name], tensor), name
    assert not net[0].assigned


@pytest.mark.parametrize("kind", [SFGConv2d, reference.SFGConv2d])
def test_from_the_meta_device(kind):
    """As large models are made: no memory, then empty memory, then numbers."""
    with torch.device("meta"):
        model = nn.Sequential(kind(3, 6, 3, norm="batch", init="vertex"), nn.Conv2d(6, 3, 1))
        assert model[0].weight.is_meta
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert float(model[0].temperature) == 1
    assert not model[0].assigned
    p = model[0].log_p().exp()
    torch.testing.assert_close(p.sum(1), torch.ones(6))
    assert (p.max(1).values > 0.98).all()
    features = model[0].train()(torch.randn(2, 3, 8, 8))
    assert torch.isfinite(features.merged(1)).all()


def test_a_shared_grouping_stays_shared_on_the_way():
    with torch.device("meta"):
        trunk, second = layer(), layer()
    second.share_grouping(trunk)
    net = nn.ModuleList([second, trunk])  # the one that shares is moved first
    net.to_empty(device="cpu")
    assert net[0].logits is net[1].logits
    assert not net[0].logits.is_meta
    assert len({id(p) for p in net.parameters() if p.shape == (6, 3)}) == 1
    twin = copy.deepcopy(net).to(torch.float64)
    assert twin[0].logits is twin[1].logits
    assert twin[0].logits.dtype == torch.float64


def test_reset_running_stats():
    norm = KernelNorm(4, 3)
    norm.running_mean.fill_(5), norm.pooled_var.fill_(3), norm.draws.fill_(2)
    norm.weight.data.fill_(2)
    norm.reset_running_stats()
    assert norm.running_mean.abs().sum() + norm.draws.sum() == 0
    assert (norm.pooled_var == 1).all()
    assert (norm.weight == 2).all()


# --- without values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "masked", "reference"])
@pytest.mark.parametrize("train", [False, True])
def test_fake_tensors_leave_real_ones_alone(kind, train):
    """Groups are kept for layers of the same width: those of a run without values must not be."""
    options = {"activation": "relu", "norm": "batch"}

    def run():
        first, second = SFGConv2d(5, 11, 3, **options).train(train), SFGConv2d(11, 13, 3, **options).train(train)
        y = second(first(torch.randn(2, 5, 9, 8))).merged(1)
        y.sum().backward()
        return y.shape, second.logits.grad is not None

    with backend(kind):
        for fake in (True, False, True, False):
            if fake:
                with FakeTensorMode():
                    assert run() == ((2, 13, 5, 4), True)
            else:
                assert run() == ((2, 13, 5, 4), True)


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        first, second = layer(activation="relu"), SFGConv2d(6, 4, 3)
        y = second(first(torch.randn(2, 3, 9, 8)))
        assert y.merged(1).shape == (2, 4, 5, 4)
        y.merged(1).sum().backward()
    assert first.weight.grad.shape == first.weight.shape
