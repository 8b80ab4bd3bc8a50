"""torch's own convolutions on packed tensors, on every device and in any dtype: the weight is zero where a row does not
read a channel.

The kept product, dundrawn and the gates' gradient are computed group by group. On the CPU the channels of a group are
cut out of the packed tensor. On other devices the host doesn't know where they lie; there the weight is set to zero for
the channels of all other groups. `contract.py` says what each function computes.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..activations import ACTIVATIONS, activate
from ..groups import FilterGroups, Routing, sort_by_group
from .formulas import affine, channel_dots
from .packing import Packed, memory_format, of_channels, pack_parameters, read, unpack, unpack_dim
from .spec import NO_SHORTCUT, RoutedConv, ShortcutGradient, UndrawnFormula

__all__ = [
    "COMPUTES_GATE_GRADIENTS",
    "KNOWS",
    "MASKS_GRADIENTS",
    "MEMORY_FORMAT",
    "NORMALISES",
    "OF_TORCH",
    "READS_NORMALISED",
    "SHARES_PRODUCTS",
    "cannot",
    "forward",
    "gate_gradient",
    "input_gradient",
    "missing",
    "pack",
    "sample",
    "undrawn_rows",
    "weight_gradient",
]

CONVOLUTIONS: dict[int, Any] = {2: F.conv2d, 3: F.conv3d}  # by the number of an image's dimensions

OF_TORCH = True
SHARES_PRODUCTS = MASKS_GRADIENTS = COMPUTES_GATE_GRADIENTS = NORMALISES = READS_NORMALISED = False
MEMORY_FORMAT, KNOWS = None, (None, *ACTIVATIONS)


def missing() -> str | None:
    return None


def cannot(x: Tensor) -> str | None:
    return None


def cuts(x: Tensor) -> bool:
    """Does the host know where the channels of a group lie in x, without waiting for a device?"""
    return x.is_cpu


def sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    assignment = (log_p if noise is None else log_p + noise).argmax(1)
    return assignment, *sort_by_group(assignment, log_p.shape[1]), {}


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype) -> Packed:
    return pack_parameters(weight, bias, spec, dtype, zero_unread=True)


def forward(
    x: Tensor,
    packed: Packed,
    spec: RoutedConv,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    keep_product: bool = False,
) -> tuple[Tensor, Tensor | None]:
    u, kept_product = _forward(x, packed, spec, keep_product)
    u = F.relu(u) if relu else u
    return u if residual is None else u + residual, kept_product


def _forward(x: Tensor, packed: Packed, spec: RoutedConv, keep_product: bool) -> tuple[Tensor, Tensor | None]:
    if not (keep_product and spec.routing is Routing.ARROW):
        u = CONVOLUTIONS[x.dim() - 2](x, packed.weight, packed.bias, *spec.geometry)
        return u, u if keep_product and spec.routing is Routing.ALL else None
    kept_product = _product(x, packed.weight, packed.bias, spec, 0)
    if not cuts(x):
        own = packed.weight.where(of_channels(spec.columns.ids > 0, x), 0)
        return kept_product + CONVOLUTIONS[x.dim() - 2](x, own, None, *spec.geometry), kept_product
    u = kept_product.clone()
    for g, rows in enumerate(_ranges(spec.rows)):
        if g and rows.start < rows.stop:
            u[:, rows] += _product(x, packed.weight[rows], None, spec, g)
    return u, kept_product


def input_gradient(
    dy: Tensor,
    packed: Packed,
    spec: RoutedConv,
    size: tuple[int, ...],
    *,
    relu_output: Tensor | None = None,
    shortcut: ShortcutGradient = NO_SHORTCUT,
) -> tuple[Tensor, Tensor | None]:
    assert relu_output is None, "dy has gone back through the ReLU already"
    dx, dundrawn = _input_gradient(dy, packed, spec, size)
    dx = dx if shortcut.dx is None else dx + shortcut.dx
    return dx, dundrawn if dundrawn is None or shortcut.dundrawn is None else dundrawn + shortcut.dundrawn


def _input_gradient(
    dy: Tensor, packed: Packed, spec: RoutedConv, size: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    shape, layout = (dy.shape[0], packed.weight.shape[1], *size), memory_format(dy)
    x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)  # only its shape and layout are used
    if not spec.columns.all_gates:
        return _backward(dy, x, packed.weight, spec, 0), None
    products = []
    for g in range(len(spec.columns.names)):
        if cuts(dy):
            rows = _ranges(spec.rows)[g]
            products.append(_backward(dy[:, rows], x, packed.everything[rows], spec, 0))
        else:
            own = packed.everything.where(of_channels(spec.rows.ids == g, dy)[:, None], 0)
            products.append(_backward(dy, x, own, spec, 0))
    if spec.routing is Routing.ARROW:  # the rows of every group read the shared columns
        products[0] = functools.reduce(torch.add, products)
    dx, dundrawn = _split(products, spec.columns)
    return dx, torch.cat(dundrawn, 1)


def weight_gradient(
    x: Tensor, dy: Tensor, packed: Packed, spec: RoutedConv, *, relu_output: Tensor | None = None, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    assert relu_output is None, "dy has gone back through the ReLU already"
    dy = dy.contiguous(memory_format=memory_format(x))  # the bits of the sums don't depend on dy's strides
    dw = _backward(dy, x, x.new_empty(packed.weight.shape), spec, 1).where(of_channels(read(spec), x), 0)
    return unpack(dw, spec.rows, spec.columns), unpack_dim(
        dy.sum([0, *range(2, dy.dim())]), 0, spec.rows
    ) if bias else None


def gate_gradient(formula: UndrawnFormula, dundrawn: Tensor) -> Tensor:
    dz = []
    groups = len(formula.spec.rows.names)
    positions = (..., *[None] * (dundrawn.dim() - 2))
    scale, shift = (None if values is None else values[positions] for values in (formula.scale, formula.shift))
    for n, (u, df) in enumerate(zip(undrawn_rows(formula), dundrawn.chunk(groups - 1, 1), strict=True)):
        h = affine(u, scale, shift, n)
        dz.append(channel_dots(df, activate(h, formula.activation)))
    return torch.stack(dz)


def undrawn_rows(formula: UndrawnFormula) -> list[Tensor]:
    """u of the undrawn rows: G-1 tensors [N, rows, H', W'], in the order of `FilterGroups.undrawn_groups`."""
    x, kept_product, packed, spec = formula[:4]
    if spec.routing is Routing.ALL:
        assert kept_product is not None
        return [kept_product] * (len(spec.rows.names) - 1)
    products = []
    for g, rows in enumerate(_ranges(spec.rows) if cuts(x) else [slice(0, 0)] * len(spec.rows.names)):
        if g == 0 and kept_product is not None:
            products.append(kept_product)
            continue
        # The rows of group g are drawn there. They are left out, where the host knows which they are.
        before, behind = (packed.everything[part] for part in (slice(0, rows.start), slice(rows.stop, None)))
        bias = (
            None
            if packed.bias is None or kept_product is not None
            else torch.cat([packed.bias[: rows.start], packed.bias[rows.stop :]])
        )
        u = _product(x, torch.cat([before, behind]), bias, spec, g)
        if rows.start < rows.stop:
            none = u.new_zeros(u.shape[0], rows.stop - rows.start, *u.shape[2:])
            u = torch.cat([u[:, : rows.start], none, u[:, rows.start :]], 1)
        products.append(u if kept_product is None else kept_product + u)
    return _split(products, spec.rows)[1]


def _split(products: list[Tensor], groups: FilterGroups) -> tuple[Tensor, list[Tensor]]:
    """From one tensor [N, rows, H, W] for each group, shared first: the values of the drawn rows [N, rows, H, W], and
    those of the undrawn rows, G-1 such tensors."""
    last = len(products) - 1
    products = [*products[1:], products[0]]
    place = of_channels(torch.where(groups.ids == 0, last, groups.ids - 1), products[0])
    drawn = products[0]
    for n in range(1, last + 1):
        drawn = products[n].where(place == n, drawn)
    return drawn, [products[n].where(place > n, products[n + 1]) for n in range(last)]


def _ranges(groups: FilterGroups) -> list[slice]:
    return [slice(first, last) for first, last in itertools.pairwise(groups.ends)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv, g: int) -> Tensor:
    """The convolution of x [N, columns, H, W], cut to the channels of group g, by `weight` [.., columns, kH, kW]."""
    if cuts(x):
        own = _ranges(spec.columns)[g]
        x, weight = x[:, own], weight[:, own]
    else:
        weight = weight.where(of_channels(spec.columns.ids == g, x), 0)
    if weight.numel():
        return CONVOLUTIONS[x.dim() - 2](x, weight, bias, *spec.geometry)
    size = spec.geometry.output_size(x.shape[2:], weight.shape[2:])
    zeros = x.new_zeros(x.shape[0], weight.shape[0], *size)
    return zeros if bias is None else zeros + of_channels(bias, x)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, spec: RoutedConv, wanted: int) -> Tensor:
    """The gradient of a plain convolution of x (wanted=0) or of its weight (wanted=1)."""
    if not weight.numel():
        return torch.zeros_like((x, weight)[wanted])
    stride, padding, dilation = spec.geometry
    none = [0] * len(stride)
    mask = [wanted == 0, wanted == 1, False]
    dy = dy.contiguous(memory_format=memory_format(x))  # otherwise torch would copy x, and return NCHW
    gradients = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, none, 1, mask
    )
    return gradients[wanted]
