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
from torch import Tensor, distributed, nn

from . import backends
from .activations import Activation
from .groups import FilterGroups
from .kernels import masked
from .kernels.contract import Kernels, Normalises, normalises
from .once import once_differentiable
from .tracing import in_graph


class KernelNorm(nn.Module):
    """Affine parameters per kernel [K]; running mean and variance per (group, kernel) [T+1, K].

    Only drawn pairs are updated. A pair that was never drawn falls back to its kernel's pooled statistics.
    A pair's rate of update is max(1/n, momentum), n its number of draws: a rarely drawn pair starts from its first
    draw. `synchronised`: batch statistics over all processes (see `synchronise`).
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
        # No whole numbers: an average of models averages them, too, and would cut off what is behind the point.
        self.register_buffer("draws", torch.empty(groups, kernels, **factory))
        self.register_buffer("pooled_mean", torch.empty(kernels, **factory))
        self.register_buffer("pooled_var", torch.empty(kernels, **factory))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As it is made: scale 1, shift 0, no running statistics."""
        self.weight.fill_(1)
        self.bias.zero_()
        self.reset_running_stats()

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        for value, buffers in ((0, (self.running_mean, self.draws, self.pooled_mean)),
                               (1, (self.running_var, self.pooled_var))):  # fmt: skip
            for buffer in buffers:
                buffer.fill_(value)

    def in_one_go(
        self, kernels: Kernels, rows: Tensor, groups: FilterGroups, activation: Activation
    ) -> Normalises | None:
        """These kernels, which convolved, if they can do `normalise_and_gate` on these rows, or None."""
        can = self.training and not groups.full and not self.synchronised and activation in kernels.KNOWS
        return _normalising(kernels, rows) if can else None

    def normalise_and_gate(
        self, rows: Tensor, groups: FilterGroups, activation: Activation, residual: Tensor | None, kernels: Normalises
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Behind the convolution all of it in one go: z * act(norm(rows)) + residual, z the gates of the drawn rows,
        which are one but want a gradient. Scale and shift [1, rows] are those of the rows' others, if these count."""
        assert groups.gates is not None
        gates = groups.gates if groups.learns else None
        how = self.eps, activation, kernels, groups
        out, _, mean, var, affine = _BatchNorm.apply(rows, self.weight, self.bias, gates, residual, *how)
        assert groups.assignment is not None
        self._keep(kernels, mean, var, _count(rows), groups.assignment)
        return (out, None, None) if affine is None else (out, affine[:1], affine[1:])

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
        elif self.synchronised:
            var, mean = torch.var_mean(rows, (0, 2, 3), correction=0)
            inverse = groups.inverse
            scale, shift = self.batch_affine(mean[inverse], var[inverse], _count(rows), groups.assignment)
            out = rows * _channels(scale[groups.order], rows) + _channels(shift[groups.order], rows)
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
        if self.synchronised:
            mean, var, count = _over_processes(mean, var, count)
        if count < 2:
            raise ValueError("batch normalisation in training needs more than one value per channel, got one")
        self._keep(masked, mean.detach(), var.detach(), count, assignment)
        return masked.affine_of(self.weight, self.bias, mean, var, self.eps)

    def running_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift [T+1, K] for evaluation."""
        known = self.draws > 0
        mean = self.running_mean.where(known, self.pooled_mean)
        var = self.running_var.where(known, self.pooled_var)
        return masked.affine_of(self.weight, self.bias, mean, var, self.eps)

    def folds(self, groups: FilterGroups) -> bool:
        """Is all that this does to the rows known before the convolution?"""
        return not self.training and not groups.full and not groups.learns

    def folded(self, weight: Tensor, bias: Tensor | None, groups: FilterGroups) -> tuple[Tensor, Tensor]:
        """Weight and bias [K, ..] of the convolution with the normalisation of `eval()` in them."""
        assert groups.assignment is not None
        kernels = torch.arange(groups.width, device=groups.assignment.device)
        scale, shift = (affine[groups.assignment, kernels] for affine in self.running_affine())
        return folded(weight, bias, scale, shift)

    @torch.no_grad()
    def _keep(self, kernels: Kernels, mean: Tensor, var: Tensor, count: int, assignment: Tensor) -> None:
        running = self.running_mean, self.running_var, self.draws, self.pooled_mean, self.pooled_var
        kernels.keep_statistics(mean, var, assignment, count, self.momentum, *running)

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


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes, also on the CPU, where torch's SyncBatchNorm does not
    go."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        mean, var, count = _over_processes(mean, var, _count(x))
        keep_statistics(self, mean, var, count)
        scale, shift = masked.affine_of(self.weight, self.bias, mean, var, self.eps)
        return x * _channels(scale, x) + _channels(shift, x)


class _BatchNorm(torch.autograd.Function):
    """gates * act(norm(u)) + residual with batch statistics, by kernels that do it in one go; u once more, for a
    shortcut around it: the gradients of both ways are added where the first is made; mean and (biased) variance; for
    groups all of whose gates count scale and shift [2, rows].

    `groups`: the draw that u is of; None: a plain batch norm of all channels as they come. weight, bias, mean and
    variance [K], gates [K, T+1] or None; those of the drawn groups are one. Their gradient comes for free:
    <dout, act(norm(u))> = weight * dweight + bias * dbias."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        gates: Tensor | None,
        residual: Tensor | None,
        eps: float,
        activation: Any,
        kernels: Normalises,
        groups: FilterGroups | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        order, keep = (None, False) if groups is None else (groups.order, groups.all_gates)
        out, mean, var, affine = kernels.normalise(u, weight, bias, order, eps, activation, residual, keep)
        ctx.save_for_backward(u, weight, bias, order, mean, var, gates)
        ctx.how, ctx.kernels = (eps, activation), kernels
        ctx.mark_non_differentiable(mean, var, *([affine] if keep else []))
        ctx.set_materialize_grads(False)
        return out, u.view_as(u), mean, var, affine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, around: Tensor | None, *_: None) -> Any:
        if dout is None:
            return around, *(None,) * 8
        *made_of, gates = ctx.saved_tensors
        du, dweight, dbias = ctx.kernels.normalise_gradient(dout, *made_of, *ctx.how, around)
        _, weight, bias, *_ = made_of
        dweight, dbias = dweight.to(weight.dtype), dbias.to(bias.dtype)
        dgates = None
        if ctx.needs_input_grad[3]:
            own = torch.addcmul(weight * dweight, bias, dbias)
            dgates = own[:, None].to(gates.dtype) * gates  # which are one-hot
        return du, dweight, dbias, dgates, dout if ctx.needs_input_grad[4] else None, *[None] * 4


def _normalising(kernels: Kernels, x: Tensor) -> Normalises | None:
    """These kernels, if they normalise and activate x in one go, or None."""
    return kernels if normalises(kernels) and not in_graph() and _count(x) > 1 else None


def relu_in_one_go(norm: nn.BatchNorm2d | None, x: Tensor) -> Normalises | None:
    """The kernels for this norm and a ReLU behind it, or None."""
    if type(norm) is not nn.BatchNorm2d or not norm.training or in_graph():
        return None
    kernels, dtype = backends.kernels(x, x.shape[1])
    return _normalising(kernels, x) if dtype == x.dtype else None


def batch_norm_relu(norm: nn.BatchNorm2d | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """relu(norm(x)), and x for a shortcut around it."""
    kernels = relu_in_one_go(norm, x)
    if norm is None or kernels is None:
        return nn.functional.relu(x if norm is None else norm(x)), x
    how = norm.eps, "relu", kernels, None
    out, around, mean, var, _ = _BatchNorm.apply(x, norm.weight, norm.bias, None, None, *how)
    keep_statistics(norm, mean, var, _count(x))
    return out, around


def folded(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """scale * (convolution with weight and bias) + shift as one convolution, in the dtype of the weight."""
    bias = shift if bias is None else scale * bias + shift
    return (weight * scale[:, None, None, None]).to(weight.dtype), bias.to(weight.dtype)


def running_affine(norm: nn.BatchNorm2d, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch normalisation in `eval()`, of some of its channels."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean[rows], norm.running_var[rows]
    return masked.affine_of(norm.weight[rows], norm.bias[rows], mean, var, norm.eps)


def count_batch(norm: nn.BatchNorm2d) -> float:
    """The rate at which the running statistics go towards those of one more batch."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def keep_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """var is the biased one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    rate = count_batch(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), rate)
    norm.running_var.lerp_((var * (count / max(count - 1, 1))).to(norm.running_var.dtype), rate)


def synchronise(model: nn.Module) -> None:
    """From now on every batch norm of the model takes its batch statistics over all processes of torch.distributed.
    They must draw the same assignments, and have batches of the same size."""
    for module in model.modules():
        if isinstance(module, KernelNorm):
            module.synchronised = True
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = SynchronisedBatchNorm2d


def _over_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """Mean and (biased) variance of all processes' values from those of each; differentiable."""
    processes = distributed.get_world_size()
    whole = _Sum.apply(mean / processes)
    return whole, _Sum.apply((var + (mean - whole).square()) / processes), count * processes


class _Sum(torch.autograd.Function):
    """Over all processes. Each one's loss depends on the sum, so the gradient is the sum of theirs."""

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


def _count(rows: Tensor) -> int:
    return rows.shape[0] * rows.shape[2] * rows.shape[3]


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """[R] -> [R, 1, 1] in the dtype of the features."""
    return values.to(like.dtype)[:, None, None]
