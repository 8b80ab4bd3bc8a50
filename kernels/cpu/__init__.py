"""The routed convolution in C++, vectorised, for float32 and float64 on the CPU. Skips what is not read."""

import torch  # its OpenMP runtime must be loaded first: the extension then uses the same thread pool
from torch import Tensor

from ..blocks import Blocks, Geometry
from . import _native


def cannot(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, the native kernels run on the CPU"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the tensor is {x.dtype}, the native kernels take float32 and float64"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks, geometry: Geometry) -> Tensor:
    size = [
        (length + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for length, taps, stride, pad, dilation in zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    ]
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    bias = None if bias is None else _plain(bias)
    _native.forward(_plain(x), _plain(weight), bias, y, *blocks, *geometry, torch.get_num_threads())
    return y


def input_gradient(dy: Tensor, weight: Tensor, blocks: Blocks, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    dx = dy.new_empty(dy.shape[0], weight.shape[1], *size)
    _native.input_gradient(_plain(dy), _plain(weight), dx, *blocks, *geometry, torch.get_num_threads())
    return dx


def weight_gradient(x: Tensor, dy: Tensor, blocks: Blocks, geometry: Geometry, kernel: tuple[int, int]) -> Tensor:
    dw = x.new_empty(dy.shape[1], x.shape[1], *kernel)
    _native.weight_gradient(_plain(x), _plain(dy), dw, *blocks, *geometry, torch.get_num_threads())
    return dw


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and outside autograd, as DLPack wants it."""
    return tensor.detach().contiguous()
