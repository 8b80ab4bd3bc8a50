"""The C++ kernels themselves, on every instruction set that this processor has, against float64 convolution with a
masked weight, written plainly."""

import dataclasses
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sfg_fast.kernels.spec import Geometry, Norm, RoutedConv, UndrawnFormula

from sfg_fast.backends import available, load
from sfg_fast.groups import FilterGroups, Routing
from tests.oracle import check_statistics, through
from tests.problems import ConvProblem

if not available("native"):
    pytest.skip("native is not built", allow_module_level=True)

from sfg_fast.kernels import cpu, formulas, masked
from sfg_fast.kernels.cpu import _native


def of_all_images(*affine):
    """Scale and shift [T, rows], or None, as `UndrawnFormula` has those that are alike for all images."""
    return [None if values is None else values[None] for values in affine]


@pytest.fixture(params=_native.instruction_sets(), scope="module")
def instruction_set(request):
    _native.use(request.param)
    yield request.param
    _native.use(cpu.INSTRUCTION_SET)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem(ConvProblem):
    """`rows`, `columns`: the channels of each group; `reads`: for each group of rows and each of columns, whether it is
    read."""

    rows: list[int]
    columns: list[int]
    reads: list[bool]
    threads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLayers:
    """Two SFG layers, one behind the other. `sizes`: the channels of each group before, between and behind them; `own`:
    does the second layer read streams of its own? `image`: does the first one read an image? `layers`: stride, padding,
    dilation and kernel of each; `size`: of the image."""

    sizes: list[list[int]]
    own: bool
    image: bool
    layers: list[tuple[tuple[int, int], ...]]
    size: tuple[int, int]
    bias: bool
    norm: bool
    activation: str | None
    dtype: torch.dtype
    threads: int
    seed: int


@st.composite
def problems(draw, largest=40):
    """Any block structure (not only Routing's), empty groups, odd and even kernels, tails of every length."""
    sizes = st.lists(st.integers(0, 14), min_size=1, max_size=5).filter(any)
    rows, columns = draw(sizes), draw(sizes)
    kernel = tuple(draw(st.sampled_from([1, 2, 3, 3, 5, 7])) for _ in range(2))
    dilation = tuple(draw(st.integers(1, 4)) for _ in range(2))
    padding = tuple(draw(st.integers(0, 6)) for _ in range(2))
    image = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.one_of(st.integers(0, 3), st.integers(0, largest)))
        for d, k, p in zip(dilation, kernel, padding, strict=True)
    )
    return Problem(
        rows=rows,
        columns=columns,
        reads=draw(st.lists(st.booleans(), min_size=len(rows) * len(columns), max_size=len(rows) * len(columns))),
        kernel=kernel,
        stride=tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)),
        padding=padding,
        dilation=dilation,
        image=image,
        batch=draw(st.integers(1, 3)),
        relu=draw(st.booleans()),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


def offsets(sizes):
    return [0, *itertools.accumulate(sizes)]


def guarded(*shape, dtype):
    """A tensor full of NaN, between two rows of sentinels: what a kernel leaves out or writes outside is seen."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), float("nan"), dtype=dtype)
    memory[:64] = memory[64 + size :] = 7
    return memory, memory[64 : 64 + size].view(shape)


def check(problem):
    """Forward and gradients. Bounds: four eps times the square root of the reduction length n, for a sum as large as n
    products of standard normal numbers are, sqrt(n): rounding errors add up like a random walk."""
    p, dtype = problem, problem.dtype
    _, random = p.numbers()
    k, c, n = sum(p.rows), sum(p.columns), p.batch
    reads = torch.tensor(p.reads).view(len(p.rows), len(p.columns))
    blocks = offsets(p.rows), offsets(p.columns), reads.int().flatten().tolist()
    mask = torch.repeat_interleave(torch.repeat_interleave(reads, torch.tensor(p.rows), 0), torch.tensor(p.columns), 1)
    x, weight = random(n, c, *p.image), random(k, c, *p.kernel)
    read = weight * mask[:, :, None, None]
    weight[~mask] = float("nan")  # must not be looked at
    bias = random(k) if p.bias else None

    leaves = [t.double().requires_grad_() for t in (x, read)]
    exact_bias = torch.zeros(k, dtype=torch.float64) if bias is None else bias.double()
    exact_bias.requires_grad_()
    exact = F.conv2d(*leaves, exact_bias, *p.geometry)
    residual = random(*exact.shape) if p.residual else None

    memory, y = guarded(*exact.shape, dtype=dtype)
    arguments = (*blocks, *p.geometry)
    _native.forward(x, weight, bias, residual, p.relu, y, None, *arguments, p.threads)
    wanted = exact.relu() if p.relu else exact
    wanted = wanted.detach() + (0 if residual is None else residual.double())
    inputs = int(mask.sum(1).max()) * p.taps + 2  # and bias and residual
    eps = torch.finfo(dtype).eps
    close(y, wanted, eps * of_products(p.kernel, mask.sum(1).max()), inputs, "forward")
    unharmed(memory)

    # The kernels' own ReLU output serves both: a sign that rounding flips near zero is no error of the gradient.
    _native.forward(x, weight, bias, None, True, y, None, *arguments, p.threads)
    dy = random(*exact.shape)
    relu_output = y if p.relu else None
    exact.backward((dy * (y > 0) if p.relu else dy).double())

    memory, dx = guarded(*x.shape, dtype=dtype)
    _native.input_gradient(dy, relu_output, weight, None, None, dx, *[None] * 4, *arguments, p.threads)
    outputs = max(int(mask.sum(0).max()) * p.taps, 1)
    close(dx, leaves[0].grad, eps * of_products(p.kernel, mask.sum(0).max()), outputs, "input gradient")
    unharmed(memory)

    memory, dw = guarded(*weight.shape, dtype=dtype)
    bias_memory, db = guarded(k, dtype=dtype)
    _native.weight_gradient(x, dy, relu_output, dw, db, *arguments, p.threads)
    positions = n * exact.shape[2] * exact.shape[3]
    assert not dw[~mask].any(), "zero where not read"
    close(dw, leaves[1].grad * mask[:, :, None, None], eps, positions, "weight gradient")
    close(db, exact_bias.grad, eps, positions, "bias gradient")
    unharmed(memory)
    unharmed(bias_memory)

    for result, run in (
        (y, lambda out, threads: _native.forward(x, weight, bias, None, True, out, None, *arguments, threads)),
        (
            dx,
            lambda out, threads: _native.input_gradient(
                dy, relu_output, weight, None, None, out, *[None] * 4, *arguments, threads
            ),
        ),
    ):
        for threads in (1, 2):
            again = torch.full_like(result, float("nan"))
            run(again, threads)
            assert torch.equal(again, result), "the bits of outputs don't depend on the number of threads"
    again, db_again = torch.full_like(dw, float("nan")), torch.full_like(db, float("nan"))
    _native.weight_gradient(x, dy, relu_output, again, db_again, *arguments, p.threads)
    assert torch.equal(again, dw)
    assert torch.equal(db_again, db)


def of_products(kernel, channels):
    """How much larger than plain sums' terms those are that Winograd may add up, with three rows of taps: from the
    matrices in winograd.h 2.9 times for the first and last of four rows. From eight channels on their errors are as
    small as the bound for plain sums."""
    return 2.9 if 3 in kernel and channels < 8 else 1


def close(actual, exact, eps, terms, what):
    if actual.numel():
        error, bound = (actual.double() - exact).abs().max().item(), 4 * (eps * terms**0.5) * terms**0.5
        assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g}"


def unharmed(memory):
    assert (memory[:64] == 7).all(), "written in front of the tensor"
    assert (memory[-64:] == 7).all(), "written behind the tensor"


@settings(max_examples=100)
@given(problem=problems())
def test_against_float64(instruction_set, problem):
    check(problem)


@pytest.mark.slow
@settings(max_examples=2500)
@given(problem=problems(largest=80))
def test_against_float64_at_length(instruction_set, problem):
    check(problem)


@st.composite
def drawn(draw, largest=24):
    """Two layers of an SFG network, one behind the other: groups, geometries, a norm and a ReLU between them."""
    groups = draw(st.integers(2, 4))
    sizes = st.lists(st.integers(0, 14), min_size=groups, max_size=groups).filter(any)
    layers = []
    for _ in range(2):
        kernel = tuple(draw(st.sampled_from([1, 3, 3, 5])) for _ in range(2))
        dilation = tuple(draw(st.integers(1, 4)) for _ in range(2))
        padding = tuple(d * (k // 2) for d, k in zip(dilation, kernel, strict=True))
        layers.append(((draw(st.sampled_from([1, 1, 2])),) * 2, padding, dilation, kernel))
    return TwoLayers(
        sizes=[draw(sizes) for _ in range(3)],
        own=draw(st.booleans()),
        image=draw(st.booleans()),
        layers=layers,
        size=tuple(draw(st.integers(1, largest)) for _ in range(2)),
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu_pool"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )


def check_gates(p):
    """What the gates of a one-hot draw get, in both ways: from dundrawn, and inside the convolution that reads them."""
    dtype, generator = p.dtype, torch.Generator().manual_seed(p.seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    (c, k, m), groups = map(sum, p.sizes), len(p.sizes[0])
    into, made, out = (
        FilterGroups.from_assignment(torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes)), groups - 1)
        for sizes in p.sizes
    )
    if p.image:
        into = FilterGroups.blocks([c], ("image",))
    (*one, kernel), (*two, kernel_two) = p.layers
    first = RoutedConv(made, into, Routing.ALL if p.image else Routing.ARROW, Geometry(*one))
    second = RoutedConv(out, made, Routing.OWN if p.own else Routing.ARROW, Geometry(*two))
    x, weight, weight_two = random(2, c, *p.size), random(k, c, *kernel), random(m, k, *kernel_two)
    if p.activation == "relu_pool":
        return check_pooled_gates(p, x, weight, first, random)
    bias = random(k) if p.bias else None
    scale, shift = (random(groups - 1, k) if p.norm else None for _ in range(2))

    # u of every kernel in every group, and what every channel of it would get from the second layer.
    packed, packed_two = (cpu.pack(w, b, s, dtype) for w, b, s in ((weight, bias, first), (weight_two, None, second)))
    u, kept_product = cpu.forward(x, packed, first, keep_product=not p.image)
    kept_product = u if p.image else kept_product
    exact_bias = None if bias is None else bias.double()
    reads = [
        [x if p.image else x * (into.ids == source)[:, None, None] for source in {0, group}] for group in range(groups)
    ]
    everywhere = [
        F.conv2d((sources[0] if p.image else sum(sources)).double(), weight.double(), exact_bias, *one)
        for sources in reads
    ]
    eps, terms = torch.finfo(dtype).eps, c * kernel[0] * kernel[1] + 1
    close(u, torch.stack([everywhere[int(g)][:, row] for row, g in enumerate(made.ids)], 1), eps, terms, "forward")
    close(kept_product, everywhere[0], eps, terms, "kept product")
    size_two = second.geometry.output_size(u.shape[2:], kernel_two)
    dy, relu_output = random(2, m, *size_two), random(2, m, *size_two)
    masked_dy = (dy * (relu_output > 0)).double()
    gets = []
    for group in range(groups):
        read_by = (out.ids == group) | torch.tensor(not p.own and group == 0)
        zeros = torch.zeros(u.shape, dtype=torch.float64).requires_grad_()
        y = F.conv2d(zeros, weight_two.double() * read_by[:, None, None, None], None, *two)
        gets.append(torch.autograd.grad(y, zeros, masked_dy)[0])

    def other(tensors):
        """[T, N, k, H, W] of the undrawn rows."""
        return torch.stack(
            [torch.stack([tensors[int(g)][:, row] for row, g in enumerate(n)], 1) for n in made.undrawn_groups]
        )

    learning = second._replace(columns=dataclasses.replace(made, all_gates=True))
    dx, dundrawn = cpu.input_gradient(dy, packed_two, learning, tuple(u.shape[2:]), relu_output=relu_output)
    terms_two = m * kernel_two[0] * kernel_two[1]
    own = torch.stack([gets[int(g)][:, row] for row, g in enumerate(made.ids)], 1)
    close(dx, own, eps, terms_two, "input gradient")
    close(dundrawn, other(gets).transpose(0, 1).flatten(1, 2), eps, terms_two, "gradient of the undrawn rows")

    h = other(everywhere)
    if scale is not None:
        h = h * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    h = h.clamp_min(0) if p.activation else h
    exact = (other(gets) * h).sum((1, 3, 4))
    # An inner product of `positions` numbers as large as sqrt(terms_two) and sqrt(terms).
    bound = 16 * eps * (2 * u[0, 0].numel() * terms * terms_two) ** 0.5 * max(terms, terms_two) ** 0.5
    undrawn = UndrawnFormula(x, kept_product, packed, first, *of_all_images(scale, shift), p.activation)
    assert (cpu.gate_gradient(undrawn, dundrawn).double() - exact).abs().max() <= bound
    features = random(*u.shape)
    if second.geometry.stride != (1, 1):
        return
    dx_alone, dz_alone = cpu.input_and_gate_gradient(dy, packed_two, second, features, None, relu_output=relu_output)
    close(dx_alone, own, eps, terms_two, "input gradient")
    exact_own = (own * features).sum((0, 2, 3))
    assert (dz_alone[0].double() - exact_own).abs().max() <= bound
    dx, dz = cpu.input_and_gate_gradient(dy, packed_two, second, features, undrawn, relu_output=relu_output)
    close(dx, own, eps, terms_two, "input gradient")
    assert (dz[0].double() - exact_own).abs().max() <= bound
    assert (dz[1:].double() - exact).abs().max() <= bound
    again = cpu.input_and_gate_gradient(dy, packed_two, second, features, undrawn, relu_output=relu_output)
    assert torch.equal(dx, again[0])
    assert torch.equal(dz, again[1])


def check_pooled_gates(p, x, weight, spec, random):
    """The same behind ReLU and pooling, for any gradient."""
    bias = random(len(weight)) if p.bias else None
    tasks, k = len(spec.rows.names) - 1, len(weight)
    scale, shift = (random(tasks, k) if p.norm else None for _ in range(2))
    packed = cpu.pack(weight, bias, spec, x.dtype)
    u, kept_product = cpu.forward(x, packed, spec, keep_product=not p.image)
    dundrawn = random(2, tasks * k, u.shape[2] // 2, u.shape[3] // 2)
    if not dundrawn.numel():
        return
    exact = torch.zeros(tasks, k, dtype=torch.float64)
    for n, row in itertools.product(range(tasks), range(k)):
        read = torch.tensor([bool(spec.reads()[spec.rows.undrawn_groups[n, row]][g]) for g in spec.columns.ids])
        kernel = weight[row : row + 1].double() * read[:, None, None]
        h = F.conv2d(x.double(), kernel, None if bias is None else bias[row : row + 1].double(), *spec.geometry)
        h = h if scale is None else h * scale[n, row] + shift[n, row]
        exact[n, row] = (F.max_pool2d(h.relu(), 2)[:, 0] * dundrawn.unflatten(1, (tasks, k))[:, n, row]).sum()
    kept_product = u if p.image else kept_product
    undrawn = UndrawnFormula(x, kept_product, packed, spec, *of_all_images(scale, shift), "relu_pool")
    dz = cpu.gate_gradient(undrawn, dundrawn)
    terms = weight[0].numel() + 1
    bound = 16 * torch.finfo(x.dtype).eps * (dundrawn.numel() * terms) ** 0.5 * terms**0.5
    assert (dz.double() - exact).abs().max() <= bound


@settings(max_examples=60)
@given(problem=drawn())
def test_gates_against_float64(instruction_set, problem):
    check_gates(problem)


@pytest.mark.slow
@settings(max_examples=1500)
@given(problem=drawn(largest=70))
def test_gates_against_float64_at_length(instruction_set, problem):
    check_gates(problem)


@pytest.mark.parametrize("size", [(128, 1), (1, 128), (3, 7), (9, 100), (5, 130), (2, 700)])
@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(3, 1, 1), (3, 4, 1), (3, 1, 2), (1, 1, 1), (5, 2, 1)])
def test_usual_layers(instruction_set, size, kernel, dilation, stride):
    padding = dilation * (kernel // 2)
    check(
        Problem(
            rows=[21, 22, 21],
            columns=[6, 5, 5],
            reads=[True, False, False, True, True, False, True, False, True],  # arrow
            kernel=(kernel, kernel),
            stride=(stride, stride),
            padding=(padding, padding),
            dilation=(dilation, dilation),
            image=size,
            relu=True,
            dtype=torch.float32,
            threads=2,
            seed=1,
        )
    )


def plain_problem(n=2, c=12, size=33):
    groups = FilterGroups.blocks([4, 4, 4], ("shared", "task1", "task2"))
    x, weight = torch.randn(n, c, size, size), torch.randn(c, c, 3, 3)
    return x, weight, RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))


def convolve(x, weight, spec, **options):
    return cpu.forward(x, cpu.pack(weight, None, spec, x.dtype), spec, **options)[0]


def weight_gradient(x, dy, weight, spec, **options):
    return cpu.weight_gradient(x, dy, cpu.pack(weight, None, spec, x.dtype), spec, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_just_their_neighbours(instruction_set, value):
    """Four rows that are made of the same products (kernels/cpu/winograd.h) are neighbours, too."""
    x, weight, spec = plain_problem(n=1)
    clean = convolve(x, weight, spec, relu=True)
    x[0, 0, 10, 10] = value  # shared: everybody reads it
    y = convolve(x, weight, spec, relu=True)
    touched = torch.zeros(33, 33, dtype=torch.bool)
    touched[8:12, 9:12] = True
    assert torch.equal(y[..., ~touched], clean[..., ~touched])
    if value != value:
        assert y[..., 9:12, 9:12].isnan().all()


def test_several_python_threads_at_once(instruction_set):
    x, weight, spec = plain_problem()
    expected = convolve(x, weight, spec)
    before, results = torch.get_num_threads(), []

    def work():
        torch.set_num_threads(2)
        for _ in range(5):
            y = convolve(x, weight, spec)
            results.append((y, weight_gradient(x, y, weight, spec)[0]))

    torch.set_num_threads(2)
    try:
        gradient = weight_gradient(x, expected, weight, spec)[0]
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 20
    for y, dw in results:
        assert torch.equal(y, expected)
        assert torch.equal(dw, gradient)


class _Convolved(torch.utils.data.Dataset):
    """Convolves in the worker."""

    def __init__(self, problem):
        self.problem = problem

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return convolve(*self.problem)[0]


def test_in_forked_workers():
    """The parent's pool of threads does not survive a fork: a worker (one thread) must not wait for it."""
    problem = plain_problem()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = convolve(*problem)[0]  # the pool is running now
        loader = torch.utils.data.DataLoader(
            _Convolved(problem), num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for y in loader:
            assert torch.equal(y[0], expected)
    finally:
        torch.set_num_threads(before)


def test_offsets_beyond_32_bits():
    """An image of more than 2^31 numbers, of which a stride of 64 looks at few: untouched pages cost no memory."""
    import numpy as np

    height, width = 65536 + 64, 32768
    x = torch.from_numpy(np.zeros((1, 1, height, width), dtype=np.float32))
    assert x.numel() > 2**31
    x[0, 0, -64, 64] = 3  # output row -1, column 1
    image = FilterGroups.blocks([1], ("image",))
    spec = RoutedConv(image, image, Routing.ALL, Geometry((64, 64), (0, 0), (1, 1)))
    y = convolve(x, torch.full((1, 1, 1, 1), 2.0), spec)
    assert y[0, 0, -1, 1] == 6
    assert y.count_nonzero() == 1
    dw, _ = weight_gradient(x, torch.ones_like(y), torch.ones(1, 1, 1, 1), spec)
    assert dw.item() == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(12, 11, 3, 3)}, "the weight does not fit the input's channels"),
        ({"weight": torch.zeros(11, 12, 3, 3)}, "the weight does not fit the output's channels"),
        ({"row_order": torch.arange(1, 13)}, "an order leaves the weight"),
        ({"column_order": torch.arange(11)}, "an order does not fit the channels"),
        ({"residual": torch.zeros(2, 12, 33, 32)}, "the residual does not fit"),
        ({"bias": torch.zeros(11)}, "the bias does not fit"),
        ({"y": torch.zeros(2, 12, 32, 33)}, "wrong height or width"),
        ({"rows": [0, 4, 8, 13]}, "offsets don't cover the channels"),
        ({"rows": [0, 8, 4, 12]}, "offsets don't cover the channels"),
        ({"reads": [1] * 8}, "offsets don't fit the table"),
        ({"kept_product": torch.zeros(2, 12, 33, 32)}, "the kept product does not fit"),
        ({"affine": torch.zeros(2, 11)}, "scale and shift don't fit the input"),
        ({"stride": (0, 1)}, "out of range"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dilation": (1, 20)}, "the kernel is larger than the image"),
    ],
)
def test_the_module_checks_what_it_indexes_with(change, message):
    x, weight, spec = plain_problem()
    arguments = {
        "x": x, "weight": weight, "bias": None, "residual": None, "relu": False, "y": torch.empty_like(x),
        "kept_product": None, "rows": spec.rows.ends, "columns": spec.columns.ends, "reads": [1] * 9,
        **spec.geometry._asdict(), "threads": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _native.forward(**{**arguments, **change})


def test_a_kernel_larger_than_the_image_is_refused():
    x, weight, spec = plain_problem(size=2)
    spec = spec._replace(geometry=spec.geometry._replace(padding=(0, 0)))
    with pytest.raises(RuntimeError, match=r"the image has size \(2, 2\), with padding \(0, 0\) that is less"):
        convolve(x, weight, spec)


@pytest.mark.parametrize("empty", ["batch", "channels_last"])
def test_unusual_inputs(empty):
    x, weight, spec = plain_problem()
    if empty == "batch":
        y = convolve(x[:0], weight, spec)
        assert y.shape == (0, 12, 33, 33)
        dw, db = weight_gradient(x[:0], y, weight, spec)
        assert not dw.any()
        assert not db.any()
    else:
        strange = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(*(convolve(t, weight, spec) for t in (x, strange)))
    assert weight_gradient(x, torch.ones_like(x), weight, spec, bias=False)[1] is None


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)).filter(
        lambda shape: shape[0] * shape[2] * shape[3] >= 16
    ),
    st.sampled_from([None, "relu", "relu_pool"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 100.0]),
    st.integers(1, 3),
    st.integers(0, 2**16),
)
def test_normalise(instruction_set, shape, activation, residual, dtype, mean, threads, seed):
    """Against torch's batch normalisation in float64, and autograd through it."""
    n, c, height, width = shape
    pool = activation == "relu_pool"
    if pool:  # torch has no empty maxima
        shape = n, c, max(height, 2), max(width, 2)
    size = (n, c, shape[2] // 2, shape[3] // 2) if pool else shape
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, dtype=dtype, generator=generator) * 3 + mean
    weight, bias = (torch.randn(c, dtype=dtype, generator=generator) for _ in range(2))
    order = torch.randperm(c, generator=generator)
    dy = torch.randn(size, dtype=dtype, generator=generator)
    add, more = (torch.randn(shape, dtype=dtype, generator=generator) if residual else None for _ in range(2))
    add = None if pool else add
    outputs = [guarded(*one, dtype=dtype) for one in (size, (c,), (c,), shape, (c,), (c,))]
    y, average, var, du, dweight, dbias = (tensor for _, tensor in outputs)
    flags = 1e-5, (activation is not None, pool, 0.0)
    _native.normalise(u, weight, bias, order, add, *flags, y, average, var, threads)

    exact = [t.double().requires_grad_() for t in (u, weight, bias)]
    v = F.batch_norm(exact[0], None, None, exact[1][order], exact[2][order], True, 0.1, 1e-5)
    # Within rounding of 0 either side of the ReLU is right, and of two equals in a window either: there dy is 0.
    count, near = u.numel() // c, 1e3 * torch.finfo(dtype).eps * (1 + mean)
    if pool:
        windows = v.detach().unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        two = windows.topk(2, 4).values
        dy.masked_fill_((two[..., 0].abs() < near) | (two[..., 0] - two[..., 1] < near), 0)
    elif activation:
        dy.masked_fill_(v.detach().abs() < near, 0)
    _native.normalise_gradient(dy, u, weight, bias, order, average, var, more, *flags, du, dweight, dbias, threads)
    expected = F.relu(v) if activation else v
    expected = F.max_pool2d(expected, 2) if pool else expected
    expected.backward(dy.double())
    expected = expected.detach() + (0 if add is None else add.double())
    moments = [moment[torch.argsort(order)] for moment in torch.var_mean(u.double(), (0, 2, 3), correction=0)]

    # A value of size `mean` has an error of half an eps of it, and so has the mean of all: in units of the SD, which is
    # 3, or less by chance. Sums of `count` terms err like a random walk.
    bound = 32 * torch.finfo(dtype).eps * (1 + mean / moments[0].sqrt().min().item())
    for found, wanted, scale in (
        (y, expected, 4),
        (average, moments[1], 3),
        (var, moments[0], 9),
        (du, exact[0].grad + (0 if more is None else more), 4),
        (dweight, exact[1].grad, 4 * count**0.5),
        (dbias, exact[2].grad, 4 * count**0.5),
    ):
        assert (found.double() - wanted).abs().max() <= bound * scale
    for memory, _ in outputs:
        assert (memory[:64] == 7).all()
        assert (memory[-64:] == 7).all()


@pytest.mark.parametrize("activation", ["relu", "relu_pool"])
def test_normalise_bits_do_not_depend_on_threads(instruction_set, activation):
    u, dy = torch.randn(2, 3, 7, 30, 31).unbind(0)
    weight, bias = torch.randn(2, 7).unbind(0)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            norm = Norm(weight, bias, None, 1e-5, activation)
            y, mean, var, _ = cpu.normalise(u, norm, None)
            d = dy[..., : y.shape[2], : y.shape[3]].contiguous()
            more = cpu.normalise_gradient(d, u, norm, mean, var, None)
        finally:
            torch.set_num_threads(before)
        found.append([y, mean, var, *more])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [64, 1024])
def test_statistics_of_large_images_are_as_exact(instruction_set, size):
    """A background that is the same everywhere, as in medical images: sums of many equal numbers round alike."""
    u = torch.full((1, 1, size, size), 0.1)
    u[..., : size // 4] = 0.2
    dy = u.flip(3) + 0.3
    affine = torch.ones(1), torch.zeros(1)
    norm = Norm(*affine, None, 1e-5, None)
    y, mean, var, _ = cpu.normalise(u, norm, None)
    found = y, mean, var, *cpu.normalise_gradient(dy, u, norm, mean, var, None)
    exact = u.double().requires_grad_()
    weight, bias = (one.double().requires_grad_() for one in affine)
    expected = F.batch_norm(exact, None, None, weight, bias, True)
    expected.backward(dy.double())
    moments = exact.mean()[None], exact.var(correction=0)[None]
    expected = expected, *moments, exact.grad, weight.grad, bias.grad
    # Gradients are what is left of larger numbers: du of dy / SD, dweight of its terms.
    terms = ((exact - moments[0]) / moments[1].sqrt() * dy).abs().sum().item()
    sizes = 1, 1, 1, 20, terms, 1
    for a, b, size in zip(found, expected, sizes, strict=True):
        torch.testing.assert_close(a.double(), b.detach(), rtol=3e-6, atol=3e-6 * size)


@pytest.mark.parametrize("activation", ["relu", "relu_pool"])
def test_normalise_lets_nan_through(instruction_set, activation):
    """A NaN is not hidden by the ReLU or a maximum, and stays in its channel."""
    u = torch.randn(1, 2, 6, 40)
    u[0, 1, 2, 2] = float("nan")
    norm = Norm(torch.ones(2), torch.zeros(2), None, 1e-5, activation)
    y, mean, var, _ = cpu.normalise(u, norm, None)
    assert y[0, 0].isfinite().all()
    assert y[0, 1].isnan().all()
    du, _, _ = cpu.normalise_gradient(torch.ones_like(y), u, norm, mean, var, None)
    assert du[0, 0].isfinite().all()
    assert du[0, 1].isnan().all()


def test_a_maximum_of_equals_goes_to_the_first(instruction_set):
    """As in torch."""
    u = torch.randint(0, 3, (2, 3, 9, 70), dtype=torch.float64)
    affine = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    norm = Norm(*affine, None, 1e-5, "relu_pool")
    y, mean, var, _ = cpu.normalise(u, norm, None)
    dy = torch.randn_like(y)
    du, _, _ = cpu.normalise_gradient(dy, u, norm, mean, var, None)
    exact = u.clone().requires_grad_()
    F.max_pool2d(F.relu(F.batch_norm(exact, None, None, *affine, True, 0.1, 1e-5)), 2).backward(dy)
    assert (du - exact.grad).abs().max() < 1e-12


def test_memory_of_results_is_used_again():
    """(That it is bounded: test_routed_conv.cpp.)"""
    like = torch.empty(1, 3, 129, 131, dtype=torch.float64)

    def result():
        norm = Norm(*torch.ones(2, 3, dtype=like.dtype), None, 1e-5, None)
        return cpu.normalise(like.normal_(), norm, None)[0]

    first = result()
    address = first.data_ptr()
    assert first.numel() * 8 > cpu.KEPT_FROM
    assert result().data_ptr() != address
    del first
    again = result()
    assert again.data_ptr() == address
    assert address % 64 == 0
    del again
    for _ in range(3):  # capsules that nobody takes a tensor out of
        _native.empty_float64(tuple(like.shape))
    assert result().data_ptr() == address
    with pytest.raises(ValueError, match="a length is negative"):
        _native.empty_float32((1, -2, 3, 4))


def test_results_go_from_process_to_process():
    x, weight, spec = plain_problem(size=100)
    expected = convolve(x, weight, spec)
    assert expected.numel() * 4 > cpu.KEPT_FROM
    loader = torch.utils.data.DataLoader(
        _Convolved((x, weight, spec)), num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for y in loader:
        assert torch.equal(y[0], expected[0])


def test_running_statistics():
    check_statistics(cpu.keep_statistics)
    check_statistics(through(cpu.normalise))
    check_statistics(formulas.keep_statistics)
    with pytest.raises(ValueError, match="there is no such group"):
        check_statistics(lambda mean, var, assignment, *rest: cpu.keep_statistics(mean, var, assignment - 3, *rest))


@pytest.mark.parametrize(("taps", "padding", "dilation"), [(1, 0, 1), (3, 1, 1), (3, 4, 4), (5, 1, 2)])
@pytest.mark.parametrize("size", [(7, 8), (33, 50)])
def test_a_convolution_normalises_what_it_reads(instruction_set, taps, padding, dilation, size):
    """And zeros around the image stay zeros."""
    u, weight = torch.randn(2, 5, *size, dtype=torch.float64), torch.randn(4, 5, taps, taps, dtype=torch.float64)
    parameters = torch.randn(2, 5, dtype=torch.float64).unbind(0)
    rows, columns = FilterGroups.blocks([4], ("all",)), FilterGroups.blocks([5], ("all",))
    spec = RoutedConv(rows, columns, Routing.ALL, Geometry((1, 1), (padding,) * 2, (dilation,) * 2))
    running = torch.zeros(2, 5, dtype=torch.float64).unbind(0)
    norm = Norm(*parameters, None, 1e-5, "relu")
    affine, mean, var = cpu.statistics(u, norm, *running, 0.1)
    y = cpu.forward(u, cpu.pack(weight, None, spec, u.dtype), spec, affine=affine)[0]
    expected = torch.zeros(2, 5, dtype=torch.float64).unbind(0)
    h = F.relu(F.batch_norm(u, *expected, *parameters, True, 0.1, 1e-5))
    torch.testing.assert_close(running, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, F.conv2d(h, weight, None, 1, padding, dilation), rtol=0, atol=1e-11)
    dy = torch.randn_like(u)
    expected = cpu.normalise_gradient(dy, u, norm, mean, var, None)
    *found, again = cpu.normalise_gradient_again(dy, u, norm, mean, var, None)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert again.data_ptr() == dy.data_ptr(), "no memory of its own"
    torch.testing.assert_close(again, h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3), (5, 2), (64, 3), (200, 7)])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_is_what_torch_draws(shape, noise, dtype):
    log_p = torch.randn(shape, dtype=dtype).round()  # ties
    log_p[-1, -1] = float("nan")
    arguments = log_p, torch.randn(shape, dtype=dtype).round() if noise else None
    *found, kept = cpu.sample(*arguments)
    *expected, _ = masked.sample(*arguments)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    groups = FilterGroups.from_assignment(expected[0], shape[1] - 1)
    assert kept.pop("ends") == groups.ends
    assert {"ids", "inverse", "undrawn_groups"} == set(kept)
    assert all(torch.equal(values, getattr(groups, name)) for name, values in kept.items())


@pytest.mark.parametrize("name", ["native", "masked"])
def test_scale_and_shift_of_all_undrawn_rows_at_once(name):
    """[1, rows] instead of [G-1, rows], in both ways to the gates' gradient."""
    kernels = load(name)
    torch.manual_seed(2)
    groups = FilterGroups.from_assignment(torch.arange(12) % 3, all_gates=True)
    spec = RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    x, dy, weight = torch.randn(2, 12, 9, 20), torch.randn(2, 12, 9, 20), torch.randn(12, 12, 3, 3)
    packed = kernels.pack(weight, None, spec, x.dtype)
    u, kept_product = kernels.forward(x, packed, spec, keep_product=True)
    affine = torch.randn(2, 1, 12)
    found = []
    for scale, shift in (affine, affine.expand(2, 2, 12)):
        undrawn = UndrawnFormula(x, kept_product, packed, spec, scale[None], shift[None], "relu")
        found.append([kernels.gate_gradient(undrawn, torch.cat([dy, 2 * dy], 1))])
        if kernels.COMPUTES_GATE_GRADIENTS:
            found[-1] += kernels.input_and_gate_gradient(dy, packed, spec, u, undrawn)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
