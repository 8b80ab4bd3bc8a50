"""Cross-stitch networks (Misra, Shrivastava, Gupta, Hebert, CVPR 2016, arXiv 1604.03539).

There is a network for each task; all have the same architecture and full width. After each stage every network goes on
with a mixture of the features of all networks. The weights of the mixtures are learnt.

Misra et al. start from networks that were trained for one task each; here all weights are learnt together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import SFGLayer
from ..norm import NormName
from .methods import he_initialise, layer_options
from .parts import ChannelDropout, check_size

OWN = 0.9
"""The weight of a task's own network at the start; the other networks share the rest."""


class CrossStitchUnit(nn.Module):
    """Computes y[t, c] = sum over s of alpha[t, s, c] x[s, c] from the features x of all tasks.

    Attributes:
        alpha: the weights [T, T, C]. At the start they are 0.9 where s = t; the rest is shared equally. Weight decay
            would draw the networks' features towards zero, so `parameter_groups` gives alpha none.
    """

    not_decayed = ("alpha",)

    def __init__(self, tasks: int, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(tasks, tasks, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set alpha to the weights of the start."""
        tasks = len(self.alpha)
        own = OWN if tasks > 1 else 1.0
        start = torch.full((tasks, tasks), (1 - own) / max(tasks - 1, 1)).fill_diagonal_(own)
        self.alpha.copy_(start[:, :, None].expand_as(self.alpha))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of the T tasks, each [N, C, H, W] -> mixtures for the T tasks, of the same shape."""
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
    """A network for each task, all of one architecture, with cross-stitch units after the stages.

    Args:
        network: the architecture, `SFGVGG` (units after each pooling) or `SFGHighResNet` (after each of three stages;
            with `residual="separate"` each network has one stack of residual blocks in a stage, and the unit stands
            where the streams would be merged).
        in_channels, outputs: as in the architecture.
        norm: as in `SFGConv2d`; of `SFGHighResNet` with `residual="separate"` None or "batch".
        dropout: probability with which each channel is zero behind a unit, as in `SFGHighResNet`.
        sizes: options of the architecture that set its size (`network.sizes`).

    The convolutions are SFG layers. All kernels of a network are fixed in the group of its task, so that functions for
    SFG layers (`penalties`, `recalibrate`, `freeze`) work here, too.
    """

    method = "cross_stitch"

    def __init__(
        self,
        network: Any,
        in_channels: int,
        outputs: Mapping[str, int],
        *,
        norm: NormName = "batch",
        dropout: float = 0.0,
        **sizes: Any,
    ) -> None:
        super().__init__()
        if not hasattr(network, "column"):
            raise ValueError(
                f"method='cross_stitch': {network.__name__} has no stages for cross-stitch units, expected "
                "highresnet or vgg"
            )
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
                if isinstance(module, SFGLayer):
                    module.estimator = "none"
                    if not module.shares_grouping:
                        module.assign([group] * module.out_channels)
        widths = [stage[0].out_channels for stage in columns[0].stages]
        self.units = nn.ModuleList(CrossStitchUnit(len(tasks), channels) for channels in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [N, in_channels, H, W] -> {task: output}, of the shapes that the architecture gives."""
        check_size(x, self.least_size)
        columns: Any = self.columns
        features = [x] * len(columns)
        for unit, stages in zip(self.units, zip(*(column.stages for column in columns), strict=True), strict=True):
            features = unit([stage(y) for stage, y in zip(stages, features, strict=True)])
            features = [self.dropout(y) for y in features]
        return {
            task: self.heads[task](column.final(y))
            for task, column, y in zip(self.outputs, columns, features, strict=True)
            if task in self.heads  # a frozen network may have fewer heads
        }
