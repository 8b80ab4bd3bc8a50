"""torch.compile(fullgraph=True) of layers and whole networks: the same numbers as in eager mode, and one graph for all
draws."""

import pytest
import torch
import torch._inductor.config
from torch import nn

from sfg_fast import (
    SFGVGG,
    SFGConv2d,
    SFGConv3d,
    SFGConvTranspose2d,
    SFGConvTranspose3d,
    SFGHighResNet,
    SFGUNet,
    backend,
    penalties,
    sampling,
    set_estimator,
)
from sfg_fast.backends import available
from tests.backends import EVERY, FAST
from tests.oracle import assert_close

TASKS = {"ct": 1, "organs": 2}


class Chain(nn.Module):
    def __init__(self, estimator, activation="relu"):
        super().__init__()
        options = {"tasks": tuple(TASKS), "norm": "batch", "activation": activation, "estimator": estimator}
        self.layers = nn.Sequential(SFGConv2d(1, 5, 3, **options), nn.AvgPool2d(2), SFGConv2d(5, 4, 3, **options))

    def forward(self, x):
        y = self.layers(x)
        return {task: y.merged(task) for task in TASKS}


def train_step(net, call, x, seed):
    """Outputs, gradients and running statistics of a training step."""
    net.zero_grad()
    torch.manual_seed(seed)
    y = call(x)
    (sum(t.sin().sum() for t in y.values()) + penalties(net)[1]).backward()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return y, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}, state


def check(make, name, size, steps=3, compiler="aot_eager"):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = make()
    torch.manual_seed(0)
    net = make()
    compiled = torch.compile(net, fullgraph=True, backend=compiler)
    x = torch.randn(2, 1, *size)
    with backend(name):
        for seed in range(steps):
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):  # another draw, the same graph
                found = train_step(net, compiled, x, seed)
            expected = train_step(eager, eager, x, seed)
            for a, b in zip(found, expected, strict=True):
                assert a.keys() == b.keys()
                for key in b:
                    assert_close(a[key], b[key], what=key)
        net.eval()
        eager.eval()
        with torch.no_grad():
            results = []
            for call in (compiled, eager):
                torch.manual_seed(9)  # a constant p is drawn here, too
                results.append(call(x))
            for task in TASKS:
                assert_close(results[0][task], results[1][task], what=f"eval, {task}")


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "selected", "none"])
@pytest.mark.parametrize("name", ["reference", *FAST])
def test_layers(name, estimator, float64):
    check(lambda: Chain(estimator), name, (11, 12))


class Volumes(nn.Module):
    def __init__(self, estimator):
        super().__init__()
        options = {"tasks": tuple(TASKS), "activation": "leaky_relu", "estimator": estimator}
        first = SFGConv3d(1, 4, (3, 2, 1), norm="batch", **options)
        middle = SFGConvTranspose3d(4, 4, 2, (2, 1, 2), norm="instance", **options)
        self.layers = nn.Sequential(first, middle, nn.AvgPool3d(2), SFGConv3d(4, 3, 2, padding=(0, 1, 0), **options))

    def forward(self, x):
        y = self.layers(x)
        return {task: y.merged(task) for task in TASKS}


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "none"])
@pytest.mark.parametrize("name", ["reference", "masked", "auto"])
def test_layers_of_volumes(name, estimator, float64):
    check(lambda: Volumes(estimator), name, (5, 4, 3), steps=2)


@pytest.mark.skipif(not available("triton"), reason="Triton is not installed")
@pytest.mark.parametrize(
    "estimator",
    [
        "straight_through",
        pytest.param("gumbel_softmax", marks=pytest.mark.slow),  # its operators on Triton: test_operators.py, relaxed
        pytest.param("selected", marks=pytest.mark.slow),  # what differs are gates, and these don't know the backend
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_layers_on_triton(estimator, float64):
    check(lambda: Chain(estimator), "triton", (9, 10), steps=2)


@pytest.mark.parametrize("name", EVERY)
def test_features_that_leave_the_graph(name, float64):
    """A layer compiled alone: what is done to its features outside reaches weights and logits."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    conv, x, found = SFGConv2d(1, 4, 3, activation="relu"), torch.randn(1, 1, 8, 8), []
    with backend(name):
        for call in (conv, torch.compile(conv, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(1)
            conv.zero_grad()
            call(x).merged(1).square().sum().backward()
            found.append((conv.weight.grad.clone(), conv.logits.grad.clone()))
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


class OtherLayers(nn.Module):
    """A transposed layer and one of another kind behind a layer with the norm of each image."""

    def __init__(self, kind):
        super().__init__()
        options = {"tasks": tuple(TASKS), "activation": "leaky_relu"}
        norm = ("group", {"num_groups": 3}) if kind == "group" else kind if kind in ("instance", "layer") else "batch"
        groups = {"depthwise": 6, "grouped": 2}.get(kind, 1)
        options |= {"bias": False}  # behind it the norm takes away what a bias adds
        self.first = SFGConv2d(1, 6, 3, norm=norm, **options)
        self.second = SFGConv2d(6, 6, 3, padding=1, norm=norm, groups=groups, **options)
        self.up = SFGConvTranspose2d(6, 4, 3, 2, norm=norm if kind == "instance" else None, **options)
        self.depthwise = kind == "depthwise"

    def forward(self, x):
        y = self.first(x)
        y = self.up(self.second(y, y.groups if self.depthwise else None))
        return {task: y.merged(task) for task in TASKS}


@pytest.mark.parametrize("kind", ["instance", "group", "layer", "grouped", "depthwise"])
@pytest.mark.parametrize("name", FAST)
def test_layers_of_every_kind(name, kind, float64):
    check(lambda: OtherLayers(kind), name, (9, 8), steps=2)


def test_every_second_step_takes_two_graphs():
    torch._dynamo.reset()
    conv = SFGConv2d(1, 4, 3)
    set_estimator(conv, "straight_through", every=2)
    compiled = torch.compile(conv, fullgraph=True, backend="eager")
    for step in range(8):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            compiled(torch.zeros(1, 1, 8, 8)).packed.sum().backward()


def test_reinmax(float64):
    check(lambda: Chain("reinmax"), "auto", (11, 12))


def test_gumbel_rao():
    """Its inner samples only serve the gradient, so a graph draws them in the backward pass: other numbers than in
    eager mode, of the same distribution."""
    torch._dynamo.reset()
    net = Chain("gumbel_rao")
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    _, gradients, _ = train_step(net, compiled, torch.randn(2, 1, 11, 12), 0)
    assert gradients["layers.0.logits"].abs().max() > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", FAST)
def test_activation_that_the_kernels_do_not_know(name, float64):
    check(lambda: Chain("straight_through", torch.tanh), name, (11, 12))


@pytest.mark.parametrize("residual", ["routed", "separate"])
def test_highresnet(residual, float64):
    check(lambda: SFGHighResNet(1, TASKS, [3, 4, 4], 1, residual), "auto", (12, 10), steps=2)


def test_vgg(float64):
    check(lambda: SFGVGG(1, TASKS, 2), "auto", (32, 32), steps=2)


@pytest.mark.parametrize("options", [{}, {"residual": True, "down": "pooled"}])
def test_unet(options, float64):
    check(lambda: SFGUNet(1, TASKS, 2, stages=3, blocks=1, **options), "auto", (13, 10), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_inductor(name, float64):
    """Its random numbers are its own unless it is told otherwise; only then can draws be compared."""
    with torch._inductor.config.patch(fallback_random=True):
        check(lambda: Chain("straight_through"), name, (11, 12), compiler="inductor")


def test_drawn_predictions_of_a_compiled_network():
    net = Chain("straight_through").eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 1, 11, 12)
    with torch.no_grad(), sampling(net):
        for seed in range(4):
            torch.manual_seed(seed)
            found = compiled(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(found, net(x))
