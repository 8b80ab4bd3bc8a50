"""The routed convolution in C++, vectorised, for float32 and float64 on the CPU. Skips what is not read.

One thread pool with torch, as many threads as torch uses. Outputs and input gradients don't depend on their number, to
the bit; weight and bias gradients do: each thread sums its part of the positions.
"""

import math
from typing import Any, NamedTuple

import torch  # its OpenMP runtime must be loaded first: the extension then uses the same thread pool
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from ...groups import Routing
from .. import masked
from ..masked import missing
from ..packing import unpack, unpack_dim
from ..spec import Recipe, RoutedConv
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
    "keep_statistics",
    "missing",
    "normalise",
    "normalise_gradient",
    "pack",
    "sample",
    "statistics",
    "weight_gradient",
]

MASKS_GRADIENTS = COMPUTES_GATE_GRADIENTS = NORMALISES = READS_NORMALISED = True
OF_TORCH = SHARES_PRODUCTS = False
MEMORY_FORMAT, KNOWS = torch.contiguous_format, (None, "relu", "relu_pool")

Pair = tuple[int, int]  # vertical, horizontal

KEPT_FROM = 128 << 10  # bytes: malloc's own limit, from which it asks the system

INSTRUCTION_SET = _native.instruction_sets()[0]  # the fastest that this processor has; it is in use


def cannot(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, the native kernels run on the CPU"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the tensor is {x.dtype}, the native kernels take float32 and float64"
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
        return f"the tensor is a {type(x).__name__} ({x.layout}), the native kernels need plain memory"
    return None


class Parameters(NamedTuple):
    """A layer's own: the kernels look up where each packed row and column is."""

    weight: Tensor
    bias: Tensor | None


def sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    kernels, groups = log_p.shape
    rows = log_p.new_empty((groups + 3, kernels), dtype=torch.int64)
    assignment, order, known = rows[0], rows[1], rows[2:]
    offsets = log_p.new_empty(groups + 1, dtype=torch.int64)
    found = (to_dlpack(tensor) for tensor in (assignment, order, offsets, known))
    ends = _native.sample(_plain(log_p), _plain_or_none(noise), *found)
    return assignment, order, offsets, {"ends": ends, "ids": known[0], "inverse": known[1], "others": known[2:]}


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype, gates: bool = False) -> Parameters:
    return Parameters(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


def forward(
    x: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
    keep: bool = False,
    affine: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), _taps(packed))
    shape = x.shape[0], spec.rows.order.numel(), *size
    y, a = _empty(x, *shape), _empty(x, *shape) if keep else None
    _native.forward(
        _plain(x),
        _plain(packed.weight),
        _plain_or_none(packed.bias),
        _plain_or_none(residual),
        relu,
        to_dlpack(y),
        _plain_or_none(a),
        *_where(spec),
        *_orders(spec),
        _plain_or_none(affine),
    )
    return y, a


def input_gradient(
    dy: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    size: tuple[int, int],
    relu: Tensor | None = None,
    around: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    images, channels, groups = dy.shape[0], spec.columns.order.numel(), len(spec.columns.names)
    dx = _empty(dy, images, channels, *size)
    dothers = _empty(dy, images, (groups - 1) * channels, *size) if spec.columns.all_gates else None
    _native.input_gradient(
        _plain(dy),
        _plain_or_none(relu),
        _plain(packed.weight),
        _plain_or_none(around[0]),
        _plain_or_none(around[1]),
        to_dlpack(dx),
        _plain_or_none(dothers),
        None,
        None,
        None,
        *_where(spec),
        *_orders(spec),
    )
    return dx, dothers


def input_and_gate_gradient(
    dy: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    features: Tensor,
    recipe: Recipe | None,
    relu: Tensor | None = None,
    own: bool = True,
    around: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    dx = _empty(features, *features.shape)
    dz = dy.new_empty(1 if recipe is None else len(spec.columns.names), features.shape[1])
    _native.input_gradient(
        _plain(dy),
        _plain_or_none(relu),
        _plain(packed.weight),
        _plain_or_none(around[0]),
        _plain_or_none(around[1]),
        to_dlpack(dx),
        None,
        _plain(features) if own else None,
        None if recipe is None else _arguments(recipe),
        to_dlpack(dz),
        *_where(spec),
        *_orders(spec),
    )
    return dx, dz


def gate_gradient(recipe: Recipe, dothers: Tensor) -> Tensor:
    dz = dothers.new_empty(len(recipe.spec.rows.names) - 1, recipe.spec.rows.order.numel())
    _native.gate_gradient(_arguments(recipe), _plain(dothers), to_dlpack(dz), torch.get_num_threads())
    return dz


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    packed: Parameters,
    spec: RoutedConv,
    relu: Tensor | None = None,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    rows, columns = spec.rows, spec.columns
    # Nothing is added up where a row reads each channel once: of full columns by their own group alone.
    read_once = columns.order.numel() == columns.width or not columns.full or spec.routing is Routing.OWN
    each_once = read_once and rows.order.numel() == rows.width
    orders = _orders(spec) if each_once else (None, None)
    sizes = packed.weight.shape[:2] if each_once else (rows.order.numel(), columns.order.numel())
    dw = x.new_empty(*sizes, *packed.weight.shape[2:])
    db = x.new_empty(sizes[0]) if bias else None
    _native.weight_gradient(
        _plain(x), _plain(dy), _plain_or_none(relu), to_dlpack(dw), _plain_or_none(db), *_where(spec), *orders
    )
    if each_once:
        return dw, db
    return unpack(dw, rows, columns), None if db is None else unpack_dim(db, 0, rows)


def normalise(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    relu, pool = _flags(activation)
    weight, bias = weight.to(u.dtype), bias.to(u.dtype)
    n, channels, height, width = u.shape
    y = _empty(u, n, channels, *((height // 2, width // 2) if pool else (height, width)))
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    arrays = _plain(u), _plain(weight), _plain(bias), _plain_or_none(order), _plain_or_none(residual)
    found = to_dlpack(y), to_dlpack(mean), to_dlpack(var)
    affine = u.new_empty(2, channels) if keep else None
    _native.normalise(*arrays, eps, relu, pool, *found, torch.get_num_threads(), _plain_or_none(affine))
    return y, mean, var, affine


def statistics(
    u: Tensor, weight: Tensor, bias: Tensor, eps: float, running_mean: Tensor, running_var: Tensor, rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = weight.to(u.dtype), bias.to(u.dtype)
    affine = u.new_empty(2, u.shape[1])
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    arrays = _plain(u), _plain(weight), _plain(bias), None, None
    found = to_dlpack(mean), to_dlpack(var)
    running = [statistic.to(u.dtype) for statistic in (running_mean, running_var)]
    kept = to_dlpack(affine), *map(to_dlpack, running), rate
    _native.normalise(*arrays, eps, True, False, None, *found, torch.get_num_threads(), *kept)
    for statistic, new in zip((running_mean, running_var), running, strict=True):
        if new is not statistic:
            statistic.copy_(new)
    return affine, mean, var


def normalise_gradient(
    dy: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    order: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str | None,
    add: Tensor | None,
    again: bool = False,
) -> tuple[Tensor, ...]:
    weight, bias = weight.to(u.dtype), bias.to(u.dtype)
    dy, du = dy.contiguous(), _empty(u, *u.shape)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    _native.normalise_gradient(
        _plain(dy),
        _plain(u),
        _plain(weight),
        _plain(bias),
        _plain_or_none(order),
        _plain(mean),
        _plain(var),
        _plain_or_none(add),
        eps,
        *_flags(activation),
        to_dlpack(du),
        to_dlpack(dweight),
        to_dlpack(dbias),
        torch.get_num_threads(),
        to_dlpack(dy) if again else None,
    )
    return du, dweight, dbias, *([dy] if again else [])


def keep_statistics(
    mean: Tensor,
    var: Tensor,
    assignment: Tensor,
    count: int,
    momentum: float,
    running_mean: Tensor,
    running_var: Tensor,
    draws: Tensor,
    pooled_mean: Tensor,
    pooled_var: Tensor,
) -> None:
    if mean.dtype != running_mean.dtype:
        running = running_mean, running_var, draws, pooled_mean, pooled_var
        return masked.keep_statistics(mean, var, assignment, count, momentum, *running)
    _native.keep_statistics(
        _plain(mean),
        _plain(var),
        _plain(assignment),
        count,
        momentum,
        to_dlpack(running_mean),
        to_dlpack(running_var),
        to_dlpack(draws),
        to_dlpack(pooled_mean),
        to_dlpack(pooled_var),
    )


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Not filled. Large ones come from memory that is kept (memory.h)."""
    if math.prod(shape) * like.element_size() < KEPT_FROM:
        return like.new_empty(shape)
    return from_dlpack((_native.empty_float32 if like.dtype == torch.float32 else _native.empty_float64)(shape))


def _flags(activation: str | None) -> tuple[bool, bool]:
    """ReLU, and pooling behind it."""
    return activation is not None, activation == "relu_pool"


def _arguments(recipe: Recipe) -> tuple[Any, ...]:
    x, a, packed, spec, scale, shift, activation = recipe
    arrays = _plain(x), _plain(packed.weight), _plain_or_none(packed.bias), _plain_or_none(a)
    affine = (None if values is None else _plain(values.to(x.dtype)) for values in (scale, shift))
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), _taps(packed))
    return *arrays, *affine, *_flags(activation), *_blocks(spec), *spec.geometry, size, *_orders(spec)


def _taps(packed: Parameters) -> tuple[int, int]:
    """Height and width of the kernels."""
    return packed.weight.shape[2], packed.weight.shape[3]


def _blocks(spec: RoutedConv) -> tuple[list[int], list[int], list[int]]:
    """Offsets of the rows' and the columns' groups, and which is read."""
    return spec.rows.ends, spec.columns.ends, [int(read) for row in spec.reads() for read in row]


def _where(spec: RoutedConv) -> tuple[list[int], list[int], list[int], Pair, Pair, Pair, int]:
    """`_blocks`, the geometry, and how many threads."""
    return *_blocks(spec), spec.geometry.stride, spec.geometry.padding, spec.geometry.dilation, torch.get_num_threads()


def _orders(spec: RoutedConv) -> tuple[Any, Any]:
    """Where rows and columns stand in the weight."""
    return _plain(spec.rows.order), _plain(spec.columns.order)


def _plain(tensor: Tensor) -> Any:
    """Contiguous, outside autograd, as DLPack."""
    return to_dlpack((tensor.detach() if tensor.requires_grad else tensor).contiguous())


def _plain_or_none(tensor: Tensor | None) -> Any:
    return None if tensor is None else _plain(tensor)
