"""Training step and inference of whole networks on a GPU, in half precision: a part of gpu_suite.py.

Contestants as in bench_networks.py, each in its faster memory format, captured in a CUDA graph (a step that can't be
is timed as it is, and says so), in turns. Also slices/s, what the graph is worth, the most memory that a step takes,
and of training the fraction of the floor that the measured roofs give.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import bench_networks
from benchmarks.bench_networks import EVERY, Case, Step, contestant, faster, inferences, names
from benchmarks.gpu_timing import DEVICE, DRY, HALF, captured, eager_us

if DRY:
    CASES = [Case("routed", 6, 1, (3, 3, 3), 1)]
else:
    CASES = [Case(kind, 256, 16, device=DEVICE.type, half=HALF) for kind in ("routed", "separate", "vgg")]


def floor_us(case: Case, roof: dict[str, float]) -> float:
    """Of a straight-through step, evenly split, layer by layer: the products that are necessary (2.56 plain
    convolutions, in the stacks of `separate` 9), or the bytes of the passes that a normalised layer can't do without:
    x, u, u and h forward; dh, u, dh, u, du, du, dx, x and du backward. Whichever takes longer."""
    pixels, total = case.batch * case.size**2, 0.0
    stacks = 3 if case.kind == "separate" else 1

    def layer(c: int, k: int, times: float, positions: float, streams: int = 1) -> float:
        products = times * 2 * 9 * c * k * positions / roof["half_TFLOP_s"] / 1e6
        tensors = streams * (4 * c + 9 * k) * 2 * positions / roof["copy_GB_s"] / 1e3
        return max(products, tensors)

    if case.kind == "vgg":
        c, width = 1, case.widths[1]
        for size in bench_networks.VGG11:
            if size == "pool":
                pixels //= 4
            else:
                total += layer(c, width * int(size), 2.56, pixels)
                c = width * int(size)
        return total
    c = 1
    for k in case.widths:
        inner = 3 * stacks if stacks > 1 else 2.56
        total += layer(c, k, 2.56, pixels) + 2 * case.blocks * layer(k, k, inner, pixels, stacks)
        c = k
    return total + 2 * layer(c, c, 2.56, pixels)


def race(makers: dict[str, Callable[[], Step]], case: Case, rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    """What there is to say of each contestant, and the medians of their times in their faster memory format [us]."""
    result: dict[str, Any] = {}
    rounds = 1 if DRY else rounds  # a step takes seconds in the interpreter
    steps, eager, memory = {}, {}, {}
    for name, make in makers.items():
        try:
            call = make()
            step = lambda _, call=call: call()  # noqa: E731
            step(0)
            if not DRY:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(0)
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            eager[name] = statistics.median(eager_us(step, 1, rounds))
            try:
                steps[name] = captured(step, 1)
            except Exception as error:  # it waits for the host somewhere
                steps[name] = step
                result[f"not captured: {name}"] = f"{type(error).__name__}: {error}"[:300]
        except Exception as error:  # it takes no part
            result[name] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, call in steps.items():
            times[name].append(eager_us(call, 1, 1)[0])
    best = {name: statistics.median(values) for name, values in faster(times).items()}
    result |= {
        "graph_us": {name: statistics.median(values) for name, values in times.items()},
        "graph_quartiles_us": {n: statistics.quantiles(values, n=4) for n, values in times.items() if len(values) > 1},
        "eager_us": eager,
        "memory_MiB": memory,
        "slices_per_s": {name: case.batch * 1e6 / us for name, us in best.items()},
    }
    return result, best


def measure(case: Case, roof: dict[str, float], rounds: int) -> dict[str, Any]:
    """A row of training: medians and quartiles of device time, and what they say of ours."""
    wanted = ["straight_through"] if DRY else names(case.kind)
    result, best = race({name: partial(contestant, case, name, "triton") for name in wanted}, case, rounds)
    result["floor_us"] = floor_us(case, roof)
    result["fraction_of_floor"] = result["floor_us"] / best["straight_through"]
    for other in () if DRY else ("dense faster", "one plain faster", "MONAI", "masked"):
        for ours in ("straight_through", "selected", f"straight_through={EVERY}"):
            if other in best:
                result[f"{other} / {ours}"] = best[other] / best[ours]
    return result


def infer(case: Case, rounds: int) -> dict[str, Any]:
    """A row of inference."""
    runs = inferences(case, "triton")
    result, best = race({name: partial(runs.__getitem__, name) for name in runs}, case, rounds)
    for ours in ("frozen", "network"):
        result[f"{ours} / two plain"] = best[ours] / best["two plain"]
    return result


def line(row: Any) -> str:
    """A row for people."""
    if not isinstance(row, dict):
        return str(row)
    ratios = [f"{name} {value:.2f}" for name, value in row.items() if " / " in name]
    if "floor_us" not in row:
        return ", ".join(ratios)
    step = row["graph_us"]["straight_through"] / 1e3
    return ", ".join([f"step {step:.2f} ms", f"floor {row['fraction_of_floor']:.2f}", *ratios])
