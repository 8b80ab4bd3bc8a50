"""SFG layers with every norm, transposed, grouped and depthwise convolutions, and volumes: a chain of two layers is
compared with dense masking, written plainly in float64. All gates are leaves that want a gradient, drawn and
undrawn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfg_fast import (
    FilterGroups,
    SFGConv2d,
    SFGConv3d,
    SFGConvTranspose2d,
    SFGConvTranspose3d,
    backend,
)
from sfg_fast.estimators import ESTIMATORS
from sfg_fast.layers.feature_norm import FeatureNorm
from tests.backends import EVERY, FAST, PACKED
from tests.oracle import assert_close, merge

# In Triton's interpreter one case of each kind is among the quick tests.
MOSTLY = [pytest.param(name, marks=pytest.mark.slow) if name == "triton" else name for name in EVERY]

NORMS = {
    "none": None,
    "batch": "batch",
    "instance": "instance",
    "instance without affine": ("instance", {"affine": False}),
    "group": ("group", {"num_groups": 2}),
    "layer": ("layer", {"eps": 1e-3}),
}
ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x)}
PLAIN = {
    SFGConv2d: F.conv2d, SFGConv3d: F.conv3d,
    SFGConvTranspose2d: F.conv_transpose2d, SFGConvTranspose3d: F.conv_transpose3d,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _double(float64):
    pass


def scale_and_shift(u, drawn, norm):
    """Of a norm of T+1 tensors u [N, K, ..], each like one tensor, by the drawn rows alone; written out kernel by
    kernel. `drawn`: the group of each kernel."""
    kind = getattr(norm, "kind", "batch")
    size = {"group": len(drawn) // (getattr(norm, "num_groups", None) or 1), "layer": len(drawn)}.get(kind, 1)
    scales, shifts = [], []
    for kernel, group in enumerate(drawn):
        block = range(kernel // size * size, kernel // size * size + size)
        taken = torch.stack([u[group][:, k] for k in block if drawn[k] == group], 1)  # [N, kernels, H, W]
        positions = tuple(range(2, taken.dim()))
        over = {"batch": (0, 1, *positions), "layer": (1,)}.get(kind, (1, *positions))
        mean = taken.mean(over, keepdim=True)
        var = ((taken - mean) ** 2).mean(over, keepdim=True)
        weight, bias = (1.0, 0.0) if norm.weight is None else (norm.weight[kernel], norm.bias[kernel])
        scale = weight / (var + norm.eps).sqrt()
        scales.append(scale.expand_as(taken[:, :1]))
        shifts.append((bias - mean * scale).expand_as(taken[:, :1]))
    return torch.cat(scales, 1), torch.cat(shifts, 1)


def plainly(layer, read, z):
    """T+1 dense tensors of a layer, from what each group reads, by dense masking. z: the gates [K, T+1]."""
    geometry = [layer.stride, layer.padding, layer.dilation, layer.groups]
    if layer.transposed:
        geometry = [layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation]
    u = [PLAIN[type(layer)](x, layer.weight, layer.bias, *geometry) for x in read]
    if layer.norm is not None:
        scale, shift = scale_and_shift(u, z.detach().argmax(1).tolist(), layer.norm)
        u = [one * scale + shift for one in u]
    h = [ACTIVATIONS[layer.activation](one) for one in u]
    return [one * z[:, g].view(-1, *[1] * layer.dims) for g, one in enumerate(h)]


def gates(assignment, tasks):
    return F.one_hot(torch.tensor(assignment), tasks + 1).double().requires_grad_()


def drawn(z, tasks):
    assignment = z.detach().argmax(1)
    return FilterGroups.from_assignment(assignment, tasks, z, all_gates=True)


class Chain:
    """Two layers, their gates and an image; `assignments`: of both layers (None: the second takes the first's)."""

    def __init__(self, first, second, assignments, size=(9, 8), seed=0):
        torch.manual_seed(seed)
        self.layers, self.tasks = (first, second), len(first.group_names) - 1
        for parameter in (*first.parameters(), *second.parameters()):
            nn.init.normal_(parameter)
        self.x = torch.randn(2, first.in_channels, *size).requires_grad_()
        own = [one for one in assignments if one is not None]
        self.z = [gates(one, self.tasks) for one in own]

    def leaves(self):
        parameters = {f"{n}.{name}": p for n, layer in enumerate(self.layers) for name, p in layer.named_parameters()
                      if name != "logits"}  # fmt: skip
        return {"x": self.x, **{f"z{n}": z for n, z in enumerate(self.z)}, **parameters}

    def gradients(self, out):
        torch.manual_seed(7)
        leaves = self.leaves()
        loss = sum((one * torch.randn(one.shape)).sum() for one in out)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {f"output {n}": one for n, one in enumerate(out)} | {
            f"d{name}": one for name, one in zip(leaves, found, strict=True)
        }

    def expected(self):
        first, second = self.layers
        features = plainly(first, [self.x] * (self.tasks + 1), self.z[0])
        return self.gradients(plainly(second, merge(features, "arrow"), self.z[-1]))

    def found(self):
        first, second = self.layers
        features = first(self.x, drawn(self.z[0], self.tasks))
        groups = features.groups if len(self.z) == 1 else drawn(self.z[1], self.tasks)
        return self.gradients(list(second(features, groups)))

    def check(self, name, tolerance=1e-9):
        expected = self.expected()
        with backend(name):
            found = self.found()
        assert found.keys() == expected.keys()
        for what, one in expected.items():
            if one is None:  # nothing depends on it
                assert found[what] is None or not found[what].any(), what
            else:
                assert_close(found[what], one, tolerance, what, scale=1.0)


MIXED = ((2, 0, 1, 1, 0, 2), (0, 1, 2, 0))
ASSIGNMENTS = {
    "mixed": (2, MIXED),
    "an empty shared group": (2, ((1, 2, 1, 1, 2, 2), (0, 1, 2, 2))),
    "an empty task": (2, ((1, 0, 1, 1, 0, 0), (0, 1, 1, 0))),
    "all shared": (2, ((0,) * 6, (0,) * 4)),
    "one task": (1, ((1, 0, 1, 1, 0, 0), (0, 1, 1, 0))),
    "three tasks": (3, ((3, 0, 1, 2, 0, 3), (0, 3, 1, 2))),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", EVERY)
def test_every_norm(name, norm, activation):
    how = {"norm": NORMS[norm], "activation": activation}
    Chain(SFGConv2d(2, 6, 3, padding=1, **how), SFGConv2d(6, 4, 3, stride=2, **how), MIXED).check(name)


@pytest.mark.parametrize("which", ASSIGNMENTS)
@pytest.mark.parametrize("norm", ["instance", "group", "layer"])
@pytest.mark.parametrize("name", MOSTLY)
def test_norms_of_each_image_under_every_assignment(name, norm, which):
    tasks, assignments = ASSIGNMENTS[which]
    how = {"norm": NORMS[norm], "activation": "leaky_relu", "tasks": tasks}
    Chain(SFGConv2d(2, 6, 3, **how), SFGConv2d(6, 4, 3, padding=1, **how), assignments).check(name)


# kernel, stride, padding, output_padding, dilation
# fmt: off
TRANSPOSED = [(2, 2, 0, 0, 1), (3, 2, 1, 1, 1), (4, 2, 1, 0, 1), (3, 1, 1, 0, 1), (3, 2, 0, 0, 1), (2, 3, 0, 0, 1),
              (1, 2, 0, 1, 1), (5, 3, 2, 2, 1), (3, 2, 2, 0, 2), ((2, 3), (2, 1), (0, 1), 0, 1), (3, 2, 3, 1, 1)]
# fmt: on


@pytest.mark.parametrize("geometry", TRANSPOSED, ids=str)
@pytest.mark.parametrize("name", MOSTLY)
def test_transposed_convolutions(name, geometry):
    kernel, stride, padding, more, dilation = geometry
    second = SFGConvTranspose2d(6, 4, kernel, stride, padding, more, 1, True, dilation, activation="relu")
    Chain(SFGConv2d(2, 6, 3, activation="relu", norm="batch"), second, MIXED, size=(8, 7)).check(name)


@pytest.mark.parametrize("name", EVERY)
def test_a_transposed_convolution_whose_padding_cuts_off_the_whole_image(name):
    """All that is left of the output is the bias, as in torch."""
    second = SFGConvTranspose2d(6, 4, 1, 1, (2, 0), (4, 0), dilation=5, activation="relu")
    Chain(SFGConv2d(2, 6, 3, activation="relu", norm="batch"), second, MIXED, size=(3, 7)).check(name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("which", ASSIGNMENTS)
@pytest.mark.parametrize("name", FAST)
def test_transposed_with_every_norm_and_assignment(name, which, norm):
    tasks, assignments = ASSIGNMENTS[which]
    how = {"norm": NORMS[norm], "activation": "leaky_relu", "tasks": tasks}
    first = SFGConvTranspose2d(2, 6, 2, 2, bias=False, **how)
    Chain(first, SFGConvTranspose2d(6, 4, 3, 2, 1, 1, **how), assignments, size=(4, 3)).check(name)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("name", MOSTLY)
def test_grouped_convolutions(name, norm, transposed):
    how = {"norm": NORMS[norm], "activation": "relu", "groups": 2}
    kind = SFGConvTranspose2d if transposed else SFGConv2d
    Chain(kind(2, 6, 3, padding=1, **how), kind(6, 4, 3, padding=1, bias=False, **how), MIXED).check(name)


@pytest.mark.parametrize("which", ["mixed", "an empty shared group", "one task", "three tasks"])
@pytest.mark.parametrize("own", [False, True], ids=["draw of the input", "own draw"])
@pytest.mark.parametrize("name", MOSTLY)
def test_depthwise_convolutions(name, own, which):
    tasks, (assignment, _) = ASSIGNMENTS[which]
    how = {"norm": "batch", "activation": "relu", "tasks": tasks}
    second = SFGConv2d(6, 6, 3, stride=2, padding=1, padding_mode="zeros", groups=6, **how)
    Chain(SFGConv2d(2, 6, 3, **how), second, (assignment, assignment[::-1] if own else None)).check(name)


@pytest.mark.skipif("triton" not in PACKED, reason="Triton is not there")
@pytest.mark.parametrize(
    "second",
    [
        lambda: SFGConvTranspose2d(6, 6, 3, 2, 1, 1, norm="instance", activation="leaky_relu"),
        lambda: SFGConv2d(6, 6, 3, groups=2, norm="batch", activation="relu"),
        lambda: SFGConv2d(6, 6, 3, groups=6, norm=NORMS["group"]),
    ],
    ids=["transposed", "grouped", "depthwise"],
)
def test_one_of_each_on_triton(second):
    assignments = (MIXED[0], (0, 1, 2, 0, 1, 1))
    Chain(SFGConv2d(2, 6, 3, norm="instance", activation="leaky_relu"), second(), assignments).check("triton")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("second", ["strided", "transposed", "depthwise", "dilated"])
@pytest.mark.parametrize("name", ["reference", "masked", "auto"])
def test_volumes(name, second, norm):
    how = {"norm": NORMS[norm], "activation": "leaky_relu"}
    made = {
        "strided": lambda: SFGConv3d(6, 4, (3, 1, 2), (2, 1, 2), (1, 0, 1), **how),
        "transposed": lambda: SFGConvTranspose3d(6, 4, (2, 2, 1), (2, 2, 1), **how),
        "depthwise": lambda: SFGConv3d(6, 6, 3, padding=1, groups=6, **how),
        "dilated": lambda: SFGConv3d(6, 4, 2, dilation=2, **how),
    }[second]()
    assignments = MIXED if second != "depthwise" else (MIXED[0], None)
    Chain(SFGConv3d(2, 6, 3, padding=1, **how), made, assignments, size=(4, 5, 6)).check(name)


@pytest.mark.parametrize("norm", [one for one in NORMS if one != "none"])
@pytest.mark.parametrize("name", EVERY)
def test_a_norm_behind_a_sum(name, norm):
    """F' = scale * F + z * shift: T+1 dense tensors and all gradients; z is a constant in z * shift."""
    torch.manual_seed(1)
    layer, after = SFGConv2d(2, 6, 3, activation="leaky_relu"), FeatureNorm(6, 3, NORMS[norm])
    for parameter in (*layer.parameters(), *after.parameters()):
        nn.init.normal_(parameter)
    x, z = torch.randn(2, 2, 6, 7), gates(MIXED[0], 2)
    leaves = [layer.weight, *after.parameters(), z]

    def gradients(out):
        torch.manual_seed(2)
        loss = sum((one * torch.randn(one.shape)).sum() for one in out)
        return [*out, *torch.autograd.grad(loss, leaves)]

    f = plainly(layer, [x] * 3, z)
    scale, shift = scale_and_shift(f, z.detach().argmax(1).tolist(), after.norm)
    expected = gradients([one * scale + shift * z.detach()[:, g, None, None] for g, one in enumerate(f)])
    with backend(name):
        found = gradients(list(after(layer(x, drawn(z, 2)))))
    for n, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(one, other, 1e-9, str(n))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", ["instance", "group", "layer", "transposed", "grouped", "depthwise"])
@pytest.mark.parametrize("name", FAST)
def test_every_estimator_learns_as_by_dense_masking(name, kind, estimator):
    """The same draws, outputs and gradients of all parameters and logits, with the oracles of reference.py."""
    how = {"estimator": estimator, "activation": "leaky_relu", "padding": 1}
    first = {"norm": NORMS.get(kind, "batch"), **how}
    second = {
        "transposed": lambda: SFGConvTranspose2d(6, 4, 3, 2, **how),
        "grouped": lambda: SFGConv2d(6, 4, 3, groups=2, **how),
        "depthwise": lambda: SFGConv2d(6, 6, 3, groups=6, norm="batch", **how),
    }.get(kind, lambda: SFGConv2d(6, 4, 3, **first))
    found = []
    for backend_name in (name, "reference"):
        torch.manual_seed(0)
        net = nn.Sequential(SFGConv2d(2, 6, 3, **first), second())
        for key, parameter in net.named_parameters():
            if key.endswith("norm.bias"):  # a group of one kernel has nothing else behind a layer norm: no ReLU at 0
                nn.init.normal_(parameter)
        x = torch.randn(2, 2, 7, 6)
        torch.manual_seed(1)
        with backend(backend_name):
            features = net[0](x)
            out = net[1](features, features.groups if kind == "depthwise" else None)
            sum((one * torch.linspace(-1, 1, one.numel()).view(one.shape)).sum() for one in out).backward()
        gradients = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        found.append({**{f"output {n}": one for n, one in enumerate(out)}, **gradients})
    assert found[0].keys() == found[1].keys()
    for key, one in found[1].items():
        assert_close(found[0][key], one, 1e-9, key, scale=1.0)


@pytest.mark.parametrize("name", EVERY)
def test_eval_does_what_training_does_for_norms_of_each_image(name):
    torch.manual_seed(0)
    for norm in ("instance", "group", "layer"):
        layer = SFGConv2d(2, 6, 3, norm=NORMS[norm], activation="leaky_relu")
        layer.assign(MIXED[0])
        x = torch.randn(2, 2, 8, 7)
        with backend(name), torch.no_grad():
            trained, evaluated = list(layer(x)), list(layer.eval()(x))
        assert all(torch.equal(*pair) for pair in zip(trained, evaluated, strict=True)), norm


def test_a_task_does_not_see_the_kernels_of_another_through_a_norm_over_channels():
    """What task a reads stays the same to the bit, whatever the kernels of task b are."""
    torch.manual_seed(0)
    for norm in ("group", "layer"):
        layer = SFGConv2d(2, 6, 3, norm=NORMS[norm], tasks=("a", "b"))
        layer.assign(MIXED[0])
        x = torch.randn(2, 2, 8, 7)
        with torch.no_grad():
            before = layer(x)
            layer.weight[[k for k, group in enumerate(MIXED[0]) if group == 2]] += 1.0
            after = layer(x)
        assert torch.equal(before.merged("a"), after.merged("a"))
        assert not torch.equal(before.merged("b"), after.merged("b"))


@pytest.mark.parametrize("name", EVERY)
def test_one_position_has_no_variance(name):
    message = "instance normalisation needs more than one position in an image, got one"
    with backend(name), pytest.raises(ValueError, match=message):
        SFGConv2d(2, 6, 1, norm="instance")(torch.randn(3, 2, 1, 1))


def test_layers_of_three_dimensions_run_where_they_can():
    layer, x, z = SFGConv3d(1, 4, 3), torch.randn(1, 1, 5, 5, 5), gates((0, 1, 2, 0), 2)
    for found, expected in zip(layer(x, drawn(z, 2)), plainly(layer, [x] * 3, z), strict=True):
        assert_close(found, expected, 1e-10)
    with backend("native"), pytest.raises(RuntimeError, match="5 dimensions, the native kernels take images"):
        layer(x)
    with pytest.raises(ValueError, match=r"shape \(1, 5, 5, 5\), expected \[N, 1, D, H, W\]; of one image: x\[None\]"):
        layer(x[0])


@pytest.mark.parametrize("norm", ["instance", "instance without affine", "group", "layer"])
@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch_has_no_features_and_gradients_of_zero(name, norm):
    layer = SFGConv2d(2, 6, 3, norm=NORMS[norm], activation="leaky_relu")
    with backend(name):
        features = layer(torch.randn(0, 2, 6, 5))
        task = features.merged(1)
        task.sum().backward()
    assert task.shape == (0, 6, 4, 3)
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("kind", ["depthwise", "grouped", "of an image"])
@pytest.mark.parametrize("name", EVERY)
def test_grouped_convolutions_under_autocast(name, kind):
    """The output is that in float32, within the precision of bfloat16, and every parameter gets a gradient."""
    torch.manual_seed(0)
    how = {"norm": "batch", "activation": "relu", "dtype": torch.float32}
    first = SFGConv2d(2, 6, 3, **how)
    second = SFGConv2d(6, 6, 3, groups={"depthwise": 6, "grouped": 2, "of an image": 2}[kind], **how)
    x = torch.randn(2, 2 if kind != "of an image" else 6, 9, 8, dtype=torch.float32)
    found = []
    for on in (False, True):
        with backend(name), torch.autocast("cpu", torch.bfloat16, enabled=on):
            z = [drawn(gates(MIXED[0], 2).float(), 2) for _ in range(2)]
            features = x if kind == "of an image" else first(x, z[0])
            y = second(features, features.groups if kind == "depthwise" else z[1])
            found.append(torch.cat(list(y), 1).float())
    found[1].square().sum().backward()
    assert_close(found[1], found[0], 0.1, kind)
    assert second.weight.grad is not None
    assert second.weight.grad.isfinite().all()


def test_the_output_of_a_transposed_layer_has_torchs_size():
    for geometry in TRANSPOSED:
        kernel, stride, padding, more, dilation = geometry
        given = (2, 4, kernel, stride, padding, more, 1, True, dilation)
        x = torch.randn(1, 2, 8, 7)
        assert SFGConvTranspose2d(*given)(x).shape == nn.ConvTranspose2d(*given)(x).shape
    with pytest.raises(RuntimeError, match="the output would have size"):
        SFGConvTranspose2d(2, 4, 1, 1, 2)(torch.randn(1, 2, 3, 3))


def test_the_weights_of_torchs_layers_fit():
    for kind, plain in ((SFGConvTranspose2d, nn.ConvTranspose2d), (SFGConv3d, nn.Conv3d)):
        layer, of_torch = kind(2, 4, 3), plain(2, 4, 3)
        found = layer.load_state_dict(of_torch.state_dict(), strict=False)
        assert not found.unexpected_keys
        layer.assign([0] * 4)
        x = torch.randn(1, 2, *[6] * layer.dims)
        assert_close(layer(x).merged(0), of_torch(x), 1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_rows_that_read_nothing_are_exactly_the_shift_of_an_instance_norm(name):
    """There is no bias in front of the norm, whose rounding errors the norm would multiply by 300. Biases have
    gradients of zeros."""
    torch.manual_seed(0)
    first, second = (SFGConv2d(4, 4, 3, norm="instance") for _ in range(2))
    first.assign([1, 1, 1, 1])
    second.assign([1, 2, 0, 1])  # nothing is in group 2 or 0
    for layer in (first, second):
        nn.init.normal_(layer.bias, 3.0), nn.init.normal_(layer.norm.bias)
    with backend(name):
        out = second(first(torch.randn(2, 4, 9, 7)))
        dense = list(out)
        sum(one.square().sum() for one in dense).backward()
    for kernel, group in ((1, 2), (2, 0)):
        found = dense[group][:, kernel]
        assert torch.equal(found, second.norm.bias[kernel].expand_as(found))
    assert all(layer.bias.grad is not None and not layer.bias.grad.any() for layer in (first, second))
