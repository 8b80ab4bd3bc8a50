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
from ..kernels.packing import of_channels
from ..kernels.spec import MovingStatistics, Norm
from ..norm import ImageNorm, KernelNorm, values_of_each_channel
from ..tracing import in_backward
from . import eager
from .convolve import Convolved
from .gate_gradient import DeferredGates, GatedRows, alike_at_all_positions
from .run import Run


class Epilogue(NamedTuple):
    """What a layer does with u."""

    groups: FilterGroups  # the draw: which row is in which group, and the gates z
    norm: KernelNorm | ImageNorm | None
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
    norm, activation, groups = epilogue.norm, epilogue.activation, epilogue.groups
    if norm is None or groups.full or activation not in found.run.kernels.KNOWS:
        return None
    if isinstance(norm, KernelNorm):
        values = values_of_each_channel(found.u)
        return found.run.normalising(values) if norm.training and not norm.synchronised else None
    can = norm.kind == "instance" and norm.weight is not None and found.u.shape[0] > 0  # a batch may be empty
    return found.run.normalising(found.u.shape[2:].numel()) if can else None


def _in_one_go(
    found: Convolved,
    epilogue: Epilogue,
    norm: KernelNorm | ImageNorm,
    residual: SFGFeatures | None,
    kernels: Normalises,
) -> SFGFeatures:
    """Normalisation by the batch or by each image, activation, drawn gates and sum. Running statistics move."""
    groups, activation = epilogue.groups, epilogue.activation
    assert groups.gates is not None
    assert groups.assignment is not None
    assert activation is None or isinstance(activation, str)
    assert norm.weight is not None
    assert norm.bias is not None
    how = Norm(norm.weight, norm.bias, groups.order, norm.eps, activation, isinstance(norm, ImageNorm))
    gates, add = groups.gates if groups.learns else None, None if residual is None else residual.packed
    moves = None  # in a repeated forward pass of activation checkpointing: the batch counts once
    if isinstance(norm, KernelNorm) and not in_backward():
        moves = MovingStatistics(norm.running, groups.assignment, norm.momentum)
    h, _, _, _, affine = eager.normalise(found.u, how, add, kernels, gates, moves)
    of_residual = None if residual is None else residual.undrawn
    if found.undrawn_rows is None:
        return SFGFeatures(h, groups, undrawn=of_residual)
    scale, shift = of_channels(affine.reshape(2, -1, 1, affine.shape[-1]), h)
    rows = GatedRows(groups, found.undrawn_rows, scale, shift, activation, wants_drawn=False)
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
        z = of_channels(gates.t().reshape(-1), h)
        return SFGFeatures((h.to(z.dtype) * z).to(h.dtype), groups)
    if not gates.requires_grad:
        return SFGFeatures(h, groups)  # the gates of drawn rows are one
    gated = GatedRows(groups, rows, scale, shift, activation, wants_drawn=True)
    packed, behind = eager.gate(h, gated)
    return SFGFeatures(packed, groups, undrawn=behind, deferred=_deferred(packed, h, gated, found.run))


def _deferred(packed: Tensor, h: Tensor, rows: GatedRows, run: Run) -> DeferredGates | None:
    """The gates, for the layer that reads the features: it may compute their gradient. Not in a compiled graph: there
    `gate` returns packed and h as views of one tensor, and one of them would lose its gradient."""
    if rows.activation not in (None, "relu", "leaky_relu") or run.by_operators:
        return None
    if not alike_at_all_positions(rows.scale):
        return None
    return DeferredGates(packed, h, rows)
