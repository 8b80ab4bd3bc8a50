"""`convert` and `freeze` with every norm, transposed, grouped and depthwise convolutions, stochastic depth, volumes.
`convert` itself compares the network with the module where all kernels are shared, in eval and train."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfg_fast import assign, backend, convert, freeze
from sfg_fast.networks.controls import sfg_layers
from tests.oracle import assert_close

TASKS = ("a", "b")


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, p):
        super().__init__()
        self.drop_prob, self.scale_by_keep = p, True

    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob) / (1 - self.drop_prob)


class UNet(nn.Module):
    """A U-Net of two levels, with a norm and an activation of one kind."""

    def __init__(self, norm, dims=2, activation=nn.LeakyReLU, residual=False):
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.down = nn.Sequential(conv(1, 6, 3, padding=1), norm(6), activation())
        self.deep = nn.Sequential(conv(6, 8, 3, 2, padding=1), norm(8), activation())
        self.up = nn.Sequential(up(8, 6, 2, 2), norm(6), activation())
        self.again = nn.Sequential(conv(12, 6, 3, padding=1), norm(6), activation())
        self.residual, self.after = residual, norm(6)
        self.last = conv(6, 2, 1)

    def forward(self, x):
        x = self.down(x)
        y = self.again(torch.cat([self.up(self.deep(x)), x], 1))
        return self.last(F.leaky_relu(self.after(x + y)) if self.residual else y)


class Separable(nn.Module):
    """Depthwise and grouped convolutions, and stochastic depth around a shortcut."""

    def __init__(self, groups=2, dropped=0.5, transposed=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        grouped = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.grouped = nn.Sequential(grouped(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8))
        self.drop = DropPath(dropped)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.drop(self.grouped(self.deep(x))))


class Joined(nn.Module):
    """A sum of concatenated features and a convolution of them, and a depthwise convolution of half of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ELU())
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ELU())
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.elu(self.first(x))
        x = torch.cat([x, F.elu(self.second(x))], 1)
        x = x + self.again(x)
        one, other = x.chunk(2, 1)
        return self.last(torch.cat([one, self.deep(other)], 1))


class Volumes(nn.Module):
    """What is done to features of volumes: parts and slopes of channels, sums and products with what is plain,
    padding, ranges."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(4, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.slopes, self.scale = nn.PReLU(8), nn.Parameter(torch.linspace(0.5, 2, 8).view(1, 8, 1, 1, 1))
        self.last = nn.Conv3d(12, 2, 1)

    def forward(self, x):
        h = self.slopes(self.first(x)[..., 1:])
        h = self.second(F.pad(h, (1, 0, 0, 0, 0, 0))) * self.scale + x.repeat(1, 2, 1, 1, 1)
        h = F.elu(h)
        one, other = h.chunk(2, 1)
        return self.last(torch.cat([one, other, x], 1))


def group_norm(width):
    return nn.GroupNorm(2, width)


def instance_norm(dims):
    kind = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
    return lambda width: kind(width, affine=True)


NETWORKS = {
    "instance norm": (lambda: UNet(instance_norm(2)), (16, 12)),
    "instance norm without affine": (lambda: UNet(nn.InstanceNorm2d, activation=nn.PReLU), (16, 12)),
    "group norm": (lambda: UNet(group_norm), (16, 12)),
    "group norm behind a sum": (lambda: UNet(group_norm, residual=True), (16, 12)),
    "instance norm behind a sum": (lambda: UNet(instance_norm(2), residual=True), (16, 12)),
    "volumes": (lambda: UNet(instance_norm(3), 3), (8, 6, 4)),
    "volumes with batch norm": (lambda: UNet(nn.BatchNorm3d, 3, residual=True), (8, 6, 4)),
    "volumes with group norm": (lambda: UNet(group_norm, 3, residual=True), (8, 6, 4)),
    "depthwise and grouped": (Separable, (10, 9)),
    "grouped and transposed": (lambda: Separable(transposed=True), (10, 9)),
    "features of volumes": (Volumes, (4, 5, 6)),
    "joined": (Joined, (10, 9)),
    "groups of one": (lambda: Separable(groups=8), (10, 9)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    """Images, and the converted network with a mixed assignment, in float64 and in eval()."""
    torch.manual_seed(0)
    make, size = NETWORKS[request.param]
    net = make()
    for norm in net.modules():
        if hasattr(norm, "running_mean") and norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
        if getattr(norm, "affine", False):
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    channels = next(one for one in net.modules() if hasattr(one, "in_channels")).in_channels
    x = torch.randn(2, channels, *size)
    converted, report = convert(net, TASKS, example=x, report=True)
    whole = sum(isinstance(one, nn.modules.conv._ConvNd) for one in net.modules())
    assert report.coverage == (whole, whole)
    assert converted(x)["a"].shape == net(x).shape
    assign(converted, {name: torch.randint(3, (m.out_channels,)) for name, m in sfg_layers(converted).items()})
    return x.double(), converted.eval().double()


def test_a_mixed_assignment_is_as_by_dense_masking(case):
    """Outputs, and the gradients of the image and of every parameter; in training, too."""
    x, converted = case
    found = {}
    for training in (False, True):
        for name in ("reference", "auto"):
            twin, image = copy.deepcopy(converted).train(training), x.clone().requires_grad_()
            for module in twin.modules():
                if hasattr(module, "scales"):
                    module.p = 0.0  # paths would be dropped by other random numbers
            with backend(name):
                out = twin(image)
                sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in out.values()).backward()
            gradients = {key: one.grad for key, one in twin.named_parameters() if one.grad is not None}
            found[name, training] = {**out, "dx": image.grad, **gradients}
        for key, one in found["reference", training].items():
            assert_close(found["auto", training][key], one, 1e-8, f"{key}, training={training}", scale=1.0)
        assert not torch.equal(found["auto", training]["a"], found["auto", training]["b"])


def test_frozen_it_is_the_same(case):
    x, converted = case
    expected = converted(x)
    frozen = freeze(converted, example=x)
    for task, y in frozen(x).items():
        assert_close(y, expected[task], 1e-9, task)
    other = torch.cat([x, x.flip(-1)])  # another batch
    for task, y in frozen(other).items():
        assert_close(y, converted(other)[task], 1e-9, task)
    exported = torch.export.export(frozen, (x,)).module()
    for task, y in exported(x).items():
        assert_close(y, expected[task], 1e-9, task)


def test_dropped_paths_leave_images_out():
    """Of a branch each image has all or nothing, and what is left is divided by the share that is left."""
    torch.manual_seed(0)
    net = Separable(dropped=0.5)
    nn.init.ones_(net.last.weight), nn.init.zeros_(net.last.bias)
    x = torch.randn(1, 2, 9, 8).expand(64, -1, -1, -1)
    converted = convert(net, TASKS, example=torch.randn(2, 2, 9, 8)).eval()
    assign(converted, {name: [0] * m.out_channels for name, m in sfg_layers(converted).items()})
    with torch.no_grad():
        whole = converted(x)["a"]
        converted.drop.train()
        dropped = converted(x)["a"]
        stem = net.eval().last(net.stem(x))
    assert len(torch.unique(dropped, dim=0)) == 2
    twice = 2 * whole - stem  # shortcut + branch / 0.5
    each = [min((one - stem[0]).abs().max().item(), (one - twice[0]).abs().max().item()) for one in dropped]
    assert max(each) < 1e-4 * whole.abs().max().item()
    assert 10 < sum((one - stem[0]).abs().max().item() < 1e-3 for one in dropped) < 54


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.Conv2d(4, 1, 1)),
            "'1' is an instance normalisation with running statistics",
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.LocalResponseNorm(2), nn.Conv2d(4, 1, 1)), "is LocalResponseNorm"),
        (nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 1, 1)), "no convolution that can be an SFG layer, but Conv1d"),
    ],
)
def test_what_is_refused(net, message):
    with pytest.raises(ValueError, match=message):
        convert(net, TASKS)
