"""The frozen network against the one it was made of: equal outputs, plain modules only, nothing that is not used."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sfg_fast import SFGVGG, SFGConv2d, SFGHighResNet, backend, freeze, recalibrate
from sfg_fast.backends import available
from sfg_fast.layers.streams import Heads
from sfg_fast.networks.controls import map_assignment, sfg_layers
from sfg_fast.networks.frozen import FrozenConv, FrozenHeads


class UNet(nn.Module):
    """A concatenation, pooling, an interpolation, and features read by plain code."""

    def __init__(self, outputs):
        super().__init__()
        options = {"tasks": tuple(outputs), "norm": "batch", "activation": "relu", "padding": 1}
        self.down, self.deep = SFGConv2d(1, 4, 3, **options), SFGConv2d(4, 5, 3, stride=2, **options)
        self.up = SFGConv2d(9, 4, 3, padding_mode="reflect", **options)
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, size, 1) for task, size in outputs.items()})

    def forward(self, x):
        h = self.down(x)
        deep = nn.functional.leaky_relu(nn.functional.interpolate(self.deep(h), scale_factor=2)) * 0.5
        h = self.up(torch.cat([h, deep], 1))
        return {task: head(h.merged(task)) for task, head in self.heads.items()}


NETWORKS = {
    "routed": lambda tasks, **o: SFGHighResNet(1, tasks, [4, 5, 6], 2, "routed", **o),
    "separate": lambda tasks, **o: SFGHighResNet(1, tasks, [4, 5, 6], 2, "separate", **o),
    "routed, no norm": lambda tasks: SFGHighResNet(1, tasks, [4, 5, 6], 1, "routed", norm=None),
    "separate, no norm": lambda tasks: SFGHighResNet(1, tasks, [4, 5, 6], 2, "separate", norm=None),
    "vgg": lambda tasks: SFGVGG(1, tasks, 3),
    "unet": UNet,
}
TASKS = {"two": {"ct": 1, "organs": 3}, "three": {"a": 1, "b": 2, "c": 3}, "one": {"ct": 1}}


def learnt(name, tasks="two", seed=0, **options):
    torch.manual_seed(seed)
    net = (name() if callable(name) else NETWORKS[name](TASKS[tasks], **options)).double()
    for layer in sfg_layers(net).values():
        layer.logits.data = 2 * torch.randn_like(layer.logits)
    recalibrate(net, [torch.randn(2, 1, 32, 32).double() for _ in range(2)])
    return net.eval()


def images(n=2, height=40, width=48):
    torch.manual_seed(9)
    return torch.randn(n, 1, height, width).double()


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_outputs_from_plain_modules(name, tasks):
    net, x = learnt(name, tasks), images()
    frozen = freeze(net)
    with torch.no_grad():
        expected, found = net(x), frozen(x)
    assert list(found) == list(expected)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-10, atol=1e-10)
    leaves = {type(module) for module in frozen.modules() if not list(module.children())}
    assert leaves <= {nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.Linear, nn.ModuleDict}, leaves
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.skipif(not available("native"), reason="native is not built")
@pytest.mark.parametrize(
    "wide", [lambda: SFGHighResNet(1, TASKS["two"], 16, 1, "routed"), lambda: SFGVGG(1, TASKS["two"], 16)]
)
def test_kernels_do_all_groups_of_a_layer_at_once(wide, monkeypatch):
    """One call a layer, where torch needs a convolution for each group; and where a group reads nothing, no shortcut is
    taken through the zeros that stand in for it."""
    from sfg_fast.kernels import cpu

    calls, forward = [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args, **options: calls.append(1) or forward(*args, **options))
    net, x = learnt(wide), images()
    frozen = freeze(net)
    calls.clear()
    with torch.no_grad():
        found = frozen(x)
        layers = sum(isinstance(module, FrozenConv | FrozenHeads) for module in frozen.modules())
        assert len(calls) == layers
        with backend("masked"):
            expected = frozen(x)
    assert len(calls) == layers
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-10, atol=1e-10)
    alone = {layer: torch.full((module.out_channels,), 1) for layer, module in sfg_layers(net).items()}
    with torch.no_grad():  # everything is the first task's
        bare = freeze(net, alone)
        found = bare(x)
        with backend("masked"):
            expected = bare(x)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_one_task_alone_has_no_filters_of_the_others(name):
    net, x = learnt(name, "two"), images()
    whole, alone = freeze(net), freeze(net, tasks=["organs"])
    with torch.no_grad():
        found = alone(x)
        torch.testing.assert_close(found, {"organs": net(x)["organs"]}, rtol=1e-10, atol=1e-10)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (net, whole, alone)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert not any("ct" in key for key, _ in alone.named_parameters())


@pytest.mark.parametrize("name", ["routed", "separate"])
@pytest.mark.parametrize("empty", ["shared", "ct", "all but shared", "all but ct"])
def test_empty_groups(name, empty):
    """Kernels that read nothing still have their bias, and a stream of constants has borders."""
    net, x = learnt(name, "two"), images()
    for layer in sfg_layers(net).values():
        kernels = torch.arange(layer.out_channels) % 3
        layer.assign({
            "shared": 1 + kernels % 2, "ct": 2 * (kernels % 2), "all but shared": 0 * kernels,
            "all but ct": 0 * kernels + 1,
        }[empty])  # fmt: skip
    recalibrate(net, [images(3, 32, 32)])
    with torch.no_grad():
        torch.testing.assert_close(freeze(net)(x), net(x), rtol=1e-9, atol=1e-9)


def test_kernels_that_nothing_depends_on_are_gone():
    """Task `ct` has kernels in the first layer only: its head reads the shared ones of the last."""
    net = nn.Sequential(*(SFGConv2d(c, 6, 3, tasks=("ct", "organs")) for c in (1, 6)), Heads(6, {"ct": 1, "organs": 1}))
    net[0].assign([0, 0, 1, 1, 2, 2])
    net[1].assign([0, 0, 0, 0, 2, 2])
    frozen = freeze(net.eval(), example=torch.zeros(1, 1, 9, 9))
    assert list(frozen[0].convolutions) == ["shared", "organs"]
    assert {name: conv.weight.shape for name, conv in frozen[1].convolutions.items()} == {
        "shared": (4, 2, 3, 3),
        "organs": (2, 4, 3, 3),
    }
    torch.testing.assert_close(frozen(images().float()), net(images().float()))


def test_a_given_assignment():
    net, x = learnt("routed", "two"), images()
    given = {name: groups.roll(1) for name, groups in map_assignment(net).items()}
    for name, layer in sfg_layers(net).items():
        layer.assign(given[name])
    recalibrate(net, [images(3, 32, 32)])
    expected = net(x)
    for layer in sfg_layers(net).values():
        layer.assign(None)
    torch.testing.assert_close(freeze(net, given)(x), expected, rtol=1e-10, atol=1e-10)


def test_the_model_is_left_alone():
    net = learnt("separate", "two").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    freeze(net)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["routed", "separate", "vgg"])
def test_export_and_onnxruntime(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = learnt(name, "two").float()
    frozen, x = freeze(net), images(3, 64, 56).float()
    with torch.no_grad():
        expected = net(x)
    batch, height, width = (torch.export.Dim(size) for size in ("n", "h", "w"))
    shapes = ({0: batch, 2: height, 3: width},) if name != "vgg" else ({0: batch},)
    example = torch.zeros(2, 1, 40, 48) if name != "vgg" else torch.zeros(2, 1, 64, 56)
    program = torch.export.export(frozen, (example,), dynamic_shapes=shapes)
    for task, y in program.module()(x).items():
        torch.testing.assert_close(y, expected[task], rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(program, (), str(tmp_path / "net.onnx"), dynamo=True, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for y, task in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
        np.testing.assert_allclose(y, expected[task].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ({"method": "constant_p"}, {}, "drawn from a constant p"),
        ({"init": "dirichlet"}, {"tasks": ["pet"]}, "'pet' is no task of the model, expected one of ct, organs"),
        ({}, {"assignment": {"nowhere": [0]}}, "'nowhere' is no SFG layer"),
        ({}, {"assignment": {"stages.0.sfg": [0, 0, 0, 0]}}, "no assignment for final.0, final.1, stages"),
    ],
)
def test_refusals(options, arguments, said):
    with pytest.raises(ValueError, match=said):
        freeze(NETWORKS["routed"](TASKS["two"], **options), **arguments)


def test_a_module_without_sfg_layers_is_refused():
    with pytest.raises(ValueError, match="no SFG layer"):
        freeze(nn.Linear(1, 1))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_layer_that_takes_another_s_draw(norm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"tasks": ("a", "b"), "padding": 1, "init": "dirichlet", "activation": "relu", "norm": norm}
            self.one, self.two = SFGConv2d(1, 6, 3, **options), SFGConv2d(6, 6, 3, **options)
            self.heads = Heads(6, {"a": 1, "b": 1})

        def forward(self, x):
            features = self.one(x)
            return self.heads(self.two(features, groups=features.groups))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 1, 8, 8)
    net(x)
    frozen = freeze(net.eval())
    assert not torch.equal(map_assignment(net)["one"], map_assignment(net)["two"])
    with torch.no_grad():
        for task, y in net(x).items():
            torch.testing.assert_close(frozen(x)[task], y, rtol=1e-5, atol=1e-5)


def test_indices_are_kept_but_not_those_of_fake_tensors():
    """A frozen network on a GPU copies nothing from the host in its second call."""
    from torch._subclasses import FakeTensorMode

    from sfg_fast.groups import indices

    rows, image = (2, 0, 1, 2), torch.empty(1, 3, 2, 2)
    with FakeTensorMode():
        assert type(indices(rows, torch.empty(1, 3, 2, 2))) is not torch.Tensor
    first = indices(rows, image)
    assert first.tolist() == list(rows)
    assert indices(rows, image) is first
