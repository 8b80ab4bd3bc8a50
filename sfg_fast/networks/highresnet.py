"""`SFGHighResNet`: the paper's network (section 3), a 2-D HighResNet whose convolutions are SFG layers.

Three stages of growing dilation (1, 2, 4). Each starts with an SFG layer that changes the width; residual blocks
follow, either on T+1 streams with separate weights, merged by concatenation ("After the first SFG layer, three
distinct repeated residual blocks are applied [...] then merged according to the feature routing methodology followed
by a new SFG-layer and subsequent residual layers"), or SFG layers themselves. "Our model concludes with 2 successive
SFG-layers followed by 1x1 convolutional layers applied to the merged features."
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.conv import SFGConv2d
from ..layers.streams import Heads, Merge, RoutedBlock, StreamBlock
from ..norm import NormName
from .controls import drawn_first
from .methods import fix_grouping, he_initialise, layer_options
from .parts import ChannelDropout, Column, ReadTask, ResidualBlock, dropout_between, start_from_biases

RESIDUAL = ("separate", "routed")


class SFGHighResNet(nn.Module):
    """A multi-task HighResNet with stochastic filter groups.

    Args:
        in_channels: channels of the image.
        outputs: output channels of each task, in order, e.g. {"ct": 1, "organs": 6}.
        width: channels of the three stages: (w1, w2, w3), or w for (w, 2w, 4w).
        blocks: residual blocks in each stage.
        residual: "separate" (the paper's: T+1 stacks with weights of their own, merge by concatenation + 1x1) or
            "routed" (the blocks' convolutions are SFG layers, merge by summation; several times cheaper).
        method: "sfg", or another method of `methods.METHODS` except "cross_stitch": the paper's four baselines
            "one_task", "hard_sharing", "constant_mask", "constant_p", or "even_split" or "retrain".
        norm: as in `SFGConv2d`; with `residual="separate"` None or "batch".
        init, estimator: as in `SFGConv2d`.
        noise_on, explore: see `GroupGates`.
        shared: for "constant_mask": the share of a layer's kernels that is shared, one number or one for each layer
            that has a grouping of its own; None: 1/(T+1). The other kernels are split evenly among the tasks.
        dropout: probability with which each channel is zero between two layers or blocks, in training and in
            predictions by draws.

    Raises:
        ValueError: for an unknown `residual` or `method`, a `norm` that separate residual blocks can't have, a `width`
            that is neither a number nor three, several outputs with `method="one_task"`, `method="cross_stitch"` (which
            is the class `CrossStitch`), or values that `shared` or `dropout` can't have.
    """

    per_image = False  # the outputs have a value for each voxel
    least_size = 1
    sizes = ("width", "blocks", "residual")  # the options that set the size of the network

    def __init__(
        self,
        in_channels: int,
        outputs: Mapping[str, int],
        width: int | Sequence[int] = 16,
        blocks: int = 3,
        residual: str = "separate",
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
        widths = _widths(width, residual, norm)
        self.in_channels, self.outputs, self.method = in_channels, dict(outputs), method
        tasks = tuple(outputs)
        options = layer_options(method, tasks, norm, init, estimator)

        stages, channels = [], in_channels
        for stage, wide in enumerate(widths):
            sfg = _layer(channels, wide, options)
            modules: dict[str, nn.Module] = {"sfg": sfg}
            if residual == "separate":
                modules["blocks"] = nn.Sequential(
                    *(StreamBlock(wide, tasks, 2**stage, first=block == 0, norm=norm) for block in range(blocks))
                )
                modules["merge"] = Merge(wide, tasks)
            else:
                modules["blocks"] = nn.Sequential(*_routed(sfg, blocks, stage, options))
            stages.append(nn.ModuleDict(modules))
            channels = wide
        self.stages = nn.ModuleList(stages)
        self.final = nn.Sequential(*(_layer(channels, channels, options) for _ in range(2)))
        self.heads = Heads(channels, outputs)
        self.dropout = ChannelDropout(dropout)
        he_initialise(self)
        start_from_biases(self.heads.conv)
        fix_grouping(self, method, noise_on, explore, shared)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [N, in_channels, H, W] -> {task: [N, outputs[task], H, W]}."""
        parts: list[nn.Module] = []
        for stage in self.stages:
            parts += [stage["sfg"], *stage["blocks"]]  # type: ignore[index]
            parts += [stage["merge"]] if "merge" in stage else []  # type: ignore[index,operator]
        return self.heads(drawn_first(dropout_between([*parts, *self.final], self.dropout), x))

    @staticmethod
    def column(
        in_channels: int,
        task: str,
        outputs: int,
        options: Mapping[str, Any],
        width: int | Sequence[int] = 16,
        blocks: int = 3,
        residual: str = "separate",
    ) -> Column:
        """A network of this architecture for one task. `options` are those of its SFG layers. With
        `residual="separate"` it has one stack of residual blocks in each stage, and nothing to merge."""
        stages: list[list[nn.Module]] = []
        channels = in_channels
        for stage, wide in enumerate(_widths(width, residual, options["norm"])):
            sfg, read = _layer(channels, wide, options), ReadTask(task)
            if residual == "separate":
                plain = (ResidualBlock(wide, 2**stage, block == 0, options["norm"]) for block in range(blocks))
                stages.append([sfg, read, *plain])
            else:
                stages.append([sfg, *_routed(sfg, blocks, stage, options), read])
            channels = wide
        final = [_layer(channels, channels, options), _layer(channels, channels, options), ReadTask(task)]
        head = nn.Conv2d(channels, outputs, 1)
        start_from_biases(head)
        return Column(stages, final, head)


def _widths(width: int | Sequence[int], residual: str, norm: NormName) -> tuple[int, ...]:
    if residual not in RESIDUAL:
        raise ValueError(f"residual={residual!r} is unknown, expected one of {', '.join(RESIDUAL)}")
    if residual == "separate" and norm not in (None, "batch"):
        raise ValueError(
            f"norm={norm!r}: separate residual blocks have 'batch' or None, expected that, or residual='routed'"
        )
    widths = (width, 2 * width, 4 * width) if isinstance(width, int) else tuple(width)
    if len(widths) != 3:
        raise ValueError(f"width={width!r}: expected a number or three, one for each stage")
    return widths


def _layer(channels: int, kernels: int, options: Mapping[str, Any]) -> SFGConv2d:
    return SFGConv2d(channels, kernels, 3, padding=1, activation="relu", **options)


def _routed(trunk: SFGConv2d, blocks: int, stage: int, options: Mapping[str, Any]) -> Iterable[nn.Module]:
    return (RoutedBlock(trunk, 2**stage, **options) for _ in range(blocks))
