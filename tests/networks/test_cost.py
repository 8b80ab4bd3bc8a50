"""Weights and operations, counted by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfg_fast import SFGVGG, SFGConv2d, SFGHighResNet, assign, backend, predict
from sfg_fast.backends import available
from sfg_fast.draws import gumbel_noise
from sfg_fast.networks.build import build
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.networks.cost import DRAWS, flops, logits, parameters
from tests.backends import FAST

OUTPUTS = {"a": 1, "b": 2}
NATIVE = pytest.mark.skipif(not available("native"), reason="no C++ kernels here")


def test_weights_counted_by_hand():
    conv = 9 * 2 * 6 + 6 + 9 * 6 * 6 + 6  # two layers without norm
    net = nn.Sequential(SFGConv2d(2, 6, 3), SFGConv2d(6, 6, 3), nn.Conv2d(6, 1, 1))
    assert parameters(net) == conv + 7
    assert logits(net) == 2 * 6 * 3
    net[1].share_grouping(net[0])
    assert (parameters(net), logits(net)) == (conv + 7, 6 * 3)
    net[2].requires_grad_(False)
    assert parameters(net) == conv
    net[0].estimator = net[1].estimator = "none"
    assert (parameters(net), logits(net)) == (conv, 0)


@pytest.mark.parametrize("method", ["hard_sharing", "constant_p", "sfg", "cross_stitch"])
def test_weights_of_a_vgg(method):
    """Width 1: 1, 2, 4, 4, 8, 8, 8, 8 kernels; a scale and a shift for each; heads of 9 and 18 numbers."""
    kernels = [1, 2, 4, 4, 8, 8, 8, 8]
    body = sum(9 * c * k + 2 * k for c, k in zip([3, *kernels], kernels, strict=False))
    net = build("vgg", 3, OUTPUTS, method, width=1)
    mixtures = 4 * (1 + 2 + 4 + 8 + 8)
    assert parameters(net) == (2 * body + mixtures if method == "cross_stitch" else body) + 9 + 18
    assert logits(net) == (3 * sum(kernels) if method == "sfg" else 0)


def pairs(into, out):
    """Of kernels and the channels that they read, from their groups. `into` None: an image of two channels."""
    if into is None:
        return 2 * len(out)
    return sum(g in (h, 0) for h, g in itertools.product(out, into))


def by_hand(groups, size):
    """A routed network of one block in each stage: its layers' groups in order, without conv2 of the blocks."""
    (t1, b1, t2, b2, t3, b3, f1, f2) = groups
    read = [(None, t1), (t1, b1), (b1, t1), (t1, t2), (t2, b2), (b2, t2), (t2, t3), (t3, b3), (b3, t3)]
    read += [(t3, f1), (f1, f2)]
    heads = sum(n * sum(g in (t, 0) for g in f2) for t, n in enumerate(OUTPUTS.values(), 1))
    return 2 * size * (9 * sum(pairs(*one) for one in read) + heads)


def routed(**options):
    return SFGHighResNet(2, OUTPUTS, (3, 4, 5), 1, "routed", **options)


@NATIVE
def test_operations_counted_by_hand():
    net, x = routed(), torch.randn(3, 2, 7, 6)
    groups = [[(number + k) % 3 for k in range(layer.out_channels)] for number, layer in enumerate(_layers(net))]
    assign(net, dict(zip(sfg_layers(net), groups, strict=True)))
    with backend("native"):
        assert flops(net, x) == flops(net, x[:1]) == by_hand(groups, 7 * 6)
    assert net.training


@NATIVE
def test_operations_of_a_learnt_grouping_are_those_of_argmax_p():
    net, x = routed(init="dirichlet"), torch.randn(1, 2, 7, 6)
    with backend("native"):
        assert flops(net, x) == by_hand([layer.logits.argmax(1).tolist() for layer in _layers(net)], 42)


@NATIVE
def test_operations_of_a_constant_p_are_a_mean_over_draws():
    net, x = routed(method="constant_p"), torch.randn(1, 2, 7, 6)
    torch.manual_seed(0)
    total = 0
    for _ in range(DRAWS):
        groups = [gumbel_noise(layer.logits).argmax(1).tolist() for layer in _layers(net)]
        total += by_hand(groups, 42)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with backend("native"):
        assert flops(net, x) == flops(net, x) == total / DRAWS
    assert torch.equal(torch.get_rng_state(), state)


def _layers(net):
    return list(sfg_layers(net).values())


def test_what_masks_is_counted_as_what_it_computes():
    """Every backend counts what it does: one that shares all kernels costs as much as a plain network."""
    net, x = SFGVGG(3, OUTPUTS, 1, method="hard_sharing"), torch.randn(2, 3, 32, 32)
    channels, kernels, rows = [3, 1, 2, 4, 4, 8, 8, 8], [1, 2, 4, 4, 8, 8, 8, 8], [32, 16, 8, 8, 4, 4, 2, 2]
    plain = 2 * 9 * sum(c * k * r * r for c, k, r in zip(channels, kernels, rows, strict=True)) + 2 * 8 * 3
    for name in FAST:
        with backend(name):
            assert flops(net, x) == plain
    with backend("reference"):
        assert flops(net, x) > 2 * plain
    stitched = build("vgg", 3, OUTPUTS, "cross_stitch", width=1)
    assert flops(stitched, x) == 2 * (plain - 2 * 8 * 3) + 2 * 8 * 3


def test_a_prediction_is_what_it_was_before():
    net, x = routed(init="dirichlet"), torch.randn(1, 2, 7, 6)
    before = predict(net, x)
    flops(net, x)
    assert torch.equal(predict(net, x)["a"].mean, before["a"].mean)
    assert F.mse_loss(predict(net, x)["b"].mean, before["b"].mean) == 0
