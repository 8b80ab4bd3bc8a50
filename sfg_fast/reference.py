"""Dense masking: SFG layers word for word as in the paper. The oracle of every other backend, and the baseline.

"We first convolve the input features with all kernels, and generate the output features from each filter group by
zeroing out the channels that root from the kernels in the other groups, resulting in F_reg, F_s, F_seg that are sparse
at non-overlapping channel indices." (section 2.1.) Features are T+1 dense tensors [N, K, H, W], shared first; an SFG
layer costs T+1 full convolutions (one for the image). Nothing of the fast path is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS, Activation, activate
from .gates import GroupGates
from .groups import FilterGroups, Routing
from .norm import KernelNorm
from .plain_ops import TensorLike


class DenseFeatures(TensorLike, list[Tensor]):  # type: ignore[misc]
    """The T+1 dense tensors F_shared, F_1, .., F_T; `dense`, `merged`, `packed` and + as in `SFGFeatures`."""

    def __init__(self, tensors: Iterable[Tensor], groups: FilterGroups, routing: Routing = Routing.ARROW) -> None:
        super().__init__(tensors)
        self.groups, self.routing = groups, routing

    def dense(self, group: int | str) -> Tensor:
        return self[self.groups.index(group)]

    def merged(self, task: int | str) -> Tensor:
        group = self.groups.index(task)
        return self[group] if self.routing is Routing.OWN or group == 0 else self[group] + self[0]

    @property
    def packed(self) -> Tensor:
        streams = torch.cat(list(self), 1)
        return streams if self.groups.full else streams.index_select(1, self.groups.rows_in_streams)

    @property
    def shape(self) -> torch.Size:
        return self[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        return self[0].device

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> DenseFeatures:
        return DenseFeatures(map(operation, self), self.groups, self.routing)

    def concatenate(self, *more: DenseFeatures) -> DenseFeatures:
        tensors = [torch.cat(parts, 1) for parts in zip(self, *more, strict=True)]
        return DenseFeatures(tensors, FilterGroups.joined([one.groups for one in (self, *more)]), self.routing)

    def __add__(self, other: DenseFeatures) -> DenseFeatures:  # type: ignore[override]
        if self.routing is not other.routing or not self.groups.same_as(other.groups):
            raise ValueError(
                "features of different groupings can't be added: let both convolutions share one draw "
                f"(conv(x, groups=features.groups)); got {self.groups} and {other.groups}"
            )
        return DenseFeatures([a + b for a, b in zip(self, other, strict=True)], self.groups, self.routing)


def merge(features: Sequence[Tensor], routing: Routing) -> list[Tensor]:
    """What each group reads: F_s for shared, [F_t | F_s] by "pixel-wise summation" for task t (section 2.1)."""
    if routing is Routing.OWN:
        return list(features)
    return [features[0], *(task + features[0] for task in features[1:])]


def normalise(u: list[Tensor], norm: KernelNorm, groups: FilterGroups) -> list[Tensor]:
    """Batch statistics of the drawn row of each kernel, for all its rows; running ones in eval (see norm.py).

    `u` holds T+1 tensors, or one if all groups read the same image (then all rows of a kernel are equal).
    """
    if norm.training:
        assert groups.assignment is not None
        var, mean = (
            torch.stack(moment).gather(0, groups.assignment[None]).squeeze(0) if len(u) > 1 else moment[0]
            for moment in zip(*(torch.var_mean(tensor, (0, 2, 3), correction=0) for tensor in u), strict=True)
        )
        scale, shift = norm.batch_affine(mean, var, u[0].numel() // u[0].shape[1], groups.assignment)
        scales, shifts = [scale] * len(u), [shift] * len(u)
    else:
        scales, shifts = (list(affine) for affine in norm.running_affine())
        u = u if len(u) > 1 else u * len(scales)
    return [
        torch.addcmul(b.to(x.dtype)[:, None, None], x, a.to(x.dtype)[:, None, None])
        for x, a, b in zip(u, scales, shifts, strict=True)
    ]


class SFGConv2d(GroupGates):
    """A convolution whose K kernels are drawn into T+1 groups, by dense masking. See `sfg_fast.SFGConv2d`.

    Same constructor, parameters and state_dict as the fast layer; returns the list of T+1 dense tensors.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        tasks: int | Iterable[str] = 2,
        norm: str | None = None,
        activation: Activation = None,
        init: str | Sequence[Any] | Tensor = "uniform",
        estimator: str = "straight_through",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups != 1:
            raise ValueError(f"groups={groups}: SFG layers draw their own filter groups, only groups=1 is possible")
        if norm not in (None, "batch"):
            raise ValueError(f"norm={norm!r} is unknown, expected None or 'batch'")
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation={activation!r} is unknown, expected None, {known} or a callable")
        if isinstance(activation, type):
            name = activation.__name__
            raise ValueError(f"activation is the class {name}, expected an instance: {name}()")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: expected one of real floating point numbers")
        if isinstance(activation, nn.Module) and any(p.numel() > 1 for p in activation.parameters()):
            raise ValueError(f"activation={activation}: has parameters for each channel, expected the same for all")
        super().__init__(out_channels, tasks, init, estimator, device, dtype)
        # torch's own layer checks the geometry and gives the initial weights.
        plain = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias,
            padding_mode, device, dtype,  # type: ignore[arg-type]
        )  # fmt: skip
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, 1
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation  # type: ignore
        self.padding, self.padding_mode = plain.padding, padding_mode
        for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
            sizes = getattr(self, name)
            if not isinstance(sizes, str) and min(sizes) < least:
                raise ValueError(f"{name}={sizes}: expected at least {least}")
        self.weight, self.bias = plain.weight, plain.bias
        factory = {"device": device, "dtype": dtype}
        self.norm = KernelNorm(out_channels, len(self.group_names), **factory) if norm else None
        self.activation = activation
        # torch's padding before the convolution ("same" may be uneven, other modes are not zeros).
        self.pad_before = list(plain._reversed_padding_repeated_twice)
        self._even = self.pad_before[0::2] == self.pad_before[1::2]

    def reset_parameters(self) -> None:
        """As it is made: weight and bias as `nn.Conv2d` draws them, p as `init` says, nothing fixed, no statistics."""
        self.reset_grouping()
        nn.Conv2d.reset_parameters(self)  # type: ignore[arg-type]
        for part in (self.norm, self.activation):
            if part is not None and hasattr(part, "reset_parameters"):
                part.reset_parameters()

    @property
    def zero_padding(self) -> tuple[int, int] | None:
        """(vertical, horizontal) zero padding that the convolution itself can do, or None: pad the input before."""
        if self.padding_mode == "zeros" and self._even:
            return self.pad_before[2], self.pad_before[0]
        return None

    def pad(self, x: Tensor) -> Tensor:
        """The input, padded where `zero_padding` can't do it."""
        if self.zero_padding is not None:
            return x
        return F.pad(x, self.pad_before, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), weight, self.bias, self.stride, self.zero_padding or 0, self.dilation)

    def forward(self, x: Tensor | Sequence[Tensor], groups: FilterGroups | None = None) -> DenseFeatures:
        """x: one image [N, C, H, W] for all groups, or T+1 dense tensors. `groups`: a draw to use instead of a new
        one.
        """
        groups = self.draw() if groups is None else self.check_groups(groups)
        assert groups.gates is not None
        weight = self.weight_of(groups)
        if isinstance(x, Tensor):
            u = [self._conv(x, weight)]  # every group reads the same image: convolve once, then mask
        else:
            self.check_sequence(x)
            u = [self._conv(read, weight) for read in merge(list(x), getattr(x, "routing", Routing.ARROW))]
        if self.norm is not None:
            u = normalise(u, self.norm, groups)
        h = [activate(tensor, self.activation) for tensor in u]
        h = h if len(h) > 1 else h * len(self.group_names)
        z = groups.gates.to(h[0].dtype).t()[:, :, None, None]
        return DenseFeatures([z[group] * tensor for group, tensor in enumerate(h)], groups)

    def check_groups(self, groups: FilterGroups) -> FilterGroups:
        """A draw given from outside, or ValueError if it is not one for this layer."""
        self.check_names(groups)
        if groups.width != self.out_channels or groups.gates is None:
            raise ValueError(f"groups={groups}: expected a draw for this layer's {self.out_channels} kernels")
        return groups

    def check_names(self, groups: FilterGroups) -> None:
        if groups.names != self.group_names:
            raise ValueError(f"the input has groups {groups.names}, this layer {self.group_names}")

    def check_sequence(self, x: Sequence[Tensor]) -> None:
        """ValueError unless x holds one tensor per group, all of one shape, of groups of the same names."""
        if hasattr(x, "groups"):
            self.check_names(x.groups)
        if len(x) != len(self.group_names):
            raise ValueError(
                f"got {len(x)} dense tensors, expected {len(self.group_names)}: {', '.join(self.group_names)}"
            )
        shapes = [tuple(tensor.shape) for tensor in x]
        if len(set(shapes)) > 1:
            raise ValueError(f"the dense tensors have shapes {shapes}, expected one shape")

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        text += f", tasks={self.group_names[1:]}, activation={self.activation}, estimator={self.estimator}"
        return text + (", assigned" if self.assigned else "")
