"""What a backend offers: the arithmetic of the routed convolution, without autograd, modules and random numbers.

A backend is a module with these functions and attributes: `masked` (torch's own convolutions, the simplest to read),
`cpu` (C++), `triton`. mypy checks each of them against `Kernels`, and those that can do more against `Normalises`,
`ReadsNormalised` and `ComputesGateGradients`.

Shapes. K kernels and C channels are a layer's own, in its own order: so come weights [K, C, kH, kW], and so their
gradients go back, zero where no row reads. G groups are `shared`, then the tasks. x and dy are packed: their channels
are sorted by group, `columns` of them for the input and `rows` for the output (`spec.py`, `FilterGroups`). H, W are the
input's height and width, H', W' the output's.

Others. A draw gives a kernel one row, in one group. The rows that it would have in the G-1 other groups are called the
OTHERS of its row, in the order tasks, then shared (`FilterGroups.others`). Their gates z are zero, so their features
are zero and no backend stores them. But each of these gates wants a gradient, dz = <dL/dF, F without its gate>, and for
dz alone the backend computes F without its gate once more:

- `forward` with `keep` (spec.rows.all_gates) also returns a: the product of the shared channels with all rows, plus the
  bias. The u of an other in task t's group is a plus the product of t's channels.
- `input_gradient`, where spec.columns.all_gates, also returns dothers: dL/dF of the others of its input's channels.
- `gate_gradient` computes dz from a and dothers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor

from .spec import Recipe, RoutedConv

Packed: TypeAlias = Any
"""A layer's weight and bias as a backend wants them: made by its `pack`, read by its own passes alone."""


class Kernels(Protocol):
    """What every backend offers."""

    @property
    def __name__(self) -> str:
        """Of its module."""

    @property
    def MEMORY_FORMAT(self) -> torch.memory_format | None:
        """Of the images that it returns; None: that of its input."""

    @property
    def KNOWS(self) -> Sequence[str | None]:
        """The activations that it applies itself, in `gate_gradient` and `normalise`: None and names of
        `activations.ACTIVATIONS`."""

    @property
    def OF_TORCH(self) -> bool:
        """Is it made of torch's own operations? A counter of FLOPs then sees each of them, and a compiler, too."""

    @property
    def SHARES_PRODUCTS(self) -> bool:
        """Where all groups have the same kernels (full rows or columns): is the product of an input group with them
        computed once, and added to all outputs that read it?"""

    @property
    def MASKS_GRADIENTS(self) -> bool:
        """Do the gradients take relu=y, the output of the ReLU that dy has yet to go back through? Otherwise it is
        None, and dy has gone through already."""

    @property
    def COMPUTES_GATE_GRADIENTS(self) -> bool:
        """Is it a `ComputesGateGradients`?"""

    @property
    def NORMALISES(self) -> bool:
        """Is it a `Normalises`?"""

    @property
    def READS_NORMALISED(self) -> bool:
        """Is it a `ReadsNormalised`?"""

    def missing(self) -> str | None:
        """What this machine lacks for the backend, in words, or None."""

    def cannot(self, x: Tensor, /) -> str | None:
        """Why a tensor like x can't be used, in words, or None."""

    def sample(self, log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Each kernel's group, argmax(log_p + noise) of [K, G]: assignment int64 [K]; the kernels sorted by group,
        order int64 [K] and offsets int64 [G+1]; and what else of the `FilterGroups` is known already, by its name
        there."""

    def pack(
        self, weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype, gates: bool = False
    ) -> Packed:
        """weight [K, C, kH, kW] and bias [K], as `dtype`. gates: for a `Recipe`, which wants the products that no group
        reads, too."""

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        spec: RoutedConv,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x [N, columns, H, W] -> u [N, rows, H', W'], relu(u) with `relu`, plus `residual`, a tensor like u; and with
        `keep` a, like u (Routing.ALL: u itself. Routing.OWN, or without `keep`: None)."""

    def input_gradient(
        self,
        dy: Tensor,
        packed: Packed,
        spec: RoutedConv,
        size: tuple[int, int],
        *,
        relu: Tensor | None = None,
        around: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor | None]:
        """dy [N, rows, H', W'] -> dx [N, columns, H, W] of `size` (H, W); and, where spec.columns.all_gates, dothers
        [N, (G-1) * columns, H, W]. around: gradients like these by a shortcut around the convolution, which are added.
        """

    def weight_gradient(
        self, x: Tensor, dy: Tensor, packed: Packed, spec: RoutedConv, *, relu: Tensor | None = None, bias: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """x [N, columns, H, W], dy [N, rows, H', W'] -> dw [K, C, kH, kW], and with `bias` db [K]."""

    def gate_gradient(self, recipe: Recipe, dothers: Tensor) -> Tensor:
        """dothers [N, (G-1) * rows, H', W'] -> dz [G-1, rows] = <dothers, act(scale * u + shift)>, summed over images
        and positions, for the others of all rows. u is never stored."""

    def keep_statistics(
        self,
        mean: Tensor,
        var: Tensor,
        assignment: Tensor,
        count: int,
        momentum: float,
        running_mean: Tensor,
        running_var: Tensor,
        draws: Tensor,
        pooled_mean: Tensor,
        pooled_var: Tensor,
    ) -> None:
        """Running statistics [G, K] of the pairs (assignment[k], k) go, in place, towards mean and var [K] of a batch,
        var the biased one of `count` values, at a rate of max(1/n, momentum); n, in draws [G, K], counts the pair's
        batches, this one too. The pooled ones [K], of all groups, do as well. (draws are floating point numbers,
        because averages of models are averages of counts, too.)"""


class ComputesGateGradients(Kernels, Protocol):
    """The gradient of gates comes with that of the features, and dothers is never stored. Stride 1 only."""

    def input_and_gate_gradient(
        self,
        dy: Tensor,
        packed: Packed,
        spec: RoutedConv,
        features: Tensor,
        recipe: Recipe | None,
        *,
        relu: Tensor | None = None,
        own: bool = True,
        around: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor, Tensor]:
        """dy [N, rows, H', W'] -> dx like features [N, columns, H, W], the input of the convolution; and dz [1,
        columns], what these features contribute to the gradient of their gates, in the groups drawn (zeros unless
        `own`). With the recipe of the features dz is [G, columns]: behind it the others'."""


class Normalises(Kernels, Protocol):
    """Batch normalisation with the statistics of the batch, activation and a sum in one go."""

    def normalise(
        self,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        order: Tensor | None,
        eps: float,
        activation: str | None,
        residual: Tensor | None,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """u [N, rows, H, W] -> y = act(norm(u)) + residual (none where the activation pools); mean and biased variance
        [K], at least float32; with `keep` scale and shift [2, rows] of the normalisation. order int64 [rows]: which
        kernel each row of u is, each once; None: as they come."""

    def normalise_gradient(
        self,
        dy: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        order: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: str | None,
        add: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """du [N, rows, H, W], to which `add` is added; dweight [K], dbias [K]."""


class ReadsNormalised(Normalises, Protocol):
    """A convolution that normalises its input as it reads it, so that the normalised input is never stored."""

    def statistics(
        self,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        running_mean: Tensor,
        running_var: Tensor,
        rate: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """affine [2, K], scale and shift of weight * (u - mean) / sqrt(var + eps) + bias; mean and var [K] of the
        batch. The running statistics go towards these, in place, at this rate."""

    def forward(
        self,
        x: Tensor,
        packed: Packed,
        spec: RoutedConv,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        keep: bool = False,
        affine: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As of any backend, of relu(scale * x + shift), if affine is given."""

    def normalise_gradient(
        self,
        dy: Tensor,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        order: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        activation: str | None,
        add: Tensor | None,
        again: bool = False,
    ) -> tuple[Tensor, ...]:
        """As of any; with `again` also act(norm(u)), in the memory of dy: what `weight_gradient` reads."""


def computes_gate_gradients(kernels: Kernels) -> TypeGuard[ComputesGateGradients]:
    """Do they offer `ComputesGateGradients`? (Here and below: said to mypy, too.)"""
    return kernels.COMPUTES_GATE_GRADIENTS


def normalises(kernels: Kernels) -> TypeGuard[Normalises]:
    """Do they offer `Normalises`?"""
    return kernels.NORMALISES


def reads_normalised(kernels: Kernels) -> TypeGuard[ReadsNormalised]:
    """Do they offer `ReadsNormalised`?"""
    return kernels.READS_NORMALISED
