"""What `convert` makes of 90 networks of other libraries: 30 for medical images, and 60 for images of any kind.

    python -m benchmarks.networks_converted [--only NAME ..] [--out FILE.md] [--jobs N]

The list was fixed before it was converted as a whole; a part of it had been in the tests before. Its medical part: of
each family of MONAI's convolutional networks that take a 2-D image and are not generative, one network (of ResNet two)
at its defaults; four of them also with batch normalisation or with another encoder; and nnU-Net's two networks, with
deep supervision and without. Its general part: one or two small networks of each family of convolutional networks in
torchvision and timm, two vision transformers, eight decoders of segmentation_models_pytorch behind the encoder
resnet18, one of them behind two other encoders, and two networks of several outputs. Weights are random. Widths are
small where a network has an argument for them. `MORE` has networks that only tests/networks/test_sweep.py looks at.

Each network is converted for two tasks in a process of its own, which may take ten minutes. Results are added to
FILE.jsonl as they come, and a later run measures only what is not there: remove the file after a change of `convert`.
FILE.md is the table.

The libraries: monai, dynamic_network_architectures, torchvision, timm, segmentation_models_pytorch. A network whose
library is missing is named and not counted.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import multiprocessing
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks.timing import machine
from sfg_fast import SFGConv2d, assign, backend, convert, freeze, parameter_groups, recalibrate
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.networks.conversion_report import UNREACHED, Report

TASKS = ("a", "b")
LIMIT = 600  # seconds for one network
RESULTS = Path(__file__).parent / "results" / "networks_converted.md"
MODULES = {  # of each library, the module that has its networks
    "MONAI": "monai.networks.nets",
    "nnU-Net": "dynamic_network_architectures.architectures.unet",
    "torchvision": "torchvision.models",
    "timm": "timm",
    "smp": "segmentation_models_pytorch",
}
MEDICAL, GENERAL = ("MONAI", "nnU-Net"), ("torchvision", "timm", "smp")


class Network(NamedTuple):
    """A network of a library: the name there, its arguments, and the height and width of its images. `variant` says
    which arguments make it another network than the defaults do."""

    package: str  # the library that has it, a name of `MODULES`
    kind: str
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] | None = None
    size: int = 64
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.package} {self.kind}" + f" ({self.variant})" * bool(self.variant)

    def made(self) -> tuple[nn.Module, Tensor]:
        """The network, with weights from seed 0, and two images that it takes. Raises ImportError if the library is
        not installed."""
        library, options, channels = importlib.import_module(MODULES[self.package]), dict(self.options or {}), 3
        torch.manual_seed(0)
        if self.package == "torchvision":
            net = library.get_model(self.kind, weights=None, **options)
        elif self.package == "timm":
            net = library.create_model(self.kind, pretrained=False, **options)
        else:
            plan = nnunet_plan() if self.package == "nnU-Net" else {}
            net = getattr(library, self.kind)(*self.arguments, **plan, **options)
        if self.package in MEDICAL:
            channels = next(module for module in net.modules() if isinstance(module, nn.Conv2d)).in_channels
        return net, torch.randn(2, channels, self.size, self.size)


def nnunet_plan() -> dict[str, Any]:
    """What nnU-Net's planner chooses for 2-D images, but with fewer stages and channels."""
    return {
        "input_channels": 1, "n_stages": 4, "features_per_stage": [8, 16, 32, 32], "conv_op": nn.Conv2d,
        "kernel_sizes": [[3, 3]] * 4, "strides": [[1, 1], [2, 2], [2, 2], [2, 2]], "num_classes": 3,
        "n_conv_per_stage_decoder": [2, 2, 2] , "conv_bias": True, "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip


BATCH = ("batch", {"affine": True})
PLANE = {"spatial_dims": 2, "in_channels": 1}
CLASSES = {**PLANE, "num_classes": 3}
RESNET = {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 3}
WIDTHS = {"features": (4, 4, 6, 6, 8, 4)}
INTERPOLATED = {**WIDTHS, "norm": BATCH, "upsample": "nontrainable"}
DECODER = {"decoder_channels": (16, 8, 8, 4, 4), "spatial_dims": 2}
PYRAMID = {**PLANE, "out_channels": 2, "layers": (1, 1, 1, 1), "psp_block_num": 0}
STAGES = {"n_conv_per_stage": [2, 2, 2, 2]}
BLOCKS = {"n_blocks_per_stage": [1, 2, 2, 2]}
NO_WEIGHTS = {"encoder_weights": None, "classes": 2}
BACKBONE = {"weights_backbone": None}

NETWORKS = [
    Network("MONAI", "AHNet", (), PYRAMID),
    Network("MONAI", "AttentionUnet", (2, 1, 2, (4, 8, 8), (2, 2)), size=32),
    Network("MONAI", "AutoEncoder", (2, 1, 2, (4, 8), (2, 2)), size=32),
    Network("MONAI", "BasicUNet", (2, 1, 2), WIDTHS),
    Network("MONAI", "BasicUNet", (2, 1, 2), INTERPOLATED, variant="batch norm, interpolated"),
    Network("MONAI", "BasicUNetPlusPlus", (2, 1, 2), WIDTHS),
    Network("MONAI", "DenseNet121", (2, 1, 3)),
    Network("MONAI", "DynUNet", (2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), (4, 8, 8)), size=32),
    Network("MONAI", "EfficientNetBN", ("efficientnet-b0", False), CLASSES),
    Network("MONAI", "FlexibleUNet", (1, 2, "efficientnet-b0"), DECODER),
    Network("MONAI", "FlexibleUNet", (1, 2, "resnet18"), DECODER, variant="resnet18"),
    Network("MONAI", "HighResNet", (2, 1, 3), size=32),
    Network("MONAI", "HoVerNet", ("fast", 3, 2), size=256),
    Network("MONAI", "MedNeXt", (2, 4, 1, 2)),
    Network("MONAI", "PatchDiscriminator", (2, 4, 1, 1), {"num_layers_d": 2}),
    Network("MONAI", "Quicknat", (2, 1, 8)),
    Network("MONAI", "RegUNet", (2, 1, 4, 2), {"out_channels": 2}, size=32),
    Network("MONAI", "resnet18", (), RESNET),
    Network("MONAI", "resnet50", (), RESNET),
    Network("MONAI", "SegResNet", (2, 8, 1, 2)),
    Network("MONAI", "SegResNet", (2, 8, 1, 2), {"norm": BATCH}, variant="batch norm"),
    Network("MONAI", "SegResNetDS", (2, 8, 1, 2)),
    Network("MONAI", "SEResNet50", (), CLASSES),
    Network("MONAI", "UNet", (2, 1, 2, (4, 8, 8), (2, 2)), {"num_res_units": 2}, size=32),
    Network("MONAI", "UNet", (2, 1, 2, (4, 8, 8), (2, 2)), {"num_res_units": 2, "norm": BATCH}, 32, "batch norm"),
    Network("MONAI", "VNet", (2, 1, 2)),
    Network("nnU-Net", "PlainConvUNet", (), {**STAGES, "deep_supervision": False}),
    Network("nnU-Net", "PlainConvUNet", (), {**STAGES, "deep_supervision": True}, variant="deep supervision"),
    Network("nnU-Net", "ResidualEncoderUNet", (), {**BLOCKS, "deep_supervision": False}),
    Network("nnU-Net", "ResidualEncoderUNet", (), {**BLOCKS, "deep_supervision": True}, variant="deep supervision"),
    Network("torchvision", "alexnet"),
    Network("torchvision", "vgg11_bn"),
    Network("torchvision", "resnet18"),
    Network("torchvision", "resnet50"),
    Network("torchvision", "resnext50_32x4d"),
    Network("torchvision", "wide_resnet50_2"),
    Network("torchvision", "densenet121"),
    Network("torchvision", "squeezenet1_1"),
    Network("torchvision", "mobilenet_v2"),
    Network("torchvision", "mobilenet_v3_small"),
    Network("torchvision", "efficientnet_b0"),
    Network("torchvision", "shufflenet_v2_x0_5"),
    Network("torchvision", "mnasnet0_5"),
    Network("torchvision", "regnet_y_400mf"),
    Network("torchvision", "googlenet", (), {"init_weights": False}, size=96),
    Network("torchvision", "convnext_tiny"),
    Network("torchvision", "fcn_resnet50", (), BACKBONE),
    Network("torchvision", "deeplabv3_resnet50", (), BACKBONE),
    Network("torchvision", "deeplabv3_mobilenet_v3_large", (), BACKBONE),
    Network("torchvision", "lraspp_mobilenet_v3_large", (), BACKBONE),
    Network("timm", "resnet10t"),
    Network("timm", "resnetv2_50"),
    Network("timm", "skresnet18"),
    Network("timm", "seresnet18"),
    Network("timm", "legacy_seresnet18"),
    Network("timm", "ecaresnet26t"),
    Network("timm", "res2net50_26w_4s"),
    Network("timm", "cspresnet50"),
    Network("timm", "dpn48b"),
    Network("timm", "gernet_s"),
    Network("timm", "regnetx_002"),
    Network("timm", "repvgg_a0"),
    Network("timm", "mobileone_s0"),
    Network("timm", "dla34"),
    Network("timm", "hrnet_w18_small"),
    Network("timm", "selecsls42"),
    Network("timm", "vovnet39a"),
    Network("timm", "inception_v3", size=96),
    Network("timm", "xception41"),
    Network("timm", "nfnet_l0"),
    Network("timm", "efficientnet_lite0"),
    Network("timm", "tinynet_e"),
    Network("timm", "mixnet_s"),
    Network("timm", "ghostnet_100"),
    Network("timm", "hardcorenas_a"),
    Network("timm", "convnext_atto"),
    Network("timm", "vit_tiny_patch16_224", (), {"img_size": 64}),
    Network("timm", "swin_tiny_patch4_window7_224", (), {"img_size": 64, "window_size": 4}),
    *(
        Network("smp", kind, ("resnet18",), NO_WEIGHTS)
        for kind in ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "Linknet", "MAnet", "DeepLabV3Plus")
    ),
    Network("smp", "PAN", ("resnet18",), NO_WEIGHTS, size=128),
    Network("smp", "Unet", ("vgg11_bn",), NO_WEIGHTS, variant="vgg11_bn"),
    Network("smp", "Unet", ("mobilenet_v2",), NO_WEIGHTS, variant="mobilenet_v2"),
    Network("smp", "Unet", ("resnet18",), {**NO_WEIGHTS, "aux_params": {"classes": 3}}, variant="and classes"),
    Network("torchvision", "fcn_resnet50", (), {**BACKBONE, "aux_loss": True}, variant="two outputs"),
]
MORE = [
    Network("MONAI", "AHNet", (), {**PYRAMID, "upsample_mode": "nearest"}, variant="interpolated"),
    Network("MONAI", "BasicUNetPlusPlus", (2, 1, 2), INTERPOLATED, variant="batch norm, interpolated"),
    Network("MONAI", "DenseNet", (2, 1, 3), {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}, 32),
    Network("MONAI", "SegResNetDS", (2, 8, 1, 2), {"norm": "batch"}, variant="batch norm"),
    Network("MONAI", "ResNet", ("basic", [1, 1, 1, 1], [8, 8, 8, 8]), RESNET),
]


# --- checks -----------------------------------------------------------------------------------------------------------


def converted_of(net: nn.Module, x: Tensor) -> tuple[nn.Module, Report]:
    """The network for the two tasks, and the report. Raises ValueError if the network is refused."""
    return convert(net, TASKS, example=x, report=True, init=[0.5, 0.3, 0.2])


def all_shared(converted: nn.Module) -> None:
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})


def mixed(converted: nn.Module) -> None:
    """Assign kernels to groups by chance."""
    torch.manual_seed(1)
    assign(converted, {name: torch.randint(3, (m.out_channels,)) for name, m in sfg_layers(converted).items()})


def close(found: Any, expected: Any, relative: float) -> None:
    """Compare outputs, tensor by tensor. The allowed difference is a share of the largest value."""
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected), f"{len(found)} outputs, expected {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=relative * other.abs().max().item())


class NothingDropped(TorchFunctionMode):
    """Inside the `with` dropout drops nothing and stochastic depth keeps every path: the two networks would draw
    different ones."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        result = function(*args, **kwargs)
        if name in ("bernoulli", "bernoulli_"):
            return result.fill_(1)
        return result.fill_(0.5) if name in ("rand", "rand_like") else result  # paths are kept more often than not


def equal_all_shared(net: nn.Module, x: Tensor, converted: nn.Module, train: bool) -> None:
    """In float64, so that batch statistics of few values don't hide a difference: 1e-6 of the largest output."""
    net, converted, x = net.double(), converted.double(), x.double()
    all_shared(converted)
    with NothingDropped(), torch.no_grad():
        expected = net.train(train)(x)
        for y in converted.train(train)(x).values():
            close(y, expected, 1e-6)


def equal_eval(net: nn.Module, x: Tensor, converted: nn.Module) -> None:
    equal_all_shared(net, x, converted, False)


def equal_train(net: nn.Module, x: Tensor, converted: nn.Module) -> None:
    equal_all_shared(net, x, converted, True)


def other_images(net: nn.Module, x: Tensor, converted: nn.Module) -> None:
    """Another batch size, and another image size if the module takes it."""
    all_shared(converted)
    n, channels, height, width = x.shape
    net.eval(), converted.eval()
    images = [torch.randn(n + 1, channels, height, width)]
    other = torch.randn(1, channels, height + 32, width + 64)
    with torch.no_grad():
        try:
            net(other)
            images.append(other)
        except Exception:
            pass
        for image in images:
            expected = net(image)
            for y in converted(image).values():
                close(y, expected, 1e-3)


def dense_masking(_: nn.Module, x: Tensor, converted: nn.Module) -> None:
    """A mixed assignment gives what dense masking gives in float64, and something else for each task."""
    mixed(converted)
    converted.eval().double()
    x = x.double()
    with torch.no_grad():
        found = converted(x)
        with backend("reference"):
            expected = converted(x)
    for task in TASKS:
        close(found[task], expected[task], 1e-6)
    pairs = zip(*(tree_leaves(found[task]) for task in TASKS), strict=True)
    assert not any(torch.equal(one, other) for one, other in pairs), "an output is the same for both tasks"


def trains(_: nn.Module, x: Tensor, converted: nn.Module) -> None:
    """Three steps have finite gradients and move the logits of every layer of several kernels. (A single kernel may be
    drawn into a group that no layer of one kernel behind it reads. Then neither has a gradient.)"""
    torch.manual_seed(2)
    converted.train()
    layers = sfg_layers(converted)
    before = {name: layer.logits.detach().clone() for name, layer in layers.items()}
    optimiser = torch.optim.Adam(parameter_groups(converted, lr=1e-3, logits_factor=10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ReLU behind a sum
        for _step in range(3):
            optimiser.zero_grad()
            sum(y.square().mean() for y in tree_leaves(converted(x))).backward()
            bad = [n for n, p in converted.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            assert not bad, f"the gradient of {bad[0]!r} is not finite"
            optimiser.step()
    wide = {name: layer for name, layer in layers.items() if layer.out_channels > 1}
    still = [name for name, layer in wide.items() if torch.equal(layer.logits, before[name])]
    assert not still, f"the logits of {still[0]!r} did not move"


def _frozen(x: Tensor, converted: nn.Module) -> nn.Module:
    """The converted network, frozen with a mixed assignment."""
    mixed(converted)
    recalibrate(converted, [x])
    frozen = freeze(converted.eval(), example=x)
    assert not any(isinstance(module, SFGConv2d) for module in frozen.modules()), "an SFG layer is left"
    return frozen


def freezes(_: nn.Module, x: Tensor, converted: nn.Module) -> None:
    """With a mixed assignment the frozen network gives the same, in float64."""
    x = x.double()
    frozen = _frozen(x, converted.double())
    with torch.no_grad():
        found, expected = frozen(x), converted(x)
    for task in TASKS:
        close(found[task], expected[task], 1e-6)


def exports(_: nn.Module, x: Tensor, converted: nn.Module) -> None:
    """torch.export takes the frozen network, and its program gives the same, in float64."""
    x = x.double()
    frozen = _frozen(x, converted.double())
    program = torch.export.export(frozen, (x,)).module()
    with torch.no_grad():
        close(program(x), frozen(x), 1e-6)


CHECKS: dict[str, Callable[[nn.Module, Tensor, nn.Module], None]] = {
    "eval": equal_eval,
    "train": equal_train,
    "other images": other_images,
    "dense masking": dense_masking,
    "trains": trains,
    "frozen": freezes,
    "exported": exports,
}


def check(name: str, net: nn.Module, x: Tensor, converted: nn.Module) -> None:
    """Do one check on copies of the networks. Raises AssertionError, or what the converted network raises."""
    CHECKS[name](copy.deepcopy(net), x, copy.deepcopy(converted))


# --- a process for each network ---------------------------------------------------------------------------------------


def measure(network: Network, results: Connection) -> None:
    """Convert and check a network, and send what is found as soon as it is known."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    net, x = network.made()
    results.send({"convolutions": sum(isinstance(module, nn.modules.conv._ConvNd) for module in net.modules())})
    try:
        converted, report = converted_of(net, x)
    except ValueError as error:
        results.send({"refused": str(error)})
        return
    becomes = Counter(row.becomes for row in report)
    reasons = list(dict.fromkeys(row.why for row in report if row.why.startswith("behind ")))
    covered, _ = report.coverage
    reached = sum(row.becomes != UNREACHED for row in report)
    results.send({"coverage": [covered, reached], "becomes": becomes, "copied": reasons})
    checks: dict[str, str] = {}
    for name in CHECKS:
        try:
            check(name, net, x, converted)
            checks[name] = ""
        except Exception as error:
            checks[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        results.send({"checks": checks})


def measured(network: Network) -> dict[str, Any]:
    """What `measure` finds, in a process of its own that may crash or take too long."""
    context, start = multiprocessing.get_context("spawn"), time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(network, sender))
    process.start()
    sender.close()
    row: dict[str, Any] = {"name": network.name}
    while receiver.poll(max(0.0, start + LIMIT - time.monotonic())):
        try:
            row |= receiver.recv()
        except EOFError:
            break
    else:
        row["ended"] = f"stopped after {LIMIT} s"
        process.kill()
    process.join()
    if process.exitcode and "ended" not in row:
        row["ended"] = f"the process ended with exit code {process.exitcode}"
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


# --- the table --------------------------------------------------------------------------------------------------------


def is_full(row: Mapping[str, Any]) -> bool:
    """Are there several convolutions, is every one that the forward pass reaches an SFG layer or a head, and is every
    check passed?"""
    covered, reached = row.get("coverage", (0, 1))
    checks = row.get("checks", {})
    return covered == reached > 1 and len(checks) == len(CHECKS) and not any(checks.values()) and "ended" not in row


def first_obstacle(refusal: str) -> str:
    """The first thing that stands in the way, and how many there are."""
    start, *obstacles = refusal.removeprefix("convert: ").split("\n- ")
    text = textwrap.shorten(obstacles[0] if obstacles else start, 110, placeholder=" ..")
    return text + f" (the first of {len(obstacles)})" * bool(obstacles)


def line(network: Network, row: Mapping[str, Any]) -> str:
    """The row of a network in the table."""
    found, told = "", []
    if "refused" in row:
        found = f"refused: {first_obstacle(row['refused'])}"
    elif "coverage" in row:
        found = ", ".join(f"{what}: {number}" for what, number in row["becomes"].items())
        found += f" ({row['copied'][0]})" if row["copied"] else ""
        checks = row.get("checks", {})
        told = [f"{name}: {text[:120]}" for name, text in checks.items() if text]
        told += [f"not done: {', '.join(name for name in CHECKS if name not in checks)}"] * (len(checks) < len(CHECKS))
        told = told or ["all pass"]
    told += [row["ended"]] if "ended" in row else []
    name = network.name.removeprefix(network.package).strip()
    cells = (network.package, name, str(row.get("convolutions", "-")), found, "; ".join(told))
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"


def count(title: str, rows: list[Mapping[str, Any]]) -> str:
    """How many networks of a part of the list are fully converted, accepted and refused."""
    accepted, refused = (sum(key in row for row in rows) for key in ("coverage", "refused"))
    return (
        f"- {title}: {sum(map(is_full, rows))} of {len(rows)} fully converted with every check passed; {accepted} "
        f"accepted, {refused} refused, {len(rows) - accepted - refused} crashed."
    )


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of results, from the rows by name."""
    networks = [network for network in NETWORKS if network.name in rows]
    lacking = [network.name for network in NETWORKS if network.name not in rows]
    parts = {"medical": MEDICAL, "general": GENERAL}
    counts = [
        count(title, [rows[one.name] for one in networks if one.package in libraries])
        for title, libraries in parts.items()
    ]
    if lacking:
        counts.append(f"- Not measured and not counted: {', '.join(lacking)}.")
    lines = [
        "# Networks of other libraries, converted",
        "",
        f"`python -m benchmarks.networks_converted`. {machine()}. The script says how the networks were chosen.",
        "",
        "A network is fully converted if it has several convolutions and every one that the forward pass reaches is",
        "an SFG layer or a head. (In a vision transformer the only convolution cuts the image into patches.) The",
        "checks: with all kernels shared the outputs are the module's own, in `eval()` and in `train()` (float64), and",
        "on other images; a mixed assignment gives what dense masking gives (float64); three steps of training have",
        "finite gradients and move the logits; the frozen network gives the same (float64); torch.export takes it.",
        "",
        "| library | network | convolutions | what they became, or why the network is refused | checks |",
        "|---|---|---|---|---|",
        *(line(network, rows[network.name]) for network in networks),
        "",
        *counts,
        "",
    ]
    return "\n".join(lines)


# --- the sweep --------------------------------------------------------------------------------------------------------


def chosen(only: Iterable[str]) -> list[Network]:
    """The networks of these names; all, if there are none. Raises ValueError for an unknown name."""
    known = {network.name: network for network in NETWORKS}
    for name in only:
        if name not in known:
            raise ValueError(f"--only {name!r} is no network of the list, expected one of: {'; '.join(known)}")
    return [known[name] for name in only] or NETWORKS


def stored(path: Path) -> dict[str, dict[str, Any]]:
    """The results in a .jsonl file, by name; a last line that was cut off is left out."""
    rows = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue
        rows[row["name"]] = row
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help='library and network: "timm dla34"')
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table, FILE.md; results go to FILE.jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="how many networks at the same time, a thread for each")
    options = parser.parse_args(arguments)
    try:
        networks = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}, expected a number of at least 1")
    raw = options.out.with_suffix(".jsonl")
    rows = stored(raw)
    if rows:
        print(f"{raw} has the results of {len(rows)} networks. Remove it to measure them anew.")
    missing = {library for library, module in MODULES.items() if not installed(module)}
    for library in sorted(missing):
        print(f"{MODULES[library].partition('.')[0]} is not installed, so the networks of {library} are left out.")
    networks = [one for one in networks if one.name not in rows and one.package not in missing]
    cut_off = raw.exists() and not raw.read_text().endswith("\n")
    with ThreadPoolExecutor(options.jobs) as pool, raw.open("a") as file:
        file.write("\n" * cut_off)
        for row in tqdm(pool.map(measured, networks), total=len(networks), desc="networks", disable=None):
            rows[row["name"]] = row
            print(json.dumps(row), file=file, flush=True)
    text = table(rows)
    print(text)
    options.out.write_text(text)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


if __name__ == "__main__":
    main()
