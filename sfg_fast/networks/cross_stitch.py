"""Cross-stitch networks (Misra, Shrivastava, Gupta, Hebert, CVPR 2016, arXiv 1604.03539): a network for each task, all
of one architecture and full width; after each stage every one goes on with a mixture of all, whose weights are learnt.

The paper starts from networks that were trained for their tasks alone; here all is learnt together from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..reference import SFGConv2d
from .methods import he_initialise, layer_options
from .parts import ChannelDropout, check_size

OWN = 0.9
"""What a task's own network counts at the start; the others share the rest."""


class CrossStitchUnit(nn.Module):
    """y[t, c] = sum over s of alpha[t, s, c] x[s, c], for the features x of all tasks.

    Attributes:
        alpha: [T, T, C], at the start 0.9 where s = t, the rest in equal parts elsewhere. Nothing should decay it
            (`parameter_groups` sees to that): decay would draw the networks' features towards zero.
    """

    not_decayed = ("alpha",)

    def __init__(self, tasks: int, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(tasks, tasks, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        tasks = len(self.alpha)
        own = OWN if tasks > 1 else 1.0
        start = torch.full((tasks, tasks), (1 - own) / max(tasks - 1, 1)).fill_diagonal_(own)
        self.alpha.copy_(start[:, :, None].expand_as(self.alpha))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """T tensors [N, C, H, W] -> T tensors."""
        alpha = self.alpha.to(features[0].dtype)[..., None, None]
        mixtures = []
        for row in alpha:
            mixture = row[0] * features[0]
            for weight, x in zip(row[1:], features[1:], strict=True):
                mixture = torch.addcmul(mixture, weight, x)
            mixtures.append(mixture)
        return mixtures


class _Column(nn.Module):
    def __init__(self, stages: Sequence[Sequence[nn.Module]], final: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        self.final = nn.Sequential(*final)


class CrossStitch(nn.Module):
    """Networks of one architecture, one for each task, with cross-stitch units after their stages.

    Args:
        network: the architecture, `SFGVGG` (units after each pooling) or `SFGHighResNet` (after each of three stages;
            with `residual="separate"` each network has one stack of residual blocks in a stage, and the unit stands
            where the streams would be merged).
        in_channels, outputs: as the architecture's.
        norm: as in `SFGConv2d`.
        dropout: probability with which each channel is zero behind a unit, as in `SFGHighResNet`.
        sizes: options of the architecture that say how large it is (`network.sizes`).

    Its convolutions are SFG layers whose kernels are all fixed in the group of their network's task, so that all that
    acts on SFG layers (`penalties`, `recalibrate`, `freeze`) acts on them.
    """

    method = "cross_stitch"

    def __init__(
        self,
        network: Any,
        in_channels: int,
        outputs: Mapping[str, int],
        *,
        norm: str | None = "batch",
        dropout: float = 0.0,
        **sizes: Any,
    ) -> None:
        super().__init__()
        tasks = tuple(outputs)
        self.in_channels, self.outputs = in_channels, dict(outputs)
        self.per_image, self.least_size = network.per_image, network.least_size
        options = layer_options("retrain", tasks, norm, "uniform", "none")
        columns = [network.column(in_channels, task, outputs[task], options, **sizes) for task in tasks]
        self.columns = nn.ModuleList(_Column(column.stages, column.final) for column in columns)
        self.heads = nn.ModuleDict({task: column.head for task, column in zip(tasks, columns, strict=True)})
        self.dropout = ChannelDropout(dropout)
        he_initialise(self.columns)
        for group, column in enumerate(self.columns, 1):
            for module in column.modules():
                if isinstance(module, SFGConv2d):
                    module.estimator = "none"
                    if not module.shares_grouping:
                        module.assign([group] * module.out_channels)
        widths = [stage[0].out_channels for stage in columns[0].stages]
        self.units = nn.ModuleList(CrossStitchUnit(len(tasks), channels) for channels in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [N, in_channels, H, W] -> {task: outputs as the architecture's}."""
        check_size(x, self.least_size)
        columns: Any = self.columns
        features = [x] * len(columns)
        for unit, stages in zip(self.units, zip(*(column.stages for column in columns), strict=True), strict=True):
            features = unit([stage(y) for stage, y in zip(stages, features, strict=True)])
            features = [self.dropout(y) for y in features]
        return {
            task: self.heads[task](column.final(y))
            for task, column, y in zip(self.outputs, columns, features, strict=True)
            if task in self.heads  # a frozen network may have lost some
        }
