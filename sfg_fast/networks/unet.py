"""`SFGUNet`: nnU-Net's U-Net, plain or with a residual encoder, for images and volumes. All its convolutions but the
heads are SFG layers.

The architecture is that of `PlainConvUNet` and `ResidualEncoderUNet` (Isensee et al., Nature Methods 2021 and MICCAI
2024): convolution -> instance norm -> LeakyReLU; a stage of the encoder starts with a strided convolution; a stage of
the decoder starts with a transposed convolution, whose features are concatenated with those of the encoder. Merges of
groups are sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import LEAKY_SLOPE
from ..groups import FilterGroups
from ..layer import SFGLayer
from ..layers.conv import Features, SFGConv2d, SFGConv3d, SFGConvTranspose2d, SFGConvTranspose3d
from ..layers.streams import Heads
from ..norm import NormName
from ..tracing import in_graph
from .controls import draws_of, pass_through
from .methods import fix_grouping, he_initialise, layer_options
from .parts import ChannelDropout, dropout_between, start_from_biases

DOWN = ("strided", "pooled")
MOST = {2: 512, 3: 320}
"""The most kernels of a layer, for images and for volumes: a stage has twice as many as the one before up to this."""

_CONVOLUTIONS: dict[int, Any] = {2: SFGConv2d, 3: SFGConv3d}
_TRANSPOSED: dict[int, Any] = {2: SFGConvTranspose2d, 3: SFGConvTranspose3d}


class SFGUNet(nn.Module):
    """A multi-task U-Net with stochastic filter groups.

    Images of any size are taken: they are padded by their border at the end of each axis, to a multiple of 2^(stages -
    1), and the outputs are cropped. Height and width become at least twice as large as that number, because
    normalisation needs more than one position in the last stage.

    Args:
        in_channels: channels of the image.
        outputs: output channels of each task, in order, e.g. {"ct": 1, "organs": 6}.
        width: kernels of the layers of each stage: one number for each, or w for w, 2w, 4w .. up to 512 (of volumes:
            320).
        stages: stages of the encoder; each but the first halves the image. The decoder has one fewer.
        blocks: convolutions in each stage of the decoder, and of the encoder. With `residual`: residual blocks of two
            convolutions in each stage of the encoder.
        residual: whether the encoder is one of residual blocks, behind a first convolution.
        down: what halves the image: "strided", the first convolution of a stage; or "pooled", the mean of 2x2 (2x2x2)
            positions before it. (Behind a gate a maximum would tell the gates of undrawn rows nothing.)
        deep_supervision: whether each stage of the decoder has heads, whose outputs the network returns in training.
        spatial_dims: 2, or 3 for volumes.
        method, norm, init, estimator, noise_on, explore, shared, dropout: as in `SFGHighResNet`; method
            "cross_stitch" is refused.

    Raises ValueError for values that these arguments can't have.
    """

    per_image = False  # the outputs have a value for each voxel
    least_size = 1
    sizes = ("width", "stages", "blocks", "residual", "down", "deep_supervision", "spatial_dims")

    def __init__(
        self,
        in_channels: int,
        outputs: Mapping[str, int],
        width: int | Sequence[int] = 32,
        stages: int = 5,
        blocks: int = 2,
        residual: bool = False,
        down: str = "strided",
        deep_supervision: bool = False,
        spatial_dims: int = 2,
        *,
        method: str = "sfg",
        norm: NormName = "instance",
        init: str | Sequence[Any] | Tensor = "uniform",
        estimator: str = "straight_through",
        noise_on: str = "log_p",
        explore: float = 0.0,
        shared: float | Sequence[float] | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(stages, blocks, residual, down, spatial_dims)
        widths = _widths(width, stages, MOST[spatial_dims])
        self.in_channels, self.outputs, self.method = in_channels, dict(outputs), method
        self.dims, self.down, self.cell = spatial_dims, down, 2 ** (stages - 1)
        options = layer_options(method, tuple(outputs), norm, init, estimator)

        self.encoder = nn.ModuleList()
        channels, trunk = in_channels, None
        for stage, wide in enumerate(widths):
            stride = 2 if stage and down == "strided" else 1
            how = spatial_dims, channels, wide, blocks, stride, options
            parts = _residual_stage(*how, trunk) if residual else _plain_stage(*how)
            self.encoder.append(parts)
            channels, trunk = wide, getattr(parts[-1], "trunk", None)
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        for wide in reversed(widths[:-1]):
            up = _TRANSPOSED[spatial_dims](channels, wide, 2, 2, **options | {"norm": None, "bias": True})
            self.ups.append(up)
            self.decoder.append(_plain_stage(spatial_dims, 2 * wide, wide, blocks, 1, options))
            channels = wide
        self.heads = Heads(channels, outputs, spatial_dims)
        coarse = reversed(widths[1:-1]) if deep_supervision else ()
        self.coarse_heads = nn.ModuleList(Heads(wide, outputs, spatial_dims) for wide in coarse)
        self.dropout = ChannelDropout(dropout)
        he_initialise(self)
        for heads in (self.heads, *self.coarse_heads):
            start_from_biases(heads.conv)
        fix_grouping(self, method, noise_on, explore, shared)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x [N, in_channels, H, W] (volumes: [N, in_channels, D, H, W]) -> {task: [N, outputs[task], H, W]}.

        In training with deep supervision each task has a list of outputs: that of all positions, that of every second
        position along each axis, of every fourth, and so on.
        """
        sizes = x.shape[2:]
        decoder = itertools.chain.from_iterable(zip(self.ups, self.decoder, strict=True))
        draws = draws_of(itertools.chain.from_iterable(_parts(one) for one in (*self.encoder, *decoder)))
        y: Any = self._padded(x)
        skips: list[Any] = []
        for stage in self.encoder:
            if skips and self.down == "pooled":
                y = y.channelwise(halved)
            y = self.dropout(pass_through(_parts(stage, self.dropout), y, draws))
            skips.append(y)
        skips.pop()
        levels: list[dict[str, Tensor]] = []  # that of all positions first
        for number, (up, stage) in enumerate(zip(self.ups, self.decoder, strict=True)):
            y = torch.cat([pass_through([up], y, draws), skips.pop()], 1)
            y = pass_through(_parts(stage, self.dropout), y, draws)
            finer = len(self.ups) - 1 - number  # stages that follow
            if not finer or (self.training and len(self.coarse_heads)):
                heads = self.coarse_heads[number] if finer else self.heads
                levels.insert(0, {task: _cropped(one, sizes, 2**finer) for task, one in heads(y).items()})
            y = self.dropout(y) if finer else y
        if len(levels) == 1:
            return levels[0]
        return {task: [level[task] for level in levels] for task in self.outputs}

    def _padded(self, x: Tensor) -> Tensor:
        """The image, padded to a size that the network takes. Raises ValueError for one of another number of axes."""
        if x.dim() != self.dims + 2:
            size = ("D, H, W", "H, W")[self.dims == 2]
            raise ValueError(f"the input has shape {tuple(x.shape)}, expected [N, {self.in_channels}, {size}]")
        cells = [(size + self.cell - 1) // self.cell for size in x.shape[2:]]
        cells[-2:] = (torch.sym_max(count, 2) for count in cells[-2:])
        sizes = [count * self.cell for count in cells]
        return F.pad(x, _behind(x, sizes), "replicate") if in_graph() or x.shape[2:] != torch.Size(sizes) else x


class BasicBlock(nn.Module):
    """A residual block, act(shortcut(x) + SFG(SFG(x))), nnU-Net's `BasicBlockD`. Where it halves the image, the
    shortcut takes the mean of 2x2 (2x2x2) positions; where it changes the number of channels, a 1x1 SFG layer follows.

    What is added has one grouping: that of this 1x1 layer, or, without one, that of x.

    Args:
        dims: 2, or 3 for volumes.
        stride: 1, or 2 to halve the image.
        trunk: the layer that has the grouping of x.
        options: those of the SFG layers.

    Attributes:
        drawn: the layers that need a draw, in the order of the arguments of `forward`.
        trunk: the layer that has the grouping of the block's features.
    """

    def __init__(
        self, dims: int, channels: int, kernels: int, stride: int, trunk: SFGLayer, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        layer = _CONVOLUTIONS[dims]
        self.stride = stride
        self.conv1 = layer(channels, kernels, 3, stride, 1, activation="leaky_relu", **options)
        self.conv2 = layer(kernels, kernels, 3, 1, 1, **options)
        self.project = layer(channels, kernels, 1, **options) if channels != kernels else None
        self._trunk = (trunk if self.project is None else self.project,)  # in a tuple: not a submodule
        self.conv2.share_grouping(self.trunk)

    @property
    def trunk(self) -> SFGLayer:
        """See `Attributes`."""
        return self._trunk[0]

    @property
    def drawn(self) -> list[nn.Module]:
        """See `Attributes`."""
        return [self.conv1] if self.project is None else [self.conv1, self.project]

    def forward(
        self, x: Features, groups: FilterGroups | None = None, of_shortcut: FilterGroups | None = None
    ) -> Features:
        """x [N, C, H, W] -> [N, K, H / stride, W / stride]. `groups`, `of_shortcut`: draws for the first layer and for
        that of the shortcut, instead of new ones."""
        shortcut: Any = x
        if self.stride == 2:
            shortcut = x.channelwise(halved)
        if self.project is not None:
            shortcut = self.project(shortcut, of_shortcut)
        y = self.conv2(self.conv1(x, groups), groups=shortcut.groups, residual=shortcut)
        return y.channelwise(leaky_relu_behind_gate)


def halved(x: Tensor) -> Tensor:
    """The means of 2x2 (2x2x2) positions. (Torch has no such mean of volumes in bfloat16 on a CPU.)"""
    pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
    return pool(x.to(torch.promote_types(x.dtype, torch.float32)), 2).to(x.dtype)


def leaky_relu_behind_gate(x: Tensor) -> Tensor:
    """LeakyReLU of slope `LEAKY_SLOPE`. At zero, where the undrawn rows of features are, its slope is the mean of both
    slopes, 0.505: with torch's, 0.01, the gates of undrawn rows would get nearly no gradient."""
    return torch.add((1 + LEAKY_SLOPE) / 2 * x, x.abs(), alpha=(1 - LEAKY_SLOPE) / 2)


def _plain_stage(
    dims: int, channels: int, wide: int, blocks: int, stride: int, options: Mapping[str, Any]
) -> nn.Sequential:
    """SFG layers, the first of which has the stride."""
    sizes = [(channels, stride)] + [(wide, 1)] * (blocks - 1)
    layer = _CONVOLUTIONS[dims]
    return nn.Sequential(*(layer(c, wide, 3, one, 1, activation="leaky_relu", **options) for c, one in sizes))


def _residual_stage(
    dims: int,
    channels: int,
    wide: int,
    blocks: int,
    stride: int,
    options: Mapping[str, Any],
    trunk: SFGLayer | None,
) -> nn.Sequential:
    """Residual blocks, the first of which has the stride. `trunk`: the layer that has the grouping of their input;
    None: the input is the image, so a convolution stands before the blocks."""
    parts: list[nn.Module] = []
    if trunk is None:
        trunk = _CONVOLUTIONS[dims](channels, wide, 3, stride, 1, activation="leaky_relu", **options)
        parts, channels, stride = [trunk], wide, 1
    for _ in range(blocks):
        block = BasicBlock(dims, channels, wide, stride, trunk, options)
        parts.append(block)
        trunk, channels, stride = block.trunk, wide, 1
    return nn.Sequential(*parts)


def _parts(stage: nn.Module, dropout: nn.Module | None = None) -> list[nn.Module]:
    """The parts of a stage, with `dropout` between two of them."""
    parts = list(stage) if isinstance(stage, nn.Sequential) else [stage]
    return parts if dropout is None else dropout_between(parts, dropout)


def _check(stages: int, blocks: int, residual: Any, down: str, spatial_dims: int) -> None:
    if stages < 2:
        raise ValueError(f"stages={stages}: expected at least 2, one of which halves the image")
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: expected at least 1 in each stage")
    if not isinstance(residual, bool):
        raise ValueError(
            f"residual={residual!r}: expected True or False, whether the encoder is one of residual blocks"
        )
    if down not in DOWN:
        raise ValueError(f"down={down!r} is unknown, expected one of {', '.join(DOWN)}")
    if spatial_dims not in _CONVOLUTIONS:
        raise ValueError(f"spatial_dims={spatial_dims!r}: expected 2, or 3 for volumes")


def _widths(width: int | Sequence[int], stages: int, most: int) -> tuple[int, ...]:
    if isinstance(width, int):
        return tuple(min(width * 2**stage, max(most, width)) for stage in range(stages))
    if len(width) != stages:
        raise ValueError(f"width={width!r}: expected a number, or {stages}, one for each stage")
    return tuple(width)


def _cropped(y: Tensor, sizes: Sequence[int], stride: int) -> Tensor:
    """The outputs [N, C, ..] of every `stride`-th position of an image of these sizes, without those of the padding."""
    sizes = [(size + stride - 1) // stride for size in sizes]
    return F.pad(y, _behind(y, sizes)) if in_graph() or y.shape[2:] != torch.Size(sizes) else y


def _behind(x: Tensor, sizes: Sequence[int]) -> list[int]:
    """By how much x [N, C, ..] has to be padded at the end of each axis to have these sizes, as `F.pad` wants it. (In
    a graph F.pad is called whatever the sizes are, and with negative numbers for less: then the graph takes any
    size.)"""
    more = [wanted - size for wanted, size in zip(sizes, x.shape[2:], strict=True)]
    return [pad for one in reversed(more) for pad in (0, one)]
