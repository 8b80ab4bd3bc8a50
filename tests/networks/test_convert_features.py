"""What networks do between two convolutions besides sums and pooling, converted: the image once more, parts and
shuffles of channels, slopes for each channel, gates of squeeze-and-excite and of attention. The oracle is masks written
out in float64: what is done to a tensor is done to what each group has."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfg_fast import SFGConv2d, assign, backend, convert, freeze
from sfg_fast.networks.controls import sfg_layers
from tests.backends import EVERY
from tests.oracle import assert_close

NAMES = ("p", "q", "r")


class Between(nn.Module):
    """Two convolutions and a head; `between(self, h, x)` stands between the convolutions."""

    def __init__(self, between, wide=6, **parts):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(wide, 4, 3, padding=1)
        self.last, self.between = nn.Conv2d(4, 3, 1), between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.last(self.second(self.between(self, self.first(x).tanh(), x)).tanh())


def parameter(*shape):
    return nn.Parameter(torch.rand(shape) + 0.5)


def shuffled(m, h, x):
    n, channels, height, width = h.size()
    return h.view(n, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(n, -1, height, width)


def halves(m, h, x):
    a, b = h.chunk(2, dim=1)
    return torch.cat([b.sin(), a], 1)


def uneven(m, h, x):
    half = h.shape[1] // 2
    a, b, c = torch.split(h, [half - 1, 1, half], 1)
    return torch.cat((c, b, a), dim=1)


def one_number(m, h, x):
    return m.half + h * m.half


# What stands between; the same for the dense tensor of group g, whose gates are z; more arguments of `Between`.
SHARED = lambda x, g: x * (g == 0)  # noqa: E731
CASES = {
    "image joined": (lambda m, h, x: torch.cat([h, x], 1), lambda m, h, x, z, g: torch.cat([h, SHARED(x, g)], 1), 8),
    "image in front": (lambda m, h, x: torch.cat((x, h), 1), lambda m, h, x, z, g: torch.cat([SHARED(x, g), h], 1), 8),
    "pooled image": (
        lambda m, h, x: torch.cat([h, x.mean((2, 3), keepdim=True).expand(-1, -1, *h.shape[-2:])], 1),
        lambda m, h, x, z, g: torch.cat([h, SHARED(x.mean((2, 3), keepdim=True).expand(-1, -1, *h.shape[-2:]), g)], 1),
        8,
    ),
    "plus": (lambda m, h, x: h + x[:, :1], lambda m, h, x, z, g: h + z * x[:, :1]),
    "in front of plus": (lambda m, h, x: x[:, :1] + h, lambda m, h, x, z, g: h + z * x[:, :1]),
    "minus": (lambda m, h, x: h - x[:, :1], lambda m, h, x, z, g: h - z * x[:, :1]),
    "from": (lambda m, h, x: x[:, 1:] - 2 * h, lambda m, h, x, z, g: z * x[:, 1:] - 2 * h),
    "one minus": (lambda m, h, x: 1 - h, lambda m, h, x, z, g: z - h),
    "shift and scale": (
        lambda m, h, x: h * m.scale + m.shift,
        lambda m, h, x, z, g: h * m.scale + z * m.shift,
        6,
        lambda: {"scale": parameter(1, 6, 1, 1), "shift": parameter(1, 6, 1, 1)},
    ),
    "one number": (
        one_number, lambda m, h, x, z, g: z * m.half + h * m.half, 6, lambda: {"half": parameter(1)}
    ),
    "times": (lambda m, h, x: x[:, :1] * h, lambda m, h, x, z, g: h * x[:, :1]),
    "halves": (halves, lambda m, h, x, z, g: halves(m, h, x)),
    "three parts": (uneven, lambda m, h, x, z, g: uneven(m, h, x)),
    "a range": (lambda m, h, x: h[:, : h.size(1) // 2], lambda m, h, x, z, g: h[:, :3], 3),
    "every second": (lambda m, h, x: h[:, 1::2], lambda m, h, x, z, g: h[:, 1::2], 3),
    "a range and a crop": (lambda m, h, x: h[:, 2:, 1:, :-1], lambda m, h, x, z, g: h[:, 2:, 1:, :-1], 4),
    "behind dots": (lambda m, h, x: h[:, 4:, ...], lambda m, h, x, z, g: h[:, 4:], 2),
    "a list": (lambda m, h, x: h[:, [5, 0, 2]], lambda m, h, x, z, g: h[:, [5, 0, 2]], 3),
    "narrow": (lambda m, h, x: h.narrow(1, 1, 3), lambda m, h, x, z, g: h[:, 1:4], 3),
    "flip": (lambda m, h, x: h.flip(1), lambda m, h, x, z, g: h.flip(1)),
    "index": (
        lambda m, h, x: torch.index_select(h, 1, m.order),
        lambda m, h, x, z, g: h[:, m.order],
        3,
        lambda: {"order": nn.Buffer(torch.tensor([4, 1, 3]))},
    ),
    "shuffle": (shuffled, lambda m, h, x, z, g: h[:, [0, 3, 1, 4, 2, 5]]),
    "channel shuffle": (
        lambda m, h, x: m.shuffle(h),
        lambda m, h, x, z, g: h[:, [0, 2, 4, 1, 3, 5]],
        6,
        lambda: {"shuffle": nn.ChannelShuffle(3)},
    ),
    "slopes behind pooling": (
        lambda m, h, x: m.slopes(F.avg_pool2d(h, 2)),
        lambda m, h, x, z, g: m.slopes(F.avg_pool2d(h, 2)),
        6,
        lambda: {"slopes": slopes()},
    ),
}  # fmt: skip


def slopes():
    module = nn.PReLU(6)
    nn.init.normal_(module.weight)
    return module


def network(what, seed=0):
    torch.manual_seed(seed)
    between, _, *rest = CASES[what]
    parts = rest[1]() if len(rest) > 1 else {}
    return Between(between, *rest[:1], **parts).double()


def image(*shape):
    torch.manual_seed(7)
    return torch.randn(*(shape or (2, 2, 6, 8)), dtype=torch.float64)


def converted_from(net, tasks, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is copied for each task
        converted, report = convert(net, tasks, report=True, **options)
    assert report.coverage[0] == report.coverage[1]
    return converted


def all_shared(net):
    assign(net, {name: [0] * layer.out_channels for name, layer in sfg_layers(net).items()})


def by_masks(net, x, gates, on_groups):
    """The outputs of a converted `Between` by masks. gates: [K, T+1] of each layer, by name."""
    z = {name: [column[:, None, None] for column in one.t()] for name, one in gates.items()}
    h = [F.conv2d(x, net.first.weight, net.first.bias, padding=1).tanh() * gate for gate in z["first"]]
    y = [
        F.conv2d(one, net.second.weight, net.second.bias, padding=1).tanh() * gate
        for one, gate in zip(read(on_groups(net, h, x, z)), z["second"], strict=True)
    ]
    heads = {name: net.last.get_submodule(name) for name in NAMES[: len(y) - 1]}
    return {
        name: F.conv2d(y[g] + y[0], head.weight, head.bias) for g, (name, head) in enumerate(heads.items(), start=1)
    }


def read(h):
    return [h[0], *(one + h[0] for one in h[1:])]


def total(y):
    return sum((n + 1) * one.sin().sum() for n, one in enumerate(y.values()))


def check_against_masks(converted, on_groups, by=by_masks):
    """Outputs and all gradients of a training step, on every backend."""
    x = image().requires_grad_()
    converted.train()
    named = {"x": x} | {name: one for name, one in converted.named_parameters() if one.requires_grad}
    torch.manual_seed(3)
    gates = {name: layer.draw().gates for name, layer in sfg_layers(converted).items()}
    expected = by(converted, x, gates, on_groups)
    wanted = torch.autograd.grad(total(expected), list(named.values()), allow_unused=True)
    for kind in EVERY:
        torch.manual_seed(3)
        with backend(kind):
            found = converted(x)
            gradients = torch.autograd.grad(total(found), list(named.values()), allow_unused=True)
        for task in expected:
            assert_close(found[task], expected[task], 1e-9, f"{kind} {task}")
        for (name, one), a, b in zip(named.items(), gradients, wanted, strict=True):
            assert_close(a, torch.zeros_like(one) if b is None else b, 1e-8, f"{kind} {name}")
    assert sum("logits" in name for name in named) == len(gates)


def check_frozen(converted, groups):
    """Frozen with a mixed assignment, all tasks and the first alone."""
    torch.manual_seed(4)
    assign(converted, {k: torch.randint(groups, (m.out_channels,)) for k, m in sfg_layers(converted).items()})
    converted.eval()
    x = image()
    with torch.no_grad():
        expected = converted(x)
        with backend("reference"):
            torch.testing.assert_close(converted(x), expected)
        torch.testing.assert_close(freeze(converted, example=x)(x), expected)
        torch.testing.assert_close(freeze(converted, tasks=["p"], example=x)(x), {"p": expected["p"]})


def check_compiled(converted):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(converted).train(), fullgraph=True, backend="aot_eager")
    x, found = image(), []
    converted.train()
    for call in (converted, compiled):
        torch.manual_seed(5)
        y = call(x)
        module = call if call is converted else call._orig_mod
        parameters = [one for one in module.parameters() if one.requires_grad]
        found.append((y, torch.autograd.grad(total(y), parameters, allow_unused=True)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("what", CASES)
def test_all_shared_it_is_the_module(what):
    check_all_shared(network(what))


def check_all_shared(net, copies=()):
    converted = converted_from(net, NAMES[:2])
    all_shared(converted)
    for size in ((2, 2, 6, 8), (3, 2, 10, 12)):
        x = image(*size)
        for training in (False, True):
            expected = net.train(training)(x)
            for y in converted.train(training)(x).values():
                torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("number", range(len(CASES)), ids=list(CASES))
def test_draws_as_by_masks_written_out(number):
    what = list(CASES)[number]
    tasks, estimator = 1 + number % 3, ("straight_through", "gumbel_softmax")[number % 2]
    converted = converted_from(network(what), NAMES[:tasks], estimator=estimator)
    of_group = CASES[what][1]

    def on_groups(m, h, x, z):
        return [of_group(m, one, x, z["first"][g].detach(), g) for g, one in enumerate(h)]

    check_against_masks(converted, on_groups)
    check_frozen(converted, 1 + tasks)


@pytest.mark.parametrize("what", ["image joined", "shift and scale", "halves", "shuffle", "slopes behind pooling"])
def test_compiled_graphs(what):
    check_compiled(converted_from(network(what), NAMES[:2]))


# --- slopes of each kernel, as the activation of a layer --------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "selected"])
def test_slopes_go_with_their_kernels(tasks, estimator):
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), slopes(), nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4),
        nn.Conv2d(4, 3, 1),
    ).double()  # fmt: skip
    converted = converted_from(plain, NAMES[:tasks], estimator=estimator)
    assert [type(layer.activation) for layer in sfg_layers(converted).values()] == [nn.PReLU, nn.PReLU]

    def by(net, x, gates, _):
        first, second = (net.get_submodule(name) for name in ("0", "2"))
        z = {name: [column[:, None, None] for column in one.t()] for name, one in gates.items()}
        h = F.prelu(F.conv2d(x, first.weight, first.bias, padding=1), first.activation.weight)
        h = [h * gate for gate in z["0"]]
        u = torch.stack([F.conv2d(one, second.weight, second.bias, padding=1) for one in read(h)])
        drawn = gates["2"].argmax(1)
        rows = u.permute(2, 0, 1, 3, 4)[torch.arange(4), drawn]  # the statistics are those of each kernel's drawn row
        mean, var = rows.mean((1, 2, 3)), rows.var((1, 2, 3), correction=0)
        if estimator != "gumbel_softmax":  # for undrawn rows they are constants
            mean, var = [
                torch.where(torch.arange(1 + tasks)[:, None] == drawn, one, one.detach()) for one in (mean, var)
            ]
        else:
            mean, var = mean[None], var[None]
        scale = second.norm.weight / (var + second.norm.eps).sqrt()
        u = (u - mean[:, None, :, None, None]) * scale[:, None, :, None, None] + second.norm.bias[:, None, None]
        y = [F.prelu(one, second.activation.weight) * gate for one, gate in zip(u, z["2"], strict=True)]
        heads = [net.get_submodule(f"5.{name}") for name in NAMES[:tasks]]
        return {
            name: F.conv2d(y[g] + y[0], head.weight, head.bias)
            for g, (name, head) in enumerate(zip(NAMES, heads, strict=False), start=1)
        }

    check_against_masks(converted, None, by)
    check_frozen(converted, 1 + tasks)
    if tasks == 2 and estimator == "straight_through":
        check_compiled(converted)


def test_slopes_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"has parameters for each channel, expected .* nn.PReLU\(5\), with a slope"):
        SFGConv2d(1, 5, 3, activation=nn.PReLU(4))
