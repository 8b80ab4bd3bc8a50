"""Parts of networks: those that networks of a single task have in place of groups, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ..layers.streams import check_plain_norm
from ..norm import NormName


class Column(NamedTuple):
    """A network for one task, which the networks of other tasks can read between its stages. Each of the `stages` takes
    and gives a tensor; `final` follows the stages, and `head` gives the output."""

    stages: list[list[nn.Module]]
    final: list[nn.Module]
    head: nn.Module


class ChannelDropout(nn.Dropout2d):
    """`nn.Dropout2d` for features or a tensor. It drops in `eval()`, too, while architectures are drawn
    (`controls.sampling`), so that each draw of a prediction drops other channels."""

    sampling: bool = False

    def forward(self, x: Any) -> Any:
        """x, features or a tensor [N, C, H, W] or [N, C, D, H, W] -> the same, with some channels zero and the others
        scaled."""
        if not self.p or not (self.training or self.sampling):
            return x
        drop = F.dropout2d if x.dim() == 4 else F.dropout3d
        return drop(x, self.p) if isinstance(x, Tensor) else x.channelwise(lambda one: drop(one, self.p))


class PathDropout(nn.Module):
    """Stochastic depth: in training each image's features are zero with probability p, and those of the others are
    divided by 1 - p if `scales`. (A branch behind which a shortcut is added is so left out.)"""

    def __init__(self, p: float, scales: bool = True) -> None:
        super().__init__()
        self.p, self.scales = p, scales

    def forward(self, x: Any) -> Any:
        """x, features or a tensor [N, C, H, W] -> the same, with zeros for some images."""
        if not self.training or not self.p:
            return x
        like = x if isinstance(x, Tensor) else x.packed
        kept = torch.rand(like.shape[0], *[1] * (like.dim() - 1), device=like.device) >= self.p
        factor = kept.to(like.dtype) / (1 - self.p if self.scales else 1)
        return x * factor if isinstance(x, Tensor) else x.channelwise(lambda one: one * factor.to(one.device))

    @override
    def extra_repr(self) -> str:
        return f"p={self.p}"


def dropout_between(parts: Sequence[nn.Module], dropout: nn.Module) -> list[nn.Module]:
    """The parts, with `dropout` after each part except the last."""
    return [module for part in parts for module in (part, dropout)][:-1]


class ReadTask(nn.Module):
    """Reads the features of a task from those of an SFG layer, as a tensor."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def forward(self, x: Any) -> Tensor:
        """x, the features of K kernels -> what the task reads of them, [N, K, H, W]."""
        return x.merged(self.task)

    @override
    def extra_repr(self) -> str:
        return self.task


class ResidualBlock(nn.Module):
    """A `StreamBlock` for a single stream, on tensors: x + conv(relu(bn(conv(relu(bn(x)))))). The `first` block of a
    stage starts with the convolution, because its input is normalised and activated already.

    `norm`: None, or "batch": an `nn.BatchNorm2d`. Raises ValueError for another norm."""

    def __init__(self, channels: int, dilation: int, first: bool, norm: NormName) -> None:
        super().__init__()
        check_plain_norm(norm)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=norm is None)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.norm1, self.norm2 = (
            nn.BatchNorm2d(channels) if norm and wanted else nn.Identity() for wanted in (not first, True)
        )
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """x [N, channels, H, W] -> a tensor of the same shape."""
        h = x if self.first else F.relu(self.norm1(x))
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


def start_from_biases(head: nn.Conv2d | nn.Conv3d) -> None:
    """Give a head small weights, so that its first outputs are about its biases."""
    nn.init.normal_(head.weight, 0.0, 0.05)
    assert head.bias is not None
    nn.init.zeros_(head.bias)


def check_size(x: Tensor, least: int) -> None:
    """Raise ValueError if images x [N, C, H, W] have less than `least` rows or columns."""
    if least > 1 and min(x.shape[2:]) < least:
        raise ValueError(f"the image has size {tuple(x.shape[2:])}, expected at least ({least}, {least})")
