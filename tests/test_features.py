"""`SFGFeatures` and `FilterGroups`: the packed tensor and its dense forms."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from sfg_fast import FilterGroups, SFGConv2d, SFGConv3d, SFGFeatures, backend
from sfg_fast.groups import Routing
from sfg_fast.reference import DenseFeatures
from tests.backends import EVERY
from tests.oracle import assert_close


def features(estimator="straight_through"):
    layer = SFGConv2d(1, 5, 3, tasks=["ct", "organs"], estimator=estimator)
    return layer, layer(torch.randn(2, 1, 6, 6))


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "none"])
def test_list_is_the_dense_tensors_shared_first(estimator):
    _, y = features(estimator)
    dense = list(y)
    assert len(dense) == len(y) == 3
    for group, name in enumerate(("shared", "ct", "organs")):
        assert torch.equal(dense[group], y.dense(group))
        assert torch.equal(dense[group], y.dense(name))
        assert torch.equal(dense[group], y[group])
        assert dense[group].shape == y.shape == (2, 5, 4, 4)
    torch.testing.assert_close(y.merged("ct"), dense[1] + dense[0])
    assert torch.equal(y.merged("shared"), dense[0])


def test_own_routing_is_merged_already():
    _, y = features()
    merged = SFGFeatures(y.packed, y.groups, Routing.OWN)
    assert torch.equal(merged.merged("ct"), y.dense("ct"))


@pytest.mark.parametrize("group", [3, -1, "ct scan"])
def test_unknown_group(group):
    with pytest.raises(ValueError, match="unknown"):
        features()[1].dense(group)


def test_addition_needs_one_grouping():
    layer, y = features()
    other = SFGConv2d(1, 5, 3, tasks=["ct", "organs"])
    x = torch.randn(2, 1, 6, 6)
    same = other(x, groups=y.groups)
    total = y + same
    for group in range(3):
        torch.testing.assert_close(total.dense(group), y.dense(group) + same.dense(group))
    layer.assign([0, 0, 1, 1, 2])
    other.assign([0, 0, 1, 2, 2])
    with pytest.raises(ValueError, match="different groupings"):
        layer(x) + other(x)
    other.assign([0, 0, 1, 1, 2])
    layer(x) + other(x)  # equal by value is enough
    with backend("reference"):
        other.assign([0, 0, 1, 2, 2])
        with pytest.raises(ValueError, match="different groupings"):
            layer(x) + other(x)


def test_nan_of_one_task_stays_there():
    layer = SFGConv2d(1, 3, 1)
    layer.assign([0, 1, 2])
    with torch.no_grad():
        layer.bias[1] = torch.nan
    y = layer(torch.randn(1, 1, 2, 2))
    assert y.merged(1).isnan().any()
    assert not y.merged(2).isnan().any()


@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "none"])
def test_pytree_round_trip(estimator):
    _, y = features(estimator)
    leaves, spec = pytree.tree_flatten(y)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if leaf is not None)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.groups.same_as(y.groups)
    for a, b in zip(again, y, strict=True):
        assert torch.equal(a, b)


def test_conversion_acts_on_every_tensor():
    _, y = features()
    half = y.to(torch.bfloat16)
    assert half.packed.dtype == half.groups.gates.dtype == torch.bfloat16
    assert half.groups.order.dtype == torch.int64
    assert half.float().packed.dtype == torch.float32
    away = y.detach()
    assert not away.packed.requires_grad
    assert not away.groups.gates.requires_grad
    assert y.packed.requires_grad
    meta = y.to("meta")
    assert {t.device.type for t in pytree.tree_leaves(meta) if isinstance(t, torch.Tensor)} == {"meta"}


def test_features_are_immutable():
    with pytest.raises(AttributeError):
        features()[1].packed = torch.zeros(1)


def test_filter_groups_from_an_assignment():
    groups = FilterGroups.from_assignment([2, 0, 1, 0, 2], ["ct", "organs"])
    assert groups.order.tolist() == [1, 3, 2, 0, 4]
    assert groups.offsets.tolist() == [0, 2, 3, 5]
    assert groups.ids.tolist() == [0, 0, 1, 2, 2]
    assert groups.tasks == ("ct", "organs")


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        (Routing.ARROW, [[1, 0, 0], [1, 1, 0], [1, 0, 1]]),
        (Routing.OWN, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (Routing.ALL, [[1], [1], [1]]),
    ],
)
def test_routing(routing, expected):
    assert [list(map(int, row)) for row in routing.reads(3, len(expected[0]))] == expected


# --- what plain code may do, against dense masking written out --------------------------------------------------------

NAMES = ("p", "q", "r")
WITH_PLAIN = {  # what is done to features of 5 kernels; the same with a dense tensor of a group and its gates z
    "of the shared group": (
        lambda f, x, p: torch.cat([f, f.as_shared(x)], 1),
        lambda f, x, p, z, group: torch.cat([f, x * (group == 0)], 1),
    ),
    "plus a tensor": (lambda f, x, p: f + p["wide"], lambda f, x, p, z, group: f + z.detach() * p["wide"]),
    "a tensor plus": (lambda f, x, p: p["wide"] + f, lambda f, x, p, z, group: f + z.detach() * p["wide"]),
    "plus a channel": (lambda f, x, p: f + x[:, :1], lambda f, x, p, z, group: f + z.detach() * x[:, :1]),
    "plus a number": (lambda f, x, p: f + 0.7, lambda f, x, p, z, group: f + z.detach() * 0.7),
    "times a tensor": (lambda f, x, p: f * p["wide"], lambda f, x, p, z, group: f * p["wide"]),
    "times one of each kernel": (lambda f, x, p: p["each"] * f, lambda f, x, p, z, group: f * p["each"]),
    "times a channel": (lambda f, x, p: f * x[:, :1], lambda f, x, p, z, group: f * x[:, :1]),
    "some kernels": (lambda f, x, p: f.take([3, 0, 4]), lambda f, x, p, z, group: f[:, [3, 0, 4]]),
    "a shuffle": (lambda f, x, p: f.take([4, 2, 0, 1, 3]), lambda f, x, p, z, group: f[:, [4, 2, 0, 1, 3]]),
    "taken and joined": (
        lambda f, x, p: torch.cat([f.take([1, 0]), f.take([4, 3]) * 2], 1),
        lambda f, x, p, z, group: torch.cat([f[:, [1, 0]], f[:, [4, 3]] * 2], 1),
    ),
    "slopes": (
        lambda f, x, p: F.prelu(f, p["each"].flatten()),
        lambda f, x, p, z, group: F.prelu(f, p["each"].flatten()),
    ),
    "one slope": (
        lambda f, x, p: torch.prelu(f, p["each"].flatten()[:1]),
        lambda f, x, p, z, group: F.prelu(f, p["each"].flatten()[:1]),
    ),
    "mean over positions": (
        lambda f, x, p: torch.mean(f, tuple(range(2, f.dim())), keepdim=True),
        lambda f, x, p, z, group: f.mean(tuple(range(2, f.dim())), keepdim=True),
    ),
    "padded": (
        lambda f, x, p: F.pad(f, [1, 0] * (f.dim() - 2)),
        lambda f, x, p, z, group: F.pad(f, [1, 0] * (f.dim() - 2)),
    ),
    "joined by a negative number": (
        lambda f, x, p: torch.cat([f, f * 2], 1 - f.dim()),
        lambda f, x, p, z, group: torch.cat([f, f * 2], 1),
    ),
    "times streams": (
        lambda f, x, p: f * streams_of(f, p["streams"]),
        lambda f, x, p, z, group: f * p["streams"][group],
    ),
    "times streams of one channel": (
        lambda f, x, p: f * streams_of(f, p["planes"]),
        lambda f, x, p, z, group: f * p["planes"][group],
    ),
}  # fmt: skip


def streams_of(like, tensors):
    """A tensor for each group, as features of the backend in force."""
    kind = SFGFeatures if isinstance(like, SFGFeatures) else DenseFeatures
    groups = FilterGroups.streams(tensors[0].shape[1], like.groups.tasks)
    return kind(torch.cat(list(tensors), 1) if kind is SFGFeatures else tensors, groups, Routing.OWN)


@pytest.mark.parametrize(("tasks", "dims"), [(1, 2), (2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("estimator", ["straight_through", "gumbel_softmax", "selected"])
@pytest.mark.parametrize("what", WITH_PLAIN)
def test_features_as_by_masks_written_out(what, estimator, tasks, dims, float64):
    """Values, and all gradients: of the layer before and behind, its logits, and of what is plain. `dims`: 3 for
    volumes."""
    torch.manual_seed(0)
    on_features, on_tensors = WITH_PLAIN[what]
    layer, plain, names = {2: (SFGConv2d, F.conv2d, EVERY), 3: (SFGConv3d, F.conv3d, ("reference", "masked"))}[dims]
    first = layer(1, 5, 3, tasks=NAMES[:tasks], estimator=estimator, activation="relu")
    size, one = (4, 3, 2)[:dims], (1,) * dims
    x = torch.randn(2, 2, *size, requires_grad=True)
    p = {"wide": torch.randn(2, 5, *size), "each": torch.rand(1, 5, *one),
         "streams": torch.randn(tasks + 1, 2, 5, *one),
         "planes": torch.randn(tasks + 1, 2, 1, *size)}  # fmt: skip
    for tensor in p.values():
        tensor.requires_grad_()
    image, found = torch.randn(2, 1, *(length + 2 for length in size)), []
    with torch.no_grad():
        width = on_features(first(image), x, p).shape[1]
    second = layer(width, 4, 1, tasks=NAMES[:tasks], estimator=estimator)
    parameters = [*first.parameters(), *second.parameters(), x, *p.values()]
    weights = [torch.randn(2, 4, *one) for _ in range(tasks)]
    for name in names:
        torch.manual_seed(1)
        with backend(name):
            features = on_features(first(image), x, p)
            y = second(features)
            total = sum((w * y.merged(task).square()).sum() for w, task in zip(weights, NAMES, strict=False))
            found.append((total, torch.autograd.grad(total, parameters, allow_unused=True)))
    torch.manual_seed(1)
    z = first.draw().gates
    h = plain(image, first.weight, first.bias).relu()
    gates = [z[:, g].view(-1, *one) for g in range(tasks + 1)]
    dense = [on_tensors(h * gate, x, p, gate, g) for g, gate in enumerate(gates)]
    read = [dense[0], *(one + dense[0] for one in dense[1:])]
    z = second.draw().gates
    y = [plain(each, second.weight, second.bias) * z[:, g].view(-1, *one) for g, each in enumerate(read)]
    total = sum((w * (one + y[0]).square()).sum() for w, one in zip(weights, y[1:], strict=True))
    expected = total, torch.autograd.grad(total, parameters, allow_unused=True)
    for name, (value, gradients) in zip(names, found, strict=True):
        assert_close(value, expected[0], what=name)
        for parameter, a, b in zip(parameters, gradients, expected[1], strict=True):
            wanted = torch.zeros_like(parameter) if b is None else b
            assert_close(a, wanted, what=f"{name} {tuple(parameter.shape)}")


@pytest.mark.parametrize("kind", ["packed", "reference"])
def test_what_features_can_not_be_joined_with(kind):
    _, y = features()
    if kind == "reference":
        y = DenseFeatures(list(y), y.groups)
    with pytest.raises(ValueError, match=r"a tensor \(2, 4, 4, 4\) meets features \(2, 5, 4, 4\), expected the same"):
        y + torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r"a tensor \(5,\) meets features"):
        y * torch.zeros(5)
    with pytest.raises(ValueError, match="A product of two features has two gates"):
        y * y
    with pytest.raises(ValueError, match=r"kernels=\[0, 0\]: expected some of 0 to 4, each once"):
        y.take([0, 0])
    with pytest.raises(ValueError, match=r"kernels=\[5\]: expected"):
        y.take([5])
    with pytest.raises(ValueError, match="what would a task read of it"):
        type(y)(y.packed.repeat(1, 3, 1, 1) if kind == "packed" else list(y), FilterGroups.streams(5, 2)) + 1
    with pytest.raises(ValueError, match=r"a tensor \(4, 4\) can't be features, expected \[N, C, H, W\]"):
        y.as_shared(torch.zeros(4, 4))
    with pytest.raises(TypeError, match=r"expected dim=\(2, 3\), keepdim=True"):
        torch.mean(y, 1, keepdim=True)
    with pytest.raises(TypeError, match="can only be added and multiplied as they are"):
        torch.add(y, y, alpha=2)
