"""What the compilers make of the Triton kernels, for GPUs that need not be there.

    python benchmarks/static_report.py [--json FILE] [--markdown FILE] [--quick]

Compiles every configuration that the formulas of kernels/triton/config.py choose for 16 to 256 channels and all dtypes,
for sm_80, sm_90, sm_100 and gfx942, and tabulates: registers, stack, shared memory, programs (CTAs) that fit on a
multiprocessor; and of the main loop its instructions, the matrix instructions among them (issue ratio), and the
narrowest access to global memory. For every pass: executed / necessary products and bytes, from the tiles' real ranges.

Exit code 1, with the reasons, where a guarantee is broken (`problems`). Needs triton, no GPU and no driver.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.spec import Geometry, RoutedConv
from sfg_fast.kernels.triton import config
from sfg_fast.kernels.triton.config import Gradient, Pass
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sfg_fast.groups import FilterGroups, Routing

CHANNELS = (16, 32, 64, 128, 256)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
GEOMETRY = Geometry((1, 1), (1, 1), (1, 1))
LIMITS = {  # of executed / necessary products, from 128 channels on
    "forward": 1.4, "input gradient": 1.4, "weight gradient": 1.45,
    "forward, others": 1.4, "input gradient, others": 1.4,
}  # fmt: skip


class Architecture(NamedTuple):
    """A GPU to compile for, and what its multiprocessor holds."""

    name: str
    target: GPUTarget
    device: config.Device
    registers: int
    shared: int
    threads: int
    matrix: str  # regular expression of matrix instructions


ARCHITECTURES = [
    Architecture(
        name, target, config.Device(processors, capability, block << 10), registers, shared << 10, 2048, matrix
    )
    for name, target, processors, capability, block, registers, shared, matrix in (
        ("sm_80", GPUTarget("cuda", 80, 32), 108, 80, 163, 65536, 164, r"HMMA"),
        ("sm_90", GPUTarget("cuda", 90, 32), 132, 90, 227, 65536, 228, r"HGMMA|HMMA"),
        ("sm_100", GPUTarget("cuda", 100, 32), 148, 100, 227, 65536, 228, r"UT\w*MMA|HMMA"),
        ("gfx942", GPUTarget("hip", "gfx942", 64), 304, 80, 64, 4 * 512 * 64, 64, r"v_mfma"),
    )
]


# --- what to compile --------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """One kernel for one layer, dtype and architecture."""

    direction: str
    channels: int
    kernels: int
    dtype: str
    architecture: Architecture
    kernel: str
    what: Pass | Gradient
    launch: config.Launch | None  # None: a small launch around the convolutions, with Triton's defaults
    constants: dict[str, Any]  # what the kernel is compiled for

    @property
    def warps(self) -> int:
        return 4 if self.launch is None else self.launch.options["num_warps"]


def even_split(width: int, groups: int = 3) -> FilterGroups:
    """`width` channels, as evenly as can be over shared and two tasks."""
    sizes = [width // groups + (g < width % groups) for g in range(groups)]
    return FilterGroups.from_assignment(torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes)), groups - 1)


def layer(channels: int, width: int, kind: str = "packed") -> RoutedConv:
    """An SFG layer on SFG features; on an image, if `channels` is 1. `kind`: packed; others, where all gates of rows
    and columns want a gradient; or soft (relaxed)."""
    rows = even_split(width)
    if channels == 1:
        return RoutedConv(rows, FilterGroups.blocks([1], ("image",)), Routing.ALL, GEOMETRY)
    columns = even_split(channels)
    if kind == "soft":
        rows, columns = FilterGroups.relaxed(rows.gates, 2), FilterGroups.streams(channels, 2)
    if kind == "others":
        rows, columns = (dataclasses.replace(side, all_gates=True) for side in (rows, columns))
    return RoutedConv(rows, columns, Routing.ARROW, GEOMETRY)


def configurations(
    channels: tuple[int, ...], dtypes: tuple[str, ...], architectures: list[Architecture], image: tuple[int, int, int]
) -> Iterator[Configuration]:
    """Of every layer: forward with bias and ReLU, input gradient through the ReLU, weight and bias gradient; the same
    two where all gates want a gradient, and this, behind a norm and a ReLU; of a relaxed draw; the normalisation; and
    the small launches.
    """
    for architecture in architectures:
        for dtype in dtypes:
            for c in (1, *channels):
                for k in channels:
                    yield from layer_configurations(c, k, dtype, architecture, image)


def layer_configurations(
    c: int, k: int, dtype: str, architecture: Architecture, image: tuple[int, int, int], spec: RoutedConv | None = None
) -> Iterator[Configuration]:
    """`spec`: an even split, if not given."""
    batch, height, width = image
    bits, device, size = DTYPES[dtype].itemsize * 8, architecture.device, (height, width)

    def one(direction: str, p: Pass, bias: bool, kernel: str = "", **constants: Any) -> Configuration:
        launch = config.plan(p, bits, batch, size, device, True, False, bias)
        constants |= {"P": p, "T": launch.tiles, "ACC": tl.float32}
        return Configuration(direction, c, k, dtype, architecture, kernel or launch.kernel, p, launch, constants)

    forward, adjoint, gradient = config.passes(spec or layer(c, k), (3, 3), DTYPES[dtype], device)
    yield one("forward", forward, True)
    yield one("input gradient", adjoint, False)
    launch = config.plan_gradient(gradient, bits, batch, size, device, True, True)
    constants = {"G": gradient, "T": launch.tiles, "ACC": tl.float32}
    yield Configuration(
        "weight gradient", c, k, dtype, architecture, launch.kernel, gradient, launch, constants
    )  # fmt: skip
    if c > 1:
        for kind in ("others", "soft"):
            other_forward, other_adjoint, _ = config.passes(layer(c, k, kind), (3, 3), DTYPES[dtype], device)
            yield one(f"forward, {kind}", other_forward, True)
            yield one(f"input gradient, {kind}", other_adjoint, False)
            if kind == "others":
                yield one(f"gates' gradient, {kind}", other_forward, True, "gate_gradient", KEPT=True, AFFINE=True)
    sizes = {"G": gradient, "K": k, "C": c, "BIAS": True}
    small = {
        "pack": {"F": forward, "B": adjoint, **sizes, "GATES": False, "BLOCK": 1024, "PLACES": 64},
        "reduce": {**sizes, "ACC": tl.float32, "BLOCK": 256},
        "sample": {"K": k, "GROUPS": 3, "BLOCK": triton.next_power_of_2(k), "GROUPS_2": 4, "NOISE": True},
    }
    if c == 1:  # the normalisation behind any layer of k kernels
        norm = config.norm(batch * height * width, k, device)
        usual = {"C": k, "ORDER": True, "RELU": True, "ACC": tl.float32, "BLOCK_P": norm.block_p}
        usual |= {"BLOCK_C": norm.block_c, "PARTS": norm.parts_2, "RESIDUAL": True, "ADD": True}
        few = {**usual, "BLOCK_C": norm.block_few}
        small |= dict.fromkeys(("moments", "affine", "gradient_sums", "affine_gradient"), usual)
        small |= dict.fromkeys(("statistics", "slopes"), few)
        small["keep_statistics"] = {"MOMENTUM": 0.1, "K": k, "GROUPS": 3, "BLOCK": triton.next_power_of_2(k)}
    for kernel, constants in small.items():
        yield Configuration(kernel, c, k, dtype, architecture, kernel, gradient, None, constants)


TYPES = {
    **dict.fromkeys(("x", "passed", "w", "residual", "y", "kept", "others", "dy", "df"), None),
    **dict.fromkeys(("weight", "forward", "backward"), None),
    **dict.fromkeys(("bias", "packed_bias", "partial", "partial_bias", "scale", "shift", "dw", "db"), "fp32"),
    **dict.fromkeys(("log_p", "noise"), "fp32"),
    **dict.fromkeys(("u", "du", "add"), None),
    **dict.fromkeys(("mean", "var", "slope", "offset", "dweight", "dbias"), "fp32"),
    **dict.fromkeys(("running_mean", "running_var", "pooled_mean", "pooled_var"), "fp32"),
    **dict.fromkeys(("row_places", "column_places"), "i32"),
}


def source(one: Configuration) -> ASTSource:
    """What Triton would compile at the first launch."""
    kernel = getattr(kernels, one.kernel + "_kernel")
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        indices = name.endswith(("order", "offsets")) or name in ("rows", "columns", "assignment", "draws")
        if name in one.constants:
            signature[name] = "constexpr"
        elif name == "eps":
            signature[name] = "fp32"
        elif name in TYPES or indices:
            signature[name] = "*" + ("i64" if indices else TYPES[name] or one.dtype)
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    constants = {name: value for name, value in one.constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, constants, aligned)


# --- what came out ----------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """Of one compiled kernel. Bytes, except `width_*`: bytes of the narrowest access to global memory in the loop."""

    registers: int
    stack: int
    shared: int
    programs: int  # that fit on one multiprocessor
    matrix: int  # instructions, in the whole kernel
    loop: int  # instructions of the main loop
    loop_matrix: int
    load: int
    store: int

    @property
    def issue_ratio(self) -> float:
        return self.loop_matrix / self.loop if self.loop else 0.0


def compile_one(one: Configuration) -> Code:
    architecture, options = one.architecture, {} if one.launch is None else one.launch.options
    compiled = triton.compile(source(one), target=architecture.target, options=options)
    threads = one.warps * (64 if architecture.target.backend == "hip" else 32)
    shared = compiled.metadata.shared
    if architecture.target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        code = amd_instructions(text)
    else:
        usage, text = disassemble(compiled.asm["cubin"])
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        stack += local
        code = nvidia_instructions(text)
    matrix = re.compile(architecture.matrix)
    loop = main_loop(code, matrix)
    fits = (
        architecture.threads // threads,
        architecture.registers // (threads * max(registers, 1)),
        architecture.shared // (shared + 1024),
        32,
    )
    loads, stores = ([width(op) for op in loop if re.match(kind, op)] for kind in (LOADS, STORES))
    every = [op for _, op, _ in code if matrix.match(op)]
    inside = [op for op in loop if matrix.match(op)]
    narrowest = (min(widths, default=16) for widths in (loads, stores))
    return Code(registers, stack, shared, min(fits), len(every), len(loop), len(inside), *narrowest)


LOADS = r"LDG\.|LDGSTS|UTMALDG|global_load|buffer_load"
STORES = r"STG\.|global_store|buffer_store"
Instruction = tuple[int, str, int | None]  # address, operation, where it jumps to


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the tools that come with Triton."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([folder / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    return usage, text


def nvidia_instructions(text: str) -> list[Instruction]:
    found = re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s?(.*?);", text, re.MULTILINE)
    code: list[Instruction] = []
    for match in found:
        target = re.search(r"0x([0-9a-f]+)\s*$", match[3]) if match[2].startswith("BRA") else None
        code.append((int(match[1], 16), match[2], int(target[1], 16) if target else None))
    return code


def amd_instructions(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    code: list[tuple[int, str, str]] = []
    for line in text.split(".amdhsa_kernel")[0].splitlines():
        if match := re.match(r"^(\.LBB\w+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"^\s+([a-z]\w+)\s*(.*)", line):
            code.append((len(code), match[1], match[2]))
    return [(at, op, labels.get(rest.strip()) if "branch" in op else None) for at, op, rest in code]


def main_loop(code: list[Instruction], matrix: re.Pattern[str]) -> list[str]:
    """Operations of the innermost loop with the most matrix instructions (of any loop, if none has any)."""
    loops = []
    for at, _, target in code:
        if target is not None and target < at:
            loops.append([op for address, op, _ in code if target <= address <= at])
    count = {id(loop): sum(bool(matrix.match(op)) for op in loop) for loop in loops}
    return max(loops, key=lambda loop: (count[id(loop)] / len(loop), len(loop)), default=[])


def width(op: str) -> int:
    """Bytes that one thread reads or writes."""
    if op.islower() or "_" in op:
        return next((size for name, size in AMD_WIDTHS.items() if op.endswith(name)), 4)
    parts = op.split(".")
    return next((size for name, size in NVIDIA_WIDTHS.items() if name in parts), 4)


NVIDIA_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "short_d16": 2,
              "short_d16_hi": 2, "ubyte": 1}  # fmt: skip


# --- work that is done and work that is needed ------------------------------------------------------------------------


class Work(NamedTuple):
    """Products and bytes, executed by the tiles and necessary; `masked`: products of one masked convolution. Of one
    pixel and one tap (bytes: all taps)."""

    executed: int
    necessary: int
    masked: int
    bytes_executed: float
    bytes_necessary: int


def tile_ranges(p: Pass, out: FilterGroups, read: FilterGroups) -> list[tuple[int, int, int]]:
    """For every tile of output channels: prefix, start and chunks, as `ranges_read` in convolve.py finds them on the
    device (a test compares both)."""
    out_offsets, offsets = out.offsets.tolist(), read.offsets.tolist()
    table = []
    for n0 in range(0, p.columns, p.block_n):
        here = [g for g in range(p.out_groups) if out_offsets[g] < min(n0 + p.block_n, out_offsets[g + 1])]
        here = [g for g in here if out_offsets[g + 1] > n0 and out_offsets[g + 1] > out_offsets[g]]
        everything = p.routing == "all" or (p.routing == "arrow" and p.adjoint and 0 in here)
        own = [g for g in here if g < p.in_groups and offsets[g + 1] > offsets[g]]
        low = 0 if everything and here else min((offsets[g] for g in own), default=p.channels)
        high = p.channels if everything and here else max((offsets[g + 1] for g in own), default=0)
        prefix = config.cdiv(offsets[1], p.block_k) if p.routing == "arrow" and not p.adjoint and here else 0
        start = max(low // 8 * 8, prefix * p.block_k)
        table.append((prefix, start, prefix + config.cdiv(max(high - start, 0), p.block_k)))
    return table


def work(one: Configuration) -> Work | None:
    """Of a configuration; None for small launches, and relaxed draws: these repeat nothing."""
    if one.launch is None or one.direction.endswith("soft"):
        return None
    spec, itemsize = layer(one.channels, one.kernels), DTYPES[one.dtype].itemsize
    rows, columns = (torch.repeat_interleave(torch.arange(3), side.offsets.diff()) if len(side.names) > 1 else None
                     for side in (spec.rows, spec.columns))  # fmt: skip
    masked = one.channels * one.kernels
    necessary = masked if columns is None else int(((columns == 0) | (columns == rows[:, None])).sum())
    once = (one.channels + one.kernels) * itemsize
    if isinstance(one.what, Gradient):
        g = one.what
        taps = 9 * g.channels if g.flat else g.channels
        live = 0
        tiles = [(c, k) for c in range(0, taps, g.block_c) for k in range(0, g.out_channels, g.block_k)]
        for c, k in tiles:
            part = None if columns is None else columns[c : c + g.block_c]
            live += part is None or bool(((part == 0) | (part == rows[k : k + g.block_k, None])).any())
        executed = live * g.block_c * g.block_k
        loaded = live * (9 / g.taps) * (g.taps * g.block_c + 2 * g.block_k) * itemsize
        return Work(executed // (9 if g.flat else 1), necessary, masked, loaded, once + one.kernels * itemsize)
    p, (out, read) = one.what, (spec.columns, spec.rows) if one.what.adjoint else (spec.rows, spec.columns)
    relu = 2 if p.adjoint else 1  # the ReLU's output is read beside its gradient
    once += one.kernels * itemsize if p.adjoint else 0
    pixels = one.launch.tiles.pixels_h * one.launch.tiles.pixels_w
    if one.launch.kernel == "rowwalk":
        chunk = 16 if p.channels <= 16 else 32 if p.channels <= 32 else 64
        tiles_n, steps = p.columns // p.block_n, one.launch.steps
        halo = (steps + 2) / steps
        loaded = tiles_n * (halo * 3 * chunk * relu + 9 * chunk * p.block_n / pixels / steps)
        return Work(round(halo * p.columns * chunk), necessary, masked, (loaded + p.out_channels) * itemsize, once)
    if p.flat:
        depth = config.cdiv(9 * p.channels, p.block_k) * p.block_k
        loaded = p.columns // p.block_n * depth * (relu + p.block_n / pixels)
        return Work(p.columns * depth // 9, necessary, masked, (loaded + p.out_channels) * itemsize, once)
    written = p.out_channels
    if one.direction.endswith("others"):
        chunks = other_chunks(one, p, out, read)
        if p.adjoint:
            necessary, written = masked, 3 * p.out_channels
            once += 2 * p.out_channels * itemsize
        elif one.kernel == "gate_gradient":
            necessary = int(((columns > 0) & (columns != rows[:, None])).sum())
            written = 3 * p.out_channels  # or read: what was kept, and the gradient of the others
            once += 2 * p.out_channels * itemsize
        else:
            written = 2 * p.out_channels
            once += p.out_channels * itemsize
    else:
        chunks = [chunks for _, _, chunks in tile_ranges(p, out, read)]
    executed = sum(chunks) * p.block_k * p.block_n
    loaded = 9 * sum(chunks) * p.block_k * (relu + p.block_n / pixels)
    return Work(executed, necessary, masked, (loaded + written) * itemsize, once)


def other_chunks(one: Configuration, p: Pass, out: FilterGroups, read: FilterGroups) -> list[int]:
    """For every tile of output channels: chunks of all the ranges that everything.py goes through."""
    ends, offsets, table = out.offsets.tolist(), read.offsets.tolist(), []

    def chunks(low: int, high: int) -> int:
        return config.cdiv(high - low // 8 * 8, p.block_k) if high > low else 0

    for n0 in range(0, p.columns, p.block_n):
        n1 = n0 + p.block_n
        if p.adjoint:
            ranges = [(offsets[g], offsets[g + 1]) for g in range(p.in_groups)]
        elif one.kernel == "gate_gradient":
            alone = [ends[g] <= n0 and ends[g + 1] >= n1 for g in range(p.out_groups)]
            ranges = [(offsets[g], offsets[g + 1]) for g in range(1, p.in_groups) if not alone[g]]
        else:
            here = [g for g in range(1, p.out_groups) if max(ends[g], n0) < min(ends[g + 1], n1)]
            here = [g for g in here if offsets[g + 1] > offsets[g]]
            ranges = [(0, offsets[1]), (min(map(offsets.__getitem__, here), default=0),
                                        max((offsets[g + 1] for g in here), default=0))]  # fmt: skip
        table.append(sum(chunks(low, high) for low, high in ranges))
    return table


# --- the report -------------------------------------------------------------------------------------------------------


def problems(one: Configuration, code: Code, done: Work | None) -> list[str]:
    """The guarantees that this configuration breaks."""
    nvidia, half = one.architecture.target.backend == "cuda", one.dtype != "fp32"
    name = f"{one.architecture.name} {one.dtype} {one.channels}->{one.kernels} {one.direction}"
    found = []
    if code.stack and one.architecture.name in ("sm_90", "sm_100"):
        found.append(f"{name}: {code.stack} bytes of stack")
    if code.shared > one.architecture.device.shared:
        found.append(f"{name}: {code.shared} bytes of shared memory, there are {one.architecture.device.shared}")
    if half and one.launch is not None and not code.matrix:
        found.append(f"{name}: no matrix instruction")
    if half and nvidia and one.launch is not None and one.channels % 8 == 0 and min(code.load, code.store) < 16:
        found.append(f"{name}: accesses of {min(code.load, code.store)} bytes in the main loop")
    if half and done is not None and min(one.channels, one.kernels) >= 128:
        ratio = done.executed / done.necessary
        if ratio > LIMITS.get(one.direction, ratio):
            found.append(f"{name}: {ratio:.3f} times the necessary products, allowed {LIMITS[one.direction]}")
    return found


def keys_of_resampled_groups(samples: int = 50) -> int:
    """How many sets of kernels Triton would compile for one layer and many drawn groupings."""
    keys = set()
    for _ in range(samples):
        rows, columns = (FilterGroups.from_assignment(torch.randint(3, (64,))) for _ in range(2))
        spec = RoutedConv(rows, columns, Routing.ARROW, GEOMETRY)
        some = layer_configurations(64, 64, "fp16", ARCHITECTURES[1], (4, 96, 96), spec)
        keys.add(tuple(source(one).hash() for one in some))
    return len(keys)


def row(one: Configuration, code: Code, done: Work | None) -> dict[str, Any]:
    figures = {
        "architecture": one.architecture.name, "dtype": one.dtype, "C": one.channels, "K": one.kernels,
        "pass": one.direction, "kernel": one.kernel, "warps": one.warps,
        **code._asdict(), "issue_ratio": round(code.issue_ratio, 4),
    }  # fmt: skip
    if done is not None:
        figures |= {
            "executed_over_necessary": round(done.executed / done.necessary, 3),
            "masked_over_necessary": round(done.masked / done.necessary, 3),
            "bytes_over_necessary": round(done.bytes_executed / done.bytes_necessary, 2),
        }
    return figures


HEADER = """| GPU | dtype | C->K | pass | kernel | warps | registers | stack | shared | CTAs | matrix | loop | issue | \
load | store | products | masked | bytes |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def line(figures: dict[str, Any]) -> str:
    f = figures
    cells = [f["architecture"], f["dtype"], f"{f['C']}->{f['K']}", f["pass"], f["kernel"], f["warps"], f["registers"],
             f["stack"], f["shared"], f["programs"], f["matrix"], f["loop"], f"{f['issue_ratio']:.3f}", f["load"],
             f["store"], f.get("executed_over_necessary", ""), f.get("masked_over_necessary", ""),
             f.get("bytes_over_necessary", "")]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def trade_off() -> str:
    """At 64 channels: what smaller tiles would skip, and what they would read."""
    lines = [
        "At C = K = 64, fp16, forward, even split: products executed / necessary, and channels of x read per pixel:"
    ]
    passes = config.passes(layer(64, 64), (3, 3), torch.float16, ARCHITECTURES[1].device)[0]
    usual = work(next(layer_configurations(64, 64, "fp16", ARCHITECTURES[1], (1, 64, 64))))
    assert usual is not None
    for n, k in ((16, 16), (32, 16), (32, 32), (64, 32)):
        p = dataclasses.replace(passes, block_n=n, block_k=k, columns=64)
        spec = layer(64, 64)
        chunks = sum(chunks for _, _, chunks in tile_ranges(p, spec.rows, spec.columns))
        lines.append(f"  tiles of {n:2} x {k:2}: {chunks * k * n / usual.necessary:.2f}, 9 x {chunks * k:3}")
    lines.append("  rowwalk     : 1.80 and its halo, 3 x  64")
    lines.append(
        "Rowwalk is taken on sm_90 and sm_100: by count it reads 3 to 8 times less from the cache. Unmeasured."
    )
    return "\n".join(lines)


def report(some: list[Configuration], workers: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Figures of all configurations, and what is wrong."""
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        codes = list(tqdm(pool.map(compile_one, some, chunksize=8), total=len(some), desc="compiling", disable=None))
    figures, wrong = [], []
    for one, code in zip(some, codes, strict=True):
        done = work(one)
        figures.append(row(one, code, done))
        wrong += problems(one, code, done)
    keys = keys_of_resampled_groups()
    if keys > 1:
        wrong.append(f"{keys} compiled kernels for 50 drawn groupings of one layer, expected 1")
    return figures, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here instead of printing it")
    parser.add_argument("--quick", action="store_true", help="64 and 128 channels, fp16, sm_90 only")
    arguments = parser.parse_args()
    if arguments.quick:
        some = list(configurations((64, 128), ("fp16",), ARCHITECTURES[1:2], (16, 256, 256)))
    else:
        some = list(configurations(CHANNELS, tuple(DTYPES), ARCHITECTURES, (16, 256, 256)))
    figures, wrong = report(some, os.cpu_count() or 1)
    table = "\n".join([HEADER, *map(line, figures)])
    verdict = "\n".join(wrong) if wrong else f"All guarantees hold for {len(figures)} compiled kernels."
    versions = f"triton {triton.__version__}, torch {torch.__version__}"
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "kernels": figures, "problems": wrong}, indent=1))
    if arguments.markdown:
        text = (
            f"# What the compilers make of the Triton kernels\n\n`python benchmarks/static_report.py`, {versions}\n\n"
        )
        arguments.markdown.write_text(f"{text}{verdict}\n\n```\n{trade_off()}\n```\n\n{table}\n")
    else:
        print(table)
    print(trade_off())
    print(verdict)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
