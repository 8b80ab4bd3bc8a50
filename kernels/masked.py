"""One torch convolution on the packed tensor, the weight being zero where it is not read: every device, any dtype."""

import torch
from torch import Tensor

from .blocks import Blocks, Geometry


def cannot(x: Tensor) -> str | None:
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks, geometry: Geometry) -> Tensor:
    return torch.nn.functional.conv2d(x, weight, bias, *geometry)


def input_gradient(dy: Tensor, weight: Tensor, blocks: Blocks, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    x = dy.new_empty(dy.shape[0], weight.shape[1], *size)  # just a shape: an expanded one would be copied
    return _backward(dy, x, weight, geometry, 0)


def weight_gradient(
    x: Tensor, dy: Tensor, blocks: Blocks, geometry: Geometry, kernel: tuple[int, int], bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    weight = x.new_empty(dy.shape[1], x.shape[1], *kernel)
    dw = _backward(dy, x, weight, geometry, 1)
    rows, columns = (
        torch.repeat_interleave(offsets.diff(), output_size=size)
        for offsets, size in ((blocks.rows, dw.shape[0]), (blocks.columns, dw.shape[1]))
    )
    dw = dw.where(blocks.reads[rows[:, None], columns][:, :, None, None], 0)
    return dw, dy.sum((0, 2, 3)) if bias else None


def _backward(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: int) -> Tensor:
    mask = [wanted == 0, wanted == 1, False]
    gradients = torch.ops.aten.convolution_backward(
        dy, x, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], 1, mask
    )
    return gradients[wanted]
