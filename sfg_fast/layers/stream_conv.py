"""`StreamConv2d`: the last convolution before a product, as in squeeze-and-excite and in spatial attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn import functional as F

from ..activations import Activation, activate, check_activation
from ..features import SFGFeatures
from ..groups import FilterGroups, Routing, group_names
from ..kernels.spec import Geometry, RoutedConv
from ..norm import NormName
from ..reference import DenseFeatures, merge
from ..routed_conv import routed_conv
from .conv import Features, for_backend
from .streams import check_plain_norm, slice_of_norm


class StreamConv2d(nn.Conv2d):
    """A convolution for images that has all K channels for every group, computed from what that group reads: streams s.
    No draw and no gate zeroes any of them. All groups have the same weights.

    `features * streams` is F'_g = F_g * s_g, for s_g of as many channels as F_g, or of one. So the last convolution
    of a squeeze-and-excite block is a `StreamConv2d` (on features of one position its T+1 times K channels cost next to
    nothing), and so is that of spatial attention, with one channel. What stands before it are ordinary SFG layers.

    Args:
        norm: None, or "batch": an `nn.BatchNorm2d` of all (T+1)K channels, so for each (group, kernel).
        activation: as in `SFGConv2d`, but it need not keep zeros: nn.Sigmoid(), for example.
        The others are those of `nn.Conv2d`, and `tasks` as in `SFGConv2d`.

    Raises:
        ValueError: for groups other than 1, another `norm`, and an activation that `SFGConv2d` refuses by its name or
            as a class.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *arguments: Any,
        tasks: int | Iterable[str] = 2,
        norm: NormName = None,
        activation: Activation = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *arguments, **options)
        if self.groups != 1:
            raise ValueError(f"groups={self.groups}: expected groups=1, because each group reads all its channels")
        check_plain_norm(norm)
        check_activation(activation)
        self.group_names, self.activation = group_names(tasks), activation
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.norm = nn.BatchNorm2d(out_channels * len(self.group_names), **like) if norm else None

    @property
    def padded_before(self) -> bool:
        """Does torch pad the input before its convolution? ("same" may be uneven, and other modes have no zeros.)"""
        return self.padding_mode != "zeros" or isinstance(self.padding, str)

    def forward(self, x: Features) -> Features:  # type: ignore[override]
        """Features of an SFG layer, or streams -> streams [N, (T+1)K, H', W'], which each group reads alone. Raises
        ValueError for features of other groups."""
        x = for_backend(x)
        if x.groups.names != self.group_names:
            raise ValueError(f"the input has groups {x.groups.names}, this layer {self.group_names}")
        if self.padded_before:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = x.channelwise(lambda one: F.pad(one, self._reversed_padding_repeated_twice, mode))
        padding = (0, 0) if self.padded_before else self.padding
        groups = FilterGroups.streams(self.out_channels, self.group_names[1:], x.device)
        if isinstance(x, DenseFeatures):
            u = [
                F.conv2d(one, self.weight, self.bias, self.stride, padding, self.dilation)
                for one in merge(list(x), x.routing)
            ]
            u = [slice_of_norm(one, self.norm, self.rows(group)) for group, one in enumerate(u)]
            return DenseFeatures([activate(one, self.activation) for one in u], groups, Routing.OWN)
        geometry = Geometry(self.stride, padding, self.dilation)  # type: ignore[arg-type]
        spec = RoutedConv(groups, x.groups, x.routing, geometry)
        given = {"undrawn": x.undrawn, "deferred": x.deferred}
        rows = routed_conv(x.packed, self.weight, self.bias, spec, **given)
        rows = rows if self.norm is None else self.norm(rows)
        return SFGFeatures(activate(rows, self.activation, groups.order), groups, Routing.OWN)

    def rows(self, group: int) -> slice:
        """The rows of `norm` that belong to a group."""
        return slice(group * self.out_channels, (group + 1) * self.out_channels)

    def extra_repr(self) -> str:
        """The arguments, for `print`."""
        return f"{super().extra_repr()}, tasks={self.group_names[1:]}, activation={self.activation}"
