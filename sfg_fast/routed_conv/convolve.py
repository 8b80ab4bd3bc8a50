"""The one operation of an SFG network: the routed convolution, with its gradient (paper, section 2.1).

    u[n,k] = b[k] + sum over c with reads(group(k), group(c)) of  W[k,c] (*) x[n,c]

x and u are packed: their channels are sorted by group, and what a group does not read is never multiplied. An SFG layer
goes on with  F = z * act(norm(u))  (layers/conv.py).

A draw gives a kernel a row in one group. Its undrawn rows, those it would have in the other groups, have gates z = 0,
so their features are zero. But these gates want a gradient, dz = <dL/dF, act(norm(u))>. Two layers work on this. The
layer that reads F computes dL/dF of undrawn rows, too; it leaves as the gradient of `undrawn`, a tensor of zeros
without memory. The layer that makes F keeps what it needs to compute the u of its undrawn rows later (`keep_product`,
gate_gradient.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..groups import Routing
from ..kernels.contract import Packed
from ..kernels.packing import fold, plain, unfold_rows
from ..kernels.spec import RoutedConv
from . import eager, graph
from .gate_gradient import AnyUndrawnRows, DeferredGates, UndrawnRows, can_defer
from .run import Call, Run, Way, decide


def routed_conv(*arguments: Any, **options: Any) -> Tensor:
    """u of `convolve`, whose arguments these are."""
    return convolve(*arguments, **options).u


class Convolved(NamedTuple):
    """What `convolve` returns."""

    u: Tensor  # [N, rows, H', W']
    undrawn_rows: AnyUndrawnRows | None  # with `keep_product`
    # The input once more. With `shortcut`, use it for a shortcut around the convolution: `input_gradient` then adds the
    # gradients of both paths in one pass.
    x: Tensor
    undrawn: Tensor | None  # the undrawn features of that input
    run: Run  # what did the convolution; the normalisation and the gates behind it take the same kernels


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: RoutedConv,
    relu: bool = False,
    residual: Tensor | None = None,
    *,
    undrawn: Tensor | None = None,
    deferred: DeferredGates | None = None,
    keep_product: bool = False,
    shortcut: bool = False,
    run: Run | None = None,
) -> Convolved:
    """Packed x [N, columns, H, W], weight [K, C, kH, kW] and bias [K] in the layer's order -> u [N, rows, H', W'].

    Args:
        relu: return relu(u).
        residual: a tensor like u, which is added to u (not with `relu`).
        undrawn: the undrawn features of x, [N, (G-1) * columns, H, W], which get their gradient.
        deferred: the gates of the features x. The convolution computes their gradient, if its kernels can.
        keep_product: keep what the undrawn rows are computed from (for rows of `spec.rows.all_gates`).
        shortcut: will the caller use x of the result in a shortcut around the convolution?
        run: the result of `run.decide`, if the caller has it; None: it is decided here.

    Raises:
        BackendError: if a backend was asked for that can't.
        RuntimeError: for an input of another dtype than the weight, and for an image smaller than the kernels.
    """
    assert residual is None or not relu, "the gradient would need the ReLU's output alone"
    run = decide(x, weight, spec) if run is None else run
    given, x = (x, undrawn), x.to(run.dtype)
    sizes = weight.shape[0], weight.shape[1]
    kept_product = packed = None
    passed_on: Sequence[Any] = ()
    if run.way is Way.ONCE:
        one = Call(run._replace(spec=plain(spec, *sizes)), relu)
        u = _convolve(x, None, weight, bias, None, one)[0]
        u = u.repeat(1, len(spec.rows.names), *[1] * (u.dim() - 2))
    elif run.way is Way.FOLDED:
        one = Call(run._replace(spec=plain(spec, *sizes)), relu)
        u = unfold_rows(_convolve(fold(x, spec), None, weight, bias, None, one)[0], spec)
    elif run.way is Way.GROUPED:
        stride, padding, dilation = spec.geometry
        groups = len(spec.columns.names)
        same = None if bias is None else bias.to(run.dtype)
        u = F.conv2d(x, weight.to(run.dtype), same, stride, padding, dilation, groups)
        u = F.relu(u) if relu else u
    else:
        passes_on = shortcut and x is given[0] and not run.by_operators
        call = Call(run, relu, keep_product and spec.routing is Routing.ARROW, passes_on)
        u, kept_product, passed_on, packed = _convolve(x, undrawn, weight, bias, residual, call, deferred)
        residual = None
    u = u if residual is None else u + residual.to(u.dtype)
    rows = None
    if keep_product:
        kept_product = u.detach() if spec.routing is Routing.ALL else kept_product
        parameters = weight.detach(), None if bias is None else bias.detach()
        rows = UndrawnRows(x.detach().to(u.dtype), kept_product, *parameters, run, packed)
    x, undrawn = passed_on or given
    return Convolved(u, rows, x, undrawn, run)


def _convolve(
    x: Tensor,
    undrawn: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    deferred: DeferredGates | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...], Packed | None]:
    """u; the kept product or None; with `call.shortcut` x and its undrawn features; and what the kernels have packed
    (None: they are called through operators, each of which packs for itself)."""
    residual = None if residual is None else residual.to(x.dtype)
    if deferred is not None and not can_defer(deferred, x, call.run):
        deferred = None
    spec = call.run.spec
    wants_undrawn = deferred is None and undrawn is not None and undrawn.requires_grad
    if spec.columns.all_gates and not wants_undrawn:
        spec = spec._replace(columns=spec.columns.without_undrawn())
        call = call._replace(run=call.run._replace(spec=spec))
    if call.run.by_operators:
        u, kept_product = graph.routed_conv(x, undrawn, weight, bias, residual, call)
        return u, kept_product if call.keep_product else None, (), None
    return eager.routed_conv(x, undrawn, weight, bias, residual, call, deferred)
