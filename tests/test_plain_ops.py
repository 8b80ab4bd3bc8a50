"""Plain torch modules between SFG layers: which may act on features, with which values and gradients; which raise."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfg_fast import SFGConv2d, SFGFeatures, backend
from sfg_fast.groups import Routing
from sfg_fast.reference import DenseFeatures
from tests.backends import FAST

TASKS = ("ct", "organs")


@pytest.fixture(params=FAST)
def backend_name(request):
    return request.param


def layers(seed=0, estimator="straight_through"):
    torch.manual_seed(seed)
    options = {"tasks": TASKS, "norm": "batch", "activation": "relu", "estimator": estimator, "dtype": torch.float64}
    return nn.ModuleList([SFGConv2d(2, 5, 3, **options), SFGConv2d(5, 4, 3, **options)])


def step(net, between, name):
    """Outputs and gradients with `between` between two layers, on a backend."""
    net.zero_grad()
    torch.manual_seed(1)
    x = torch.randn(2, 2, 12, 12, dtype=torch.float64, requires_grad=True)
    with backend(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = between(net[0](x))
        y = net[1](h)
        sum(((t + 1) * y.merged(task)).sin().sum() for t, task in enumerate(TASKS)).backward()
    return [h, *y], [x.grad, *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


MODULES = {
    "ReLU": nn.ReLU(),
    "ReLU in place": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.2, inplace=True),
    "ELU": nn.ELU(),
    "GELU": nn.GELU(),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "Tanh": nn.Tanh(),
    "Hardtanh": nn.Hardtanh(-1, 1),
    "ReLU6": nn.ReLU6(),
    "MaxPool2d": nn.MaxPool2d(2),
    "MaxPool2d, padded": nn.MaxPool2d(3, 2, 1),
    "AvgPool2d": nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(5),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(5),
    "Upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "nearest": lambda h: F.interpolate(h, size=(7, 9)),
    "ZeroPad2d": nn.ZeroPad2d((1, 2, 0, 1)),
    "reflect": nn.ReflectionPad2d(1),
    "Dropout, eval": nn.Dropout(0.5).eval(),
    "Identity": nn.Identity(),
    "Sequential": nn.Sequential(nn.LeakyReLU(), nn.AvgPool2d(2), nn.Tanh()),
    "PReLU": nn.PReLU(dtype=torch.float64),
    "times 2": lambda h: 2 * h,
    "half": lambda h: h * 0.5,
    "added to itself": lambda h: torch.add(h, h),
    "torch.tanh": torch.tanh,
}


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "selected", "none"])
@pytest.mark.parametrize("name", MODULES)
def test_as_by_dense_masking(name, estimator, backend_name):
    net = layers(estimator=estimator)
    found, gradients = step(net, MODULES[name], backend_name)
    expected, theirs = step(net, MODULES[name], "reference")
    assert isinstance(found[0], SFGFeatures)
    for a, b in zip([*found[0], *found[1:]], [*expected[0], *expected[1:]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "selected", "none"])
def test_concatenation_as_by_dense_masking(estimator, backend_name):
    """The two halves have groupings of their own, as on the up-path of a U-Net; one of them may be fixed."""
    torch.manual_seed(0)
    options = {"tasks": TASKS, "norm": "batch", "dtype": torch.float64, "estimator": estimator}
    net = nn.ModuleList([SFGConv2d(2, 5, 3, **options), SFGConv2d(2, 3, 3, **options), SFGConv2d(11, 4, 3, **options)])
    fixed = SFGConv2d(2, 3, 3, **options)
    fixed.assign([2, 0, 1])
    net.append(fixed)
    results = []
    for name in (backend_name, "reference"):
        net.zero_grad()
        torch.manual_seed(1)
        x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
        with backend(name):
            h = torch.cat([net[0](x), net[1](x), fixed(x)], dim=1)
            assert h.shape == (2, 11, 6, 6)
            y = net[2](h)
            sum(((t + 1) * y.merged(task)).sin().sum() for t, task in enumerate(TASKS)).backward()
        results.append([*h, *y, *(p.grad for p in net.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_dropout_drops_and_keeps_the_mean(backend_name):
    net = layers()
    with backend(backend_name), torch.no_grad():
        h = net[0](torch.randn(2, 2, 64, 64, dtype=torch.float64))
        dropped = nn.Dropout(0.25)(h)
        whole = nn.Dropout2d(0.5)(h)
    share = ((dropped.packed == 0) & (h.packed != 0)).sum() / (h.packed != 0).sum()
    assert abs(share - 0.25) < 0.02
    kept = dropped.packed != 0
    torch.testing.assert_close(dropped.packed[kept], h.packed[kept] / 0.75)
    zero = (whole.packed == 0).all((2, 3))
    assert torch.equal((whole.packed == 0).any((2, 3)) | zero, (h.packed == 0).any((2, 3)) | zero)


REFUSED = {
    "BatchNorm2d": (nn.BatchNorm2d(5), r"batch_norm would give values to the channels.*norm='batch'"),
    "InstanceNorm2d": (nn.InstanceNorm2d(5), r"instance_norm would give values.*norm='instance'"),
    "GroupNorm": (nn.GroupNorm(1, 5), r"group_norm would give values.*norm=\('group', \{'num_groups': ..\}\)\)$"),
    "LayerNorm": (nn.LayerNorm(10), r"layer_norm would give values.*norm='layer'"),
    "LocalResponseNorm": (nn.LocalResponseNorm(2), "local_response_norm is not known .*: take dense tensors"),
    "Sigmoid": (nn.Sigmoid(), r"sigmoid would give values.*activation=torch.sigmoid"),
    "Softplus": (nn.Softplus(), r"softplus would give values"),
    "Hardsigmoid": (nn.Hardsigmoid(), r"activation=torch.nn.functional.hardsigmoid"),
    "Softmax": (nn.Softmax(1), r"softmax would give values"),
    "Conv2d": (nn.Conv2d(5, 3, 1), r"conv2d would mix what belongs to different tasks: use SFGConv2d.*merged"),
    "Linear": (nn.Linear(5, 3), r"linear would mix what belongs to different tasks"),
    "ConvTranspose2d": (nn.ConvTranspose2d(5, 3, 2), "conv_transpose2d would mix"),
    "Flatten": (nn.Flatten(), "no attribute 'flatten', because it is no tensor: .*merged"),
    "PixelShuffle": (nn.PixelShuffle(1), "pixel_shuffle is not known"),
    "mean": (lambda h: torch.mean(h), r"mean.dim=None.*expected dim=\(2, 3\)"),
    "pad with one": (nn.ConstantPad2d(1, 1.0), r"pad\(value=1.0\) would give values.*expected 0"),
    "pad channels": (lambda h: F.pad(h, (0, 0, 0, 0, 1, 1)), "only height and width can be padded"),
    "Hardtanh": (nn.Hardtanh(0.5, 1), "hardtanh with these limits moves zero"),
    "Threshold": (nn.Threshold(0.5, 2.0), "threshold with these limits moves zero"),
    "indices": (nn.MaxPool2d(2, return_indices=True), "no indices, expected return_indices=False"),
    "cat of batches": (lambda h: torch.cat([h, h], 0), r"torch.cat\(dim=0\)"),
    "cat with a tensor": (lambda h: torch.cat([h, torch.zeros(2, 1, 10, 10)], 1), "only with one another"),
    "plus one": (lambda h: torch.add(h, h, alpha=2), "add.alpha=.* only be added and multiplied as they are"),
    "maximum": (lambda h: torch.maximum(h, h), "maximum is not known"),
    "where": (lambda h: torch.where(torch.ones(()) > 0, h, h), "where is not known"),
}


@pytest.mark.parametrize("kind", ["auto", "reference"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_says_what_to_do(name, kind):
    operation, said = REFUSED[name]
    net = layers().float()
    with backend(kind):
        h = net[0](torch.randn(2, 2, 12, 12))
        assert isinstance(h, SFGFeatures if kind == "auto" else DenseFeatures)
        with pytest.raises((TypeError, AttributeError), match=said):
            operation.float()(h) if isinstance(operation, nn.Module) else operation(h)


@pytest.mark.parametrize("other", ["x", [1.0], None, torch.ones(2)])
def test_sums_and_products_of_other_kinds(other):
    h = layers().float()[0](torch.randn(2, 2, 12, 12))
    with pytest.raises((TypeError, ValueError)):
        h + other
    with pytest.raises((TypeError, ValueError)):
        h * other


def test_relu_behind_the_gate_warns_while_p_is_learnt():
    net = layers().float()
    with pytest.warns(UserWarning, match=r"relu behind a gate.*activation='relu'"):
        F.relu(net[0](torch.randn(2, 2, 12, 12)))
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.relu(net[0](torch.randn(2, 2, 12, 12)))


def test_concatenation_of_other_kinds_is_refused():
    net = layers().float()
    x = torch.randn(2, 2, 12, 12)
    other = SFGConv2d(2, 5, 3, tasks=("a", "b"))
    with pytest.raises(ValueError, match=r"can.t be concatenated"):
        torch.cat([net[0](x), other(x)], 1)
    streams = SFGFeatures(net[0](x).streams(), net[0](x).groups.streams(5, TASKS), Routing.OWN)
    with pytest.raises(ValueError, match=r"routed .'arrow', 'own'. can't be concatenated"):
        torch.cat([net[0](x), streams], 1)


def test_looks_like_a_tensor_to_plain_modules():
    h = layers()[0](torch.randn(2, 2, 12, 12, dtype=torch.float64))
    assert h.dim() == 4
    assert h.size() == h.shape == (2, 5, 10, 10)
    assert h.size(1) == 5
    assert h.dtype == torch.float64
    assert h.device.type == "cpu"
