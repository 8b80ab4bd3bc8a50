"""`SFGFeatures` and `FilterGroups`: the packed tensor and its dense forms."""

import pytest
import torch
from torch.utils import _pytree as pytree

from sfg_fast import FilterGroups, SFGConv2d, SFGFeatures, backend
from sfg_fast.groups import Routing


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
