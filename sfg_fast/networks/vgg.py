"""`SFGVGG`: VGG-11 whose convolutions are all SFG layers, for tasks of a whole image (classification, regression).

It is the classification example of the method's longer paper (Bragman, Tanno et al., ICCV 2019, section 4.1). All
merges are sums, and each task has a head on its pooled features [F_t | F_s].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.conv import SFGConv2d
from ..norm import NormName
from .controls import drawn_first
from .methods import fix_grouping, he_initialise, layer_options
from .parts import ChannelDropout, Column, ReadTask, check_size, dropout_between

# How many times as many kernels as the first convolution each convolution has; "pool" halves the image.
VGG11: tuple[int | str, ...] = (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8, "pool")


class SFGVGG(nn.Module):
    """A multi-task VGG-11 with stochastic filter groups.

    Args:
        in_channels: channels of the image.
        outputs: outputs of each task, in order: classes, or 1 (or more) for regression, e.g. {"gender": 2, "age": 1}.
        width: kernels of the first convolution (VGG-11: 64).
        method, norm, init, estimator, noise_on, explore, shared, dropout: as in `SFGHighResNet`.

    Images need at least 32 rows and columns. Raises ValueError as `SFGHighResNet` does.
    """

    per_image = True  # the outputs have a value for each image
    least_size = 32
    sizes = ("width",)  # the options that set the size of the network

    def __init__(
        self,
        in_channels: int,
        outputs: Mapping[str, int],
        width: int = 64,
        *,
        method: str = "sfg",
        norm: NormName = "batch",
        init: str | Sequence[Any] | Tensor = "uniform",
        estimator: str = "straight_through",
        noise_on: str = "log_p",
        explore: float = 0.0,
        shared: float | Sequence[float] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.outputs, self.method = in_channels, dict(outputs), method
        layers = _layers(in_channels, width, layer_options(method, tuple(outputs), norm, init, estimator))
        channels = layers[-1].out_channels
        self.features = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({task: nn.Linear(channels, size) for task, size in outputs.items()})
        self.dropout = ChannelDropout(dropout)
        he_initialise(self)
        fix_grouping(self, method, noise_on, explore, shared)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [N, in_channels, H, W] -> {task: [N, outputs[task]]}."""
        check_size(x, self.least_size)
        features = drawn_first(dropout_between([*self.features], self.dropout), x)
        return {task: head(features.merged(task).mean((2, 3))) for task, head in self.heads.items()}

    @staticmethod
    def column(in_channels: int, task: str, outputs: int, options: Mapping[str, Any], width: int = 64) -> Column:
        """A network of this architecture for one task. Its stages end with a pooling; `options` are those of its
        layers."""
        stages: list[list[nn.Module]] = [[]]
        for layer in _layers(in_channels, width, options):
            stages[-1].append(layer)
            if layer.activation == "relu_pool":
                stages[-1].append(ReadTask(task))
                stages.append([])
        channels = layer.out_channels
        final = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return Column(stages[:-1], final, nn.Linear(channels, outputs))


def _layers(in_channels: int, width: int, options: Mapping[str, Any]) -> list[SFGConv2d]:
    if not isinstance(width, int):
        raise ValueError(f"width={width!r}: expected a number, of the kernels of vgg's first convolution")
    layers: list[SFGConv2d] = []
    channels = in_channels
    for size, following in zip(VGG11, (*VGG11[1:], None), strict=True):
        if isinstance(size, int):
            # The pooling stands before the gate. Behind the gate a kernel that was not drawn has only zeros, and their
            # maximum would give its gate no gradient.
            activation = "relu_pool" if following == "pool" else "relu"
            layers.append(SFGConv2d(channels, width * size, 3, padding=1, activation=activation, **options))
            channels = width * size
    return layers
