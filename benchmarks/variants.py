"""What the formulas of kernels/triton/config.py could choose instead, and kernels that might replace one: to be measured.

gpu_suite.py times the passes of a layer under each; what wins goes into config.py or kernels/, and leaves this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import triton
import triton.language as tl
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.triton import config
from sfg_fast.kernels.triton.config import Launch
from sfg_fast.kernels.triton.rowwalk import input_tile, weight_tile

SIDE = 256  # of the images that the suite measures with
_plan, _plan_gradient, _of = config.plan, config.plan_gradient, config.Gradient.of


@contextlib.contextmanager
def forced(replaced: dict[str, Any]) -> Iterator[None]:
    """The kernels under a variant, for a while."""
    before = [
        (where, name, vars(where)[name])
        for where in (config, kernels, config.Gradient)
        for name in replaced
        if name in vars(where)
    ]
    try:
        for where, name, _ in before:
            setattr(where, name, staticmethod(replaced[name]) if where is config.Gradient else replaced[name])
        config.forget()
        yield
    finally:
        for where, name, old in before:
            setattr(where, name, old)
        config.forget()


def _changed(change: Callable[[Launch], Launch], plan: Callable[..., Launch] = _plan) -> Callable[..., Launch]:
    """A plan with a change. Made once for the same arguments: Triton looks kernels up by the identity of Tiles."""

    @functools.cache
    def changed(*arguments: Any) -> Launch:
        return change(plan(*arguments))

    return changed


def _options(warps: int, stages: int) -> dict[str, int]:
    return {"num_warps": warps, "num_stages": stages}


def walk(warps: int, stages: int, rows: int | None = None, unrolled: bool = False) -> dict[str, Any]:
    """rowwalk.py with these options; `rows`: output rows of a program."""

    def change(launch: Launch) -> Launch:
        if launch.kernel != "rowwalk":
            return launch
        steps = launch.steps if rows is None else rows
        strips = launch.programs // config.cdiv(SIDE, launch.steps)
        programs = strips * config.cdiv(SIDE, steps)
        return launch._replace(options=_options(warps, stages), steps=steps, programs=programs)

    replaced: dict[str, Any] = {"plan": _changed(change)}
    return replaced | ({"rowwalk_kernel": unrolled_rowwalk_kernel} if unrolled else {})


def tiles(n: int, k: int, pixels: int, warps: int, stages: int) -> dict[str, Any]:
    """Tiles of n output channels, k channels of a chunk and so many pixels, side by side, for all that convolves."""

    def change(launch: Launch) -> Launch:
        old = launch.tiles
        new = dataclasses.replace(old, pixels_h=1, pixels_w=pixels)
        programs = -(-launch.programs * old.pixels_h * old.pixels_w // pixels)
        return launch._replace(tiles=new, options=_options(warps, stages), programs=programs)

    def blocks(channels: int, out: int, *_: Any) -> tuple[int, int]:
        return min(config._power_of_two(out), n), min(config._power_of_two(channels), k)

    return {"walks": lambda *_: False, "_blocks": blocks, "plan": _changed(change)}


def gradient(c: int, k: int, pixels: int, warps: int, stages: int, times: float = 1) -> dict[str, Any]:
    """A weight gradient in tiles of c x k channels and so many pixels, in `times` as many parts."""

    def change(launch: Launch) -> Launch:
        old = launch.tiles
        new = dataclasses.replace(old, pixels_h=1, pixels_w=pixels)
        pixel_tiles = launch.second * launch.steps * old.pixels_h * old.pixels_w // pixels
        parts = max(1, int(launch.second * times))
        steps = config.cdiv(pixel_tiles, parts)
        return launch._replace(tiles=new, options=_options(warps, stages), second=parts, steps=steps)

    def of(*arguments: Any) -> config.Gradient:
        found = _of(*arguments)
        return dataclasses.replace(found, block_c=min(c, found.channels), block_k=min(k, found.out_channels))

    return {"of": of, "plan_gradient": _changed(change, _plan_gradient)}


@triton.jit
def _store_row(out, residual, y, image_out, row, j, n, inside, OH, OW, valid, P: tl.constexpr, T: tl.constexpr):
    at = image_out + ((row * OW + j) * P.out_channels)[:, None] + n[None, :]
    mask = (inside & (row < OH) & (j < OW))[:, None] & valid[None, :]
    if T.relu and not P.adjoint:
        out = tl.where(out <= 0, 0.0, out)
    if T.residual:
        out += tl.load(residual + at, mask=mask, other=0.0).to(out.dtype)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _taps(a0, a1, a2, w0, w1, w2, acc, T: tl.constexpr):
    acc = tl.dot(a0, w0, acc, input_precision=T.precision, out_dtype=acc.dtype)
    acc = tl.dot(a1, w1, acc, input_precision=T.precision, out_dtype=acc.dtype)
    return tl.dot(a2, w2, acc, input_precision=T.precision, out_dtype=acc.dtype)


@triton.jit(do_not_specialize=["steps"])
def unrolled_rowwalk_kernel(
    x, passed, w, bias, residual, y, H, W, OH, OW, steps, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr
):
    """`rowwalk_kernel`, three rows of the walk at a time: the three sums change their roles by name, where copying them
    makes ptxas wait for each matrix instruction (its warning C7514)."""
    BLOCK_N: tl.constexpr = P.block_n
    STRIP: tl.constexpr = T.pixels_w
    CHUNK: tl.constexpr = 16 if P.channels <= 16 else (32 if P.channels <= 32 else 64)
    TILES_N: tl.constexpr = P.columns // P.block_n
    strips = tl.cdiv(OW, STRIP)
    walks = tl.cdiv(tl.cdiv(OH, P.dilation_h), steps)
    program = tl.program_id(0)
    n = program % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // TILES_N
    j = program % strips * STRIP + tl.arange(0, STRIP)
    program = program // strips
    m0 = program % walks * steps
    program = program // walks
    residue = program % P.dilation_h
    image = (program // P.dilation_h).to(tl.int64)
    x += image * H * W * P.channels
    passed += image * H * W * P.channels
    image_out = image * OH * OW * P.out_channels
    if T.wide:
        j = j.to(tl.int64)
        residue = residue.to(tl.int64)
    c = tl.arange(0, CHUNK)
    w00 = weight_tile(w, 0, 0, c, n, P)
    w01 = weight_tile(w, 0, 1, c, n, P)
    w02 = weight_tile(w, 0, 2, c, n, P)
    w10 = weight_tile(w, 1, 0, c, n, P)
    w11 = weight_tile(w, 1, 1, c, n, P)
    w12 = weight_tile(w, 1, 2, c, n, P)
    w20 = weight_tile(w, 2, 0, c, n, P)
    w21 = weight_tile(w, 2, 1, c, n, P)
    w22 = weight_tile(w, 2, 2, c, n, P)
    first_h = residue + (P.padding_h - 2 * P.dilation_h if P.adjoint else -P.padding_h)
    first_w = j + (P.padding_w - 2 * P.dilation_w if P.adjoint else -P.padding_w)
    valid = n < P.out_channels
    if T.bias:
        start = tl.load(bias + n, mask=valid, other=0.0)[None, :] + tl.zeros((STRIP, BLOCK_N), ACC)
    else:
        start = tl.zeros((STRIP, BLOCK_N), ACC)
    one = start
    two = start
    three = start
    for m in range(m0, m0 + steps + 2, 3):
        for turn in tl.static_range(3):
            h = first_h + (m + turn) * P.dilation_h
            a0 = input_tile(x, passed, h, first_w, c, H, W, P, T)
            a1 = input_tile(x, passed, h, first_w + P.dilation_w, c, H, W, P, T)
            a2 = input_tile(x, passed, h, first_w + 2 * P.dilation_w, c, H, W, P, T)
            row = residue + (m + turn - 2) * P.dilation_h
            inside = (m + turn >= m0 + 2) & (m + turn < m0 + steps + 2)
            if turn == 0:
                one = _taps(a0, a1, a2, w20, w21, w22, one, T)
                two = _taps(a0, a1, a2, w10, w11, w12, two, T)
                three = _taps(a0, a1, a2, w00, w01, w02, start, T)
                _store_row(one, residual, y, image_out, row, j, n, inside, OH, OW, valid, P, T)
            elif turn == 1:
                two = _taps(a0, a1, a2, w20, w21, w22, two, T)
                three = _taps(a0, a1, a2, w10, w11, w12, three, T)
                one = _taps(a0, a1, a2, w00, w01, w02, start, T)
                _store_row(two, residual, y, image_out, row, j, n, inside, OH, OW, valid, P, T)
            else:
                three = _taps(a0, a1, a2, w20, w21, w22, three, T)
                one = _taps(a0, a1, a2, w10, w11, w12, one, T)
                two = _taps(a0, a1, a2, w00, w01, w02, start, T)
                _store_row(three, residual, y, image_out, row, j, n, inside, OH, OW, valid, P, T)


# What is measured, by width: replaced names in config.py, in the kernels, or of config.Gradient.
CONVOLUTIONS: dict[int, dict[str, dict[str, Any]]] = {
    16: {
        **{f"walk {a}": walk(*a) for a in ((4, 3, 8), (4, 3, 16), (4, 3, 64), (2, 3), (4, 4))},
        **{f"tiles {a}": tiles(*a) for a in (
            (16, 16, 128, 4, 3), (16, 16, 64, 2, 3), (16, 16, 64, 4, 3), (16, 16, 256, 4, 3), (16, 16, 64, 1, 4),
        )},
    },
    32: {
        **{f"walk {a}": walk(*a) for a in ((4, 2), (4, 2, 8), (4, 2, 16), (4, 2, 64), (2, 2), (4, 4))},
        **{f"tiles {a}": tiles(*a) for a in (
            (32, 32, 128, 4, 3), (32, 32, 128, 2, 3), (32, 32, 256, 4, 3), (32, 32, 256, 8, 3), (32, 16, 128, 4, 3),
            (32, 32, 128, 4, 4), (16, 32, 128, 4, 3), (32, 32, 64, 2, 3),
        )},
    },
    64: {
        **{f"unrolled walk {a}": walk(*a, unrolled=True) for a in ((4, 1), (4, 2), (8, 1), (8, 2), (4, 1, 16), (4, 1, 64))},
        "walk (4, 1)": walk(4, 1),
        **{f"tiles {a}": tiles(*a) for a in (
            (64, 32, 128, 4, 3), (64, 32, 128, 4, 2), (64, 32, 128, 4, 4), (64, 64, 128, 4, 2), (64, 64, 128, 4, 3),
            (64, 64, 128, 8, 3), (64, 32, 256, 8, 3), (64, 64, 256, 8, 2), (32, 32, 128, 4, 3), (64, 16, 128, 4, 4),
            (64, 16, 128, 4, 3),
        )},
    },
    128: {
        **{f"tiles {a}": tiles(*a) for a in (
            (128, 64, 128, 8, 3), (128, 64, 128, 8, 2), (128, 64, 128, 8, 4), (128, 32, 128, 8, 4), (128, 32, 128, 8, 3),
            (128, 64, 256, 8, 2), (64, 64, 128, 4, 3), (64, 64, 256, 8, 3), (64, 32, 128, 4, 3), (64, 32, 128, 4, 4),
        )},
    },
}  # fmt: skip
GRADIENTS: dict[int, dict[str, dict[str, Any]]] = {
    width: {f"gradient {a}": gradient(*a) for a in some}
    for width, some in {
        16: [(16, 16, 128, 4, 3), (16, 16, 128, 2, 3), (16, 16, 256, 4, 2), (16, 16, 64, 2, 3), (16, 16, 64, 4, 1),
             (16, 16, 64, 1, 3), (16, 16, 128, 4, 1), (16, 16, 64, 4, 3, 0.5)],
        32: [(32, 32, 64, 4, 1), (32, 32, 64, 4, 2), (32, 32, 64, 4, 3), (32, 32, 32, 4, 1), (32, 32, 32, 2, 2),
             (32, 32, 128, 4, 1), (32, 32, 64, 2, 1), (32, 32, 64, 8, 2), (32, 32, 64, 4, 1, 2)],
        64: [(64, 64, 64, 4, 2), (64, 64, 32, 4, 3), (64, 64, 64, 8, 3), (64, 64, 128, 8, 2), (64, 32, 64, 4, 3),
             (64, 64, 64, 4, 3, 0.5), (32, 64, 64, 4, 3)],
        128: [(64, 64, 64, 4, 3), (64, 64, 64, 4, 3, 2), (64, 64, 64, 4, 3, 0.5), (64, 64, 64, 4, 2), (128, 64, 64, 8, 2),
              (64, 128, 64, 8, 2), (128, 64, 64, 8, 3), (64, 64, 128, 8, 2), (128, 128, 64, 8, 2), (64, 64, 32, 4, 3)],
    }.items()
}  # fmt: skip
