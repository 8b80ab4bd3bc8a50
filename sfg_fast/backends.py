"""Which kernels do the arithmetic: `reference`, `masked`, `native` or `triton`.

What `auto` takes, and why, is logged once for each kind of tensor: `logging.getLogger("sfg_fast")`, level DEBUG.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, library

from . import kernel_choice
from . import kernels as _kernels
from .kernels.contract import ComputesGateGradients, Kernels, Normalises, ReadsNormalised
from .tracing import in_graph

if TYPE_CHECKING:  # what each of them offers
    from .kernels import cpu, masked, triton

    _masked: Kernels = masked
    _cpu: tuple[ReadsNormalised, ComputesGateGradients] = cpu, cpu
    _triton: Normalises = triton

_LOG = logging.getLogger("sfg_fast")
BACKENDS = ("reference", "masked", "native", "triton")
ENVIRONMENT = "SFG_FAST_BACKEND"

_forced: ContextVar[str | None] = ContextVar("sfg_fast_backend", default=None)


class BackendError(RuntimeError):
    """A backend was asked for by name and can't do it. A forced backend never falls back silently."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Uses one backend inside the `with`, for layers and whole networks: `with backend("reference"): model(x)`.

    The backend of a forward pass is saved and also does its backward pass, in whatever thread that runs. (Activation
    checkpointing runs the forward pass again during backward: keep that inside the `with`, too.)
    `"auto"` takes the fastest that is there. Raises ValueError for an unknown name.
    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


@torch.compiler.assume_constant_result
def current() -> str:
    """The forced backend's name, or `auto`. (A compiled graph keeps the one in force when it was compiled.)"""
    return _forced.get() or _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)


def kernels(x: Tensor, width: int, learns: bool = False) -> tuple[Kernels, torch.dtype]:
    """The kernels for a tensor like `x` in a layer of `width` kernels, and the dtype that they compute in: that of x,
    under autocast autocast's own, or float32 for kernels that don't know that. `learns`: undrawn gates want a gradient,
    too. Raises BackendError if the backend that was asked for can't."""
    name = current()
    if name == "reference":
        raise BackendError("backend 'reference' can't run this: it is a packed operation, call a layer or a network")
    module = _fastest(x, width, learns) if name == "auto" else load(name)
    dtype = autocast_dtype(x)
    if dtype is not None and module.cannot(_probe(x, dtype)):
        dtype = torch.float32
    dtype = dtype or x.dtype
    problem = module.cannot(x if dtype == x.dtype else _probe(x, dtype))
    if problem:
        raise BackendError(f"backend {name!r} can't run this: {problem}")
    return module, dtype


def sample(log_p: Tensor, noise: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Any]]]:
    """Each kernel's group, argmax(log_p + noise) of [K, groups], and the kernels sorted by it: order, offsets, and
    properties of the `FilterGroups` that are known already, by name. All backends give the same."""
    log_p, compiling = log_p.detach(), in_graph()
    if current() == "triton" and compiling:
        assignment, *by_group = _sample(log_p, noise)
        return assignment, (*by_group, {})
    assignment, *by_group = load(_sampler(log_p, compiling)).sample(log_p, noise)
    return assignment, tuple(by_group)


def _sampler(log_p: Tensor, compiling: bool) -> str:
    """The backend that draws. `auto` takes `triton` on a GPU, if it takes that for some layers there. In a graph, and
    where the backend can't, it is `masked`, which has plain torch operations."""
    name = current()
    if name == "triton":
        return name
    if compiling or name == "reference":
        return "masked"
    if name == "auto":
        name = "triton" if log_p.is_cuda else "native"
        if name == "triton" and not kernel_choice.chosen(log_p.device).taken:
            return "masked"
    return name if available(name) and not load(name).cannot(log_p) else "masked"


@library.custom_op("sfg_fast::sample", mutates_args=())
def _sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Triton's `sample` as an operator, for graphs (`masked` has plain torch operations)."""
    assignment, order, offsets, _ = load("triton").sample(log_p, noise)
    return assignment, order, offsets


@_sample.register_fake
def _(log_p: Tensor, noise: Any) -> tuple[Tensor, Tensor, Tensor]:
    kernels, groups = log_p.shape
    sizes = (kernels, kernels, groups + 1)
    return tuple(log_p.new_empty(size, dtype=torch.int64) for size in sizes)  # type: ignore[return-value]


def _fastest(x: Tensor, width: int, learns: bool) -> Kernels:
    """The kernels that `auto` takes.

    On a CPU this was measured (benchmarks/results/layers.md, layers_avx2.md): with AVX2 or AVX-512 `native` takes 0.2
    to 0.85 of the time of `masked` (exception: 1.06 with the gradients of images 7 wide on AVX2). Other instruction
    sets were not measured. On a GPU a check of this very device decides (kernel_choice.py)."""
    dtype = autocast_dtype(x) or x.dtype
    name, why = "masked", f"nothing faster is known for {x.device.type}"
    if x.device.type == "cuda":
        work = "inference" if not torch.is_grad_enabled() else "straight_through" if learns else "selected"
        probe = x if dtype == x.dtype else _probe(x, dtype)
        if not _takes_triton(x.device, dtype, width, work):
            why = "a check of this GPU (sfg-fast gpu-check) did not find triton faster for this work"
        elif not available("triton"):
            why = _import("triton")
        else:
            name, why = _if_it_can("triton", probe)
    elif x.device.type == "cpu":
        probe = x if autocast_dtype(x) is None else _probe(x, torch.float32)
        why = _import("native") or "native was not measured with the instruction set of this processor"
        if fastest_on_cpu() == "native":
            name, why = _if_it_can("native", probe)
    _tell(name, why, x.device, dtype, width)
    return load(name)


def _probe(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor of this dtype, on the device of x, with as many dimensions."""
    return x.new_empty([0] * x.dim(), dtype=dtype)


def _if_it_can(name: str, probe: Tensor) -> tuple[str, str]:
    """That backend, or `masked`, and why."""
    problem = load(name).cannot(probe)
    return ("masked", problem) if problem else (name, "it is the fastest of those that can")


def _tell(name: str, why: str, *kind: Any) -> None:
    """Logs what `auto` took, once for each kind of tensor."""
    if not in_graph() and _LOG.isEnabledFor(logging.DEBUG):
        _tell_once(name, why, *kind)


@functools.lru_cache(maxsize=1024)
def _tell_once(name: str, why: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    _LOG.debug("auto takes %s for %s tensors on %s in layers of %d kernels: %s", name, dtype, device, width, why)


def fastest_on_cpu() -> str:
    """The backend that `auto` gives to tensors in memory, if it can do what they want."""
    return "native" if available("native") and instruction_set() in ("avx2", "avx512") else "masked"


def instruction_set() -> str:
    """The instruction set that `native` uses on this processor, such as "avx2". Raises BackendError if `native` is not
    there."""
    return cast(Any, load("native")).INSTRUCTION_SET


@torch.compiler.assume_constant_result
def _takes_triton(device: torch.device, dtype: torch.dtype, width: int, work: str) -> bool:
    return kernel_choice.chosen(device).takes(kernel_choice.precision_of(dtype), width, work)


def module(folder: str) -> Kernels:
    """The module of that name in kernels/. (An operator of a compiled graph is given the name, not the module.)"""
    return cast(Kernels, importlib.import_module(f"sfg_fast.kernels.{folder}"))


def available(name: str) -> bool:
    """Can this backend be used at all on this machine?"""
    if _checked(name, "backend") in ("reference", "masked"):
        return True
    try:
        load(name)
    except BackendError:
        return False
    return True


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of `x`, or None outside autocast."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


_MODULES = {"masked": "masked", "native": "cpu", "triton": "triton"}


def load(name: str) -> Kernels:
    """The kernels of a backend. Raises BackendError, with the reason, if they are not there."""
    problem = _import(name)
    if problem:
        raise BackendError(f"backend {name!r} is not there: {problem}")
    return getattr(_kernels, _MODULES[name])  # (a graph is traced through this: no import here)


_problems: dict[str, str] = {}


@torch.compiler.assume_constant_result
def _import(name: str) -> str:
    """Why the backend can't be used here, or "". It is imported once: failing is slow, and `auto` asks for every
    convolution."""
    if name not in _problems:
        try:
            _problems[name] = module(_MODULES[name]).missing() or ""
        except ImportError as error:
            _problems[name] = str(error) or "it can't be imported"
    return _problems[name]


def _checked(name: str, where: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{where}={name!r} is unknown, expected one of auto, {', '.join(BACKENDS)}")
    return name
