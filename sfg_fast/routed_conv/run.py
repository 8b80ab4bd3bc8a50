"""One call of a routed convolution without autograd: which kernels do it and how, decided once, and its two passes."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..groups import Routing
from ..kernels.contract import Kernels, Normalises, Packed, normalises
from ..kernels.packing import same_kernels_for_every_group, unpack_dim
from ..kernels.spec import NO_SHORTCUT, RoutedConv, ShortcutGradient
from ..norm import over_positions
from ..tracing import in_graph, through_operators


class Way(enum.Enum):
    """What is asked of the kernels."""

    ONCE = enum.auto()  # every group convolves the same image with the same kernels: one convolution, repeated
    FOLDED = enum.auto()  # every group convolves with the same kernels: one convolution, the groups in the batch
    GROUPED = enum.auto()  # every group has kernels of its own, equally many, and reads its own channels: torch does it
    PACKED = enum.auto()  # the routed convolution of the backend


class PackedParameters(NamedTuple):
    """Weight and bias of a layer, packed for both passes."""

    packed: Packed
    dtypes: tuple[torch.dtype, torch.dtype]  # of weight and bias, and so of their gradients


class Gradients(NamedTuple):
    """What `Run.backward` returns: each as `contract.py` says, None where nobody wants it."""

    dx: Tensor | None
    dundrawn: Tensor | None
    dw: Tensor | None
    db: Tensor | None


class Run(NamedTuple):
    """Who does one call of a layer, and how. Convolution, normalisation and gates share it."""

    kernels: Kernels
    dtype: torch.dtype  # of the products: x is cast to it, and u has it
    way: Way
    spec: RoutedConv
    in_graph: bool  # is torch making a graph?
    by_operators: bool  # must the kernels be called through operators of torch (graph.py)?

    def normalising(self, values: int) -> Normalises | None:
        """The kernels, if they normalise, by statistics of so many values, and activate in one go; or None."""
        can = normalises(self.kernels) and not self.in_graph and values > 1
        return self.kernels if can else None  # type: ignore[return-value]

    def pack(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedParameters:
        """weight [K, C, kH, kW] and bias [K], packed for both passes."""
        dtypes = weight.dtype, weight.dtype if bias is None else bias.dtype
        return PackedParameters(self.kernels.pack(weight, bias, self.spec, dtype), dtypes)

    def forward(
        self,
        x: Tensor,
        parameters: PackedParameters,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
        keep_product: bool = False,
        affine: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """u and the kept product, as `contract.Kernels.forward`. `affine`: as `contract.ReadsNormalised.forward`."""
        how: dict[str, Any] = {"relu": relu, "residual": residual, "keep_product": keep_product}
        if affine is not None:
            how["affine"] = affine
        return self.kernels.forward(x, parameters.packed, self.spec, **how)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        parameters: PackedParameters,
        wants: Sequence[bool],
        *,
        relu_output: Tensor | None = None,
        shortcut: ShortcutGradient = NO_SHORTCUT,
    ) -> Gradients:
        """The gradients that are wanted; `wants`: of x (and of the undrawn rows of x), weight, bias. `relu_output` and
        `shortcut`: as `contract.Kernels.input_gradient`."""
        wants_x, wants_weight, wants_bias = wants
        kernels, spec, packed = self.kernels, self.spec, parameters.packed
        if relu_output is not None and not kernels.MASKS_GRADIENTS:  # masked once, for both gradients
            dy, relu_output = torch.ops.aten.threshold_backward(dy, relu_output, 0), None
        dx = dundrawn = dw = db = None
        if wants_x:
            if not spec.columns.all_gates:
                shortcut = shortcut._replace(dundrawn=None)
            how = {"relu_output": relu_output, "shortcut": shortcut}
            dx, dundrawn = kernels.input_gradient(dy, packed, spec, x.shape[2:], **how)  # type: ignore[arg-type]
        if wants_weight:
            dw, db = kernels.weight_gradient(x, dy, packed, spec, relu_output=relu_output, bias=wants_bias)
        elif wants_bias:
            masked = dy if relu_output is None else dy.where(~(relu_output <= 0), 0)  # a NaN passes, as in torch
            db = unpack_dim(masked.sum(over_positions(masked)), 0, spec.rows)
        of_weight, of_bias = parameters.dtypes
        return Gradients(dx, dundrawn, None if dw is None else dw.to(of_weight), None if db is None else db.to(of_bias))


class Call(NamedTuple):
    """What a routed convolution is asked for, besides its tensors."""

    run: Run
    relu: bool = False  # return relu(u)
    keep_product: bool = False  # return the kept product, too
    shortcut: bool = False  # return the input, too, for a shortcut around the convolution (eager mode)


def decide(x: Tensor, weight: Tensor, spec: RoutedConv) -> Run:
    """Decides who does a call with x [N, columns, H, W] and weight [K, C, kH, kW] in the layer's own order, and how.

    Raises BackendError if a backend was asked for that can't, and RuntimeError for an input of another dtype.
    """
    width = weight.shape[0] // (len(spec.rows.names) if spec.rows.alike else 1)
    kernels, dtype = backends.kernels(x, width, spec.rows.all_gates or spec.columns.all_gates)
    if x.dtype != weight.dtype and backends.autocast_dtype(x) is None:
        raise RuntimeError(f"the input is {x.dtype}, the weight {weight.dtype}, expected the same (or torch.autocast)")
    return Run(kernels, dtype, _way(kernels, spec), spec, in_graph(), through_operators(kernels))


def _way(kernels: Kernels, spec: RoutedConv) -> Way:
    if spec.routing is Routing.ALL and spec.rows.full and len(spec.rows.names) > 1:
        return Way.ONCE
    if same_kernels_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
        return Way.FOLDED
    if kernels.OF_TORCH and spec.columns.full and spec.routing is Routing.OWN and spec.rows.alike:
        return Way.GROUPED
    return Way.PACKED
