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


def forward(x: Tensor, packed: Packed, spec: RoutedConv, relu: bool = False, residual: Tensor | None = None) -> Tensor:
    weight = packed.forward
    y = x.new_empty(x.shape[0], weight.shape[0], *spec.geometry.output_size(x.shape[2:], weight.shape[2:]))
    arrays = _plain(x), _plain(weight), _plain_or_none(packed.bias), _plain_or_none(residual), relu, y
    _native.forward(*arrays, *_blocks(spec.rows, spec.columns.live, spec), *spec.geometry, torch.get_num_threads())
    return y


def input_gradient(
    dy: Tensor, packed: Packed, spec: RoutedConv, size: tuple[int, int], relu: Tensor | None = None
) -> Tensor:
    dx = dy.new_empty(dy.shape[0], packed.backward.shape[1], *size)
    arrays = _plain(dy), _plain_or_none(relu), _plain(packed.backward), dx
    blocks = _blocks(spec.rows.live, spec.columns, spec)
    _native.input_gradient(*arrays, *blocks, *spec.geometry, torch.get_num_threads())
    return dx


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    packed: Packed,
    spec: RoutedConv,
    relu: Tensor | None = None,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    rows, columns = spec.rows.live, spec.columns.live
    dw = x.new_empty(dy.shape[1], x.shape[1], *packed.forward.shape[2:])
    db = x.new_empty(dy.shape[1]) if bias else None
    arrays = _plain(x), _plain(dy), _plain_or_none(relu), dw, db
    _native.weight_gradient(*arrays, *_blocks(rows, columns, spec), *spec.geometry, torch.get_num_threads())
    return unpack(dw, rows, columns), None if db is None else unpack_dim(db, 0, rows)


def _blocks(rows: FilterGroups, columns: FilterGroups, spec: RoutedConv) -> tuple[Tensor, Tensor, Tensor]:
    return spec._replace(rows=rows, columns=columns).blocks()


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and outside autograd, as DLPack wants it."""
    return tensor.detach().contiguous()


def _plain_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _plain(tensor)
