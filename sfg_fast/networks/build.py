"""Makes networks by the names that a configuration has for them, and asks any network for its heads and its least
size."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layers.streams import Heads
from ..norm import NormName
from .cross_stitch import CrossStitch
from .highresnet import SFGHighResNet
from .unet import SFGUNet
from .vgg import SFGVGG

NETWORKS: dict[str, Any] = {"highresnet": SFGHighResNet, "vgg": SFGVGG, "unet": SFGUNet}
"""The networks by name. A class says whether its outputs are `per_image`, the `least_size` of its images, and which
options set its size (`sizes`). One that has the option `spatial_dims` reads volumes [N, C, D, H, W] with 3."""


def build(
    name: str,
    in_channels: int,
    outputs: Mapping[str, int],
    method: str = "sfg",
    *,
    norm: NormName = "auto",
    **options: Any,
) -> nn.Module:
    """A network that takes images [N, in_channels, H, W] and returns {task: [N, outputs[task], H, W]}, or {task: [N,
    outputs[task]]} if its outputs are per image. With `spatial_dims=3` images and outputs are [N, C, D, H, W].

    Args:
        name: one of `NETWORKS`.
        method: one of `methods.METHODS`.
        norm: "auto", the network's default (batch norm; of the U-Net instance norm); or as in `SFGConv2d`.
        options: further options of the network (`width`, `spatial_dims`, `init` ..); for one that is None the network
            has a default. The method `cross_stitch` draws nothing, so it ignores `init`, `estimator`, `noise_on` and
            `explore`.

    Raises ValueError for an unknown name, for an option that this network doesn't have, and for values that the network
    refuses.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown, expected one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    own = dict.fromkeys([*network.sizes, *(["spatial_dims"] if reads_volumes(name) else [])])  # each once
    known = (*own, "init", "estimator", "noise_on", "explore", "shared", "dropout")
    given = {option: value for option, value in options.items() if value is not None}
    normed: dict[str, Any] = {} if norm == "auto" else {"norm": norm}
    for option, value in given.items():
        if option not in known:
            raise ValueError(f"{option}={value!r}: {name} has no such option, expected {', '.join(known)}")
    if method == "cross_stitch":
        sizes = {option: value for option, value in given.items() if option in (*own, "dropout")}
        return CrossStitch(network, in_channels, outputs, **normed, **sizes)
    return network(in_channels, outputs, method=method, **normed, **given)


def reads_volumes(name: str) -> bool:
    """Whether the network of this name in `NETWORKS` reads volumes, if it is made with `spatial_dims=3`."""
    return "spatial_dims" in inspect.signature(NETWORKS[name]).parameters


def default_norm(name: str) -> NormName:
    """The norm that the network of this name in `NETWORKS` has if none is asked for."""
    norm: NormName = inspect.signature(NETWORKS[name]).parameters["norm"].default
    return norm


def head_biases(network: Any, task: str) -> list[Tensor]:
    """The biases [outputs] of each head of a task: of its output, and of those that deep supervision adds. Writing to
    these tensors changes the heads."""
    if isinstance(network.heads, nn.ModuleDict):
        return [network.heads[task].bias.data]  # type: ignore[list-item]
    every: list[Heads] = [network.heads, *getattr(network, "coarse_heads", ())]
    return [heads.conv.bias.data[heads.rows(task)] for heads in every if heads.conv.bias is not None]


def least_size(network: Any) -> int:
    """How many voxels the images of the network must have at least along each axis."""
    return network.least_size
