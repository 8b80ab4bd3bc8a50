"""The one operation on every backend, against dense masking written plainly in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sfg_fast.kernels import masked
from sfg_fast.kernels.spec import Geometry
from torch.utils.flop_counter import FlopCounterMode

from sfg_fast import backend
from sfg_fast.backends import available
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.routed_conv import RoutedConv, convolve, routed_conv
from tests.backends import FAST, PACKED
from tests.oracle import assert_close
from tests.problems import ConvProblem


def check_undrawn(rows, u, random):
    """u of the undrawn rows, and <dF, act(scale * u + shift)> of each. u: [N, T, rows, H, W], as they should be."""
    for n, found in enumerate(masked.undrawn_rows(rows.formula(None, None, None, masked))):
        assert_close(found, u[:, n], what="undrawn rows")
    images, groups, kernels = u.shape[:3]
    shapes = None, (1, groups), (images, 1), (images, groups)  # alike for all images, for all groups, for none
    for shape in shapes:
        affine = (None, None) if shape is None else tuple(random(*shape, kernels, 1, 1) for _ in range(2))
        for activation in rows.run.kernels.KNOWS:
            h = u if shape is None else u * affine[0] + affine[1]
            if activation is not None:
                h = h.clamp_min(0) + (0.01 * h.clamp_max(0) if activation == "leaky_relu" else 0)
            if activation == "relu_pool":
                if min(u.shape[3:]) < 2:
                    continue
                h = h.unfold(3, 2, 2).unfold(4, 2, 2).amax((5, 6))
            df = random(*h.shape)
            dz = rows.run.kernels.gate_gradient(rows.formula(*affine, activation), df.flatten(1, 2))
            assert_close(dz, (df * h).sum((0, 3, 4)), what="gates")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(ConvProblem):
    """An SFG layer. `columns`: "packed", "with undrawn" (their undrawn gates want a gradient) or "streams"; `rows`:
    "packed", "with undrawn" or "relaxed". `shortcut`: is there one around the convolution?"""

    tasks: int = 2
    channels: int
    kernels: int
    routing: Routing
    columns: str
    rows: str
    shortcut: bool


@st.composite
def problems(draw):
    """Any T, group sizes (odd and empty come by themselves), kernel size, stride, padding, dilation, routing."""
    tasks = draw(st.integers(1, 4))
    size = tuple(draw(st.sampled_from([1, 2, 3, 5])) for _ in range(2))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(2))
    image = tuple(d * (s - 1) + draw(st.integers(1, 9)) for d, s in zip(dilation, size, strict=True))
    return Problem(
        tasks=tasks,
        channels=draw(st.integers(1, 7)),
        kernels=draw(st.integers(1, 9)),
        kernel=size,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(2)),
        padding=tuple(draw(st.integers(0, 2)) for _ in range(2)),
        dilation=dilation,
        image=image,
        batch=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        routing=draw(st.sampled_from(list(Routing))),
        columns=draw(st.sampled_from(["packed", "with undrawn", "streams"])),
        rows=draw(st.sampled_from(["packed", "with undrawn", "relaxed"])),
        shortcut=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def check(problem, name):
    """Forward and every gradient of `routed_conv` against T+1 dense convolutions."""
    p, groups = problem, problem.tasks + 1
    generator, random = p.numbers()

    def assignment(width):
        return torch.randint(groups, (width,), generator=generator)

    into, out = assignment(p.channels), assignment(p.kernels)
    onehot_out = F.one_hot(out, groups).to(torch.float64)
    if p.routing is Routing.ALL:
        columns = FilterGroups.blocks([p.channels], ("image",))
        everything = random(p.batch, p.channels, *p.image).requires_grad_()
        drawn, dense = slice(None), [everything] * groups
    else:
        columns = FilterGroups.streams(p.channels, p.tasks)
        if p.columns != "streams":
            columns = FilterGroups.from_assignment(into, p.tasks, all_gates=p.columns == "with undrawn")
        drawn = columns.rows_in_streams
        everything = torch.zeros(p.batch, groups * p.channels, *p.image, dtype=torch.float64)
        everything[:, drawn] = random(p.batch, len(drawn), *p.image)  # undrawn rows are zero
        everything.requires_grad_()
        dense = list(everything.split(p.channels, 1))
        if p.routing is Routing.ARROW:
            dense = [dense[0]] + [task + dense[0] for task in dense[1:]]
    rows = FilterGroups.relaxed(onehot_out, p.tasks)
    if p.rows != "relaxed":
        rows = FilterGroups.from_assignment(out, p.tasks, onehot_out, all_gates=p.rows == "with undrawn")
    weight = random(p.kernels, p.channels, *p.kernel).requires_grad_()
    bias = random(p.kernels).requires_grad_() if p.bias else None
    parameters = [leaf for leaf in (weight, bias) if leaf is not None]

    u = torch.cat([F.conv2d(d, weight, bias, *p.geometry) for d in dense], 1)
    expected = u[:, rows.rows_in_streams]
    dy = random(*expected.shape)
    dx, *wanted = torch.autograd.grad(expected, [everything, *parameters], dy)

    spec = RoutedConv(rows, columns, p.routing, p.geometry)
    x = everything.detach()[:, drawn].requires_grad_()
    undrawn = None
    if columns.all_gates:
        of_columns = columns.undrawn_groups * columns.width + columns.order
        undrawn = x.new_zeros(()).expand(p.batch, of_columns.numel(), *p.image).requires_grad_()
        wanted.append(dx[:, of_columns.flatten()])
    with backend(name):
        found = convolve(x, weight, bias, spec, undrawn=undrawn, keep_product=rows.all_gates, shortcut=p.shortcut)
        if rows.all_gates:
            of_rows = rows.undrawn_groups * rows.width + rows.order
            check_undrawn(found.undrawn_rows, u.detach()[:, of_rows.flatten()].unflatten(1, of_rows.shape), random)
    inputs = [x, *parameters] + ([] if undrawn is None else [undrawn])
    assert_close(found.u, expected, what="u")
    # A shortcut around the convolution: what comes back that way is added.
    past = random(*x.shape)
    outputs, gradients, wanted = [found.u, found.x], [dy, past], [dx[:, drawn] + past, *wanted]
    if undrawn is not None:
        outputs, gradients = [*outputs, found.undrawn], [*gradients, random(*undrawn.shape)]
        wanted[-1] = wanted[-1] + gradients[-1]
    names = [*["input", "weight", "bias"][: 1 + len(parameters)], "undrawn"]
    for what, a, b in zip(names, torch.autograd.grad(outputs, inputs, gradients), wanted, strict=False):
        assert_close(a, b, what=f"gradient of the {what}")


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=120)
@given(problem=problems())
def test_against_dense_masking(name, problem):
    check(problem, name)


@pytest.mark.skipif(not available("triton"), reason="Triton is not installed")
@pytest.mark.parametrize("columns", ["packed", "with undrawn", "streams"])
@pytest.mark.parametrize(
    ("rows", "routing", "tasks", "geometry"),  # kernel size, stride, padding, dilation
    [
        ("packed", Routing.ARROW, 1, ((3, 2), (2, 1), (1, 0), (1, 2))),
        ("relaxed", Routing.ARROW, 1, ((1, 1), (1, 1), (0, 0), (2, 2))),
        ("relaxed", Routing.OWN, 2, ((2, 3), (2, 2), (2, 1), (2, 3))),
        ("with undrawn", Routing.ARROW, 3, ((1, 5), (1, 3), (0, 2), (1, 1))),
        ("with undrawn", Routing.OWN, 4, ((1, 1), (1, 1), (0, 0), (1, 1))),
        ("with undrawn", Routing.ALL, 4, ((2, 1), (3, 2), (1, 0), (3, 1))),
    ],
)
def test_triton_against_dense_masking(rows, columns, routing, tasks, geometry):
    """The interpreter takes up to a second for each: `make test-all` has random ones."""
    geometry = dict(zip(("kernel", "stride", "padding", "dilation"), geometry, strict=True))
    sides = {"rows": rows, "columns": columns, "routing": routing, "tasks": tasks, "channels": 5, "kernels": 4}
    more = {"bias": tasks > 2, "shortcut": tasks % 2 == 0}
    check(Problem(**geometry, **sides, **more, image=(6, 7), batch=1), "triton")


@pytest.mark.parametrize(
    ("name", "shortcut"),
    [
        # On Triton without a shortcut: test_triton_against_dense_masking.
        pytest.param(name, shortcut, marks=[pytest.mark.slow] if name == "triton" and not shortcut else [])
        for name in PACKED
        for shortcut in (False, True)
    ],
)
@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("columns", ["packed", "with undrawn", "streams"])
@pytest.mark.parametrize("rows", ["packed", "with undrawn", "relaxed"])
def test_every_kind_of_rows_and_columns(name, rows, columns, routing, shortcut):
    sides = {"rows": rows, "columns": columns, "routing": routing, "channels": 7, "kernels": 9}
    check(Problem(**sides, image=(5, 6), shortcut=shortcut), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=3000)
@given(problem=problems())
def test_against_dense_masking_at_length(name, problem):
    if name != "triton" or problem.seed % 5 == 0:
        check(problem, name)


def small_problem(dtype=torch.float64):
    into, out = torch.tensor([1, 0, 2, 2, 0]), torch.tensor([2, 2, 0, 1])
    columns, rows = FilterGroups.from_assignment(into), FilterGroups.from_assignment(out)
    x = torch.randn(2, 5, 6, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 5, 3, 3, dtype=dtype, requires_grad=True)
    bias = torch.randn(4, dtype=dtype, requires_grad=True)
    return x, weight, bias, RoutedConv(rows, columns, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("geometry", [((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 2), (1, 2))])
def test_gradcheck(name, geometry):
    x, weight, bias, spec = small_problem()
    spec = spec._replace(geometry=Geometry(*geometry))
    with backend(name):
        fast = name == "triton"  # all directions at once: the interpreter would take minutes
        assert torch.autograd.gradcheck(lambda *leaves: routed_conv(*leaves, spec), (x, weight, bias), fast_mode=fast)


@pytest.mark.parametrize("name", PACKED)
def test_only_what_is_asked_for_gets_a_gradient(name):
    for wanted in range(3):
        leaves = list(small_problem()[:3])
        spec = small_problem()[3]
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index == wanted)
        with backend(name):
            routed_conv(*leaves, spec).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(3)]


@pytest.mark.parametrize("name", PACKED)
def test_gradient_that_arrives_with_strange_strides(name):
    x, weight, bias, spec = small_problem()
    with backend(name):
        y = routed_conv(x, weight, bias, spec)
        dy = torch.randn(y.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0)
        strange = torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)
        plain = torch.autograd.grad(y, (x, weight, bias), dy.contiguous())
        expanded = torch.autograd.grad(routed_conv(x, weight, bias, spec).sum(), weight)[0]
        ones = torch.autograd.grad(routed_conv(x, weight, bias, spec), weight, torch.ones_like(y))[0]
    for a, b in zip(strange, plain, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(expanded, ones)


@pytest.mark.parametrize("name", PACKED)
def test_same_bits_twice(name):
    x, weight, bias, spec = small_problem(torch.float32)
    runs = []
    for _ in range(2):
        with backend(name):
            y = routed_conv(x, weight, bias, spec)
        runs.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not available("native"), reason="not built")
def test_native_float32_is_as_near_to_float64_as_torch_is():
    x, weight, bias, spec = small_problem()
    exact = routed_conv(x, weight, bias, spec)
    x, weight, bias = (leaf.detach().float() for leaf in (x, weight, bias))
    with backend("native"):
        native = routed_conv(x, weight, bias, spec)
    error = (native - exact).abs().max() / exact.abs().max()
    assert error < 45 * torch.finfo(torch.float32).eps  # at most 5 * 9 products in a sum


SPLITS = [[4, 4, 4], [7, 3, 2], [11, 1, 0], [12, 0, 0], [0, 6, 6], [3, 3, 3, 3], [0, 0, 0, 12]]


@pytest.mark.parametrize("into", SPLITS, ids=str)
@pytest.mark.parametrize("out", SPLITS, ids=str)
def test_flops_of_a_straight_through_step(into, out):
    """A step with the gates' gradient costs at most three plain convolutions for any split; dense
    masking takes 9 for two tasks."""
    if len(into) != len(out):
        return
    kernels, size, tasks = 12, 8, len(into) - 1
    columns, rows = (
        FilterGroups.from_assignment(torch.repeat_interleave(torch.tensor(sizes)), tasks, all_gates=True)
        for sizes in (into, out)
    )
    x = torch.randn(1, kernels, size, size, requires_grad=True)
    undrawn = x.new_zeros(()).expand(1, tasks * kernels, size, size).requires_grad_()
    weight = torch.randn(kernels, kernels, 3, 3, requires_grad=True)
    spec = RoutedConv(rows, columns, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    with FlopCounterMode(display=False) as counter, backend("masked"):
        y, undrawn_rows, *_ = convolve(x, weight, None, spec, undrawn=undrawn, keep_product=True)
        y.sum().backward()
        undrawn_rows.gate_gradient(torch.randn(1, tasks * kernels, size, size), None, None, "relu", rows.order)
    assert counter.get_total_flops() <= 3 * 2 * kernels * kernels * 9 * size * size


@pytest.fixture(params=["cpu", "as on a GPU"])
def where(request, monkeypatch):
    """`masked` as on the CPU, and as where the host does not know where a group's channels lie."""
    if request.param != "cpu":
        monkeypatch.setattr(masked, "cuts", lambda x: False)


@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("columns", ["packed", "with undrawn", "streams"])
@pytest.mark.parametrize("rows", ["packed", "with undrawn", "relaxed"])
def test_masked_as_on_a_gpu(rows, columns, routing, monkeypatch):
    monkeypatch.setattr(masked, "cuts", lambda x: False)
    geometry = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    sides = {"rows": rows, "columns": columns, "routing": routing, "channels": 7, "kernels": 9}
    check(Problem(**geometry, **sides, image=(5, 6), shortcut=True), "masked")


@pytest.mark.parametrize("routing", [Routing.ARROW, Routing.OWN])
@pytest.mark.parametrize("rows", ["packed", "with undrawn", "relaxed"])
def test_masked_keeps_channels_last(rows, routing, where):
    """In every pass: cuDNN copies anything else."""
    groups = FilterGroups.from_assignment(torch.arange(9) % 3, all_gates=rows == "with undrawn")
    if rows == "relaxed":
        groups = FilterGroups.streams(9, 2)
    x = torch.randn(2, len(groups.order), 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((9, 9, 3, 3), (9,)))
    undrawn = x.new_zeros(()).expand(2, 18, 5, 6).requires_grad_() if rows == "with undrawn" else None
    spec = RoutedConv(groups, groups, routing, Geometry((1, 1), (1, 1), (1, 1)))
    with backend("masked"):
        found = convolve(x, weight, bias, spec, True, undrawn=undrawn, keep_product=groups.all_gates)
    leaves = [leaf for leaf in (x, undrawn, weight) if leaf is not None]
    *images, dw = torch.autograd.grad(found.u, leaves, torch.randn_like(found.u))
    for image in [found.u, *images]:
        assert image.is_contiguous(memory_format=torch.channels_last)
    assert dw.is_contiguous()
