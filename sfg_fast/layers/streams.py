"""What stands between two SFG layers: residual blocks, the merge by concatenation, the heads (paper, section 2.1,
Fig. 2).

Every group has a tensor of its own here (a stream), T+1 side by side. `StreamBlock` and `Merge` have separate weights
for each stream; `RoutedBlock` is made of SFG layers instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..features import SFGFeatures
from ..groups import FilterGroups, Routing, group_names
from ..kernels.masked import CONVOLUTIONS
from ..kernels.spec import Geometry, RoutedConv
from ..norm import NormName, folded, running_affine
from ..reference import DenseFeatures
from ..routed_conv import convolve, routed_conv
from ..routed_conv.normalised_conv import normalised_conv
from .conv import Features, SFGConv2d, for_backend


def check_plain_norm(norm: NormName) -> None:
    """Raises ValueError unless `norm` is None or "batch". Where channels have no draw, a norm is one of torch."""
    if norm not in (None, "batch"):
        raise ValueError(f"norm={norm!r}: expected None or 'batch', because streams have no other normalisation")


class StreamBlock(nn.Module):
    """A residual block on each of the T+1 streams, x + conv(relu(bn(conv(relu(bn(x)))))). Each stream has weights and
    normalisations of its own.

    `first`: the block stands right after an SFG layer. Its input is normalised, activated and gated already, so it
    starts with the convolution, which reads only the drawn rows.
    `norm`: None, or "batch": an `nn.BatchNorm2d` of all (T+1)K channels. Raises ValueError for another norm.
    """

    def __init__(
        self, channels: int, tasks: Iterable[str], dilation: int = 1, first: bool = False, norm: NormName = "batch"
    ) -> None:
        super().__init__()
        check_plain_norm(norm)
        names = group_names(tasks)
        rows = channels * len(names)
        self.names, self.channels, self.dilation = names, channels, dilation
        self.conv1 = nn.Conv2d(channels, rows, 3, bias=norm is None)
        self.conv2 = nn.Conv2d(channels, rows, 3)
        self.norm1 = nn.BatchNorm2d(rows) if norm and not first else None
        self.norm2 = nn.BatchNorm2d(rows) if norm else None
        self.first = first

    def forward(self, x: Features) -> Features:
        """The streams behind the block. `x`: streams, or with `first` features of the SFG layer before."""
        x = for_backend(x)
        if isinstance(x, DenseFeatures):
            return self._reference(x)
        block = FilterGroups.blocks([self.channels] * len(self.names), self.names, x.packed.device)
        streams = FilterGroups.streams(self.channels, self.names[1:], x.packed.device)
        geometry = Geometry((1, 1), (self.dilation,) * 2, (self.dilation,) * 2)
        spec = RoutedConv(block, streams, Routing.OWN, geometry)
        weight, bias, folds = self.conv1.weight, self.conv1.bias, False
        if self.norm2 is not None and not self.norm2.training:
            (weight, bias), folds = folded(weight, bias, *running_affine(self.norm2)), True
        if self.first:
            first = spec._replace(columns=x.groups)
            gates = {"undrawn": x.undrawn, "deferred": x.deferred}
            found = convolve(x.packed, weight, bias, first, folds, **gates, shortcut=True)
            u, shortcut = found.u, SFGFeatures(found.x, x.groups, x.routing, found.undrawn).streams()
        else:
            u, shortcut = normalised_conv(self.norm1, x.packed, weight, bias, spec, folds)
        last = self.conv2.weight, self.conv2.bias, spec
        if folds:
            return SFGFeatures(routed_conv(u, *last, residual=shortcut), streams)
        return SFGFeatures(normalised_conv(self.norm2, u, *last, residual=shortcut)[0], streams)

    def _reference(self, x: DenseFeatures) -> DenseFeatures:
        """One plain residual block for each stream."""
        streams = FilterGroups.streams(self.channels, self.names[1:], x[0].device)
        out = []
        for group, tensor in enumerate(x):
            rows = slice(group * self.channels, (group + 1) * self.channels)
            h = tensor
            if not self.first:
                h = F.relu(slice_of_norm(h, self.norm1, rows))
            h = _slice_of_conv(h, self.conv1, rows, self.dilation)
            h = F.relu(slice_of_norm(h, self.norm2, rows))
            out.append(tensor + _slice_of_conv(h, self.conv2, rows, self.dilation))
        return DenseFeatures(out, streams)


def _slice_of_conv(x: Tensor, conv: nn.Conv2d, rows: slice, dilation: int) -> Tensor:
    bias = None if conv.bias is None else conv.bias[rows]
    return F.conv2d(x, conv.weight[rows], bias, 1, dilation, dilation)


def slice_of_norm(x: Tensor, norm: nn.BatchNorm2d | None, rows: slice) -> Tensor:
    """What a batch normalisation does to the channels `rows`, which are all of x."""
    if norm is None:
        return x
    assert norm.running_mean is not None
    assert norm.running_var is not None
    running = norm.running_mean[rows], norm.running_var[rows]
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.num_batches_tracked is not None and rows.start == 0:
        norm.num_batches_tracked.add_(1)
    if norm.training and norm.momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked)  # type: ignore[arg-type]
    return F.batch_norm(x, *running, norm.weight[rows], norm.bias[rows], norm.training, momentum, norm.eps)


class Merge(nn.Module):
    """Merge by concatenation: [F_t | F_s] and a 1x1 convolution to K channels, for each task (section 2.1). The shared
    stream passes unchanged. Afterwards every group reads its own stream."""

    def __init__(self, channels: int, tasks: Iterable[str]) -> None:
        super().__init__()
        self.names, self.channels = group_names(tasks), channels
        self.conv = nn.Conv2d(2 * channels, channels * (len(self.names) - 1), 1)  # columns: F_t, then F_s

    def forward(self, x: Features) -> Features:
        """Streams -> streams that each group reads for itself (`Routing.OWN`)."""
        x = for_backend(x)
        if isinstance(x, DenseFeatures):
            merged = [
                F.conv2d(torch.cat([x[t + 1], x[0]], 1), weight, bias)
                for t, (weight, bias) in enumerate(
                    zip(self.conv.weight.split(self.channels), self.conv.bias.split(self.channels), strict=True)  # type: ignore[union-attr]
                )
            ]
            groups = FilterGroups.streams(self.channels, self.names[1:], x[0].device)
            return DenseFeatures([x[0], *merged], groups, Routing.OWN)
        device = x.packed.device
        spec = RoutedConv(
            FilterGroups.blocks([self.channels] * len(self.names), self.names, device),
            FilterGroups.concatenated(self.channels, self.names[1:], device),
            Routing.ARROW,
            Geometry((1, 1), (0, 0), (1, 1)),
        )
        # The shared stream passes as a convolution with the identity: all streams are written by one kernel, where a
        # concatenation would copy them, and its gradient once more.
        passes = F.pad(torch.eye(self.channels, dtype=self.conv.weight.dtype, device=device), (self.channels, 0))
        weight = torch.cat([passes[:, :, None, None], self.conv.weight])
        bias = None if self.conv.bias is None else F.pad(self.conv.bias, (self.channels, 0))
        groups = FilterGroups.streams(self.channels, self.names[1:], device)
        return SFGFeatures(routed_conv(x.streams(), weight, bias, spec), groups, Routing.OWN)


class RoutedBlock(nn.Module):
    """A residual block whose convolutions are SFG layers: x + SFG(SFG(x)). The second one writes to the residual
    stream, so it shares the trunk's grouping (and draw); it has no activation."""

    def __init__(self, trunk: SFGConv2d, dilation: int = 1, **options: Any) -> None:
        super().__init__()
        channels = trunk.out_channels
        options = {**options, "padding": dilation, "dilation": dilation}
        self.conv1 = SFGConv2d(channels, channels, 3, activation="relu", **options)
        self.conv2 = SFGConv2d(channels, channels, 3, **options)
        self.conv2.share_grouping(trunk)

    @property
    def drawn(self) -> list[nn.Module]:
        """The layer that needs a draw."""
        return [self.conv1]

    def forward(self, x: Features, groups: FilterGroups | None = None) -> Features:
        """`groups`: a draw for the first layer instead of a new one."""
        return self.conv2(self.conv1(x, groups), groups=x.groups, residual=x)


class Heads(nn.Module):
    """One 1x1 convolution per task on the merged features [F_t | F_s].

    `outputs`: channels of each task. `dims`: 2, or 3 for volumes. Returns {task: [N, channels, H, W]}.
    """

    def __init__(self, channels: int, outputs: Mapping[str, int], dims: int = 2) -> None:
        super().__init__()
        self.outputs, self.dims = dict(outputs), dims
        plain = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv = plain(channels, sum(outputs.values()), 1)

    def rows(self, task: str) -> slice:
        """Which rows of `conv` belong to a task."""
        names = list(self.outputs)
        start = sum(self.outputs[name] for name in names[: names.index(task)])
        return slice(start, start + self.outputs[task])

    def forward(self, x: Features) -> dict[str, Tensor]:
        """{task: [N, channels, H, W]} of the features, which are merged by summation."""
        x = for_backend(x)
        if isinstance(x, DenseFeatures):
            assert self.conv.bias is not None
            convolve_one = CONVOLUTIONS[self.dims]
            return {
                task: convolve_one(x.merged(task), self.conv.weight[self.rows(task)], self.conv.bias[self.rows(task)])
                for task in self.outputs
            }
        rows = FilterGroups.blocks([0, *self.outputs.values()], group_names(self.outputs), x.packed.device)
        one, none = (1,) * self.dims, (0,) * self.dims
        spec = RoutedConv(rows, x.groups, x.routing, Geometry(one, none, one))
        y = routed_conv(x.packed, self.conv.weight, self.conv.bias, spec, undrawn=x.undrawn, deferred=x.deferred)
        return dict(zip(self.outputs, y.split(list(self.outputs.values()), 1), strict=True))
