"""What a backend offers: the arithmetic of the routed convolution, without autograd, modules and random numbers.

A backend is a module with these functions and attributes: `masked` (torch's own convolutions, the simplest to read),
`cpu` (C++), `triton`. mypy checks each of them against `Kernels`, and those that can do more against `Normalises`,
`ReadsNormalised` and `ComputesGateGradients`.

Shapes. A layer has K kernels and reads C channels. Weights [K, C, kH, kW] and their gradients stand in the layer's own
order; the gradient is zero where no row reads. A layer's T+1 = G groups are `shared`, then the tasks. x and dy are
packed: their channels are sorted by group; x has `columns` of them, u and dy have `rows` (`spec.py`, `FilterGroups`).
H, W are the input's height and width, H', W' the output's.

Drawn and undrawn rows. A draw gives a kernel one row, in one group: its DRAWN row. The rows that the kernel would have
in the other G-1 groups are its UNDRAWN rows, in the order tasks, then shared (`FilterGroups.undrawn_groups`). The gates
z of undrawn rows are zero, so their features are zero, and no backend stores them. But these gates want a gradient,
too: dz = <dL/dF, F without its gate>. Three functions compute what that takes:

- `forward` with `keep_product` (spec.rows.all_gates) also returns the kept product: the convolution of the shared
  channels with all rows, plus the bias. The u of an undrawn row in task t's group is the kept product plus the
  convolution of t's channels.
- `input_gradient` also returns dundrawn, where spec.columns.all_gates: dL/dF of the undrawn rows of its input.
- `gate_gradient` computes the features of the undrawn rows from the kept product, and dz from these and dundrawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor

from .spec import NO_SHORTCUT, MovingStatistics, Norm, RoutedConv, ShortcutGradient, UndrawnFormula

Packed: TypeAlias = Any
"""A layer's weight and bias as a backend wants them. Its `pack` makes it; only the same backend reads it."""


class Kernels(Protocol):
    """What every backend offers."""

    @property
    def __name__(self) -> str:
        """The module's name; the module lies in kernels/."""

    @property
    def MEMORY_FORMAT(self) -> torch.memory_format | None:
        """The memory format of the images that the backend returns; None: that of its input."""

    @property
    def KNOWS(self) -> Sequence[str | None]:
        """The activations that `gate_gradient` and `normalise` can apply: None and names of `activations.ACTIVATIONS`.
        With another activation the layer normalises and activates in plain torch, and computes the features of undrawn
        rows by `masked`."""

    @property
    def OF_TORCH(self) -> bool:
        """May compilers, and counters of FLOPs, look into the functions, because they are made of torch's own
        operations and do nothing else? If not, in graphs they are called through operators (routed_conv/graph.py),
        which find the module in kernels/ by its `__name__`. If so, torch's grouped convolution may take the place of
        `forward`."""

    @property
    def SHARES_PRODUCTS(self) -> bool:
        """Where all groups have the same kernels (full rows and full columns): does the backend convolve an input group
        once, and add the result to every output group that reads it?"""

    @property
    def MASKS_GRADIENTS(self) -> bool:
        """Do the gradients take `relu_output`, and mask dy by it? Otherwise the caller masks dy, and passes None."""

    @property
    def COMPUTES_GATE_GRADIENTS(self) -> bool:
        """Is the backend a `ComputesGateGradients`?"""

    @property
    def NORMALISES(self) -> bool:
        """Is the backend a `Normalises`?"""

    @property
    def READS_NORMALISED(self) -> bool:
        """Is the backend a `ReadsNormalised`?"""

    def missing(self) -> str | None:
        """What this machine lacks for the backend, in words, or None."""

    def cannot(self, x: Tensor, /) -> str | None:
        """Why the backend can't take a tensor like x (its device, dtype, layout), in words, or None."""

    def sample(self, log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """The group of each kernel, argmax(log_p + noise) of [K, G]: assignment int64 [K]; the kernels sorted by group,
        order int64 [K] and offsets int64 [G+1] (`FilterGroups`); and what else of the `FilterGroups` the backend has
        computed on the way, by the names of its properties."""

    def pack(self, weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype) -> Packed:
        """weight [K, C, kH, kW] and bias [K] as all passes want them, in `dtype`; where spec.rows.all_gates also as
        `UndrawnFormula` wants them: with all products of kernels and channels, not only those that a drawn row
        reads."""

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        spec: RoutedConv,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        keep_product: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x [N, columns, H, W] -> u [N, rows, H', W'], or relu(u) with `relu`, plus `residual`, a tensor like u; and
        with `keep_product` the kept product, like u (Routing.ALL: u itself; Routing.OWN: None), otherwise None."""

    def input_gradient(
        self,
        dy: Tensor,
        packed: Packed,
        spec: RoutedConv,
        size: tuple[int, int],
        *,
        relu_output: Tensor | None = None,
        shortcut: ShortcutGradient = NO_SHORTCUT,
    ) -> tuple[Tensor, Tensor | None]:
        """dy [N, rows, H', W'] -> dx [N, columns, H, W] of `size` (H, W); and, where spec.columns.all_gates, dundrawn
        [N, (G-1) * columns, H, W]. `relu_output`: the output of the ReLU that dy has yet to go back through. The
        gradients of `shortcut` are added to these two."""

    def weight_gradient(
        self,
        x: Tensor,
        dy: Tensor,
        packed: Packed,
        spec: RoutedConv,
        *,
        relu_output: Tensor | None = None,
        bias: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """x [N, columns, H, W], dy [N, rows, H', W'] -> dw [K, C, kH, kW], and with `bias` db [K]."""

    def gate_gradient(self, formula: UndrawnFormula, dundrawn: Tensor) -> Tensor:
        """dundrawn [N, (G-1) * rows, H', W'] -> dz [G-1, rows] = <dundrawn, act(scale * u + shift)>, summed over images
        and positions, for the gates of all undrawn rows. u is never stored."""


class ComputesGateGradients(Kernels, Protocol):
    """The backend computes the gradient of gates together with that of the features, and never stores dundrawn. (For
    convolutions of stride 1 only.)"""

    def input_and_gate_gradient(
        self,
        dy: Tensor,
        packed: Packed,
        spec: RoutedConv,
        features: Tensor,
        formula: UndrawnFormula | None,
        *,
        relu_output: Tensor | None = None,
        drawn: bool = True,
        shortcut: ShortcutGradient = NO_SHORTCUT,
    ) -> tuple[Tensor, Tensor]:
        """dy [N, rows, H', W'] -> dx like features [N, columns, H, W], which this convolution reads, `shortcut` added;
        and dz of the features' gates: [1, columns] of the drawn gates, zeros unless `drawn`; or, where `formula` says
        how to compute the features of undrawn rows, [G, columns], the undrawn gates behind the drawn ones."""


class Normalises(Kernels, Protocol):
    """The backend does batch or instance normalisation, activation and a sum in one go."""

    def normalise(
        self, u: Tensor, norm: Norm, residual: Tensor | None, *, moves: MovingStatistics | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u [N, rows, H, W] -> y = act(norm(u)) + residual (no residual where the activation pools); mean and biased
        variance [K], at least float32; and scale and shift [2, rows] of the normalisation. Where norm.each_image these
        are [N, K] and [2, N, rows]. `moves`: the running statistics (of a batch norm), which are changed in place."""

    def normalise_gradient(
        self, dy: Tensor, u: Tensor, norm: Norm, mean: Tensor, var: Tensor, shortcut: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dy like y -> du [N, rows, H, W], to which the gradient `shortcut` is added; dweight [K], dbias [K]."""


class ReadsNormalised(Normalises, Protocol):
    """A convolution of the backend can normalise its input as it reads it. The normalised input is never stored."""

    def statistics(
        self, u: Tensor, norm: Norm, running_mean: Tensor, running_var: Tensor, rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """affine [2, K], scale and shift of weight * (u - mean) / sqrt(var + eps) + bias; mean and var [K] of the
        batch. The running statistics move towards these, in place, at this rate."""

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        spec: RoutedConv,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        keep_product: bool = False,
        affine: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `Kernels.forward`; where `affine` [2, columns] is given, it convolves relu(scale * x + shift)."""

    def normalise_gradient_again(
        self, dy: Tensor, u: Tensor, norm: Norm, mean: Tensor, var: Tensor, shortcut: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `normalise_gradient`; and act(norm(u)) once more, in the memory of dy: what `weight_gradient` reads."""


def computes_gate_gradients(kernels: Kernels) -> TypeGuard[ComputesGateGradients]:
    """Do the kernels offer `ComputesGateGradients`? (Where a `TypeGuard` is true, mypy knows the narrower type.)"""
    return kernels.COMPUTES_GATE_GRADIENTS


def normalises(kernels: Kernels) -> TypeGuard[Normalises]:
    """Do the kernels offer `Normalises`?"""
    return kernels.NORMALISES


def reads_normalised(kernels: Kernels) -> TypeGuard[ReadsNormalised]:
    """Do the kernels offer `ReadsNormalised`?"""
    return kernels.READS_NORMALISED
