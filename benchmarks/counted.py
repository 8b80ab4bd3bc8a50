"""The launches of a layer's passes, and the work that they do and that is needed: counted, not measured.

What static_report.py compiles, and what gpu_suite.py predicts times from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from sfg_fast.kernels.spec import Geometry, RoutedConv
from sfg_fast.kernels.triton import config
from sfg_fast.kernels.triton.config import Gradient, Pass
from triton.backends.compiler import GPUTarget

from sfg_fast.gpu.checks import PRECISIONS, products
from sfg_fast.groups import FilterGroups, Routing

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "tf32": "tf32", "ieee": "float32"}  # short for checks.PRECISIONS
GEOMETRY = Geometry((1, 1), (1, 1), (1, 1))
EACH_IMAGE = ", each image"  # ends the names of launches behind an instance norm
NORMS: dict[str, dict[str, Any]] = {
    "": {"EACH_IMAGE": False, "ACTIVATION": "relu"},
    EACH_IMAGE: {"EACH_IMAGE": True, "ACTIVATION": "leaky_relu"},
}


class Architecture(NamedTuple):
    """A GPU to compile for, and what its multiprocessor holds."""

    name: str
    target: GPUTarget
    device: config.Device
    registers: int
    shared: int
    threads: int
    matrix: str  # regular expression of matrix instructions


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
    image: tuple[int, int, int]  # batch, height and width of the tensors that the layer reads and writes

    @property
    def pixels(self) -> int:
        """Of all images of the batch."""
        batch, height, width = self.image
        return batch * height * width

    @property
    def warps(self) -> int:
        return 4 if self.launch is None else self.launch.options["num_warps"]

    @property
    def tile_rows(self) -> int:
        """The rows of the matrix that a program's products fill: pixels, or channels in a weight gradient."""
        if self.launch is None:
            return 0
        tiles = self.launch.tiles
        return self.what.block_c if isinstance(self.what, Gradient) else tiles.pixels_h * tiles.pixels_w

    @property
    def chosen(self) -> str:
        """What the formulas chose: the kernel, its tiles, warps and stages."""
        if self.launch is None:
            blocks = [
                f"{name} {value}" for name, value in self.constants.items() if name.startswith(("BLOCK", "PARTS"))
            ]
            return ", ".join([self.kernel, *blocks])
        (_, tiles, programs, second, _, options), what = self.launch, self.what
        blocks = (what.block_c, what.block_k) if isinstance(what, Gradient) else (what.block_k, what.block_n)
        return (
            f"{self.kernel}, {tiles.pixels_h} x {tiles.pixels_w} pixels, {blocks[0]} x {blocks[1]} channels, "
            f"{options['num_warps']} warps, {options['num_stages']} stages, {programs} x {second} programs"
        )


def even_split(width: int, groups: int = 3) -> FilterGroups:
    """`width` channels, as evenly as can be over shared and two tasks."""
    sizes = [width // groups + (g < width % groups) for g in range(groups)]
    return FilterGroups.from_assignment(torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes)), groups - 1)


def layer(channels: int, width: int, kind: str = "packed") -> RoutedConv:
    """An SFG layer on SFG features; on an image, if `channels` is 1. `kind`: "packed"; "undrawn", where the undrawn
    gates of rows and columns want a gradient, too; or "soft" (relaxed)."""
    rows = even_split(width)
    if channels == 1:
        return RoutedConv(rows, FilterGroups.blocks([1], ("image",)), Routing.ALL, GEOMETRY)
    columns = even_split(channels)
    if kind == "soft":
        rows, columns = FilterGroups.relaxed(rows.gates, 2), FilterGroups.streams(channels, 2)
    if kind == "undrawn":
        rows, columns = (dataclasses.replace(side, all_gates=True) for side in (rows, columns))
    return RoutedConv(rows, columns, Routing.ARROW, GEOMETRY)


def layer_configurations(
    c: int, k: int, dtype: str, architecture: Architecture, image: tuple[int, int, int], spec: RoutedConv | None = None
) -> Iterator[Configuration]:
    """`spec`: an even split, if not given."""
    batch, height, width = image
    precision = PRECISIONS[DTYPES[dtype]].dtype
    bits, device, size = precision.itemsize * 8, architecture.device, (height, width)

    def one(direction: str, p: Pass, bias: bool, gates: bool = False, **constants: Any) -> Configuration:
        with products(DTYPES[dtype]):  # a bias, and the ReLU behind it
            launch = config.plan(p, bits, batch, size, device, bias, False, bias, gates=gates)
        constants |= {"P": p, "T": launch.tiles, "ACC": tl.float32}
        return Configuration(direction, c, k, dtype, architecture, launch.kernel, p, launch, constants, image)

    forward, adjoint, gradient = config.passes(spec or layer(c, k), (3, 3), precision, device)
    yield one("forward", forward, True)
    yield one("input gradient", adjoint, False)
    with products(DTYPES[dtype]):
        launch = config.plan_gradient(gradient, bits, batch, size, device, True)
    constants = {"G": gradient, "T": launch.tiles, "ACC": tl.float32}
    yield Configuration("weight gradient", c, k, dtype, architecture, launch.kernel, gradient, launch, constants, image)
    if c > 1:
        for kind in ("undrawn", "soft"):
            kind_forward, kind_adjoint, _ = config.passes(layer(c, k, kind), (3, 3), precision, device)
            yield one(f"forward, {kind}", kind_forward, True)
            yield one(f"input gradient, {kind}", kind_adjoint, False)
            if kind == "undrawn":
                gates: dict[str, Any] = {"gates": True, "KEPT": True, "AFFINE": True}
                yield one(f"gates' gradient, {kind}", kind_forward, True, **gates, **NORMS[""])
                yield one(f"gates' gradient of each image, {kind}", kind_forward, True, **gates, **NORMS[EACH_IMAGE])
    sizes, together = {"G": gradient, "K": k, "C": c, "BIAS": True}, config.reduction(launch.second)
    small = {
        "pack": {"F": forward, "B": adjoint, **sizes, "BLOCK": 1024, "PLACES": 64},
        "reduce": {**sizes, "ACC": tl.float32, **dict(zip(("BLOCK", "SPLITS"), together, strict=True))},
        "sample": {"K": k, "GROUPS": 3, "BLOCK": triton.next_power_of_2(k), "GROUPS_2": 4, "NOISE": True},
    }
    if c == 1:  # the normalisation behind any layer of k kernels
        small |= norm_constants(k, architecture, image)
    for direction, constants in small.items():
        kernel = direction.removesuffix(EACH_IMAGE)
        yield Configuration(direction, c, k, dtype, architecture, kernel, gradient, None, constants, image)


def norm_constants(
    k: int, architecture: Architecture, image: tuple[int, int, int], shortcut: bool = True
) -> dict[str, dict[str, Any]]:
    """What the kernels of a normalisation of k channels are compiled for: of a batch norm and ReLU, and, by names that
    end with EACH_IMAGE, of an instance norm and leaky ReLU. `shortcut`: a residual is added to what the normalisation
    returns, and a gradient to its gradient."""
    found = {}
    for suffix, how in NORMS.items():
        norm = norm_launch(k, architecture, image, how["EACH_IMAGE"])
        usual = {"C": k, "ORDER": True, **how, "ACC": tl.float32, "BLOCK_P": norm.block_p, "BLOCK_C": norm.block_c}
        usual |= {"PARTS": norm.together, "RESIDUAL": shortcut, "ADD": shortcut}
        usual |= {"GROUPS": 0 if how["EACH_IMAGE"] else 3}  # running statistics are those of batches
        few = {**usual, "BLOCK_C": norm.block_few}
        found |= {kernel + suffix: usual for kernel in ("moments", "affine", "gradient_sums", "affine_gradient")}
        found |= {kernel + suffix: few for kernel in ("statistics", "slopes")}
    return found


def norm_launch(k: int, architecture: Architecture, image: tuple[int, int, int], each_image: bool) -> config.Norm:
    """The launches of a normalisation of k channels, of the batch or of each image."""
    batch, height, width = image
    if each_image:
        return config.norm(height * width, k, architecture.device, batch)
    return config.norm(batch * height * width, k, architecture.device)


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
    spec, itemsize = layer(one.channels, one.kernels), PRECISIONS[DTYPES[one.dtype]].dtype.itemsize
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
        if g.by_walk:  # a row of the input three times, with an empty copy to narrow ones, and three rows of dy
            executed = executed * 4 // 3 if g.block_c < 64 else executed
            rows = config.cdiv(one.image[1], g.dilation_h)
            halo = (rows + 2) / rows
            loaded = halo * live * 3 * (g.block_c + g.block_k) * itemsize
            return Work(round(halo * executed), necessary, masked, loaded, once)
        loaded = live * (9 / g.taps) * (g.taps * g.block_c + g.block_k) * itemsize
        return Work(executed // (9 if g.flat else 1), necessary, masked, loaded, once)
    p, (out, read) = one.what, (spec.columns, spec.rows) if one.what.adjoint else (spec.rows, spec.columns)
    pixels = one.launch.tiles.pixels_h * one.launch.tiles.pixels_w
    if p.flat:
        depth = config.cdiv(9 * p.channels, p.block_k) * p.block_k
        loaded = p.columns // p.block_n * depth * (1 + p.block_n / pixels)
        return Work(p.columns * depth // 9, necessary, masked, (loaded + p.out_channels) * itemsize, once)
    written, made = p.out_channels, p.products
    if one.direction.endswith("undrawn"):
        if p.adjoint:
            necessary, written = masked, 3 * p.out_channels
            once += 2 * p.out_channels * itemsize
        elif one.kernel in ("rowwalk_gates", "gate_gradient"):
            made = p.out_groups - 1
            necessary = int(((columns > 0) & (columns != rows[:, None])).sum())
            written = 3 * p.out_channels  # or read: the kept product, and dundrawn
            once += 2 * p.out_channels * itemsize
        else:
            written = 2 * p.out_channels
            once += p.out_channels * itemsize
    if one.kernel.startswith("rowwalk"):
        chunk = 16 if p.channels <= 16 else 32
        tiles_n, steps = p.columns // p.block_n, one.launch.steps
        halo = (steps + 2) / steps
        loaded = tiles_n * (halo * 3 * chunk + made * 9 * chunk * p.block_n / pixels / steps)
        executed = round(halo * p.columns * chunk * made)
        return Work(executed, necessary, masked, (loaded + written) * itemsize, once)
    if one.direction.endswith("undrawn"):
        chunks = undrawn_chunks(one, p, out, read)
    else:
        chunks = [chunks for _, _, chunks in tile_ranges(p, out, read)]
    executed = sum(chunks) * p.block_k * p.block_n
    loaded = 9 * sum(chunks) * p.block_k * (1 + p.block_n / pixels)
    return Work(executed, necessary, masked, (loaded + written) * itemsize, once)


def undrawn_chunks(one: Configuration, p: Pass, out: FilterGroups, read: FilterGroups) -> list[int]:
    """For every tile of output channels: chunks of all the ranges that every_group.py goes through."""
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
