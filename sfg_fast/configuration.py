"""What a person pastes into a bug report: versions, devices, and which backend each device gets and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import numpy
import torch

from . import backends, kernel_choice


def show_config() -> None:
    """Print versions, devices with their instruction set or capability, which backend `auto` gives to each, and why."""
    print("\n".join(lines()))


def lines() -> list[str]:
    """The lines that `show_config` prints."""
    cuda = "without CUDA"
    if torch.version.cuda:
        cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    forced = os.environ.get(backends.ENVIRONMENT)
    found = [
        f"sfg_fast {_version('sfg_fast')}, Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__} ({cuda}), Triton {_version('triton')}, numpy {numpy.__version__}",
        f"backend asked for: {forced or 'none'} ({backends.ENVIRONMENT})",
        f"cpu: {processor()}, {torch.get_num_threads()} threads; {_on_cpu()}",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        choice = kernel_choice.look_up(device)
        takes = "triton where that was faster, else masked" if choice.taken else "masked"
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found.append(
            f"cuda:{index}: {properties.name}, capability {properties.major}.{properties.minor}, {memory}, "
            f"driver {kernel_choice.driver()}; auto takes {takes}: {choice.why}"
        )
        found += [f"    {one}" for one in sorted(choice.taken)]
    return found


def _on_cpu() -> str:
    chosen = backends.fastest_on_cpu()
    try:
        instructions = backends.instruction_set()
    except backends.BackendError as error:
        return f"auto takes {chosen}: {error}"
    return f"auto takes {chosen}: native is built, for {instructions} here"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout" if package == "sfg_fast" else "not installed"


def processor() -> str:
    """The name of this machine's processor."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
