"""Batch normalisation of kernels that change their group with every draw.

Inside an SFG layer the order is convolution -> normalisation -> activation -> gate. In training a kernel is normalised
by the batch statistics of its DRAWN row (in a relaxed draw: of its most probable row), and the same scale and shift
serve its other rows. So nothing has to be computed for undrawn rows, whose gate is zero, except what the gradient of
this gate needs. (Batch statistics of its own for every group and kernel learn no better:
benchmarks/results/phantom_study.md.) Running statistics belong to (group, kernel) pairs, because the same kernel sees
other inputs in another group.

This file is plain torch; the oracle uses it. What kernels do in one go stands in routed_conv/epilogue.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from .groups import FilterGroups
from .kernels import formulas
from .kernels.formulas import affine_of
from .kernels.spec import RunningStatistics
from .tracing import in_backward


class KernelNorm(nn.Module):
    """Affine parameters per kernel [K]; running mean and variance per (group, kernel) [T+1, K].

    Only the running statistics of drawn pairs move. A pair that was never drawn falls back to its kernel's pooled
    statistics. A pair moves at a rate of max(1/n, momentum), where n counts its draws: so a rarely drawn pair starts
    from its first draw. `synchronised`: batch statistics are those over all processes (see `synchronise`).
    """

    synchronised = False

    running_mean: Tensor
    running_var: Tensor
    draws: Tensor
    pooled_mean: Tensor
    pooled_var: Tensor

    def __init__(self, kernels: int, groups: int, eps: float = 1e-5, momentum: float = 0.1, **factory: Any) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(kernels, **factory))
        self.bias = nn.Parameter(torch.empty(kernels, **factory))
        self.register_buffer("running_mean", torch.empty(groups, kernels, **factory))
        self.register_buffer("running_var", torch.empty(groups, kernels, **factory))
        # Floating point, because an average of models averages the counts, too; whole numbers would be cut off.
        self.register_buffer("draws", torch.empty(groups, kernels, **factory))
        self.register_buffer("pooled_mean", torch.empty(kernels, **factory))
        self.register_buffer("pooled_var", torch.empty(kernels, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all to what a new module has: scale 1, shift 0, no running statistics."""
        self.weight.fill_(1)
        self.bias.zero_()
        self.reset_running_stats()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forgets the running statistics: mean 0, variance 1, no draws."""
        for value, buffers in ((0, (self.running_mean, self.draws, self.pooled_mean)),
                               (1, (self.running_var, self.pooled_var))):  # fmt: skip
            for buffer in buffers:
                buffer.fill_(value)

    @property
    def running(self) -> RunningStatistics:
        """The running statistics, which kernels change in place."""
        return RunningStatistics(self.running_mean, self.running_var, self.draws, self.pooled_mean, self.pooled_var)

    def forward(self, rows: Tensor, groups: FilterGroups) -> tuple[Tensor, Tensor, Tensor]:
        """Normalises rows [N, R, H, W], all of which are drawn rows (or all rows of a relaxed draw).

        Returns the result, and scale and shift [T+1, K] without gradient, for the undrawn rows.
        """
        if not self.training:
            scale, shift = self.running_affine()
            pick = groups.rows_in_streams
            out = rows * of_channels(scale.reshape(-1)[pick], rows) + of_channels(shift.reshape(-1)[pick], rows)
            return out, scale.detach(), shift.detach()
        assert groups.assignment is not None
        if groups.full:  # a relaxed draw
            index = groups.assignment * groups.width + torch.arange(groups.width, device=rows.device)
            var, mean = torch.var_mean(rows.index_select(1, index), (0, 2, 3), correction=0)
            scale, shift = self.batch_affine(mean, var, values_of_each_channel(rows), groups.assignment)
            out = rows * of_channels(scale.repeat(len(groups.names)), rows)
            out = out + of_channels(shift.repeat(len(groups.names)), rows)
        elif self.synchronised:
            var, mean = torch.var_mean(rows, (0, 2, 3), correction=0)
            inverse, count = groups.inverse, values_of_each_channel(rows)
            scale, shift = self.batch_affine(mean[inverse], var[inverse], count, groups.assignment)
            out = rows * of_channels(scale[groups.order], rows) + of_channels(shift[groups.order], rows)
        else:
            mean, var = self.running_mean.new_zeros(groups.width), self.running_mean.new_zeros(groups.width)
            out = nn.functional.batch_norm(  # at rate 1 the "running" statistics that it writes are those of the batch
                rows, mean, var, self.weight[groups.order], self.bias[groups.order], True, 1.0, self.eps
            )
            count = values_of_each_channel(rows)
            with torch.no_grad():
                biased = var[groups.inverse] * ((count - 1) / max(count, 1))
                scale, shift = self.batch_affine(mean[groups.inverse], biased, count, groups.assignment)
        repeat = (len(groups.names), -1)
        return out, scale.detach().expand(*repeat), shift.detach().expand(*repeat)

    def batch_affine(self, mean: Tensor, var: Tensor, count: int, assignment: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [K] from mean and (biased) variance [K] of each kernel's drawn row in the batch. The running
        statistics move.

        `count` is the number of values behind each statistic, `assignment` [K] the drawn groups. Raises ValueError for
        one value.
        """
        if self.synchronised:
            mean, var, count = _over_processes(mean, var, count)
        if count < 2:
            raise ValueError("batch normalisation in training needs more than one value per channel, got one")
        if not in_backward():  # activation checkpointing repeats a forward pass: the batch counts once
            with torch.no_grad():
                formulas.keep_statistics(mean.detach(), var.detach(), assignment, count, self.momentum, self.running)
        return affine_of(self.weight, self.bias, mean, var, self.eps)

    def running_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [T+1, K] for evaluation."""
        known = self.draws > 0
        mean = self.running_mean.where(known, self.pooled_mean)
        var = self.running_var.where(known, self.pooled_var)
        return affine_of(self.weight, self.bias, mean, var, self.eps)

    def folds(self, groups: FilterGroups) -> bool:
        """Are scale and shift of all rows known before the convolution, so that they can be part of its weight?"""
        return not self.training and not groups.full and not groups.learns

    def folded(self, weight: Tensor, bias: Tensor | None, groups: FilterGroups) -> tuple[Tensor, Tensor]:
        """Weight [K, C, kH, kW] and bias [K] of a convolution that does the normalisation of `eval()`, too."""
        assert groups.assignment is not None
        kernels = torch.arange(groups.width, device=groups.assignment.device)
        scale, shift = (affine[groups.assignment, kernels] for affine in self.running_affine())
        return folded(weight, bias, scale, shift)

    @torch.no_grad()
    def forget(self, assignment: Tensor | None) -> None:
        """Starts the running statistics of the pairs (assignment[k], k) anew (None: those of all pairs)."""
        if assignment is None:
            self.draws.zero_()
            return
        index = assignment * assignment.numel() + torch.arange(assignment.numel(), device=assignment.device)
        self.draws.view(-1).index_fill_(0, index, 0)

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        groups, kernels = self.running_mean.shape
        return f"{kernels} kernels, {groups} groups, eps={self.eps}, momentum={self.momentum}"


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes. It also runs on the CPU, where torch's SyncBatchNorm
    does not."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.BatchNorm2d`."""
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean, var, count = _over_processes(mean, var, values_of_each_channel(x))
        move_statistics(self, mean, var, count)
        scale, shift = affine_of(self.weight, self.bias, mean, var, self.eps)
        return x * of_channels(scale, x) + of_channels(shift, x)


def folded(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that computes scale * (convolution with weight and bias) + shift, in the dtype
    of the weight."""
    bias = shift if bias is None else scale * bias + shift
    return (weight * scale[:, None, None, None]).to(weight.dtype), bias.to(weight.dtype)


def running_affine(norm: nn.BatchNorm2d, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Scale and shift of a plain batch normalisation in `eval()`, of the channels `rows`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean[rows], norm.running_var[rows]
    return affine_of(norm.weight[rows], norm.bias[rows], mean, var, norm.eps)


def count_batch(norm: nn.BatchNorm2d) -> float:
    """Counts one more batch, and returns the rate at which the running statistics go towards its own."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def move_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics of a plain batch normalisation towards mean and (biased) variance of a batch, of
    `count` values for each channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    rate = count_batch(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
    norm.running_var.lerp_((var * (count / max(count - 1, 1))).to(norm.running_var.dtype), rate)


def synchronise(model: nn.Module) -> None:
    """From now on every batch norm of the model takes its batch statistics over all processes of torch.distributed.
    The processes must draw the same assignments, and have batches of the same size."""
    for module in model.modules():
        if isinstance(module, KernelNorm):
            module.synchronised = True
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronisedBatchNorm2d


def _over_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Mean and (biased) variance of the values of all processes from those of each process; differentiable."""
    processes = distributed.get_world_size()
    whole = _Sum.apply(mean / processes)
    return whole, _Sum.apply((var + (mean - whole).square()) / processes), count * processes


class _Sum(torch.autograd.Function):
    """The sum over all processes. The loss of each process depends on the sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, here: Tensor) -> Tensor:
        total = here.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def values_of_each_channel(rows: Tensor) -> int:
    """N * H * W of rows [N, R, H, W]."""
    return rows.shape[0] * rows.shape[2] * rows.shape[3]


def of_channels(values: Tensor, like: Tensor) -> Tensor:
    """[R] -> [R, 1, 1], in the dtype of the features `like`."""
    return values.to(like.dtype)[:, None, None]
