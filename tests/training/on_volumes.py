"""A small network that reads volumes, for tests of what is around a network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfg_fast.layers.conv import SFGConv2d
from sfg_fast.networks.methods import fix_grouping, layer_options


class OnVolumes(nn.Module):
    """An SFG layer on each slice of the volume, and behind it for each task a convolution of 3 x 3 x 3 voxels."""

    per_image = False
    least_size = 2
    sizes = ("width",)

    def __init__(
        self,
        in_channels: int,
        outputs: Mapping[str, int],
        width: int = 4,
        *,
        spatial_dims: int = 2,
        method: str = "sfg",
        norm: str | None = "batch",
        init: Any = "uniform",
        estimator: str = "straight_through",
        noise_on: str = "log_p",
        explore: float = 0.0,
        shared: Any = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert spatial_dims == 3
        options = layer_options(method, tuple(outputs), norm, init, estimator)
        self.layer = SFGConv2d(in_channels, width, 3, padding=1, activation="relu", **options)
        self.heads = nn.ModuleDict({task: nn.Conv3d(width, size, 3, padding=1) for task, size in outputs.items()})
        fix_grouping(self, method, noise_on, explore, shared)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [N, in_channels, D, H, W] -> {task: [N, outputs[task], D, H, W]}."""
        features = self.layer(torch.cat(list(x.unbind(2))))  # slice by slice, all N of each
        depth = x.shape[2]
        return {
            task: head(features.merged(task).unflatten(0, (depth, -1)).movedim(0, 2))
            for task, head in self.heads.items()
        }
