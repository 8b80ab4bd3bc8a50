"""Reports what the compilers make of the Triton kernels. It needs no GPU.

    python benchmarks/static_report.py [--json FILE] [--markdown FILE] [--quick] [--channels N ..]

It compiles the configurations that the formulas of kernels/triton/config.py choose for 16 to 256 channels and all
dtypes, for sm_80, sm_90, sm_100 and gfx942. A table has for each: registers, stack, shared memory, and the programs
(CTAs) that fit on a multiprocessor; of the main loop its instructions, the matrix instructions among them (issue
ratio), and the narrowest access to global memory. For every pass it has executed / necessary products and bytes, from
the real ranges of the tiles.

The exit code is 1, with the reasons, if a guarantee is broken, if ptxas remarks something that is not KNOWN, or if a
tile that could multiply from shared memory does not, and KNOWN does not say why (`problems`). The report needs triton,
but no GPU and no driver.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
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
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.spec import RoutedConv
from sfg_fast.kernels.triton import config
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.counted import (
    DTYPES,
    GEOMETRY,
    Architecture,
    Configuration,
    Work,
    layer,
    layer_configurations,
    tile_ranges,
    work,
)
from sfg_fast.groups import FilterGroups, Routing

CHANNELS = (16, 32, 64, 128, 256)
# The limits of executed / necessary products, from 128 channels on, where tiles are chosen by count. (An H200 was 2 to
# 5 times faster with larger tiles, which skip little: results/gpu/.)
LIMITS = {
    "forward": 1.4, "input gradient": 1.4, "weight gradient": 1.45,
    "forward, undrawn": 1.4, "input gradient, undrawn": 1.4,
}  # fmt: skip


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


def configurations(
    channels: tuple[int, ...], dtypes: tuple[str, ...], architectures: list[Architecture], image: tuple[int, int, int]
) -> Iterator[Configuration]:
    """The kernels to compile, for layers from an image, of the same width, and to twice or half the width.

    They are the forward pass with bias and ReLU, the input gradient, and the weight and bias gradient; both gradients
    where all gates want a gradient, also behind a norm and a ReLU; those of a relaxed draw; the normalisation; and the
    small launches.
    """
    for architecture in architectures:
        for dtype in dtypes:
            for c, k in itertools.product((1, *channels), channels):
                if c == 1 or c in (k // 2, k, 2 * k):
                    yield from layer_configurations(c, k, dtype, architecture, image)


FLOATS = {"tf32": "fp32", "ieee": "fp32"}
TYPES = {
    **dict.fromkeys(
        ("x", "w", "residual", "added", "added_undrawn", "y", "second", "kept_product", "undrawn", "dy", "df"), None
    ),
    **dict.fromkeys(("weight", "forward", "every", "backward"), None),
    **dict.fromkeys(("bias", "packed_bias", "partial", "partial_bias", "scale", "shift", "affine", "dw", "db"), "fp32"),
    **dict.fromkeys(("log_p", "noise"), "fp32"),
    **dict.fromkeys(("u", "du", "add"), None),
    **dict.fromkeys(("mean", "var", "slope", "offset", "dweight", "dbias"), "fp32"),
    **dict.fromkeys(("running_mean", "running_var", "draws", "pooled_mean", "pooled_var"), "fp32"),
    **dict.fromkeys(("row_places", "column_places"), "i32"),
}


def source(one: Configuration) -> ASTSource:
    """The source that Triton would compile at the first launch."""
    kernel = getattr(kernels, one.kernel + "_kernel")
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        indices = name.endswith(("order", "offsets")) or name in ("rows", "columns", "assignment", "known")
        if name in one.constants:
            signature[name] = "constexpr"
        elif name in ("eps", "momentum"):
            signature[name] = "fp32"
        elif name in TYPES or indices:
            signature[name] = "*" + ("i64" if indices else TYPES[name] or FLOATS.get(one.dtype, one.dtype))
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    constants = {name: value for name, value in one.constants.items() if name in kernel.arg_names}
    return ASTSource(kernel, signature, constants, aligned)


# --- what came out ----------------------------------------------------------------------------------------------------


FEW_WARPS = (
    "4 warps with HGMMA took 1.08 to 1.71 times as long in tiles of 64 and 128 pixels (h200_variants.md), .94 to \
1.02 times in tiles of 256 (h200_confirmed.md)"
)
# (kernel, what ptxas says, or HMMA where wgmma or tcgen05 is possible): why it stays.
KNOWN: dict[tuple[str, str], str] = {
    ("rowwalk", "HMMA"): "2 warps with HMMA took .84 and .96 of the time of 4 warps with HGMMA at 16 and 32 channels "
    "(h200_variants.md); walks of several products would spill with the 64 rows that HGMMA takes",
    ("convolve_kept", "HMMA"): FEW_WARPS,
    ("convolve_undrawn", "HMMA"): FEW_WARPS,
    ("gate_gradient", "HMMA"): FEW_WARPS,
    ("convolve", "HMMA"): "the first layer alone, which gathers its factor in registers: not measured with 4 warps yet",
    ("convolve_all", "HMMA"): "relaxed draws at 16 channels alone: not measured with 4 warps yet",
    ("convolve", "C7517"): "the first layer gathers its factor in registers: one wait, not one for each product",
    ("convolve", "C7519"): "the first layer gathers its factor in registers",
    (
        "rowwalk_gates",
        "narrow",
    ): "16 -> 32 kernels alone: 16 columns of 16 channels are 8 bytes for each of 64 threads; "
    "32 columns would spill, and one warp, too",
    ("rowwalk_weights", "stack on sm_100"): "16 -> 32 kernels alone, 8 bytes",
}


class Instruction(NamedTuple):
    """One machine instruction; `target`: the address to which a branch jumps."""

    address: int
    op: str
    target: int | None
    operands: str


class Code(NamedTuple):
    """The figures of one compiled kernel. Sizes are in bytes; `width_*` are the bytes of the narrowest access to global
    memory in the main loop."""

    registers: int
    stack: int
    shared: int
    programs: int  # that fit on one multiprocessor
    matrix: int  # instructions, in the whole kernel
    loop: int  # instructions of the main loop
    loop_matrix: int
    load: int
    store: int
    warnings: tuple[str, ...] = ()  # of ptxas: codes like C7514
    hmma: int = 0  # those of the matrix instructions that read both factors from registers

    @property
    def issue_ratio(self) -> float:
        return self.loop_matrix / self.loop if self.loop else 0.0


class Binary(NamedTuple):
    """One compiled kernel: its resources (`stack` and `shared` in bytes), how many programs fit on one multiprocessor,
    and its code."""

    warps: int
    stages: int  # of the software pipeline
    registers: int
    stack: int
    shared: int
    programs: int
    code: list[Instruction]
    ptx: str  # empty for AMD's GPUs


def binary(one: Configuration) -> Binary:
    """What the compilers make of a configuration."""
    options = {} if one.launch is None else one.launch.options
    return binary_of(triton.compile(source(one), target=one.architecture.target, options=options), one.architecture)


def binary_of(compiled: Any, architecture: Architecture) -> Binary:
    """The same of what `triton.compile` returned."""
    warps, stages, shared = compiled.metadata.num_warps, compiled.metadata.num_stages, compiled.metadata.shared
    threads = warps * (64 if architecture.target.backend == "hip" else 32)
    if architecture.target.backend == "hip":
        text, ptx = compiled.asm["amdgcn"], ""
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        code = amd_instructions(text)
    else:
        ptx = compiled.asm["ptx"]
        usage, text = disassemble(compiled.asm["cubin"])
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        stack += local
        code = nvidia_instructions(text)
    fits = (
        architecture.threads // threads,
        architecture.registers // (threads * max(registers, 1)),
        architecture.shared // (shared + 1024),
        32,
    )
    return Binary(warps, stages, registers, stack, shared, min(fits), code, ptx)


def compile_one(one: Configuration) -> Code:
    """The figures of a configuration."""
    found, matrix = binary(one), re.compile(one.architecture.matrix)
    loop = main_loop(found.code, matrix)
    loads, stores = ([width(op) for op in loop if re.match(kind, op)] for kind in (LOADS, STORES))
    every = [here.op for here in found.code if matrix.match(here.op)]
    inside = [op for op in loop if matrix.match(op)]
    narrowest = (min(widths, default=16) for widths in (loads, stores))
    said = warnings(found.ptx, one.architecture.target.arch) if found.ptx else ()
    hmma = sum(op.startswith("HMMA") for op in every)
    return Code(
        found.registers, found.stack, found.shared, found.programs, len(every), len(loop), len(inside), *narrowest,
        said, hmma,
    )  # fmt: skip


def warnings(ptx: str, capability: int) -> tuple[str, ...]:
    """The codes of the remarks of ptxas: C75.. says where matrix instructions wait for each other. (Triton calls ptxas
    in the same way, but drops its remarks.)"""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-lineinfo", "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        done = subprocess.run([*command, file.name, "-o", os.devnull], capture_output=True, text=True, check=True)
    return tuple(sorted(set(re.findall(r"C75\d\d", done.stderr))))


LOADS = r"LDG\.|LDGSTS|UTMALDG|global_load|buffer_load"
STORES = r"STG\.|global_store|buffer_store"


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The resource usage and the machine code, from the tools that come with Triton."""
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
    """Of what cuobjdump prints, without the padding behind the end. An instruction that is never executed (ptxas
    writes some, under the predicate !PT) is a NOP."""
    found = re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s?(.*?);", text, re.MULTILINE)
    code: list[Instruction] = []
    for match in found:
        op = "NOP" if (match[2] or "").startswith("@!PT") else match[3]
        target = re.search(r"0x([0-9a-f]+)\s*$", match[4]) if op.startswith("BRA") else None
        code.append(Instruction(int(match[1], 16), op, int(target[1], 16) if target else None, match[4]))
    while code and code[-1].op == "NOP":
        code.pop()
    return code


def amd_instructions(text: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    code: list[tuple[int, str, str]] = []
    for line in text.split(".amdhsa_kernel")[0].splitlines():
        if match := re.match(r"^(\.LBB\w+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"^\s+([a-z]\w+)\s*(.*)", line):
            code.append((len(code), match[1], match[2]))
    return [Instruction(at, op, labels.get(rest.strip()) if "branch" in op else None, rest) for at, op, rest in code]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop: of all that lie between a branch backwards and where it jumps to."""
    return [
        [here for here in code if end.target <= here.address <= end.address]
        for end in code
        if end.target is not None and end.target < end.address
    ]


def main_loop(code: list[Instruction], matrix: re.Pattern[str]) -> list[str]:
    """The operations of the innermost loop with the most matrix instructions; of any loop, if none has any."""
    found = [[here.op for here in loop] for loop in loops(code)]
    return max(found, key=lambda ops: (sum(bool(matrix.match(op)) for op in ops) / len(ops), len(ops)), default=[])


def width(op: str) -> int:
    """How many bytes one thread reads or writes with an operation."""
    if op.islower() or "_" in op:
        return next((size for name, size in AMD_WIDTHS.items() if op.endswith(name)), 4)
    parts = op.split(".")
    return next((size for name, size in NVIDIA_WIDTHS.items() if name in parts), 4)


NVIDIA_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "short_d16": 2,
              "short_d16_hi": 2, "ubyte": 1}  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------------


def problems(one: Configuration, code: Code, done: Work | None) -> list[str]:
    """Sentences on the guarantees that this configuration breaks."""
    nvidia, half = one.architecture.target.backend == "cuda", one.dtype not in FLOATS
    name = f"{one.architecture.name} {one.dtype} {one.channels}->{one.kernels} {one.direction}"
    found = []
    # (float32 without TF32 has no matrix instruction to feed: what little it spills was no hindrance on an H200.)
    spilled = code.stack and one.architecture.name in ("sm_90", "sm_100") and one.dtype != "ieee"
    if spilled and (one.kernel, f"stack on {one.architecture.name}") not in KNOWN:
        found.append(f"{name}: {code.stack} bytes of stack, which KNOWN does not explain")
    if code.shared > one.architecture.device.shared:
        found.append(f"{name}: {code.shared} bytes of shared memory, there are {one.architecture.device.shared}")
    if half and one.launch is not None and not code.matrix:
        found.append(f"{name}: no matrix instruction")
    narrow = half and nvidia and one.launch is not None and one.channels % 8 == 0 and min(code.load, code.store) < 16
    if narrow and (one.kernel, "narrow") not in KNOWN:
        found.append(f"{name}: accesses of {min(code.load, code.store)} bytes in the main loop")
    found += [
        f"{name}: ptxas says {remark}, which KNOWN does not explain"
        for remark in code.warnings
        if (one.kernel, remark) not in KNOWN
    ]
    shared_factors = nvidia and one.architecture.device.multiplies_from_shared_memory
    if half and shared_factors and code.hmma and one.tile_rows >= 64 and (one.kernel, "HMMA") not in KNOWN:
        found.append(
            f"{name}: HMMA in a tile of {one.tile_rows} rows and {one.warps} warps, which KNOWN does not explain "
            "(64 rows and 4 warps suffice for factors from shared memory)"
        )
    counted_only = one.architecture.name in ("sm_80", "gfx942")
    if half and counted_only and done is not None and min(one.channels, one.kernels) >= 128:
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
    """Lines on what smaller tiles would skip and read at 64 channels."""
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
    lines.append("An H200 takes 208 us with tiles of 64 x 64, which load the input 9 times (results/gpu/).")
    return "\n".join(lines)


def report(some: list[Configuration], workers: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The figures of all configurations, and sentences on what is wrong."""
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
    parser.add_argument("--channels", type=int, nargs="+", help="instead of 16 to 256, or of 64 and 128")
    arguments = parser.parse_args()
    if arguments.quick:
        some = list(
            configurations(tuple(arguments.channels or (64, 128)), ("fp16",), ARCHITECTURES[1:2], (16, 256, 256))
        )
    else:
        some = list(configurations(tuple(arguments.channels or CHANNELS), tuple(DTYPES), ARCHITECTURES, (16, 256, 256)))
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
