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

_plan, _plan_gradient, _options, _walks, _blocks = (
    getattr(config, name) for name in ("plan", "plan_gradient", "launch_options", "walks", "_blocks")
)


@contextlib.contextmanager
def forced(variant: str) -> Iterator[None]:
    """The kernels as in this variant (a key of VARIANTS) for a while."""
    replaced = [
        (module, name, getattr(module, name)) for module in (config, kernels) for name in VARIANTS[variant]
        if hasattr(module, name)
    ]  # fmt: skip
    try:
        for module, name, _ in replaced:
            setattr(module, name, VARIANTS[variant][name])
        config.forget()
        yield
    finally:
        for module, name, before in replaced:
            setattr(module, name, before)
        config.forget()


def _stages(stages: int) -> dict[str, Any]:
    return {"launch_options": lambda *a: _options(*a) | {"num_stages": stages}}


def _changed(change: Callable[[Launch], Launch], plan: Callable[..., Launch] = _plan) -> Callable[..., Launch]:
    """A plan with a change. Made once for the same arguments: Triton looks kernels up by the identity of Tiles."""

    @functools.cache
    def changed(*arguments: Any) -> Launch:
        return change(plan(*arguments))

    return changed


def _pixels(pixels: int, warps: int) -> Callable[[Launch], Launch]:
    """Tiles of so many pixels, side by side."""

    def change(launch: Launch) -> Launch:
        tiles = launch.tiles
        before = tiles.pixels_h * tiles.pixels_w
        wide = dataclasses.replace(tiles, pixels_h=1, pixels_w=pixels)
        options = launch.options | {"num_warps": warps}
        return launch._replace(tiles=wide, options=options, programs=-(-launch.programs * before // pixels))

    return change


def _walk(warps: int | None = None, stages: int | None = None) -> Callable[[Launch], Launch]:
    def change(launch: Launch) -> Launch:
        if launch.kernel != "rowwalk":
            return launch
        options = dict(launch.options)
        options |= {} if warps is None else {"num_warps": warps}
        options |= {} if stages is None else {"num_stages": stages}
        return launch._replace(options=options)

    return change


def _splits(times: int) -> Callable[[Launch], Launch]:
    """A weight gradient in so many times as many parts."""
    return lambda launch: launch._replace(second=launch.second * times, steps=config.cdiv(launch.steps, times))


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


NO_WALK = {"walks": lambda *_: False}
UNROLLED = {"rowwalk_kernel": unrolled_rowwalk_kernel}


def _large_blocks(n: int, k: int) -> dict[str, Any]:
    power = config._power_of_two
    blocks = lambda channels, out, *_: (min(power(out), n), min(power(channels), k))  # noqa: E731
    return {**NO_WALK, "_blocks": blocks}


# Name -> what is replaced in config.py or the kernels. They are compiled beforehand, and each costs a second or two.
VARIANTS: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "1 stage": _stages(1),
    "2 stages": _stages(2),
    "weight gradient in twice as many parts": {"plan_gradient": _changed(_splits(2), _plan_gradient)},
    "weight gradient in four times as many parts": {"plan_gradient": _changed(_splits(4), _plan_gradient)},
    "rowwalk, 8 warps": {"plan": _changed(_walk(warps=8))},
    "unrolled rowwalk": UNROLLED,
    "unrolled rowwalk, 2 stages": {**UNROLLED, "plan": _changed(_walk(stages=2))},
    "unrolled rowwalk, 1 stage": {**UNROLLED, "plan": _changed(_walk(stages=1))},
    "no rowwalk": NO_WALK,
    "no rowwalk, 1 stage": {**NO_WALK, **_stages(1)},
    "no rowwalk, 128 pixels": {**NO_WALK, "plan": _changed(_pixels(128, 4))},
    "no rowwalk, 128 pixels, 8 warps": {**NO_WALK, "plan": _changed(_pixels(128, 8))},
    "tiles of 64 x 64": _large_blocks(64, 64),
    "tiles of 128 x 64, 128 pixels, 8 warps": {**_large_blocks(128, 64), "plan": _changed(_pixels(128, 8))},
    "tiles of 128 x 32, 128 pixels, 8 warps": {**_large_blocks(128, 32), "plan": _changed(_pixels(128, 8))},
}
