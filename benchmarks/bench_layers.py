"""The layer suite compares all ways to compute an SFG layer, in the forward pass and in a training step.

python -m pytest benchmarks/bench_layers.py       on the CPU or a GPU: rows of the table that conftest.py prints
python -m benchmarks.bench_layers [FILE.md [ISA]] the CPU's table of all layers; also writes it to the file

With ISA the backend native uses its kernels for this instruction set. To make all of torch use AVX2, too, set
ONEDNN_MAX_CPU_ISA=AVX2, ATEN_CPU_CAPABILITY=avx2 and MKL_ENABLE_INSTRUCTIONS=AVX2.
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

from benchmarks.layers import KERNELS, LAYERS, STREAMS, WIDTHS, Layer, Work, fastest, layers, works
from benchmarks.timing import Spread, cell, finished, machine, ratio, ratios, timed
from sfg_fast.gpu.timing import interleaved
from sfg_fast.groups import FilterGroups, Routing

PHASES = ("forward", "forward+backward")
ROUNDS = 15
CALLS = 20  # so many calls are in a CUDA graph: launching a graph takes as long as one call
SGEMM = 1024  # the size of the square matrices of the roof


def calls(work: dict[str, Work], phase: str) -> dict[str, Callable[[], object]]:
    if phase == "forward":
        return {name: torch.no_grad()(entry.forward) for name, entry in work.items()}
    return {name: entry.step for name, entry in work.items()}


def forms(times: dict[str, list[float]], name: str) -> dict[str, list[float]]:
    """The times of a contestant in each memory format, eager and compiled."""
    return {key: one for key, one in times.items() if key.split(",")[0] == name}


def faster(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The times of each contestant in its faster form. If dense masking was compiled, it has a second entry without."""
    names = dict.fromkeys(key.split(",")[0] for key in times)
    found = {name: min(forms(times, name).values(), key=statistics.median) for name in names}
    dense = forms(times, "dense masking")
    eager = [one for key, one in dense.items() if "compiled" not in key]
    if 0 < len(eager) < len(dense):
        found["eager dense masking"] = min(eager, key=statistics.median)
    return found


@functools.cache
def compare(layer: Layer, phase: str) -> dict[str, Spread]:
    """{contestant: (median, quartiles) of its time over native's}, each in its faster form."""
    times = faster(interleaved(calls(works(layer), phase), ROUNDS))
    return {name: ratio(times, name, "native") for name in times if name != "native"}


def kernel_calls(layer: Layer) -> dict[str, Callable[[], object]]:
    """Calls of the bare kernels, and of their roofs: sgemm, and copying input and output. They allocate nothing."""
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
    """The GFLOP/s of necessary work that the kernels do, and their fractions of the roofs."""
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


def pytest_generate_tests(metafunc: Any) -> None:
    cases = [
        pytest.param(layer, phase, id=f"{layer.name}-{phase}")
        for layer in layers(metafunc.config.getoption("full"))
        for phase in PHASES
    ]
    metafunc.parametrize(("layer", "phase"), cases)


def test_layer(benchmark: Any, record: Any, device: str, full: bool, layer: Layer, phase: str) -> None:
    """Time all contestants in turns, in device time. pytest-benchmark times our layer alone, as Python calls it."""
    benchmark.group = f"layers, {phase}"
    ours = fastest(device)
    # On two cores compiling takes longer than all other work.
    run = calls(works(layer, device, compiled=full or device == "cuda"), phase)
    times, left_out = timed(run, device, ROUNDS, repeat=CALLS)
    assert ours in times, left_out[ours]
    benchmark.pedantic(finished(run[ours], device), rounds=5, warmup_rounds=2)
    what, times = ours, faster(times)
    if ours != KERNELS[device]:
        what += f" ({KERNELS[device]} is not there)"
    if device == "cuda":
        what += f", {statistics.median(times[ours]) * 1e6:.1f} us"
    pairs = {
        "dense masking / ours": ("dense masking", ours),
        "eager dense masking / ours": ("eager dense masking", ours),
        "ours / one plain": (ours, "one plain convolution"),
        "masked / ours": ("masked", ours),
        "one for each group / ours": ("torch" if layer in STREAMS else "T+1 sliced convolutions", ours),
    }
    record(f"{layer.name}: {phase}", what, ratios(times, pairs), left_out=left_out)
    if ours == "native":
        benchmark.extra_info |= {key: round(value, 2) for key, value in kernel_rates(layer).items()}


# ------------------------------------------------------------------------------------------------------------ the table


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
