"""Who convolves with whom, and how: the argument that all kernels share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..groups import FilterGroups, Routing


class Geometry(NamedTuple):
    """Stride, zero padding and dilation, each (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Of an image of `size` (H, W). Raises RuntimeError if the kernel is larger than the padded image."""
        height, width = (
            (length + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for length, taps, stride, pad, dilation in zip(size, kernel, *self, strict=True)
        )
        if min(height, width) < 1:
            raise RuntimeError(
                f"the image has size {tuple(size)}, with padding {self.padding} that is less than the "
                f"kernel's {tuple(kernel)} with dilation {self.dilation}"
            )
        return height, width


class RoutedConv(NamedTuple):
    """One routed convolution."""

    rows: FilterGroups  # the output's channels
    columns: FilterGroups  # the input's channels
    routing: Routing
    geometry: Geometry

    def reads(self) -> tuple[tuple[bool, ...], ...]:
        """[groups out][groups in]: which is read."""
        return self.routing.reads(len(self.rows.names), len(self.columns.names))


class Recipe(NamedTuple):
    """What the features of an SFG layer are made of: act(scale * u + shift), u its convolution. For the gates of the
    groups that a kernel was not drawn into: what would its features be there?"""

    x: Tensor  # the layer's input, packed
    a: Tensor | None  # what `forward` kept
    packed: Any  # the layer's parameters
    spec: RoutedConv
    scale: Tensor | None  # [G-1, rows], as `FilterGroups.others`; or [1, rows], alike for all
    shift: Tensor | None
    activation: str | None  # a name of activations.ACTIVATIONS
