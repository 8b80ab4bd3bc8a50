"""Who looks on: counters of FLOPs see every backend; tracers, transforms, second derivatives are refused in words."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sfg_fast import SFGConv2d, backend, freeze
from sfg_fast.backends import available

SPLITS = ([4, 4, 4], [7, 3, 2], [12, 0, 0], [0, 6, 6])
NATIVE = pytest.mark.skipif(not available("native"), reason="no C++ kernels here")


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = SFGConv2d(3, 12, 3, padding=1, **options), SFGConv2d(12, 12, 3, padding=1, **options)

    def forward(self, x):
        return self.second(self.first(x)).merged(1)


def counted(net, x, backward=False):
    with FlopCounterMode(display=False) as counter:
        y = net(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops()


@NATIVE
@pytest.mark.parametrize("out", SPLITS, ids=str)
@pytest.mark.parametrize("into", SPLITS, ids=str)
def test_native_s_flops_are_those_that_are_not_skipped(into, out):
    """A kernel reads the channels of its own group and the shared ones; the image is read by all."""
    net, x = Net().eval(), torch.randn(2, 3, 8, 7)
    for layer, sizes in ((net.first, into), (net.second, out)):
        layer.assign(torch.repeat_interleave(torch.tensor(sizes)))
    pairs = 3 * 12 + out[0] * into[0] + sum(o * (i + into[0]) for o, i in zip(out[1:], into[1:], strict=True))
    with backend("native"):
        assert counted(net, x) == 2 * 9 * 2 * 8 * 7 * pairs
        step = counted(net, x.requires_grad_(), backward=True)
    assert step == 3 * 2 * 9 * 2 * 8 * 7 * pairs  # both gradients cost as much again


@NATIVE
@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_straight_through_step_is_counted(norm):
    """More than without the gates' gradient, at most three plain convolutions, as those of `masked` (which torch itself
    counts), and the same numbers as when nobody looks on."""
    torch.manual_seed(0)
    net, x = Net(activation="relu", norm=norm, init=[0.4, 0.3, 0.3]), torch.randn(2, 3, 8, 7)
    flops, gradients = {}, []
    for kind in ("masked", "native"):
        with backend(kind):
            torch.manual_seed(1)
            net.zero_grad()
            flops[kind] = counted(net, x, backward=True)
            gradients.append([p.grad.clone() for p in net.parameters()])
    with backend("native"):
        torch.manual_seed(1)
        net.zero_grad()
        net(x).sum().backward()
    for seen, unseen in zip(gradients[1], [p.grad for p in net.parameters()], strict=True):
        torch.testing.assert_close(seen, unseen, rtol=1e-3, atol=1e-4)
    plain = 2 * 9 * 2 * 8 * 7 * (3 + 12) * 12
    assert plain < flops["native"] <= 3 * plain
    assert flops["native"] <= flops["masked"]


def test_frozen_networks_are_counted():
    net, x = Net().eval(), torch.randn(1, 3, 8, 8)
    for layer in (net.first, net.second):
        layer.assign([0, 1, 2] * 4)
    with torch.no_grad():
        assert counted(freeze(net, tasks=["task1"], example=x), x) > 0


# --- what can't be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masked", "native"])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_second_derivatives_are_refused(kind, norm):
    """Also where torch would leave them out: a gradient penalty must not silently be none."""
    if not available(kind):
        pytest.skip("no C++ kernels here")
    net, x = Net(norm=norm), torch.randn(2, 3, 8, 8)
    with backend(kind):
        y = net(x)
        (gradient,) = torch.autograd.grad(y.sum(), net.first.weight, create_graph=True)  # of a constant, one
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"can't be differentiated once more.*backend\('reference'\)"):
            (y.square().mean() + gradient.square().sum()).backward()
    with backend("reference"):
        (gradient,) = torch.autograd.grad(net(x).square().sum(), net.first.weight, create_graph=True)
        gradient.square().sum().backward()
    assert net.second.weight.grad.abs().sum() > 0


def functional(net, x):
    return torch.func.functional_call(net, {"first.weight": net.first.weight * 1}, (x,)).sum()


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda net, x: torch.jit.trace(net, x), RuntimeError, "can't be traced, expected torch.compile, or sfg"),
        (lambda net, x: torch.fx.symbolic_trace(net), TypeError, "can't be traced by torch.fx, expected torch.export"),
        (lambda net, x: torch.func.vmap(lambda i: net(i[None]))(x), RuntimeError, r"don't know torch.func \(vmap"),
        (lambda net, x: torch.func.grad(lambda i: net(i).sum())(x), RuntimeError, r"don't know torch.func \(vmap"),
        (lambda net, x: torch.func.jvp(net, (x,), (x,)), RuntimeError, r"don't know torch.func \(vmap"),
        (lambda net, x: net(x.to(torch.complex64)), ValueError, "the input is torch.complex64, expected real numbers"),
        (lambda net, x: net(x[0]), ValueError, r"shape \(3, 8, 8\), expected \[N, 3, H, W\]; of one image: x\[None\]"),
        (lambda net, x: net(x[0, 0]), ValueError, r"shape \(8, 8\), expected \[N, 3, H, W\]$"),
    ],
)  # fmt: skip
def test_what_a_layer_can_not_do_is_one_sentence(call, error, said):
    with pytest.raises(error, match=said):
        call(Net(), torch.randn(2, 3, 8, 8))


def test_functional_calls_are_no_transforms():
    net, x = Net(), torch.randn(2, 3, 8, 8)
    torch.manual_seed(0)
    expected = net(x).sum()
    torch.manual_seed(0)
    torch.testing.assert_close(functional(net, x), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"activation": nn.ReLU}, r"activation is the class ReLU, expected an instance: ReLU\(\)"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64: expected one of real"),
        ({"dtype": torch.int32}, "dtype=torch.int32: expected one of real"),
    ],
)
def test_what_a_layer_can_not_be_is_one_sentence(options, said):
    with pytest.raises(ValueError, match=said):
        SFGConv2d(3, 6, 3, **options)
