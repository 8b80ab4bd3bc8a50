"""Formulas that backends and layers share, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import RunningStatistics


def affine_of(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """scale and shift, for which scale * u + shift = weight * (u - mean) / sqrt(var + eps) + bias. All alike, [K]."""
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale


def affine(u: Tensor, scale: Tensor | None, shift: Tensor | None, nth: int) -> Tensor:
    """scale * u + shift for u [N, rows, H, W] of the nth (from 0) undrawn rows. scale and shift [N, T, rows, 1, 1],
    where N or T may be 1 and the last two may be H and W; or None."""
    if scale is None or shift is None:
        return u
    scale, shift = (values[:, min(nth, values.shape[1] - 1)].to(u.dtype) for values in (scale, shift))
    return torch.addcmul(shift, u, scale)


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each channel, [C] from two tensors [N, C, H, W]. The sums are at least float32, because half precision
    would overflow."""
    precise = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vecdot(a.flatten(2).to(precise), b.flatten(2).to(precise)).sum(0)


def keep_statistics(
    mean: Tensor, var: Tensor, assignment: Tensor, count: int, momentum: float, running: RunningStatistics
) -> None:
    """Moves the running statistics (`spec.MovingStatistics`) towards mean and biased variance [K] of a batch of `count`
    values."""
    index = assignment * assignment.numel() + torch.arange(assignment.numel(), device=assignment.device)
    draws = running.draws.view(-1)
    draws.index_copy_(0, index, draws[index] + 1)  # counted first, so that max(1/n, momentum) is 1 for a first draw
    drawn = draws[index]
    unbiased = var * (count / max(count - 1, 1))
    pairs = (running.mean, running.pooled_mean, mean), (running.var, running.pooled_var, unbiased)
    for of_pairs, pooled, new in pairs:
        old = of_pairs.view(-1)[index]
        rate = drawn.to(old.dtype).reciprocal().clamp_min(momentum)
        of_pairs.view(-1).index_copy_(0, index, old + rate * (new.to(old.dtype) - old))
        rate = running.draws.sum(0).to(old.dtype).reciprocal().clamp_min(momentum)
        pooled.add_(rate * (new.to(old.dtype) - pooled))
