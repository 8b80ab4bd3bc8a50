"""Checks of the Triton kernels on this GPU: their results are compared with plain float64 convolutions in which all
groups stand side by side.

On a CPU the kernels run in Triton's interpreter, on tiny images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..backends import backend, load
from ..groups import FilterGroups, Routing
from ..kernels.contract import normalises
from ..kernels.spec import Geometry, MovingStatistics, Norm, RoutedConv, RunningStatistics
from ..routed_conv import convolve, routed_conv
from ..routed_conv.gate_gradient import AnyUndrawnRows, UndrawnRows


class WrongResult(Exception):
    """A kernel computed something else than it should. (It is no AssertionError, because `python -O` leaves assertions
    out.)"""


class Precision(NamedTuple):
    """A dtype, whether its products are made in TF32, and the largest |error| / |exact| that is right."""

    dtype: torch.dtype
    tf32: bool
    bound: float


# The bounds: half precision may be two units in the last place off, because results are rounded once (and the gradients
# of ReLUs' outputs twice). TF32 rounds its factors, which may be as many units off. In float32 it is 16 units, for sums
# of thousands of products.
PRECISIONS = {
    "bfloat16": Precision(torch.bfloat16, False, 2**-7),
    "float16": Precision(torch.float16, False, 2**-10),
    "tf32": Precision(torch.float32, True, 2**-9),
    "float32": Precision(torch.float32, False, 2**-19),
}
INTERPRETED = ("float16", "float32")  # Triton's interpreter multiplies no bfloat16, and has no TF32


class Case(NamedTuple):
    """A layer that is checked."""

    rows: tuple[int, ...]  # the kernels of each group, shared first
    columns: tuple[int, ...]  # the input channels of each group; one number for an image that all groups read
    # "packed": rows and columns are packed. "undrawn": they are, too, and their undrawn gates want a gradient.
    # "relaxed": the rows are relaxed and read streams. "streams": both sides are streams, and each stream has its own
    # weights.
    kind: str = "packed"
    routing: str = "arrow"
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    image: tuple[int, int] = (37, 70)
    bias: bool = True

    def __str__(self) -> str:
        sides = [str(sum(self.columns)), str(sum(self.rows))]
        more = [self.kind, self.routing, "{}x{}".format(*self.kernel)]
        more += [f"stride {self.stride[0]}"] * (self.stride != (1, 1))
        more += [f"dilation {self.dilation[0]}"] * (self.dilation != (1, 1))
        more += ["no bias"] * (not self.bias)
        return f"{'->'.join(sides)} in {len(self.rows)} groups, {', '.join(more)}"


IMAGE = Case((5, 6, 5), (1,), routing="all")
# There is a case for each kernel that convolves; together the cases launch every kernel that layers need.
ONE_FOR_EACH_KERNEL = {
    "image": IMAGE,
    "rowwalk": Case((5, 6, 5), (5, 6, 5)),
    "convolve": Case((7, 0, 10), (0, 9, 12), kernel=(5, 3), stride=(2, 3), padding=(3, 0), dilation=(3, 2)),
    "undrawn": Case((5, 6, 5), (5, 6, 5), kind="undrawn"),
    "relaxed": Case((5, 6, 5), (5, 6, 5), kind="relaxed"),
}
CASES = [
    *ONE_FOR_EACH_KERNEL.values(),
    Case((11, 10, 11), (11, 10, 11)),
    Case((21, 22, 21), (21, 22, 21), dilation=(4, 4), padding=(4, 4)),
    Case((43, 42, 43), (43, 42, 43)),
    Case((43, 42, 43), (22, 21, 22), bias=False),  # wide and nothing fused: cuDNN does it in half precision
    Case((43, 42, 43), (11, 10, 11), stride=(2, 2)),
    Case((3, 4, 5, 6), (6, 0, 7, 4), kernel=(1, 1), padding=(0, 0)),
    Case((64, 64, 64), (64, 64, 64), routing="own"),
    Case((150, 3, 3), (2, 120, 31)),
    Case((21, 22, 21), (21, 22, 21), kind="undrawn"),
    Case((43, 42, 43), (21, 22, 21), kind="undrawn", stride=(2, 2)),
    Case((20, 22, 21), (33, 0, 7), kind="relaxed", dilation=(2, 1), padding=(2, 1)),
    Case((16, 16, 16), (5, 5, 6), kind="streams", routing="own", dilation=(2, 2), padding=(2, 2)),
    Case((64, 64, 64), (21, 22, 21), kind="streams", routing="own"),
    Case((32, 32, 32), (11, 10, 11), kind="streams", kernel=(1, 1), padding=(0, 0)),
]
NORMS = (16, 100)  # the channels of the normalisations that are checked


def checks(device: torch.device, widths: tuple[int, ...] = ()) -> dict[str, Callable[[], dict[str, float]]]:
    """Every check by name ("bfloat16 16->16 .."), those of the precisions that most people use first.

    A check is a function that returns the relative error of each result, and raises WrongResult if a second run gives
    other bits or an error is above the precision's bound. widths: layers of so many kernels, evenly split as in
    networks, are checked, too. Every case is then checked once, with or without a ReLU, instead of with both.
    """
    found: dict[str, Callable[[], dict[str, float]]] = {}
    interpreted = device.type == "cpu"
    cases = [case._replace(image=(9, 11)) for case in ONE_FOR_EACH_KERNEL.values()] if interpreted else CASES
    splits = [(k - k // 3 * 2, k // 3, k // 3) for k in widths]
    cases = [*cases, *(Case(s, s, kind, image=cases[0].image) for s in splits for kind in ("packed", "undrawn"))]
    for name in INTERPRETED if interpreted else PRECISIONS:
        for case in cases:
            both = (case.kind == "packed",) if widths else (True, False)
            for relu in (False,) if case.kind == "relaxed" or interpreted else both:
                label = f"{name} {case}{', ReLU' if relu else ''}"
                found[label] = partial(within, name, partial(check_layer, case, name, relu, device))
        norms = NORMS[: 1 if interpreted else None]
        for channels, each_image in [*((n, False) for n in norms), (norms[-1], True)]:
            label = f"{name} normalisation of {channels} channels{' of each image' if each_image else ''}"
            found[label] = partial(within, name, partial(check_norm, channels, each_image, name, device))
    found["draw of 100 kernels"] = partial(check_draw, 100, device)
    return found


def within(precision: str, check: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The errors of a check. Raises WrongResult if one is above the bound of the precision, or is NaN."""
    with _uninitialised_memory_poisoned(), products(precision):
        errors = check()
    bound = PRECISIONS[precision].bound
    wrong = {name: error for name, error in errors.items() if not error <= bound}
    _right(not wrong, f"relative errors {wrong}, at most {bound:.1e} is right")
    return errors


def check_layer(case: Case, precision: str, relu: bool, device: torch.device) -> dict[str, float]:
    """The relative errors of all results of a layer, forward and backward, against float64. Raises WrongResult if a
    second run gives other bits."""
    torch.manual_seed(0)
    dtype, groups = PRECISIONS[precision].dtype, len(case.rows)
    out, into = (torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (case.rows, case.columns))
    out = out[torch.randperm(len(out))].to(device)
    k, c = len(out), len(into)
    geometry, learns = Geometry(case.stride, case.padding, case.dilation), case.kind == "undrawn"
    if case.routing == "all":
        columns = FilterGroups.blocks([c], ("image",), device)
    elif case.kind in ("relaxed", "streams"):
        columns = FilterGroups.streams(c, groups - 1, device)
    else:
        columns = FilterGroups.from_assignment(into[torch.randperm(c)].to(device), groups - 1, all_gates=learns)
    rows = FilterGroups.from_assignment(out, groups - 1, all_gates=learns)
    if case.kind == "relaxed":
        rows = FilterGroups.relaxed(F.one_hot(out, groups).float(), groups - 1)
    elif case.kind == "streams":
        rows = FilterGroups.blocks(case.rows, columns.names, device)
    spec = RoutedConv(rows, columns, Routing(case.routing), geometry)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = random(2, len(columns.order), *case.image).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = random(k, c, *case.kernel).requires_grad_()
    bias = random(k).requires_grad_() if case.bias else None
    leaves = [x, weight] if bias is None else [x, weight, bias]
    if learns:  # this leaf gets the gradient of the undrawn rows of the input
        leaves.append(x.new_zeros(()).expand(2, (groups - 1) * c, *case.image).requires_grad_())

    def run() -> tuple[Tensor, AnyUndrawnRows | None, tuple[Tensor, ...]]:
        undrawn = None
        with backend("triton"):
            if learns:
                y, undrawn, *_ = convolve(x, weight, bias, spec, relu, undrawn=leaves[3], keep_product=True)
            else:
                y = routed_conv(x, weight, bias, spec, relu)
        torch.manual_seed(1)
        return y, undrawn, torch.autograd.grad(y, leaves, random(*y.shape))

    y, undrawn, gradients = run()
    again = run()
    _same_bits((y, *gradients), (again[0], *again[2]))

    # The exact layer has every channel in every group: as it is in its own group, zero elsewhere.
    exact_weight = weight.detach().double().requires_grad_()
    exact_bias = (weight.new_zeros(k) if bias is None else bias.detach()).double().requires_grad_()
    exact_x = x.detach().double()
    if case.routing != "all":
        exact_x = exact_x.new_zeros(2, groups * c, *case.image).index_copy(1, columns.rows_in_streams, exact_x)
    exact_x.requires_grad_()
    dense = [exact_x] * groups if case.routing == "all" else list(exact_x.split(c, 1))
    if case.routing == "arrow":
        dense = [dense[0], *(task + dense[0] for task in dense[1:])]
    everything = torch.cat([F.conv2d(read, exact_weight, exact_bias, *geometry) for read in dense], 1)
    if case.kind == "streams":
        own = torch.cat([u.chunk(groups, 1)[g] for g, u in enumerate(everything.chunk(groups, 1))], 1)
    else:
        own = everything[:, rows.rows_in_streams]
    torch.manual_seed(1)
    exact_dy = random(*y.shape).double()
    # Both gradients go through the ReLU of the kernels' y, because rounding flips signs near zero.
    exact_leaves = [exact_x, exact_weight, exact_bias]
    dx, dw, db = torch.autograd.grad(own, exact_leaves, exact_dy * (y > 0) if relu else exact_dy)
    live_dx = dx if case.routing == "all" else dx[:, columns.rows_in_streams]
    pairs = {"forward": (y, own.relu() if relu else own), "dx": (gradients[0], live_dx), "dw": (gradients[1], dw)}
    if case.bias:
        pairs["db"] = (gradients[2], db)
    if isinstance(undrawn, UndrawnRows):
        pairs["dundrawn"] = (gradients[-1], dx[:, (columns.undrawn_groups * c + columns.order).flatten()])
        of_rows = rows.undrawn_groups * k + rows.order
        u = everything.detach()[:, of_rows.flatten()].unflatten(1, of_rows.shape)
        df = random(2, (groups - 1) * k, *u.shape[3:])
        # Without a norm; or behind a batch norm, and behind a norm of each image.
        forms = [("gates", 1, "relu"), *([] if relu else [("gates, each image", 2, "leaky_relu")])]
        for name, images, activation in forms:
            h, scale, shift = u, None, None
            if not relu:
                scale, shift = torch.randn(2, images, groups - 1, k, 1, 1, device=device)
                h = u * scale.double() + shift.double()
            formula = undrawn.formula(scale, shift, activation)
            dz, dz_again = (load("triton").gate_gradient(formula, df) for _ in range(2))
            _same_bits([dz], [dz_again])
            h = ACTIVATIONS[activation](h)
            pairs[name] = (dz, (df.double().unflatten(1, of_rows.shape) * h).sum((0, 3, 4)))
    return _errors(pairs)


def check_norm(channels: int, each_image: bool, precision: str, device: torch.device) -> dict[str, float]:
    """The relative errors of a normalisation, its activation and the shortcut in one go, forward and backward, against
    torch's own in float64: of a batch normalisation and ReLU, or, with each_image, of an instance normalisation and
    leaky ReLU."""
    torch.manual_seed(0)
    size = (9, 7) if device.type == "cpu" else (37, 70)
    dtype, kernels = PRECISIONS[precision].dtype, load("triton")
    assert normalises(kernels)
    order = torch.randperm(channels, device=device)
    u, residual, dy, add = (
        torch.randn(3, channels, *size, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(4)
    )
    u = u + torch.linspace(-3, 3, channels, device=device).to(dtype)[:, None, None]
    weight, bias = (torch.randn(channels, device=device) for _ in range(2))
    norm = Norm(weight, bias, order, 1e-5, "leaky_relu" if each_image else "relu", each_image)

    def run() -> list[Tensor]:
        y, mean, var, _ = kernels.normalise(u, norm, residual)
        gradients = kernels.normalise_gradient(dy, u, norm, mean, var, add)
        return [y, mean, var, *gradients]

    found, again = run(), run()
    _same_bits(found, again)
    exact_u, exact_weight, exact_bias = (t.double().requires_grad_() for t in (u, weight, bias))
    of_rows = exact_weight[order], exact_bias[order], True, 0.0, 1e-5
    if each_image:
        h = F.leaky_relu(F.instance_norm(exact_u, None, None, *of_rows))
    else:
        h = F.batch_norm(exact_u, None, None, *of_rows).relu()
    du, dweight, dbias = torch.autograd.grad(h, (exact_u, exact_weight, exact_bias), dy.double())
    var, mean = torch.var_mean(u.double(), (2, 3) if each_image else (0, 2, 3), correction=0)
    inverse = torch.argsort(order)
    exact = [h + residual.double(), mean[..., inverse], var[..., inverse], du + add.double(), dweight, dbias]
    names = ("forward", "mean", "variance", "dx", "dweight", "dbias")
    return _errors(dict(zip(names, zip(found, exact, strict=True), strict=True)))


def check_draw(kernels: int, device: torch.device) -> dict[str, float]:
    """Compares a draw with torch's argmax of log p + noise, and its order with torch's stable sort. Returns the
    relative errors of the running statistics, which the draw's groups keep. Raises WrongResult if anything differs."""
    torch.manual_seed(0)
    triton, groups = load("triton"), 3
    assert normalises(triton)
    log_p, noise = (torch.randn(kernels, groups, device=device) for _ in range(2))
    assignment, order, offsets, known = triton.sample(log_p, noise)
    expected = (log_p + noise).argmax(1)
    _right(torch.equal(assignment, expected), "the draw is not argmax(log p + noise)")
    _right(torch.equal(order, torch.argsort(expected, stable=True)), "the kernels are not sorted by group")
    counts = [0, *torch.bincount(expected.cpu(), minlength=groups).cumsum(0).tolist()]
    _right(offsets.tolist() == counts, "the groups' offsets are not their sizes added up")
    plain = FilterGroups.from_assignment(expected.cpu(), groups - 1)
    for name, value in known.items():
        _right(torch.equal(value.cpu(), getattr(plain, name)), f"the draw's {name} are not those of its groups")
    u = torch.randn(2, kernels, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    var, mean = torch.var_mean(u.double().cpu(), (0, 2, 3), correction=0)
    running = (torch.zeros(groups, kernels, device=device), torch.ones(groups, kernels, device=device))
    draws = torch.randint(5, (groups, kernels), device=device).float()
    pooled = (torch.zeros(kernels, device=device), torch.ones(kernels, device=device))
    exact = [t.double().cpu().clone() for t in (*running, *pooled)]
    counted = draws.cpu().clone()
    norm = Norm(torch.ones(kernels, device=device), torch.zeros(kernels, device=device), None, 1e-5, None)
    moves = MovingStatistics(RunningStatistics(*running, draws, *pooled), assignment, 0.1)
    triton.normalise(u, norm, None, moves=moves)
    for kernel, group in enumerate(expected.tolist()):
        counted[group, kernel] += 1
        values = mean[kernel], var[kernel] * 50 / 49
        for value, own, all_groups in zip(values, exact[:2], exact[2:], strict=True):
            own[group, kernel] += max(1 / int(counted[group, kernel]), 0.1) * (value - own[group, kernel])
            all_groups[kernel] += max(1 / int(counted[:, kernel].sum()), 0.1) * (value - all_groups[kernel])
    _right(torch.equal(draws.cpu(), counted), "the draws are miscounted")
    names = ("running mean", "running variance", "pooled mean", "pooled variance")
    errors = _errors(dict(zip(names, zip([t.cpu() for t in (*running, *pooled)], exact, strict=True), strict=True)))
    _right(max(errors.values()) < 1e-6, f"relative errors {errors}")
    return errors


def _errors(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


def _right(holds: bool, what: str) -> None:
    if not holds:
        raise WrongResult(what)


def _same_bits(results: Any, again: Any) -> None:
    for a, b in zip(results, again, strict=True):
        _right(torch.equal(a, b), "a second run gave other bits")


@contextlib.contextmanager
def _uninitialised_memory_poisoned() -> Iterator[None]:
    """Fills new memory with NaN, so that what a kernel leaves out, or reads too early, is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Makes cuDNN multiply float32 as a precision (a key of PRECISIONS) says, during the body of the `with`."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "tf32" if PRECISIONS[precision].tf32 else "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before
