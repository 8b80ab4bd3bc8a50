"""The networks of the benchmarks, and for each network the contestants that one could use instead, all with the same
work.

The networks have the paper's widths (16, 32, 64; three blocks in a stage; VGG-11 of width 32; or a U-Net of width 32
and five stages), two tasks, and mean
squares as loss. There is no optimiser. The contestants of a training step are:

    dense masking   `PlainNetwork` in plain torch (plain_network.py), or `backend("reference")` for the VGG and the
                    U-Net, which runs as fast as a plain script (results/reference.md); eager, and compiled by
                    torch.compile
    masked          our network on `backend("masked")`: one torch convolution on the packed tensor
    ours            our network with straight_through (default), selected, or straight_through with every=4
    one plain       ONE network of plain convolutions of the same widths: no tasks, nothing to learn about sharing
    MONAI           its HighResNet of these widths; it has no layers between the stages and two fewer at the end

In inference the frozen network (`freeze`, groupings drawn with p(shared) = 0.6) and our network itself are compared
with dense masking, two plain networks, and one plain network.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.plain_network import PlainNetwork
from sfg_fast import SFGVGG, SFGHighResNet, SFGUNet, assign, backend, freeze, recalibrate, set_estimator
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.networks.vgg import VGG11

EVERY = 4
STAGES = 5  # of the U-Net
OUTPUTS = {"ct": 1, "organs": 6}
LAST = ", channels_last"  # the name of a contestant in that memory format ends so
HALF = {"cpu": None, "cuda": torch.bfloat16}  # of autocast
Step = Callable[[], None]


class Case(NamedTuple):
    """A network, and the size of its images."""

    kind: str  # routed, separate, vgg or unet
    size: int
    batch: int = 4
    widths: tuple[int, int, int] = (16, 32, 64)  # of the stages; VGG and U-Net start with the second
    blocks: int = 3
    device: str = "cpu"
    half: torch.dtype | None = None  # of autocast

    def image(self) -> Tensor:
        return torch.randn(self.batch, 1, self.size, self.size, device=self.device)

    def __str__(self) -> str:
        return f"{self.kind}, {self.size}x{self.size}"


CASES = {  # of each kind the smallest comes first
    "cpu": [Case(kind, size) for kind in ("routed", "separate", "vgg") for size in (96, 160)] + [Case("unet", 128)],
    "cuda": [
        Case(kind, size, batch, device="cuda", half=HALF["cuda"])
        for kind, size, batch in (
            ("routed", 128, 10),
            ("routed", 256, 16),
            ("separate", 128, 10),
            ("vgg", 256, 16),
            ("unet", 256, 16),
        )
    ],
}


def cases(device: str, full: bool) -> list[Case]:
    """All cases that are measured on a device, or only the smallest of each kind."""
    smallest: dict[str, Case] = {}
    for case in CASES[device]:
        smallest.setdefault(case.kind, case)
    return CASES[device] if full else list(smallest.values())


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


class PlainUNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width * 2**stage for stage in range(STAGES)]
        ups = list(reversed(widths[:-1]))
        self.encoder = nn.ModuleList(
            unet_stage(c, k, i > 0) for i, (c, k) in enumerate(zip([1, *widths[:-1]], widths, strict=True))
        )
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * k, k, 2, 2) for k in ups)
        self.decoder = nn.ModuleList(unet_stage(2 * k, k) for k in ups)
        self.head = nn.Conv2d(width, sum(OUTPUTS.values()), 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, stage in zip(self.ups, self.decoder, strict=True):
            x = stage(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)


def unet_stage(c: int, k: int, strided: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, stride in ((c, 1 + strided), (k, 1)):
        conv = nn.Conv2d(channels, k, 3, stride, 1, bias=False)
        layers += [conv, nn.InstanceNorm2d(k, affine=True), nn.LeakyReLU(inplace=True)]
    return nn.Sequential(*layers)


def plain(case: Case) -> nn.Module:
    """One plain network with the same convolutions as `routed`, without groups. `separate` is compared with it, too."""
    if case.kind == "vgg":
        return PlainVGG(case.widths[1])
    if case.kind == "unet":
        return PlainUNet(case.widths[1])
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
    if case.kind == "unet":
        return SFGUNet(1, OUTPUTS, case.widths[1], STAGES)
    return SFGHighResNet(1, OUTPUTS, case.widths, case.blocks, case.kind)


def step(network: nn.Module, case: Case, name: str = "auto", last: bool = False, times: int = 1) -> Step:
    """A training step: forward and backward pass."""
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
    """A training step of the contestant `name`, which may end in ", channels_last". `fast` is the backend of our
    network."""
    what, _, layout = name.partition(", ")
    last = layout == "channels_last"
    if what in ("dense", "dense compiled"):
        if case.kind in ("vgg", "unet"):
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


def names(kind: str, device: str = "cpu", full: bool = True) -> list[str]:
    """The contestants of a training step; on a GPU all are channels_last. Unless `full`, those are left out that have
    to be compiled, estimators other than the default, and MONAI."""
    every = ["dense", "masked", "one plain"]
    own = ["straight_through"]
    if full:
        every += (
            ["one plain compiled"] if kind in ("vgg", "unet") else ["one plain compiled", "dense compiled", "MONAI"]
        )
        own += ["selected", f"straight_through={EVERY}"]
    return [*(name + layout for name in every for layout in (("", LAST) if device == "cpu" else (LAST,))), *own]


def faster(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The times of each contestant in its faster form (memory format; eager or compiled); those with `every` for one
    step."""
    found = dict(times)
    for name in [name for name in found if name.endswith(LAST)]:
        last, what = found.pop(name), name.removesuffix(LAST)
        found[what] = min(found.get(what, last), last, key=statistics.median)
    for name in ("dense", "one plain"):
        both = [found[one] for one in (name, f"{name} compiled") if one in found]
        if both:
            found[f"{name} faster"] = min(both, key=statistics.median)
    several = f"straight_through={EVERY}"
    if several in found:
        found[several] = [t / EVERY for t in found[several]]
    return found


def inferences(case: Case, fast: str = "auto") -> dict[str, Step]:
    """The contestants of inference: the frozen network, the network itself (on the backend `fast`), dense masking, and
    two plain networks, or one."""
    torch.manual_seed(0)
    network, x, side = ours(case).to(case.device), case.image(), min(case.size, 64)
    p = torch.tensor([0.6, 0.2, 0.2])
    assign(network, {n: torch.multinomial(p, m.out_channels, True) for n, m in sfg_layers(network).items()})
    recalibrate(network, [torch.randn(2, 1, side, side, device=case.device)])
    network.eval()

    def run(models: list[nn.Module], last: bool, name: str = fast) -> Step:
        layout = torch.channels_last if last else torch.contiguous_format
        image = x.to(memory_format=layout)
        models = [model.eval().to(case.device).to(memory_format=layout) for model in models]  # type: ignore[call-overload]

        @torch.no_grad()
        def once() -> None:
            with backend(name), torch.autocast(case.device, case.half, case.half is not None):
                for model in models:
                    model(image)

        return once

    runs = {"network": run([network], fast == "triton")}
    for last, layout in ((False, ""), (True, LAST)):
        runs["two plain" + layout] = run([plain(case) for _ in range(2)], last)
        runs["one plain" + layout] = run([plain(case)], last)
        runs["dense" + layout] = run([copy.deepcopy(network)], last, "reference")
        runs["frozen" + layout] = run([freeze(network)], last)
    return runs
