"""What the functions of a backend are given besides tensors (`contract.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from ..groups import FilterGroups, Routing

Pair: TypeAlias = tuple[int, int]  # vertical, horizontal


class Geometry(NamedTuple):
    """Stride, zero padding and dilation of a convolution, each (vertical, horizontal), or three for volumes."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def of_image(self) -> tuple[Pair, Pair, Pair]:
        """The same, for images of two dimensions."""
        return cast(tuple[Pair, Pair, Pair], tuple(self))

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """(H', W') of the output for an image of `size` (H, W) and kernels of size `kernel` (kH, kW). Raises
        RuntimeError if the kernel is larger than the padded image."""
        found = tuple(
            (length + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for length, taps, stride, pad, dilation in zip(size, kernel, *self, strict=True)
        )
        if min(found) < 1:
            raise RuntimeError(
                f"the image has size {tuple(size)}, with padding {self.padding} that is less than the "
                f"kernel's {tuple(kernel)} with dilation {self.dilation}"
            )
        return found


class RoutedConv(NamedTuple):
    """One routed convolution: what its channels are, who reads whom, and its geometry."""

    rows: FilterGroups  # the output's channels
    columns: FilterGroups  # the input's channels
    routing: Routing
    geometry: Geometry

    def reads(self) -> tuple[tuple[bool, ...], ...]:
        """[groups of rows][groups of columns]: does the group of rows read the group of columns?"""
        return self.routing.reads(len(self.rows.names), len(self.columns.names))


class UndrawnFormula(NamedTuple):
    """A formula for the features that undrawn rows would have without their gates, act(scale * u + shift): u is what
    the layer's convolution gives these rows, from the channels that their groups read. No backend stores them; each
    computes them from this, where the gradient of their gates is wanted."""

    x: Tensor  # [N, columns, H, W]: the layer's input, packed
    kept_product: Tensor | None  # [N, rows, H', W']: what `forward` returned with `keep_product`
    packed: Any  # the layer's weight and bias, as the backend's `pack` made them
    spec: RoutedConv
    # [N, G-1, rows], in the order of `FilterGroups.undrawn_groups`; N or G-1 is 1 where all images or groups are alike.
    scale: Tensor | None
    shift: Tensor | None  # like `scale`
    activation: str | None  # a name of activations.ACTIVATIONS


class Norm(NamedTuple):
    """A normalisation of each kernel by the statistics of the batch, or of each image alone, and the activation behind
    it."""

    weight: Tensor  # [K]
    bias: Tensor  # [K]
    order: Tensor | None  # int64 [rows]: which kernel each row is, each kernel once; None: row r is kernel r
    eps: float
    activation: str | None  # a name of activations.ACTIVATIONS
    each_image: bool = False  # instance normalisation: each image has statistics of its own


class RunningStatistics(NamedTuple):
    """Running statistics of the (group, kernel) pairs, and of each kernel over all groups. They are changed in
    place."""

    mean: Tensor  # [G, K]
    var: Tensor  # [G, K]
    draws: Tensor  # [G, K]: batches of each pair; floating point, because averages of models are averages of counts
    pooled_mean: Tensor  # [K]
    pooled_var: Tensor  # [K]


class MovingStatistics(NamedTuple):
    """What a normalisation moves besides its result: the running statistics of the pairs (assignment[k], k), towards
    those of the batch. A pair moves at a rate of max(1/n, momentum), where n counts its batches, this one too; the
    pooled statistics move in the same way."""

    running: RunningStatistics
    assignment: Tensor  # int64 [K]: the drawn groups
    momentum: float


class ShortcutGradient(NamedTuple):
    """Gradients that came by a shortcut around a convolution, and are added to its own; None where none came."""

    dx: Tensor | None = None  # [N, columns, H, W]
    dundrawn: Tensor | None = None  # [N, (G-1) * columns, H, W]


NO_SHORTCUT = ShortcutGradient()
