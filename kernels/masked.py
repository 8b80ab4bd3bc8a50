"""Torch convolutions on the packed tensor, the weight being zero where it is not read: every device, any dtype.

What the gates' gradient needs is computed group by group. On the CPU a group's channels are cut out; elsewhere the host
doesn't know where they lie, and the weight is zero for all others.
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
from .packing import Packed, memory_format, pack_parameters, read, unpack, unpack_dim
from .spec import Recipe, RoutedConv

OF_TORCH = True
SHARES_PRODUCTS = MASKS_GRADIENTS = COMPUTES_GATE_GRADIENTS = NORMALISES = READS_NORMALISED = False
MEMORY_FORMAT, KNOWS = None, (None, *ACTIVATIONS)


def missing() -> str | None:
    return None


def cannot(x: Tensor) -> str | None:
    return None


def cuts(x: Tensor) -> bool:
    """Does the host know where a group's channels lie in x, without waiting for a device? Then they are cut out."""
    return x.is_cpu


def sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    assignment = (log_p if noise is None else log_p + noise).argmax(1)
    return assignment, *sort_by_group(assignment, log_p.shape[1]), {}


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype, gates: bool = False) -> Packed:
    return pack_parameters(weight, bias, spec, dtype, zero_unread=True)


def forward(
    x: Tensor,
    packed: Packed,
    spec: RoutedConv,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    u, a = _forward(x, packed, spec, keep)
    u = F.relu(u) if relu else u
    return u if residual is None else u + residual, a


def _forward(x: Tensor, packed: Packed, spec: RoutedConv, keep: bool) -> tuple[Tensor, Tensor | None]:
    if not (keep and spec.routing is Routing.ARROW):
        y = F.conv2d(x, packed.weight, packed.bias, *spec.geometry)
        return y, y if keep and spec.routing is Routing.ALL else None
    a = _product(x, packed.weight, packed.bias, spec, 0)
    if not cuts(x):
        tasks = (spec.columns.ids > 0)[:, None, None]
        return a + F.conv2d(x, packed.weight.where(tasks, 0), None, *spec.geometry), a
    y = a.clone()
    for g, rows in enumerate(_ranges(spec.rows)):
        if g and rows.start < rows.stop:
            y[:, rows] += _product(x, packed.weight[rows], None, spec, g)
    return y, a


def input_gradient(
    dy: Tensor,
    packed: Packed,
    spec: RoutedConv,
    size: tuple[int, int],
    *,
    relu: Tensor | None = None,
    around: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    assert relu is None, "dy has gone back through the ReLU already"
    dx, dothers = _input_gradient(dy, packed, spec, size)
    dx = dx if around[0] is None else dx + around[0]
    return dx, dothers if dothers is None or around[1] is None else dothers + around[1]


def _input_gradient(
    dy: Tensor, packed: Packed, spec: RoutedConv, size: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    shape, layout = (dy.shape[0], packed.weight.shape[1], *size), memory_format(dy)
    x = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=layout)  # its shape and layout alone count
    if not spec.columns.all_gates:
        return _backward(dy, x, packed.weight, spec, 0), None
    products = []
    for g in range(len(spec.columns.names)):
        if cuts(dy):
            rows = _ranges(spec.rows)[g]
            products.append(_backward(dy[:, rows], x, packed.everything[rows], spec, 0))
        else:
            own = packed.everything.where((spec.rows.ids == g)[:, None, None, None], 0)
            products.append(_backward(dy, x, own, spec, 0))
    if spec.routing is Routing.ARROW:  # what is shared is read by all
        products[0] = functools.reduce(torch.add, products)
    dx, others = by_place(products, spec.columns)
    return dx, torch.cat(others, 1)


def weight_gradient(
    x: Tensor, dy: Tensor, packed: Packed, spec: RoutedConv, *, relu: Tensor | None = None, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    assert relu is None, "dy has gone back through the ReLU already"
    dy = dy.contiguous(memory_format=memory_format(x))  # the bits of the sums don't depend on dy's strides
    dw = _backward(dy, x, x.new_empty(packed.weight.shape), spec, 1).where(read(spec), 0)
    return unpack(dw, spec.rows, spec.columns), unpack_dim(dy.sum((0, 2, 3)), 0, spec.rows) if bias else None


def gate_gradient(recipe: Recipe, dothers: Tensor) -> Tensor:
    dz = []
    for n, (u, df) in enumerate(zip(others(recipe), dothers.chunk(len(recipe.spec.rows.names) - 1, 1), strict=True)):
        h = affine(u, recipe.scale, recipe.shift, n)
        dz.append(channel_dots(df, activate(h, recipe.activation)))
    return torch.stack(dz)


def keep_statistics(
    mean: Tensor,
    var: Tensor,
    assignment: Tensor,
    count: int,
    momentum: float,
    running_mean: Tensor,
    running_var: Tensor,
    draws: Tensor,
    pooled_mean: Tensor,
    pooled_var: Tensor,
) -> None:
    index = assignment * assignment.numel() + torch.arange(assignment.numel(), device=assignment.device)
    # Counted first, so that max(1/n, momentum) is 1 for a first draw.
    draws.view(-1).index_copy_(0, index, draws.view(-1)[index] + 1)
    drawn = draws.view(-1)[index]
    unbiased = var * (count / max(count - 1, 1))
    for running, pooled, new in ((running_mean, pooled_mean, mean), (running_var, pooled_var, unbiased)):
        old = running.view(-1)[index]
        rate = drawn.to(old.dtype).reciprocal().clamp_min(momentum)
        running.view(-1).index_copy_(0, index, old + rate * (new.to(old.dtype) - old))
        rate = draws.sum(0).to(old.dtype).reciprocal().clamp_min(momentum)
        pooled.add_(rate * (new.to(old.dtype) - pooled))


def affine(u: Tensor, scale: Tensor | None, shift: Tensor | None, n: int) -> Tensor:
    """scale * u + shift of the n-th others."""
    if scale is None or shift is None:
        return u
    scale, shift = (values[min(n, len(values) - 1), :, None, None].to(u.dtype) for values in (scale, shift))
    return torch.addcmul(shift, u, scale)


def affine_of(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * (u - mean) / sqrt(var + eps) + bias as scale * u + shift."""
    scale = weight * (var + eps).rsqrt()
    return scale, bias - mean * scale


def others(recipe: Recipe) -> list[Tensor]:
    """u of the others: G-1 tensors [N, rows, H', W']."""
    x, a, packed, spec = recipe[:4]
    if spec.routing is Routing.ALL:
        assert a is not None
        return [a] * (len(spec.rows.names) - 1)
    products = []
    for g, rows in enumerate(_ranges(spec.rows) if cuts(x) else [slice(0, 0)] * len(spec.rows.names)):
        if g == 0 and a is not None:
            products.append(a)
            continue
        # Rows of group g are no others of g: left out, where it is known which they are.
        before, behind = (packed.everything[part] for part in (slice(0, rows.start), slice(rows.stop, None)))
        bias = (
            None
            if packed.bias is None or a is not None
            else torch.cat([packed.bias[: rows.start], packed.bias[rows.stop :]])
        )
        u = _product(x, torch.cat([before, behind]), bias, spec, g)
        if rows.start < rows.stop:
            none = u.new_zeros(u.shape[0], rows.stop - rows.start, *u.shape[2:])
            u = torch.cat([u[:, : rows.start], none, u[:, rows.start :]], 1)
        products.append(u if a is None else a + u)
    return by_place(products, spec.rows)[1]


def by_place(products: list[Tensor], groups: FilterGroups) -> tuple[Tensor, list[Tensor]]:
    """From one tensor [N, rows, H, W] for each group (shared first) what belongs to each row's own group, and to its
    others."""
    last = len(products) - 1
    products = [*products[1:], products[0]]
    place = torch.where(groups.ids == 0, last, groups.ids - 1)[:, None, None]
    own = products[0]
    for n in range(1, last + 1):
        own = products[n].where(place == n, own)
    return own, [products[n].where(place > n, products[n + 1]) for n in range(last)]


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each channel, [C] from two [N, C, H, W]. At least float32: half precision would overflow."""
    precise = torch.promote_types(a.dtype, torch.float32)
    return torch.linalg.vecdot(a.flatten(2).to(precise), b.flatten(2).to(precise)).sum(0)


def _ranges(groups: FilterGroups) -> list[slice]:
    return [slice(first, last) for first, last in itertools.pairwise(groups.ends)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, spec: RoutedConv, g: int) -> Tensor:
    """The convolution of the channels of group g with all kernels of `weight` [.., columns, kH, kW]."""
    if cuts(x):
        own = _ranges(spec.columns)[g]
        x, weight = x[:, own], weight[:, own]
    else:
        weight = weight.where((spec.columns.ids == g)[:, None, None], 0)
    if weight.numel():
        return F.conv2d(x, weight, bias, *spec.geometry)
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    zeros = x.new_zeros(x.shape[0], weight.shape[0], *size)
    return zeros if bias is None else zeros + bias[:, None, None]


def _backward(dy: Tensor, x: Tensor, weight: Tensor, spec: RoutedConv, wanted: int) -> Tensor:
    if not weight.numel():
        return torch.zeros_like((x, weight)[wanted])
    stride, padding, dilation = spec.geometry
    mask = [wanted == 0, wanted == 1, False]
    dy = dy.contiguous(memory_format=memory_format(x))  # otherwise torch would copy x, and return NCHW
    gradients = torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, dilation, False, [0, 0], 1, mask
    )
    return gradients[wanted]
