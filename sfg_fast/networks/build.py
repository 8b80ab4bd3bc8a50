"""Networks by name, as a configuration asks for them, and what one asks of any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layers.streams import Heads
from .cross_stitch import CrossStitch
from .highresnet import SFGHighResNet
from .vgg import SFGVGG

NETWORKS: dict[str, Any] = {"highresnet": SFGHighResNet, "vgg": SFGVGG}
"""Each says whether its outputs are `per_image`, its `least_size`, and which options it has for its `sizes`."""


def build(
    name: str,
    in_channels: int,
    outputs: Mapping[str, int],
    method: str = "sfg",
    *,
    norm: str | None = "batch",
    **options: Any,
) -> nn.Module:
    """A network for images [N, in_channels, H, W] -> {task: outputs[task] channels, or numbers for each image}.

    Args:
        name: one of `NETWORKS`.
        method: one of `methods.METHODS`.
        norm: "batch", or None for none.
        options: further ones of the network (`width`, `init` ..); those that are None are left to it. With the method
            `cross_stitch` nothing is drawn, so `init`, `estimator`, `noise_on` and `explore` say nothing.

    Raises ValueError for an unknown name, an option that this network doesn't have, and as the network does.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown, expected one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    known = (*network.sizes, "init", "estimator", "noise_on", "explore", "shared", "dropout")
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if option not in known:
            raise ValueError(f"{option}={value!r}: {name} has no such option, expected {', '.join(known)}")
    if method == "cross_stitch":
        sizes = {option: value for option, value in given.items() if option in (*network.sizes, "dropout")}
        return CrossStitch(network, in_channels, outputs, norm=norm, **sizes)
    return network(in_channels, outputs, method=method, norm=norm, **given)


def head_bias(network: Any, task: str) -> Tensor:
    """The biases [outputs] of a task's head, to be written to."""
    heads = network.heads
    if isinstance(heads, Heads):
        assert heads.conv.bias is not None
        return heads.conv.bias.data[heads.rows(task)]
    return heads[task].bias.data


def least_size(network: Any) -> int:
    """Rows and columns of the smallest image that the network takes."""
    return network.least_size
