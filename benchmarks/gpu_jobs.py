"""What gpu_suite.py asks of a GPU: jobs, each a function of no arguments that returns plain data.

With `DRY` a CPU stands in for the GPU, in Triton's interpreter and on tiny images: its times mean nothing.
"""

from __future__ import annotations

import functools
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.spec import Geometry, Norm, RoutedConv, UndrawnFormula
from sfg_fast.kernels.triton import config
from torch import Tensor

from benchmarks import counted, networks, training_steps, variants
from sfg_fast import SFGHighResNet, assign, backend, kernel_choice
from sfg_fast.gpu import checks
from sfg_fast.gpu.isolated import Job
from sfg_fast.gpu.timing import captured, elapsed, interleaved, layers_at_work, synchronize
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.networks.controls import sfg_layers

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
HALF = torch.float16 if DRY else torch.bfloat16  # the interpreter can't multiply bfloat16
WIDTHS = (16,) if DRY else (16, 32, 64, 128)
IMAGE = (1, 8) if DRY else (16, 256)  # batch, and side
ROUNDS = 1 if DRY else 15
LAST = torch.channels_last
SANITIZED = ("bfloat16 16->16", "bfloat16 21->17", "bfloat16 normalisation of 100", "draw")


def checking(variants_too: bool = True) -> dict[str, Job]:
    """Every kernel and precision against float64; the first ones, each in a process of its own, launch every kernel.
    And the work of all later parts once, so that Triton's kernels lie compiled on the disk."""
    found = {name: Job(check) for name, check in checks.checks(DEVICE).items()}
    first = [name for name in found if any(str(case) in name for case in checks.ONE_FOR_EACH_KERNEL.values())]
    first = [name for name in first if name.startswith(next(iter(found)).split()[0])]
    order = [*first, *(name for name in found if name not in first)]
    compiling = {
        f"compile layer {k}": Job(functools.partial(_once, functools.partial(passes, k, 1)), 60) for k in WIDTHS
    }
    for case in network_cases():
        for name in ("straight_through", "selected"):
            job = functools.partial(_network_once, case._replace(batch=1), name)
            compiling[f"compile network {case}, {name}"] = Job(job, 60)
    for case in network_cases():
        job = functools.partial(_inference_once, case._replace(batch=1))
        compiling[f"compile inference {case}"] = Job(job, 60)
    compiling |= variants_once() if variants_too else {}
    compiling |= {
        f"compile what the host calls, {work}": Job(functools.partial(_host_once, work), 60)
        for work in kernel_choice.WORKS
    }
    compiling["graph equals eager"] = Job(graph_equals_eager, 60)
    compiling["graph of training steps"] = Job(captured_equals_eager, 60)
    jobs = {name: found[name] for name in first} | compiling | {name: found[name] for name in order}
    if not DRY:
        for name in found:
            if name.startswith(SANITIZED) and "ReLU" not in name:
                jobs[f"memory accesses of {name}"] = Job(functools.partial(sanitized, name), 90)
    return jobs


def sanitized(name: str) -> str:
    """One check under compute-sanitizer: AssertionError with its first finding."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not here"
    script = [sys.executable, str(Path(__file__).with_name("gpu_suite.py")), "--one", name]
    done = subprocess.run(
        [tool, "--error-exitcode=99", *script], capture_output=True, text=True, timeout=85,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    assert done.returncode == 0, f"exit code {done.returncode}: {lines[1:3]} {done.stderr[-200:]}"
    return lines[-1].strip("= ") if lines else "nothing found"


def where() -> dict[str, Any]:
    """The device, versions, and which code: the commit, and a hash of the kernels as they are."""
    import numpy
    import triton

    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    found = {"device": "dry run in Triton's interpreter", "torch": torch.__version__, "triton": triton.__version__}
    found |= {} if DRY else kernel_choice.describe(DEVICE)
    found |= {"numpy": numpy.__version__, "python": platform.python_version(), "commit": commit or "unknown"}
    return found | {"dtype": str(HALF)[6:], "date": time.strftime("%Y-%m-%d")}


def roofs() -> dict[str, float]:
    """GB/s of copies (read + written) of 1 GiB, and of what the L2 cache holds; TFLOP/s of a matrix product of random
    half-precision numbers."""
    size, small, n = (1 << 20, 1 << 12, 64) if DRY else (1 << 30, 8 << 20, 8192)
    source, target, near, nearer = (torch.randn(s // 2, device=DEVICE).half() for s in (size, size, small, small))
    a, b = (torch.randn(n, n, device=DEVICE).to(HALF) for _ in range(2))
    calls = {
        "copy": lambda: target.copy_(source),
        "L2": captured(lambda: [nearer.copy_(near) for _ in range(20)], DEVICE),
        "product": lambda: a @ b,
    }
    t = {name: statistics.median(times) for name, times in interleaved(calls, 10, device=DEVICE).items()}
    return {
        "copy_GB_s": 2 * size / t["copy"] / 1e9,
        "L2_GB_s": 20 * 2 * small / t["L2"] / 1e9,
        "half_TFLOP_s": 2 * n**3 / t["product"] / 1e12,
    }


# --- passes of a layer ------------------------------------------------------------------------------------------------


def even(k: int, all_gates: bool = False) -> FilterGroups:
    assignment = torch.repeat_interleave(torch.arange(3), torch.tensor([k - k // 3 * 2, k // 3, k // 3]))
    return FilterGroups.from_assignment(assignment.to(DEVICE), all_gates=all_gates)


def passes(k: int, batch: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """Pass -> contestant -> a call, on one set of tensors of a layer k -> k in three groups, 3x3. `cuDNN`: torch's
    channels_last convolution with all weights. Passes that other libraries have not, have one contestant."""
    one = Geometry((1, 1), (1, 1), (1, 1))
    drawn, learning = even(k), even(k, all_gates=True)
    spec, all_specs = (RoutedConv(g, g, Routing.ARROW, one) for g in (drawn, learning))
    shape = batch, k, IMAGE[1], IMAGE[1]

    def image(channels: int = k) -> Tensor:
        return torch.randn(batch, channels, *shape[2:], device=DEVICE).to(HALF).contiguous(memory_format=LAST)

    x, dy = image(), image()
    weight, bias = torch.randn(k, k, 3, 3, device=DEVICE).to(HALF), torch.randn(k, device=DEVICE).to(HALF)
    plain = (weight / (3 * k**0.5)).contiguous(memory_format=LAST)
    packed = kernels.pack(plain.contiguous(), bias, spec, HALF)
    unbiased = kernels.pack(plain.contiguous(), None, spec, HALF)
    everything = kernels.pack(plain.contiguous(), bias, all_specs, HALF)
    kept_product = kernels.forward(x, everything, all_specs, relu=True, keep_product=True)[1]
    dundrawn = torch.cat([dy, dy], 1)
    scale, shift = torch.ones(1, 2, k, device=DEVICE), torch.zeros(1, 2, k, device=DEVICE)
    undrawn = UndrawnFormula(x, kept_product, everything, all_specs, scale, shift, "relu")
    of_each = {"scale": scale.expand(batch, -1, -1), "shift": shift.expand(batch, -1, -1), "activation": "leaky_relu"}
    undrawn_of_each = undrawn._replace(**of_each)
    affine = torch.ones(k, device=DEVICE), torch.zeros(k, device=DEVICE)
    norm = Norm(*affine, drawn.order, 1e-5, "relu")
    instance_norm = norm._replace(activation="leaky_relu", each_image=True)
    _, mean, var, _ = kernels.normalise(x, norm, None)
    _, *statistics_of_each, _ = kernels.normalise(x, instance_norm, None)
    conv = (1, 1), (1, 1), (1, 1)  # stride, padding, dilation
    backward = functools.partial(
        torch.ops.aten.convolution_backward, bias_sizes=None, stride=conv[0], padding=conv[1], dilation=conv[2],
        transposed=False, output_padding=(0, 0), groups=1,
    )  # fmt: skip
    fused = {} if DRY else {
        "cuDNN, fused ReLU": lambda: torch.cudnn_convolution_relu(x, plain, bias, *conv, 1)
    }  # fmt: skip
    running = [torch.zeros(k, device=DEVICE), torch.ones(k, device=DEVICE)]
    return {
        "forward + ReLU": {
            "ours": lambda: kernels.forward(x, packed, spec, relu=True),
            "cuDNN": lambda: F.conv2d(x, plain, bias, 1, 1).relu_(),
            **fused,
        },
        "forward": {  # as before a norm, where nothing is fused
            "ours": lambda: kernels.forward(x, unbiased, spec),
            "cuDNN": lambda: F.conv2d(x, plain, None, 1, 1),
        },
        "input gradient": {
            "ours": lambda: kernels.input_gradient(dy, packed, spec, shape[2:]),
            "cuDNN": lambda: backward(dy, x, plain, output_mask=(True, False, False)),
        },
        "weight gradient": {
            "ours": lambda: kernels.weight_gradient(x, dy, packed, spec),
            "cuDNN": lambda: backward(dy, x, plain, output_mask=(False, True, False)),
            "cuDNN, deterministic": lambda: _deterministic(
                lambda: backward(dy, x, plain, output_mask=(False, True, False))
            ),
        },
        "forward, kept": {"ours": lambda: kernels.forward(x, everything, all_specs, relu=True, keep_product=True)},
        "input gradient, undrawn": {"ours": lambda: kernels.input_gradient(dy, everything, all_specs, shape[2:])},
        "gates' gradient": {"ours": lambda: kernels.gate_gradient(undrawn, dundrawn)},
        "gates' gradient of each image": {"ours": lambda: kernels.gate_gradient(undrawn_of_each, dundrawn)},
        "norm + ReLU": {
            "ours": lambda: kernels.normalise(x, norm, None),
            "cuDNN": lambda: F.batch_norm(x, *running, *affine, True).relu_(),
        },
        "norm + ReLU, gradient": {"ours": lambda: kernels.normalise_gradient(dy, x, norm, mean, var, None)},
        "instance norm + leaky ReLU": {
            "ours": lambda: kernels.normalise(x, instance_norm, None),
            "cuDNN": lambda: F.leaky_relu_(F.instance_norm(x, None, None, *affine)),
        },
        "instance norm + leaky ReLU, gradient": {
            "ours": lambda: kernels.normalise_gradient(dy, x, instance_norm, *statistics_of_each, None)
        },
        "pack": {"ours": lambda: kernels.pack(weight, bias, spec, HALF)},
    }


def _deterministic(call: Callable[[], Any]) -> Any:
    # (`enabled` is false by default: then torch's own convolution would be timed.)
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, deterministic=True):
        return call()


COUNTED = {  # pass -> its name in counted.py
    "forward + ReLU": "forward", "input gradient": "input gradient",
    "weight gradient": "weight gradient", "forward, kept": "forward, undrawn",
    "input gradient, undrawn": "input gradient, undrawn", "gates' gradient": "gates' gradient, undrawn",
    "gates' gradient of each image": "gates' gradient of each image, undrawn",
}  # fmt: skip


def predictions(k: int, roof: dict[str, float]) -> dict[str, dict[str, float]]:
    """Microseconds of each pass by count: `floor`, the necessary bytes from memory or products, whichever takes longer;
    `predicted`, with the bytes that the tiles load through L2 and the products that they do, too."""
    device = config.device_of(DEVICE)
    here = counted.Architecture("here", None, device, 65536, device.shared, 2048, "")  # type: ignore[arg-type]
    pixels, found = IMAGE[0] * IMAGE[1] ** 2, {}
    by_name = {
        one.direction: one for one in counted.layer_configurations(k, k, "bf16", here, (IMAGE[0], *[IMAGE[1]] * 2))
    }
    for name, direction in COUNTED.items():
        work = counted.work(by_name[direction])
        assert work is not None
        memory = work.bytes_necessary * pixels / roof["copy_GB_s"] / 1e3
        cache = work.bytes_executed * pixels / roof["L2_GB_s"] / 1e3
        needed, done = (2 * 9 * n * pixels / roof["half_TFLOP_s"] / 1e6 for n in (work.necessary, work.executed))
        found[name] = {"floor": max(memory, needed), "predicted": max(memory, cache, done)}
    return found


def measured_layer(k: int) -> dict[str, Any]:
    """Microseconds [lower quartile, median, upper quartile] of every pass and contestant, in turns, inputs rotated so
    that none is found in the L2 cache; and what was predicted."""
    torch.backends.cudnn.benchmark = True
    sets = input_sets(k)
    works = [passes(k, IMAGE[0]) for _ in range(sets)]
    result: dict[str, Any] = {}
    for name in works[0]:
        times = timed({who: [work[name][who] for work in works] for who in works[0][name]})
        result[name] = {who: quartiles(one) for who, one in times.items()}
    roof = roofs()
    for name, row in predictions(k, roof).items():
        result[name] |= row
    return {"roofs": roof, "passes": result, "input_sets": sets}


def input_sets(k: int) -> int:
    """How many sets of tensors are several times what the L2 cache holds."""
    return 1 if DRY else max(2, -(-256_000_000 // (IMAGE[0] * k * IMAGE[1] ** 2 * 2)))


def timed(calls: dict[str, list[Callable[[], Any]]]) -> dict[str, list[float]]:
    """Seconds of one call of each, all its sets being one graph."""
    graphs = {}
    for name, sets in calls.items():
        graphs[name] = captured(lambda sets=sets: [call() for call in sets], DEVICE)
    times = interleaved(graphs, ROUNDS, device=DEVICE)
    return {name: [t / len(calls[name]) for t in one] for name, one in times.items()}


def quartiles(seconds: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile in microseconds."""
    return [round(t * 1e6, 2) for t in (statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3)]


def _once(make: Callable[[], dict[str, dict[str, Callable[[], Any]]]]) -> None:
    for one in make().values():
        one["ours"]()
    synchronize(DEVICE)


# --- variants ---------------------------------------------------------------------------------------------------------

CONVOLVED = [
    "forward + ReLU", "input gradient", "forward, kept", "input gradient, undrawn", "gates' gradient",
]  # fmt: skip
FAMILIES = {
    "convolutions": (variants.CONVOLUTIONS, CONVOLVED),
    "weight gradient": (variants.GRADIENTS, ["weight gradient"]),
}


def varied(family: str, k: int) -> dict[str, Any]:
    """Of each variant, and as it is: microseconds (quartiles) of the family's passes, or why it can't be."""
    table, names = FAMILIES[family]
    sets = input_sets(k)
    found: dict[str, Any] = {}
    some = {"as chosen": {}, **table[k]}
    for variant in list(some)[: 2 if DRY else None]:
        try:
            with variants.forced(some[variant]):
                works = [passes(k, IMAGE[0]) for _ in range(sets)]
                times = timed({name: [work[name]["ours"] for work in works] for name in names})
                found[variant] = {name: quartiles(one) for name, one in times.items()}
        except Exception as error:  # shared memory or registers don't suffice: that is a finding, too
            if "illegal" in str(error):
                raise
            found[variant] = f"{type(error).__name__}: {error}"[:100]
    return found


def _variant_once(family: str, k: int, variant: str) -> str | None:
    """Compile it. Returns why a variant does not fit the GPU: that is no fault."""
    from triton.runtime.errors import OutOfResources

    table, names = FAMILIES[family]
    try:
        with variants.forced(table[k][variant]):
            work = passes(k, 1)
            for name in names:
                work[name]["ours"]()
            synchronize(DEVICE)
    except OutOfResources as error:
        return str(error)
    return None


def varied_jobs() -> dict[str, Job]:
    return {
        f"variants of the {family}, {k} kernels": Job(functools.partial(varied, family, k), 60)
        for k in ((16,) if DRY else (64, 32, 128, 16))
        for family in FAMILIES
    }


def variants_once() -> dict[str, Job]:
    """Jobs that compile every variant."""
    return {
        f"compile {variant} at {k}": Job(functools.partial(_variant_once, family, k, variant), 60)
        for family, (table, _) in FAMILIES.items()
        for k in WIDTHS
        for variant in list(table[k])[: 1 if DRY else None]
    }


# --- networks ---------------------------------------------------------------------------------------------------------


def network_cases() -> list[networks.Case]:
    return [networks.Case("routed", 6, 1, (3, 3, 3), 1)] if DRY else networks.cases("cuda", full=True)


def _network_once(case: networks.Case, name: str) -> None:
    networks.contestant(case, name, "triton")()
    synchronize(DEVICE)


def _inference_once(case: networks.Case) -> None:
    networks.inferences(case, "triton")["network"]()
    synchronize(DEVICE)


def measured_network(case: networks.Case, names: list[str]) -> dict[str, Any]:
    """Of a training step of each: microseconds in a CUDA graph and eager (quartiles), and the most memory it takes."""
    torch.backends.cudnn.benchmark = True
    steps = {name: functools.partial(networks.contestant, case, name, "triton") for name in names}
    return measured(steps, case)


def measured_inference(case: networks.Case) -> dict[str, Any]:
    torch.backends.cudnn.benchmark = True
    runs = networks.inferences(case, "triton")
    return measured({name: functools.partial(runs.get, name) for name in runs}, case)


def measured(makers: dict[str, Callable[[], Any]], case: networks.Case) -> dict[str, Any]:
    graphs, eager, memory, failed = {}, {}, {}, {}
    for name, make in makers.items():
        try:
            call = make()
            graphs[name] = captured(call, DEVICE)
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                memory[name] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
            eager[name] = quartiles([elapsed(call, DEVICE) for _ in range(1 if DRY else 8)][-6:])
        except Exception as error:  # it takes no part
            failed[name] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
    times = interleaved(graphs, ROUNDS, 0 if DRY else 2, DEVICE)
    return {
        "graph_us": {name: quartiles(one) for name, one in times.items()}, "eager_us": eager, "memory_MiB": memory,
        "failed": failed, "batch": case.batch,
    }  # fmt: skip


def graph_equals_eager() -> str:
    """The gradients of a training step with fixed groupings, captured in a CUDA graph, are those of an eager step, to
    the bit; and so are the outputs."""
    torch.manual_seed(0)
    model = SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(4, 4, 4) if DRY else 16, blocks=1, residual="routed")
    assign(model, {name: torch.arange(layer.out_channels) % 3 for name, layer in sfg_layers(model).items()})
    model = model.to(DEVICE).to(memory_format=LAST)
    x = torch.randn(2, 1, *((8, 8) if DRY else (96, 96)), device=DEVICE)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> list[Tensor]:
        with backend("triton"):
            y = model(x)
            loss = y["ct"].square().mean() + y["organs"].square().mean()
            return [*y.values(), *torch.autograd.grad(loss, parameters, materialize_grads=True)]

    replay = captured(step, DEVICE)
    in_graph = [t.clone() for t in replay()]
    eager = step()
    for a, b in zip(in_graph, eager, strict=True):
        assert torch.equal(a, b), "a step in a CUDA graph gave other bits than an eager one"
    return f"{len(eager)} tensors equal to the bit"


# --- steps as `sfg-fast train` does them ------------------------------------------------------------------------------


def captured_equals_eager() -> str:
    """Steps of a training with drawn groupings end with the same bits, captured in CUDA graphs and eagerly."""
    sizes: dict[str, Any] = (
        {"width": (4, 4, 4), "batch": 2, "side": 8} if DRY else {"width": 16, "batch": 4, "side": 64}
    )
    with backend("masked" if DRY else "triton"):  # cuDNN's weight gradients have other bits every time
        return training_steps.captured_equals_eager(DEVICE, blocks=1, **sizes)


def measured_training() -> dict[str, dict[str, list[float]]]:
    """Milliseconds (quartiles) of a step, captured and eagerly, for each size of the slices."""
    sizes: dict[str, dict[str, Any]] = {
        "10 slices of 128x128": {"batch": 10, "side": 128},
        "16 slices of 256x256": {"batch": 16, "side": 256},
    }
    if DRY:
        sizes = {"2 slices of 8x8": {"width": (4, 4, 4), "blocks": 1, "batch": 2, "side": 8}}
    with backend("masked" if DRY else "triton"):
        return {name: training_steps.measured(DEVICE, 1 if DRY else 3, **size) for name, size in sizes.items()}


# --- the host ---------------------------------------------------------------------------------------------------------


def host() -> dict[str, float]:
    """Microseconds that the host takes for a call of three layers, at a size where the device is done at once."""
    result = {}
    for work in kernel_choice.WORKS:
        for name in ("triton", "masked"):
            call = layers_at_work(work, 16, name, DEVICE, HALF, 1, 8 if DRY else 16)
            result[f"{work}, {name}"] = _host_us(call, 1 if DRY else 30)
    return result


def _host_once(work: str) -> None:
    layers_at_work(work, 16, "triton", DEVICE, HALF, 1, 8 if DRY else 16)()
    synchronize(DEVICE)


def _host_us(call: Callable[[], object], calls: int) -> float:
    call()
    times = []
    for _ in range(1 if DRY else 5):
        synchronize(DEVICE)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return round(statistics.median(times), 1)


# --- the parts --------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Jobs that run together."""

    name: str
    jobs: dict[str, Job]
    processes: int
    until: float  # share of the minutes after which it is cut off


def parts(compiled: bool) -> list[Part]:
    """In the order of what matters. Times are taken by one process alone. `compiled`: what torch.compile makes of the
    baselines instead of variants; compiling takes minutes."""
    cores = len(os.sched_getaffinity(0))
    found = [
        Part("checks", checking(not compiled), 2 if DRY else min(12, cores), 0.35),
        Part("layers", {f"layer {k}": Job(functools.partial(measured_layer, k), 60) for k in WIDTHS}, 1, 0.55),
    ]
    names = [
        "straight_through",
        "selected",
        "masked, channels_last",
        "one plain, channels_last",
        "dense, channels_last",
    ]
    names = ["straight_through"] if DRY else names
    jobs = {}
    for case in network_cases():
        jobs[f"network {case}"] = Job(functools.partial(measured_network, case, names), 60)
        jobs[f"inference {case}"] = Job(functools.partial(measured_inference, case), 60)
    jobs["training steps"] = Job(measured_training, 60)
    found.append(Part("networks", jobs, 1, 0.8))
    if compiled:
        names = ["straight_through", *(f"{n} compiled, channels_last" for n in ("one plain", "dense"))]
        jobs = {
            f"network {case}, compiled": Job(functools.partial(measured_network, case, names), 150)
            for case in network_cases()
            if case.kind != "vgg"
        }
        return [*found, Part("compiled", jobs, 1, 1.0)]
    return [*found, Part("variants", {"host": Job(host, 60), **varied_jobs()}, 1, 1.0)]
