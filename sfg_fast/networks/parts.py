"""Parts of the networks: what single-task networks have in place of groups, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Column(NamedTuple):
    """A network for one task, to be read by those for others: its stages, each from tensor to tensor; what follows
    them; and the head."""

    stages: list[list[nn.Module]]
    final: list[nn.Module]
    head: nn.Module


class ChannelDropout(nn.Dropout2d):
    """`nn.Dropout2d` of features or a tensor, which also drops in `eval()` while architectures are drawn
    (`controls.sampling`): a prediction by draws is then the mean over networks that dropped other channels."""

    sampling: bool = False

    def forward(self, x: Any) -> Any:
        drops = self.p > 0 and (self.training or self.sampling)
        return F.dropout2d(x, self.p, True) if drops else x


def dropout_between(parts: Sequence[nn.Module], dropout: nn.Module) -> list[nn.Module]:
    """The parts, with `dropout` after each but the last."""
    return [module for part in parts for module in (part, dropout)][:-1]


class ReadTask(nn.Module):
    """What a task reads of features, as a tensor [N, K, H, W]."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def forward(self, x: Any) -> Tensor:
        return x.merged(self.task)

    def extra_repr(self) -> str:
        return self.task


class ResidualBlock(nn.Module):
    """`StreamBlock` for a single stream, on tensors: x + conv(relu(bn(conv(relu(bn(x)))))). The `first` one of a stage,
    whose input is normalised and activated already, starts with the convolution."""

    def __init__(self, channels: int, dilation: int, first: bool, norm: str | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=norm is None)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.norm1, self.norm2 = (
            nn.BatchNorm2d(channels) if norm and wanted else nn.Identity() for wanted in (not first, True)
        )
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(self.norm1(x))
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


def check_size(x: Tensor, least: int) -> None:
    """ValueError for images [N, C, H, W] with fewer rows or columns."""
    if least > 1 and min(x.shape[2:]) < least:
        raise ValueError(f"the image has size {tuple(x.shape[2:])}, expected at least ({least}, {least})")
