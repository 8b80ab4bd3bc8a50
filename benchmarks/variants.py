"""Variants of what the formulas of kernels/triton/config.py choose.

gpu_suite.py times the passes of a layer under each variant. A variant that wins moves from here to config.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from sfg_fast.kernels.triton import config
from sfg_fast.kernels.triton.config import Launch

SIDE = 256  # of the images that the suite measures with
_plan, _plan_gradient, _of = config.plan, config.plan_gradient, config.Gradient.of


@contextlib.contextmanager
def forced(replaced: dict[str, Any]) -> Iterator[None]:
    """Inside the `with` the kernels run under a variant."""
    before = [
        (where, name, vars(where)[name])
        for where in (config, config.Gradient)
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
    """A plan whose launches are changed. The same arguments give the same Launch, because Triton looks kernels up by
    the identity of Tiles."""

    @functools.cache
    def changed(*arguments: Any, **options: Any) -> Launch:
        return change(plan(*arguments, **options))

    return changed


def _options(warps: int, stages: int) -> dict[str, int]:
    return {"num_warps": warps, "num_stages": stages}


def walk(warps: int, stages: int, strip: int, rows: int | None = None) -> dict[str, Any]:
    """A change of the launches of rowwalk.py: other options, strips of another width, and `rows` output rows for each
    program."""

    def change(launch: Launch) -> Launch:
        if launch.kernel not in ("rowwalk", "rowwalk_gates"):
            return launch
        steps = launch.steps if rows is None else rows
        rest = launch.programs // config.cdiv(SIDE, launch.steps) // config.cdiv(SIDE, launch.tiles.pixels_w)
        programs = rest * config.cdiv(SIDE, steps) * config.cdiv(SIDE, strip)
        new = dataclasses.replace(launch.tiles, pixels_w=strip)
        return launch._replace(tiles=new, options=_options(warps, stages), steps=steps, programs=programs)

    return {"plan": _changed(change)}


def tiles(n: int, k: int, pixels: int, warps: int, stages: int) -> dict[str, Any]:
    """A change of all convolutions: tiles of n output channels, k channels of a chunk, and so many pixels side by
    side."""

    def change(launch: Launch) -> Launch:
        old = launch.tiles
        new = dataclasses.replace(old, pixels_h=1, pixels_w=pixels)
        programs = -(-launch.programs * old.pixels_h * old.pixels_w // pixels)
        return launch._replace(tiles=new, options=_options(warps, stages), programs=programs)

    def blocks(channels: int, out: int, *_: Any) -> tuple[int, int]:
        return min(config._power_of_two(out), n), min(config._power_of_two(channels), k)

    return {"walks": lambda *_: False, "_blocks": blocks, "_large_blocks": blocks, "plan": _changed(change)}


def taps(together: int) -> dict[str, Any]:
    """A change of the passes with undrawn rows: so many taps in a turn of the loop."""

    def change(launch: Launch) -> Launch:
        return launch._replace(tiles=dataclasses.replace(launch.tiles, together=together))

    return {"plan": _changed(change)}


def no_cudnn() -> dict[str, Any]:
    """Wide passes with nothing fused by the kernels, too."""
    return {"by_cudnn": lambda *_: False}


def gradient(c: int, k: int, pixels: int, warps: int, stages: int, times: float = 1) -> dict[str, Any]:
    """A change of weight gradients: no walks, but tiles of c x k channels and so many pixels, in `times` as many
    parts."""

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

    return {"of": of, "plan_gradient": _changed(change, _plan_gradient), "gradient_walks": lambda *_: False}


def gradient_walk(strip: int, warps: int, stages: int, times: float = 1) -> dict[str, Any]:
    """A change of weight gradients that walk: strips of another width, other options, and `times` as many parts."""

    def change(launch: Launch) -> Launch:
        new = dataclasses.replace(launch.tiles, pixels_w=strip)
        parts = max(1, int(launch.second * times))
        steps = config.cdiv(launch.steps, max(1, int(times)))
        return launch._replace(tiles=new, options=_options(warps, stages), second=parts, steps=steps)

    return {"plan_gradient": _changed(change, _plan_gradient)}


# The variants that are measured, by width: attributes of config.py, or of config.Gradient, and what replaces them. The
# tiles at 16 and 32 channels, and those of the weight gradient, are what walks took the place of.
CONVOLUTIONS: dict[int, dict[str, dict[str, Any]]] = {
    16: {
        **{f"walk {a}": walk(*a) for a in ((2, 3, 64), (2, 3, 32), (2, 2, 32), (1, 3, 32), (2, 3, 32, 64))},
        **{f"tiles {a}": tiles(*a) for a in ((16, 16, 64, 1, 3), (16, 16, 128, 2, 4))},
    },
    32: {
        **{f"walk {a}": walk(*a) for a in ((2, 3, 16), (2, 3, 32), (2, 2, 16), (1, 3, 16), (2, 3, 16, 32))},
        **{f"tiles {a}": tiles(*a) for a in ((32, 32, 128, 4, 3), (32, 16, 128, 4, 4))},
    },
    64: {
        "taps (1,)": taps(1),
        "no_cudnn ()": no_cudnn(),
        **{f"tiles {a}": tiles(*a) for a in ((64, 16, 128, 4, 3), (64, 16, 128, 8, 3), (64, 32, 64, 4, 3))},
    },
    128: {
        "taps (1,)": taps(1),
        "no_cudnn ()": no_cudnn(),
        **{f"tiles {a}": tiles(*a) for a in ((128, 64, 128, 8, 4), (64, 32, 128, 4, 3), (128, 16, 128, 8, 3))},
    },
}
GRADIENTS: dict[int, dict[str, dict[str, Any]]] = {
    width: {
        **{f"gradient_walk {a}": gradient_walk(*a) for a in walks},
        **{f"gradient {a}": gradient(*a) for a in parts},
    }
    for width, walks, parts in (
        (16, [(64, 4, 2), (128, 4, 2), (64, 2, 3), (64, 4, 3, 2)], [(16, 16, 128, 2, 3)]),
        (32, [(64, 4, 3), (32, 8, 4), (64, 8, 2), (64, 8, 3, 2)], [(32, 32, 128, 2, 1)]),
        (64, [(64, 8, 2), (32, 8, 4), (64, 8, 3, 2)], [(64, 64, 64, 4, 3)]),
        (128, [(64, 8, 2), (32, 8, 4), (64, 8, 3, 2)], [(64, 64, 64, 4, 3)]),
    )
}
