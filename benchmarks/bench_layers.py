"""The layer suite: SFG layers by every means, forward and training step.

python -m pytest benchmarks/bench_layers.py       pytest-benchmark's groups; the ratios are in extra_info
python -m benchmarks.bench_layers [FILE.md [ISA]] the table of interleaved comparisons; also writes it to the file

ISA: use native's kernels for this instruction set. To have all of torch on AVX2, too, set ONEDNN_MAX_CPU_ISA=AVX2,
ATEN_CPU_CAPABILITY=avx2 and MKL_ENABLE_INSTRUCTIONS=AVX2 before.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.layers import COMPILED, LAYERS, STREAMS, WIDTHS, Layer, Work, contestants, stream_contestants
from benchmarks.timing import machine, ratio
from sfg_fast.backends import available
from sfg_fast.gpu.timing import interleaved
from sfg_fast.groups import FilterGroups, Routing

pytestmark = pytest.mark.skipif(not available("native"), reason="native is not built")
PHASES = ("forward", "forward+backward")
ROUNDS = 15
SGEMM = 1024  # the size of the square matrices of the roof


def calls(work: dict[str, Work], phase: str) -> dict[str, Callable[[], object]]:
    if phase == "forward":
        return {name: torch.no_grad()(entry.forward) for name, entry in work.items()}
    return {name: entry.step for name, entry in work.items()}


def faster(times: dict[str, list[float]], name: str) -> str:
    """The faster memory format (or compiled form) of a contestant."""
    return min((key for key in times if key.split(",")[0] == name), key=lambda key: statistics.median(times[key]))


def works(layer: Layer) -> dict[str, Work]:
    return stream_contestants(layer) if layer in STREAMS else contestants(layer)


@functools.cache
def compare(layer: Layer, phase: str) -> dict[str, Any]:
    """{contestant: (median, quartiles) of its time over native's}, each in its faster form."""
    times = interleaved(calls(works(layer), phase), ROUNDS)
    names = dict.fromkeys(key.split(",")[0] for key in times)
    return {name: ratio(times, faster(times, name), "native") for name in names if name != "native"}


def kernel_calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """The bare kernels, and their roofs: sgemm, and copying input and output. Nothing is allocated."""
    from sfg_fast.kernels.cpu import _native

    own, merge = layer.routing == "own", layer.kernel == 1
    rows = FilterGroups.blocks([0, *layer.groups[1:]] if merge else layer.groups, ("shared", "task1", "task2"))
    columns = FilterGroups.blocks(layer.groups, rows.names)
    routing = Routing.OWN if own else Routing.ARROW
    if layer.routing == "all":
        columns, routing = FilterGroups.blocks([1], ("image",)), Routing.ALL
    padding = layer.dilation * (layer.kernel // 2)
    reads = [int(read) for row in routing.reads(3, len(columns.names)) for read in row]
    where = (rows.ends, columns.ends, reads)
    where += ((1, 1), (padding, padding), (layer.dilation, layer.dilation), torch.get_num_threads())  # type: ignore[assignment]
    x = torch.randn(layer.batch, int(columns.offsets[-1]), *layer.size)
    weight = torch.randn(int(rows.offsets[-1]), x.shape[1], layer.kernel, layer.kernel)
    bias = torch.randn(weight.shape[0])
    y = torch.empty(layer.batch, weight.shape[0], *layer.size)
    dx, dy, dw, db = torch.empty_like(x), torch.randn_like(y), torch.empty_like(weight), torch.empty_like(bias)
    a, b, c = torch.randn(SGEMM, SGEMM), torch.randn(SGEMM, SGEMM), torch.empty(SGEMM, SGEMM)
    _native.forward(x, weight, bias, None, True, y, None, *where)

    def backward() -> None:
        _native.input_gradient(dy, y, weight, None, None, dx, None, None, None, None, *where)
        _native.weight_gradient(x, dy, y, dw, db, *where)

    return {
        "forward": lambda: _native.forward(x, weight, bias, None, True, y, None, *where),
        "backward": backward,
        "sgemm": lambda: torch.mm(a, b, out=c),
        "copy": lambda: (dx.copy_(x), dy.copy_(y)),
    }


@functools.cache
def kernel_rates(layer: Layer) -> dict[str, float]:
    """GFLOP/s of necessary work, and fractions of the roofs."""
    times = {name: statistics.median(t) for name, t in interleaved(kernel_calls(layer), 2 * ROUNDS).items()}
    sgemm = 2 * SGEMM**3 / times["sgemm"]
    forward, backward = layer.flops / times["forward"], 2 * layer.flops / times["backward"]
    return {
        "forward GFLOP/s": forward / 1e9,
        "backward GFLOP/s": backward / 1e9,
        "sgemm GFLOP/s": sgemm / 1e9,
        "forward of sgemm": forward / sgemm,
        "backward of sgemm": backward / sgemm,
        "forward time over copy": times["forward"] / times["copy"],
    }


TIMED = [layer for layer in LAYERS if layer.name in ("1->16", "16", "64", "128")] + [STREAMS[0], STREAMS[3]]


def cases() -> list[Any]:
    return [
        pytest.param(layer, phase, name, id=f"{layer.name}-{phase}-{name}")
        for layer in TIMED
        for phase in PHASES
        for name in _names(layer)
    ]


def _names(layer: Layer) -> list[str]:
    if layer in STREAMS:
        return ["native", "masked", "torch, separately", "torch, separately, channels_last"]
    names = ["native", "masked", "one plain convolution", "dense masking"]
    names += ["T+1 sliced convolutions"] * (layer.routing != "all")
    names += ["dense masking, compiled"] * (layer.name in COMPILED)
    formats = {name: ("",) if name in names[:2] else ("", ", channels_last") for name in names}
    return [name + suffix for name in names for suffix in formats[name]]


@functools.lru_cache(maxsize=1)
def _works_of(layer: Layer) -> dict[str, Work]:
    return works(layer)


@pytest.mark.parametrize(("layer", "phase", "name"), cases())
def test_layer(benchmark: Any, layer: Layer, phase: str, name: str) -> None:
    benchmark.group = f"{layer.name}, {phase}"
    benchmark.pedantic(calls(_works_of(layer), phase)[name], rounds=5, warmup_rounds=2)
    if name == "native":
        for other, (median, low, high) in compare(layer, phase).items():
            benchmark.extra_info[f"{other} / native"] = f"{median:.2f} ({low:.2f}-{high:.2f})"
        benchmark.extra_info |= {key: round(value, 2) for key, value in kernel_rates(layer).items()}


# ------------------------------------------------------------------------------------------------------------ the table


def cell(value: tuple[float, float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} ({value[1]:.2f}-{value[2]:.2f})"


def table(layers: list[Layer], against: list[str]) -> list[str]:
    columns = [f"{name}: {phase}" for name in against for phase in PHASES]
    columns += ["GFLOP/s of the kernels, forward / backward", "of sgemm", "forward over copy"]
    lines = ["| layer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for layer in layers:
        results = {phase: compare(layer, phase) for phase in PHASES}
        cells = [cell(results[phase].get(name)) for name in against for phase in PHASES]
        r = kernel_rates(layer)
        cells += [
            f"{r['forward GFLOP/s']:.0f} / {r['backward GFLOP/s']:.0f}",
            f"{r['forward of sgemm']:.2f} / {r['backward of sgemm']:.2f}",
            f"{r['forward time over copy']:.1f}",
        ]
        lines.append(f"| {layer.name} | " + " | ".join(cells) + " |")
    print("\n".join(["", *lines]), flush=True)
    return ["", *lines, ""]


def _environment() -> str:
    settings = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
    used = [f"{name}={os.environ[name]}" for name in settings if name in os.environ]
    return f" with {', '.join(used)}" if used else ""


def report(instruction_set: str) -> str:
    head = [
        "# SFG layers on the CPU: everything else against `native`",
        "",
        f"`python -m benchmarks.bench_layers FILE.md {instruction_set}`{_environment()}.",
        f"{machine()}, native on {instruction_set}, torch on {torch.backends.cpu.get_cpu_capability()}.",
        "Batch 4, 128x128 (128 kernels: 64x64), 3x3, groups as equal as can be. Cells: time over native's, medians",
        f"(quartiles) of {ROUNDS} interleaved rounds; every contestant in its faster memory format. A layer is",
        "convolution, bias, ReLU and masks, called from Python. The kernels alone, into memory that is there: rates of",
        "the necessary work, backward being input, weight and bias gradient; roofs: torch's sgemm, "
        f"{SGEMM} cubed, and copying input and output.",
    ]
    print("\n".join(head), flush=True)
    return "\n".join(
        [
            *head,
            *table(LAYERS, ["dense masking", "one plain convolution", "masked", "T+1 sliced convolutions"]),
            "Streams: torch's convolutions, one after the other, each on a tensor of its own.",
            *table(STREAMS, ["torch", "masked"]),
            "Widths, height 128.",
            *table(WIDTHS, ["dense masking", "one plain convolution", "masked"]),
        ]
    )


if __name__ == "__main__":
    from sfg_fast.kernels.cpu import INSTRUCTION_SET, _native

    chosen = sys.argv[2] if len(sys.argv) > 2 else INSTRUCTION_SET
    _native.use(chosen)
    text = report(chosen)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            file.write(text)
