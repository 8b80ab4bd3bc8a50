"""What every SFG layer has, whoever computes it: arguments, parameters, checks. The fast layer (layers/conv.py) and the
oracle (reference.py) add a forward pass each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import ACTIVATIONS, Activation
from .gates import GroupGates
from .groups import FilterGroups
from .norm import KernelNorm


class SFGLayer(GroupGates):
    """A 2-D convolution whose K kernels are drawn into T+1 groups, without a forward pass. `sfg_fast.SFGConv2d` says
    what the arguments are."""

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
        slopes = isinstance(activation, nn.PReLU) and activation.num_parameters == out_channels
        if isinstance(activation, nn.Module) and not slopes and any(p.numel() > 1 for p in activation.parameters()):
            raise ValueError(
                f"activation={activation}: has parameters for each channel, expected the same for all, or "
                f"nn.PReLU({out_channels}), with a slope for each kernel"
            )
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
        # What torch pads before its convolution: "same" may be uneven, and other modes don't pad with zeros. (torch
        # keeps it in this attribute alone.)
        self.pad_before = list(plain._reversed_padding_repeated_twice)
        self._even = self.pad_before[0::2] == self.pad_before[1::2]

    def reset_parameters(self) -> None:
        """Sets all to what a new layer has: weight and bias as `nn.Conv2d` draws them, p as `init` says, no fixed
        assignment, no running statistics."""
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
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        text += f", tasks={self.group_names[1:]}, activation={self.activation}, estimator={self.estimator}"
        return text + (", assigned" if self.assigned else "")
