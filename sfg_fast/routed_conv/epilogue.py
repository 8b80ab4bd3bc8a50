"""What follows the convolution in an SFG layer: F = z * act(norm(u)) + shortcut (paper, section 2.1).

Kernels that can do all of it in one go do so (`_in_one_go`); otherwise it is plain torch, step by step.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import undrawn_features
from ..activations import Activation, activate
from ..features import SFGFeatures
from ..groups import FilterGroups
from ..kernels.contract import Normalises
from ..kernels.spec import BatchNorm, MovingStatistics
from ..norm import KernelNorm
from ..tracing import in_backward
from . import eager
from .convolve import Convolved
from .gate_gradient import DeferredGates, GatedRows
from .run import Run


class Epilogue(NamedTuple):
    """What a layer does with u."""

    groups: FilterGroups  # the draw: which row is in which group, and the gates z
    norm: KernelNorm | None
    activation: Activation
    activated: bool  # has the convolution applied the activation already?


def features_of(found: Convolved, epilogue: Epilogue, residual: SFGFeatures | None) -> SFGFeatures:
    """The features of an SFG layer from its convolution, plus `residual`, features of the same draw."""
    kernels = _kernels_in_one_go(found, epilogue)
    if kernels is not None and epilogue.norm is not None:
        if residual is None or (epilogue.activation != "relu_pool" and residual.dtype == found.u.dtype):
            return _in_one_go(found, epilogue, epilogue.norm, residual, kernels)
        return residual + _in_one_go(found, epilogue, epilogue.norm, None, kernels)
    features = _step_by_step(found, epilogue)
    return features if residual is None else residual + features


def _kernels_in_one_go(found: Convolved, epilogue: Epilogue) -> Normalises | None:
    """The kernels that convolved, if they can do this epilogue in one go, or None."""
    norm, activation = epilogue.norm, epilogue.activation
    if norm is None or not norm.training or norm.synchronised or epilogue.groups.full:
        return None
    return found.run.normalising(found.u) if activation in found.run.kernels.KNOWS else None


def _in_one_go(
    found: Convolved, epilogue: Epilogue, norm: KernelNorm, residual: SFGFeatures | None, kernels: Normalises
) -> SFGFeatures:
    """Normalisation by the batch, activation, drawn gates and sum. The running statistics move."""
    groups, activation = epilogue.groups, epilogue.activation
    assert groups.gates is not None
    assert groups.assignment is not None
    assert activation is None or isinstance(activation, str)
    how = BatchNorm(norm.weight, norm.bias, groups.order, norm.eps, activation)
    gates, add = groups.gates if groups.learns else None, None if residual is None else residual.packed
    moves = None  # in a repeated forward pass of activation checkpointing: the batch counts once
    if not in_backward():
        moves = MovingStatistics(norm.running, groups.assignment, norm.momentum)
    h, _, _, _, affine = eager.batch_norm(found.u, how, add, kernels, gates, moves)
    of_residual = None if residual is None else residual.undrawn
    if found.undrawn_rows is None:
        return SFGFeatures(h, groups, undrawn=of_residual)
    rows = GatedRows(groups, found.undrawn_rows, affine[:1], affine[1:], activation, wants_drawn=False)
    packed, behind = eager.gate(h, rows)
    if residual is not None:
        return SFGFeatures(packed, groups, undrawn=undrawn_features.of_sum(behind, of_residual))
    return SFGFeatures(packed, groups, undrawn=behind, deferred=_deferred(packed, h, rows, found.run))


def _step_by_step(found: Convolved, epilogue: Epilogue) -> SFGFeatures:
    """Normalisation, activation and gates in plain torch."""
    u, groups, activation = found.u, epilogue.groups, epilogue.activation
    scale = shift = None
    if epilogue.norm is not None:
        u, scale, shift = epilogue.norm(u, groups)
    h = u if epilogue.activated else activate(u, activation, groups.order)
    gates, rows = groups.gates, found.undrawn_rows
    assert gates is not None
    if groups.full:  # a relaxed draw; the gates' gradient is summed in float32
        z = gates.t().reshape(-1, 1, 1)
        return SFGFeatures((h.to(z.dtype) * z).to(h.dtype), groups)
    if not gates.requires_grad:
        return SFGFeatures(h, groups)  # the gates of drawn rows are one
    if rows is not None and scale is not None and shift is not None:
        scale, shift = (values[groups.undrawn_groups, groups.order] for values in (scale, shift))
    gated = GatedRows(groups, rows, scale, shift, activation, wants_drawn=True)
    packed, behind = eager.gate(h, gated)
    return SFGFeatures(packed, groups, undrawn=behind, deferred=_deferred(packed, h, gated, found.run))


def _deferred(packed: Tensor, h: Tensor, rows: GatedRows, run: Run) -> DeferredGates | None:
    """The gates, for the layer that reads the features: it may compute their gradient. Not in a compiled graph: there
    `gate` returns packed and h as views of one tensor, and one of them would lose its gradient."""
    if rows.activation not in (None, "relu") or run.by_operators:
        return None
    return DeferredGates(packed, h, rows)
