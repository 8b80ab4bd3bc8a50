"""The routed convolution in C++, vectorised, for float32 and float64 on the CPU. Skips what is not read.

One thread pool with torch, as many threads as torch uses. Outputs and input gradients don't depend on their number, to
the bit; weight and bias gradients do: each thread sums its part of the positions.
"""

import torch  # its OpenMP runtime must be loaded first: the extension then uses the same thread pool
from torch import Tensor

from ...groups import FilterGroups
from ..masked import missing, sample
from ..packing import Packed, pack_parameters, unpack, unpack_dim
from ..spec import RoutedConv
from . import _native

__all__ = [
    "FUSES",
    "MEMORY_FORMAT",
    "SHARES_PRODUCTS",
    "cannot",
    "forward",
    "gate_gradient",
    "input_gradient",
    "missing",
    "pack",
    "sample",
    "weight_gradient",
]

FUSES, SHARES_PRODUCTS = True, False
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


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype) -> Packed:
    return pack_parameters(weight.detach(), bias, spec, dtype, zero_unread=False)


def forward(
    x: Tensor, packed: Packed, spec: RoutedConv, relu: bool = False, residual: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    weight = packed.weight
    y = x.new_empty(x.shape[0], weight.shape[0], *spec.geometry.output_size(x.shape[2:], weight.shape[2:]))
    a = torch.empty_like(y) if keep else None
    arrays = _plain(x), _plain(weight), _plain_or_none(packed.bias), _plain_or_none(residual), relu, y, a
    _native.forward(*arrays, *spec.blocks(), *spec.geometry, torch.get_num_threads())
    return y, a


def input_gradient(
    dy: Tensor, packed: Packed, spec: RoutedConv, size: tuple[int, int], relu: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    images, channels, groups = dy.shape[0], packed.weight.shape[1], len(spec.columns.names)
    dx = dy.new_empty(images, channels, *size)
    dothers = dy.new_empty(images, (groups - 1) * channels, *size) if spec.columns.all_gates else None
    arrays = _plain(dy), _plain_or_none(relu), _plain(packed.weight), dx, dothers
    _native.input_gradient(*arrays, *spec.blocks(), *spec.geometry, torch.get_num_threads())
    return dx, dothers


def gate_gradient(
    x: Tensor,
    a: Tensor | None,
    packed: Packed,
    spec: RoutedConv,
    dothers: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
) -> Tensor:
    rows, others = packed.weight.shape[0], len(spec.rows.names) - 1
    dz = x.new_empty(others, rows)
    affine = (None if values is None else values.to(x.dtype).contiguous() for values in (scale, shift))
    inputs = _plain(x), _plain(packed.weight), _plain_or_none(packed.bias), _plain_or_none(a), _plain(dothers)
    size = tuple(dothers.shape[2:])
    _native.gate_gradient(
        *inputs, *affine, relu, dz, size, *spec.blocks(), *spec.geometry, torch.get_num_threads()
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
    arrays = _plain(x), _plain(dy), _plain_or_none(relu), dw, db
    _native.weight_gradient(*arrays, *spec.blocks(), *spec.geometry, torch.get_num_threads())
    return unpack(dw, spec.rows, spec.columns), None if db is None else unpack_dim(db, 0, spec.rows)


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and outside autograd, as DLPack wants it."""
    return tensor.detach().contiguous()


def _plain_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _plain(tensor)
