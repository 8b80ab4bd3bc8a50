"""A model of how long a kernel takes: what it asks of each part of a GPU, and which part takes longest.

    predict(configuration, H200)  # a Prediction; gpu_model.py has tables of all passes

counted.py counts bytes and products of a launch; static_report.py compiles the kernel. The machine code says what one
turn of the main loop issues, and the products (or the bytes that are loaded) say how many turns there are. So a kernel
of a convolution needs no more than its entry in `counted.work`, and any other kernel one entry in DEMANDS.

Every time is predicted, and no GPU is needed. One constant is of a measured pass: LAUNCH, of packing at 16 channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from sfg_fast.kernels.triton import config

from benchmarks.counted import DTYPES, Configuration, norm_launch, work
from benchmarks.static_report import LOADS, STORES, Binary, Instruction, binary, loops, width
from sfg_fast.gpu.checks import PRECISIONS


class Gpu(NamedTuple):
    """The rates of a GPU, in bytes and floating-point operations per second, and of one multiprocessor per clock."""

    name: str
    memory: float  # bytes read and written
    cache: float  # bytes that L2 gives and takes
    half: float  # operations of HGMMA (wgmma) in half precision
    clock: float = 1.83e9  # at which NVIDIA's peak of 989 TFLOP/s in half precision is stated
    multiprocessors: int = 132


# What bounds a kernel, and with which constants:
#
# memory   Bytes that must move through DRAM. H200: copies of 1 GiB, measured (results/gpu/h200_confirmed.md). H100:
#          nine tenths of the 3.35 TB/s that NVIDIA states.
# L2       Bytes that global loads and stores request, as if none hit L1 (LDGSTS.BYPASS skips it, LDG may hit it). The
#          rate is A100's published 5,120 bytes per clock, at Hopper's clock. (The roof that the suite measured on the
#          H200, 3.75 TB/s, is of copies of 8 MiB, starts of kernels included: forward passes at 64 and 128 channels
#          request 9 TB/s there.)
# shared   The path between a multiprocessor's L1 / shared memory, its registers and L2: 128 bytes per clock, of which a
#          transfer from or to L2 takes twice as long (64 bytes per clock; both from NVIDIA's descriptions of Volta and
#          later). HGMMA reads its second factor from shared memory, and its first, if that is not in registers.
#          Conflicts of banks are not seen.
# issue    Four instructions per clock and multiprocessor.
# tensor   HGMMA: as fast as a large matrix product, measured on the H200. HMMA: .63 of the peak; this is assumed, from
#          memory of Luo et al. 2024, Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv:2402.13499
# latency  What a program does, one after the other: an instruction 4 clocks after the last one, and each turn after the
#          loads that it waits for: 263 clocks from L2, 479 from memory (all three are assumed, from the same source).
#          A pipeline of n stages has the loads of n - 1 turns under way. Before its loops a program waits for memory
#          once. The products of a turn are waited for, too, as long as they take on a multiprocessor that does nothing
#          else.
# launch   A kernel with nothing to do: packing at 16 channels, measured on the H200.
LIMITS = ("memory", "L2", "shared", "issue", "tensor", "latency", "launch")
HMMA_SHARE = 0.63
PEAK = 2048  # products per clock and multiprocessor in half precision
LOAD_CLOCKS = {"L2": 263, "memory": 479}
ISSUE_CLOCKS = 4
LAUNCH = 2.57e-6
H200 = Gpu("H200", 4.06e12, 5120 * 1.83e9, 758e12)
H100 = Gpu("H100", 3.0e12, 5120 * 1.83e9, 758e12)


class Demand(NamedTuple):
    """What one launch needs and requests, counted. Bytes are of the whole launch."""

    programs: int
    necessary: float  # bytes that must move through DRAM
    requested: float  # bytes of global loads and stores
    products: float  # that its matrix instructions do, padding included
    necessary_products: float
    loaded: float = 0  # bytes that its loops load, if it has no matrix instruction: tells how many turns there are
    waits_for: str = "L2"  # what most turns of a loop load from: L2 or memory


class Prediction(NamedTuple):
    """Seconds that a launch takes by each of LIMITS, and what they come from."""

    times: dict[str, float]
    floor: float  # seconds: necessary bytes through DRAM, or necessary products, whichever takes longer
    memory_bytes: float
    cache_bytes: float
    shared_bytes: float
    instructions: float  # issued by all warps
    matrix: str  # HGMMA, HMMA or nothing
    matrix_instructions: float
    cached: float  # share of what the loops load that may hit L1 (LDG); the other loads skip it (LDGSTS.BYPASS)
    turns: float  # of the main loop (as it was compiled), per program
    registers: int
    fits: int  # programs on one multiprocessor

    @property
    def bound(self) -> str:
        """The limit that takes longest."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def seconds(self) -> float:
        """The predicted time."""
        return self.times[self.bound]


# --- what is counted --------------------------------------------------------------------------------------------------


def convolution(one: Configuration) -> Demand:
    """A forward pass or a gradient: what `counted.work` says, of all pixels and taps."""
    done, launch = work(one), one.launch
    assert done is not None
    assert launch is not None
    products, needed = (9.0 * n * one.pixels for n in (done.executed, done.necessary))
    necessary, requested = (n * one.pixels for n in (done.bytes_necessary, done.bytes_executed))
    return Demand(launch.programs * launch.second, necessary, requested, products, needed)


def streamed(tensors: int, looped: int) -> Callable[[Configuration], Demand]:
    """A kernel of the normalisation that reads and writes so many images once, and reads `looped` of them in a loop."""

    def demand(one: Configuration) -> Demand:
        norm, size = _norm(one), one.pixels * one.kernels * PRECISIONS[DTYPES[one.dtype]].dtype.itemsize
        grid = norm.sums if looped else norm.all
        moved = tensors + bool(one.constants["RESIDUAL"] and not looped)  # RESIDUAL and ADD are switched together
        return Demand(grid[0] * grid[1], moved * size, moved * size, 0, 0, looped * size, "memory")

    return demand


def per_channel(one: Configuration) -> Demand:
    """A kernel of the normalisation that adds up the parts: two sums of each part and channel, which lie in L2."""
    norm, images = _norm(one), one.image[0] if one.constants["EACH_IMAGE"] else 1
    return Demand(norm.columns, images * 2 * one.kernels * 4, norm.sums[0] * 2 * one.kernels * 4, 0, 0)


def reduced(one: Configuration) -> Demand:
    """The sum over the splits of a weight gradient, which lie in L2, SPLITS at a time, and of the bias."""
    gradient = one.what
    assert isinstance(gradient, config.Gradient)
    bits = PRECISIONS[DTYPES[one.dtype]].dtype.itemsize * 8
    device = one.architecture.device
    splits = config.plan_gradient(gradient, bits, one.image[0], one.image[1:], device, True).second
    elements = one.kernels * one.channels * gradient.taps_h * gradient.taps_w
    programs, together = config.cdiv(elements, one.constants["BLOCK"]), one.constants["SPLITS"]
    loads = 2 * config.cdiv(splits, together) * programs * one.constants["BLOCK"] * together * 4
    return Demand(programs, elements * 4, splits * elements * 4, 0, 0, loads)


def packed(one: Configuration) -> Demand:
    """Both weights of a layer are read once and written once, the forward one twice where undrawn rows count; a program
    finds where 64 kernels or channels went by looking at all of them, 16 at a time."""
    forward, backward, gradient = (one.constants[name] for name in "FBG")
    itemsize, block, places = (
        PRECISIONS[DTYPES[one.dtype]].dtype.itemsize,
        one.constants["BLOCK"],
        one.constants["PLACES"],
    )
    weights = forward.size * (1 + forward.undrawn), backward.size
    programs = sum(config.cdiv(size, block) for size in (*weights, forward.out_channels))
    groups = (gradient.row_groups, one.kernels), (gradient.column_groups, one.channels)
    programs += sum(config.cdiv(count * width, places) for count, width in groups)
    size = 2 * sum(weights) * itemsize
    return Demand(programs, size, size, 0, 0)


def _norm(one: Configuration) -> config.Norm:
    return norm_launch(one.kernels, one.architecture, one.image, one.constants["EACH_IMAGE"])


# Kernel -> what a launch needs and requests, for the kernels that do not multiply.
DEMANDS: dict[str, Callable[[Configuration], Demand]] = {
    "moments": streamed(1, 1), "affine": streamed(2, 0), "gradient_sums": streamed(2, 2),
    "affine_gradient": streamed(3, 0), "statistics": per_channel, "slopes": per_channel,
    "reduce": reduced, "pack": packed,
}  # fmt: skip


# --- what the machine code asks for -----------------------------------------------------------------------------------


def multiplied(here: Instruction) -> float:
    """Products of one matrix instruction, of one warp; four warps share one HGMMA."""
    if match := re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", here.op):
        return math.prod(map(int, match.groups())) / 4
    if match := re.match(r"HMMA\.(\d+)\.", here.op):  # HMMA.16816 is 16 x 8 x 16
        return {"16816": 2048, "1688": 1024, "1684": 512}[match[1]]
    return 0


def loaded(here: Instruction) -> int:
    """Bytes that one warp reads from global memory with an instruction."""
    return 32 * width(here.op) if re.match(LOADS, here.op) else 0


def path_bytes(here: Instruction) -> float:
    """Bytes of one warp on the path of L1 and shared memory, where those from or to L2 count twice (they take twice as
    long)."""
    name, *parts = here.op.split(".")
    if re.match(f"{LOADS}|{STORES}", here.op):
        return 2 * 32 * width(here.op)
    if name == "HGMMA":
        m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", here.op).groups())
        size = 4 if "TF32" in parts else 2
        first = 0 if re.match(r"R\d+,\s*R\d+", here.operands) else m * k
        return (first + n * k) * size / 4
    if name == "LDSM":
        return 128 * (int(parts[-1]) if parts[-1].isdigit() else 1)
    if name in ("LDS", "STS", "STSM"):
        return max(128, 32 * width(here.op))
    return 128 if name == "SHFL" else 0


class Parts(NamedTuple):
    """A kernel's code: what every program executes once, and one turn of its main loops (of several, the mean)."""

    once: list[Instruction]
    turns: list[list[Instruction]]

    @property
    def piped(self) -> bool:
        """Do the loops load for later turns, asynchronously?"""
        return any(here.op.startswith("LDGSTS") for turn in self.turns for here in turn)

    @property
    def cached(self) -> float:
        """The share of what the loops load that may hit L1."""
        every = self.per_turn(loaded)
        return self.per_turn(lambda here: loaded(here) * ("BYPASS" not in here.op)) / every if every else 0.0

    def per_turn(self, amount: Callable[[Instruction], float]) -> float:
        """Of one turn of one warp."""
        return sum(amount(here) for turn in self.turns for here in turn) / max(1, len(self.turns))

    def total(self, amount: Callable[[Instruction], float], turns: float) -> float:
        """Of one warp that takes so many turns."""
        return sum(amount(here) for here in self.once) + turns * self.per_turn(amount)


def parts(code: list[Instruction]) -> Parts:
    """The main loops are the innermost loops with matrix instructions, or, if there are none, those that load most.

    A pipeline's first loads stand before its loop, whose last turns load nothing: they count as the loop's.
    """
    found = loops(code)
    spans = [(loop[0].address, loop[-1].address) for loop in found]
    innermost = [
        loop
        for loop, (first, last) in zip(found, spans, strict=True)
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
    ]
    main = [loop for loop in innermost if any(map(multiplied, loop))]
    if not main:
        most = max((sum(map(loaded, loop)) for loop in innermost), default=0)
        main = [loop for loop in innermost if most and sum(map(loaded, loop)) == most]
    inside = {here.address for loop in found for here in loop}
    once = [here for here in code if here.address not in inside]
    if Parts(once, main).piped:
        once = [here for here in once if not here.op.startswith("LDGSTS")]
    return Parts(once, main)


# --- the prediction ---------------------------------------------------------------------------------------------------


def predict(one: Configuration, gpu: Gpu) -> Prediction:
    """How long one launch of a configuration takes on `gpu`. It compiles the kernel, which takes a second."""
    return estimate(binary(one), DEMANDS.get(one.kernel, convolution)(one), gpu)


def estimate(made: Binary, demand: Demand, gpu: Gpu) -> Prediction:
    """How long a compiled kernel takes that needs and requests so much."""
    code = parts(made.code)
    counted = multiplied if demand.products else loaded
    amount = demand.products or demand.loaded
    per_turn = made.warps * code.per_turn(counted)
    turns = amount / demand.programs / per_turn if per_turn else 0.0
    # The busiest multiprocessor has so many programs, and goes through them in so many rounds.
    busiest = math.ceil(demand.programs / gpu.multiprocessors)
    rounds = math.ceil(busiest / made.programs)

    def clocks(amount: Callable[[Instruction], float], rate: float) -> float:
        return busiest * made.warps * code.total(amount, turns) / rate / gpu.clock

    hgmma_share = gpu.half / (2 * PEAK * gpu.multiprocessors * gpu.clock)

    def multiply(here: Instruction) -> float:
        half = 1 if "TF32" not in here.op else 2  # TF32 at half the rate
        return half * multiplied(here) / (hgmma_share if here.op.startswith("HGMMA") else HMMA_SHARE)

    depth = max(1, made.stages - 1) if code.piped else 1
    waiting = LOAD_CLOCKS["memory"] + turns * LOAD_CLOCKS[demand.waits_for] / depth
    multiplying = made.warps * code.total(multiply, turns) / PEAK
    serial = code.total(lambda _: ISSUE_CLOCKS, turns) + waiting + multiplying

    times = {
        "memory": demand.necessary / gpu.memory,
        "L2": demand.requested / gpu.cache,
        "shared": clocks(path_bytes, 128),
        "issue": clocks(lambda _: 1, 4),
        "tensor": clocks(multiply, PEAK),
        "latency": rounds * serial / gpu.clock,
        "launch": LAUNCH,
    }
    floor = max(demand.necessary / gpu.memory, 2 * demand.necessary_products / gpu.half)
    launched = demand.programs * made.warps
    kinds = {here.op.split(".")[0] for here in made.code if multiplied(here)}
    return Prediction(
        times, floor, demand.necessary, demand.requested, launched * code.total(path_bytes, turns),
        launched * code.total(lambda _: 1, turns), " ".join(sorted(kinds)),
        launched * code.total(lambda here: bool(multiplied(here)), turns), code.cached, turns,
        made.registers, made.programs,
    )  # fmt: skip
