"""The profile counts what an operation needs, and leaves the kernels as they were."""

import pytest
import torch
from sfg_fast.kernels.spec import Geometry, RoutedConv, UndrawnFormula
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import profile_networks
from benchmarks.networks import Case, contestant
from sfg_fast.backends import available
from sfg_fast.groups import FilterGroups, Routing

pytestmark = pytest.mark.skipif(not available("native"), reason="the native kernels are not built")


def test_flops_are_those_of_the_convolutions_that_are_left():
    """Group by group, against torch's own count."""
    out, into = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 2])
    rows, columns = (FilterGroups.from_assignment(side, all_gates=True) for side in (out, into))
    spec = RoutedConv(rows, columns, Routing.ARROW, Geometry((1, 2), (1, 0), (1, 1)))
    x, weight = torch.randn(2, 5, 7, 9), torch.randn(6, 5, 3, 3)
    packed = profile_networks.cpu.pack(weight, None, spec, x.dtype)
    y, kept_product = profile_networks.cpu.forward(x, packed, spec, keep_product=True)

    def counted(pairs):
        with FlopCounterMode(display=False) as counter:
            for k, c in pairs:
                F.conv2d(x[:, :c], weight[:k, :c], None, *spec.geometry)
        return counter.get_total_flops()

    read = counted([(2, 1), (1, 4), (3, 2)])
    formula = UndrawnFormula(x, kept_product, packed, spec, None, None, "relu")
    given = {"packed": packed, "spec": spec}
    assert profile_networks.flops("forward", {**given, "x": x}) == read
    assert profile_networks.flops("weight_gradient", {**given, "x": x, "dy": y}) == read
    assert profile_networks.flops("input_gradient", {**given, "dy": y}) == counted([(6, 5)])
    # Rows outside a task's group with its columns: 5 x 3 and 3 x 1.
    assert profile_networks.flops("gate_gradient", {"formula": formula, "dundrawn": y}) == counted([(5, 3), (3, 1)])
    assert profile_networks.flops("normalise", {"u": x}) == 0


def test_a_step_is_timed_and_left_as_it_was():
    case = Case("vgg", 32, batch=1, widths=(2, 4, 4))
    step, before = contestant(case, "straight_through"), profile_networks.cpu.forward
    with profile_networks.Profile() as profile:
        step()
    assert profile_networks.cpu.forward is before
    assert profile.found["forward"][0] == profile.found["weight_gradient"][0] == 8
    for name in ("forward", "weight_gradient", "gate_gradient", "normalise"):
        calls, seconds, work, moved = profile.found[name]
        assert calls > 0
        assert seconds > 0
        assert moved > 0
        assert (work > 0) == (name != "normalise")
    images = profile_networks.image_bytes("normalise", {"u": torch.zeros(1, 2, 3, 4)}, torch.zeros(1, 2, 3, 4))
    assert images == 2 * 24 * 4
