"""Weights between a layer's own order and the packed order of its input and output, and groups folded into the batch,
in torch operations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..groups import FilterGroups, Routing
from .spec import RoutedConv


class Packed(NamedTuple):
    """The parameters of a layer, packed."""

    weight: Tensor  # [rows, columns, kH, kW]; zero where a row does not read a column, if the backend needs that
    bias: Tensor | None  # [rows]
    everything: Tensor  # the weight without these zeros: undrawn rows read other columns


def pack_parameters(
    weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype, zero_unread: bool
) -> Packed:
    """Weight [K, C, kH, kW] and bias [K] in the layer's order -> packed, in `dtype`. `zero_unread`: `weight` of the
    result is zero where a row does not read a column."""
    everything = pack(weight.to(dtype), spec.rows, spec.columns)
    packed = everything.where(of_channels(read(spec), weight), 0) if zero_unread else everything
    return Packed(packed, None if bias is None else bias.to(dtype)[spec.rows.order], everything)


def pack(weight: Tensor, rows: FilterGroups, columns: FilterGroups) -> Tensor:
    """Weight [K, C, kH, kW] in the layer's order -> [rows, columns, kH, kW] packed."""
    return weight.index_select(0, rows.order).index_select(1, columns.order)


def read(spec: RoutedConv) -> Tensor:
    """bool [rows, columns]: does the row read the column?"""
    rows, columns = spec.rows.ids[:, None], spec.columns.ids
    if spec.routing is Routing.ALL:
        return (rows >= 0).expand(-1, len(columns))
    own = rows == columns
    return own | (columns == 0) if spec.routing is Routing.ARROW else own


def unpack(packed: Tensor, rows: FilterGroups, columns: FilterGroups) -> Tensor:
    """The adjoint of `pack`: entries of one kernel and input channel are summed -> [K, C, kH, kW]."""
    return unpack_dim(unpack_dim(packed, 0, rows), 1, columns)


def unpack_dim(packed: Tensor, dim: int, groups: FilterGroups) -> Tensor:
    """One dimension from packed order (size `rows`) to the layer's (size `groups.width`), duplicates summed."""
    if groups.full:
        return packed.unflatten(dim, (len(groups.names), groups.width)).sum(dim)
    if groups.order.numel() == groups.width:
        return packed.index_select(dim, groups.inverse)
    # These are the two halves of a concatenation. Each sum has two terms, so the order of adding can't change a bit.
    shape = list(packed.shape)
    shape[dim] = groups.width
    return packed.new_zeros(shape).index_add_(dim, groups.order, packed)


def of_channels(values: Tensor, like: Tensor) -> Tensor:
    """[.., R] -> [.., R, 1, 1], for images `like` [N, R, H, W] (or volumes)."""
    return values[(..., *[None] * (like.dim() - 2))]


def channels_last(x: Tensor) -> bool:
    """Does the tensor lie in memory as channels_last, and not as contiguous, too?"""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """How results that belong to the image x should lie in memory: channels_last if x does, otherwise contiguous."""
    return torch.channels_last if channels_last(x) else torch.contiguous_format


def select_channels(x: Tensor, channels: Tensor) -> Tensor:
    """x[:, channels], channels_last if x is: index_select alone would give plain contiguous."""
    if channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(3, channels).permute(0, 3, 1, 2)
    return x.index_select(1, channels)


def same_kernels_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve full-width tensors with the same kernels? (A relaxed draw of streams does.) Then the
    packed convolution would multiply (T+1) times as much as is needed, mostly by zeros."""
    return spec.columns.full and spec.rows.full and spec.routing is not Routing.ALL


def plain(spec: RoutedConv, kernels: int, channels: int) -> RoutedConv:
    """A convolution of the same geometry with one group on either side: all kernels read all channels."""
    device = spec.rows.order.device
    rows, columns = (FilterGroups.blocks([size], ("all",), device) for size in (kernels, channels))
    return RoutedConv(rows, columns, Routing.ALL, spec.geometry)


def fold(x: Tensor, spec: RoutedConv) -> Tensor:
    """What each group reads, [NG, C, H, W] from streams [N, GC, H, W]: the groups folded into the batch."""
    if spec.routing is Routing.ARROW:
        shared, *tasks = x.chunk(len(spec.columns.names), 1)
        x = torch.cat([shared, *(task + shared for task in tasks)], 1)
    return _groups_to_batch(x, len(spec.columns.names))


def fold_rows(y: Tensor, spec: RoutedConv) -> Tensor:
    """Full rows [N, GK, H, W] -> [NG, K, H, W]."""
    return _groups_to_batch(y, len(spec.rows.names))


def _groups_to_batch(x: Tensor, groups: int) -> Tensor:
    """[N, G * C, H, W] -> [NG, C, H, W]. A channels_last tensor stays one; another is not copied."""
    if channels_last(x):
        return x.permute(0, 2, 3, 1).unflatten(3, (groups, -1)).movedim(3, 1).flatten(0, 1).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def unfold_rows(y: Tensor, spec: RoutedConv) -> Tensor:
    """The inverse of `fold_rows`."""
    groups = len(spec.rows.names)
    if channels_last(y):
        return y.permute(0, 2, 3, 1).unflatten(0, (-1, groups)).movedim(1, 3).flatten(3, 4).permute(0, 3, 1, 2)
    return y.unflatten(0, (-1, groups)).flatten(1, 2)
