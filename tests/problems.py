"""A convolution on random tensors: what the tests of kernels and backends compute, each with a subclass of its own that
says which group each channel is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sfg_fast.kernels.spec import Geometry
from torch import Tensor

Pair = tuple[int, int]  # vertical, horizontal


@dataclass(frozen=True, kw_only=True)
class ConvProblem:
    """All but the channels of one convolution, and what is fused with it."""

    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    image: Pair
    batch: int = 2
    bias: bool = True
    relu: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def geometry(self) -> Geometry:
        """Stride, padding and dilation."""
        return Geometry(self.stride, self.padding, self.dilation)

    @property
    def taps(self) -> int:
        """Of one kernel and channel."""
        return self.kernel[0] * self.kernel[1]

    def numbers(self) -> tuple[torch.Generator, Callable[..., Tensor]]:
        """A generator with the problem's seed, and `random(*shape)`: normal numbers of its dtype from it."""
        generator = torch.Generator().manual_seed(self.seed)
        return generator, lambda *shape: torch.randn(*shape, generator=generator, dtype=self.dtype)
