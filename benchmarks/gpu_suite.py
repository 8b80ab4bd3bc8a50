"""Is the Triton backend right on this GPU, and how fast?

    python benchmarks/gpu_suite.py --out DIR [--minutes 8] [--dry-run]

Writes DIR/gpu_suite.json after every part, so that a run that is cut off leaves what it had:

    device     name, versions, commit
    checks     every kernel and dtype against float64 convolutions with a masked weight, and the same bits twice;
               a training step of a network in a CUDA graph against the same step outside
    roofs      measured: copy, and a bf16 (fp16 in a dry run) matrix product
    layers     forward, and forward and backward, of SFG layers of 16 to 128 kernels, evenly split: ours, one masked
               convolution + ReLU (backend `masked`), one plain one, dense masking in eager torch and compiled.
               Device time of a captured graph, and with events around eager calls, in microseconds; inputs are rotated,
               so that none is found in the L2 cache; ratios; and the fraction of the floor that the roofs give
    networks   the training step of whole networks: ours, one masked convolution a layer, one plain network, MONAI's,
               and dense masking; inference of the frozen network and of two plain ones (gpu_networks.py)
    overhead   what a call costs the host
    variants   our kernels with other tiles, warps, pipelines than the formulas choose: to see what to change

Needs torch, triton and numpy; run from a checkout, nothing has to be installed. --dry-run: tiny sizes in Triton's
interpreter on the CPU; its times mean nothing, it shows that the suite works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


def use_checkout() -> None:
    """Import sfg_fast from this checkout, where kernels/ lies beside it."""
    sys.path.insert(0, str(ROOT))
    name = "sfg_fast.kernels"
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    spec.submodule_search_locations = [str(ROOT / "kernels")]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    importlib.import_module("sfg_fast")


if __name__ == "__main__":
    if "--dry-run" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"
    use_checkout()

import torch
import torch.nn.functional as F
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.spec import Geometry, Recipe, RoutedConv
from sfg_fast.kernels.triton import config
from torch import Tensor

from benchmarks import gpu_networks
from benchmarks.gpu_timing import DEVICE, DRY, HALF, captured, eager_us, host_us, roofs
from sfg_fast import SFGConv2d, SFGHighResNet, backend
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.routed_conv import Others, convolve, routed_conv

BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}  # of |error| / |exact|
TF32 = 2e-3


# --- correctness ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A layer to check."""

    rows: tuple[int, ...]  # kernels of each group, shared first
    columns: tuple[int, ...]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    image: tuple[int, int] = (37, 70)
    routing: str = "arrow"
    kind: str = "packed"  # or others: all gates of rows and columns want a gradient; or relaxed rows, from streams


CASES = [
    Case((5, 6, 5), (1,), routing="all"),
    Case((5, 6, 5), (5, 6, 5)),
    Case((11, 10, 11), (11, 10, 11)),
    Case((21, 22, 21), (21, 22, 21), dilation=(4, 4), padding=(4, 4)),
    Case((43, 42, 43), (43, 42, 43)),
    Case((43, 42, 43), (11, 10, 11), stride=(2, 2)),
    Case((7, 0, 10), (0, 9, 12), kernel=(5, 3), stride=(2, 3), padding=(3, 0), dilation=(3, 2)),
    Case((3, 4, 5, 6), (6, 0, 7, 4), kernel=(1, 1), padding=(0, 0)),
    Case((64, 64, 64), (64, 64, 64), routing="own"),
    Case((150, 3, 3), (2, 120, 31)),
    Case((5, 6, 5), (5, 6, 5), kind="others"),
    Case((43, 42, 43), (21, 22, 21), kind="others", stride=(2, 2)),
    Case((5, 6, 5), (5, 6, 5), kind="relaxed"),
    Case((20, 22, 21), (33, 0, 7), kind="relaxed", dilation=(2, 1), padding=(2, 1)),
]
DRY_CASES = [case._replace(image=(9, 11)) for case in (CASES[0], CASES[6], CASES[10], CASES[12])]


def check(case: Case, dtype: torch.dtype, relu: bool) -> dict[str, float]:
    """Relative errors of all results of a layer against float64; raises if a second run gives other bits."""
    torch.manual_seed(0)
    groups = len(case.rows)
    out, into = (torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in (case.rows, case.columns))
    out = out[torch.randperm(len(out))].to(DEVICE)
    k, c = len(out), len(into)
    geometry, learns = Geometry(case.stride, case.padding, case.dilation), case.kind == "others"
    if case.routing == "all":
        columns = FilterGroups.blocks([c], ("image",), DEVICE)
    elif case.kind == "relaxed":
        columns = FilterGroups.streams(c, groups - 1, DEVICE)
    else:
        columns = FilterGroups.from_assignment(into[torch.randperm(c)].to(DEVICE), groups - 1, all_gates=learns)
    rows = FilterGroups.from_assignment(out, groups - 1, all_gates=learns)
    if case.kind == "relaxed":
        rows = FilterGroups.relaxed(F.one_hot(out, groups).float(), groups - 1)
    spec = RoutedConv(rows, columns, Routing(case.routing), geometry)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x = random(2, len(columns.order), *case.image).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = random(k, c, *case.kernel).requires_grad_(), random(k).requires_grad_()
    leaves = [x, weight, bias]
    if learns:  # the gradient of the columns in the groups that are not theirs
        leaves.append(x.new_zeros(()).expand(2, (groups - 1) * c, *case.image).requires_grad_())

    def run() -> tuple[Tensor, Others | None, tuple[Tensor, ...]]:
        recipe = None
        with backend("triton"):
            if learns:
                y, recipe, *_ = convolve(x, weight, bias, spec, relu, others=leaves[3], keep=True)
            else:
                y = routed_conv(x, weight, bias, spec, relu)
        torch.manual_seed(1)
        return y, recipe, torch.autograd.grad(y, leaves, random(*y.shape))

    y, recipe, gradients = run()
    again = run()
    for a, b in zip((y, *gradients), (again[0], *again[2]), strict=True):
        assert torch.equal(a, b), "a second run gave other bits"

    # Every channel in every group: its own as it is, zero elsewhere.
    exact_weight, exact_bias = (leaf.detach().double().requires_grad_() for leaf in (weight, bias))
    exact_x = x.detach().double()
    if case.routing != "all":
        exact_x = exact_x.new_zeros(2, groups * c, *case.image).index_copy(1, columns.rows_in_streams, exact_x)
    exact_x.requires_grad_()
    dense = [exact_x] * groups if case.routing == "all" else list(exact_x.split(c, 1))
    if case.routing == "arrow":
        dense = [dense[0], *(task + dense[0] for task in dense[1:])]
    everything = torch.cat([F.conv2d(read, exact_weight, exact_bias, *geometry) for read in dense], 1)
    own = everything[:, rows.rows_in_streams]
    exact_y = own.relu()
    torch.manual_seed(1)
    exact_dy = random(*y.shape).double()
    # Both through the same ReLU: rounding flips signs near zero.
    exact_leaves = [exact_x, exact_weight, exact_bias]
    dx, dw, db = torch.autograd.grad(own, exact_leaves, exact_dy * (y > 0) if relu else exact_dy)
    live_dx = dx if case.routing == "all" else dx[:, columns.rows_in_streams]
    pairs = {"forward": (y, exact_y if relu else own), "dx": (gradients[0], live_dx), "dw": (gradients[1], dw),
             "db": (gradients[2], db)}  # fmt: skip
    if recipe is not None:
        pairs["dx of others"] = (gradients[3], dx[:, (columns.others * c + columns.order).flatten()])
        u = everything.detach()[:, (rows.others * k + rows.order).flatten()].unflatten(1, rows.others.shape)
        df = random(2, (groups - 1) * k, *u.shape[3:])
        scale, shift = (None, None) if relu else (torch.randn(groups - 1, k, device=DEVICE) for _ in range(2))
        if scale is not None and shift is not None:
            u = u * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
        dz = kernels.gate_gradient(recipe.recipe(scale, shift, "relu"), df)
        pairs["gates"] = (dz, (df.double().unflatten(1, rows.others.shape) * u.relu()).sum((0, 3, 4)))
    return {name: ((a.double() - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


def checks() -> list[dict[str, Any]]:
    dtypes = [(torch.float32, False), (torch.float32, True), (torch.float16, False)]
    dtypes += [] if DRY else [(torch.bfloat16, False)]
    results = []
    for (dtype, tf32), case, relu in itertools.product(dtypes, DRY_CASES if DRY else CASES, (False, True)):
        if DRY and (tf32 or relu != (dtype == torch.float16)):
            continue
        torch.backends.cudnn.allow_tf32 = tf32
        name = f"{case} {str(dtype)[6:]}{' tf32' if tf32 else ''}{' relu' if relu else ''}"
        try:
            errors = check(case, dtype, relu)
            worst = max(errors.values())
            ok = worst <= (TF32 if tf32 else BOUNDS[dtype])
            results.append({"case": name, "ok": ok, "worst": worst, "errors": errors})
        except Exception as error:  # one broken configuration should not hide the others
            results.append({"case": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:500]})
    torch.backends.cudnn.allow_tf32 = True
    return results


def graph_check() -> dict[str, Any]:
    """A training step of a small network (draw included) captured in a CUDA graph: replays learn, like eager steps."""
    torch.manual_seed(0)
    model = SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(4, 4, 4) if DRY else 16, blocks=1, residual="routed")
    model = model.to(DEVICE).to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, *((8, 8) if DRY else (96, 96)), device=DEVICE)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> Tensor:
        y = model(x)
        loss = y["ct"].square().mean() + y["organs"].square().mean()
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        optimiser.step()
        return loss.detach()

    with backend("triton"):
        losses = [float(step()) for _ in range(1 if DRY else 4)]
        if DRY:
            return {"case": "training step of a network", "ok": losses[0] == losses[0], "losses": losses}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        for _ in range(20):
            graph.replay()
            losses.append(float(loss))
    fine = all(value == value for value in losses) and losses[-1] < losses[0]
    return {"case": "training step of a network in a CUDA graph", "ok": fine, "losses": losses}


# --- layers -----------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A row of the table: three groups, 3x3, bias, ReLU."""

    groups: tuple[int, int, int]
    batch: int = 16
    size: int = 256

    @property
    def width(self) -> int:
        return sum(self.groups)

    def floors_us(self, roof: dict[str, float]) -> dict[str, float]:
        """By the measured roofs, whichever is longer: necessary products; each tensor read and written once by each of
        the passes (the ReLU's output once in backward)."""
        shared, *tasks = self.groups
        pixels = self.batch * self.size**2
        flops = 2 * 9 * pixels * (shared**2 + sum(t * (t + shared) for t in tasks))
        tensor = pixels * self.width * 2
        floors = {}
        for name, passes, tensors in (("forward", 1, 2), ("step", 3, 7)):
            arithmetic = passes * flops / roof["half_TFLOP_s"] / 1e6
            floors[name] = max(arithmetic, tensors * tensor / roof["copy_GB_s"] / 1e3)
        return floors


LAYERS = [Layer((5, 6, 5)), Layer((11, 10, 11)), Layer((21, 22, 21)), Layer((43, 42, 43))]
DRY_LAYERS = [Layer((5, 6, 5), 1, 8)]


def dense_masking(dense: list[Tensor], weight: Tensor, bias: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """The paper's implementation as a script would write it: three convolutions, masks."""
    reads = [dense[0], dense[1] + dense[0], dense[2] + dense[0]]
    return tuple(F.relu(F.conv2d(x, weight, bias, 1, 1)) * mask for x, mask in zip(reads, masks, strict=True))


def contestants(layer: Layer, sets: int) -> dict[str, tuple[Callable[[int], Any], Callable[[int], Any]]]:
    """Name -> (forward, forward and backward), each called with the number of an input set."""
    torch.manual_seed(0)
    k, shape = layer.width, (layer.batch, layer.width, layer.size, layer.size)
    assignment = torch.repeat_interleave(torch.arange(3), torch.tensor(layer.groups)).to(DEVICE)
    groups = FilterGroups.from_assignment(assignment)
    spec = RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    masks = groups.gates.t()[:, :, None, None].to(HALF)  # type: ignore[union-attr]
    weight = (torch.randn(k, k, 3, 3, device=DEVICE) / (3 * k**0.5)).to(HALF).requires_grad_()
    bias = torch.randn(k, device=DEVICE).to(HALF).requires_grad_()
    found: dict[str, tuple[Callable[[int], Any], Callable[[int], Any]]] = {}

    def add(name: str, inputs: list[list[Tensor]], gradients: list[list[Tensor]], call: Callable[..., Any]) -> None:
        leaves = (weight, bias)

        def forward(index: int) -> Any:
            with torch.no_grad():
                return call(inputs[index])

        def step(index: int) -> Any:
            y = call(inputs[index])
            y = list(y) if isinstance(y, tuple) else [y]
            return torch.autograd.grad(y, (*inputs[index], *leaves), gradients[index])

        found[name] = (forward, step)

    def tensors(count: int, memory_format: torch.memory_format, wants_gradient: bool) -> list[list[Tensor]]:
        return [
            [
                torch.randn(shape, device=DEVICE).to(HALF).contiguous(memory_format=memory_format)
                .requires_grad_(wants_gradient)
                for _ in range(count)
            ]
            for _ in range(sets)
        ]  # fmt: skip

    last = torch.channels_last
    x, dy = tensors(1, last, True), tensors(1, last, False)
    for name in ("triton", "masked"):

        def ours(inputs: list[Tensor], name: str = name) -> Tensor:
            with backend(name):
                return routed_conv(inputs[0], weight, bias, spec, relu=True)

        add(name, x, dy, ours)
    add("one plain convolution", x, dy, lambda inputs: F.relu(F.conv2d(inputs[0], weight, bias, 1, 1)))
    for suffix, memory_format in (("", torch.contiguous_format), (", channels_last", last)):
        inputs = [[(t * m).detach().requires_grad_() for t, m in zip(s, masks, strict=True)]
                  for s in tensors(3, memory_format, False)]  # fmt: skip
        gradients = tensors(3, memory_format, False)
        masked_weight = weight.to(memory_format=memory_format)
        add("dense masking" + suffix, inputs, gradients, lambda i, w=masked_weight: dense_masking(i, w, bias, masks))
        if not DRY:
            compiled = torch.compile(dense_masking, dynamic=False)
            call = lambda i, w=masked_weight, f=compiled: f(i, w, bias, masks)  # noqa: E731
            add("dense masking, compiled" + suffix, inputs, gradients, call)
    return found


def measure(layer: Layer, roof: dict[str, float], rounds: int) -> dict[str, Any]:
    """One row: contestants interleaved, medians and quartiles of device time, and what they say of ours."""
    tensor = layer.batch * layer.width * layer.size**2 * 2
    sets = 1 if DRY else max(2, -(-256_000_000 // tensor))
    floors, result = layer.floors_us(roof), {"width": layer.width, "groups": layer.groups, "input_sets": sets}
    for index, what in enumerate(("forward", "step")):
        calls = {name: pair[index] for name, pair in contestants(layer, sets).items()}
        graphs, eager = {}, {}
        for name, call in calls.items():
            try:
                graphs[name] = captured(call, sets)
                eager[name] = statistics.median(eager_us(call, sets, rounds))
            except Exception as error:  # e.g. a compiler that can't: it takes no part
                result[f"{what} {name}"] = f"{type(error).__name__}: {error}"[:300]
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(rounds):
            for name, replay in graphs.items():
                count = sets if DRY else 1
                times[name].append(eager_us(replay, count, 1)[0] / (1 if DRY else sets))
        medians = {name: statistics.median(values) for name, values in times.items()}
        quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items() if len(values) > 1}
        ours = medians["triton"]
        dense = min((v for n, v in medians.items() if n.startswith("dense masking") and "compiled" not in n))
        compiled = min((v for n, v in medians.items() if "compiled" in n), default=float("nan"))
        result[what] = {
            "graph_us": medians, "graph_quartiles_us": quartiles, "eager_us": eager, "floor_us": floors[what],
            "fraction_of_floor": floors[what] / ours, "x_dense_masking": dense / ours,
            "x_dense_masking_compiled": compiled / ours, "x_one_masked_convolution": medians["masked"] / ours,
            "x_one_plain_convolution": medians["one plain convolution"] / ours,
        }  # fmt: skip
    return result


def overhead() -> dict[str, float]:
    """Host microseconds per eager call, at a size where the device is done at once."""
    layer = Layer((5, 6, 5), 1, 8 if DRY else 16)
    found = contestants(layer, 1)
    calls = 1 if DRY else 200
    result = {}
    for name in ("triton", "masked", "one plain convolution"):
        forward, step = found[name]
        result[f"{name}, forward"] = host_us(forward, calls)
        result[f"{name}, step"] = host_us(step, calls)
    conv = SFGConv2d(1, 16, 3, padding=1, activation="relu").to(DEVICE)
    x = torch.randn(1, 1, 8 if DRY else 16, 8 if DRY else 16, device=DEVICE)
    with backend("triton"):
        result["SFGConv2d with its draw, forward"] = host_us(lambda _: conv(x), calls)
    return result


# --- variants ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forced(**functions: Callable[..., Any]) -> Iterator[None]:
    """Other formulas in config.py for a while."""
    before = {name: getattr(config, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(config, name, function)
        config.forget()
        yield
    finally:
        for name, function in before.items():
            setattr(config, name, function)
        config.forget()


def alternatives() -> dict[str, dict[str, Callable[..., Any]]]:
    power, plan, options = config._power_of_two, config.plan, config.launch_options
    found: dict[str, dict[str, Callable[..., Any]]] = {"as chosen": {}}
    found["no rowwalk"] = {"walks": lambda *_: False}
    for stages in (1, 2, 4):
        found[f"{stages} stages"] = {
            "launch_options": lambda *a, stages=stages: options(*a) | {"num_stages": stages}
        }  # fmt: skip
    for warps in (4, 8):
        found[f"{warps} warps"] = {"launch_options": lambda *a, warps=warps: options(*a) | {"num_warps": warps}}
    for n, k in ((128, 32), (64, 32), (64, 64), (32, 32)):
        found[f"tiles of {n} x {k} channels"] = {
            "walks": lambda *_: False,
            "_blocks": lambda channels, out, *_, n=n, k=k: (min(power(out), n), min(power(channels), k)),
        }

    def wide_strip(*arguments: Any, **more: Any) -> config.Launch:
        launch = plan(*arguments, **more)
        if launch.kernel != "rowwalk":
            return launch
        tiles = dataclasses.replace(launch.tiles, pixels_w=128)
        return launch._replace(tiles=tiles, options={"num_warps": 8, "num_stages": 2})

    found["rowwalk, strips of 128, 8 warps, 2 stages"] = {"plan": wide_strip}
    for steps in (16, 32, 64):

        def walk(*arguments: Any, steps: int = steps, **more: Any) -> config.Launch:
            launch = plan(*arguments, **more)
            if launch.kernel != "rowwalk":
                return launch
            old, size = launch.steps, arguments[3]
            rows = config.cdiv(size[0], arguments[0].dilation_h)
            programs = launch.programs // config.cdiv(rows, old) * config.cdiv(rows, steps)
            return launch._replace(steps=steps, programs=programs)

        found[f"rowwalk, {steps} rows"] = {"plan": walk}
    return found


def variants(layer: Layer, rounds: int) -> dict[str, Any]:
    """Graph microseconds of the three passes of one layer under each alternative."""
    k, shape = layer.width, (layer.batch, layer.width, layer.size, layer.size)
    assignment = torch.repeat_interleave(torch.arange(3), torch.tensor(layer.groups)).to(DEVICE)
    groups = FilterGroups.from_assignment(assignment)
    spec = RoutedConv(groups, groups, Routing.ARROW, Geometry((1, 1), (1, 1), (1, 1)))
    weight, bias = torch.randn(k, k, 3, 3, device=DEVICE).to(HALF), torch.randn(k, device=DEVICE).to(HALF)
    sets = 1 if DRY else max(2, -(-256_000_000 // (layer.batch * k * layer.size**2 * 2)))
    x, dy = ([torch.randn(shape, device=DEVICE).to(HALF).contiguous(memory_format=torch.channels_last)
              for _ in range(sets)] for _ in range(2))  # fmt: skip

    learning = spec._replace(rows=dataclasses.replace(groups, all_gates=True))
    learning = learning._replace(columns=learning.rows)

    def passes() -> dict[str, float]:
        packed, everything = (kernels.pack(weight, bias, one, HALF) for one in (spec, learning))
        y = [kernels.forward(one, packed, spec, True)[0] for one in x]
        a, dothers = kernels.forward(x[0], everything, learning, True, keep=True)[1], torch.cat([dy[0], dy[0]], 1)
        gates = kernels.pack(weight, bias, learning, HALF, gates=True)
        calls = {
            "forward": lambda i: kernels.forward(x[i], packed, spec, True),
            "forward that keeps": lambda i: kernels.forward(x[i], everything, learning, True, keep=True),
            "input gradient": lambda i: kernels.input_gradient(dy[i], packed, spec, shape[2:], y[i]),
            "input gradient without ReLU": lambda i: kernels.input_gradient(dy[i], packed, spec, shape[2:]),
            "input gradient with others": lambda i: kernels.input_gradient(
                dy[i], everything, learning, shape[2:], y[i]
            ),
            "gates' gradient": lambda i: kernels.gate_gradient(
                Recipe(x[i], a, gates, learning, None, None, "relu"), dothers
            ),
            "weight gradient": lambda i: kernels.weight_gradient(x[i], dy[i], packed, spec, y[i]),
            "weight gradient without ReLU": lambda i: kernels.weight_gradient(x[i], dy[i], packed, spec),
            "pack": lambda _: kernels.pack(weight, bias, spec, HALF),
        }
        return {
            what: statistics.median(eager_us(captured(call, sets), 1, rounds)) / sets for what, call in calls.items()
        }

    result: dict[str, Any] = {}
    for name, functions in itertools.islice(alternatives().items(), 2 if DRY else None):
        try:
            with forced(**functions):
                result[name] = passes()
        except Exception as error:  # some alternatives don't fit a device: that is a finding, too
            result[name] = f"{type(error).__name__}: {error}"[:300]
    return result


# --- the suite --------------------------------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    name = "dry run in Triton's interpreter" if DRY else torch.cuda.get_device_name()
    return {
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "commit": commit or "unknown", "dtype": str(HALF), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_suite.json")
    parser.add_argument("--minutes", type=float, default=8, help="parts that would start later than this are left out")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU in Triton's interpreter")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("gpu_suite: there is no GPU here; --dry-run runs tiny sizes in Triton's interpreter", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    file, start, results = arguments.out / "gpu_suite.json", time.monotonic(), device()
    rounds = 2 if DRY else 20

    def part(name: str, work: Callable[[], Any]) -> None:
        if time.monotonic() - start > 60 * arguments.minutes:
            results.setdefault("left_out", []).append(name)
        else:
            before = time.monotonic()
            try:
                results[name] = work()
            except Exception as error:  # the other parts go on
                results[name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{name}: {time.monotonic() - before:.0f} s", flush=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(file)

    part("checks", checks)
    part("graph", graph_check)
    part("roofs", roofs)
    layers = DRY_LAYERS if DRY else LAYERS
    for layer in layers:
        part(f"layer {layer.width}", lambda layer=layer: measure(layer, results["roofs"], rounds))
    for case in gpu_networks.CASES:
        part(f"network {case}", lambda case=case: gpu_networks.measure(case, results["roofs"], rounds))
        part(f"inference {case}", lambda case=case: gpu_networks.infer(case, rounds))
    part("overhead", overhead)
    for layer in reversed(layers):
        part(f"variants {layer.width}", lambda layer=layer: variants(layer, rounds))

    bad = [c for c in [*results["checks"], results["graph"]] if not (isinstance(c, dict) and c["ok"])]
    for case in bad:
        print("WRONG", json.dumps(case))
    for layer in layers:
        row = results.get(f"layer {layer.width}")
        for what in ("forward", "step"):
            if isinstance(row, dict) and what in row:
                f = row[what]
                print(
                    f"{layer.width:4} {what:8} {f['graph_us']['triton']:9.1f} us, floor {f['fraction_of_floor']:.2f}, "
                    f"x dense {f['x_dense_masking']:.2f}, x compiled {f['x_dense_masking_compiled']:.2f}, "
                    f"x one masked {f['x_one_masked_convolution']:.2f}, x one plain {f['x_one_plain_convolution']:.2f}"
                )
    for case in gpu_networks.CASES:
        print(f"{case}: {gpu_networks.line(results.get(f'network {case}'))}")
        print(f"{case}, inference: {gpu_networks.line(results.get(f'inference {case}'))}")
    print(f"{len(results['checks']) + 1 - len(bad)} checks right, {len(bad)} wrong; {file}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
