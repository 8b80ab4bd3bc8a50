"""What gpu_check.py starts in its tests: the process apart, its GPU played by Triton's interpreter on the CPU.

python -m tests.gpu.pretended_check MODE DEVICE
"""

import os
import signal
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from sfg_fast.kernels import triton as kernels

import sfg_fast  # noqa: F401
from sfg_fast.gpu import checks, gpu_check

RATIOS = {"faster": 0.5, "wrong": 0.5, "4 % faster": 0.96}


def wrong_on_purpose():
    """The convolutions are off by one part in ten thousand."""
    convolve = kernels._convolve
    kernels._convolve = lambda *a, **k: tuple(y if y is None else y * 1.0001 for y in convolve(*a, **k))


def no_memory(*_):
    raise torch.AcceleratorError("CUDA error: out of memory")


def illegal_access(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def not_captured(*_):
    raise RuntimeError("operation not permitted when stream is capturing")


def main(mode):
    if mode == "crash":
        print('{"total": 7}', flush=True)
        os._exit(9)
    if mode == "silent":
        return
    if mode == "wrong":
        wrong_on_purpose()
    if mode == "no memory":
        checks.check_layer = no_memory
    if mode == "a kernel crashes":
        checks.check_norm = illegal_access
    every, names = checks.checks, ("16->16 in 3 groups, packed", "normalisation", "draw")
    checks.checks = lambda device, widths: {
        name: check for name, check in every(device).items() if any(part in name for part in names)
    }
    measure = gpu_check.measure
    gpu_check.measure = lambda device, say: measure(torch.device("cpu"), say, ("float32",), (16,))
    gpu_check.once = lambda *_: None
    gpu_check.ratio = not_captured if mode == "not captured" else lambda *_: RATIOS.get(mode, 0.5)
    gpu_check.main(sys.argv[2:], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
