"""Whole networks: a training step, inference and memory, against everything one could use instead.

    python -m benchmarks.bench_networks [FILE.md] [--networks routed separate vgg] [--sizes 96 160] [--rounds 9]

The paper's widths (16, 32, 64; three blocks a stage; VGG-11 of width 32), two tasks, batches of 4, mean squares as
loss, no optimiser. Ratios are medians (quartiles) of interleaved rounds. Each is taken in its faster memory format.

    dense masking   `PlainNetwork` in plain torch (plain_network.py), or `backend("reference")` for the VGG, which runs
                    as fast as a plain script (results/reference.md); eager, and compiled by torch.compile
    masked          ours on `backend("masked")`: one torch convolution on the packed tensor
    ours            straight_through (default), selected, straight_through with every=4
    one plain       ONE network of plain convolutions of the same widths: no tasks, nothing to learn about sharing
    MONAI           its HighResNet of these widths; it has no layers between the stages and two fewer at the end

Inference: the frozen network (`freeze`, groupings drawn with p(shared) = 0.6), and itself, against two plain ones.
Memory: the most that a process of its own has resident in a training step, less what it has before.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.interleaved import interleaved, machine, ratio, resident
from benchmarks.plain_network import PlainNetwork
from sfg_fast import SFGVGG, SFGHighResNet, assign, backend, freeze, recalibrate, set_estimator
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.networks.vgg import VGG11

EVERY = 4
OUTPUTS = {"ct": 1, "organs": 6}
Step = Callable[[], None]


class Case(NamedTuple):
    """Which network, and how large."""

    kind: str  # routed, separate or vgg
    size: int
    batch: int = 4
    widths: tuple[int, int, int] = (16, 32, 64)  # of the stages; the VGG starts with the second
    blocks: int = 3
    device: str = "cpu"
    half: torch.dtype | None = None  # of autocast

    def image(self) -> Tensor:
        return torch.randn(self.batch, 1, self.size, self.size, device=self.device)

    def __str__(self) -> str:
        return f"{self.kind}, {self.size}x{self.size}"


class PlainBlock(nn.Module):
    def __init__(self, k: int, d: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(conv_norm(k, k, d, relu) for relu in (True, False)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def conv_norm(c: int, k: int, d: int = 1, relu: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(c, k, 3, padding=d, dilation=d, bias=False), nn.BatchNorm2d(k)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class PlainVGG(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers, c = [], 1
        for size in VGG11:
            layers.append(nn.MaxPool2d(2) if size == "pool" else conv_norm(c, width * int(size)))
            c = c if size == "pool" else width * int(size)
        self.features, self.head = nn.Sequential(*layers), nn.Linear(c, sum(OUTPUTS.values()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def plain(case: Case) -> nn.Module:
    """One network of the same convolutions as `routed`, without groups; also what `separate` is compared with."""
    if case.kind == "vgg":
        return PlainVGG(case.widths[1])
    layers, c = [], 1
    for stage, k in enumerate(case.widths):
        layers += [conv_norm(c, k), *(PlainBlock(k, 2**stage) for _ in range(case.blocks))]
        c = k
    return nn.Sequential(*layers, conv_norm(c, c), conv_norm(c, c), nn.Conv2d(c, sum(OUTPUTS.values()), 1))


def monai(case: Case) -> nn.Module:
    from monai.networks.nets import HighResNet

    first = {"name": "conv_0", "n_features": case.widths[0], "kernel_size": 3}
    blocks = [
        {"name": f"res_{stage}", "n_features": k, "kernels": (3, 3), "repeat": case.blocks}
        for stage, k in enumerate(case.widths)
    ]
    last = [
        {"name": "conv_1", "n_features": case.widths[-1], "kernel_size": 1},
        {"name": "conv_2", "kernel_size": 1},
    ]
    return HighResNet(2, 1, sum(OUTPUTS.values()), layer_params=(first, *blocks, *last))


def ours(case: Case) -> nn.Module:
    if case.kind == "vgg":
        return SFGVGG(1, OUTPUTS, case.widths[1])
    return SFGHighResNet(1, OUTPUTS, case.widths, case.blocks, case.kind)


def step(network: nn.Module, case: Case, name: str = "auto", last: bool = False, times: int = 1) -> Step:
    """Forward and backward."""
    network, x = network.to(case.device), case.image()
    if last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def run() -> None:
        for _ in range(times):
            for parameter in network.parameters():
                parameter.grad = None
            with backend(name), torch.autocast(case.device, case.half, case.half is not None):
                y = network(x)
                outputs = y.values() if isinstance(y, dict) else y if isinstance(y, list) else [y]
                sum(out.square().mean() for out in outputs).backward()

    return run


def contestant(case: Case, name: str, fast: str = "auto") -> Step:
    """A training step of one of them; `name` may end in ", channels_last". `fast`: the backend of ours."""
    what, _, layout = name.partition(", ")
    last = layout == "channels_last"
    if what in ("dense", "dense compiled"):
        if case.kind == "vgg":
            return step(ours(case), case, "reference", last)
        network: nn.Module = PlainNetwork((1, 6), case.widths, case.blocks, case.kind)
        return step(torch.compile(network) if what == "dense compiled" else network, case, last=last)  # type: ignore[arg-type]
    if what in ("one plain", "one plain compiled"):
        network = plain(case)
        return step(torch.compile(network) if what == "one plain compiled" else network, case, last=last)  # type: ignore[arg-type]
    if what == "MONAI":
        return step(monai(case), case, last=last)
    network = ours(case)
    if what == "masked":
        return step(network, case, "masked", last)
    estimator, _, every = what.partition("=")
    set_estimator(network, estimator, int(every or 1))
    return step(network, case, fast, fast == "triton", int(every or 1))


def names(kind: str) -> list[str]:
    every = ["dense", "masked", "one plain", "one plain compiled"]
    every += [] if kind == "vgg" else ["dense compiled", "MONAI"]
    both = [name + layout for name in every for layout in ("", ", channels_last")]
    return [*both, "straight_through", "selected", f"straight_through={EVERY}"]


def faster(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each in its faster memory format; the faster of eager and compiled ones; `every` for one step."""
    found = dict(times)
    for name in [name for name in found if ", " not in name and name + ", channels_last" in found]:
        found[name] = min(found[name], found.pop(name + ", channels_last"), key=statistics.median)
    for name in ("dense", "one plain"):
        both = [found[one] for one in (name, f"{name} compiled") if one in found]
        if both:
            found[f"{name} faster"] = min(both, key=statistics.median)
    several = f"straight_through={EVERY}"
    if several in found:
        found[several] = [t / EVERY for t in found[several]]
    return found


def training(case: Case, rounds: int) -> list[str]:
    times = faster(interleaved({name: contestant(case, name) for name in names(case.kind)}, rounds))
    pairs = [
        ("dense faster", "straight_through"),
        ("dense faster", f"straight_through={EVERY}"),
        ("dense faster", "selected"),
        ("dense faster", "masked"),
        ("straight_through", "one plain"),
        ("straight_through", "one plain faster"),
        ("straight_through", "MONAI" if "MONAI" in times else "one plain"),
        ("dense", "dense faster"),
    ]
    return [str(case), *("{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, *pair)) for pair in pairs)]


def inferences(case: Case, fast: str = "auto") -> dict[str, Step]:
    """Contestants of inference: the frozen network, the network itself, two plain ones ("two plain")."""
    torch.manual_seed(0)
    network, x, side = ours(case).to(case.device), case.image(), min(case.size, 64)
    p = torch.tensor([0.6, 0.2, 0.2])
    assign(network, {n: torch.multinomial(p, m.out_channels, True) for n, m in sfg_layers(network).items()})
    recalibrate(network, [torch.randn(2, 1, side, side, device=case.device)])
    network.eval()

    def run(models: list[nn.Module], last: bool) -> Step:
        layout = torch.channels_last if last else torch.contiguous_format
        image = x.to(memory_format=layout)
        models = [model.eval().to(case.device).to(memory_format=layout) for model in models]  # type: ignore[call-overload]

        @torch.no_grad()
        def once() -> None:
            with backend(fast), torch.autocast(case.device, case.half, case.half is not None):
                for model in models:
                    model(image)

        return once

    runs = {"network": run([network], fast == "triton")}
    for last, layout in ((False, ""), (True, ", channels_last")):
        runs["two plain" + layout] = run([plain(case) for _ in range(2)], last)
        runs["frozen" + layout] = run([freeze(network)], last)
    return runs


def inference(case: Case, rounds: int) -> list[str]:
    times = faster(interleaved(inferences(case), rounds))
    cells = ["{:.2f} ({:.2f}-{:.2f})".format(*ratio(times, name, "two plain")) for name in ("frozen", "network")]
    return [str(case), *cells]


def peak(case: Case, name: str) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_networks", "--peak", case.kind, str(case.size), name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak_here(case: Case, name: str) -> float:
    contestant(case._replace(size=32), name)()  # what is loaded at first use
    run = contestant(case, name)
    before = resident("VmRSS")
    for _ in range(2):
        run()
    return resident("VmHWM") - before


def memory(case: Case) -> list[str]:
    found = {name: peak(case, name) for name in ("dense", "masked", "straight_through", "selected", "one plain")}
    cells = [f"{found['dense']:.0f}"]
    cells += [f"{found[name] / found['dense']:.2f}" for name in ("straight_through", "selected", "masked", "one plain")]
    return [str(case), *cells]


TABLES = {
    "Training step": (
        training,
        "network | dense / straight_through | dense / every=4 | dense / selected | dense / masked | straight_through / "
        "one plain | / the faster of one plain and it compiled | / MONAI (VGG: one plain) | dense: eager / faster",
    ),
    "Inference": (inference, "network | frozen / two plain networks | itself in `eval()` / two plain networks"),
    "Memory": (
        lambda case, rounds: memory(case),
        "network | dense, MiB | straight_through / dense | selected / dense | masked / dense | one plain / dense",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--networks", nargs="+", default=["routed", "separate", "vgg"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 160])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tables", nargs="+", default=list(TABLES))
    parser.add_argument("--peak", nargs=3, metavar=("KIND", "SIZE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        kind, size, name = options.peak
        print(peak_here(Case(kind, int(size)), name))
        return
    lines = [
        "# Whole networks\n",
        f"`python -m benchmarks.bench_networks`. {machine()}. Batch {Case('', 0).batch}. Medians (quartiles) of "
        f"{options.rounds} interleaved rounds.",
    ]
    for title in options.tables:
        make, header = TABLES[title]
        lines += [f"\n## {title}\n", f"| {header} |", "|" + "---|" * (header.count("|") + 1)]
        for kind in options.networks:
            for size in options.sizes:
                lines.append("| " + " | ".join(make(Case(kind, size), options.rounds)) + " |")
                print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.file:
        options.file.write_text(text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
