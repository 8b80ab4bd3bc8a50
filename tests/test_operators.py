"""The registered operators: what a compiled graph sees of the routed convolution."""

import pytest
import torch
from sfg_fast.kernels.spec import Geometry, RoutedConv

from sfg_fast import backend
from sfg_fast.backends import available
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.routed_conv import routed_conv, routed_conv_expanded

BACKENDS = ["masked"] + ["native"] * available("native") + ["triton"] * available("triton")
KINDS = ["packed", "expanded", "expanded rows", "relaxed", "image"]


def problem(kind):
    """x, weight, bias, spec: 5 channels, 4 kernels, two tasks; stride 2 down."""
    into, out = torch.tensor([1, 0, 2, 2, 0]), torch.tensor([2, 2, 0, 1])
    gates_in, gates_out = (torch.nn.functional.one_hot(side, 3).float() for side in (into, out))
    columns = {
        "packed": FilterGroups.from_assignment(into),
        "expanded": FilterGroups.expanded(into, gates_in, 2),
        "expanded rows": FilterGroups.from_assignment(into),
        "relaxed": FilterGroups.streams(5, 2),
        "image": FilterGroups.blocks([5], ("image",)),
    }[kind]
    if kind == "packed":
        rows = FilterGroups.from_assignment(out)
    elif kind == "relaxed":
        rows = FilterGroups.relaxed(gates_out, 2)
    else:
        rows = FilterGroups.expanded(out, gates_out, 2)
    x = torch.randn(2, len(columns.order), 6, 5)
    if kind == "expanded":
        x = x * gates_in.t().reshape(-1)[:, None, None]
    routing = Routing.ALL if kind == "image" else Routing.ARROW
    spec = RoutedConv(rows, columns, routing, Geometry((2, 1), (1, 1), (1, 1)))
    return x.requires_grad_(), torch.randn(4, 5, 3, 3).requires_grad_(), torch.randn(4).requires_grad_(), spec


def run(x, weight, bias, spec, relu):
    if spec.rows.drawn is None:
        return routed_conv(x, weight, bias, spec, relu)
    return routed_conv_expanded(x, weight, bias, spec, relu)[0]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relu", [False, True])
def test_a_compiled_graph_gives_the_same(name, kind, relu):
    *leaves, spec = problem(kind)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *leaves: run(*leaves, spec, relu), fullgraph=True, backend="aot_eager")
    with backend(name):
        results = [call(*leaves) for call in (lambda *leaves: run(*leaves, spec, relu), compiled)]
    dy = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(result, leaves, dy) for result in results]
    for a, b in zip((results[0], *gradients[0]), (results[1], *gradients[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(name, kind):
    """Schema, fake tensors and autograd registration, as torch's own checker sees them."""
    x, weight, bias, spec = problem(kind)
    folder = {"masked": "masked", "native": "cpu", "triton": "triton"}[name]
    sides = []
    for groups in (spec.rows, spec.columns):
        drawn = groups.drawn
        sides += [groups.order, groups.offsets]
        sides += [torch.empty(0, dtype=torch.int64)] * 2 if drawn is None else [drawn.order, drawn.offsets]
    sizes, numbers = [3, 4, len(spec.columns.names), 5], [2, 1, 1, 1, 1, 1]
    arguments = (x, weight, bias, None, sides, sizes, numbers, spec.routing.value, name != "masked", folder)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.sfg_fast.routed_conv.default, arguments, test_utils=tests)
