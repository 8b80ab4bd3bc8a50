"""Which tiles, by formula: from sizes, dtype and the device, never by timing and never from a drawn grouping.

So there is one compiled kernel for each combination of sizes and dtype, and the same bits on every run.
Of those for half precision on Hopper the tiles of forward passes and input gradients, and walks of one product, were
measured on an H200 (benchmarks/results/gpu/). Walks of several products, those of the weight gradient, rows of taps in
one turn, the sum of splits and the parts of a norm's sums are predicted by a model (benchmarks/results/gpu_model.md);
all that is for other GPUs and for float32 is counted.

The dataclasses are what the kernels are compiled for. They are made once for each combination (the functions that make
them are cached) and compared by identity: Triton looks its compiled kernels up by them at every launch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..spec import Geometry, RoutedConv

FEW_CHANNELS = 16  # below this a matrix instruction over the channels of one tap would mostly multiply padding
WALKED = 32  # up to so many channels rowwalk.py is faster than tiles: above, its nine weight tiles leave no room


@dataclass(frozen=True, eq=False)
class Pass:
    """What a forward pass or an input gradient ("adjoint") computes; see convolve.py for the pixel arithmetic."""

    adjoint: bool
    channels: int  # of the tensor that is read
    out_channels: int  # of the tensor that is written; of one group where `shares_products`
    in_groups: int
    out_groups: int
    routing: str  # arrow, own or all
    shares_products: bool  # every group on the output side has all out_channels
    own_rows: bool  # and so has every group on the input side
    undrawn: bool  # a one-hot draw on the written side, whose undrawn rows count, too
    products: int  # of a walk (rowwalk.py): more than one where undrawn rows count
    taps_h: int
    taps_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    # how the grid of pixels steps through both tensors
    in_step_h: int
    in_step_w: int
    out_step_h: int
    out_step_w: int
    tap_step_h: int
    tap_step_w: int
    tap_offset_h: int
    tap_offset_w: int
    # the packed weight [taps, rows, columns]
    flat: bool  # taps and channels are one dimension
    block_n: int
    block_k: int
    rows: int
    columns: int
    size: int

    @staticmethod
    def of(
        geometry: Geometry, kernel: tuple[int, int], adjoint: bool, channels: int, out_channels: int, in_groups: int,
        out_groups: int, routing: str, shares_products: bool, own_rows: bool, undrawn: bool, bits: int, large: bool,
    ) -> Pass:  # fmt: skip
        """The pass of a convolution of `geometry`, or its adjoint (the input gradient), that reads `channels` in
        `in_groups` and writes `out_channels` in `out_groups`; numbers of `bits` bits, in large tiles or not."""
        taps = kernel[0] * kernel[1]
        strides, paddings, dilations = geometry
        if adjoint:
            steps = [stride // math.gcd(stride, dilation) for stride, dilation in zip(strides, dilations, strict=True)]
            offsets = [-step * d // s for step, d, s in zip(steps, dilations, strides, strict=True)]
        else:
            steps, offsets = [1, 1], list(dilations)
        flat = channels < FEW_CHANNELS and not shares_products and not undrawn and (not adjoint or strides == (1, 1))
        width = channels // in_groups if own_rows else channels
        if large and not undrawn and not shares_products:
            block_n, block_k = _large_blocks(channels, out_channels, out_groups if routing == "own" else 1)
        else:
            everything = shares_products or (undrawn and (adjoint or large))
            block_n, block_k = _blocks(width, out_channels, min(in_groups, out_groups), adjoint, everything, bits)
        if undrawn and block_n >= 64 and width >= (64 if adjoint else 128):
            block_k = 16  # a chunk holds one group's channels only: small ones waste less
        columns = _up(out_channels, block_n)
        if flat:
            block_k = 16 if taps * channels <= 16 else 32
            rows, size = channels, _up(taps * channels, block_k) * columns
        else:
            # A range starts at a multiple of 8 and may reach beyond the last channel; a walk takes a power of two.
            rows = max(_up(width, 8) + block_k, _power_of_two(width) if width <= WALKED else 0)
            size = taps * rows * columns
        in_steps, out_steps = ((1, 1), strides) if adjoint else (strides, (1, 1))
        products = 1
        if undrawn and (adjoint or routing == "arrow"):
            products = out_groups if adjoint else 2
        return Pass(
            adjoint=adjoint, channels=channels, out_channels=out_channels, in_groups=in_groups, out_groups=out_groups,
            routing=routing, shares_products=shares_products, own_rows=own_rows, undrawn=undrawn,
            products=products, taps_h=kernel[0], taps_w=kernel[1], stride_h=strides[0], stride_w=strides[1],
            padding_h=paddings[0], padding_w=paddings[1], dilation_h=dilations[0], dilation_w=dilations[1],
            in_step_h=in_steps[0], in_step_w=in_steps[1], out_step_h=out_steps[0], out_step_w=out_steps[1],
            tap_step_h=steps[0], tap_step_w=steps[1], tap_offset_h=offsets[0], tap_offset_w=offsets[1],
            flat=flat, block_n=block_n, block_k=block_k, rows=rows, columns=columns, size=size,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tiles:
    """How one launch is cut up, and what is fused into it."""

    pixels_h: int
    pixels_w: int
    together: int  # taps of a turn of the loop: 1, or a row of the kernel
    relu: bool
    residual: bool
    bias: bool
    precision: str  # of float32 products: ieee or tf32
    wide: bool  # offsets inside one image need 64 bits


@dataclass(frozen=True, eq=False)
class Gradient:
    """What a weight gradient computes."""

    channels: int
    out_channels: int
    row_groups: int
    column_groups: int
    routing: str
    taps_h: int
    taps_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    flat: bool
    block_c: int
    block_k: int
    taps: int  # of one program: dy is read once for all of them
    by_walk: bool  # is rowwalk_weights_kernel the way, with all taps?

    @staticmethod
    def of(
        geometry: Geometry, kernel: tuple[int, int], channels: int, out_channels: int, column_groups: int,
        row_groups: int, routing: str, largest: int,
    ) -> Gradient:  # fmt: skip
        """`largest`: tile of rows or columns that fits. Tiles of 64 x 64 skip little, but load far less."""
        flat = channels < FEW_CHANNELS
        by_walk = not flat and gradient_walks(geometry, kernel, largest)
        columns = kernel[0] * kernel[1] * channels if flat else channels
        block_c, block_k = (min(_power_of_two(size), largest) for size in (columns, out_channels))
        # Both factors come from registers: the sums of a wider tile don't fit beside them.
        if block_c == 32 and not by_walk:
            block_k = min(block_k, 32)
        if not flat and largest < 64 and min(channels, out_channels) >= 128 and min(row_groups, column_groups) > 1:
            block_c, block_k = 32, 16
        taps = 1 if flat or kernel[1] > 3 else kernel[1]
        stride, padding, dilation = geometry.of_image
        return Gradient(
            channels, out_channels, row_groups, column_groups, routing, *kernel, *stride, *padding, *dilation, flat,
            block_c, block_k, 9 if by_walk else taps, by_walk,
        )  # fmt: skip

    @property
    def programs(self) -> int:
        """Of one split."""
        taps = self.taps_h * self.taps_w
        columns = self.channels * taps if self.flat else self.channels
        tap_groups = 1 if self.flat else taps // self.taps
        return tap_groups * cdiv(columns, self.block_c) * cdiv(self.out_channels, self.block_k)


def _blocks(
    channels: int, out_channels: int, groups: int, adjoint: bool, everything: bool, bits: int
) -> tuple[int, int]:
    """Output channels of a tile, and channels of a chunk. `everything`: every output channel has every group's product.

    Large tiles read the input fewer times, small ones skip more of what is not read: from 128 channels on, the largest
    tile that executes at most 1.4 times the necessary products for an even split.
    """
    block_n = min(_power_of_two(out_channels), 64 if bits == 16 else 32)
    block_k = min(_power_of_two(channels), 32 if bits == 16 else 16)
    if everything or groups == 1 or min(channels, out_channels) < 128:
        return block_n, block_k
    return (16, 32) if adjoint else (32, 16)


def _large_blocks(channels: int, out_channels: int, streams: int) -> tuple[int, int]:
    """The same where a matrix instruction reads from shared memory: bytes are the limit, not products. A tile belongs
    to one of the `streams`, which read nothing of each other."""
    block_n, block_k = (_power_of_two(size // streams) for size in (out_channels, channels))
    return min(block_n, 128), min(block_k, 64)


class Device(NamedTuple):
    """What the formulas want to know of a device."""

    multiprocessors: int
    capability: int  # 90 for Hopper
    shared: int  # bytes of shared memory that one program may have

    @property
    def multiplies_from_shared_memory(self) -> bool:
        """Hopper and data-centre Blackwell; others hold both factors of a matrix instruction in registers."""
        return 90 <= self.capability < 120

    @property
    def hopper(self) -> bool:
        """Is it a GPU like the H200, on which numbers of warps, stages and pixels were measured?"""
        return self.capability == 90


@functools.cache
def device_of(device: torch.device) -> Device:
    """What the tiles depend on. The CPU, where the interpreter runs, counts as an H200 with one multiprocessor."""
    if device.type == "cpu":  # the interpreter
        return Device(1, 90, 227 << 10)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device(properties.multi_processor_count, 80, 64 << 10)
    capability = 10 * properties.major + properties.minor
    return Device(properties.multi_processor_count, capability, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


class Side(NamedTuple):
    """What a pass has to know of the rows or the columns."""

    groups: int
    width: int
    channels: int
    undrawn: bool


def passes(
    spec: RoutedConv, kernel: tuple[int, int], dtype: torch.dtype, device: Device
) -> tuple[Pass, Pass, Gradient]:
    """Forward pass, input gradient and weight gradient, from sizes alone."""
    sides = [
        Side(len(groups.names), groups.width, groups.order.numel(), groups.all_gates)
        for groups in (spec.rows, spec.columns)
    ]
    bits = dtype.itemsize * 8
    return _passes(spec.geometry, kernel, spec.routing.value, sides[0], sides[1], bits, _large(bits, device))


@functools.cache
def _passes(
    geometry: Geometry,
    kernel: tuple[int, int],
    routing: str,
    rows: Side,
    columns: Side,
    bits: int,
    large: bool,
) -> tuple[Pass, Pass, Gradient]:
    def one(adjoint: bool, out: Side, read: Side) -> Pass:
        shares = out.groups > 1 and out.channels == out.groups * out.width and routing != "all"
        own_rows = shares and read.channels == read.groups * read.width
        written = out.width if shares else out.channels
        return Pass.of(
            geometry, kernel, adjoint, read.channels, written, read.groups, out.groups, routing, shares, own_rows,
            out.undrawn and routing != "all", bits, large,
        )  # fmt: skip

    # Where both factors come from registers, three sums of a 64 x 64 tile don't fit beside them.
    sizes = columns.channels, rows.channels, columns.groups, rows.groups
    gradient = Gradient.of(geometry, kernel, *sizes, routing, 64 if large else 32)
    return one(False, rows, columns), one(True, columns, rows), gradient


def _large(bits: int, device: Device) -> bool:
    """Do large tiles fit?"""
    return bits == 16 and device.multiplies_from_shared_memory


class Launch(NamedTuple):
    """How one kernel is launched."""

    # cudnn, or without "_kernel" the name of rowwalk, convolve, convolve_all, convolve_kept, convolve_undrawn;
    # rowwalk_gates, gate_gradient; rowwalk_weights, weight_gradient
    kernel: str
    tiles: Tiles
    programs: int
    second: int  # second dimension of the grid of programs: phases of the stride, or splits of the pixels
    steps: int  # of a walk: rows; weight_gradient: pixel tiles of a split
    options: dict[str, int]


BY_CUDNN = Launch("cudnn", Tiles(0, 0, 0, False, False, False, "", False), 0, 0, 0, {})  # it chooses for itself


def plan(
    p: Pass, bits: int, images: int, size: tuple[int, ...], device: Device, relu: bool = False, residual: bool = False,
    bias: bool = False, wide: bool = False, gates: bool = False, cudnn: bool = False,
) -> Launch:  # fmt: skip
    """Of a forward pass or an input gradient that writes images of `size`; with `gates` of the undrawn gates' gradient
    behind this forward pass. `cudnn`: may cuDNN do it?"""
    if cudnn and not (relu or residual or bias or wide) and by_cudnn(p, bits, device):
        return BY_CUDNN
    return _plan(p, bits, images, size, device, gates, relu, residual, bias, precision(bits), wide)


@functools.cache
def _plan(p: Pass, bits: int, images: int, size: tuple[int, ...], device: Device, gates: bool, *fused: Any) -> Launch:
    """`fused`: the last fields of Tiles."""
    tiles_n, phases = p.columns // p.block_n, p.out_step_h * p.out_step_w
    if walks(p, bits, device, gates):
        strip = min(_power_of_two(size[1]), _strip(p, gates))
        tiles, rows = Tiles(1, strip, 1, *fused), cdiv(size[0], p.dilation_h)
        strips = tiles_n * images * p.dilation_h * cdiv(size[1], strip)
        # At least 8, since each walk reads two more rows; else about eight programs for each multiprocessor.
        steps = min(rows, max(8, cdiv(rows * strips, 8 * device.multiprocessors)))
        options = launch_options(strip, p.block_n, 2048, device)
        if device.hopper or gates or p.products > 1:  # more warps would do the same products twice: a strip is low
            options["num_warps"] = 2
        return Launch("rowwalk_gates" if gates else "rowwalk", tiles, strips * cdiv(rows, steps), 1, steps, options)
    grid = cdiv(size[0], p.out_step_h), cdiv(size[1], p.out_step_w)
    large = _large(bits, device)
    if p.undrawn:  # four sums of 128 x 64 don't fit into the registers
        many = device.hopper and min(p.channels, p.block_n) >= 32 and (p.block_n == 32 or not p.adjoint)
    else:
        many = (large or p.block_n < 64) and not p.shares_products
    pixels = 128 if bits == 16 and many else 64
    if p.own_rows:  # a sum for each group: they have to fit into the registers
        pixels = 16 if p.in_groups > 4 else 64 if bits == 16 else 32
    # For undrawn rows a turn has little to multiply: a row of taps together, where no stride leaves any out.
    together = p.taps_w if p.undrawn and large and p.taps_w <= 3 and phases == 1 else 1
    tiles = Tiles(*_pixel_tile(grid[1], pixels), together, *fused)
    programs = tiles_n * images * cdiv(grid[0], tiles.pixels_h) * cdiv(grid[1], tiles.pixels_w)
    options = launch_options(pixels, p.block_n, p.block_k * p.block_n, device)
    name = "convolve"
    if gates:
        name = "gate_gradient"
    elif p.shares_products:
        name = "convolve_all"
    elif p.undrawn and p.adjoint:
        name = "convolve_undrawn"
    elif p.undrawn and p.routing == "arrow":
        name = "convolve_kept"
    return Launch(name, tiles, programs, phases, 0, options)


def plan_gradient(
    g: Gradient, bits: int, images: int, size: tuple[int, ...], device: Device, bias: bool = False, wide: bool = False
) -> Launch:  # fmt: skip
    """Of a weight gradient; `size` is that of dy. The pixels are split so that one to four programs run on each
    multiprocessor at a time, the larger the fewer."""
    return _plan_gradient(g, bits, images, size, device, False, False, bias, precision(bits), wide)


@functools.cache
def _plan_gradient(g: Gradient, bits: int, images: int, size: tuple[int, ...], device: Device, *fused: Any) -> Launch:
    if g.by_walk:
        return _plan_gradient_walk(g, images, size, device, *fused)
    pixels = 64 if bits == 16 and g.block_c * g.block_k != 32 * 32 else 32
    options, programs = launch_options(g.block_c, g.block_k, pixels * min(g.block_c, g.block_k), device), 4
    if _large(bits, device) and not g.flat:
        if min(g.block_c, g.block_k) == 64:
            programs = 2
        elif device.hopper and g.block_c == g.block_k == g.channels == g.out_channels:  # one tile, of 16 or 32
            pixels, options = 128, {"num_warps": 2, "num_stages": 3 if g.block_c == 16 else 1}
    tiles = Tiles(*_pixel_tile(size[1], pixels), 1, *fused)
    pixel_tiles = images * cdiv(size[0], tiles.pixels_h) * cdiv(size[1], tiles.pixels_w)
    splits = max(1, min(pixel_tiles, cdiv(programs * device.multiprocessors, g.programs)))
    return Launch("weight_gradient", tiles, g.programs, splits, cdiv(pixel_tiles, splits), options)


def gradient_walks(geometry: Geometry, kernel: tuple[int, int], largest: int) -> bool:
    """Is rowwalk_weights_kernel the way? Where matrix instructions read from shared memory: three sums for all taps and
    64 x 64 channels fill the registers, and nothing is left for the factors."""
    return kernel == (3, 3) and geometry.stride == (1, 1) and largest == 64


def _plan_gradient_walk(g: Gradient, images: int, size: tuple[int, ...], device: Device, *fused: Any) -> Launch:
    """Cuts the walk down each strip into 1 to 16 pieces, and shares them out over as many splits as run at a time: the
    number of pieces with which each split walks the fewest rows. (The start of a piece costs as much as eight rows.)"""
    rows = cdiv(size[0], g.dilation_h) + 2
    tiles = Tiles(1, min(_power_of_two(size[1]), 64), 1, *fused)
    strips = max(1, images * g.dilation_h * cdiv(size[1], tiles.pixels_w))  # without images one split writes zeros
    most = cdiv(64 // max(g.block_c, g.block_k) * device.multiprocessors, g.programs)

    def walked(pieces: int) -> int:
        return cdiv(strips * pieces, most) * (cdiv(rows, pieces) + 8)

    pieces = min(range(1, max(1, min(rows // 8, 16)) + 1), key=walked)
    splits = cdiv(strips * pieces, cdiv(strips * pieces, most))
    options = {"num_warps": 4 if g.block_c * g.block_k <= 512 else 8, "num_stages": 3}
    return Launch("rowwalk_weights", tiles, g.programs, splits, cdiv(rows, pieces), options)


def reduction(splits: int) -> tuple[int, int]:
    """Of the sum over the splits of a weight gradient: numbers of a program, and splits that it loads together. (Loaded
    one after the other, twice the splits took 1.56 times as long, with 16 channels on an H200.)"""
    together = min(64, _power_of_two(splits, 1))
    return 2048 // together, together


def forget() -> None:
    """Make everything anew: after a formula was replaced, to force or to try another path."""
    for cached in (_passes, _plan, _plan_gradient):
        cached.cache_clear()


def walks(p: Pass, bits: int, device: Device, gates: bool = False) -> bool:
    """Is rowwalk.py the way? Where matrix instructions read from shared memory, those of a wider output would wait for
    each other (ptxas' C7514)."""
    fits = p.taps_h == p.taps_w == 3 and p.stride_h == p.stride_w == 1 and not p.flat and not p.shares_products
    narrow = p.out_channels <= WALKED or not (_large(bits, device) or p.undrawn)
    return fits and bits == 16 and p.channels <= WALKED and narrow and _strip(p, gates) >= 16


def _strip(p: Pass, gates: bool) -> int:
    """Columns of a walk: its sums have to fit into the registers of 64 threads, 128 numbers each, or 144 where 16
    channels are read. They are three for each product; and for the gates' gradient the gates themselves, and the kept
    product."""
    sums = 4 * (p.out_groups - 1) + 1 if gates else 3 * p.products
    fit = (144 if p.channels <= 16 and not gates else 128) * 64 // (sums * p.block_n)  # 0 with very many groups
    return 64 if sums == 3 else min(64, 1 << fit.bit_length() >> 1)


def by_cudnn(p: Pass, bits: int, device: Device) -> bool:
    """Is cudnn.py the way, if nothing is fused with this pass? Its own passes were measured on an H200, for 3x3 kernels
    without stride and dilation."""
    usual = p.stride_h == p.stride_w == p.dilation_h == p.dilation_w == 1 and max(p.padding_h, p.padding_w) <= 2
    fits = p.taps_h == p.taps_w == 3 and usual and not p.shares_products and not p.undrawn and p.routing != "own"
    return fits and min(p.channels, p.out_channels) >= 64 and bits == 16 and device.hopper


def launch_options(block_m: int, block_n: int, loaded: int, device: Device) -> dict[str, int]:
    """Warps and the depth of the software pipeline. `loaded`: elements of the smallest tile that the loop loads; a
    thread should get 8 of them, 16 bytes."""
    warps = 8 if block_m * block_n > 64 * 128 else 4
    stages = 3 if device.shared >= 160 << 10 else 2
    return {"num_warps": max(1, min(warps, loaded // (32 * 8))), "num_stages": stages}


def precision(bits: int) -> str:
    """Of float32 products: TF32 only if torch may use it in its own convolutions. (AMD's GPUs mostly have none.)"""
    allowed = bits == 32 and torch.version.hip is None and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore
    return "tf32" if allowed else "ieee"


def _pixel_tile(width: int, pixels: int) -> tuple[int, int]:
    """The shape of a tile of `pixels`: as wide as the grid, if that is narrower."""
    tile_w = min(_power_of_two(width, 1), pixels)
    return pixels // tile_w, tile_w


def _power_of_two(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())


class Norm(NamedTuple):
    """How the kernels of a normalisation are launched."""

    pixels: int  # that are normalised together
    parts: int  # of these pixels, summed by a program each
    together: int  # parts that are added up together
    block_p: int  # pixels and channels that are looked at together
    block_c: int
    block_few: int  # channels whose parts are added up together
    sums: tuple[int, int]  # grids of programs: for sums over pixels,
    columns: int  # for what there is of each channel,
    all: tuple[int, int]  # and for every number


def norm(pixels: int, channels: int, device: Device, images: int = 1) -> Norm:
    """The launches of a normalisation of so many channels: `images` times, of so many pixels together. (A batch
    normalisation is one time, of the pixels of all images.) About eight programs for each multiprocessor read the
    pixels, so that enough of them are under way."""
    block_c = min(_power_of_two(channels, 1), 64)
    block_p, columns = 4096 // block_c, cdiv(channels, block_c)
    parts = min(max(1, 8 * device.multiprocessors // (columns * max(1, images))), max(1, cdiv(pixels, block_p)))
    few = min(16, block_c)
    grids = (images * parts, columns), images * cdiv(channels, few), (images * cdiv(pixels, block_p), columns)
    return Norm(pixels, parts, min(_power_of_two(parts, 1), 128), block_p, block_c, few, *grids)


def cdiv(size: int, by: int) -> int:
    """Rounded up."""
    return -(-size // by)


def _up(size: int, multiple: int) -> int:
    return cdiv(size, multiple) * multiple
