"""One torch convolution on the packed tensor, the weight being zero where it is not read: every device, any dtype."""

import torch
from torch import Tensor

from ..groups import sort_by_group
from .packing import Packed, pack_parameters, unpack, unpack_dim
from .spec import RoutedConv

FUSES = SHARES_PRODUCTS = False
MEMORY_FORMAT = None


def missing() -> str | None:
    return None


def cannot(x: Tensor) -> str | None:
    return None


def sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    assignment = (log_p if noise is None else log_p + noise).argmax(1)
    return assignment, *sort_by_group(assignment, log_p.shape[1])


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype) -> Packed:
    return pack_parameters(weight, bias, spec, dtype, zero_unread=True)


def forward(x: Tensor, packed: Packed, spec: RoutedConv) -> Tensor:
    return torch.nn.functional.conv2d(x, packed.forward, packed.bias, *spec.geometry)


def input_gradient(dy: Tensor, packed: Packed, spec: RoutedConv, size: tuple[int, int]) -> Tensor:
    x = dy.new_empty(dy.shape[0], packed.backward.shape[1], *size)  # just a shape: an expanded one would be copied
    return _backward(dy, x, packed.backward, spec, 0)


def weight_gradient(
    x: Tensor, dy: Tensor, packed: Packed, spec: RoutedConv, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    rows, columns, dy = spec.rows.live, spec.columns.live, dy.contiguous()
    dw = _backward(dy, x, x.new_empty(dy.shape[1], x.shape[1], *packed.forward.shape[2:]), spec, 1)
    reads = spec.blocks()[2][rows.ids[:, None], columns.ids]
    dw = unpack(dw.where(reads[:, :, None, None], 0), rows, columns)
    return dw, unpack_dim(dy.sum((0, 2, 3)), 0, rows) if bias else None


def _backward(dy: Tensor, x: Tensor, weight: Tensor, spec: RoutedConv, wanted: int) -> Tensor:
    stride, padding, dilation = spec.geometry
    mask = [wanted == 0, wanted == 1, False]
    gradients = torch.ops.aten.convolution_backward(
        dy.contiguous(), x, weight, None, stride, padding, dilation, False, [0, 0], 1, mask
    )
    return gradients[wanted]
