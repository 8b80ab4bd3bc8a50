"""Batch normalisation of kernels that change their group with every draw.

Inside an SFG layer the order is convolution -> normalisation -> activation -> gate. In training a kernel is
normalised by the batch statistics of its DRAWN row (in a relaxed draw: its most probable one), and the same scale and
shift serve its other rows. So nothing has to be computed for unselected rows, whose gate is zero, except what their
gate's gradient needs. (Batch statistics of its own for every group and kernel learn no better:
benchmarks/results/phantom_study.md.) Running statistics belong to (group, kernel) pairs, because the same kernel sees
other inputs in another group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .groups import FilterGroups


class KernelNorm(nn.Module):
    """Affine parameters per kernel [K]; running mean and variance per (group, kernel) [T+1, K].

    Only drawn pairs are updated. A pair that was never drawn falls back to its kernel's pooled statistics.
    A pair's rate of update is max(1/n, momentum), n its number of draws: a rarely drawn pair starts from its first
    draw.
    """

    running_mean: Tensor
    running_var: Tensor
    draws: Tensor
    pooled_mean: Tensor
    pooled_var: Tensor

    def __init__(self, kernels: int, groups: int, eps: float = 1e-5, momentum: float = 0.1, **factory: Any) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(kernels, **factory))
        self.bias = nn.Parameter(torch.zeros(kernels, **factory))
        self.register_buffer("running_mean", torch.zeros(groups, kernels, **factory))
        self.register_buffer("running_var", torch.ones(groups, kernels, **factory))
        self.register_buffer("draws", torch.zeros(groups, kernels, dtype=torch.int64, device=factory.get("device")))
        self.register_buffer("pooled_mean", torch.zeros(kernels, **factory))
        self.register_buffer("pooled_var", torch.ones(kernels, **factory))

    def forward(self, rows: Tensor, groups: FilterGroups) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise rows [N, R, H, W] that are all live.

        Returns the result and scale and shift [T+1, K] without gradient, for the rows that are not live.
        """
        if not self.training:
            scale, shift = self.running_affine()
            pick = groups.rows_in_streams
            out = rows * _channels(scale.reshape(-1)[pick], rows) + _channels(shift.reshape(-1)[pick], rows)
            return out, scale.detach(), shift.detach()
        assert groups.assignment is not None
        if groups.full:  # a relaxed draw
            index = groups.assignment * groups.width + torch.arange(groups.width, device=rows.device)
            var, mean = torch.var_mean(rows.index_select(1, index), (0, 2, 3), correction=0)
            scale, shift = self.batch_affine(mean, var, _count(rows), groups.assignment)
            out = rows * _channels(scale.repeat(len(groups.names)), rows)
            out = out + _channels(shift.repeat(len(groups.names)), rows)
        else:
            mean, var = self.running_mean.new_zeros(groups.width), self.running_mean.new_zeros(groups.width)
            out = nn.functional.batch_norm(  # with rate 1 the "running" statistics it writes are this batch's own
                rows, mean, var, self.weight[groups.order], self.bias[groups.order], True, 1.0, self.eps
            )
            count = _count(rows)
            with torch.no_grad():
                biased = var[groups.inverse] * ((count - 1) / max(count, 1))
                scale, shift = self.batch_affine(mean[groups.inverse], biased, count, groups.assignment)
        repeat = (len(groups.names), -1)
        return out, scale.detach().expand(*repeat), shift.detach().expand(*repeat)

    def batch_affine(self, mean: Tensor, var: Tensor, count: int, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [K] from the (biased) batch statistics of each kernel's drawn row; updates the running ones.

        `count` is the number of values behind each statistic, `assignment` [K] the drawn group.
        """
        if count < 2:
            raise ValueError("batch normalisation in training needs more than one value per channel, got one")
        self._update(mean.detach(), var.detach() * (count / max(count - 1, 1)), assignment)
        scale = self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale

    def running_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [T+1, K] for evaluation."""
        known = self.draws > 0
        mean = self.running_mean.where(known, self.pooled_mean)
        var = self.running_var.where(known, self.pooled_var)
        scale = self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, assignment: Tensor) -> None:
        # Counted first, so that max(1/n, momentum) is 1 for a first draw.
        index = assignment * assignment.numel() + torch.arange(assignment.numel(), device=assignment.device)
        draws = self.draws.view(-1)
        draws.index_copy_(0, index, draws[index] + 1)
        for running, pooled, new in (
            (self.running_mean, self.pooled_mean, mean),
            (self.running_var, self.pooled_var, var),
        ):
            old = running.view(-1)[index]
            rate = draws[index].to(old.dtype).reciprocal().clamp_min(self.momentum)
            running.view(-1).index_copy_(0, index, old + rate * (new.to(old.dtype) - old))
            rate = self.draws.sum(0).to(old.dtype).reciprocal().clamp_min(self.momentum)
            pooled.add_(rate * (new.to(old.dtype) - pooled))

    @torch.no_grad()
    def forget(self, assignment: Tensor | None) -> None:
        """Start the running statistics of these (group, kernel) pairs anew (None: of all)."""
        if assignment is None:
            self.draws.zero_()
            return
        index = assignment * assignment.numel() + torch.arange(assignment.numel(), device=assignment.device)
        self.draws.view(-1).index_fill_(0, index, 0)

    def extra_repr(self) -> str:
        groups, kernels = self.running_mean.shape
        return f"{kernels} kernels, {groups} groups, eps={self.eps}, momentum={self.momentum}"


def _count(rows: Tensor) -> int:
    return rows.shape[0] * rows.shape[2] * rows.shape[3]


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """[R] -> [R, 1, 1] in the dtype of the features."""
    return values.to(like.dtype)[:, None, None]
