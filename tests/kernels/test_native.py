"""The C++ kernels themselves, on every instruction set that this processor has, against float64 convolution with a
masked weight, written plainly."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sfg_fast.kernels.spec import Geometry, RoutedConv

from sfg_fast.backends import available
from sfg_fast.groups import FilterGroups, Routing

if not available("native"):
    pytest.skip("native is not built", allow_module_level=True)

from sfg_fast.kernels import cpu
from sfg_fast.kernels.cpu import _native


@pytest.fixture(params=_native.instruction_sets(), scope="module")
def instruction_set(request):
    _native.use(request.param)
    yield request.param
    _native.use(cpu.INSTRUCTION_SET)


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
    return {
        "rows": rows,
        "columns": columns,
        "reads": draw(st.lists(st.booleans(), min_size=len(rows) * len(columns), max_size=len(rows) * len(columns))),
        "kernel": kernel,
        "stride": tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(2)),
        "padding": padding,
        "dilation": dilation,
        "image": image,
        "batch": draw(st.integers(1, 3)),
        "relu": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
        "threads": draw(st.integers(1, 3)),
        "seed": draw(st.integers(0, 2**16)),
    }


def offsets(sizes):
    return torch.tensor([0, *sizes]).cumsum(0)


def guarded(*shape, dtype):
    """A tensor full of NaN, between two rows of sentinels: what a kernel leaves out or writes outside is seen."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), float("nan"), dtype=dtype)
    memory[:64] = memory[64 + size :] = 7
    return memory, memory[64 : 64 + size].view(shape)


def check(problem):
    """Forward and gradients. Bounds: four eps times the square root of the reduction length n, for a sum as large as n
    products of standard normal numbers are, sqrt(n): rounding errors add up like a random walk."""
    p, dtype = problem, problem["dtype"]
    generator = torch.Generator().manual_seed(p["seed"])

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    k, c, n = sum(p["rows"]), sum(p["columns"]), p["batch"]
    reads = torch.tensor(p["reads"]).view(len(p["rows"]), len(p["columns"]))
    blocks = offsets(p["rows"]), offsets(p["columns"]), reads
    geometry = Geometry(p["stride"], p["padding"], p["dilation"])
    mask = torch.repeat_interleave(
        torch.repeat_interleave(reads, torch.tensor(p["rows"]), 0), torch.tensor(p["columns"]), 1
    )
    x, weight = random(n, c, *p["image"]), random(k, c, *p["kernel"])
    read = weight * mask[:, :, None, None]
    weight[~mask] = float("nan")  # must not be looked at
    bias = random(k) if p["bias"] else None

    leaves = [t.double().requires_grad_() for t in (x, read)]
    exact_bias = torch.zeros(k, dtype=torch.float64) if bias is None else bias.double()
    exact_bias.requires_grad_()
    exact = F.conv2d(*leaves, exact_bias, *geometry)
    residual = random(*exact.shape) if p["residual"] else None

    memory, y = guarded(*exact.shape, dtype=dtype)
    arguments = (*blocks, *geometry)
    _native.forward(x, weight, bias, residual, p["relu"], y, *arguments, p["threads"])
    wanted = exact.relu() if p["relu"] else exact
    wanted = wanted.detach() + (0 if residual is None else residual.double())
    taps = p["kernel"][0] * p["kernel"][1]
    inputs = int(mask.sum(1).max()) * taps + 2  # and bias and residual
    eps = torch.finfo(dtype).eps
    close(y, wanted, eps, inputs, "forward")
    unharmed(memory)

    # The kernels' own ReLU output serves both: a sign that rounding flips near zero is no error of the gradient.
    _native.forward(x, weight, bias, None, True, y, *arguments, p["threads"])
    dy = random(*exact.shape)
    passed = y if p["relu"] else None
    exact.backward((dy * (y > 0) if p["relu"] else dy).double())

    memory, dx = guarded(*x.shape, dtype=dtype)
    _native.input_gradient(dy, passed, weight, dx, *arguments, p["threads"])
    outputs = max(int(mask.sum(0).max()) * taps, 1)
    close(dx, leaves[0].grad, eps, outputs, "input gradient")
    unharmed(memory)

    memory, dw = guarded(*weight.shape, dtype=dtype)
    bias_memory, db = guarded(k, dtype=dtype)
    _native.weight_gradient(x, dy, passed, dw, db, *arguments, p["threads"])
    positions = n * exact.shape[2] * exact.shape[3]
    assert not dw[~mask].any(), "zero where not read"
    close(dw, leaves[1].grad * mask[:, :, None, None], eps, positions, "weight gradient")
    close(db, exact_bias.grad, eps, positions, "bias gradient")
    unharmed(memory)
    unharmed(bias_memory)

    for result, run in (
        (y, lambda out, threads: _native.forward(x, weight, bias, None, True, out, *arguments, threads)),
        (dx, lambda out, threads: _native.input_gradient(dy, passed, weight, out, *arguments, threads)),
    ):
        for threads in (1, 2):
            again = torch.full_like(result, float("nan"))
            run(again, threads)
            assert torch.equal(again, result), "the bits of outputs don't depend on the number of threads"
    again, db_again = torch.full_like(dw, float("nan")), torch.full_like(db, float("nan"))
    _native.weight_gradient(x, dy, passed, again, db_again, *arguments, p["threads"])
    assert torch.equal(again, dw)
    assert torch.equal(db_again, db)


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


@pytest.mark.parametrize("size", [(128, 1), (1, 128), (3, 7), (9, 100), (5, 130), (2, 700)])
@pytest.mark.parametrize(("kernel", "dilation", "stride"), [(3, 1, 1), (3, 4, 1), (3, 1, 2), (1, 1, 1), (5, 2, 1)])
def test_usual_layers(instruction_set, size, kernel, dilation, stride):
    padding = dilation * (kernel // 2)
    check(
        {
            "rows": [21, 22, 21],
            "columns": [6, 5, 5],
            "reads": [True, False, False, True, True, False, True, False, True],  # arrow
            "kernel": (kernel, kernel),
            "stride": (stride, stride),
            "padding": (padding, padding),
            "dilation": (dilation, dilation),
            "image": size,
            "batch": 2,
            "relu": True,
            "residual": False,
            "bias": True,
            "dtype": torch.float32,
            "threads": 2,
            "seed": 1,
        }
    )


def plain_problem(n=2, c=12, size=33):
    groups = FilterGroups.blocks([4, 4, 4], ("shared", "task1", "task2"))
    x, weight = torch.randn(n, c, size, size), torch.randn(c, c, 3, 3)
    return x, weight, RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))


def convolve(x, weight, spec, **options):
    return cpu.forward(x, cpu.pack(weight, None, spec, x.dtype), spec, **options)


def weight_gradient(x, dy, weight, spec, **options):
    return cpu.weight_gradient(x, dy, cpu.pack(weight, None, spec, x.dtype), spec, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_just_their_neighbours(instruction_set, value):
    x, weight, spec = plain_problem(n=1)
    clean = convolve(x, weight, spec, relu=True)
    x[0, 0, 10, 10] = value  # shared: everybody reads it
    y = convolve(x, weight, spec, relu=True)
    touched = torch.zeros(33, 33, dtype=torch.bool)
    touched[9:12, 9:12] = True
    assert torch.equal(y[..., ~touched], clean[..., ~touched])
    if value != value:
        assert y[..., touched].isnan().all()


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
        ({"weight": torch.zeros(12, 11, 3, 3)}, "does not fit input and output channels"),
        ({"residual": torch.zeros(2, 12, 33, 32)}, "the residual does not fit"),
        ({"bias": torch.zeros(11)}, "the bias does not fit"),
        ({"y": torch.zeros(2, 12, 32, 33)}, "wrong height or width"),
        ({"rows": torch.tensor([0, 4, 8, 13])}, "offsets don't cover the channels"),
        ({"rows": torch.tensor([0, 8, 4, 12])}, "offsets don't cover the channels"),
        ({"stride": (0, 1)}, "out of range"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"dilation": (1, 20)}, "the kernel is larger than the image"),
    ],
)
def test_the_module_checks_what_it_indexes_with(change, message):
    x, weight, spec = plain_problem()
    arguments = {
        "x": x, "weight": weight, "bias": None, "residual": None, "relu": False, "y": torch.empty_like(x),
        **dict(zip(("rows", "columns", "reads"), spec.blocks(), strict=True)), **spec.geometry._asdict(), "threads": 1,
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
