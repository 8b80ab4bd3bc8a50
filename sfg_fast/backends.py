"""Which kernels do the arithmetic: `reference`, `masked`, `native` or `triton`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "masked", "native", "triton")
ENVIRONMENT = "SFG_FAST_BACKEND"

_forced: ContextVar[str | None] = ContextVar("sfg_fast_backend", default=None)


class BackendError(RuntimeError):
    """A backend was asked for by name and can't do it. A forced backend never falls back silently."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside the `with`, for layers and whole networks: `with backend("reference"): model(x)`.

    The backend of a forward pass is saved and also does its backward pass, in whatever thread that runs. (Activation
    checkpointing runs the forward pass again during backward: keep that inside the `with`, too.)
    `"auto"` takes the fastest that is there. Raises ValueError for an unknown name.
    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def current() -> str:
    """The forced backend's name, or `auto`."""
    return _forced.get() or _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)


def kernels(x: Tensor) -> ModuleType:
    """The module with the arithmetic (forward, input_gradient, weight_gradient) for a tensor like `x`."""
    name = current()
    if name == "auto":  # measured: the plain loops of `native` are two to seven times slower than torch's convolution
        return _load("masked")
    if name == "reference":
        raise BackendError("backend 'reference' can't run this: it is a packed operation, call a layer or a network")
    module = _load(name)
    problem = module.cannot(x)
    if problem:
        raise BackendError(f"backend {name!r} can't run this: {problem}")
    return module


def available(name: str) -> bool:
    """Can this backend be used at all on this machine?"""
    if _checked(name, "backend") in ("reference", "masked"):
        return True
    try:
        _load(name)
    except BackendError:
        return False
    return True


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on the device of `x`, or None outside autocast."""
    if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point() or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


_MODULES = {"masked": "masked", "native": "cpu", "triton": "triton"}


@functools.cache
def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"sfg_fast.kernels.{_MODULES[name]}")
    except ImportError as error:
        raise BackendError(f"backend {name!r} is not there: {error}") from error


def _checked(name: str, where: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{where}={name!r} is unknown, expected one of auto, {', '.join(BACKENDS)}")
    return name
