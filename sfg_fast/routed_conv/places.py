"""The outputs of a transposed convolution, place by place: several channels of a small image are one channel of a large
image."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..groups import indices
from ..kernels.packing import memory_format


class Places(NamedTuple):
    """A large image of `size` is cut into cells of `strides` pixels. A small image has one pixel for each cell, and
    `number` channels for one of the large image: one for each place in a cell."""

    strides: tuple[int, ...]
    size: tuple[int, ...]  # of the large image; the last cells may stand out of it

    @property
    def number(self) -> int:
        """The places in a cell."""
        return math.prod(self.strides)

    def shuffled(self, small: Tensor) -> Tensor:
        """[N, R * number, H, W] -> [N, R, *size]."""
        return _Shuffled.apply(small, self)

    def _together(self, small: Tensor) -> Tensor:
        dims, layout = len(self.strides), memory_format(small)
        cells = small.unflatten(1, (-1, *self.strides))  # [N, R, places, cells]
        pairs = [axis for dim in range(dims) for axis in (2 + dims + dim, 2 + dim)]
        large = cells.permute(0, 1, *pairs)
        shape = [cell * stride for cell, stride in zip(small.shape[2:], self.strides, strict=True)]
        large = large.reshape(*large.shape[:2], *shape)
        for dim, length in enumerate(self.size, 2):
            large = large.narrow(dim, 0, length)
        return large.contiguous(memory_format=layout)

    def apart(self, large: Tensor) -> Tensor:
        """[N, R, *size] -> [N, R * number, H, W], the inverse of `shuffled`; zeros where a cell stands out."""
        missing = [-length % stride for length, stride in zip(self.size, self.strides, strict=True)]
        if any(missing):
            large = F.pad(large, [pad for one in reversed(missing) for pad in (0, one)])
        dims, layout = len(self.strides), memory_format(large)
        shape = [part for length, stride in zip(large.shape[2:], self.strides, strict=True)
                 for part in (length // stride, stride)]  # fmt: skip
        cells = large.reshape(*large.shape[:2], *shape)
        cells = cells.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))
        return cells.flatten(1, 1 + dims).contiguous(memory_format=layout)


class _Shuffled(torch.autograd.Function):
    """`Places.shuffled`. Torch's own gradient of it would not be contiguous, and each kernel that reads it would copy
    it."""

    @staticmethod
    def forward(ctx: Any, small: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return places._together(small)

    @staticmethod
    def backward(ctx: Any, dlarge: Tensor) -> Any:
        return ctx.places.apart(dlarge), None


class Taps(NamedTuple):
    """How a transposed convolution is done along one dimension: at each place of a cell a convolution of stride 1."""

    of_places: tuple[tuple[int, ...], ...]  # [places][taps]: which tap of the transposed convolution; -1: none, zero
    before: int  # how many zeros the input needs before it (negative: it is cut)
    behind: int

    @staticmethod
    def of(kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> Taps:
        """From one dimension of `nn.ConvTranspose2d`'s arguments.

        Output o reads input i through tap t, where o = stride * i - padding + dilation * t. Output o = stride * q + r
        is place r of cell q, and reads i = q - m, m = (dilation * t - r - padding) / stride, where m is whole."""
        offsets = [
            {(dilation * tap - place - padding) // stride: tap for tap in range(kernel)
             if (dilation * tap - place - padding) % stride == 0}
            for place in range(stride)
        ]  # fmt: skip
        every = [offset for of_place in offsets for offset in of_place]
        first, last = min(every), max(every)
        cells = -(-(-2 * padding + dilation * (kernel - 1) + output_padding + 1) // stride)  # more than the input has
        taps = tuple(tuple(one.get(offset, -1) for offset in range(last, first - 1, -1)) for one in offsets)
        return Taps(taps, last, cells - 1 - first)


def kernels_of_places(weight: Tensor, taps: tuple[Taps, ...]) -> Tensor:
    """The weight [K, C, kH, kW] of a transposed convolution (kernels first) -> that of the convolution which computes
    all places, [K * number, C, ..]."""
    dims = len(taps)
    weight = F.pad(weight, [0, 1] * dims)  # tap -1 is zero
    for dim, one in enumerate(taps):
        every = tuple(tap % weight.shape[2 + 2 * dim] for place in one.of_places for tap in place)
        weight = weight.index_select(2 + 2 * dim, indices(every, weight))
        weight = weight.unflatten(2 + 2 * dim, (len(one.of_places), -1))  # [K, C, .., places, taps, ..]
    weight = weight.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    return weight.flatten(0, dims)
