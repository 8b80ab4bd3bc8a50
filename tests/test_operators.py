"""The registered operators: what a compiled graph sees of the routed convolution."""

import pytest
import torch
from sfg_fast.kernels.spec import Geometry, RoutedConv
from torch import library

from sfg_fast import backend
from sfg_fast.backends import load
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.routed_conv import convolve, routed_conv
from tests.backends import PACKED

KINDS = ["packed", "undrawn", "undrawn rows", "relaxed", "image"]


def problem(kind):
    """x, undrawn, weight, bias, spec: 5 channels, 4 kernels, two tasks; stride 2 down."""
    into, out = torch.tensor([1, 0, 2, 2, 0]), torch.tensor([2, 2, 0, 1])
    columns = FilterGroups.from_assignment(into, all_gates=kind == "undrawn")
    rows = FilterGroups.from_assignment(out, all_gates=kind != "packed")
    routing = Routing.ARROW
    if kind == "relaxed":
        columns, rows = FilterGroups.streams(5, 2), FilterGroups.relaxed(rows.gates, 2)
    if kind == "image":
        columns, routing = FilterGroups.blocks([5], ("image",)), Routing.ALL
    x = torch.randn(2, len(columns.order), 6, 5)
    undrawn = x.new_zeros(()).expand(2, 2 * 5, 6, 5).requires_grad_() if columns.all_gates else None
    spec = RoutedConv(rows, columns, routing, Geometry((2, 1), (1, 1), (1, 1)))
    return x.requires_grad_(), undrawn, torch.randn(4, 5, 3, 3).requires_grad_(), torch.randn(4).requires_grad_(), spec


def run(x, undrawn, weight, bias, spec, relu):
    """u, and the kept product."""
    if not spec.rows.all_gates:
        return routed_conv(x, weight, bias, spec, relu, undrawn=undrawn), torch.empty(0)
    u, rows, *_ = convolve(x, weight, bias, spec, relu, undrawn=undrawn, keep_product=True)
    return u, rows.kept_product


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [False, True])
def test_a_compiled_graph_gives_the_same(name, kind, relu):
    *leaves, spec = problem(kind)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *leaves: run(*leaves, spec, relu), fullgraph=True, backend="aot_eager")
    with backend(name):
        results = [call(*leaves) for call in (lambda *leaves: run(*leaves, spec, relu), compiled)]
    dy = torch.randn_like(results[0][0])
    inputs = [leaf for leaf in leaves if leaf is not None]
    gradients = [torch.autograd.grad(u, inputs, dy) for u, _ in results]
    for a, b in zip((*results[0], *gradients[0]), (*results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(name, kind):
    """Schema, fake tensors and autograd registration, as torch's own checker sees them."""
    x, undrawn, weight, bias, spec = problem(kind)
    folder = load(name).__name__.rsplit(".", 1)[1]
    sides = [spec.rows.order, spec.rows.offsets, spec.columns.order, spec.columns.offsets]
    sizes, numbers = [3, 4, len(spec.columns.names), 5], [2, 1, 1, 1, 1, 1]
    fused, keep_product = name != "masked", kind in ("undrawn", "undrawn rows")
    arguments = (x, undrawn, weight, bias, None, sides, sizes, numbers, spec.routing.value, fused, keep_product, folder)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    library.opcheck(torch.ops.sfg_fast.routed_conv.default, arguments, test_utils=tests)
