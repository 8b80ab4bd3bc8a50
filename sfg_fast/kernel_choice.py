"""Which kernels `auto` gives to CUDA tensors: what a check of this very GPU has found (gpu/gpu_check.py).

A result lies in the user's cache folder, in a file of its own for each GPU, driver, versions and kernels. What it says
comes down to a `Choice`: where the Triton kernels are right and at least 5 % faster than `masked`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

PRECISIONS = ("bfloat16", "float16", "tf32", "float32")
WIDTHS = (16, 32, 64, 128)  # kernels of the layers that are timed
WORKS = ("straight_through", "selected", "inference")
FASTER = 0.95  # of the time of `masked`: less difference than that is noise, and `masked` is simpler
FOLDER = "SFG_FAST_CACHE"  # environment variable: another folder than the user's cache


class Choice(NamedTuple):
    """For what layers the Triton kernels are taken, and why (one sentence)."""

    taken: frozenset[str] = frozenset()  # "bfloat16/64/selected", see `entry`
    why: str = ""

    def takes(self, precision: str, width: int, work: str) -> bool:
        return entry(precision, width, work) in self.taken


def entry(precision: str, width: int, work: str) -> str:
    """The name of what was timed for layers of about so many kernels: of the next larger width, or the largest."""
    return f"{precision}/{next((w for w in WIDTHS if w >= width), WIDTHS[-1])}/{work}"


def precision_of(dtype: torch.dtype) -> str:
    """How products of this dtype are made now: a name of PRECISIONS, or torch's for dtypes that have no kernels."""
    cudnn: Any = torch.backends.cudnn
    if dtype == torch.float32:
        return "tf32" if cudnn.conv.fp32_precision == "tf32" else "float32"
    return str(dtype).removeprefix("torch.")


def decide(result: dict[str, Any]) -> Choice:
    """From a result (`gpu_check.measure`). One wrong check rules out its precision; one that belongs to none,
    everything. What could not be timed takes `masked`."""
    wrong = {name.split()[0] for name in result["wrong"]}
    ruled_out = set(PRECISIONS) if wrong - set(PRECISIONS) else wrong
    ratios = {name: ratio for name, ratio in result["ratios"].items() if name.split("/")[0] not in ruled_out}
    taken = frozenset(name for name, ratio in ratios.items() if ratio <= FASTER)
    of = len(result["ratios"]) + len(result["untimed"])
    why = f"gpu-check found triton right and faster than masked for {len(taken)} of {of} kinds of layers"
    if result["wrong"]:
        why += f", and {len(result['wrong'])} wrong results, first: {next(iter(result['wrong'].items()))}"
    return Choice(taken, why)


def describe(device: torch.device) -> dict[str, Any]:
    """What a result belongs to: another GPU, driver, version or kernel needs a check of its own."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "kernels": hash_of(files_that_decide()),
    }


def files_that_decide() -> list[Path]:
    """The kernels, what stands between them and a layer, and the checks."""
    from . import kernels

    assert kernels.__file__ is not None
    theirs, here = Path(kernels.__file__).parent, Path(__file__).parent
    between = [here / f"{name}.py" for name in ("way", "passes", "routed_conv", "norm")]
    return sorted([*theirs.glob("*.py"), *theirs.glob("triton/*.py"), *here.glob("gpu/*.py"), *between])


def hash_of(files: Iterable[Path]) -> str:
    content = hashlib.sha256()
    for path in files:
        content.update(hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()[:16]


def known(device: torch.device) -> dict[str, Any] | None:
    """What `describe` says, or None where it can't."""
    try:
        return describe(device)
    except Exception:  # Triton is not installed, or the device can't be asked
        return None


@functools.cache
def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)*\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[0]
    except OSError:
        pass
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
            return lines[0] if lines else "unknown"
        except (OSError, subprocess.TimeoutExpired):
            pass
    return "unknown"


def folder() -> Path:
    """Where results lie: the user's cache folder, or what SFG_FAST_CACHE names."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    from platformdirs import user_cache_path

    return user_cache_path("sfg_fast")


def file_of(description: dict[str, Any]) -> Path:
    """Where the result of a check of this device lies, or would lie."""
    name = re.sub(r"\W+", "_", description["device"]).strip("_")
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    return folder() / "gpu_check" / f"{name}_{digest}.json"


def read(path: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """A result, or None if there is none of this device that can be read."""
    try:
        result = json.loads(path.read_text())
        parts = [result[name] for name in ("wrong", "ratios", "untimed")]
        valid = result["of"] == description and all(isinstance(part, dict) for part in parts)
        return result if valid and all(ratio > 0 for ratio in result["ratios"].values()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


UNCHECKED = "the Triton kernels are not checked on"
_chosen: dict[int, Choice] = {}


def choose(device: torch.device, choice: Choice) -> None:
    """From now on this holds on the device, in this process."""
    _chosen[_index(device)] = choice


def chosen(device: torch.device) -> Choice:
    """What holds on the device: what was chosen, or the result in the cache folder; otherwise `masked` for all, with a
    warning that names the command, once."""
    index = _index(device)
    if index not in _chosen:
        _chosen[index] = choice = look_up(torch.device(device.type, index))
        if choice.why.startswith(UNCHECKED):
            warnings.warn(f"{choice.why}; until then CUDA tensors take `masked`: right, but slower", stacklevel=2)
    return _chosen[index]


def look_up(device: torch.device) -> Choice:
    """What was chosen, or what the cache folder says."""
    index = _index(device)
    if index in _chosen:
        return _chosen[index]
    try:
        description = describe(device)
        result = read(file_of(description), description)
        if result is not None:
            return decide(result)
    except Exception as error:  # no Triton, no home folder, a device that can't be asked: `masked` needs none of them
        return Choice(why=f"{type(error).__name__}: {error}")
    return Choice(why=f"{UNCHECKED} {device} yet: `sfg-fast gpu-check` (about a minute)")


def forget() -> None:
    """Look into the cache folder again."""
    _chosen.clear()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def table(result: dict[str, Any]) -> list[str]:
    """A result, for people."""
    choice = decide(result)
    lines = [f"{'kind of layer':30} time of triton / masked   auto takes"]
    for name, ratio in sorted(result["ratios"].items()):
        lines.append(f"{name:30} {ratio:23.2f}   {'triton' if name in choice.taken else 'masked'}")
    lines += [f"not timed, so it takes masked: {name}: {why}" for name, why in result["untimed"].items()]
    return [*lines, *(f"WRONG {name}: {why}" for name, why in result["wrong"].items()), choice.why]


def as_lists(choice: Choice) -> list[Any]:
    """For a checkpoint."""
    return [sorted(choice.taken), choice.why]


def from_lists(lists: Iterable[Any]) -> Choice:
    taken, why = lists
    return Choice(frozenset(taken), why)
