"""The routed convolution in C++, vectorised, for float32 and float64 on the CPU. It skips what a group does not read.

The kernels share torch's thread pool, and use as many threads as torch does. The bits of outputs and input gradients
don't depend on the number of threads; those of the gradients of weight, bias and gates do, because each thread sums its
part of the positions. `contract.py` says what each function computes.
"""

import math
from typing import Any, NamedTuple

import torch  # its OpenMP runtime must be loaded first: the extension then uses the same thread pool
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from ...activations import LEAKY_SLOPE
from ...groups import Routing
from .. import formulas
from ..masked import missing
from ..packing import unpack, unpack_dim
from ..spec import (
    NO_SHORTCUT,
    MovingStatistics,
    Norm,
    Pair,
    RoutedConv,
    RunningStatistics,
    ShortcutGradient,
    UndrawnFormula,
)
from . import _native

__all__ = [
    "COMPUTES_GATE_GRADIENTS",
    "KNOWS",
    "MASKS_GRADIENTS",
    "MEMORY_FORMAT",
    "NORMALISES",
    "OF_TORCH",
    "READS_NORMALISED",
    "SHARES_PRODUCTS",
    "cannot",
    "forward",
    "gate_gradient",
    "input_and_gate_gradient",
    "input_gradient",
    "missing",
    "normalise",
    "normalise_gradient",
    "normalise_gradient_again",
    "pack",
    "sample",
    "statistics",
    "weight_gradient",
]

MASKS_GRADIENTS = COMPUTES_GATE_GRADIENTS = NORMALISES = READS_NORMALISED = True
OF_TORCH = SHARES_PRODUCTS = False
MEMORY_FORMAT, KNOWS = torch.contiguous_format, (None, "relu", "leaky_relu", "relu_pool")

KEPT_FROM = 128 << 10  # bytes: malloc's own limit, from which it asks the system

INSTRUCTION_SET = _native.instruction_sets()[0]  # the fastest that this processor has; it is in use


def cannot(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, the native kernels run on the CPU"
    if x.dim() > 4:
        return f"the tensor has {x.dim()} dimensions, the native kernels take images [N, C, H, W]"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the tensor is {x.dtype}, the native kernels take float32 and float64"
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
        return f"the tensor is a {type(x).__name__} ({x.layout}), the native kernels need plain memory"
    return None


class Parameters(NamedTuple):
    """Weight [K, C, kH, kW] and bias [K] in the layer's own order: the C++ kernels look up where each packed row and
    column stands."""

    weight: Tensor
    bias: Tensor | None


def sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    kernels, groups = log_p.shape
    rows = log_p.new_empty((groups + 3, kernels), dtype=torch.int64)
    assignment, order, known = rows[0], rows[1], rows[2:]
    offsets = log_p.new_empty(groups + 1, dtype=torch.int64)
    found = (to_dlpack(tensor) for tensor in (assignment, order, offsets, known))
    ends = _native.sample(_plain(log_p), _plain_or_none(noise), *found)
    return assignment, order, offsets, {"ends": ends, "ids": known[0], "inverse": known[1], "undrawn_groups": known[2:]}


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype) -> Parameters:
    return Parameters(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


def forward(
    x: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    keep_product: bool = False,
    affine: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), _taps(packed))
    shape = x.shape[0], spec.rows.order.numel(), *size
    y, kept_product = _empty(x, *shape), _empty(x, *shape) if keep_product else None
    _native.forward(
        _plain(x),
        _plain(packed.weight),
        _plain_or_none(packed.bias),
        _plain_or_none(residual),
        relu,
        to_dlpack(y),
        _plain_or_none(kept_product),
        *_where(spec),
        *_orders(spec),
        _plain_or_none(affine),
    )
    return y, kept_product


def input_gradient(
    dy: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    size: tuple[int, int],
    *,
    relu_output: Tensor | None = None,
    shortcut: ShortcutGradient = NO_SHORTCUT,
) -> tuple[Tensor, Tensor | None]:
    images, channels, groups = dy.shape[0], spec.columns.order.numel(), len(spec.columns.names)
    dx = _empty(dy, images, channels, *size)
    dundrawn = _empty(dy, images, (groups - 1) * channels, *size) if spec.columns.all_gates else None
    _native.input_gradient(
        _plain(dy),
        _plain_or_none(relu_output),
        _plain(packed.weight),
        _plain_or_none(shortcut.dx),
        _plain_or_none(shortcut.dundrawn),
        to_dlpack(dx),
        _plain_or_none(dundrawn),
        None,
        None,
        None,
        *_where(spec),
        *_orders(spec),
    )
    return dx, dundrawn


def input_and_gate_gradient(
    dy: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    features: Tensor,
    formula: UndrawnFormula | None,
    *,
    relu_output: Tensor | None = None,
    drawn: bool = True,
    shortcut: ShortcutGradient = NO_SHORTCUT,
) -> tuple[Tensor, Tensor]:
    dx = _empty(features, *features.shape)
    dz = dy.new_empty(1 if formula is None else len(spec.columns.names), features.shape[1])
    _native.input_gradient(
        _plain(dy),
        _plain_or_none(relu_output),
        _plain(packed.weight),
        _plain_or_none(shortcut.dx),
        _plain_or_none(shortcut.dundrawn),
        to_dlpack(dx),
        None,
        _plain(features) if drawn else None,
        None if formula is None else _arguments(formula),
        to_dlpack(dz),
        *_where(spec),
        *_orders(spec),
    )
    return dx, dz


def gate_gradient(formula: UndrawnFormula, dundrawn: Tensor) -> Tensor:
    dz = dundrawn.new_empty(len(formula.spec.rows.names) - 1, formula.spec.rows.order.numel())
    _native.gate_gradient(_arguments(formula), _plain(dundrawn), to_dlpack(dz), torch.get_num_threads())
    return dz


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    *,
    relu_output: Tensor | None = None,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    rows, columns = spec.rows, spec.columns
    # No two entries of the packed gradient belong to one weight, where a row reads each channel once (of full columns:
    # where each group reads its own alone) and each kernel has one row. The kernels then write straight into dw.
    read_once = columns.order.numel() == columns.width or not columns.full or spec.routing is Routing.OWN
    each_once = read_once and rows.order.numel() == rows.width
    orders = _orders(spec) if each_once else (None, None)
    sizes = packed.weight.shape[:2] if each_once else (rows.order.numel(), columns.order.numel())
    dw = x.new_empty(*sizes, *packed.weight.shape[2:])
    db = x.new_empty(sizes[0]) if bias else None
    _native.weight_gradient(
        _plain(x), _plain(dy), _plain_or_none(relu_output), to_dlpack(dw), _plain_or_none(db), *_where(spec), *orders
    )
    if each_once:
        return dw, db
    return unpack(dw, rows, columns), None if db is None else unpack_dim(db, 0, rows)


def normalise(
    u: Tensor, norm: Norm, residual: Tensor | None, *, moves: MovingStatistics | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if norm.each_image:
        images, channels = u.shape[:2]
        y, *statistics, affine = normalise(_one_image(u), _for_one_image(norm, images), _one_image(residual))
        mean, var = (one.view(images, -1) for one in statistics)
        return y.view(images, channels, *y.shape[2:]), mean, var, affine.view(2, images, channels)
    activation = _activation(norm.activation)
    weight, bias = norm.weight.to(u.dtype), norm.bias.to(u.dtype)
    n, channels, height, width = u.shape
    y = _empty(u, n, channels, *((height // 2, width // 2) if activation.pool else (height, width)))
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    arrays = _plain(u), _plain(weight), _plain(bias), _plain_or_none(norm.order), _plain_or_none(residual)
    found = to_dlpack(y), to_dlpack(mean), to_dlpack(var)
    affine = u.new_empty(2, channels)
    _native.normalise(*arrays, norm.eps, activation, *found, torch.get_num_threads(), to_dlpack(affine))
    if moves is not None:
        keep_statistics(mean, var, moves.assignment, n * height * width, moves.momentum, moves.running)
    return y, mean, var, affine


def statistics(
    u: Tensor, norm: Norm, running_mean: Tensor, running_var: Tensor, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = norm.weight.to(u.dtype), norm.bias.to(u.dtype)
    affine = u.new_empty(2, u.shape[1])
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    arrays = _plain(u), _plain(weight), _plain(bias), None, None
    found = to_dlpack(mean), to_dlpack(var)
    running = [statistic.to(u.dtype) for statistic in (running_mean, running_var)]
    more = to_dlpack(affine), *map(to_dlpack, running), rate
    _native.normalise(*arrays, norm.eps, _activation("relu"), None, *found, torch.get_num_threads(), *more)
    for statistic, new in zip((running_mean, running_var), running, strict=True):
        if new is not statistic:
            statistic.copy_(new)
    return affine, mean, var


def normalise_gradient(
    dy: Tensor, u: Tensor, norm: Norm, mean: Tensor, var: Tensor, shortcut: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if norm.each_image:
        images = u.shape[0]
        one_image = _one_image(dy), _one_image(u), _for_one_image(norm, images), mean.flatten(), var.flatten()
        du, *of_norm = normalise_gradient(*one_image, _one_image(shortcut))
        dweight, dbias = (gradient.view(images, -1).sum(0) for gradient in of_norm)
        return du.view(u.shape), dweight, dbias
    return _normalise_gradient(dy.contiguous(), u, norm, mean, var, shortcut, again=None)


def normalise_gradient_again(
    dy: Tensor, u: Tensor, norm: Norm, mean: Tensor, var: Tensor, shortcut: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy = dy.contiguous()
    return *_normalise_gradient(dy, u, norm, mean, var, shortcut, again=dy), dy


def _normalise_gradient(
    dy: Tensor, u: Tensor, norm: Norm, mean: Tensor, var: Tensor, shortcut: Tensor | None, again: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`again`: None, or the tensor that act(norm(u)) is written into; it may be dy."""
    weight, bias = norm.weight.to(u.dtype), norm.bias.to(u.dtype)
    du, dweight, dbias = _empty(u, *u.shape), torch.empty_like(weight), torch.empty_like(bias)
    _native.normalise_gradient(
        _plain(dy),
        _plain(u),
        _plain(weight),
        _plain(bias),
        _plain_or_none(norm.order),
        _plain(mean),
        _plain(var),
        _plain_or_none(shortcut),
        norm.eps,
        _activation(norm.activation),
        to_dlpack(du),
        to_dlpack(dweight),
        to_dlpack(dbias),
        torch.get_num_threads(),
        None if again is None else to_dlpack(again),
    )
    return du, dweight, dbias


def keep_statistics(
    mean: Tensor, var: Tensor, assignment: Tensor, count: int, momentum: float, running: RunningStatistics
) -> None:
    """As `formulas.keep_statistics`."""
    if mean.dtype != running.mean.dtype:
        return formulas.keep_statistics(mean, var, assignment, count, momentum, running)
    _native.keep_statistics(_plain(mean), _plain(var), _plain(assignment), count, momentum, *map(to_dlpack, running))


def _empty(like: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape whose values are undefined. Large ones come from memory that the extension keeps
    (memory.h)."""
    if math.prod(shape) * like.element_size() < KEPT_FROM:
        return like.new_empty(shape)
    return from_dlpack((_native.empty_float32 if like.dtype == torch.float32 else _native.empty_float64)(shape))


def _one_image(images: Any) -> Any:
    """[N, R, H, W] -> [1, N * R, H, W], or None: the statistics of each image are then those of a batch of one."""
    return None if images is None else images.contiguous().view(1, -1, *images.shape[2:])


def _for_one_image(norm: Norm, images: int) -> Norm:
    """The norm for `_one_image` of so many images: every image has kernels of its own."""
    kernels = norm.weight.numel()
    order = torch.arange(kernels) if norm.order is None else norm.order
    order = (order + kernels * torch.arange(images)[:, None]).flatten()
    return norm._replace(
        weight=norm.weight.repeat(images), bias=norm.bias.repeat(images), order=order, each_image=False
    )


class Activation(NamedTuple):
    """An activation, as the C++ code knows it."""

    relu: bool
    pool: bool
    slope: float  # what the ReLU multiplies values below zero with


def _activation(name: str | None) -> Activation:
    relu = name in ("relu", "leaky_relu", "relu_pool")
    return Activation(relu, name == "relu_pool", LEAKY_SLOPE if name == "leaky_relu" else 0.0)


def _arguments(formula: UndrawnFormula) -> tuple[Any, ...]:
    """The same for bindings.cpp."""
    x, kept_product, packed, spec, scale, shift, activation = formula
    arrays = _plain(x), _plain(packed.weight), _plain_or_none(packed.bias), _plain_or_none(kept_product)
    affine = (None if values is None else _plain(values.to(x.dtype)) for values in (scale, shift))
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), _taps(packed))
    return *arrays, *affine, _activation(activation), *_blocks(spec), *spec.geometry, size, *_orders(spec)


def _taps(packed: Parameters) -> tuple[int, int]:
    """Height and width of the kernels."""
    return packed.weight.shape[2], packed.weight.shape[3]


def _blocks(spec: RoutedConv) -> tuple[list[int], list[int], list[int]]:
    """Offsets of the groups of rows and of columns, and which group of columns each group of rows reads."""
    return spec.rows.ends, spec.columns.ends, [int(read) for row in spec.reads() for read in row]


def _where(spec: RoutedConv) -> tuple[list[int], list[int], list[int], Pair, Pair, Pair, int]:
    """`_blocks`, the geometry, and the number of threads."""
    return *_blocks(spec), *spec.geometry.of_image, torch.get_num_threads()


def _orders(spec: RoutedConv) -> tuple[Any, Any]:
    """Which kernel each row is, and which channel each column."""
    return _plain(spec.rows.order), _plain(spec.columns.order)


def _plain(tensor: Tensor) -> Any:
    """The tensor as DLPack: contiguous, and detached, because DLPack refuses tensors that require a gradient."""
    return to_dlpack((tensor.detach() if tensor.requires_grad else tensor).contiguous())


def _plain_or_none(tensor: Tensor | None) -> Any:
    return None if tensor is None else _plain(tensor)
