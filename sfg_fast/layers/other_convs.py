"""Transposed, grouped and depthwise convolutions with filter groups: each by what there is already.

- A transposed convolution is a routed convolution of stride 1 whose kernels give one output for each place in a cell of
  `stride` pixels; the outputs are then put side by side (routed_conv/places.py). So it costs what the method leaves.
- A grouped convolution is done by dense masking: torch convolves what each filter group reads, and the drawn rows are
  taken. (The kernels of a group lie anywhere in a packed tensor, torch's grouped convolution wants them side by side.)
- A depthwise convolution of features that takes their draw treats every channel alone, so torch does the drawn rows of
  all filter groups in one convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import undrawn_features
from ..features import SFGFeatures
from ..groups import FilterGroups, Routing
from ..kernels.masked import CONVOLUTIONS
from ..kernels.packing import of_channels, select_channels
from ..kernels.spec import Geometry, RoutedConv
from ..layer import SFGLayer
from ..routed_conv.convolve import Convolved, convolve
from ..routed_conv.gate_gradient import KnownRows, ShuffledRows
from ..routed_conv.places import Places, Taps, kernels_of_places
from ..routed_conv.run import decide


def transposed(
    layer: Any, features: SFGFeatures, groups: FilterGroups, weight: Tensor, bias: Tensor | None
) -> Convolved:
    """u of a transposed convolution; `weight` [K, C, kH, kW], kernels first."""
    geometry = layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.dilation
    taps = tuple(Taps.of(*one) for one in zip(*geometry, strict=True))
    size = tuple(
        (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + more + 1
        for length, kernel, stride, padding, more, dilation in zip(features.packed.shape[2:], *geometry, strict=True)
    )
    if min(size) < 1:
        raise RuntimeError(f"the image has size {tuple(features.packed.shape[2:])}, the output would have size {size}")
    places = Places(layer.stride, size)
    pads = [(one.before, one.behind) for one in taps]
    padding = tuple(before for before, _ in pads)
    if any(before != behind or before < 0 for before, behind in pads):
        around = [pad for pair in reversed(pads) for pad in pair]
        features, padding = features.channelwise(lambda x: _padded(x, around)), (0,) * layer.dims
    rows = groups.repeated(places.number)
    one = (1,) * layer.dims
    spec = RoutedConv(rows, features.groups, features.routing, Geometry(one, padding, one))
    found = convolve(
        features.packed, kernels_of_places(weight, taps),
        None if bias is None else bias.repeat_interleave(places.number), spec,
        undrawn=features.undrawn, deferred=features.deferred, keep_product=groups.all_gates,
    )  # fmt: skip
    undrawn_rows = found.undrawn_rows
    assert undrawn_rows is None or not isinstance(undrawn_rows, KnownRows | ShuffledRows)
    behind = None if undrawn_rows is None else ShuffledRows(undrawn_rows, places)
    return found._replace(u=places.shuffled(found.u), undrawn_rows=behind)


def _padded(x: Tensor, around: list[int]) -> Tensor:
    """As `F.pad`, which refuses to cut off more than x has, even where as much is added on the other side."""
    if min(around) >= 0:
        return F.pad(x, around)
    return F.pad(F.pad(x, [max(pad, 0) for pad in around]), [min(pad, 0) for pad in around])


def grouped(
    layer: SFGLayer, features: SFGFeatures, groups: FilterGroups, weight: Tensor, bias: Tensor | None
) -> Convolved:
    """u of a convolution (or transposed convolution) of several groups of channels (`layer.groups` > 1)."""
    one = (1,) * layer.dims
    spec = RoutedConv(groups, features.groups, features.routing, Geometry(one, (0,) * layer.dims, one))
    run = decide(features.packed, weight, spec)
    features = features if features.dtype == run.dtype else features.to(run.dtype)
    weight, bias = weight.to(run.dtype), None if bias is None else bias.to(run.dtype)
    if _depthwise(layer, features, groups):
        u, undrawn = _depthwise_rows(layer, features, groups, weight, bias)
    elif features.routing is Routing.ALL:
        every = layer.plain(features.packed, weight, bias)
        if groups.full:
            u, undrawn = every.repeat(1, len(groups.names), *[1] * layer.dims), ()
        else:
            u = select_channels(every, groups.order)
            undrawn = (u,)
    else:
        streams = torch.cat([layer.plain(features.merged(g), weight, bias) for g in range(len(groups.names))], 1)
        if groups.full:
            u, undrawn = streams, ()
        else:
            u = select_channels(streams, groups.rows_in_streams)
            index = groups.undrawn_groups * groups.width + groups.order if groups.all_gates else ()
            undrawn = tuple(select_channels(streams, rows) for rows in index)
    u = u.to(run.dtype)  # under autocast torch may have convolved in another dtype than the kernels that normalise want
    known = KnownRows(tuple(one.detach() for one in undrawn), len(groups.tasks)) if groups.all_gates else None
    return Convolved(u, known, features.packed, features.undrawn, run)


def _depthwise(layer: SFGLayer, features: SFGFeatures, groups: FilterGroups) -> bool:
    """Is there one kernel for each channel, which has the filter group of its channel?"""
    if layer.transposed or not layer.groups == layer.in_channels == layer.out_channels or groups.full:
        return False
    return features.routing is Routing.ARROW and not features.groups.full and groups.same_as(features.groups)


def _depthwise_rows(
    layer: Any, features: SFGFeatures, groups: FilterGroups, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """u of the drawn rows, and u of the undrawn rows, the same for all groups.

    The undrawn rows of a shared kernel read the shared channel, so they have the u of the drawn row. The channels that
    the undrawn rows of another kernel read are zero: they have the bias."""
    read = features.packed if features.undrawn is None else _WithShared.apply(features.packed, features.undrawn, groups)
    bias = None if bias is None else bias[groups.order]
    geometry = layer.stride, layer.zero_padding or 0, layer.dilation, groups.width
    u = CONVOLUTIONS[layer.dims](layer.pad(read), weight[groups.order], bias, *geometry)
    if not groups.all_gates:
        return u, ()
    nothing = u.new_zeros(()) if bias is None else of_channels(bias, u)
    return u, (u.where(of_channels(groups.ids == 0, u), nothing),)


class _WithShared(torch.autograd.Function):
    """What the drawn rows of a depthwise convolution read of features `packed` [N, rows, H, W]: each its own channel,
    in its own group and in the shared group, where it may be an undrawn row. The gradient goes to both."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, undrawn: Tensor, groups: FilterGroups) -> Tensor:
        ctx.groups = groups
        return packed.view_as(packed)

    @staticmethod
    def backward(ctx: Any, dpacked: Tensor) -> Any:
        if not ctx.needs_input_grad[1]:
            return dpacked, None, None
        groups = ctx.groups
        # The undrawn row of the shared group stands last, if the drawn row is a task's (FilterGroups.undrawn_groups).
        last = dpacked.where(of_channels(groups.ids > 0, dpacked), 0)
        nothing = undrawn_features.zeros(
            dpacked, dpacked.shape[0], (len(groups.names) - 2) * dpacked.shape[1], *dpacked.shape[2:]
        )
        return dpacked, torch.cat([nothing, last], 1), None
