"""The autograd functions of eager mode. Compiled graphs use the operators of graph.py for the convolution, and `gate`
from here.

Each `forward` calls the kernels of a `Run`, and saves the tensors that `backward` reads. The formulas for the gradient
of gates stand in gate_gradient.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import undrawn_features
from ..kernels.contract import Normalises, Packed, reads_normalised
from ..kernels.spec import MovingStatistics, Norm, ShortcutGradient
from ..once import once_differentiable
from . import gate_gradient
from .gate_gradient import DeferredGates, GatedRows, UndrawnRows
from .run import Call, PackedParameters, Run


def routed_conv(
    x: Tensor,
    undrawn: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    deferred: DeferredGates | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...], Packed]:
    """u [N, rows, H', W']; the kept product or None; with `call.shortcut` x and its undrawn features; and what the
    kernels have packed.

    x [N, columns, H, W]; undrawn [N, (G-1) * columns, H, W], zeros that get the gradient dundrawn; weight [K, C, kH,
    kW], bias [K]; residual like u, which is added. `deferred`: gates of x whose gradient this convolution computes.
    """
    with torch.no_grad():
        packed = call.run.pack(weight, bias, x.dtype)
    parameters = weight, bias, residual, call, packed
    if deferred is None:
        u, kept_product, *passed_on = _RoutedConv.apply(x, undrawn, None, *parameters, None)
        return u, kept_product, tuple(passed_on), packed.packed
    rows = deferred.rows
    tensors: tuple[Tensor | None, ...] = ()
    if rows.undrawn_rows is not None:
        assert isinstance(rows.undrawn_rows, UndrawnRows)  # others are not deferred
        tensors, rest = rows.undrawn_rows.split()
        rows = rows._replace(undrawn_rows=UndrawnRows(None, None, None, None, *rest))  # type: ignore[arg-type]
    found = _RoutedConv.apply(deferred.h, None, rows.groups.gates, *parameters, rows, *tensors)
    u, kept_product, *passed_on = found
    return u, kept_product, tuple(passed_on), packed.packed


class _RoutedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        undrawn_x: Tensor | None,
        gates: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        parameters: PackedParameters,
        rows: GatedRows | None,
        *of_undrawn: Tensor,
    ) -> Any:
        """`gates` and `rows`: of the features x, if this convolution computes the gradient of their gates;
        `of_undrawn`: the tensors of `rows.undrawn_rows`."""
        ctx.set_materialize_grads(False)  # no zeros for the kept product
        run = call.run
        ctx.parameters = parameters
        how = {"relu": call.relu, "residual": residual, "keep_product": call.keep_product}
        u, kept_product = run.forward(x, ctx.parameters, **how)  # type: ignore[arg-type]
        # `parameters` may hold the weight itself, no copy. As it is saved, torch raises if somebody changes it in
        # place.
        ctx.save_for_backward(weight, x, u if call.relu else None, gates, *of_undrawn)
        ctx.run, ctx.rows, ctx.size = run, rows, u.shape
        if kept_product is not None:
            ctx.mark_non_differentiable(kept_product)
        if not call.shortcut:
            return u, kept_product
        passed_on = None if undrawn_x is None else undrawn_x.view_as(undrawn_x)
        if rows is not None and rows.undrawn_rows is not None:
            passed_on = undrawn_features.of_drawn(x, len(run.spec.columns.names))
        return u, kept_product, x.view_as(x), passed_on

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Any, *of_shortcut: Tensor | None) -> Any:
        if dy is None and not any(gradient is not None for gradient in of_shortcut):
            return (None,) * len(ctx.needs_input_grad)
        _, x, relu_output, gates, *of_undrawn = ctx.saved_tensors
        dy = x.new_zeros(ctx.size) if dy is None else dy
        wants_x, wants_undrawn, wants_gates, *wants, wants_residual = ctx.needs_input_grad[:6]
        run: Run = ctx.run
        rows: GatedRows | None = ctx.rows
        how: dict[str, Any] = {"relu_output": relu_output}
        shortcut = ShortcutGradient(*of_shortcut)
        dx: Tensor | None
        if rows is not None and wants_gates:
            if rows.undrawn_rows is not None:
                rows = rows._replace(undrawn_rows=rows.undrawn_rows.joined(of_undrawn, rows.undrawn_rows.split()[1]))
            arguments = run, dy, x, ctx.parameters, rows, gates
            dx, dz = gate_gradient.with_input_gradient(*arguments, shortcut=shortcut, **how)
            _, dundrawn, dw, db = run.backward(dy, x, ctx.parameters, [False, *wants], **how)
        else:
            wanted = [wants_x or wants_undrawn, *wants]
            dx, dundrawn, dw, db = run.backward(dy, x, ctx.parameters, wanted, shortcut=shortcut, **how)
            dz = None
        gradients = dx, dundrawn if wants_undrawn else None, dz, dw, db, dy if wants_residual else None
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def gate(h: Tensor, rows: GatedRows) -> tuple[Tensor, Tensor | None]:
    """F = z * h of the drawn rows [N, rows, H, W], and the undrawn features (None where their gates don't learn).

    The gates of a one-hot draw are one for drawn rows and zero for undrawn ones, so the forward pass has nothing to do.
    In the backward pass the gates get their gradient.
    """
    return _Gate.apply(h, rows.groups.gates, rows)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, gates: Tensor, rows: GatedRows) -> tuple[Tensor, Tensor | None]:
        tensors: tuple[Tensor | None, ...] = ()
        if rows.undrawn_rows is not None:
            tensors, ctx.rest = rows.undrawn_rows.split()
            ctx.joined = rows.undrawn_rows.joined
        ctx.save_for_backward(h if rows.wants_drawn else None, gates, rows.scale, rows.shift, *tensors)
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.activation = rows.groups, rows.activation
        features = h.view_as(h)
        if rows.undrawn_rows is None:
            return features, None
        return features, undrawn_features.of_drawn(h, len(rows.groups.names))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor | None, dundrawn: Tensor | None) -> Any:
        h, gates, scale, shift, *tensors = ctx.saved_tensors
        drawn = None if df is None or h is None else gate_gradient.of_drawn(df, h)
        dz = None
        if dundrawn is not None:
            rows = ctx.joined(tensors, ctx.rest)
            dz = rows.gate_gradient(dundrawn, scale, shift, ctx.activation, ctx.groups.order)
        return df, ctx.groups.by_kernel(drawn, dz, gates), None


def normalise(
    u: Tensor,
    norm: Norm,
    residual: Tensor | None,
    kernels: Normalises,
    gates: Tensor | None = None,
    moves: MovingStatistics | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gates * act(norm(u)) + residual; u [N, rows, H, W] once more, for a shortcut around the normalisation; mean and
    (biased) variance [K] of the batch, or [N, K] of each image; and scale and shift [2, rows] ([2, N, rows]).

    `gates` [K, T+1]: the one-hot gates of u, or None if they want no gradient. The backward pass also makes the
    gradient of the drawn gates. `moves`: the running statistics, which are changed in place."""
    return _Normalise.apply(u, norm.weight, norm.bias, gates, residual, norm, kernels, moves)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor,
        gates: Tensor | None,
        residual: Tensor | None,
        norm: Norm,
        kernels: Normalises,
        moves: MovingStatistics | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        norm = norm._replace(weight=weight, bias=bias)
        out, mean, var, affine = kernels.normalise(u, norm, residual, moves=moves)
        ctx.save_for_backward(u, weight, bias, norm.order, mean, var, gates)
        ctx.how, ctx.kernels = norm[3:], kernels
        ctx.mark_non_differentiable(mean, var, affine)
        ctx.set_materialize_grads(False)
        return out, u.view_as(u), mean, var, affine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, shortcut: Tensor | None, *_: None) -> Any:
        if dout is None:
            return shortcut, *(None,) * 7
        u, weight, bias, order, mean, var, gates = ctx.saved_tensors
        norm = Norm(weight, bias, order, *ctx.how)
        du, dweight, dbias = ctx.kernels.normalise_gradient(dout, u, norm, mean, var, shortcut)
        dweight, dbias = dweight.to(weight.dtype), dbias.to(bias.dtype)
        dgates = None
        if ctx.needs_input_grad[3]:
            dgates = gate_gradient.of_drawn_behind_norm(weight, bias, dweight, dbias, gates)
        return du, dweight, dbias, dgates, dout if ctx.needs_input_grad[4] else None, None, None, None


def normalised_conv(
    u: Tensor,
    norm: Norm,
    running: tuple[Tensor, Tensor, float],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """The convolution of relu(norm(u)), plus `residual`; and u once more, for a shortcut around both. `running`:
    running mean and variance, which are changed in place, and their rate."""
    return _NormalisedConv.apply(u, norm.weight, norm.bias, weight, bias, residual, norm.eps, running, run)


class _NormalisedConv(torch.autograd.Function):
    """It keeps u and not relu(norm(u)), which the backward pass computes again."""

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
        run: Run,
    ) -> tuple[Tensor, Tensor]:
        assert reads_normalised(run.kernels)
        affine, mean, var = run.kernels.statistics(u, Norm(norm_weight, norm_bias, None, eps, "relu"), *running)
        ctx.parameters = run.pack(weight, bias, u.dtype)
        y, _ = run.forward(u, ctx.parameters, residual=residual, affine=affine)
        ctx.save_for_backward(weight, u, norm_weight, norm_bias, mean, var)  # why the weight: see _RoutedConv
        ctx.eps, ctx.run = eps, run
        ctx.set_materialize_grads(False)
        return y, u.view_as(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, shortcut: Tensor | None) -> Any:
        _, u, norm_weight, norm_bias, mean, var = ctx.saved_tensors
        if dy is None:
            return shortcut, *[None] * 8
        run, parameters = ctx.run, ctx.parameters
        norm = Norm(norm_weight, norm_bias, None, ctx.eps, "relu")
        dh = run.backward(dy, u, parameters, [True, False, False]).dx
        du, dnorm_weight, dnorm_bias, h = run.kernels.normalise_gradient_again(dh, u, norm, mean, var, shortcut)
        gradients = run.backward(dy, h, parameters, [False, *ctx.needs_input_grad[3:5]])
        dnorm = dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype)
        dresidual = dy if ctx.needs_input_grad[5] else None
        return du, *dnorm, gradients.dw, gradients.db, dresidual, None, None, None
