"""Launches the Triton kernels through Triton's own machinery, compiled for Hopper, with a driver that runs nothing.

Triton's interpreter can't show that arguments bind, that a second launch finds the compiled kernel of the first, and
how many kernels 50 drawn groupings take. test_triton_launch.py runs this file in a process of its own; it prints JSON.
"""

import json
import os
from typing import Any, ClassVar

os.environ.pop("TRITON_INTERPRET", None)

import torch
from sfg_fast.kernels import triton as kernels
from sfg_fast.kernels.spec import Geometry, MovingStatistics, Norm, RoutedConv, RunningStatistics, UndrawnFormula
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sfg_fast import SFGConv2d, backend, gates
from sfg_fast.groups import FilterGroups, Routing
from sfg_fast.routed_conv import run


class Utils:
    """Stands for what Triton asks of CUDA's driver."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Returns module, function, registers, spilled registers and the largest number of threads."""
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Returns those of an H100."""
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

    def unload_module(self, *_: Any) -> None:
        """Does nothing: there is no module."""


class Launcher:
    """Stands for the compiled function that launches a kernel: it notes the kernel's name."""

    launched: ClassVar[list[str]] = []

    def __init__(self, source: Any, metadata: object) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, *_: Any) -> None:
        assert min(x, y, z) > 0
        assert max(y, z) < 65536
        self.launched.append(self.name)


class Driver:
    """Stands for Triton's driver of the active GPU, a Hopper."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> GPUTarget:
        """Returns what to compile for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Returns the number of the only GPU."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Returns the number of the only stream."""
        return 0


class Operations(TorchDispatchMode):
    """Counts torch's operations that compute. Views and new memory start nothing on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Counts the operation, and does it."""
        views = [result.alias_info for result in operation._schema.returns if result.alias_info is not None]
        allocates = "empty" in operation.__name__ or operation.__name__.startswith("promote_types")
        self.count += not allocates and all(alias.is_write for alias in views)
        return operation(*arguments, **options or {})


def sampled(log_p: torch.Tensor, noise: torch.Tensor | None) -> Any:
    """As `kernels.sample`. Its launch is pretended, so the draw is made on the host, where nobody counts."""
    launch(log_p, noise)
    with _disable_current_modes():
        groups = FilterGroups.from_assignment((log_p if noise is None else log_p + noise).argmax(1), log_p.shape[1] - 1)
        known = {name: getattr(groups, name) for name in ("ids", "inverse", "undrawn_groups")}
    return groups.assignment, groups.order, groups.offsets, known


launch = kernels.sample


def step(layers: list[SFGConv2d]) -> dict[str, int]:
    """What the forward and the backward pass of these layers launch, and how many operations of torch there are."""
    x: Any = torch.randn(2, 1, 16, 16).contiguous(memory_format=torch.channels_last)
    counts = {}
    for layer in layers:
        layer.zero_grad(set_to_none=True)
    with backend("triton"):
        groups = gates.draw_together(layers)
        before = len(Launcher.launched)
        with Operations() as operations:
            for layer, drawn in zip(layers, groups, strict=True):
                x = layer(x, groups=drawn)
        counts["launches, forward"] = len(Launcher.launched) - before
        counts["operations, forward"] = operations.count
        features = x.packed
        with Operations() as operations:
            inputs = [p for layer in layers for p in layer.parameters()]
            torch.autograd.grad(features, inputs, torch.ones_like(features))
        counts["launches, backward"] = len(Launcher.launched) - before - counts["launches, forward"]
        counts["operations, backward"] = operations.count
    return counts


def of_a_layer(estimator: str, norm: str = "batch", activation: str = "relu") -> dict[str, int]:
    """The same for one layer more, with a normalisation, amid others; its groups are drawn already."""
    kernels.missing, kernels.cannot, kernels.sample = lambda: None, lambda x: None, sampled
    run.through_operators = lambda kernels: False  # a count is no graph
    options: dict[str, Any] = {
        "padding": 1,
        "tasks": 2,
        "norm": norm,
        "activation": activation,
        "bias": False,
        "estimator": estimator,
    }
    layers = [SFGConv2d(1 if i == 0 else 32, 32, 3, **options) for i in range(4)]
    step(layers)  # what is made once
    few, more = step(layers[:3]), step(layers)
    return {name: more[name] - few[name] for name in few}


def main() -> None:
    """Launches every kernel for 50 drawn groupings, and prints how many were compiled and launched."""
    driver.set_active(Driver())
    x = torch.randn(2, 32, 16, 16).half().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(32, 32, 3, 3), torch.randn(32)
    relaxed, streams = FilterGroups.relaxed(torch.zeros(32, 3), 2), FilterGroups.streams(32, 2)
    names = ("sample", "pack", "rowwalk", "rowwalk_gates", "rowwalk_weights", "convolve", "convolve_kept",
             "convolve_undrawn", "convolve_all", "gate_gradient", "weight_gradient", "reduce", "moments", "statistics",
             "affine", "gradient_sums", "slopes", "affine_gradient")  # fmt: skip
    affine = torch.ones(32), torch.zeros(32)
    for _ in range(50):
        norm = Norm(*affine, torch.randperm(32), 1e-5, "relu")
        each_image = Norm(*affine, torch.randperm(32), 1e-5, "leaky_relu", each_image=True)
        running = RunningStatistics(torch.zeros(3, 32), torch.ones(3, 32), torch.zeros(3, 32), *affine)
        moves = MovingStatistics(running, torch.zeros(32, dtype=torch.int64), 0.1)
        for how, moved in ((norm, moves), (each_image, None)):
            y, mean, var, _ = kernels.normalise(x, how, x, moves=moved)
            kernels.normalise_gradient(y, x, how, mean, var, x)
    for stride in (1, 2):
        for _ in range(50):
            kernels.sample(torch.randn(32, 3), torch.randn(32, 3))
            drawn = torch.randint(3, (32,))  # nothing was run
            for learns in (False, True):
                groups = FilterGroups.from_assignment(drawn, all_gates=learns)
                for rows, columns in ((groups, groups), (relaxed, streams)):
                    geometry = Geometry((stride, stride), (1, 1), (1, 1))
                    spec = RoutedConv(rows, columns, Routing.ARROW, geometry)
                    packed = kernels.pack(weight, bias, spec, torch.float16)
                    read = x if columns is groups else torch.cat([x] * 3, 1)
                    keeps = rows.all_gates
                    y, kept_product = kernels.forward(read, packed, spec, relu=True, keep_product=keeps)
                    kernels.input_gradient(y, packed, spec, (16, 16))
                    kernels.weight_gradient(read, y, packed, spec)
                    if rows.all_gates:
                        df = y.new_empty(2, 64, *y.shape[2:])
                        undrawn = UndrawnFormula(read, kept_product, packed, spec, None, None, "relu")
                        kernels.gate_gradient(undrawn, df)
                        scale, shift = torch.ones(2, 1, 32), torch.zeros(2, 1, 32)  # of each image
                        kernels.gate_gradient(undrawn._replace(scale=scale, shift=shift, activation="leaky_relu"), df)
    found = {}
    for name in names:
        function = getattr(kernels, name + "_kernel")
        found[name] = sum(len(caches[0]) for caches in function.device_caches.values())
    launched = len(Launcher.launched)
    layers = {estimator: of_a_layer(estimator) for estimator in ("straight_through", "selected")}
    layers["straight_through, instance norm"] = of_a_layer("straight_through", "instance", "leaky_relu")
    print(json.dumps({"compiled": found, "launched": launched, "of a layer": layers}))


if __name__ == "__main__":
    main()
