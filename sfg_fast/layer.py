"""What every SFG layer has, whoever computes it: arguments, parameters, checks. The fast layers (layers/conv.py) and
the oracles (reference.py) add a forward pass each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import Activation, check_activation
from .gates import GroupGates, with_zero_gradient
from .groups import FilterGroups
from .kernels.masked import CONVOLUTIONS
from .norm import ImageNorm, NormName, make_norm

Sizes = int | tuple[int, ...]

_TRANSPOSED: dict[int, Any] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


class SFGLayer(GroupGates):
    """A convolution whose K kernels are drawn into T+1 groups, without a forward pass. `sfg_fast.SFGConv2d` says what
    the arguments are."""

    PLAIN: ClassVar[type[nn.modules.conv._ConvNd]]  # the layer of torch whose arguments and parameters this one has
    transposed = False
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pad_before: list[int]  # as `F.pad` wants it

    def __init__(
        self,
        make_plain: Callable[..., nn.modules.conv._ConvNd],
        out_channels: int,
        *,
        tasks: int | Iterable[str],
        norm: NormName,
        activation: Activation,
        init: str | Sequence[Any] | Tensor,
        estimator: str,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        """`make_plain(device=.., dtype=..)` makes a layer of torch, which checks the geometry and gives the initial
        weights."""
        check_activation(activation)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}: expected one of real floating point numbers")
        slopes = isinstance(activation, nn.PReLU) and activation.num_parameters == out_channels
        if isinstance(activation, nn.Module) and not slopes and any(p.numel() > 1 for p in activation.parameters()):
            raise ValueError(
                f"activation={activation}: has parameters for each channel, expected the same for all, or "
                f"nn.PReLU({out_channels}), with a slope for each kernel"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(out_channels, tasks, init, estimator, **factory)
        plain: Any = make_plain(**factory)
        self.in_channels, self.out_channels, self.groups = plain.in_channels, plain.out_channels, plain.groups
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding, self.padding_mode = plain.padding, plain.padding_mode
        self.output_padding: tuple[int, ...] = plain.output_padding
        # What torch pads before its convolution: "same" may be uneven, and other modes don't pad with zeros. (torch
        # keeps it in this attribute alone.)
        self.pad_before = list(plain._reversed_padding_repeated_twice)
        for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
            sizes = getattr(self, name)
            if not isinstance(sizes, str) and min(sizes) < least:
                raise ValueError(f"{name}={sizes}: expected at least {least}")
        self.weight, self.bias = plain.weight, plain.bias
        self.norm = make_norm(norm, plain.out_channels, len(self.group_names), **factory)
        self.activation = activation

    @property
    def zero_padding(self) -> tuple[int, ...] | None:
        """Zero padding of each dimension that the convolution itself can do, or None: the input is padded before.

        A transposed layer has None, too, but nothing is padded before it: its `padding` crops the output, which its
        forward pass does (layers/other_convs.py)."""
        return None

    def pad(self, x: Tensor) -> Tensor:
        """The input, padded where `zero_padding` can't do it."""
        return x

    def parameters_of(self, groups: FilterGroups) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution for a step with these groups.

        In front of an instance norm there is no bias, because the norm takes away whatever it adds. In a row that reads
        no channel it would be all there is, and the norm would multiply its rounding errors by 1/sqrt(eps), in one
        layer after the other. (The bias gets a gradient of zeros, as `weight_of` gives the logits.)"""
        weight, used = self.weight_of(groups), self.used_bias
        if used is not self.bias and self.bias.requires_grad and torch.is_grad_enabled():
            weight = with_zero_gradient(weight, self.bias)
        return weight, used

    @property
    def used_bias(self) -> Tensor | None:
        """The bias [K] that the convolution adds: None in front of an instance norm (`parameters_of`)."""
        without = isinstance(self.norm, ImageNorm) and self.norm.kind == "instance"
        return None if without else self.bias

    def kernels_first(self, weight: Tensor) -> Tensor:
        """The weight as [K, C, kH, kW], also of a transposed convolution of one group of channels."""
        return weight.transpose(0, 1) if self.transposed else weight

    @property
    def dims(self) -> int:
        """The number of dimensions of an image: 2, or 3 for volumes."""
        return len(self.kernel_size)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the plain layer of torch computes of one tensor [N, C, H, W], with this weight and
        bias."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Sets all to what a new layer has: weight and bias as the layer of torch draws them, p as `init` says, no
        fixed assignment, no running statistics."""
        self.reset_grouping()
        self.PLAIN.reset_parameters(self)  # type: ignore[arg-type]
        for part in (self.norm, self.activation):
            if part is not None and hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def check_groups(self, groups: FilterGroups) -> FilterGroups:
        """`groups`, a draw that the caller gives. Raises ValueError if it is not one for this layer."""
        self.check_names(groups)
        if groups.width != self.out_channels or groups.gates is None:
            raise ValueError(f"groups={groups}: expected a draw for this layer's {self.out_channels} kernels")
        return groups

    def check_names(self, groups: FilterGroups) -> None:
        """Raises ValueError unless the groups have the names of this layer's."""
        if groups.names != self.group_names:
            raise ValueError(f"the input has groups {groups.names}, this layer {self.group_names}")

    def check_sequence(self, x: Sequence[Tensor]) -> None:
        """Raises ValueError unless x holds one tensor per group, all of one shape, of groups of the same names."""
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
        """The arguments, for `print`."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        none, one = (0,) * self.dims, (1,) * self.dims
        defaults = {"padding": none, "output_padding": none, "dilation": one, "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name, default) != default:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        text += f", tasks={self.group_names[1:]}, activation={self.activation}, estimator={self.estimator}"
        return text + (", assigned" if self.assigned else "")


class _ConvLayer(SFGLayer):
    """An SFG layer with the arguments of `nn.Conv2d` or `nn.Conv3d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        tasks: int | Iterable[str] = 2,
        norm: NormName = None,
        activation: Activation = None,
        init: str | Sequence[Any] | Tensor = "uniform",
        estimator: str = "straight_through",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = kernel_size, stride, padding, dilation, groups, bias, padding_mode
        make_plain = functools.partial(self.PLAIN, in_channels, out_channels, *geometry)  # type: ignore[arg-type]
        super().__init__(
            make_plain, out_channels, tasks=tasks, norm=norm, activation=activation, init=init, estimator=estimator,
            device=device, dtype=dtype,
        )  # fmt: skip
        self._even = self.pad_before[0::2] == self.pad_before[1::2]

    @property
    def zero_padding(self) -> tuple[int, ...] | None:
        """As `SFGLayer.zero_padding`."""
        if self.padding_mode == "zeros" and self._even:
            return tuple(self.pad_before[-2::-2])
        return None

    def pad(self, x: Tensor) -> Tensor:
        """As `SFGLayer.pad`."""
        if self.zero_padding is not None:
            return x
        return F.pad(x, self.pad_before, "constant" if self.padding_mode == "zeros" else self.padding_mode)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `nn.Conv2d` (`nn.Conv3d`) computes of one tensor [N, C, H, W], with this weight and
        bias."""
        geometry = self.stride, self.zero_padding or 0, self.dilation, self.groups
        return CONVOLUTIONS[self.dims](self.pad(x), weight, bias, *geometry)


class Conv2dLayer(_ConvLayer):
    """An SFG layer with the arguments of `nn.Conv2d`."""

    PLAIN = nn.Conv2d


class Conv3dLayer(_ConvLayer):
    """An SFG layer with the arguments of `nn.Conv3d`."""

    PLAIN = nn.Conv3d


class _ConvTransposeLayer(SFGLayer):
    """An SFG layer with the arguments of `nn.ConvTranspose2d` or `nn.ConvTranspose3d`."""

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        *,
        tasks: int | Iterable[str] = 2,
        norm: NormName = None,
        activation: Activation = None,
        init: str | Sequence[Any] | Tensor = "uniform",
        estimator: str = "straight_through",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode
        make_plain = functools.partial(self.PLAIN, in_channels, out_channels, *geometry)  # type: ignore[arg-type]
        super().__init__(
            make_plain, out_channels, tasks=tasks, norm=norm, activation=activation, init=init, estimator=estimator,
            device=device, dtype=dtype,
        )  # fmt: skip

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `nn.ConvTranspose2d` (`nn.ConvTranspose3d`) computes of one tensor [N, C, H, W], with this weight and
        bias."""
        geometry = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return _TRANSPOSED[self.dims](x, weight, bias, *geometry)


class ConvTranspose2dLayer(_ConvTransposeLayer):
    """An SFG layer with the arguments of `nn.ConvTranspose2d`."""

    PLAIN = nn.ConvTranspose2d


class ConvTranspose3dLayer(_ConvTransposeLayer):
    """An SFG layer with the arguments of `nn.ConvTranspose3d`."""

    PLAIN = nn.ConvTranspose3d
