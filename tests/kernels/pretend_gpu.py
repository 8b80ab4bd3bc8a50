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
from sfg_fast.kernels.spec import BatchNorm, Geometry, MovingStatistics, RoutedConv, RunningStatistics, UndrawnFormula
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sfg_fast.groups import FilterGroups, Routing


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
        norm = BatchNorm(*affine, torch.randperm(32), 1e-5, "relu")
        running = RunningStatistics(torch.zeros(3, 32), torch.ones(3, 32), torch.zeros(3, 32), *affine)
        moves = MovingStatistics(running, torch.zeros(32, dtype=torch.int64), 0.1)
        y, mean, var, _ = kernels.normalise(x, norm, x, moves=moves)
        kernels.normalise_gradient(y, x, norm, mean, var, x)
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
    found = {}
    for name in names:
        function = getattr(kernels, name + "_kernel")
        found[name] = sum(len(caches[0]) for caches in function.device_caches.values())
    print(json.dumps({"compiled": found, "launched": len(Launcher.launched)}))


if __name__ == "__main__":
    main()
