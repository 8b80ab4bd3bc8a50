"""Behind a batch normalisation and a ReLU: a routed convolution that reads relu(norm(u)), of which only u is kept.

Residual blocks on streams are made of nothing else (layers/streams.py): of their tensors this saves half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import passes
from .kernels.contract import ReadsNormalised, reads_normalised
from .kernels.spec import RoutedConv
from .norm import batch_norm_relu, count_batch, relu_in_one_go
from .once import once_differentiable
from .routed_conv import routed_conv
from .tracing import through_operators


def normalised_conv(
    norm: nn.BatchNorm2d | None,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(norm(u)), plus `residual` or with another ReLU behind it (`relu`); and u, for a shortcut
    around it: the gradients of both ways are added where the first is made."""
    kernels = relu_in_one_go(norm, u)
    if norm is None or kernels is None or not reads_normalised(kernels) or relu or through_operators(kernels):
        h, around = batch_norm_relu(norm, u)
        return routed_conv(h, weight, bias, spec, relu, residual), around
    residual = None if residual is None else residual.to(u.dtype)
    running = norm.running_mean, norm.running_var, count_batch(norm)
    return _NormalisedConv.apply(u, norm.weight, norm.bias, weight, bias, residual, norm.eps, running, kernels, spec)


class _NormalisedConv(torch.autograd.Function):
    """Parameters and results: as in norm._BatchNorm and routed_conv._RoutedConv."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        running: tuple[Tensor, Tensor, float],
        kernels: ReadsNormalised,
        spec: RoutedConv,
    ) -> tuple[Tensor, Tensor]:
        affine, mean, var = kernels.statistics(u, norm_weight, norm_bias, eps, *running)
        y, _, ctx.kept = passes.forward(u, weight, bias, residual, kernels, spec, False, False, affine)
        ctx.save_for_backward(weight, u, norm_weight, norm_bias, mean, var)  # the first: see _RoutedConv
        ctx.eps, ctx.kernels, ctx.spec = eps, kernels, spec
        ctx.set_materialize_grads(False)
        return y, u.view_as(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, around: Tensor | None) -> Any:
        _, u, norm_weight, norm_bias, mean, var = ctx.saved_tensors
        if dy is None:
            return around, *[None] * 9
        kernels, spec, kept = ctx.kernels, ctx.spec, ctx.kept
        dh = passes.backward(dy, u, None, kept, kernels, spec, [True, False, False])[0]
        made_of = dh, u, norm_weight, norm_bias, None, mean, var, ctx.eps, "relu", around
        du, dnorm_weight, dnorm_bias, h = kernels.normalise_gradient(*made_of, again=True)
        dw, db = passes.backward(dy, h, None, kept, kernels, spec, [False, *ctx.needs_input_grad[3:5]])[2:]
        dnorm = dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype)
        return du, *dnorm, dw, db, dy if ctx.needs_input_grad[5] else None, None, None, None, None
