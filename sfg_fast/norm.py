"""Normalisation of kernels that change their group with every draw: batch, instance, group and layer norm.

Inside an SFG layer the order is convolution -> normalisation -> activation -> gate. One rule holds for all norms: the
statistics are those of the DRAWN row of each kernel (in a relaxed draw: of its most probable row), and the same scale
and shift serve its other rows. So nothing has to be computed for undrawn rows, whose gate is zero, except what the
gradient of this gate needs. (Batch statistics of its own for every group and kernel learn no better:
benchmarks/results/phantom_study.md.)

- Batch norm (`KernelNorm`): statistics of a kernel over the batch. Running statistics belong to (group, kernel) pairs,
  because the same kernel sees other inputs in another group.
- The other norms (`ImageNorm`) have statistics of each image, and do the same in `eval()`. A norm over channels (group
  norm, layer norm) takes together only kernels that are drawn into the same filter group. If it took all kernels, the
  features of one task would depend on the kernels of another task, which this task does not read; and what the shared
  kernels give would change with every task's.

This file is plain torch; the oracle uses it. What kernels do in one go stands in routed_conv/epilogue.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, distributed, nn

from .groups import FilterGroups
from .kernels import formulas, packing
from .kernels.formulas import affine_of
from .kernels.spec import RunningStatistics
from .tracing import in_backward

NormName: TypeAlias = str | tuple[str, Mapping[str, Any]] | None
"""What the argument `norm` of layers can be: None, one of `NORMS`, or such a name with the norm's arguments, such as
("group", {"num_groups": 8})."""


class KernelNorm(nn.Module):
    """Batch normalisation. Affine parameters per kernel [K]; running mean and variance per (group, kernel) [T+1, K].

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

        Returns the result, and scale and shift of the undrawn rows without gradient, [1, T, R, 1, 1] or alike for all
        groups, [1, 1, R, 1, 1]. (In a relaxed draw no row is undrawn: they mean nothing.)
        """
        if not self.training:
            scale, shift = self.running_affine()
            pick = groups.rows_in_streams
            out = rows * of_channels(scale.reshape(-1)[pick], rows) + of_channels(shift.reshape(-1)[pick], rows)
            if groups.full:
                return out, scale.detach(), shift.detach()
            of_undrawn = (values.detach()[groups.undrawn_groups, groups.order] for values in (scale, shift))
            scale, shift = (of_channels(values, rows)[None] for values in of_undrawn)
            return out, scale, shift
        assert groups.assignment is not None
        if groups.full:  # a relaxed draw
            index = groups.assignment * groups.width + torch.arange(groups.width, device=rows.device)
            var, mean = torch.var_mean(rows.index_select(1, index), over_positions(rows), correction=0)
            scale, shift = self.batch_affine(mean, var, values_of_each_channel(rows), groups.assignment)
            out = rows * of_channels(scale.repeat(len(groups.names)), rows)
            out = out + of_channels(shift.repeat(len(groups.names)), rows)
        elif self.synchronised:
            var, mean = torch.var_mean(rows, over_positions(rows), correction=0)
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
        if groups.full:
            return out, scale.detach(), shift.detach()
        scale, shift = (of_channels(values.detach()[groups.order], rows)[None, None] for values in (scale, shift))
        return out, scale, shift

    def of_dense(self, u: Sequence[Tensor], assignment: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Scale and shift [K, 1, 1] of each group, for T+1 dense tensors [N, K, H, W], or one if all are equal.
        `assignment` [K]: the drawn groups. The running statistics move."""
        groups, like = len(self.running_mean), u[0]
        if not self.training:
            scale, shift = self.running_affine()
            return [of_channels(row, like) for row in scale], [of_channels(row, like) for row in shift]
        var, mean = (
            torch.stack(moment).gather(0, assignment[None]).squeeze(0) if len(u) > 1 else moment[0]
            for moment in zip(*(torch.var_mean(one, over_positions(one), correction=0) for one in u), strict=True)
        )
        scale, shift = self.batch_affine(mean, var, values_of_each_channel(like), assignment)
        return [of_channels(scale, like)] * groups, [of_channels(shift, like)] * groups

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


class ImageNorm(nn.Module):
    """Instance, group or layer normalisation: the statistics are those of each image, in training and in `eval()`.

    Args:
        kernels: K.
        groups: T+1.
        kind: "instance": mean and variance of each drawn row. "group": of the drawn rows of those kernels of a norm's
            group that are in the same filter group. "layer": at each position, of the drawn rows of all kernels in the
            same filter group.
        num_groups: for "group", in how many groups of neighbouring kernels the norm divides the K kernels, as
            `nn.GroupNorm`.
        affine: has the norm a scale `weight` and a shift `bias` [K]? (Otherwise these are None.)

    Raises ValueError for a `num_groups` that does not divide K.
    """

    def __init__(
        self,
        kernels: int,
        groups: int,
        kind: Literal["instance", "group", "layer"],
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        if (num_groups is None) == (kind == "group"):
            raise ValueError(f"num_groups={num_groups!r}: expected it for the norm 'group' and for no other")
        if num_groups is not None and (num_groups < 1 or kernels % num_groups):
            raise ValueError(f"num_groups={num_groups}: expected a divisor of the {kernels} kernels")
        self.kernels, self.groups, self.kind, self.num_groups, self.eps = kernels, groups, kind, num_groups, eps
        self.weight = nn.Parameter(torch.empty(kernels, **factory)) if affine else None
        self.bias = nn.Parameter(torch.empty(kernels, **factory)) if affine else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets all to what a new module has: scale 1, shift 0."""
        if self.weight is not None and self.bias is not None:
            self.weight.fill_(1)
            self.bias.zero_()

    def forward(self, rows: Tensor, groups: FilterGroups) -> tuple[Tensor, Tensor, Tensor]:
        """Normalises rows [N, R, H, W], all of which are drawn rows (or all rows of a relaxed draw).

        Returns the result, and scale and shift of the undrawn rows without gradient, alike for all groups, [N, 1, R, 1,
        1] or, for a layer norm, [N, 1, R, H, W]. (In a relaxed draw no row is undrawn: they mean nothing.)
        """
        self._check(rows)
        if groups.full:
            assert groups.assignment is not None
            kernels = torch.arange(groups.width, device=rows.device)
            drawn = rows.index_select(1, groups.assignment * groups.width + kernels)
            scale, shift = self._affine(drawn, groups.assignment, kernels)
            every = (1, self.groups, *[1] * (rows.dim() - 2))
            scale, shift = scale.repeat(every), shift.repeat(every)
        else:
            scale, shift = self._affine(rows, groups.ids, groups.order)
        out = torch.addcmul(shift.to(rows.dtype), rows, scale.to(rows.dtype))
        return out, scale.detach()[:, None], shift.detach()[:, None]

    def of_dense(self, u: Sequence[Tensor], assignment: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Scale and shift [N, K, 1, 1] (layer norm: [N, K, H, W]) of each group, for T+1 dense tensors [N, K, H, W], or
        one if all are equal. `assignment` [K]: the drawn groups."""
        self._check(u[0])
        kernels = torch.arange(self.kernels, device=u[0].device)
        if self.kind == "layer" or len(u) == 1:
            drawn = u[0]
            for group, one in enumerate(u[1:], 1):
                drawn = torch.where(packing.of_channels(assignment == group, one), one, drawn)
            scale, shift = self._affine(drawn, assignment, kernels)
        else:
            index = assignment.expand(1, u[0].shape[0], -1)
            var, mean = (
                torch.stack(moment).gather(0, index).squeeze(0)
                for moment in zip(*(_moments(one) for one in u), strict=True)
            )
            mean, var = self._together(mean, var, assignment, kernels)
            scale, shift = (packing.of_channels(one, u[0]) for one in self._of_moments(mean, var, kernels))
        scale, shift = scale.to(u[0].dtype), shift.to(u[0].dtype)
        return [scale] * self.groups, [shift] * self.groups

    def _check(self, rows: Tensor) -> None:
        if self.kind == "instance" and rows.shape[2:].numel() == 1:
            raise ValueError("instance normalisation needs more than one position in an image, got one")

    def _affine(self, drawn: Tensor, ids: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, which fit the drawn rows [N, R, H, W]. `ids`, `order`: int64 [R], the filter group and the
        kernel of each row."""
        if self.kind != "layer":
            var, mean = _moments(drawn)
            mean, var = self._together(mean, var, ids, order)
            scale, shift = self._of_moments(mean, var, order)
            return packing.of_channels(scale, drawn), packing.of_channels(shift, drawn)
        drawn = drawn.to(torch.promote_types(drawn.dtype, torch.float32))
        mean = _mean_of_equals(drawn, ids, self.groups)
        var = _mean_of_equals((drawn - mean).square(), ids, self.groups)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None and self.bias is not None:
            scale = scale * packing.of_channels(self.weight[order], drawn)
            return scale, packing.of_channels(self.bias[order], drawn) - mean * scale
        return scale, -mean * scale

    def _together(self, mean: Tensor, var: Tensor, ids: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [N, R] of all rows that are normalised together, from those of each row."""
        if self.num_groups is None:
            return mean, var
        which = ids * self.num_groups + order // (self.kernels // self.num_groups)
        count = self.groups * self.num_groups
        whole = _mean_of_equals(mean, which, count)
        return whole, _mean_of_equals(var + (mean - whole).square(), which, count)

    def _of_moments(self, mean: Tensor, var: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [N, R] from mean and variance [N, R]."""
        if self.weight is not None and self.bias is not None:
            return affine_of(self.weight[order], self.bias[order], mean, var, self.eps)
        scale = (var + self.eps).rsqrt()
        return scale, -mean * scale

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        groups = "" if self.num_groups is None else f", num_groups={self.num_groups}"
        affine = "" if self.weight is not None else ", affine=False"
        return f"{self.kernels} kernels, {self.kind}{groups}, eps={self.eps}{affine}"


def make_norm(norm: NormName, kernels: int, groups: int, **factory: Any) -> KernelNorm | ImageNorm | None:
    """The norm of a layer of K kernels and T+1 groups. Raises ValueError for an unknown name and for arguments that
    this norm doesn't have."""
    name, options = norm if isinstance(norm, tuple) and len(norm) == 2 else (norm, {})
    if name is None:
        return None
    if not isinstance(name, str) or name not in NORMS or not isinstance(options, Mapping):
        known = ", ".join(map(repr, NORMS))
        raise ValueError(f"norm={norm!r} is unknown, expected None, {known} or (name, {{argument: value}})")
    if unknown := options.keys() - set(NORMS[name]):
        raise ValueError(f"norm={norm!r}: {name} norm has no argument {sorted(unknown)[0]!r}, expected {NORMS[name]}")
    if name == "batch":
        return KernelNorm(kernels, groups, **options, **factory)
    return ImageNorm(kernels, groups, name, **options, **factory)  # type: ignore[arg-type]


NORMS: dict[str, tuple[str, ...]] = {
    "batch": ("eps", "momentum"),
    "instance": ("eps", "affine"),
    "group": ("num_groups", "eps", "affine"),
    "layer": ("eps", "affine"),
}
"""The norms that an SFG layer can have, and their arguments."""


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all processes. It also runs on the CPU, where torch's SyncBatchNorm
    does not."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.BatchNorm2d` and `nn.BatchNorm3d`."""
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, over_positions(x), correction=0)
        mean, var, count = _over_processes(mean, var, values_of_each_channel(x))
        move_statistics(self, mean, var, count)
        scale, shift = affine_of(self.weight, self.bias, mean, var, self.eps)
        return x * of_channels(scale, x) + of_channels(shift, x)


class SynchronisedBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all processes."""


class SynchronisedBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """`nn.BatchNorm3d` with the statistics of all processes."""


_SYNCHRONISED: dict[type[nn.Module], type[_Synchronised]] = {
    nn.BatchNorm2d: SynchronisedBatchNorm2d,
    nn.BatchNorm3d: SynchronisedBatchNorm3d,
}


def folded(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that computes scale * (convolution with weight and bias) + shift, in the dtype
    of the weight."""
    bias = shift if bias is None else scale * bias + shift
    return (weight * packing.of_channels(scale[:, None], weight)).to(weight.dtype), bias.to(weight.dtype)


def running_affine(norm: nn.BatchNorm2d, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Scale and shift of a plain batch normalisation in `eval()`, of the channels `rows`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean[rows], norm.running_var[rows]
    return affine_of(norm.weight[rows], norm.bias[rows], mean, var, norm.eps)


def count_batch(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """Counts one more batch, and returns the rate at which the running statistics go towards its own."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def move_statistics(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
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
        elif type(module) in _SYNCHRONISED:
            module.__class__ = _SYNCHRONISED[type(module)]


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
    return rows.shape[0] * rows.shape[2:].numel()


def over_positions(rows: Tensor) -> list[int]:
    """The dimensions of rows [N, R, H, W] that statistics of each row are over: all but R."""
    return [0, *range(2, rows.dim())]


def of_channels(values: Tensor, like: Tensor) -> Tensor:
    """[.., R] -> [.., R, 1, 1], in the dtype of the features `like`."""
    return packing.of_channels(values.to(like.dtype), like)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Biased) variance and mean [N, R] over the positions of each image, at least float32."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    positions = tuple(range(2, rows.dim()))
    if rows.shape[0] == 0:  # an empty batch, of which torch's `var_mean` warns
        return rows.sum(positions), rows.sum(positions)
    return torch.var_mean(rows, positions, correction=0)


def _mean_of_equals(values: Tensor, which: Tensor, count: int) -> Tensor:
    """Each row's mean over all rows for which `which` [R], a number below `count`, is the same; values and result [N,
    R, ..]."""
    belongs = (which[:, None] == torch.arange(count, device=which.device)).to(values.dtype)
    means = torch.einsum("rs,nr...->ns...", belongs / belongs.sum(0).clamp_min(1), values)
    return means.index_select(1, which)
