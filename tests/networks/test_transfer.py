"""Filters of one network in another with other tasks: what goes along, what stays frozen, what is refused."""

import copy

import pytest
import torch
from torch import nn

from sfg_fast import SFGVGG, SFGHighResNet, penalties, predict, recalibrate, sampling, transfer
from sfg_fast.networks.controls import sfg_layers

SOURCE, TARGET = {"ct": 1, "organs": 3}, {"dose": 2, "labels": 3}
MAPPED = {"labels": "organs"}


def high_res_net(residual, **options):
    return lambda outputs: SFGHighResNet(1, outputs, [4, 5, 6], 2, residual, **options)


NETWORKS = {
    "routed": high_res_net("routed"),
    "separate": high_res_net("separate"),
    "without norm": high_res_net("routed", norm=None),
    "vgg": lambda outputs: SFGVGG(1, outputs, 3),
}
IMAGE = (2, 1, 32, 32)


@pytest.fixture(params=NETWORKS)
def pair(request):
    """(a source that has learnt something, a target with other tasks), float64."""
    torch.manual_seed(0)
    source, target = NETWORKS[request.param](SOURCE).double(), NETWORKS[request.param](TARGET).double()
    for layer in sfg_layers(source).values():
        layer.logits.data = 3 * torch.randn_like(layer.logits)
        layer.logits.data[:3] = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 4]]).double()  # no group is empty
    recalibrate(source, [torch.randn(IMAGE).double() for _ in range(3)])
    return source.eval(), target.eval()


def test_frozen_features_are_those_of_the_source(pair):
    """The transferred task's output is the source's, whatever is drawn for the others."""
    source, target = pair
    transfer(source, target, MAPPED, freeze=True)
    x = torch.randn(IMAGE).double()
    expected = predict(source, x)["organs"].mean
    torch.testing.assert_close(predict(target, x)["labels"].mean, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad(), sampling(target):
        for _ in range(5):
            torch.testing.assert_close(target(x)["labels"], expected, rtol=1e-10, atol=1e-10)


def test_frozen_filters_stay_and_the_others_learn(pair):
    source, target = pair
    transferred = transfer(source, target, MAPPED, freeze=True)
    before = copy.deepcopy(target.state_dict())
    optimiser = torch.optim.Adam(target.parameters(), 1e-2)
    target.train()
    for _ in range(4):
        loss = sum(y.square().mean() for y in target(torch.randn(IMAGE).double()).values()) + sum(penalties(target))
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in target.parameters())
        optimiser.step()
    for name, layer in sfg_layers(target).items():
        old = transferred[name]
        assert 0 < old.sum() < len(old)
        for key in ("weight", "logits"):
            was, now = before[f"{name}.{key}"], getattr(layer, key)
            assert torch.equal(now[old], was[old])
            assert (now[~old] != was[~old]).any()
        assert (layer.probabilities()[~old].argmax(1) == 1).all()  # "dose", the only group that is open
        if layer.norm is not None:
            assert torch.equal(layer.norm.weight[old], before[f"{name}.norm.weight"][old])
    others = {name for name, p in target.named_parameters() if not torch.equal(p, before[name])}
    assert any("head" in name for name in others)


@pytest.mark.parametrize("residual", ["routed", "separate"])
def test_heads_and_streams_of_frozen_tasks_stay(residual):
    torch.manual_seed(0)
    source, target = NETWORKS[residual](SOURCE), NETWORKS[residual](TARGET)
    for layer in sfg_layers(source).values():
        layer.logits.data = torch.randn_like(layer.logits)
    transfer(source, target, MAPPED, freeze=True)
    before = copy.deepcopy(target)
    optimiser = torch.optim.SGD(target.parameters(), 1e-2)
    sum(y.square().mean() for y in target(torch.randn(IMAGE)).values()).backward()
    optimiser.step()
    rows = target.heads.rows("labels")
    assert torch.equal(target.heads.conv.weight[rows], before.heads.conv.weight[rows])
    assert torch.equal(target.heads.conv.weight[rows], source.heads.conv.weight[source.heads.rows("organs")])
    assert not torch.equal(target.heads.conv.weight, before.heads.conv.weight)
    if residual == "separate":
        block, was, of = (net.stages[1]["blocks"][0] for net in (target, before, source))
        shared, labels, organs = slice(0, 5), slice(10, 15), slice(10, 15)
        for rows in (shared, labels):
            assert torch.equal(block.conv2.weight[rows], was.conv2.weight[rows])
        assert torch.equal(block.conv1.weight[labels], of.conv1.weight[organs])
        assert not torch.equal(block.conv2.weight[5:10], was.conv2.weight[5:10])
        merge, merged = target.stages[1]["merge"].conv.weight, source.stages[1]["merge"].conv.weight
        assert torch.equal(merge[5:10], merged[5:10])
        assert not torch.equal(merge[:5], merged[:5])


def test_p_that_is_learnt_further():
    """shared keeps its p; what went to `organs` goes to the new tasks in equal parts; every group can be left."""
    source = SFGHighResNet(1, {"ct": 1, "organs": 2}, 4, 1, "routed")
    target = SFGHighResNet(1, {"a": 1, "ct": 1, "b": 1}, 4, 1, "routed")
    first, layer = (next(iter(sfg_layers(net).values())) for net in (source, target))
    p = torch.tensor([[0.6, 0.1, 0.3], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
    first.logits.data = p.clamp_min(1e-9).log()
    fresh = layer.probabilities()[2]
    found = transfer(source, target)  # ct by its name
    assert found["stages.0.sfg"].tolist() == [True, True, False, True]
    expected = torch.tensor([[0.6, 0.15, 0.1, 0.15], [0.1, 0.1, 0.7, 0.1], [0, 0, 0, 0], [1, 0.01, 0.01, 0.01]])
    expected[2] = fresh
    torch.testing.assert_close(layer.probabilities(), expected / expected.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    target(torch.randn(1, 1, 8, 8))["ct"].square().sum().backward()
    assert layer.weight.grad[0].any()
    assert layer.logits.grad[0].any()


def test_shared_filters_only(pair):
    source, target = pair
    found = transfer(source, target, {})
    for name, layer in sfg_layers(source).items():
        assert torch.equal(found[name], layer.probabilities().argmax(1) == 0)


def test_filters_of_a_fixed_grouping():
    source = SFGHighResNet(1, {"ct": 1}, 4, 1, "routed", method="one_task")
    target = SFGHighResNet(1, {"ct": 1, "organs": 2}, 4, 1, "routed")
    assert all(which.all() for which in transfer(source, target).values())
    assert all((layer.probabilities().argmax(1) == 1).all() for layer in sfg_layers(target).values())


@pytest.mark.parametrize(
    ("source", "target", "options", "said"),
    [
        ({}, {}, {"tasks": {"pet": "ct"}}, "'pet' is no task of the target, expected one of dose, labels"),
        ({}, {}, {"tasks": {"dose": "pet"}}, "'pet' is no task of the source, expected one of ct, organs"),
        ({}, {}, {"tasks": {"dose": "ct"}}, "head of 'ct' has 1 outputs in the source, expected 2 as that of 'dose'"),
        ({"method": "constant_p"}, {}, {}, "the source draws its grouping from a constant p"),
        ({}, {"method": "hard_sharing"}, {}, "'stages.0.sfg' of the target doesn't learn its grouping"),
        ({}, {"noise_on": "p"}, {"tasks": MAPPED, "freeze": True}, "freeze: the target's noise is on p, which draws"),
        ({}, {"explore": 0.1}, {"tasks": MAPPED, "freeze": True}, r"freeze: the target has explore=0\.1, which draws"),
        ({}, {"outputs": SOURCE}, {"freeze": True}, "each task of the target .ct, organs. would be frozen"),
        ({"width": [4, 4, 6]}, {}, {}, "'stages.1.sfg' has 4 kernels in the source, expected 5"),
        ({"in_channels": 2}, {}, {}, r"'weight' of layer 'stages.0.sfg' has shape \(4, 2, 3, 3\) in the source"),
        ({"norm": None}, {}, {}, "'stages.0.sfg' has a norm in only one of source and target"),
        ({"blocks": 2}, {}, {}, "expected the same"),
        ({"residual": "separate"}, {"residual": "separate", "blocks": 2}, {}, "no StreamBlock 'stages.0.blocks.1'"),
    ],
)  # fmt: skip
def test_refusals_leave_the_target_alone(source, target, options, said):
    defaults = {"in_channels": 1, "width": [4, 5, 6], "blocks": 1, "residual": "routed"}
    nets = [
        SFGHighResNet(**{**defaults, "outputs": outputs, **changes})
        for outputs, changes in ((SOURCE, source), (TARGET, target))
    ]
    before = copy.deepcopy(nets[1].state_dict())
    with pytest.raises(ValueError, match=said):
        transfer(*nets, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets[1].state_dict().items())
    assert not any(p._backward_hooks for p in nets[1].parameters())


def test_a_module_without_sfg_layers_is_refused():
    with pytest.raises(ValueError, match="nowhere"):
        transfer(nn.Linear(1, 1), nn.Linear(1, 1))
