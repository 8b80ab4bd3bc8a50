"""The convolutions of a frozen network, without gradients. They are layers of torch; where the C++ kernels are there,
these do all groups of a layer as one routed convolution (`together`), and elsewhere, and in a graph, torch does one
after the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..groups import FilterGroups, Routing
from ..kernels.spec import Geometry
from ..routed_conv import RoutedConv, routed_conv
from ..routed_conv.run import decide
from ..tracing import in_graph, watched
from .group_tensors import GroupTensors


def plain_conv(weight: Tensor, bias: Tensor | None, like: Any, **changes: Any) -> Any:
    """A layer of torch with the geometry of `like`, and this weight [K, C / groups, ..], of a transposed convolution
    [C, K / groups, ..]."""
    kind: Any = getattr(like, "PLAIN", nn.Conv2d if len(like.kernel_size) == 2 else nn.Conv3d)
    names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
    transposed = getattr(like, "transposed", False)
    options: dict[str, Any] = {name: getattr(like, name) for name in names + ["output_padding"] * transposed} | changes
    first, second = weight.shape[0], weight.shape[1] * options.get("groups", 1)
    channels = (first, second) if transposed else (second, first)
    conv = kind(*channels, bias=bias is not None, device=weight.device, dtype=weight.dtype, **options)
    conv.weight.data = weight.detach().clone()
    if bias is not None and conv.bias is not None:
        conv.bias.data = bias.detach().clone()
    return conv.requires_grad_(False)


def _only_torch(conv: Any, x: Tensor) -> bool:
    """Has torch to do this convolution of x? It has to in a graph (export, compile) and for what a routed convolution
    is not; and it shall where the kernels are torch's own. The C++ kernels are faster for few and odd numbers of
    channels."""
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        return True
    torch_knows_alone = conv.padding_mode != "zeros" or isinstance(conv.padding, str) or x.dtype != conv.weight.dtype
    looked_at = in_graph() or watched() or x.requires_grad
    return torch_knows_alone or looked_at or x.device.type != "cpu" or backends.current() == "reference"


def convolve(conv: Any, x: Tensor, relu: bool = False) -> Tensor:
    """conv(x), or relu of it."""
    if not _only_torch(conv, x):
        rows, columns = (FilterGroups.blocks([n], ("all",), x.device) for n in conv.weight.shape[:2])
        spec = RoutedConv(rows, columns, Routing.ALL, _geometry(conv))
        run = decide(x, conv.weight, spec)
        if not run.kernels.OF_TORCH:
            return routed_conv(x, conv.weight, conv.bias, spec, relu, run=run)
    return F.relu(conv(x)) if relu else conv(x)


def together(
    convolutions: Mapping[int, Any],
    x: Tensor | GroupTensors,
    groups: int,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor | None:
    """The convolutions of several groups, {group: plain convolution}, as one routed convolution, with outputs side by
    side and nothing copied; None where that can't be. `relu` and `residual`: as in `convolve`."""
    read = x if isinstance(x, Tensor) else x.side_by_side
    if read is None or not convolutions or any(_only_torch(conv, read) for conv in convolutions.values()):
        return None
    ordered = dict(sorted(convolutions.items()))
    columns = [read.shape[1]] if isinstance(x, Tensor) else x.sizes
    reads = {group: [0] if isinstance(x, Tensor) else x.read(group) for group in ordered}
    if any(conv.weight.shape[1] != sum(columns[one] for one in reads[group]) for group, conv in ordered.items()):
        return None  # zeros stand in for something
    sizes = [ordered[group].weight.shape[0] if group in ordered else 0 for group in range(groups)]
    names = tuple(map(str, range(groups)))
    rows, read_from = (FilterGroups.blocks(side, names[: len(side)], read.device) for side in (sizes, columns))
    some = next(iter(ordered.values()))
    routing = Routing.ALL if isinstance(x, Tensor) else x.routing
    spec = RoutedConv(rows, read_from, routing, _geometry(some))
    run = decide(read, some.weight, spec)
    if run.kernels.OF_TORCH:
        return None
    weights, starts = [], [0, *itertools.accumulate(columns)]
    for group, conv in ordered.items():
        weight, at = conv.weight.new_zeros(sizes[group], sum(columns), *conv.weight.shape[2:]), 0
        for one in reads[group]:
            weight[:, starts[one] : starts[one + 1]] = conv.weight[:, at : at + columns[one]]
            at += columns[one]
        weights.append(weight)
    bias = None if some.bias is None else torch.cat([conv.bias for conv in ordered.values()])
    return routed_conv(read, torch.cat(weights), bias, spec, relu, residual, run=run)


def _geometry(conv: Any) -> Geometry:
    return Geometry(conv.stride, conv.padding, conv.dilation)
