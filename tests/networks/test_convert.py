"""Existing networks with SFG layers: the same numbers with everything shared, learnable and fast paths alike."""

import copy
import math
import pickle
import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sfg_fast import SFGConv2d, assign, backend, convert, freeze, recalibrate
from sfg_fast.layers.feature_norm import FeatureNorm
from sfg_fast.networks.controls import sfg_layers
from tests.backends import FAST

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
    for kind in ["reference", *FAST]:
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
def test_copies_and_states(name):
    net = convert(pretrained(name), TASKS, example=image(name))
    x = image(name)
    other = convert(pretrained(name, seed=1), TASKS, example=x)
    other.load_state_dict(net.state_dict())
    expected = net.eval()(x)
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other):
        torch.testing.assert_close(one.eval()(x), expected)


@pytest.mark.parametrize("name", ["resnet", pytest.param("unet", marks=pytest.mark.slow)])
def test_compiled_graphs(name):
    net, x = convert(pretrained(name), TASKS, example=image(name)), image(name)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net).train(), fullgraph=True, backend="aot_eager")
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ReLU behind a sum
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
    with pytest.warns(UserWarning, match="relu behind a gate"):
        y = net(torch.zeros(2, 1, 16, 16))
    assert list(y) == list(TASKS)


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


def pooled(m, h, x):
    y, indices = m.middle(h) if m.middle else F.max_pool2d(h, 2, return_indices=True)
    return m.last(F.max_unpool2d(y, indices, 2))


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.Linear(3, 3), {}, "the module has no convolution that can be an SFG layer"),
        (Broken(nn.LocalResponseNorm(2)), {}, "'middle' is LocalResponseNorm, which .*expected a batch, instance"),
        (Broken(nn.InstanceNorm2d(4, track_running_stats=True)), {}, "is an instance normalisation with running"),
        (Broken(nn.Conv2d(4, 4, 1)), {"skip": ["middle"]}, r"'middle' \(Conv2d\) reads features.*stands before"),
        (Broken(None, lambda m, h, x: m.last(F.adaptive_avg_pool2d(h, 1) + x)), {}, "add.* something of another shape"),
        (Broken(None, lambda m, h, x: m.last(h + torch.cat(h.unbind(1)[:1])[:, None])), {}, "takes single channels"),
        (Broken(None, lambda m, h, x: m.last(h + h[:, 2].unsqueeze(1))), {}, r"takes single channels.*h\[:, 0:1"),
        (Broken(None, lambda m, h, x: m.last(h * h.tanh())), {}, "mul.* multiplies two features of SFG layers"),
        (Broken(None, lambda m, h, x: m.last(h + h[:, [1, 0, 2, 3]])), {}, "taken out of others, so their groupings"),
        (Broken(nn.MaxPool2d(2, return_indices=True), pooled), {}, "'middle' works with the indices of a max-pooling"),
        (Broken(None, lambda m, h, x: pooled(m, h, x)), {}, "works with the indices of a max-pooling"),
        (Broken(None, lambda m, h, x: (m.last(h), 1)), {}, "returns int, expected floating point tensors made of its"),
        (Broken(None, lambda m, h, x: [m.last(h).argmax(1)]), {}, "returns a tensor of torch.int64, expected floating"),
        (Broken(None, lambda m, h, x: [m.last(h), torch.ones(1)]), {}, "that is not made of its input, expected"),
        (Broken(None, lambda m, h, x: {}), {}, r"returns \{\}, expected tensors made of its input"),
        (Broken(nn.Identity()), {"skip": ["nowhere"]}, "skip: there is no module 'nowhere'"),
        (Broken(nn.Conv2d(4, 4, 1), lambda m, h, x: m.last(m.middle(m.middle(h)))), {}, "'middle' is used more than"),
        (Broken(nn.Identity()), {"skip": ["first", "last"]}, "nothing is left to be an SFG layer"),
        (Broken(nn.ConstantPad2d(1, 2.0)), {}, r"'middle': pad\(value=2.0\) would give values to"),
        (Broken(nn.Softmax(1)), {}, "'middle': softmax would give values to"),
        (Broken(nn.BatchNorm2d(4, track_running_stats=False)), {}, "without running statistics"),
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
    """`.item()` is a number in the recorded graph, and another one on another image."""
    torch.manual_seed(0)
    module = Broken(None, lambda m, h, x: m.last(h * x.mean().item()))
    with (
        pytest.warns(UserWarning, match="looks at the values of a tensor"),
        pytest.raises(ValueError, match=r"mul\(\) in the forward pass of the module is given .* on one image"),
    ):
        convert(module, tasks, example=example)


# --- the recording holds in both modes, for any batch and image size --------------------------------------------------


class Through(nn.Module):
    """Something done to features in the middle of five convolutions and a head."""

    def __init__(self, between, **parts):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.more = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
        self.last, self.between = nn.Conv2d(4, 2, 1), between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.more(self.between(self, self.first(x), x)))


def padded_to(y, like):
    """As U-Nets do it where a size was odd."""
    rows, columns = like.size()[2] - y.size()[2], like.size()[3] - y.size()[3]
    return F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


def cropped_to(y, like):
    *_, height, width = like.shape
    top, left = (y.shape[2] - height) // 2, (y.shape[3] - width) // 2
    return y[:, :, top : top + height, left : left + width]


def sevenths(m, h, x):
    return F.interpolate(h[:, :, 1:-1, 1:-1], size=(h.shape[2] + 2 * (x.size(3) // 7), math.ceil(h.size(3) / 2)))


HARMLESS = {
    "contiguous": lambda m, h, x: h.contiguous(),
    "memory format": lambda m, h, x: h.to(memory_format=torch.channels_last),
    "to": lambda m, h, x: h.to(torch.float32),
    "to the image's device": lambda m, h, x: h.to(x.device).to(x.dtype),
    "float": lambda m, h, x: h.double().float(),
    "clone": lambda m, h, x: h.clone(),
    "as_tensor": lambda m, h, x: torch.as_tensor(h),
    "* 2": lambda m, h, x: 2 * h * 2,
    "/ 2": lambda m, h, x: h / 2,
    "-h": lambda m, h, x: -h,
    "sum": lambda m, h, x: sum([h, h, h]),
    "a - b": lambda m, h, x: h - 0.5 * h.tanh(),
    "alpha": lambda m, h, x: torch.add(h, h.abs(), alpha=0.5),
    "in place": lambda m, h, x: h.clone().mul_(3).add_(h),
    "a parameter": lambda m, h, x: h * m.scale,
    "by its size": lambda m, h, x: h * (3 / h.shape[-1]),
    "by its number of values": lambda m, h, x: h * (3 / x[0].numel()) + h.nelement() / x.numel(),
    "padded to a size": lambda m, h, x: padded_to(F.interpolate(F.max_pool2d(h, 2), scale_factor=2), h) + h,
    "adaptive": lambda m, h, x: F.interpolate(
        F.adaptive_avg_pool2d(h, (h.shape[2] // 4, round(h.shape[3] * 0.5))), size=list(x.shape[2:])
    ),
    "by a ratio": lambda m, h, x: F.interpolate(
        (y := F.avg_pool2d(h, 2)), scale_factor=(h.shape[2] / y.shape[2], h.shape[3] / y.shape[3])
    ),
    "cropped to a size": lambda m, h, x: cropped_to(F.pad(h, (1, 2, 3, 4)), h),
    "view": lambda m, h, x: h.view(h.shape).reshape(h.size(0), -1, h.size(2), h.size(3)),
    "crop": lambda m, h, x: h[:, :, 1:-1, 2:],
    "sizes": sevenths,
    "checkpoint": lambda m, h, x: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_functions_that_treat_channels_alone_pass(what):
    """Equality with the module is checked by `convert` itself, and here once more on an odd size."""
    torch.manual_seed(0)
    net = Through(HARMLESS[what], scale=nn.Parameter(torch.tensor([0.7])))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        converted, report = convert(net, TASKS, report=True)
    assert report.coverage == (6, 6)
    assert len(sfg_layers(converted)) >= 1
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})
    x = torch.randn(3, 1, 35, 43)
    torch.testing.assert_close(converted(x)["organs"], net(x), rtol=1e-4, atol=1e-5)
    for layer in sfg_layers(converted).values():
        layer.assign(torch.arange(layer.out_channels) % 3)
    with warnings.catch_warnings(), backend("reference"):
        expected = converted(x)
    torch.testing.assert_close(converted(x)["ct"], expected["ct"], rtol=1e-4, atol=1e-5)


def test_detached_features_have_no_gradient():
    net = convert(Through(lambda m, h, x: h.detach()), TASKS).train()
    sum(y.sum() for y in net(torch.randn(2, 1, 9, 9)).values()).backward()
    assert net.first.weight.grad is None
    assert net.more.get_submodule("0").weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("between", "said"),
    [
        (lambda m, h, x: h if m.training else h * 2, r"the module does something else in train\(\) than in eval\(\)"),
        (lambda m, h, x: h * (1 + m.training * torch.rand(h.shape[0], 1, 1, 1)), r"module draws random numbers"),
        (lambda m, h, x: m.path(h), r"'path' draws random numbers in its forward pass"),
        (lambda m, h, x: F.interpolate(F.avg_pool2d(h, 2), size=(int(h.shape[2]), 64)), "on an image of 32 x 96"),
        (lambda m, h, x: F.layer_norm(h, tuple(map(int, h.shape[1:]))), "on an image of 32 x 96 the converted"),
        pytest.param(
            lambda m, h, x: h * x.amax().item(), r"mul\(\) in the forward pass of the module is given .* on another",
            marks=pytest.mark.filterwarnings("ignore:convert. the forward pass looks at the values of a tensor"),
        ),
        (lambda m, h, x: h.__setitem__((slice(None), 0), 0), "writes to a part of a tensor"),
    ],
)  # fmt: skip
def test_what_the_mode_or_the_size_decides_is_refused(between, said):
    class Path(nn.Module):
        def forward(self, h):
            return h * (torch.rand(h.shape[0], 1, 1, 1) > 0.5) if self.training else h

    net = Through(between, path=Path())
    with pytest.raises(ValueError, match=said):
        convert(net, TASKS)


FLATTENED = {
    "view": lambda y, x: y.view(y.size(0), -1),
    "flatten": lambda y, x: torch.flatten(y, 1),
    "reshape": lambda y, x: y.reshape(x.shape[0], -1),
    "channels": lambda y, x: y.view(*y.shape[:2], -1).mean(-1),
    "a plain number of channels": lambda y, x: y.view(-1, 4),
    "squeezed": lambda y, x: y.squeeze(-1).squeeze(-1),
}


@pytest.mark.parametrize("flat", FLATTENED)
def test_a_network_that_flattens_takes_any_batch(flat):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.pool = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(FLATTENED[flat](self.pool(self.b(self.a(x).relu()).relu()), x))

    net, x = Net(), torch.randn(5, 1, 16, 20)
    converted = convert(net, TASKS)
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})
    torch.testing.assert_close(converted(x)["ct"], net(x))


# --- judged by what is computed ---------------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """As timm's: a batch normalisation that calls the function, and has a module of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(x)


class FunctionalConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FunctionalLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Unchanged(nn.Conv2d):
    """Only its constructor is its own."""

    def __init__(self, inside, out):
        super().__init__(inside, out, 3, padding=1)


def test_subclasses_are_what_they_compute():
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), FunctionalLinear(6, 5))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), NormAct(4), FunctionalConv(4, 4, 3), NormAct(4), Unchanged(4, 6), *pooled)
    converted, report = convert(net, {"a": 2, "b": 5}, report=True)
    assert report.coverage == (3, 3)
    assert [layer.norm is not None for layer in sfg_layers(converted).values()] == [True, True, False]
    assert [layer.activation for layer in sfg_layers(converted).values()] == ["relu", "relu", None]
    x = 5 + 3 * torch.randn(8, 1, 16, 16)
    assert {task: tuple(y.shape) for task, y in converted(x).items()} == {"a": (8, 2), "b": (8, 5)}
    heads = [name for name, _ in converted.named_parameters() if name.startswith("7.")]
    assert heads == ["7.a.weight", "7.a.bias", "7.b.weight", "7.b.bias"]
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})
    torch.testing.assert_close(converted.train()(x)["b"], net.train()(x), rtol=1e-4, atol=1e-5)
    assert all(layer.norm.running_mean[0].abs().sum() > 0 for layer in list(sfg_layers(converted).values())[:2])


def test_a_weight_that_is_computed_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    net = nn.Sequential(nn.Conv2d(1, 4, 3), Standardised(4, 4, 1), nn.Conv2d(4, 1, 1))
    with pytest.raises(ValueError, match="'1' makes a tensor"):
        convert(net, TASKS)


def weight_norm(layer):
    """The one of old, which is deprecated, but still there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


def hooked(how):
    net = Through(lambda m, h, x: h)
    how(net)
    return net


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (hooked(lambda n: n.first.register_forward_hook(print)), r"'first' has a hook \(print\)"),
        (hooked(lambda n: n.more.register_forward_pre_hook(print)), r"'more' has a hook \(print\)"),
        (hooked(lambda n: n.register_full_backward_hook(print)), r"the module itself has a hook \(print\)"),
        (hooked(lambda n: weight_norm(n.more[0])), r"can't be copied .*'more.0' has a hook \(WeightNorm\)"),
        pytest.param(
            hooked(lambda n: nn.utils.spectral_norm(n.more[0])), r"'more.0' has a hook \(SpectralNorm\)",
            marks=pytest.mark.filterwarnings("ignore:convert. the forward pass stores 'more.0.weight'"),
        ),
        (hooked(lambda n: prune.l1_unstructured(n.more[0], "weight", 0.5)), "'more.0' has a hook .L1Uns"),
        (hooked(lambda n: nn.utils.parametrizations.weight_norm(n.more[0])), "'more.0' has a parametrised weight"),
    ],
)  # fmt: skip
def test_hooks_that_would_not_be_called_are_refused(module, said):
    with pytest.raises(ValueError, match=said):
        convert(module, TASKS)


def test_a_head_keeps_its_hooks_and_parametrisations():
    net = Through(lambda m, h, x: h)
    nn.utils.parametrizations.weight_norm(net.last)
    seen = []
    net.last.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    converted = convert(net, TASKS)
    seen.clear()
    converted(torch.randn(2, 1, 9, 9))
    assert len(seen) == 2
    assert nn.utils.parametrize.is_parametrized(converted.get_submodule("last.ct"))


def test_parts_without_gradient_are_refused():
    class Net(Through):
        def forward(self, x):
            with torch.no_grad():
                h = self.first(x)
            return self.last(self.more(h))

    with pytest.raises(ValueError, match=r"'first' is done under torch.no_grad\(\).*requires_grad_\(False\)"):
        convert(Net(None), TASKS)


# --- what is told -----------------------------------------------------------------------------------------------------


def gated():
    """Over all channels there is a softmax, so the product is of no factor that is known."""
    return Through(lambda m, h, x: h * m.gate(h).softmax(1), gate=nn.Conv2d(4, 4, 1), unused=nn.Conv2d(1, 1, 1))


def test_convolutions_that_are_copied_are_named():
    with pytest.warns(UserWarning, match=r"4 of 8 convolutions are no SFG layers, .*'more.0', .* behind softmax\(\)"):
        converted, report = convert(gated(), TASKS, report=True)
    becomes = {row.name: row.becomes for row in report}
    assert becomes["first"] == becomes["gate"] == "SFG layer"
    assert {becomes[f"more.{i}"] for i in range(4)} == {"copied for each task"}
    assert becomes["last"] == "head"
    assert becomes["unused"] == "not reached"
    assert "3 of 8 convolutions are SFG layers or heads" in str(report)
    assert set(converted.more.get_submodule("0")._modules) == set(TASKS)
    with pytest.raises(ValueError, match="4 of 8 convolutions are no SFG layers"):
        convert(gated(), TASKS, strict=True)


def test_skipped_convolutions_are_in_the_report():
    _, report = convert(Through(lambda m, h, x: h), TASKS, skip=["first"], report=True)
    assert report[0] == ("first", "Conv2d(1, 4, 3x3)", "left plain", "skipped")


def test_everything_in_the_way_is_named_at_once():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU(), nn.Conv2d(4, 4, 3),
        nn.LocalResponseNorm(2), nn.BatchNorm2d(4, momentum=0.0), nn.Conv2d(4, 1, 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 things stand in the way") as caught:
        convert(net, TASKS)
    lines = str(caught.value).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["'1'", "'4'", "'5'"]


def test_a_grouped_convolution_can_be_skipped():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 1, 1))
    example = torch.randn(1, 4, 9, 9)
    assert len(sfg_layers(convert(net, TASKS, example=example))) == 2
    assert len(sfg_layers(convert(net, TASKS, skip=["0"], example=example))) == 1


class TwoInputs(Through):
    def forward(self, x, y):
        return super().forward(x + y)


@pytest.mark.parametrize(
    ("module", "example", "said"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), *[nn.MaxPool2d(2)] * 6, nn.Conv2d(4, 1, 3)), None, r"noise.*\(.., example="),
        (Through(lambda m, h, x: h), torch.zeros(1, 3, 8, 8), r"on images of shape \(3, 8, 8\): Runtime"),
        (Through(lambda m, h, x: h), torch.zeros(1, 8, 8), r"example has shape \(1, 8, 8\), expected an image \[N"),
        (TwoInputs(None), None, "TypeError: .*positional argument.* Expected a network of one image"),
        (nn.Sequential(nn.Conv1d(1, 2, 3)), None, "the module has no convolution that .* layer, but Conv1d"),
        (nn.Sequential(nn.Conv3d(1, 2, 3)), torch.zeros(1, 1, 9, 9), r"shape .*, expected an image \[N, C, D, H, W\]"),
    ],
)  # fmt: skip
def test_examples_that_do_not_fit(module, example, said):
    with pytest.raises(ValueError, match=said):
        convert(module, TASKS, example=example)


def test_one_relu_for_all_places_stays_one_where_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.relu = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1), nn.ReLU()

        def forward(self, x):
            h = self.a(x)
            return self.relu(self.c(self.relu(h + self.b(F.pad(h, [1] * 4)))))

    converted, x = convert(Net(), TASKS), torch.randn(2, 1, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ReLU behind a sum
        assert {y.shape for y in converted(x).values()} == {(2, 2, 7, 7)}


def test_a_norm_behind_the_last_convolution_is_the_heads():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    converted = convert(net, {"ct": 1, "organs": 3})
    assert {task: y.shape[1] for task, y in converted(torch.randn(2, 1, 9, 9)).items()} == {"ct": 1, "organs": 3}
    assert converted.get_submodule("2.organs").num_features == 3


# --- what a stranger found --------------------------------------------------------------------------------------------


class Ending(nn.Module):
    """Two SFG layers, and what `end` makes of the second: it gives the output."""

    def __init__(self, end, **parts):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.end = nn.Conv2d(8, 3, 1), end
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.end(self, self.second(self.first(x).relu()).relu(), x)


ENDINGS = {
    "swish": Ending(lambda m, y, x: (z := m.last(y)) * z.sigmoid()),
    "log softmax": Ending(lambda m, y, x: (z := m.last(y)) - z.logsumexp(1, keepdim=True)),
    "unit length": Ending(lambda m, y, x: (z := m.last(y)) / z.norm(dim=1, keepdim=True)),
    "a mask": Ending(lambda m, y, x: m.last(y) * (x > 0)),
    "a gate of one channel": Ending(lambda m, y, x: m.last(y) * m.gate(y).sigmoid(), gate=nn.Conv2d(8, 1, 1)),
    "a sum": Ending(lambda m, y, x: m.last(y) + m.side(y), side=nn.Conv2d(8, 3, 1)),
    "two of two sizes": Ending(
        lambda m, y, x: m.last(y) + F.interpolate(m.side(F.avg_pool2d(y, 2)), size=y.shape[-2:]),
        side=nn.Conv2d(8, 3, 1),
    ),
    "a norm": Ending(lambda m, y, x: m.norm(m.last(y)).relu(), norm=nn.BatchNorm2d(3)),
    "a class of its own": Ending(lambda m, y, x: m.own(y), own=FunctionalConv(8, 3, 1)),
}


@pytest.mark.parametrize("what", ENDINGS)
def test_heads_get_the_sizes_that_are_asked_for(what):
    converted, report = convert(ENDINGS[what], {"a": 3, "b": 5, "c": 1}, report=True)
    y = converted(torch.randn(2, 1, 8, 8))
    assert {task: tuple(value.shape) for task, value in y.items()} == {
        "a": (2, 3, 8, 8),
        "b": (2, 5, 8, 8),
        "c": (2, 1, 8, 8),
    }
    assert [row.becomes for row in report][:2] == ["SFG layer", "SFG layer"]
    sum(value.square().sum() for value in y.values()).backward()
    own = [name for name, p in converted.named_parameters() if ".b." in name and p.grad.abs().sum() > 0]
    assert own


def test_parameters_behind_the_last_layer_are_the_tasks_own():
    converted = convert(Ending(lambda m, y, x: m.last(y) * m.scale, scale=nn.Parameter(torch.ones(1, 3, 1, 1))), TASKS)
    assert {name for name, _ in converted.named_parameters() if "scale" in name} == {"scale.ct", "scale.organs"}
    converted(torch.randn(2, 1, 8, 8))["ct"].sum().backward()
    assert converted.get_parameter("scale.ct").grad is not None
    assert converted.get_parameter("scale.organs").grad is None


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Ending(lambda m, y, x: m.last(y) * m.scale, scale=nn.Parameter(torch.ones(1, 3, 1, 1))), "can't be made"),
        (
            Ending(lambda m, y, x: F.pixel_shuffle(m.up(y), 2), up=nn.Conv2d(8, 12, 1)),
            r"128\), expected 5 channels",
        ),
        (
            Ending(lambda m, y, x: m.bound(y), bound=nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 3, 1))),
            "'bound.b' is parametrised or has hooks",
        ),
    ],
)
def test_heads_that_can_not_have_another_size_are_refused(module, said):
    with pytest.raises(ValueError, match=said):
        convert(module, {"a": 3, "b": 5})


@pytest.mark.parametrize(
    ("tasks", "options", "said"),
    [
        (["keys"], {}, "a task can't be called 'keys'"),
        (["training"], {}, "a task can't be called 'training'"),
        (["a.b"], {}, "a task can't be called 'a.b'"),
        (["class"], {}, "a task can't be called 'class'"),
        ([""], {}, "a task can't be called ''"),
        ([1, 2], {}, "a task can't be called 1"),
        ({"a": 0}, {}, r"tasks\['a'\]=0, expected a number of outputs"),
        ({"a": 2.0}, {}, r"tasks\['a'\]=2.0, expected"),
        (["a"], {"skip": "first"}, "skip='first' is one text"),
        (["a"], {"skip": ["last"]}, "'last' can't be skipped, because it does not stand"),
        (["a"], {"norm": "batch"}, "unknown option 'norm', expected init or estimator"),
        (["a"], {"example": [1]}, r"example has type list, expected an image \[N, C, H, W\]"),
        (["a"], {"example": torch.zeros(0, 1, 8, 8)}, r"example has shape \(0, 1, 8, 8\)"),
    ],
)
def test_arguments_that_can_not_be(tasks, options, said):
    with pytest.raises(ValueError, match=said):
        convert(Through(lambda m, h, x: h), tasks, **options)


def test_what_is_converted_or_compiled_already_is_refused():
    net = Through(lambda m, h, x: h)
    with pytest.raises(ValueError, match="has SFG layers already"):
        convert(convert(net, TASKS), TASKS)
    with pytest.raises(ValueError, match=r"expected the network itself: module\._orig_mod"):
        convert(torch.compile(net), TASKS)
    with pytest.raises(ValueError, match=r"a module is called 'code', as a part of torch\.fx"):
        convert(Through(lambda m, h, x: m.code(h), code=nn.Conv2d(4, 4, 1)), TASKS)
    with pytest.raises(ValueError, match="lazy layers without weights"):
        convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 1, 1)), TASKS)


class Counts(nn.Module):
    """Running statistics of its own."""

    def __init__(self, how):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.how = how

    def forward(self, h):
        if self.training:
            self.how(self, h.detach())
        return h * 1.0


def in_place(m, h):
    m.mean.mul_(0.9).add_(h.mean())


def assigned(m, h):
    m.mean = 0.9 * m.mean + h.mean()


class KeepsNorms(Through):
    """The usual way to keep batch normalisations as they were."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Through(lambda m, h, x: m.count(h), count=Counts(in_place)), "'count' changes 'count.mean' in its forward"),
        (Through(lambda m, h, x: m.count(h), count=Counts(assigned)), "'count' makes a tensor"),
        (Through(lambda m, h, x: h * (m.training and random.random())), "draws random numbers in train"),
        (Through(lambda m, h, x: h * (1 + 0 * torch.rand(1).item())), r"draws random numbers .*\(rand\)"),
        (Through(lambda m, h, x: [h.register_hook(print), h][1]), "puts a hook on a tensor"),
        (KeepsNorms(lambda m, h, x: m.norm(h), norm=nn.BatchNorm2d(4)), "keeps 'norm' in eval.*without a train"),
    ],
)
def test_what_a_recording_would_lose_is_refused(module, said):
    state = random.getstate()
    with pytest.raises(ValueError, match=said):
        convert(module, TASKS)
    random.setstate(state)


def test_stored_tensors_are_told():
    def store(m, h, x):
        m.middle = h
        return h

    with pytest.warns(UserWarning, match="stores 'middle', which the converted network won't"):
        convert(Through(store), TASKS)


def odd(m, h, x):
    if h.shape[2] % 2:
        h = F.pad(h, (0, 0, 0, 1))
    return h


def of_one_number(m, h, x):
    """Python makes a plain number of a length."""
    assert len(h[0, 0]) == 64
    return h


@pytest.mark.parametrize("between", [odd, of_one_number, lambda m, h, x: F.adaptive_avg_pool2d(h, min(h.shape[-2:]))])
def test_images_that_take_another_way_are_refused_when_they_come(between):
    """An `if` on the size, and a minimum, are recorded as they came out."""
    converted = convert(Through(between), TASKS)
    converted(torch.randn(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"converted for images of other sizes: .*convert\(.., example="):
        converted(torch.randn(1, 1, 33, 20))
    restored = pickle.loads(pickle.dumps(converted))
    with pytest.raises(ValueError, match="converted for images of other sizes"):
        restored(torch.randn(1, 1, 33, 20))


def test_functions_with_settings_of_their_own():
    """`F.batch_norm` with another momentum than its module's, `F.conv2d` without its bias."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
            self.last = nn.Conv2d(4, 2, 1)
            nn.init.zeros_(self.b.bias)

        def forward(self, x):
            n, y = self.norm, self.a(x)
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.5, 1e-3)
            return self.last(F.conv2d(y, self.b.weight, padding=1).relu())

    converted = convert(Net(), TASKS)
    first, second = sfg_layers(converted).values()
    assert (first.norm.momentum, first.norm.eps) == (0.5, 1e-3)
    assert second.bias is None
    assert second.padding == (1, 1)


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(), nn.FeatureAlphaDropout()])
def test_dropouts_that_features_do_not_know_end_the_sfg_layers(dropout):
    with pytest.warns(UserWarning, match="behind 'middle'"):
        converted = convert(Through(lambda m, h, x: m.middle(h), middle=dropout), TASKS)
    assert converted.eval()(torch.randn(1, 1, 9, 9))["ct"].shape == (1, 2, 9, 9)


def test_the_example_is_left_alone():
    example = torch.zeros(1, 1, 16, 16)
    convert(nn.Sequential(nn.ReLU6(inplace=True), Through(lambda m, h, x: h)), TASKS, example=example.sub_(1))
    assert (example == -1).all()


@pytest.mark.parametrize("tail", [nn.Flatten(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))])
@pytest.mark.parametrize("what", ["crop", "sizes", "to", "* 2", "view"])
def test_saved_networks_are_loaded(what, tail, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = Through(HARMLESS[what]), tail

        def forward(self, x):
            y = self.tail(self.body(x) * 2).tanh()
            return y.view(y.size(0), -1)[:, 1:]

    converted, x = convert(Net(), TASKS, init="dirichlet").eval(), torch.randn(2, 1, 35, 43)
    torch.save(converted, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    frozen = freeze(converted, example=x)
    torch.save(frozen, tmp_path / "frozen.pt")
    torch.testing.assert_close(loaded(x), converted(x))
    torch.testing.assert_close(torch.load(tmp_path / "frozen.pt", weights_only=False)(x), frozen(x))


def test_frozen_without_an_example_behind_a_skipped_stem():
    converted = convert(Through(lambda m, h, x: h), TASKS, skip=["first"], init="dirichlet").eval()
    assert freeze(converted)(torch.randn(1, 1, 9, 9))["ct"].shape == (1, 2, 9, 9)


def test_the_shared_group_goes_on_from_the_pretrained_statistics():
    """With everything shared, training and evaluation together are the module's own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))
    for _ in range(20):
        net(3 + torch.randn(4, 1, 9, 9))
    converted = convert(net, TASKS)
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})
    for step in range(3):
        x = torch.randn(4, 1, 9, 9) * (step + 1)
        net.train()(x), converted.train()(x)
        torch.testing.assert_close(converted.eval()(x)["ct"], net.eval()(x), rtol=1e-4, atol=1e-5)


class Alias(Through):
    """As U-Nets on the encoder of a ResNet: one normalisation, two names."""

    def __init__(self):
        super().__init__(lambda m, h, x: m.stage(h), norm=nn.BatchNorm2d(4))
        self.stage = nn.Sequential(self.norm, nn.ReLU())


@pytest.mark.parametrize(
    "module",
    [
        Alias(),
        Through(lambda m, h, x: m.extra(input=h), extra=nn.Conv2d(4, 4, 1)),
        Through(lambda m, h, x: h[..., 1:-1, 2:]),
        Through(lambda m, h, x: F.interpolate(h, size=(divmod(h.shape[2], 2)[0], abs(h.shape[3] >> 1)))),
        Through(lambda m, h, x: m.check(h), check=Counts(lambda m, h: check_batch(h))),
    ],
)  # fmt: skip
def test_ordinary_ways_of_writing_are_converted(module):
    converted, report = convert(module, TASKS, report=True)
    assert report.coverage[0] == report.coverage[1]
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})
    x = torch.randn(2, 1, 34, 44)
    torch.testing.assert_close(converted.eval()(x)["ct"], module.eval()(x), rtol=1e-4, atol=1e-5)


def test_who_asks_for_the_number_of_images_gives_several():
    net = Through(lambda m, h, x: h if x.shape[0] > 1 else 2 * h)
    converted = convert(net, TASKS, example=torch.randn(2, 1, 16, 16))
    assert converted(torch.randn(3, 1, 16, 16))["ct"].shape[0] == 3
    with pytest.raises(ValueError, match="converted for images of other sizes"):
        converted(torch.randn(1, 1, 16, 16))


def check_batch(h):
    assert h.size(0) > 1


def squares(m, h, x):
    height, width = x.shape[-2:]
    assert height == width
    assert height % 32 == 0
    return F.interpolate(F.avg_pool2d(h, 2), size=(int(height), int(width)))


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (Through(squares), {}, "on an image of 128 x 128 .* plain number"),
        (Through(lambda m, h, x: h if x.shape[0] > 1 else 2 * h), {}, "an example of several images"),
        (Through(lambda m, h, x: in_float32(h)), {}, "the module enters torch.autocast in its forward pass"),
        (Through(lambda m, h, x: m.parts[0](h), parts=[nn.Conv2d(4, 4, 1)]), {}, "in a list. nn.ModuleList"),
        (Alias(), {"skip": ["norm"]}, "'norm' can't be skipped"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)), {"skip": ["1"]}, "'1' can't be"),
        (Ending(lambda m, y, x: m.fc(y.mean((2, 3))), fc=nn.Linear(8, 2)), {"skip": ["fc"]}, "'fc' can't be skipped"),
    ],
)  # fmt: skip
def test_what_would_be_another_network_is_refused(module, options, said):
    with pytest.raises(ValueError, match=said):
        convert(module, TASKS, **options)


def in_float32(h):
    with torch.autocast("cpu", enabled=False):
        return h.float()


def test_what_is_skipped_by_its_second_name_is_skipped():
    class Net(Through):
        def __init__(self):
            super().__init__(lambda m, h, x: h)
            self.stem = nn.Sequential(self.first)

    _, report = convert(Net(), TASKS, skip=["stem"], report=True)
    assert report[0][2:] == ("left plain", "skipped")


@pytest.mark.parametrize(
    "look", [lambda x: x.max() > 10, lambda x: x.max().item() > 10, lambda x: not x.isfinite().all()]
)
def test_who_looks_at_values_is_warned(look):
    with pytest.warns(UserWarning, match="looks at the values of a tensor .* in the module"):
        convert(Through(lambda m, h, x: h * 2 if look(x) else h), TASKS)


def test_a_frozen_task_leaves_the_others_behind():
    """Also where the forward pass asks for the size of every task's output."""

    def end(m, y, x):
        y = m.last(y)
        return y if y.shape[-2:] == x.shape[-2:] else F.interpolate(y, size=x.shape[-2:])

    converted = convert(Ending(end), TASKS).eval()
    for layer in sfg_layers(converted).values():
        layer.assign([0, 0, 1, 1, 1, 2, 2, 2])
    sizes = [sum(p.numel() for p in freeze(converted, tasks=tasks).parameters()) for tasks in (None, ["ct"])]
    assert sizes[1] < 0.7 * sizes[0]
    x = torch.randn(2, 1, 20, 12)
    torch.testing.assert_close(freeze(converted, tasks=["ct"])(x)["ct"], converted(x)["ct"], rtol=1e-4, atol=1e-5)


def test_networks_for_one_size_are_frozen_without_an_example():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 8 * 8, 3))
    frozen = freeze(convert(net, TASKS, example=torch.randn(1, 1, 12, 12), init="dirichlet").eval())
    assert frozen(torch.randn(2, 1, 12, 12))["ct"].shape == (2, 3)


def test_concatenated_tuples_are_compiled():
    net = Through(lambda m, h, x: m.wide(torch.cat((h, h.tanh()), 1)), wide=nn.Conv2d(8, 4, 1))
    converted, x = convert(net, TASKS).eval(), torch.randn(2, 1, 9, 9)
    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), converted(x))
