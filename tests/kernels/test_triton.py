"""The Triton kernels, in Triton's interpreter, against float64 convolution with a masked weight, written plainly.

What test_routed_conv.py does not reach: several chunks and tiles of channels, half precision, fused operations, every
path forced, NaN in all memory that a kernel should write.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sfg_fast.kernels.spec import Geometry, Norm, RoutedConv, ShortcutGradient, UndrawnFormula

from sfg_fast.backends import available
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.routed_conv.run import Run, Way
from tests.oracle import check_statistics, through
from tests.problems import ConvProblem

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from sfg_fast.kernels import masked
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.packing import unpack_dim
from sfg_fast.kernels.triton import config

FORCED = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}  # the fixtures are to hold for all examples


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is full of NaN: what a kernel leaves out, or reads too early, is seen."""
    empty = torch.empty

    def full_of_nan(*size, **options):
        tensor = empty(*size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(2**30)

    monkeypatch.setattr(kernels.torch, "empty", full_of_nan)


@pytest.fixture(params=["tiles", "rowwalk"])
def path(request, monkeypatch):
    """Both ways to convolve, whatever the dtype and the number of channels."""
    if request.param == "rowwalk":
        monkeypatch.setattr(config, "FEW_CHANNELS", 0)
        monkeypatch.setattr(config, "walks", lambda p, bits, *more, walks=config.walks: walks(p, 16, *more))
        walks = config.gradient_walks
        monkeypatch.setattr(config, "gradient_walks", lambda geometry, kernel, _: walks(geometry, kernel, 64))
    else:
        for name in ("walks", "gradient_walks"):
            monkeypatch.setattr(config, name, lambda *_: False)
    monkeypatch.setattr(config, "device_of", lambda _: config.Device(3, 90, 227 << 10))  # several walks and splits
    config.forget()
    yield request.param
    config.forget()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(ConvProblem):
    """`rows`, `columns`: the channels of each group, shared first; `routing`: "arrow" or "own"."""

    rows: list[int]
    columns: list[int]
    routing: str


def sizes(draw, groups, most):
    return draw(st.lists(st.integers(0, most), min_size=groups, max_size=groups).filter(any))


@st.composite
def problems(draw, most):
    """Up to `most` channels a group; half of the kernels are 3x3 with stride 1."""
    groups = draw(st.integers(2, 4))
    rowwalk = draw(st.booleans())
    kernel = (3, 3) if rowwalk else tuple(draw(st.integers(1, 4)) for _ in range(2))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(2))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(2))
    image = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 9))
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    )
    return Problem(
        rows=sizes(draw, groups, most),
        columns=sizes(draw, groups, most),
        routing=draw(st.sampled_from(["arrow", "own"])),
        kernel=kernel,
        stride=(1, 1) if rowwalk else tuple(draw(st.integers(1, 3)) for _ in range(2)),
        padding=padding,
        dilation=dilation,
        image=image,
        batch=draw(st.integers(1, 2)),
        relu=draw(st.booleans()),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
    )


def check(p):
    """Forward and gradients on blocks, the weight in the layer's own shuffled order.

    Bounds: rounding to the dtype, and sums of n products of standard normal numbers in float32, which are as large as
    sqrt(n) and whose errors add up like a random walk.
    """
    generator = torch.Generator().manual_seed(p.seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(p.dtype).double()

    groups, rows, columns = len(p.rows), p.rows, p.columns
    k, c = sum(rows), sum(columns)
    into, out = (
        torch.repeat_interleave(torch.arange(groups), torch.tensor(n))[torch.randperm(sum(n), generator=generator)]
        for n in (columns, rows)
    )
    sides = [FilterGroups.from_assignment(side, groups - 1) for side in (out, into)]
    spec = RoutedConv(*sides, Routing(p.routing), p.geometry)
    mask = into == out[:, None]
    if p.routing == "arrow":
        mask |= into == 0
    x, weight = random(p.batch, c, *p.image), random(k, c, *p.kernel)
    bias = random(k) if p.bias else None

    read = weight * mask[:, :, None, None]
    leaves = [x.clone().requires_grad_(), read.requires_grad_(), torch.zeros(k, dtype=torch.float64)]
    leaves[2].requires_grad_()
    exact = F.conv2d(leaves[0], leaves[1], leaves[2] if bias is None else bias + leaves[2], *p.geometry)
    residual = random(*exact.shape) if p.residual else None

    def packed(t, side, dim=1):
        return None if t is None else t.index_select(dim, side.order).to(p.dtype)

    given = kernels.pack(weight.to(p.dtype), None if bias is None else bias.to(p.dtype), spec, p.dtype)
    px = packed(x, sides[1])
    y = kernels.forward(px, given, spec, relu=p.relu, residual=packed(residual, sides[0]))[0]
    wanted = (exact.relu() if p.relu else exact).detach() + (0 if residual is None else residual)
    taps, eps = p.taps, torch.finfo(p.dtype).eps
    close(y, wanted[:, sides[0].order], eps, int(mask.sum(1).max()) * taps + 2, "forward")

    # The kernels' own ReLU output serves both: a sign that rounding flips near zero is no error of the gradient.
    relu_output = kernels.forward(px, given, spec, relu=True)[0]
    dy = random(*exact.shape)
    inverse = sides[0].inverse
    dy = dy * (relu_output > 0)[:, inverse] if p.relu else dy
    exact.backward(dy)
    dy = packed(dy, sides[0])
    dx = kernels.input_gradient(dy, given, spec, p.image)[0]
    close(dx, leaves[0].grad[:, sides[1].order], eps, max(int(mask.sum(0).max()) * taps, 1), "input gradient")
    dw, db = kernels.weight_gradient(px, dy, given, spec)
    positions = exact.numel() // max(k, 1)
    assert dw.dtype == db.dtype == torch.float32
    assert not dw[~mask].any(), "zero where not read"
    eps = torch.finfo(torch.float32).eps  # never rounded to half precision
    close(dw, leaves[1].grad * mask[:, :, None, None], eps, positions, "weight gradient")
    close(db, leaves[2].grad, eps, positions, "bias gradient")
    for a, b in zip((dw, db), kernels.weight_gradient(px, dy, given, spec), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(dx, kernels.input_gradient(dy, given, spec, p.image)[0])
    assert torch.equal(relu_output, kernels.forward(px, given, spec, relu=True)[0])
    check_undrawn(p, spec, x, weight, bias, dy.double(), random)


def check_undrawn(p, spec, x, weight, bias, dy, random):
    """What undrawn gates get. x and weight in the layer's own order."""
    rows, columns = (dataclasses.replace(side, all_gates=True) for side in (spec.rows, spec.columns))
    spec = spec._replace(rows=rows, columns=columns)
    arrow, dtype, eps = p.routing == "arrow", p.dtype, torch.finfo(p.dtype).eps
    everywhere, gets = of_every_group(spec, x, weight, bias), []  # gets: every channel, from every group's rows
    for group in range(len(rows.names)):
        by = (rows.assignment == group) | torch.tensor(arrow and group == 0)
        zeros = torch.zeros_like(x).requires_grad_()
        y = F.conv2d(zeros, weight * by[:, None, None, None], None, *spec.geometry)[:, rows.order]
        gets.append(torch.autograd.grad(y, zeros, dy)[0][:, columns.order])

    px, terms = x[:, columns.order].to(dtype), sum(p.columns) * p.kernel[0] * p.kernel[1] + 2
    bias = None if bias is None else bias.to(dtype)
    given = kernels.pack(weight.to(dtype), bias, spec, dtype)
    y, kept_product = kernels.forward(px, given, spec, keep_product=arrow)
    own = torch.stack([everywhere[int(g)][:, row] for row, g in enumerate(rows.ids)], 1)
    close(y, own, eps, terms, "forward")
    if arrow:
        close(kept_product, everywhere[0], eps, terms, "kept product")
    back = max(sum(p.rows) * p.kernel[0] * p.kernel[1], 1)
    dx, dundrawn = kernels.input_gradient(dy.to(dtype), given, spec, p.image)
    close(dx, torch.stack([gets[int(g)][:, c] for c, g in enumerate(columns.ids)], 1), eps, back, "input gradient")
    close(dundrawn, undrawn(gets, columns).flatten(1, 2), eps, back, "gradient of the undrawn rows")
    shortcut = ShortcutGradient(random(*dx.shape).to(dtype), random(*dundrawn.shape).to(dtype))
    both = kernels.input_gradient(dy.to(dtype), given, spec, p.image, shortcut=shortcut)
    for found, alone, more in zip(both, (dx, dundrawn), shortcut, strict=True):
        close(found, alone.double() + more.double(), eps, back, "gradient and what came by a shortcut")

    u = undrawn(everywhere, rows)
    df, scale, shift = random(*u.shape), random(*u.shape[1:3]), random(*u.shape[1:3])
    h = (u * scale[:, :, None, None] + shift[:, :, None, None]).clamp_min(0)
    exact = (df * h).sum((0, 3, 4))
    features = UndrawnFormula(px, kept_product, given, spec, scale[None], shift[None], "relu")
    dz = kernels.gate_gradient(features, df.flatten(1, 2).to(dtype))
    # Every product of the sum is off by eps times u, which is as large as sqrt(terms); what was kept is rounded, too.
    bound = 8 * eps * (terms * u[0, 0, 0].numel() * u.shape[0]) ** 0.5 * terms**0.5
    assert (dz.double() - exact).abs().max() <= bound
    assert torch.equal(dz, kernels.gate_gradient(features, df.flatten(1, 2).to(dtype)))


def of_every_group(spec, x, weight, bias):
    """u [N, rows, H, W] that every kernel would have in every group, in the order of the rows. x and weight in the
    layer's own order."""
    found = []
    for group in range(len(spec.rows.names)):
        read = (spec.columns.assignment == group) | ((spec.columns.assignment == 0) & (spec.routing is Routing.ARROW))
        found.append(F.conv2d(x * read[:, None, None], weight, bias, *spec.geometry)[:, spec.rows.order])
    return found


def undrawn(tensors, groups):
    """Those of the undrawn rows, [N, T, channels, H, W], from the tensors of every group."""
    found = [torch.stack([tensors[int(g)][:, c] for c, g in enumerate(n)], 1) for n in groups.undrawn_groups]
    return torch.stack(found, 1)


def close(actual, exact, eps, terms, what):
    if actual.numel():
        error, bound = (actual.double() - exact).abs().max().item(), 4 * eps * terms
        assert error <= bound, f"{what}: error {error:.2e}, bound {bound:.2e} for {terms} terms"
        rms = ((actual.double() - exact) ** 2).mean().sqrt().item()
        assert rms <= bound / 4, f"{what}: error (root mean square) {rms:.2e}, bound {bound / 4:.2e}"


USUAL = Problem(
    rows=[5, 0, 7], columns=[3, 6, 4], routing="arrow", image=(10, 5), relu=True, residual=True, dtype=torch.float32
)
PLAIN = {"relu": False, "residual": False, "bias": False}
HALF = {"dtype": torch.float16}
OF_EACH_KIND = {  # of path and problem; `test_against_float64_at_length` has random ones
    ("tiles", "few channels"): {"dilation": (1, 2), "padding": (1, 2), "image": (10, 7)},
    ("tiles", "few channels, own groups, half"): PLAIN | HALF | {"routing": "own", "rows": [4, 3], "columns": [5, 6]},
    ("tiles", "more channels, half"): HALF | {"rows": [20, 15, 3], "columns": [10, 0, 11], "relu": False},
    ("tiles", "one tap, own groups"): {"kernel": (1, 1), "padding": (0, 0), "routing": "own", "columns": [8, 6, 4]},
    ("tiles", "strides, half"): HALF | {
        "rows": [9, 8], "columns": [10, 11], "kernel": (2, 4), "stride": (2, 3), "padding": (3, 0), "dilation": (2, 1),
        "image": (6, 8), "bias": False,
    },
    ("tiles", "strides and dilations with common factors, four groups"): {
        "rows": [2, 3, 0, 4], "columns": [6, 0, 7, 4], "kernel": (3, 2), "stride": (2, 3), "padding": (0, 4),
        "dilation": (2, 3), "image": (7, 4), "residual": False, "batch": 1,
    },
    ("tiles", "several tiles and chunks"): {
        "rows": [20, 7, 9], "columns": [17, 5, 12], "image": (2, 3), "kernel": (1, 2), "relu": False, "batch": 1,
    },
    ("tiles", "several tiles and chunks, half"): HALF | {
        "rows": [70, 31, 40], "columns": [50, 0, 30], "image": (2, 3), "kernel": (1, 2), "padding": (0, 1), "batch": 1,
    },
    ("tiles", "wide, by cuDNN, half"): PLAIN | HALF | {
        "rows": [24, 20, 22], "columns": [30, 0, 35], "image": (4, 5), "padding": (2, 0), "batch": 1,
    },
    ("tiles", "strides, wide, half"): PLAIN | HALF | {
        "rows": [24, 20, 22], "columns": [30, 20, 15], "image": (6, 5), "stride": (2, 1), "batch": 1,
    },
    ("rowwalk", "several strips and walks, half"): HALF | {
        "rows": [5, 4, 3], "columns": [6, 0, 7], "image": (40, 70), "batch": 1, "residual": False,
    },
    ("rowwalk", "several tiles of the weight gradient, own groups, half"): HALF | {
        "rows": [40, 10, 30], "columns": [50, 0, 30], "image": (4, 5), "routing": "own", "batch": 1,
    },
    ("rowwalk", "few channels"): {"dilation": (1, 2), "padding": (2, 1), "image": (9, 4)},
    ("rowwalk", "own groups, several tiles, half"): PLAIN | HALF | {
        "routing": "own", "rows": [12, 8, 5], "columns": [5, 6, 4], "image": (9, 4),
    },
    ("rowwalk", "more channels, half"): HALF | {"rows": [9, 8, 3], "columns": [10, 0, 11], "residual": False},
    ("rowwalk", "more channels, four groups"): {
        "rows": [2, 3, 0, 4], "columns": [6, 0, 7, 11], "image": (5, 4), "dilation": (2, 1), "relu": False,
    },
    ("rowwalk", "strides, few channels"): {"stride": (1, 2), "kernel": (2, 2), "image": (5, 4), "batch": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "problem"),
    [pytest.param(path, problem, id=f"{path}: {name}") for (path, name), problem in OF_EACH_KIND.items()],
    indirect=["path"],
)
def test_against_float64(path, poisoned, problem):
    check(dataclasses.replace(USUAL, **problem))


@pytest.mark.slow
@settings(max_examples=12, **FORCED)
@given(problem=problems(most=12))
def test_against_float64_with_few_channels(path, poisoned, problem):
    check(problem)


@pytest.mark.slow
@settings(max_examples=2, **FORCED)
@given(problem=problems(most=40))
def test_several_chunks_and_tiles(path, poisoned, problem):
    check(problem)


@pytest.mark.slow  # a quarter of an hour each, in the interpreter
@settings(max_examples=50, **FORCED)
@given(problem=problems(most=24))
def test_against_float64_at_length(path, poisoned, problem):
    check(problem)


@pytest.mark.slow
@settings(max_examples=10, **FORCED)
@given(problem=problems(most=150))
def test_many_channels(path, poisoned, problem):
    check(problem)


@pytest.mark.parametrize("width", [63, 64])
@pytest.mark.parametrize("fused", [{}, {"bias": True}, {"relu": True}, {"residual": True}, {"undrawn": True}])
def test_wide_layers_are_convolved_by_cudnn(monkeypatch, width, fused):
    """Where cuDNN was measured to be faster: if nothing is fused, and no undrawn rows count."""
    used = []
    monkeypatch.setattr(kernels.cudnn, "convolve", lambda x, weight, p: used.append(p.adjoint) or x)
    monkeypatch.setattr(kernels, "_launch", lambda *_: None)
    groups = FilterGroups.from_assignment(torch.arange(width) % 3, all_gates="undrawn" in fused)
    spec = RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    x, weight = torch.zeros(1, width, 2, 2, dtype=torch.float16), torch.zeros(width, width, 3, 3)
    packed = kernels.pack(weight, torch.zeros(width) if "bias" in fused else None, spec, x.dtype)
    more = x if "residual" in fused else None
    kernels.forward(x, packed, spec, relu="relu" in fused, residual=more, keep_product="undrawn" in fused)
    kernels.input_gradient(x, packed, spec, (2, 2), shortcut=ShortcutGradient(more, None))
    forward, backward = not fused, "residual" not in fused and "undrawn" not in fused
    assert used == ([False] * forward + [True] * backward if width == 64 else [])


def small_problem(all_gates=False):
    into, out = torch.tensor([1, 0, 2, 2, 0]), torch.tensor([2, 2, 0, 1])
    sides = (FilterGroups.from_assignment(side, 2, all_gates=all_gates) for side in (out, into))
    spec = RoutedConv(*sides, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    return torch.randn(2, 5, 6, 5), torch.randn(4, 5, 3, 3), spec


SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}  # of each activation, below zero


@pytest.mark.parametrize(
    ("images", "groups", "activation", "dtype"),
    [
        (1, 1, None, torch.float32),
        (1, 2, "leaky_relu", torch.float16),
        (2, 1, "leaky_relu", torch.float32),
        (2, 2, "relu", torch.float16),
        (2, 2, "leaky_relu", torch.float32),
    ],
)
def test_the_gates_gradient_behind_a_scale_and_shift(path, poisoned, images, groups, activation, dtype):
    """Of each image or of all, of each group or of all. An image has several tiles, strips and walks."""
    _, weight, spec = small_problem(all_gates=True)
    x, weight, bias = torch.randn(2, 5, 9, 20).to(dtype), weight.to(dtype), torch.randn(4).to(dtype)
    u = undrawn(of_every_group(spec, x.double(), weight.double(), bias.double()), spec.rows)
    df = torch.randn(2, 2, 4, 9, 20).to(dtype)
    scale, shift = torch.randn(2, images, groups, 4)
    h = u * scale[..., None, None].double() + shift[..., None, None].double()
    exact = (df.double() * torch.where(h > 0, h, SLOPES[activation] * h)).sum((0, 3, 4))

    packed, read = kernels.pack(weight, bias, spec, dtype), x[:, spec.columns.order]
    _, kept_product = kernels.forward(read, packed, spec, keep_product=True)
    formula = UndrawnFormula(read, kept_product, packed, spec, scale, shift, activation)
    dz = kernels.gate_gradient(formula, df.flatten(1, 2))
    terms, positions = 5 * 9 + 2, 2 * 9 * 20  # as in check_undrawn
    assert (dz.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * terms * positions**0.5
    assert torch.equal(dz, kernels.gate_gradient(formula, df.flatten(1, 2)))


def test_64_bit_offsets_give_the_same(monkeypatch):
    x, weight, spec = small_problem()
    results = []
    for wide in (False, True):
        plan, plan_gradient = config.plan, config.plan_gradient
        with monkeypatch.context() as forced:
            forced.setattr(config, "plan", lambda *a, plan=plan, wide=wide, **_: plan(*a[:-1], wide))
            forced.setattr(config, "plan_gradient", lambda *a, plan=plan_gradient, wide=wide: plan(*a[:-1], wide))
            packed = kernels.pack(weight, None, spec, x.dtype)
            y = kernels.forward(x, packed, spec)[0]
            dx = kernels.input_gradient(y, packed, spec, (6, 5))[0]
            results.append([y, dx, *kernels.weight_gradient(x, y, packed, spec)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_offsets_have_64_bits_where_any_tensor_needs_them(monkeypatch):
    """Nothing is stored (meta tensors). With the gradient of two undrawn rows of each of 64 channels, 4096 x 4096 is
    too many for 32 bits; x and y alone are not."""
    launches = []
    monkeypatch.setattr(kernels, "_launch", lambda kernel, launch, *_: launches.append(launch))
    monkeypatch.setattr(config, "device_of", lambda _: config.Device(132, 90, 227 << 10))
    groups = FilterGroups.from_assignment(torch.arange(64) % 3, all_gates=True)
    for size, wide in ((4095, False), (4096, True)):
        spec = RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
        x = torch.empty(1, 64, size, size, dtype=torch.float16, device="meta")
        packed = kernels.pack(torch.empty(64, 64, 3, 3, device="meta"), torch.empty(64, device="meta"), spec, x.dtype)
        _, kept_product = kernels.forward(x, packed, spec, keep_product=True)
        _, dundrawn = kernels.input_gradient(x, packed, spec, (size, size))
        kernels.gate_gradient(UndrawnFormula(x, kept_product, packed, spec, None, None, None), dundrawn)
        kernels.weight_gradient(x, x, packed, spec)
        # forward, input gradient (which writes dundrawn), gates' gradient (which reads it), weight gradient
        found = [launch.tiles.wide for launch in launches if isinstance(launch, config.Launch)]
        assert found == [False, wide, wide, False]
        launches.clear()


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.7.1", "2.5.2", True), ("3.10.0", "3.0", True)],
)
def test_a_numpy_that_the_interpreter_can_not_do_with_is_told(monkeypatch, triton, numpy, works):
    monkeypatch.setattr(kernels, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr(kernels, "numpy", SimpleNamespace(__version__=numpy))
    expected = f"Triton {triton} with numpy {numpy}: Triton's interpreter needs Triton 3.7, or numpy before 2.4"
    assert kernels.missing() == (None if works else expected)


def test_nan_goes_where_torch_lets_it_go():
    x, weight, spec = small_problem()
    x[0, 0, 3, 3] = float("nan")  # shared: everybody reads it
    packed = kernels.pack(weight, None, spec, x.dtype)
    y = kernels.forward(x, packed, spec, relu=True)[0]
    assert y[0, :, 2:5, 2:5].isnan().all()
    assert not y[1].isnan().any()
    dy = torch.ones_like(y)
    run = Run(kernels, x.dtype, Way.PACKED, spec, in_graph=False, by_operators=False)
    dx, _, _, db = run.backward(dy, x, run.pack(weight, None, x.dtype), [True, True, True], relu_output=y)
    assert dx.isfinite().all()  # NaN has passed the ReLU: dy counts
    assert torch.equal(db, unpack_dim((dy * ~(y <= 0)).sum((0, 2, 3)), 0, spec.rows))


def test_weights_that_are_not_read_may_hold_anything(poisoned):
    x, weight, spec = small_problem()
    packed = kernels.pack(weight, None, spec, x.dtype)
    expected = kernels.forward(x, packed, spec)[0]
    out, into = spec.rows.assignment, spec.columns.assignment
    weight[~((into == 0) | (into == out[:, None]))] = float("nan")
    assert torch.equal(kernels.forward(x, kernels.pack(weight, None, spec, x.dtype), spec)[0], expected)


@pytest.mark.parametrize("shape", [(1, 3), (5, 2), (64, 3), (200, 7)])
@pytest.mark.parametrize("noise", [False, True])
def test_sample_is_what_torch_draws(shape, noise):
    log_p = torch.randn(shape).round()  # ties
    arguments = log_p, torch.randn(shape).round() if noise else None
    *found, known = kernels.sample(*arguments)
    for a, b in zip(found, masked.sample(*arguments)[:3], strict=True):
        assert torch.equal(a, b)
    plain = FilterGroups.from_assignment(found[0], shape[1] - 1)
    assert {"ids", "inverse", "undrawn_groups"} == set(known)
    for name, value in known.items():
        assert torch.equal(value, getattr(plain, name)), name


@pytest.mark.parametrize("dilation", [1, 4])
@pytest.mark.parametrize("image", [(16, 256), (10, 128), (100, 96), (128, 512), (10, 32), (1, 512)])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_partial_sums_of_a_weight_gradient_take_little_memory(width, image, dilation):
    """Of an H200: at most what two programs of each multiprocessor hold, or eight of few channels."""
    device, (images, side) = config.Device(132, 90, 227 << 10), image
    groups = FilterGroups.from_assignment(torch.arange(width) % 3)
    geometry = Geometry((1, 1), (dilation, dilation), (dilation, dilation))
    spec = RoutedConv(groups, groups, Routing.ARROW, geometry)
    g = config.passes(spec, (3, 3), torch.float16, device)[2]
    launch = config.plan_gradient(g, 16, images, (side, side), device)
    assert launch.kernel == "rowwalk_weights"
    assert launch.second * 9 * width * width * 4 <= 132 * (9 * max(64 * width, 64 * 64) * 4)
    rows = config.cdiv(side, dilation) + 2
    units = images * dilation * config.cdiv(side, launch.tiles.pixels_w) * config.cdiv(rows, launch.steps)
    assert 1 <= launch.second <= units  # each has something to do


def test_cudnn_takes_its_arguments_in_this_order():
    """The call itself needs a GPU."""
    names = [argument.name for argument in torch.ops.aten.cudnn_convolution.default._schema.arguments]
    order = ["self", "weight", "padding", "stride", "dilation", "groups", "benchmark", "deterministic", "allow_tf32"]
    assert names == order


def test_one_compiled_kernel_for_all_draws():
    """What a kernel is compiled for depends on sizes, never on the drawn groups, so nor does the number of programs."""
    plans = set()
    for _ in range(50):
        out, into = torch.randint(3, (32,)), torch.randint(3, (48,))
        spec = RoutedConv(
            *(FilterGroups.from_assignment(side) for side in (out, into)),
            Routing.ARROW,
            Geometry((1, 1), (1, 1), (1, 1)),
        )
        *both, gradient = config.passes(spec, (3, 3), torch.float16, config.Device(132, 90, 227 << 10))
        device = config.Device(132, 90, 227 << 10)
        launches = [config.plan(p, 16, 4, (96, 96), device) for p in both]
        launches.append(config.plan_gradient(gradient, 16, 4, (96, 96), device))
        plans.add(repr((both, gradient, launches)))
    assert len(plans) == 1


def test_tf32_only_if_torch_may_use_it():
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            assert config.precision(32) == ("tf32" if allowed else "ieee")
            assert config.precision(16) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_what_can_not_be():
    assert "bfloat16, in Triton's interpreter products are right in float16, 32 and 64 only" in kernels.cannot(
        torch.zeros(1, dtype=torch.bfloat16)
    )
    assert "on meta" in kernels.cannot(torch.zeros(1, device="meta"))
    assert kernels.cannot(torch.zeros(1)) is None
    x, weight, spec = small_problem()
    spec = spec._replace(geometry=Geometry((1, 1), (0, 0), (3, 3)))
    with pytest.raises(RuntimeError, match=r"the image has size \(6, 5\), with padding \(0, 0\) that is less"):
        kernels.forward(x, kernels.pack(weight, None, spec, x.dtype), spec)


def test_what_does_not_fit_is_refused():
    """A kernel would read beyond the memory."""
    x, weight, spec = small_problem()
    packed = kernels.pack(weight, None, spec, x.dtype)
    y = kernels.forward(x, packed, spec)[0]
    for call, message in (
        (
            lambda: kernels.pack(weight[:3], None, spec, x.dtype),
            r"the weight has shape \(3, 5, 3, 3\), expected \[4, 5",
        ),
        (
            lambda: kernels.forward(x[:, :4], packed, spec),
            r"the input has shape \(2, 4, 6, 5\), expected \(2, 5, 6, 5\)",
        ),
        (lambda: kernels.forward(x, packed, spec, residual=y[:, :, :1]), r"the residual has shape \(2, 4, 1, 5\)"),
        (lambda: kernels.input_gradient(x, packed, spec, (6, 5)), r"the input has shape \(2, 5, 6, 5\)"),
        (lambda: kernels.weight_gradient(x, y[..., 1:], packed, spec), r"the gradient has shape \(2, 4, 6, 4\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("kernel", [(4, 1), (1, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_weights_and_biases_with_strange_strides(kernel, order):
    x, _, spec = small_problem()
    shape = (4, 5, *kernel)
    weight = torch.randn([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(4)])
    bias = torch.randn(8)[::2]
    plain = weight.clone(memory_format=torch.contiguous_format), bias.clone()
    a, b = (kernels.forward(x, kernels.pack(w, b, spec, x.dtype), spec)[0] for w, b in ((weight, bias), plain))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [5, 16, 64])
def test_an_empty_batch(channels, dtype):
    groups = FilterGroups.from_assignment(torch.arange(channels) % 3, all_gates=True)
    spec = RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    x, packed = torch.zeros(0, channels, 6, 5, dtype=dtype), None
    for bias in (torch.zeros(channels), None):  # without a bias wide layers are convolved by cuDNN
        packed = kernels.pack(torch.randn(channels, channels, 3, 3), bias, spec, dtype)
        y, kept_product = kernels.forward(x, packed, spec, keep_product=True)
        assert y.shape == kept_product.shape == x.shape
    dx, dundrawn = kernels.input_gradient(y, packed, spec, (6, 5))
    assert dx.shape == x.shape
    assert dundrawn.shape == (0, 2 * channels, 6, 5)
    dw, db = kernels.weight_gradient(x, y, packed, spec)
    assert not dw.any()
    assert not db.any()
    assert not kernels.gate_gradient(UndrawnFormula(x, kept_product, packed, spec, None, None, None), dundrawn).any()


@pytest.mark.parametrize("device", [config.Device(132, 90, 227 << 10), config.Device(108, 80, 163 << 10)])
@pytest.mark.parametrize("tasks", [32, 64, 128])
def test_sums_of_many_tasks_are_no_walk(tasks, device):
    """Not one column of a walk would have room in the registers."""
    for width in (16, 32, 64):
        rows = FilterGroups.from_assignment(torch.zeros(width, dtype=torch.int64), tasks, all_gates=True)
        columns = FilterGroups.from_assignment(torch.zeros(32, dtype=torch.int64), tasks, all_gates=True)
        for spec in (
            RoutedConv(rows, columns, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1))),
            RoutedConv(rows, FilterGroups.blocks([32], ("image",)), Routing.ALL, Geometry((1, 1), (1, 1), (1, 1))),
        ):
            forward, adjoint, _ = config.passes(spec, (3, 3), torch.float16, device)
            assert config.plan(forward, 16, 1, (32, 32), device, gates=True).kernel == "gate_gradient"
            if adjoint.undrawn:
                assert config.plan(adjoint, 16, 1, (32, 32), device).kernel == "convolve_undrawn"


@settings(max_examples=30, deadline=None, **FORCED)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(2, 13), st.integers(1, 13)),
    st.booleans(),
    st.sampled_from(list(SLOPES)),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.float16]),
    st.sampled_from([0.0, 30.0]),
    st.sampled_from([1, 3, 100]),
    st.integers(0, 2**16),
)
@example((1, 5, 1, 2), True, "leaky_relu", True, torch.float16, 0.0, 1, 0)
@example((3, 67, 9, 13), True, "leaky_relu", True, torch.float32, 30.0, 100, 0)
@example((3, 67, 9, 13), True, "relu", False, torch.float16, 0.0, 3, 0)
def test_normalise(poisoned, shape, each_image, activation, residual, dtype, mean, multiprocessors, seed):
    """Batch and instance normalisation against their formula in float64, and autograd through it; the same bits
    twice."""
    generator, c = torch.Generator().manual_seed(seed), shape[1]

    def random(*size, like=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(like)

    sums = torch.promote_types(dtype, torch.float32)
    u, dy = (random(*shape) * 3 + mean).to(dtype), random(*shape)
    weight, bias, order = random(c, like=sums), random(c, like=sums), torch.randperm(c, generator=generator)
    add, more = (random(*shape) if residual else None for _ in range(2))
    exact = [t.double().requires_grad_() for t in (u, weight, bias)]
    over = (2, 3) if each_image else (0, 2, 3)
    var0, mean0 = torch.var_mean(exact[0], over, correction=0, keepdim=True)
    scale0 = exact[1][order, None, None] / (var0 + 1e-5).sqrt()
    shift0 = exact[2][order, None, None] - mean0 * scale0
    v = scale0 * exact[0] + shift0
    eps = torch.finfo(sums).eps
    # As on the CPU (test_native.py), and results rounded to the dtype. What is lost of u - mean, `lost`, is divided by
    # the standard deviation; with few values this may be small.
    narrow = (var0.detach() + 1e-5).sqrt().min().item()
    lost = 1 + u.abs().max().item() / narrow
    if activation:  # within rounding of 0 either side of the ReLU is right: there dy is 0
        dy.masked_fill_(v.detach().abs() < 1e2 * eps * lost, 0)
    expected = torch.where(v > 0, v, SLOPES[activation] * v)
    expected.backward(dy.double())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "device_of", lambda _: config.Device(multiprocessors, 90, 227 << 10))
        norm = Norm(weight, bias, order, 1e-5, activation, each_image)
        y, average, var, affine = kernels.normalise(u, norm, add)
        arguments = dy, u, norm, average, var, more
        du, dweight, dbias = kernels.normalise_gradient(*arguments)
        again = kernels.normalise_gradient(*arguments)
    assert all(map(torch.equal, (du, dweight, dbias), again))
    of_each = (shape[0],) if each_image else ()
    by_kernel = [moment.reshape(*of_each, c)[..., torch.argsort(order)] for moment in (mean0, var0)]
    bound, rounding, count = 32 * eps * lost, torch.finfo(dtype).eps, u.numel() // c
    for found, wanted, scale, precision in (
        (y, expected + (0 if add is None else add), 4, rounding),
        (average, by_kernel[0], 3 + mean, eps),
        (var, by_kernel[1], 9, eps),
        (affine, torch.stack([scale0, shift0]).reshape(2, *of_each, c), (4 + mean) / narrow, eps),
        (du, exact[0].grad + (0 if more is None else more), 4 + 4 / narrow, rounding),
        (dweight, exact[1].grad, 4 * count**0.5, eps),
        (dbias, exact[2].grad, 4 * count**0.5, eps),
    ):
        wanted = wanted.detach()
        assert found.shape == wanted.shape
        assert ((found.double() - wanted).abs() <= bound * scale + precision * (1 + wanted.abs())).all()


def test_normalise_each_image_of_none(poisoned):
    u, norm = torch.zeros(0, 5, 3, 4), Norm(torch.ones(5), torch.zeros(5), None, 1e-5, "relu", each_image=True)
    y, mean, var, affine = kernels.normalise(u, norm, u)
    assert y.shape == u.shape
    assert affine.shape == (2, 0, 5)
    du, dweight, dbias = kernels.normalise_gradient(y, u, norm, mean, var, None)
    assert du.shape == u.shape
    assert torch.equal(dweight, torch.zeros(5))
    assert torch.equal(dbias, torch.zeros(5))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_normalise_lets_nan_through(activation):
    u = torch.randn(1, 2, 5, 5)
    u[0, 1, 2, 2] = float("nan")
    norm = Norm(torch.ones(2), torch.zeros(2), None, 1e-5, activation)
    y, mean, var, _ = kernels.normalise(u, norm, None)
    assert y[0, 0].isfinite().all()
    assert y[0, 1].isnan().all()
    du, _, _ = kernels.normalise_gradient(torch.ones_like(u), u, norm, mean, var, None)
    assert du[0, 0].isfinite().all()
    assert du[0, 1].isnan().all()


def test_a_first_part_that_is_far_from_the_others_costs_no_precision(monkeypatch):
    monkeypatch.setattr(config, "device_of", lambda _: config.Device(132, 90, 227 << 10))
    u = torch.randn(1, 8, 320, 320, generator=torch.Generator().manual_seed(0))
    u.permute(0, 2, 3, 1).view(-1, 8)[:512] += 1000  # 512 pixels are a part
    norm = Norm(torch.ones(8), torch.zeros(8), None, 1e-5, None)
    _, mean, var, _ = kernels.normalise(u.contiguous(memory_format=torch.channels_last), norm, None)
    exact_var, exact_mean = torch.var_mean(u.double(), (0, 2, 3), correction=0)
    assert ((mean - exact_mean) / exact_mean).abs().max() < 1e-5
    assert ((var - exact_var) / exact_var).abs().max() < 2e-6


def test_running_statistics(poisoned):
    check_statistics(through(kernels.normalise))
