"""The process that gpu_check.py starts in its tests. Triton's interpreter on the CPU stands for the GPU.

python -m tests.gpu.pretended_check MODE DEVICE
"""

import os
import signal
import sys
from typing import Any, NoReturn, cast

os.environ["TRITON_INTERPRET"] = "1"

import torch
from sfg_fast.kernels import triton as kernels

import sfg_fast  # noqa: F401
from sfg_fast.gpu import checks, gpu_check

RATIOS = {"faster": 0.5, "wrong": 0.5, "4 % faster": 0.96}


def wrong_on_purpose() -> None:
    """Makes all results of convolutions wrong by one part in ten thousand."""
    convolve, module = kernels._convolve, cast(Any, kernels)
    module._convolve = lambda *a, **k: tuple(y if y is None else y * 1.0001 for y in convolve(*a, **k))


def no_memory(*_: Any) -> NoReturn:
    """Stands for a check for which the GPU's memory does not suffice."""
    raise torch.AcceleratorError("CUDA error: out of memory")


def illegal_access(*_: Any) -> NoReturn:
    """Stands for a kernel that takes its process with it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes on")


def not_captured(*_: Any) -> NoReturn:
    """Stands for work that a CUDA graph can't capture."""
    raise RuntimeError("operation not permitted when stream is capturing")


def main(mode: str) -> None:
    """Does what gpu_check.main does, with what the mode says going wrong, or the times that it says."""
    if mode == "crash":
        print('{"total": 7}', flush=True)
        os._exit(9)
    if mode == "silent":
        return
    if mode == "wrong":
        wrong_on_purpose()
    if mode == "no memory":
        cast(Any, checks).check_layer = no_memory
    if mode == "a kernel crashes":
        cast(Any, checks).check_norm = illegal_access
    every, names = checks.checks, ("16->16 in 3 groups, packed", "normalisation", "draw")
    cast(Any, checks).checks = lambda device, widths: {
        name: check for name, check in every(device).items() if any(part in name for part in names)
    }
    measure, module = gpu_check.measure, cast(Any, gpu_check)
    module.measure = lambda device, say: measure(torch.device("cpu"), say, ("float32",), (16,))
    module.once = lambda *_: None
    module.ratio = not_captured if mode == "not captured" else lambda *_: RATIOS.get(mode, 0.5)
    gpu_check.main(sys.argv[2:], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
