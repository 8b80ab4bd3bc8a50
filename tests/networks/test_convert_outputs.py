"""Networks that return several tensors, converted: deep supervision, auxiliary outputs, features of every stage."""

import collections
import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sfg_fast import assign, backend, convert, freeze, predict, sampling
from sfg_fast.networks.controls import sfg_layers

Outputs = collections.namedtuple("Outputs", ["logits", "aux"])


class Deep(nn.Module):
    """Two scales, each with a head; `put` says how they are returned."""

    def __init__(self, put):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.norm, self.last, self.side = nn.BatchNorm2d(6), nn.Conv2d(8, 3, 1), nn.Conv2d(6, 3, 1)
        self.edges, self.put = nn.Conv2d(6, 2, 1), put

    def forward(self, x):
        h = self.norm(self.a(x)).relu()
        deep = self.b(F.avg_pool2d(h, 2)).relu()
        return self.put(self, self.last(deep), self.side(h), self.edges(h), h, deep)


PUT = {
    "list": lambda m, y, side, edges, h, deep: [y, side, edges],
    "dict": lambda m, y, side, edges, h, deep: {"out": y, "aux": side, "edges": [edges, None]},
    "nested": lambda m, y, side, edges, h, deep: ({"main": [y.tanh(), (side,)]}, None, edges),
    "named": lambda m, y, side, edges, h, deep: Outputs(y, side),
    "ordered": lambda m, y, side, edges, h, deep: collections.OrderedDict(out=y, aux=side),
}


def deep(put, seed=0):
    torch.manual_seed(seed)
    net = Deep(put).double()
    nn.init.normal_(net.norm.weight, 1, 0.2)
    net(torch.randn(4, 1, 12, 16, dtype=torch.float64))
    return net


def images(*shape):
    torch.manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64)


def mixed(net, groups, seed=1):
    torch.manual_seed(seed)
    assign(net, {name: torch.randint(groups, (layer.out_channels,)) for name, layer in sfg_layers(net).items()})


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("put", PUT)
def test_all_shared_every_tensor_is_the_module_s_own(put, train):
    net, x = deep(PUT[put]).train(train), images(2, 1, 14, 18)
    converted = convert(net, ["ct", "organs"])
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})
    expected, found = net(x), converted(x)
    for y in found.values():
        assert not isinstance(y, tuple) or type(y) is type(expected)
        torch.testing.assert_close(y, dict(expected) if isinstance(expected, dict) else expected)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_every_head_reads_what_its_task_reads(tasks, float64):
    """A mixed assignment against masks written out, with all gradients."""
    names = ["p", "q", "r"][:tasks]
    net, x = deep(PUT["dict"]), images(2, 1, 8, 12)
    converted = convert(net, names).eval()
    mixed(converted, tasks + 1)
    found = converted(x)
    groups = {name: layer.fixed_assignment for name, layer in sfg_layers(converted).items()}
    a, b = converted.a, converted.b
    h = F.batch_norm(F.conv2d(x, a.weight, a.bias, padding=1), net.norm.running_mean, net.norm.running_var,
                     a.norm.weight, a.norm.bias, False, 0.0, net.norm.eps).relu()  # fmt: skip
    h = [h * (groups["a"] == g)[:, None, None] for g in range(tasks + 1)]
    pooled = [F.avg_pool2d(one, 2) for one in h]
    read = [pooled[0], *(one + pooled[0] for one in pooled[1:])]
    deeper = [
        F.conv2d(one, b.weight, b.bias, padding=1).relu() * (groups["b"] == g)[:, None, None]
        for g, one in enumerate(read)
    ]
    expected = {}
    for g, name in enumerate(names, 1):
        of_h, of_deeper = h[g] + h[0], deeper[g] + deeper[0]
        heads = [converted.get_submodule(f"{head}.{name}") for head in ("last", "side", "edges")]
        y, side, edges = (
            F.conv2d(one, head.weight, head.bias) for one, head in zip((of_deeper, of_h, of_h), heads, strict=True)
        )
        expected[name] = {"out": y, "aux": side, "edges": [edges, None]}
    torch.testing.assert_close(found, expected)

    def total(y):
        return sum((n + 1) * leaf.sin().sum() for n, leaf in enumerate(pytree.tree_leaves(y)) if leaf is not None)

    parameters = [p for name, p in converted.named_parameters() if p.requires_grad and "logits" not in name]
    given = torch.autograd.grad(total(found), parameters)
    wanted = torch.autograd.grad(total(expected), parameters)
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("put", PUT)
def test_draws_as_by_dense_masking_frozen_compiled_and_exported(put):
    converted, x = convert(deep(PUT[put]), ["ct", "organs"], init="dirichlet"), images(2, 1, 16, 16)
    results = []
    for kind in ("reference", "auto"):
        torch.manual_seed(5)
        net = copy.deepcopy(converted).train()
        with backend(kind):
            y = net(x)
        sum(leaf.sin().sum() for leaf in pytree.tree_leaves(y) if leaf is not None).backward()
        results.append((y, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(results[1], results[0])
    converted.eval()
    mixed(converted, 3)
    with torch.no_grad():
        expected = converted(x)
        torch.testing.assert_close(freeze(converted, example=x)(x), expected)
        alone = freeze(converted, tasks=["organs"], example=x)
        torch.testing.assert_close(alone(x), {"organs": expected["organs"]})
        exported = torch.export.export(alone, (x,)).module()
        torch.testing.assert_close(exported(x), {"organs": expected["organs"]})
        torch._dynamo.reset()
        compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)


def test_predictions_have_the_form_of_the_output():
    converted, x = convert(deep(PUT["dict"]), ["ct", "organs"], init=[0.4, 0.3, 0.3]), images(1, 1, 8, 8)
    converted.eval()
    torch.manual_seed(1)
    mean, variance = predict(converted, x, draws=3)["ct"]
    assert mean["edges"][1] is None
    torch.manual_seed(1)
    with torch.no_grad(), sampling(converted):
        drawn = [converted(x)["ct"] for _ in range(3)]
    edges = torch.stack([y["edges"][0] for y in drawn])
    torch.testing.assert_close(mean["edges"][0], edges.mean(0))
    torch.testing.assert_close(variance["edges"][0], edges.var(0, correction=0))
    assert edges.var(0).max() > 0


def test_a_size_is_that_of_all_outputs_as_wide_as_the_first():
    converted = convert(deep(PUT["dict"]), {"ct": 1, "organs": 5})
    y = converted(images(2, 1, 8, 8))
    for task, size in (("ct", 1), ("organs", 5)):
        assert (y[task]["out"].shape[1], y[task]["aux"].shape[1], y[task]["edges"][0].shape[1]) == (size, size, 2)


def test_features_among_the_outputs_are_what_the_task_reads():
    """As an encoder gives the features of its stages."""
    stages = deep(lambda m, y, side, edges, h, deep: [h, y])
    converted, report = convert(stages, ["ct", "organs"], report=True)
    assert [row.becomes for row in report if row.name in "ab"] == ["SFG layer"] * 2
    mixed(converted.eval(), 3)
    x = images(2, 1, 8, 8)
    features = converted.a(x)
    for task, (h, _) in converted(x).items():
        torch.testing.assert_close(h, features.dense(task) + features.dense("shared"))
    torch.testing.assert_close(freeze(converted)(x), converted(x))
    with pytest.raises(ValueError, match=r"outputs \(1, 6, 64, 64\), expected 4 channels: .* the module returns feat"):
        convert(stages, {"ct": 4})


@pytest.mark.parametrize(
    "put",
    [
        lambda m, y, side, edges, h, deep: [y, side] if m.training else y,
        lambda m, y, side, edges, h, deep: Outputs(y, side) if m.training else y,
        lambda m, y, side, edges, h, deep: {"out": y, "aux": side} if m.training else {"out": y},
    ],
)
def test_outputs_that_the_mode_decides_are_refused_with_advice(put):
    with pytest.raises(ValueError, match=r"in train\(\) and .* in eval\(\), .*deep_supervision=False, aux_logits=Fal"):
        convert(deep(put), ["ct"])


class Auxiliary(Deep):
    """As torchvision's segmentation networks: a backbone whose features lie in a dict, interpolated to the image."""

    def forward(self, x):
        size, found = x.shape[-2:], collections.OrderedDict()
        h = self.norm(self.a(x)).relu()
        features = {"aux": h, "out": self.b(F.avg_pool2d(h, 2)).relu()}
        found["out"] = F.interpolate(self.last(features["out"]), size=size, mode="bilinear", align_corners=False)
        found["aux"] = F.interpolate(self.side(features["aux"]), size=size, mode="bilinear", align_corners=False)
        return found


def test_an_auxiliary_output_follows_the_image_s_size():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        converted, report = convert(Auxiliary(None), {"ct": 2, "organs": 3}, report=True)
    assert report.coverage == (4, 5)  # nobody reads the edges
    y = converted.eval()(torch.randn(3, 1, 34, 50))["ct"]
    assert {name: tuple(one.shape) for name, one in y.items()} == {"out": (3, 2, 34, 50), "aux": (3, 2, 34, 50)}
