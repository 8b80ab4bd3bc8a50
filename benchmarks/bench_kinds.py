"""What norms and other kinds of convolution cost: a training step of two SFG layers against dense masking, and against
two plain layers of torch.

    python -m benchmarks.bench_kinds [FILE.md]

The first layer is a 3x3 convolution, the second one of the row's kind; both have the row's norm and a leaky ReLU, two
tasks, and an even split of their kernels. The loss is a mean of squares of what both tasks read. Dense masking is
`backend("reference")`; it and the plain layers are in the faster of their memory formats. "Per FLOP" divides the ratio
of times, of a step of `selected` to the plain layers, by the ratio of the FLOPs that the kernels and torch need for it
(5/9 between two layers with an even split, all for the image), counted by torch's FlopCounterMode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import cell, machine, ratio
from sfg_fast import (
    SFGConv2d,
    SFGConv3d,
    SFGConvTranspose2d,
    SFGConvTranspose3d,
    backend,
    set_estimator,
)
from sfg_fast.gpu.timing import interleaved
from sfg_fast.layer import SFGLayer

BATCH, SIZE = 4, 96


class Kind(NamedTuple):
    """A row of the table."""

    title: str
    norm: Any = "instance"
    second: tuple[type[SFGLayer], dict[str, Any]] = (SFGConv2d, {"kernel_size": 3, "padding": 1})
    depthwise: bool = False
    dims: int = 2


KINDS = [
    Kind("no norm", None),
    Kind("batch norm", "batch"),
    Kind("instance norm"),
    Kind("group norm, 8 groups", ("group", {"num_groups": 8})),
    Kind("layer norm", "layer"),
    Kind("transposed, 2x2, stride 2", second=(SFGConvTranspose2d, {"kernel_size": 2, "stride": 2})),
    Kind("transposed, 3x3, stride 2",
         second=(SFGConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1})),
    Kind("4 groups of channels", "batch", (SFGConv2d, {"kernel_size": 3, "padding": 1, "groups": 4})),
    Kind("depthwise", "batch", (SFGConv2d, {"kernel_size": 3, "padding": 1}), True),
    Kind("volumes, 3x3x3", second=(SFGConv3d, {"kernel_size": 3, "padding": 1}), dims=3),
    Kind("volumes, transposed, 2x2x2, stride 2", second=(SFGConvTranspose3d, {"kernel_size": 2, "stride": 2}), dims=3),
]  # fmt: skip


class Two(nn.Module):
    """Two SFG layers. Every draw gives an even split, but p is learnt."""

    def __init__(self, kind: Kind, width: int) -> None:
        super().__init__()
        how: dict[str, Any] = {"norm": kind.norm, "bias": kind.norm is None, "activation": "leaky_relu"}
        layer, geometry = kind.second
        groups = {"groups": width} if kind.depthwise else {}
        self.first = (SFGConv2d if kind.dims == 2 else SFGConv3d)(width, width, 3, padding=1, **how)
        self.second = layer(width, width, **geometry, **groups, **how)  # type: ignore[call-arg]
        self.depthwise = kind.depthwise
        for one in (self.first, self.second):
            one.logits.data = 60.0 * F.one_hot(torch.arange(width) * 3 // width, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.first(x)
        features = self.second(features, features.groups if self.depthwise else None)
        return [features.merged(task) for task in features.groups.tasks]


def plain(network: Two, kind: Kind, width: int) -> nn.Module:
    """The same two layers of torch."""
    parts: list[nn.Module] = []
    name, options = kind.norm if isinstance(kind.norm, tuple) else (kind.norm, {})
    batch, instance = (nn.BatchNorm2d, nn.InstanceNorm2d) if kind.dims == 2 else (nn.BatchNorm3d, nn.InstanceNorm3d)
    norms: dict[Any, Callable[[], nn.Module]] = {
        "batch": lambda: batch(width),
        "instance": lambda: instance(width, affine=True),
        "group": lambda: nn.GroupNorm(options["num_groups"], width),
        "layer": lambda: LayerNorm(width),
    }
    for layer in (network.first, network.second):
        names = ("stride", "padding", "dilation", "groups") + ("output_padding",) * layer.transposed
        given = {one: getattr(layer, one) for one in names}
        kind_of_layer: Any = layer.PLAIN
        parts.append(kind_of_layer(width, width, layer.kernel_size, bias=layer.bias is not None, **given))
        parts += [norms[name]()] if name else []
        parts.append(nn.LeakyReLU(inplace=True))
    return nn.Sequential(*parts)


class LayerNorm(nn.LayerNorm):
    """Over the channels, at each position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def step(network: nn.Module, x: Tensor, name: str = "auto") -> Callable[[], None]:
    def run() -> None:
        for parameter in network.parameters():
            parameter.grad = None
        with backend(name):
            out = network(x)
            torch.stack([y.square().mean() for y in (out if isinstance(out, list) else [out])]).sum().backward()

    return run


def flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


def row(kind: Kind, width: int, rounds: int) -> str:
    torch.manual_seed(0)
    size = (SIZE, SIZE) if kind.dims == 2 else (16, 32, 32)
    x = torch.randn(BATCH, width, *size)
    last = x.to(memory_format=torch.channels_last if kind.dims == 2 else torch.channels_last_3d)
    networks = {"dense": Two(kind, width), "straight_through": Two(kind, width), "selected": Two(kind, width)}
    set_estimator(networks["selected"], "selected")
    of_torch = plain(networks["dense"], kind, width)
    runs = {name: step(network, x, "reference" if name == "dense" else "auto") for name, network in networks.items()}
    runs |= {
        "plain": step(of_torch, x),
        "plain, last": step(of_torch, last),
        "dense, last": step(networks["dense"], last, "reference"),
    }
    share = flops(runs["selected"]) / flops(runs["plain"])
    times = interleaved(runs, rounds)
    for name in ("plain", "dense"):
        times[name] = [min(pair) for pair in zip(times[name], times.pop(f"{name}, last"), strict=True)]
    pairs = [("dense", "straight_through"), ("dense", "selected"), ("straight_through", "plain"), ("selected", "plain")]
    found = [ratio(times, *pair) for pair in pairs]
    per_flop = tuple(value / share for value in found[-1])
    return f"| {kind.title} | {width} | " + " | ".join(map(cell, [*found, per_flop])) + f" | {share:.2f} |"  # type: ignore


HEADER = """| second layer, norm of both | channels | dense / straight_through | dense / selected \
| straight_through / plain | selected / plain | per FLOP | FLOPs of selected / plain |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    rounds = 3
    rows = [row(kind, width, rounds) for kind in KINDS for width in (32,)]
    lines = [
        "# Norms, and other kinds of convolution",
        f"`python -m benchmarks.bench_kinds`. {machine()}. Batch {BATCH}, {SIZE}x{SIZE} (volumes 16x32x32), two tasks. "
        f"Medians (quartiles) of {rounds} interleaved rounds. Volumes and grouped convolutions run on `masked`.",
        "\n".join([HEADER, *rows]),
    ]
    print("\n\n".join(lines))
    for path in sys.argv[1:]:
        with open(path, "w") as file:
            file.write("\n\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
