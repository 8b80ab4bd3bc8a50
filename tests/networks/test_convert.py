"""Existing networks with SFG layers: the same numbers with everything shared, learnable and fast paths alike."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfg_fast import SFGConv2d, assign, backend, convert, freeze, recalibrate
from sfg_fast.backends import available
from sfg_fast.layers.feature_norm import FeatureNorm
from sfg_fast.networks.controls import sfg_layers

TASKS = ("ct", "organs")


def vgg():
    """As torchvision writes it."""
    layers = []
    for size, following in ((4, "M"), (6, None), (6, "M")):
        layers += [nn.LazyConv2d(size, 3, padding=1), nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2, 2)] if following else []

    class VGG(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((2, 2))
            self.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3))

        def forward(self, x):
            return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    net = VGG()
    net(torch.zeros(2, 1, 16, 16))
    return net


class BasicBlock(nn.Module):
    """As torchvision writes it: one ReLU for two places, `out += identity`."""

    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride > 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def resnet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), BasicBlock(4, 4, 1), BasicBlock(4, 6, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def highresnet():
    from monai.networks.nets import HighResNet

    layers = (
        {"name": "conv_0", "n_features": 4, "kernel_size": 3},
        {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 2},
        {"name": "res_2", "n_features": 7, "kernels": (3, 3), "repeat": 2},
        {"name": "conv_1", "n_features": 5, "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    )
    return HighResNet(2, 1, 3, layer_params=layers)


def unet():
    from monai.networks.nets import BasicUNet

    return BasicUNet(2, 1, 3, features=(4, 4, 6, 6, 8, 4), norm=("batch", {}), upsample="nontrainable")


class Functional(nn.Module):
    """Functions where others have modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        h = F.leaky_relu(self.bn(self.a(x)), 0.1)
        h = F.relu(self.b(F.avg_pool2d(h, 2)))
        return torch.sigmoid(self.c(F.interpolate(h, scale_factor=2)))


NETWORKS = {"vgg": vgg, "resnet": resnet, "highresnet": highresnet, "unet": unet, "functional": Functional}
SIZE = {"unet": 64}


def pretrained(name, seed=0):
    """A network with running statistics and affine parameters that are its own."""
    torch.manual_seed(seed)
    net = NETWORKS[name]().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    for _ in range(3):
        net(image(name))
    return net


def image(name):
    return torch.randn(2, 1, SIZE.get(name, 16), SIZE.get(name, 16), dtype=torch.float64)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_all_shared_gives_the_network_s_own_numbers(name, train):
    """Outputs and gradients, in eval with the pretrained statistics, in training with the batch's."""
    net = pretrained(name).train(train)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    converted = convert(net, TASKS, example=image(name))
    assert converted.training is train
    assign(converted, {key: [0] * layer.out_channels for key, layer in sfg_layers(converted).items()})
    x = image(name)
    expected, found = net(x), converted(x)
    assert list(found) == list(TASKS)
    for y in found.values():
        torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)
    dy = torch.randn_like(expected)
    net.zero_grad()
    (expected * dy).sum().backward()
    (found["ct"] * dy).sum().backward()
    theirs = dict(net.named_parameters())
    checked = 0
    for key, parameter in converted.named_parameters():
        if key in theirs and theirs[key].grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-6, atol=1e-8)
            checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", NETWORKS)
def test_draws_as_by_dense_masking(name):
    """Outputs and all gradients of a training step, fast path and reference."""
    converted = convert(pretrained(name), TASKS, example=image(name)).train()
    for module in converted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = image(name)
    results = []
    for kind in ["reference", "masked"] + ["native"] * available("native"):
        net = copy.deepcopy(converted)
        torch.manual_seed(5)
        with backend(kind), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a ReLU behind a sum
            y = net(x)
            sum((t + 1) * y[task].sin().sum() for t, task in enumerate(TASKS)).backward()
        results.append([*y.values(), *(p.grad for p in net.parameters()), *net.buffers()])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen(name):
    net = convert(pretrained(name), TASKS, example=image(name), init="dirichlet")
    recalibrate(net, [image(name) for _ in range(2)])
    net.eval()
    x = image(name)
    with torch.no_grad():
        frozen = freeze(net, example=x)
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-8, atol=1e-8)
        alone = freeze(net, tasks=["organs"], example=x)
        torch.testing.assert_close(alone(x), {"organs": net(x)["organs"]}, rtol=1e-8, atol=1e-8)
    assert not any(isinstance(module, SFGConv2d | FeatureNorm) for module in frozen.modules())
    assert sum(p.numel() for p in alone.parameters()) < sum(p.numel() for p in frozen.parameters())


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_copies_states_and_compiled_graphs(name):
    net = convert(pretrained(name), TASKS, example=image(name))
    x = image(name)
    other = convert(pretrained(name, seed=1), TASKS, example=x)
    other.load_state_dict(net.state_dict())
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other]
    expected = net.eval()(x)
    for one in copies:
        torch.testing.assert_close(one.eval()(x), expected)
    net.train()
    torch._dynamo.reset()
    compiled = torch.compile(copies[0].train(), fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in (*net.modules(), *copies[0].modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        results = []
        for call in (net, compiled):
            torch.manual_seed(5)
            results.append(call(x))
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-8)


def test_shortcuts_share_one_grouping():
    net = convert(resnet(), TASKS, example=torch.zeros(1, 1, 16, 16))
    shared = {name for name, module in net.named_modules() if getattr(module, "shares_grouping", False)}
    assert shared == {"3.conv2", "4.conv2"}
    assert len(sfg_layers(net)) == 4


def test_what_follows_a_convolution_goes_before_its_gate():
    net = convert(Functional(), TASKS, example=torch.zeros(1, 1, 16, 16))
    assert net.a.norm is not None
    assert net.a.activation(torch.tensor(-1.0)) == pytest.approx(-0.1)
    assert net.b.activation == "relu"
    assert {name for name, _ in net.c.named_children()} == set(TASKS)


def test_pooling_behind_a_relu_goes_before_the_gate():
    net = convert(vgg(), TASKS, example=torch.zeros(1, 1, 16, 16))
    layers = list(sfg_layers(net).values())
    assert [layer.activation for layer in layers] == ["relu_pool", "relu", "relu_pool"]
    assert not any(isinstance(module, nn.MaxPool2d) for module in net.modules())


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2)]
)
def test_other_pooling_stays(pool):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 1, 1))
    net = convert(plain, TASKS, example=torch.zeros(1, 1, 16, 16))
    assert [layer.activation for layer in sfg_layers(net).values()] == ["relu"]
    assert any(type(module) is type(pool) for module in net.modules())


def test_heads_of_other_sizes_start_anew():
    net = convert(vgg(), {"ct": 3, "organs": 7}, example=torch.zeros(1, 1, 16, 16))
    y = net(torch.zeros(4, 1, 16, 16))
    assert {task: tuple(value.shape) for task, value in y.items()} == {"ct": (4, 3), "organs": (4, 7)}


def test_skipped_layers_stay_plain():
    net = convert(resnet(), TASKS, skip=["0", "3"], example=torch.zeros(1, 1, 16, 16))
    assert type(net.get_submodule("0")) is type(net.get_submodule("3.conv2")) is nn.Conv2d
    assert list(net(torch.zeros(2, 1, 16, 16))) == list(TASKS)


def test_the_module_is_left_alone():
    net = pretrained("resnet").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    convert(net, TASKS, example=image("resnet"))
    assert net.training
    assert not any(isinstance(module, SFGConv2d) for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Broken(nn.Module):
    def __init__(self, middle, forward=None):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 4, 3, padding=1), middle, nn.Conv2d(4, 2, 1)
        self.call = forward

    def forward(self, x):
        h = self.first(x)
        return self.call(self, h, x) if self.call else self.last(self.middle(h))


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.Linear(3, 3), {}, "the module has no nn.Conv2d"),
        (Broken(nn.GroupNorm(2, 4)), {}, "'middle' is GroupNorm, which would give values.*expected nn.BatchNorm2d"),
        (Broken(nn.InstanceNorm2d(4)), {}, "'middle' is InstanceNorm2d"),
        (Broken(nn.Conv2d(4, 4, 1, groups=2)), {}, "'middle' is a convolution of 2 groups, expected 1"),
        (Broken(nn.ConvTranspose2d(4, 4, 2)), {}, r"'middle' \(ConvTranspose2d\) reads features of SFG layers"),
        (Broken(nn.Conv2d(4, 4, 1)), {"skip": ["middle"]}, r"'middle' \(Conv2d\) reads features.*stands before"),
        (Broken(None, lambda m, h, x: m.last(h + x)), {}, "adds features of SFG layers and something else"),
        (Broken(None, lambda m, h, x: m.last(torch.cat([h, x], 1)[:, :4])), {}, "concatenated with something else"),
        (Broken(None, lambda m, h, x: (h, x)), {}, "returns tuple, expected one tensor"),
        (Broken(nn.Identity()), {"skip": ["nowhere"]}, "skip: there is no module 'nowhere'"),
        (Broken(nn.Conv2d(4, 4, 1), lambda m, h, x: m.last(m.middle(m.middle(h)))), {}, "'middle' is used more than"),
        (Broken(nn.Identity()), {"skip": ["first", "last"]}, "nothing is left to be an SFG layer"),
        (Broken(nn.PReLU(4)), {}, "'middle': prelu is not known to act on each channel alone"),
        (Broken(nn.ConstantPad2d(1, 2.0)), {}, r"'middle': pad\(value=2.0\) would give values to"),
        (Broken(nn.Softmax(1)), {}, "'middle': softmax would give values to"),
        (Broken(nn.BatchNorm2d(4, track_running_stats=False)), {}, "no running statistics"),
        (Broken(nn.BatchNorm2d(4, momentum=0.0)), {}, r"momentum=0, expected it in eval\(\)"),
    ],
)  # fmt: skip
def test_what_can_not_be_converted_is_named(module, options, said):
    with pytest.raises(ValueError, match=said):
        convert(module, TASKS, **options)


class Partly(nn.Module):
    """A stem that somebody has frozen, and dropout as a function."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.conv, self.last = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.last(F.dropout(self.conv(self.bn(self.stem(x))).relu(), 0.5, self.training))


@pytest.mark.parametrize("skip", [["stem", "bn"], []], ids=["skipped", ""])
def test_what_was_frozen_stays_frozen_and_dropout_drops(skip):
    module = Partly().train()
    module.bn.eval().requires_grad_(False)
    net = convert(module, TASKS, skip=skip)
    norm = net.bn if skip else net.stem.norm
    assert net.training
    assert net.conv.training
    assert not norm.training
    assert not norm.weight.requires_grad
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    x = torch.randn(2, 1, 9, 9)
    net.conv.assign([0] * 8)
    if not skip:
        net.stem.assign([0] * 8)
    assert not torch.equal(net(x)["ct"], net(x)["ct"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    net.eval()
    assert torch.equal(net(x)["ct"], net(x)["ct"])


def test_a_dropout_takes_no_other_module_s_name():
    class Two(Partly):
        def __init__(self):
            super().__init__()
            self.dropout_0 = nn.Dropout(0.9)

        def forward(self, x):
            return super().forward(self.dropout_0(x))

    net = convert(Two(), TASKS)
    assert net.dropout_0.p == 0.9
    assert sorted(m.p for m in net.modules() if isinstance(m, nn.Dropout)) == [0.5, 0.9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(dtype):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 1, 1)).to(dtype)
    with backend("masked"):
        assert convert(net, TASKS)(torch.randn(1, 1, 9, 9, dtype=dtype))["ct"].dtype == dtype


def test_concatenated_relaxed_features_keep_their_draw():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.c = (
                nn.Conv2d(1, 4, 1),
                nn.Conv2d(4, 4, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 1, 1),
            )

        def forward(self, x):
            x = self.a(x)
            return self.c(torch.tanh(self.bn(torch.cat([x, self.b(x)], 1))))

    torch.manual_seed(0)
    net, x, found = convert(Dense(), ["p"], estimator="gumbel_softmax"), torch.randn(2, 1, 9, 9), []
    for name in ("reference", "auto"):
        torch.manual_seed(1)
        net.zero_grad()
        with backend(name):
            y = net(x)["p"]
        y.square().sum().backward()
        found.append([y, *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_text_is_no_list_of_tasks():
    with pytest.raises(ValueError, match="tasks='ct' is one text"):
        convert(Broken(nn.Identity()), "ct")


@pytest.mark.parametrize("tasks", [["ct", "organs"], {"ct": 2, "organs": 2}, {"ct": 1, "organs": 6}], ids=str)
@pytest.mark.parametrize("example", [None, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)], ids=["", "zeros", "ones"])
def test_what_is_other_on_another_image_is_refused(tasks, example):
    """`.item()` is a number in the recorded graph. Whatever sizes the heads get, the network in front of them is
    compared, and on more than one image."""
    torch.manual_seed(0)
    module = Broken(None, lambda m, h, x: m.last(h * x.mean().item()))
    with pytest.raises(ValueError, match="with all kernels shared the outputs differ from the module's"):
        convert(module, tasks, example=example)
