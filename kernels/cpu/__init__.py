"""The routed convolution in C++, vectorised, for float32 and float64 on the CPU. Skips what is not read.

One thread pool with torch, as many threads as torch uses. Outputs and input gradients don't depend on their number, to
the bit; weight and bias gradients do: each thread sums its part of the positions.
"""

import torch  # its OpenMP runtime must be loaded first: the extension then uses the same thread pool
from torch import Tensor

from ..blocks import Blocks, Geometry
from . import _native

INSTRUCTION_SET = _native.instruction_sets()[0]  # the fastest that this processor has; it is in use


def cannot(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, the native kernels run on the CPU"
    if x.dtype not in (torch.float32, torch.float64):
        return f"the tensor is {x.dtype}, the native kernels take float32 and float64"
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
        return f"the tensor is a {type(x).__name__} ({x.layout}), the native kernels need plain memory"
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Blocks,
    geometry: Geometry,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    size = [
        (length + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
        for length, taps, stride, pad, dilation in zip(x.shape[2:], weight.shape[2:], *geometry, strict=True)
    ]
    if min(size) < 1:
        raise RuntimeError(
            f"the image has size {tuple(x.shape[2:])}, with padding {geometry.padding} that is less than the "
            f"kernel's {tuple(weight.shape[2:])} with dilation {geometry.dilation}"
        )
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    optional = _plain_or_none(bias), _plain_or_none(residual)
    _native.forward(_plain(x), _plain(weight), *optional, relu, y, *blocks, *geometry, torch.get_num_threads())
    return y


def input_gradient(
    dy: Tensor,
    weight: Tensor,
    blocks: Blocks,
    geometry: Geometry,
    size: tuple[int, int],
    relu: Tensor | None = None,
) -> Tensor:
    dx = dy.new_empty(dy.shape[0], weight.shape[1], *size)
    arrays = _plain(dy), _plain_or_none(relu), _plain(weight), dx
    _native.input_gradient(*arrays, *blocks, *geometry, torch.get_num_threads())
    return dx


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    blocks: Blocks,
    geometry: Geometry,
    kernel: tuple[int, int],
    relu: Tensor | None = None,
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    dw = x.new_empty(dy.shape[1], x.shape[1], *kernel)
    db = x.new_empty(dy.shape[1]) if bias else None
    arrays = _plain(x), _plain(dy), _plain_or_none(relu), dw, db
    _native.weight_gradient(*arrays, *blocks, *geometry, torch.get_num_threads())
    return dw, db


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and outside autograd, as DLPack wants it."""
    return tensor.detach().contiguous()


def _plain_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _plain(tensor)
