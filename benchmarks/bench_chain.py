"""The cost of learning the grouping: a training step of five SFG layers against one plain network of the same width.

    python -m benchmarks.bench_chain [FILE.md]

The SFG network has five 3x3 layers with ReLU, two tasks, 1x1 heads, and mean squared error as loss. "Plain" is five
torch convolutions with ReLU and one head for both tasks, in channels_last, which is its faster memory format in most
rows; the contiguous format has a column of its own. Dense masking is `backend("reference")`, which runs as fast as a
plain script (reference.md), in its faster format. A split names the share of shared kernels; the others are split
evenly. p is one (up to rounding) for the wanted groups, so that every draw gives this split and all gates still get
their gradient. The work of a layer between two others, counted in plain convolutions, is 2 + s + sum of c_t k_t for
`straight_through`, 9 for dense masking, and 3 for a plain layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import machine, ratio
from sfg_fast import SFGConv2d, backend, set_estimator
from sfg_fast.gpu.timing import interleaved
from sfg_fast.layers.streams import Heads

LAYERS, BATCH, SIZE = 5, 4, 128
SHARED = {"even": 1 / 3, "0.6 shared": 0.6, "0.9 shared": 0.9, "all shared": 1.0}
EVERY = 4


class Chain(nn.Module):
    """The SFG network, every draw of which has the given share of shared kernels."""

    def __init__(self, width: int, norm: str | None, shared: float) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": 1, "norm": norm, "bias": norm is None, "activation": "relu"}
        self.layers = nn.Sequential(*(SFGConv2d(width, width, 3, **options) for _ in range(LAYERS)))
        self.heads = Heads(width, {"task1": 1, "task2": 1})
        own = round(width * (1 - shared) / 2)
        groups = torch.repeat_interleave(torch.arange(3), torch.tensor([width - 2 * own, own, own]))
        for layer in self.layers:
            layer.logits.data = 60.0 * F.one_hot(groups, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.heads(self.layers(x)).values()), 1)


def plain(width: int, norm: str | None) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=norm is None)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 2, 1))


def step(network: nn.Module, x: Tensor, y: Tensor, name: str = "auto") -> Callable[[], None]:
    def run() -> None:
        for parameter in network.parameters():
            parameter.grad = None
        with backend(name):
            F.mse_loss(network(x), y).backward()

    return run


def contestants(width: int, norm: str | None, shared: float) -> dict[str, Callable[[], None]]:
    x, y = torch.randn(BATCH, width, SIZE, SIZE), torch.randn(BATCH, 2, SIZE, SIZE)
    last = x.to(memory_format=torch.channels_last)
    model = Chain(width, norm, shared)
    runs = {
        "plain": step(plain(width, norm).to(memory_format=torch.channels_last), last, y),  # type: ignore[call-overload]
        "plain, contiguous": step(plain(width, norm), x, y),
        "dense": step(model, x, y, "reference"),
        "dense, channels_last": step(model, last, y, "reference"),
    }
    for name, every in (("straight_through", 1), ("selected", 1), ("straight_through", EVERY)):
        own = Chain(width, norm, shared)
        set_estimator(own, name, every)
        runs[f"{name}, every={every}" if every > 1 else name] = repeated(step(own, x, y), every)
    return runs


def repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(times):
            run()

    return several


def row(width: int, norm: str | None, split: str, rounds: int) -> str:
    times = interleaved(contestants(width, norm, SHARED[split]), rounds)
    every = f"straight_through, every={EVERY}"
    times[every] = [seconds / EVERY for seconds in times[every]]
    times["dense"] = [min(pair) for pair in zip(times["dense"], times.pop("dense, channels_last"), strict=True)]
    pairs = [
        ("straight_through", "plain"),
        ("straight_through", "dense"),
        ("selected", "plain"),
        (every, "selected"),
        ("plain, contiguous", "plain"),
    ]
    cells = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, *pair)) for pair in pairs]
    return " | ".join([f"| {width}, {norm or 'no'} norm", split, *cells]) + " |"


HEADER = f"""| kernels | split | straight_through / plain | straight_through / dense masking | selected / plain \
| every={EVERY} / selected | plain, contiguous / plain |
|---|---|---|---|---|---|---|"""


def main() -> None:
    rounds = 15
    rows = [
        row(width, norm, split, rounds)
        for norm in (None, "batch")
        for width in (32, 64)
        for split in (SHARED if norm is None else ("even",))
    ]
    text = (
        f"# A training step of five SFG layers\n\n`python -m benchmarks.bench_chain`. {machine()}. Batch {BATCH}, "
        f"{SIZE}x{SIZE}. Medians (quartiles) of {rounds} interleaved rounds.\n\n" + "\n".join([HEADER, *rows]) + "\n"
    )
    print(text)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            file.write(text)


if __name__ == "__main__":
    main()
