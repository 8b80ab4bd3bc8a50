"""The gradient of the gates (paper, section 2.2): every formula for dz is here.

An SFG layer computes F = z * h, h = act(scale * u + shift), where u is its convolution, and scale and shift are its
normalisation, if it has one. So the gate z of kernel k in group g has the gradient

    dz[k, g] = <dL/dF[k, g], h[k, g]>        summed over images and positions.

- A DRAWN gate is one, and its h is in memory: `of_drawn`. Behind a batch normalisation whose gradients are known, the
  same number comes for free: `of_drawn_behind_norm`.
- An UNDRAWN gate is zero, and nobody has computed its h. What it is computed from is kept (`UndrawnRows`), and dz is
  computed in one go (`UndrawnRows.gate_gradient`).
- The layer that reads F computes dL/dF. If its kernels can, they compute dz in the same pass, and dL/dF of the undrawn
  rows is never stored: `with_input_gradient`, for `DeferredGates`.

`estimators.py` takes dz on to the probabilities p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..activations import Activation, activate
from ..groups import FilterGroups
from ..kernels import masked
from ..kernels.contract import Kernels, Packed, computes_gate_gradients
from ..kernels.formulas import affine, channel_dots
from ..kernels.spec import ShortcutGradient, UndrawnFormula
from . import graph
from .places import Places
from .run import PackedParameters, Run


def of_drawn(df: Tensor, h: Tensor) -> Tensor:
    """dz [rows] of the drawn gates, from dL/dF and h of the drawn rows [N, rows, H, W]."""
    return channel_dots(df, h)


def of_drawn_behind_norm(weight: Tensor, bias: Tensor, dweight: Tensor, dbias: Tensor, gates: Tensor) -> Tensor:
    """dz [K, T+1] of the drawn gates, from weight and bias [K] of the batch normalisation and their gradients:
    <dL/dF, act(norm(u))> = weight * dweight + bias * dbias, for an activation with act(x) = act'(x) x, as a ReLU.
    `gates` [K, T+1] are one-hot."""
    drawn = torch.addcmul(weight * dweight, bias, dbias)
    return drawn[:, None].to(gates.dtype) * gates


class UndrawnRows(NamedTuple):
    """The undrawn rows of a convolution: what their u is computed from, when their gates want a gradient."""

    x: Tensor  # [N, columns, H, W]
    kept_product: Tensor | None  # [N, rows, H', W']
    weight: Tensor  # [K, C, kH, kW]
    bias: Tensor | None  # [K]
    run: Run  # of the convolution
    packed: Packed | None  # weight and bias as the kernels of `run` want them; None: they are packed anew

    def formula(
        self, scale: Tensor | None, shift: Tensor | None, activation: str | None, kernels: Kernels | None = None
    ) -> UndrawnFormula:
        """The formula of their features; scale and shift as in `GatedRows`, alike at all positions. `kernels`: other
        kernels than those that computed u."""
        spec, packed = self.run.spec, self.packed
        if kernels is not None or packed is None:
            packed = (kernels or self.run.kernels).pack(self.weight, self.bias, spec, self.x.dtype)
        scale, shift = (None if values is None else values.flatten(2) for values in (scale, shift))
        return UndrawnFormula(self.x, self.kept_product, packed, spec, scale, shift, activation)

    def gate_gradient(
        self, dundrawn: Tensor, scale: Tensor | None, shift: Tensor | None, activation: Activation, order: Tensor
    ) -> Tensor:
        """dz [T, rows] of the undrawn gates, from dL/dF of the undrawn rows, dundrawn [N, T * rows, H, W]; scale and
        shift as in `GatedRows`; order int64 [rows]: the kernel of each row."""
        kernels = self.run.kernels
        if activation not in kernels.KNOWS or not alike_at_all_positions(scale):
            return of_undrawn(self.u(), dundrawn, scale, shift, activation, order)
        assert activation is None or isinstance(activation, str)
        if self.run.by_operators:
            scale, shift = (None if values is None else values.flatten(2) for values in (scale, shift))
            of_operator = dundrawn, *self[:4], scale, shift, activation, self.run
            return graph.gate_gradient(*of_operator)
        return kernels.gate_gradient(self.formula(scale, shift, activation), dundrawn)

    def u(self) -> Sequence[Tensor]:
        """u of the undrawn rows: T tensors [N, rows, H', W']."""
        if self.run.by_operators:
            return graph.undrawn_rows(*self[:4], self.run.spec).chunk(len(self.run.spec.rows.names) - 1, 1)
        return masked.undrawn_rows(self.formula(None, None, None, masked))

    def split(self) -> tuple[tuple[Tensor | None, ...], tuple[Run, Packed | None]]:
        """The tensors, for autograd to keep, and the rest; `joined` is the way back."""
        return self[:4], self[4:]

    @staticmethod
    def joined(tensors: Sequence[Any], rest: Any) -> UndrawnRows:
        """The inverse of `split`."""
        x, kept_product, weight, bias = tensors
        return UndrawnRows(x, kept_product, weight, bias, *rest)


class KnownRows(NamedTuple):
    """The undrawn rows of a convolution whose u has been computed."""

    every: tuple[Tensor, ...]  # u of the undrawn rows: T tensors [N, rows, H', W'], or one, if all are equal
    tasks: int  # T

    def u(self) -> Sequence[Tensor]:
        """u of the undrawn rows: T tensors [N, rows, H', W']."""
        return self.every if len(self.every) == self.tasks else self.every * self.tasks

    def gate_gradient(
        self, dundrawn: Tensor, scale: Tensor | None, shift: Tensor | None, activation: Activation, order: Tensor
    ) -> Tensor:
        """As `UndrawnRows.gate_gradient`."""
        return of_undrawn(self.u(), dundrawn, scale, shift, activation, order)

    def split(self) -> tuple[tuple[Tensor, ...], int]:
        """As `UndrawnRows.split`."""
        return self.every, self.tasks

    @staticmethod
    def joined(tensors: Sequence[Any], rest: Any) -> KnownRows:
        """The inverse of `split`."""
        return KnownRows(tuple(tensors), rest)


class ShuffledRows(NamedTuple):
    """The undrawn rows of a transposed convolution: a routed convolution computes several values of each, one for each
    place (places.py), which `shuffle` puts side by side."""

    convolved: UndrawnRows
    places: Places

    def u(self) -> Sequence[Tensor]:
        """u of the undrawn rows: T tensors [N, rows, H', W']."""
        return [self.places.shuffled(one) for one in self.convolved.u()]

    def gate_gradient(
        self, dundrawn: Tensor, scale: Tensor | None, shift: Tensor | None, activation: Activation, order: Tensor
    ) -> Tensor:
        """As `UndrawnRows.gate_gradient`."""
        alike = activation is None or isinstance(activation, str)  # the same for all kernels
        if not alike or activation == "relu_pool" or not alike_at_all_positions(scale):
            return of_undrawn(self.u(), dundrawn, scale, shift, activation, order)
        count = self.places.number
        scale, shift = (None if values is None else values.repeat_interleave(count, 2) for values in (scale, shift))
        rows = self.convolved.run.spec.rows.order
        dz = self.convolved.gate_gradient(self.places.apart(dundrawn), scale, shift, activation, rows)
        return dz.unflatten(1, (-1, count)).sum(2)

    def split(self) -> tuple[tuple[Tensor | None, ...], Any]:
        """As `UndrawnRows.split`."""
        tensors, rest = self.convolved.split()
        return tensors, (rest, self.places)

    @staticmethod
    def joined(tensors: Sequence[Any], rest: Any) -> ShuffledRows:
        """The inverse of `split`."""
        return ShuffledRows(UndrawnRows.joined(tensors, rest[0]), rest[1])


AnyUndrawnRows: TypeAlias = UndrawnRows | KnownRows | ShuffledRows


def of_undrawn(
    u: Sequence[Tensor],
    dundrawn: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: Activation,
    order: Tensor,
) -> Tensor:
    """dz [T, rows] of the undrawn gates, from dL/dF of the undrawn rows, dundrawn [N, T * rows, H, W], and T tensors u
    [N, rows, H', W']; scale and shift as in `GatedRows`; order int64 [rows]: the kernel of each row. In plain torch."""
    dz = []
    for n, (u_n, df) in enumerate(zip(u, dundrawn.chunk(len(u), 1), strict=True)):
        dz.append(channel_dots(df, activate(affine(u_n, scale, shift, n), activation, order)))
    return torch.stack(dz)


def alike_at_all_positions(values: Tensor | None) -> bool:
    """Is there one scale for a whole image, [N, T, rows, 1, 1]?"""
    return values is None or all(size == 1 for size in values.shape[3:])


class GatedRows(NamedTuple):
    """How features are made, F = z * act(scale * u + shift): what the gradient of their gates z is computed from."""

    groups: FilterGroups  # the draw, whose `gates` z are [K, T+1]
    undrawn_rows: AnyUndrawnRows | None  # None: the undrawn gates want no gradient
    # [N, T, rows, 1, 1] of the undrawn rows; N or T is 1 where all images or groups are alike; the last two are H and W
    # behind a norm whose statistics differ by position.
    scale: Tensor | None
    shift: Tensor | None  # like `scale`
    activation: Activation
    wants_drawn: bool  # do the drawn gates want a gradient? (Else they have it already.)


class DeferredGates(NamedTuple):
    """Gates whose gradient the layer that reads the features may compute, if its kernels can (COMPUTES_GATE_GRADIENTS).

    The gradient then goes past F, straight to h. So the features must still be this very F, without hooks."""

    features: Tensor  # F, packed
    h: Tensor  # act(..) of the drawn rows, before the gates: what the gradient goes to
    rows: GatedRows


def can_defer(deferred: DeferredGates, x: Tensor, run: Run) -> bool:
    """Can a convolution of x by `run` compute the gradient of these gates?"""
    if not run.kernels.COMPUTES_GATE_GRADIENTS or run.by_operators or run.spec.geometry.stride != (1, 1):
        return False
    # `_backward_hooks`: torch has no public way to ask whether a tensor has hooks.
    if deferred.features is not x or x._backward_hooks or x.retains_grad or deferred.h.dtype != x.dtype:
        return False
    undrawn = deferred.rows.undrawn_rows
    return undrawn is None or (isinstance(undrawn, UndrawnRows) and undrawn.run.kernels is run.kernels)


def with_input_gradient(
    run: Run,
    dy: Tensor,
    x: Tensor,
    parameters: PackedParameters,
    rows: GatedRows,
    gates: Tensor,
    *,
    relu_output: Tensor | None,
    shortcut: ShortcutGradient,
) -> tuple[Tensor, Tensor]:
    """dx like x, and dz [K, T+1] of the gates of the features x that the convolution `run` reads."""
    assert computes_gate_gradients(run.kernels)
    formula = None
    if rows.undrawn_rows is not None:
        assert isinstance(rows.undrawn_rows, UndrawnRows)
        assert rows.activation is None or isinstance(rows.activation, str)
        formula = rows.undrawn_rows.formula(rows.scale, rows.shift, rows.activation)
    how: dict[str, Any] = {"relu_output": relu_output, "drawn": rows.wants_drawn, "shortcut": shortcut}
    dx, dz = run.kernels.input_and_gate_gradient(dy, parameters.packed, run.spec, x, formula, **how)
    drawn, undrawn = dz[0] if rows.wants_drawn else None, None if formula is None else dz[1:]
    return dx, rows.groups.by_kernel(drawn, undrawn, gates)
