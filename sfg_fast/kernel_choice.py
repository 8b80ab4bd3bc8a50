"""Which kernels `auto` gives to CUDA tensors: the result of a check of this very GPU (gpu/gpu_check.py) decides.

Results lie in the user's cache folder, in a file of its own for each GPU, driver, versions and kernels. From a result
`decide` makes a `Choice`: the layers for which the Triton kernels are right and at least 5 % faster than `masked`.
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
WIDTHS = (16, 32, 64, 128)  # how many kernels the layers have that are timed
WORKS = ("straight_through", "selected", "inference")
FASTER = 0.95  # the largest share of the time of `masked`: a smaller difference is noise, and `masked` is simpler
FOLDER = "SFG_FAST_CACHE"  # the environment variable that names another folder than the user's cache


class Choice(NamedTuple):
    """The layers for which the Triton kernels are taken (others take `masked`), and why, in one sentence."""

    taken: frozenset[str] = frozenset()  # "bfloat16/64/selected", see `entry`
    why: str = ""

    def takes(self, precision: str, width: int, work: str) -> bool:
        """Whether a layer takes the Triton kernels: its precision, how many kernels it has, and one of WORKS."""
        return entry(precision, width, work) in self.taken


def entry(precision: str, width: int, work: str) -> str:
    """The name of the timing that stands for layers of `width` kernels: that of the next larger width, or of the
    largest."""
    return f"{precision}/{next((w for w in WIDTHS if w >= width), WIDTHS[-1])}/{work}"


def precision_of(dtype: torch.dtype) -> str:
    """How cuDNN now multiplies numbers of this dtype: a name of PRECISIONS, or torch's name for dtypes that have no
    kernels."""
    cudnn: Any = torch.backends.cudnn
    if dtype == torch.float32:
        return "tf32" if cudnn.conv.fp32_precision == "tf32" else "float32"
    return str(dtype).removeprefix("torch.")


def decide(result: dict[str, Any]) -> Choice:
    """The choice that follows from a result (`gpu_check.measure`). A wrong check rules out its precision; a wrong check
    that belongs to no precision rules out all. Layers that could not be timed take `masked`."""
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
    """What a result belongs to: the GPU, the driver, the versions and a hash of the kernels. Where any of them differs,
    another check is needed."""
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
    """The files that a result depends on: the kernels, what stands between them and a layer, and the checks."""
    from . import kernels

    assert kernels.__file__ is not None
    theirs, here = Path(kernels.__file__).parent, Path(__file__).parent
    between = [*here.glob("routed_conv/*.py"), here / "norm.py"]
    return sorted([*theirs.glob("*.py"), *theirs.glob("triton/*.py"), *here.glob("gpu/*.py"), *between])


def hash_of(files: Iterable[Path]) -> str:
    """A hash of the contents of files, in their order: 16 hexadecimal digits."""
    content = hashlib.sha256()
    for path in files:
        content.update(hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()[:16]


def known(device: torch.device) -> dict[str, Any] | None:
    """The description of `describe`, or None for a device that it can't describe."""
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
    """The folder where results lie: the user's cache folder, or the one that SFG_FAST_CACHE names."""
    if os.environ.get(FOLDER):
        return Path(os.environ[FOLDER])
    from platformdirs import user_cache_path

    return user_cache_path("sfg_fast")


def file_of(description: dict[str, Any]) -> Path:
    """The file where the result for this description lies, or would lie."""
    name = re.sub(r"\W+", "_", description["device"]).strip("_")
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    return folder() / "gpu_check" / f"{name}_{digest}.json"


def read(path: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file, or None if the file can't be read or its result belongs to another description."""
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
    """Makes a choice hold for the device in this process from now on."""
    _chosen[_index(device)] = choice


def chosen(device: torch.device) -> Choice:
    """The choice that holds for the device: that of `choose`, or what follows from the result in the cache folder. If
    there is neither, all layers take `masked`, and a warning, given once, names the command that checks."""
    index = _index(device)
    if index not in _chosen:
        _chosen[index] = choice = look_up(torch.device(device.type, index))
        if choice.why.startswith(UNCHECKED):
            warnings.warn(f"{choice.why}; until then CUDA tensors take `masked`: right, but slower", stacklevel=2)
    return _chosen[index]


def look_up(device: torch.device) -> Choice:
    """The choice for the device as `chosen` gives it, but without a warning, and without keeping it."""
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
    """Forgets all choices, so that `chosen` looks into the cache folder again."""
    _chosen.clear()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def table(result: dict[str, Any]) -> list[str]:
    """A result as lines for people to read."""
    choice = decide(result)
    lines = [f"{'kind of layer':30} time of triton / masked   auto takes"]
    for name, ratio in sorted(result["ratios"].items()):
        lines.append(f"{name:30} {ratio:23.2f}   {'triton' if name in choice.taken else 'masked'}")
    lines += [f"not timed, so it takes masked: {name}: {why}" for name, why in result["untimed"].items()]
    return [*lines, *(f"WRONG {name}: {why}" for name, why in result["wrong"].items()), choice.why]


def as_lists(choice: Choice) -> list[Any]:
    """A choice as lists, as a checkpoint holds it; `from_lists` makes a choice of them again."""
    return [sorted(choice.taken), choice.why]


def from_lists(lists: Iterable[Any]) -> Choice:
    """The choice that `as_lists` gave."""
    taken, why = lists
    return Choice(frozenset(taken), why)
