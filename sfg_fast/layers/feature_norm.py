"""Batch normalisation of features, behind their gates: for what stands after a sum, where no layer could do it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import undrawn_features
from ..features import SFGFeatures
from ..norm import KernelNorm
from ..reference import DenseFeatures
from .conv import Features


class FeatureNorm(nn.Module):
    """F' = scale * F + z * shift for features F = z * h, so that F' = z * (scale * h + shift): what the grouping zeroes
    stays zero. Statistics as in `KernelNorm`: of each kernel's drawn row.

    z counts as a constant in z * shift. Prefer `SFGConv2d(norm="batch")` where a layer stands right before.
    """

    def __init__(self, kernels: int, groups: int, eps: float = 1e-5, momentum: float = 0.1, **factory: Any) -> None:
        super().__init__()
        self.norm = KernelNorm(kernels, groups, eps, momentum, **factory)

    def forward(self, x: Features) -> Features:
        """Raises ValueError for features that are not of one draw (streams)."""
        groups, norm = x.groups, self.norm
        if groups.assignment is None or groups.gates is None:
            raise ValueError(f"FeatureNorm got {groups}, expected features of a draw")
        z = groups.gates.detach().t()[:, :, None, None]  # [T+1, K, 1, 1]
        if isinstance(x, DenseFeatures):
            scales, shifts = self._affine(torch.stack(list(x)), groups.assignment)
            dense = [f * a + z[g].to(f.dtype) * b for g, (f, a, b) in enumerate(zip(x, scales, shifts, strict=True))]
            return DenseFeatures(dense, groups, x.routing)
        if groups.full:
            rows = x.packed.unflatten(1, (len(groups.names), -1)).transpose(0, 1)
            scales, shifts = self._affine(rows, groups.assignment)
            full = rows * scales[:, None] + z[:, None].to(rows.dtype) * shifts[:, None]
            return SFGFeatures(full.transpose(0, 1).flatten(1, 2), groups, x.routing)
        packed, scale, _ = norm(x.packed, groups)
        behind = None
        if x.undrawn is not None:
            behind = undrawn_features.scaled(x.undrawn, scale[groups.undrawn_groups, groups.order].reshape(-1, 1, 1))
        return SFGFeatures(packed, groups, x.routing, behind)

    def _affine(self, rows: Tensor, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [T+1, K, 1, 1] for dense rows [T+1, N, K, H, W]."""
        if not self.norm.training:
            scale, shift = self.norm.running_affine()
        else:
            moments = torch.var_mean(rows, (1, 3, 4), correction=0)
            var, mean = (moment.gather(0, assignment[None]).squeeze(0) for moment in moments)
            count = rows[0].numel() // rows.shape[2]
            scale, shift = (one.expand(len(rows), -1) for one in self.norm.batch_affine(mean, var, count, assignment))
        return scale.to(rows.dtype)[..., None, None], shift.to(rows.dtype)[..., None, None]
