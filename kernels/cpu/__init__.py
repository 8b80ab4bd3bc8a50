"""The routed convolution in C++, vectorised, for float32 and float64 on the CPU. Skips what is not read.

One thread pool with torch, as many threads as torch uses. Outputs and input gradients don't depend on their number, to
the bit; weight and bias gradients do: each thread sums its part of the positions.
"""

from collections.abc import Sequence
from typing import Any

import torch  # its OpenMP runtime must be loaded first: the extension then uses the same thread pool
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from ..masked import missing, sample
from ..packing import Packed, pack_parameters, unpack, unpack_dim
from ..spec import Recipe, RoutedConv
from . import _native

__all__ = [
    "FUSES",
    "FUSES_GATES",
    "MEMORY_FORMAT",
    "NORMALISES",
    "SHARES_PRODUCTS",
    "cannot",
    "forward",
    "gate_gradient",
    "input_and_gate_gradient",
    "input_gradient",
    "missing",
    "normalise",
    "normalise_gradient",
    "pack",
    "sample",
    "weight_gradient",
]

FUSES, FUSES_GATES, SHARES_PRODUCTS, NORMALISES = True, True, False, True
MEMORY_FORMAT = torch.contiguous_format

INSTRUCTION_SET = _native.instruction_sets()[0]  # the fastest that this processor has; it is in use


def cannot(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, the native kernels run on the CPU"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the tensor is {x.dtype}, the native kernels take float32 and float64"
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
        return f"the tensor is a {type(x).__name__} ({x.layout}), the native kernels need plain memory"
    return None


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype, gates: bool = False) -> Packed:
    return pack_parameters(weight.detach(), bias, spec, dtype, zero_unread=False)


def forward(
    x: Tensor, packed: Packed, spec: RoutedConv, relu: bool = False, residual: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    weight = packed.weight
    y = x.new_empty(x.shape[0], weight.shape[0], *spec.geometry.output_size(x.shape[2:], weight.shape[2:]))
    a = torch.empty_like(y) if keep else None
    arrays = (
        _plain(x),
        _plain(weight),
        _plain_or_none(packed.bias),
        _plain_or_none(residual),
        relu,
        to_dlpack(y),
        _plain_or_none(a),
    )
    _native.forward(*arrays, *_blocks(spec), *spec.geometry, torch.get_num_threads())
    return y, a


def input_gradient(
    dy: Tensor, packed: Packed, spec: RoutedConv, size: tuple[int, int], relu: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    images, channels, groups = dy.shape[0], packed.weight.shape[1], len(spec.columns.names)
    dx = dy.new_empty(images, channels, *size)
    dothers = dy.new_empty(images, (groups - 1) * channels, *size) if spec.columns.all_gates else None
    arrays = (
        _plain(dy),
        _plain_or_none(relu),
        _plain(packed.weight),
        to_dlpack(dx),
        _plain_or_none(dothers),
        None,
        None,
        None,
    )
    _native.input_gradient(*arrays, *_blocks(spec), *spec.geometry, torch.get_num_threads())
    return dx, dothers


def input_and_gate_gradient(
    dy: Tensor,
    packed: Packed,
    spec: RoutedConv,
    features: Tensor,
    recipe: Recipe | None,
    relu: Tensor | None = None,
    own: bool = True,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(features, memory_format=torch.contiguous_format)
    dz = dy.new_empty(1 if recipe is None else len(spec.columns.names), features.shape[1])
    made = None if recipe is None else _arguments(recipe, features.shape[2:])
    arrays = (
        _plain(dy),
        _plain_or_none(relu),
        _plain(packed.weight),
        to_dlpack(dx),
        None,
        _plain(features) if own else None,
        made,
        to_dlpack(dz),
    )
    _native.input_gradient(*arrays, *_blocks(spec), *spec.geometry, torch.get_num_threads())
    return dx, dz


def gate_gradient(recipe: Recipe, dothers: Tensor) -> Tensor:
    dz = dothers.new_empty(len(recipe.spec.rows.names) - 1, recipe.packed.weight.shape[0])
    _native.gate_gradient(
        _arguments(recipe, dothers.shape[2:]), _plain(dothers), to_dlpack(dz), torch.get_num_threads()
    )
    return dz


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    packed: Packed,
    spec: RoutedConv,
    relu: Tensor | None = None,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    dw = x.new_empty(packed.weight.shape)
    db = x.new_empty(dy.shape[1]) if bias else None
    arrays = _plain(x), _plain(dy), _plain_or_none(relu), to_dlpack(dw), _plain_or_none(db)
    _native.weight_gradient(*arrays, *_blocks(spec), *spec.geometry, torch.get_num_threads())
    return unpack(dw, spec.rows, spec.columns), None if db is None else unpack_dim(db, 0, spec.rows)


def normalise(
    u: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, var = torch.empty_like(u, memory_format=MEMORY_FORMAT), torch.empty_like(weight), torch.empty_like(weight)
    arrays = _plain(u), _plain(weight), _plain(bias), _plain_or_none(residual)
    _native.normalise(*arrays, eps, relu, to_dlpack(y), to_dlpack(mean), to_dlpack(var), torch.get_num_threads())
    return y, mean, var


def normalise_gradient(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    du = torch.empty_like(u, memory_format=MEMORY_FORMAT)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    arrays = (_plain(tensor) for tensor in (dy, u, weight, bias, mean, var))
    gradients = (to_dlpack(tensor) for tensor in (du, dweight, dbias))
    _native.normalise_gradient(*arrays, eps, relu, *gradients, torch.get_num_threads())
    return du, dweight, dbias


def _arguments(recipe: Recipe, size: Sequence[int]) -> tuple[Any, ...]:
    x, a, packed, spec, scale, shift, relu = recipe
    arrays = _plain(x), _plain(packed.weight), _plain_or_none(packed.bias), _plain_or_none(a)
    affine = (None if values is None else _plain(values.to(x.dtype)) for values in (scale, shift))
    return *arrays, *affine, relu, *_blocks(spec), *spec.geometry, tuple(size)


def _blocks(spec: RoutedConv) -> tuple[list[int], list[int], list[int]]:
    """Offsets of the rows' and the columns' groups, and which is read."""
    return spec.rows.ends, spec.columns.ends, [int(read) for row in spec.reads() for read in row]


def _plain(tensor: Tensor) -> Any:
    """Contiguous, outside autograd, as DLPack."""
    return to_dlpack(tensor.detach().contiguous())


def _plain_or_none(tensor: Tensor | None) -> Any:
    return None if tensor is None else _plain(tensor)
