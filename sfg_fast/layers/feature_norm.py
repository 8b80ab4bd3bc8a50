"""Normalisation of features, behind their gates: for what stands after a sum, where no layer could do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import undrawn_features
from ..features import SFGFeatures
from ..norm import NormName, make_norm
from ..reference import DenseFeatures
from .conv import Features


class FeatureNorm(nn.Module):
    """F' = scale * F + z * shift for features F = z * h, so that F' = z * (scale * h + shift): what the grouping zeroes
    stays zero. Statistics as in norm.py: of each kernel's drawn row.

    z counts as a constant in z * shift. Prefer the `norm` of a layer where a layer stands right before.

    Args:
        kernels, groups: K and T+1 of the features.
        norm: as in `SFGConv2d`, not None.
    """

    def __init__(self, kernels: int, groups: int, norm: NormName = "batch", **factory: Any) -> None:
        super().__init__()
        made = make_norm(norm, kernels, groups, **factory)
        if made is None:
            raise ValueError("norm=None: expected the name of a norm")
        self.norm = made

    def forward(self, x: Features) -> Features:
        """Raises ValueError for features that are not of one draw (streams)."""
        groups = x.groups
        if groups.assignment is None or groups.gates is None:
            raise ValueError(f"FeatureNorm got {groups}, expected features of a draw")
        if isinstance(x, DenseFeatures):
            return DenseFeatures(self._dense(list(x), groups.assignment, groups.gates), groups, x.routing)
        if groups.full:
            rows = x.packed.unflatten(1, (len(groups.names), -1)).unbind(1)
            full = torch.cat(self._dense(rows, groups.assignment, groups.gates), 1)
            return SFGFeatures(full, groups, x.routing)
        packed, scale, _ = self.norm(x.packed, groups)
        behind = None
        if x.undrawn is not None:
            every = scale.expand(-1, len(groups.tasks), *[-1] * (scale.dim() - 2))
            behind = undrawn_features.scaled(x.undrawn, every.flatten(1, 2))
        return SFGFeatures(packed, groups, x.routing, behind)

    def _dense(self, rows: Any, assignment: Tensor, gates: Tensor) -> list[Tensor]:
        """The normalised T+1 dense tensors [N, K, H, W]."""
        scales, shifts = self.norm.of_dense(rows, assignment)
        z = gates.detach().t()[(..., *[None] * (rows[0].dim() - 2))]  # [T+1, K, 1, 1]
        return [f * a + z[g].to(f.dtype) * b for g, (f, a, b) in enumerate(zip(rows, scales, shifts, strict=True))]
