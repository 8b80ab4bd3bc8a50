"""What networks do between two convolutions besides sums and pooling, converted: the image once more, parts and
shuffles of channels, slopes for each channel, gates of squeeze-and-excite and of attention. The oracle is masks written
out in float64: what is done to a tensor is done to what each group has."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfg_fast import SFGConv2d, StreamConv2d, assign, backend, convert, freeze
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
    return m.only + h * m.only


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
        one_number, lambda m, h, x, z, g: z * m.only + h * m.only, 6, lambda: {"only": parameter(1)}
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
    layers = sfg_layers(converted)
    order = sorted(layers, key=lambda name: (name != "first", name == "second"))  # that of the forward pass
    gates = {name: layers[name].draw().gates for name in order}
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


def check_saved(converted):
    """Loaded again, and frozen and exported."""
    x = image()
    converted.eval()
    with torch.no_grad():
        torch.testing.assert_close(pickle.loads(pickle.dumps(converted))(x), converted(x))
        frozen = freeze(converted, example=x)
        torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
        torch.testing.assert_close(torch.export.export(frozen, (x,)).module()(x), frozen(x))


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


def check_all_shared(net):
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
def test_compiled_graphs_and_saved_networks(what):
    check_compiled(converted_from(network(what), NAMES[:2]))
    check_saved(converted_from(network(what), NAMES[:2], init="dirichlet"))


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


# --- products with what layers compute: squeeze-and-excite, attention -------------------------------------------------


def excited(m, h, x):
    """As torchvision and timm write it."""
    return h * torch.sigmoid(m.expand(F.relu(m.reduce(h.mean((2, 3), keepdim=True)))))


def excited_by_modules(m, h, x):
    return m.gate(m.expand(m.act(m.reduce(m.pool(h))))) * h


def excited_by_linear_layers(m, h, x):
    """As MONAI writes it."""
    n, channels = h.shape[:2]
    s = m.squeeze(m.pool(h).view(n, channels)).view([n, channels, 1, 1])
    return h * s


def expanded(m, h, x):
    """As the first implementations of squeeze-and-excite."""
    s = m.squeeze(h.mean([2, 3]))
    return h * s[:, :, None, None].expand_as(h)


def linear():
    squeeze = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6), nn.Sigmoid())
    return {"pool": nn.AdaptiveAvgPool2d(1), "squeeze": squeeze}


def squeezed(reduce, expand, act=torch.sigmoid):
    """Squeeze-and-excite of each group."""

    def on_groups(m, h, x, z):
        reducing, expanding = m.get_submodule(reduce), m.get_submodule(expand)
        pooled = read([one.mean((2, 3), keepdim=True) for one in h])
        reduced = [
            F.conv2d(one, reducing.weight, reducing.bias).relu() * gate
            for one, gate in zip(pooled, z[reduce], strict=True)
        ]
        factors = [act(F.conv2d(one, expanding.weight, expanding.bias)) for one in read(reduced)]
        return [one * s for one, s in zip(h, factors, strict=True)]

    return on_groups


def spatial(m, h, x, z):
    factors = [
        F.batch_norm(
            F.conv2d(one, m.plane.weight, m.plane.bias, padding=1),
            None,
            None,
            m.plane.norm.weight[g : g + 1],
            m.plane.norm.bias[g : g + 1],
            True,
            0.0,
            m.plane.norm.eps,
        ).sigmoid()
        for g, one in enumerate(read(h))
    ]
    return [one * s for one, s in zip(h, factors, strict=True)]


def of_each_value(m, h, x, z):
    factors = [F.conv2d(one, m.gate.weight, m.gate.bias).sigmoid() for one in read(h)]
    return [one * s for one, s in zip(h, factors, strict=True)]


def attention(m, h, x):
    """As an attention gate: two convolutions are added, a third one has one channel."""
    return h * m.psi(torch.tanh(m.a(h) + m.b(h).sin())).sigmoid()


def attention_of_groups(m, h, x, z):
    summed = [
        torch.tanh(F.conv2d(one, m.a.weight, m.a.bias) * gate + torch.sin(F.conv2d(one, m.b.weight, m.b.bias) * gate))
        for one, gate in zip(read(h), z["a"], strict=True)
    ]
    return [one * F.conv2d(s, m.psi.weight, m.psi.bias).sigmoid() for one, s in zip(h, read(summed), strict=True)]


def interpolated(m, h, x):
    s = F.interpolate(m.gate(F.avg_pool2d(h, 2)), size=h.shape[-2:], mode="nearest")
    return h * (1 + F.hardsigmoid(F.softplus(s, beta=2.0) - 1) * 2)


def interpolated_groups(m, h, x, z):
    factors = [F.conv2d(F.avg_pool2d(one, 2), m.gate.weight, m.gate.bias) for one in read(h)]
    factors = [F.interpolate(one, size=h[0].shape[-2:]) for one in factors]
    return [one * (1 + F.hardsigmoid(F.softplus(s, beta=2.0) - 1) * 2) for one, s in zip(h, factors, strict=True)]


def both(m, h, x):
    """Concurrent spatial and channel attention: a sum of two products."""
    return h * m.expand(m.reduce(h.mean((2, 3), True)).relu()).sigmoid() + h * m.plane(h).sigmoid()


def both_groups(m, h, x, z):
    planes = [F.conv2d(one, m.plane.weight, m.plane.bias).sigmoid() for one in read(h)]
    squeezes = squeezed("reduce", "expand")(m, h, x, z)
    return [a + one * s for a, one, s in zip(squeezes, h, planes, strict=True)]


def two_convolutions():
    return {"reduce": nn.Conv2d(6, 3, 1), "expand": nn.Conv2d(3, 6, 1)}


FACTORS = {
    "squeeze and excite": (excited, squeezed("reduce", "expand"), two_convolutions),
    "by modules": (
        excited_by_modules,
        squeezed("reduce", "expand", F.hardsigmoid),
        lambda: two_convolutions() | {"pool": nn.AdaptiveAvgPool2d(1), "act": nn.ReLU(), "gate": nn.Hardsigmoid()},
    ),
    "by linear layers": (excited_by_linear_layers, squeezed("squeeze.0", "squeeze.2"), linear),
    "expanded": (expanded, squeezed("squeeze.0", "squeeze.2"), linear),
    "spatial": (
        lambda m, h, x: h * m.bn(m.plane(h)).sigmoid(),
        spatial,
        lambda: {"plane": nn.Conv2d(6, 1, 3, padding=1), "bn": nn.BatchNorm2d(1)},
    ),
    "of each value": (lambda m, h, x: h * m.gate(h).sigmoid(), of_each_value, lambda: {"gate": nn.Conv2d(6, 6, 1)}),
    "attention": (
        attention,
        attention_of_groups,
        lambda: {"a": nn.Conv2d(6, 5, 1), "b": nn.Conv2d(6, 5, 1), "psi": nn.Conv2d(5, 1, 1)},
    ),
    "interpolated": (interpolated, interpolated_groups, lambda: {"gate": nn.Conv2d(6, 6, 1)}),
    "both": (both, both_groups, lambda: two_convolutions() | {"plane": nn.Conv2d(6, 1, 1)}),
}  # fmt: skip


def with_factor(what):
    torch.manual_seed(0)
    between, _, parts = FACTORS[what]
    net = Between(between, **parts()).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            net(image())
    return net


@pytest.mark.parametrize("what", FACTORS)
def test_all_shared_factors_are_the_module_s(what):
    check_all_shared(with_factor(what))


@pytest.mark.parametrize("number", range(len(FACTORS)), ids=list(FACTORS))
def test_factors_as_by_masks_written_out(number):
    what = list(FACTORS)[number]
    tasks, estimator = 1 + number % 3, ("straight_through", "gumbel_softmax")[number // 3 % 2]
    converted = converted_from(with_factor(what), NAMES[:tasks], estimator=estimator)
    assert sum(isinstance(module, StreamConv2d) for module in converted.modules()) == 1 + (what == "both")
    check_against_masks(converted, FACTORS[what][1])
    check_frozen(converted, 1 + tasks)


@pytest.mark.parametrize("what", ["squeeze and excite", "by linear layers", "spatial"])
def test_compiled_and_saved_factors(what):
    check_compiled(converted_from(with_factor(what), NAMES[:2]))
    check_saved(converted_from(with_factor(what), NAMES[:2], init="dirichlet"))


def test_a_factor_of_the_image_is_the_same_for_all_groups():
    net = Between(lambda m, h, x: h * m.mask(x).sigmoid(), mask=nn.Conv2d(2, 1, 3, padding=1)).double()
    converted, report = convert(net, NAMES[:2], report=True)
    assert [row.becomes for row in report if row.name == "mask"] == ["left plain"]
    assert type(converted.mask) is nn.Conv2d

    def on_groups(m, h, x, z):
        return [one * F.conv2d(x, m.mask.weight, m.mask.bias, padding=1).sigmoid() for one in h]

    check_against_masks(converted, on_groups)
    check_frozen(converted, 3)


@pytest.mark.parametrize(
    "parts",
    [
        {"gate": nn.Sequential(nn.Conv1d(1, 1, 3, padding=1), nn.Sigmoid())},
        {"gate": nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Sigmoid())},
    ],
)
def test_gates_that_mix_channels_otherwise_are_copied_and_named(parts):
    """Efficient channel attention, and a layer norm among the linear layers."""
    torch.manual_seed(0)

    def between(m, h, x):
        pooled = h.mean((2, 3))
        s = m.gate(pooled[:, None])[:, 0] if isinstance(m.gate[0], nn.Conv1d) else m.gate(pooled)
        return h * s[:, :, None, None]

    with pytest.warns(UserWarning, match="1 of . convolutions are no SFG layers, .*'second'|2 of 4"):
        converted, _ = convert(Between(between, **parts).double(), NAMES[:2], report=True)
    assert converted.eval()(image())["p"].shape == (2, 3, 6, 8)


def test_a_stream_convolution_by_itself():
    """Its arguments are those of nn.Conv2d; other padding; what it refuses."""
    torch.manual_seed(0)
    layer = SFGConv2d(1, 4, 3, tasks=["p", "q"]).double()
    last = StreamConv2d(4, 2, (3, 2), 2, "valid", padding_mode="reflect", tasks=["p", "q"]).double()
    padded = StreamConv2d(4, 2, 3, padding=1, padding_mode="circular", tasks=["p", "q"], bias=False).double()
    x = image(2, 1, 9, 9)
    layer.assign([0, 1, 2, 2])
    f = layer(x)
    for kind in EVERY:
        with backend(kind):
            for one, plain in ((last, lambda t: F.conv2d(t, last.weight, last.bias, 2)),
                               (padded, lambda t: F.conv2d(F.pad(t, [1] * 4, "circular"), padded.weight))):  # fmt: skip
                streams = one(layer(x))
                for task in ("p", "q"):
                    torch.testing.assert_close(streams.merged(task), plain(f.merged(task)))
                torch.testing.assert_close(streams.dense("shared"), plain(f.dense("shared")))
    with pytest.raises(ValueError, match="groups=2: expected groups=1"):
        StreamConv2d(4, 2, 3, groups=2)
    with pytest.raises(ValueError, match=r"the input has groups .*, this layer"):
        StreamConv2d(4, 2, 3)(f)
    with pytest.raises(ValueError, match="streams of 4 kernels or one"):
        layer(x) * padded(layer(x))
