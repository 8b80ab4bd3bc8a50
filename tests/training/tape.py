"""Stand-ins for a GPU: what refuses a read of the host inside a step, and what captures steps as a CUDA graph does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sfg_fast.kernels import masked
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sfg_fast.fixed_assignment import FixedAssignment
from sfg_fast.training import trainer as trainer_module
from sfg_fast.training.parallel import Processes
from sfg_fast.training.step import Outcome

aten = torch.ops.aten
INDEXED = {aten.index.Tensor: 1, aten.index_put.default: 1, aten.index_put_.default: 1}  # where their indices stand
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostRead(AssertionError):
    """An operation for which the host would wait for a device, or which a CUDA graph can't hold."""


class NoHostReads(TorchDispatchMode):
    """Inside the `with` such an operation raises HostRead."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operation, unless it is refused."""
        refuse(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def refuse(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises HostRead for an operation that reads values, whose result has a size that depends on values, or that
    copies to the device from memory that is not pinned (`torch.tensor`), or between devices."""
    if func in INDEXED:
        masks = [i for i in args[INDEXED[func]] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        waits = bool(masks)
    elif func is aten._to_copy.default:
        waits = torch.device(kwargs.get("device") or args[0].device) != args[0].device
    else:
        waits = func is aten.lift_fresh.default or bool(WAITS & set(func.tags))
    if waits:
        raise HostRead(f"{func} inside a step")


class OneDevice(TorchDispatchMode):
    """Inside the `with` an operation raises HostRead if its tensors, or its results, are on several devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operation, unless it is refused."""
        found = func(*args, **(kwargs or {}))
        tensors = [one for one in pytree.tree_leaves((args, kwargs, found)) if isinstance(one, Tensor)]
        if len({tensor.device for tensor in tensors}) > 1:
            raise HostRead(f"{func} of tensors on several devices inside a step")
        return found


class Tape(TorchDispatchMode):
    """Stands for `CudaCapture`. It writes down which operations the device is told to do with which memory. A replay
    does these again, without Python: what the host has decided stays decided."""

    def __init__(self) -> None:
        super().__init__()
        self.captures = self.replays = 0
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._written: list[tuple[Tensor, Tensor]] = []

    def beside(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing: the CPU has no streams."""
        return contextlib.nullcontext()

    def eagerly(self, call: Callable[[], Outcome]) -> Outcome:
        """Does the step."""
        return call()

    def has_room(self) -> bool:
        """Is true: the CPU has memory."""
        return True

    def __call__(self, call: Callable[[], Outcome]) -> Callable[[], Outcome]:
        """A call that replays `call`. All that `call` writes to is put back, as if nothing was done yet."""
        self._calls, self._written = [], []
        random = torch.get_rng_state()
        with self:
            results = call()
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, before in reversed(self._written):
                tensor.copy_(before)
        self.captures += 1
        calls = self._calls

        def replay() -> Outcome:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, recorded in calls:
                    found = pytree.tree_leaves(func(*args, **kwargs))
                    for place, value in zip(recorded, found, strict=True):
                        if isinstance(value, Tensor) and value.data_ptr() != place.data_ptr():
                            place.copy_(value)
            return results

        return replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does the operation, and writes it down. Raises HostRead for one that a graph can't hold."""
        kwargs = kwargs or {}
        refuse(func, args, kwargs)
        for value in _written(func, args, kwargs):
            self._written.append((value.detach(), value.detach().clone()))
        found = func(*args, **kwargs)
        # Of a result that autograd sees, the memory alone is kept.
        recorded = [one.detach() if isinstance(one, Tensor) else one for one in pytree.tree_leaves(found)]
        self._calls.append((func, args, kwargs, recorded))
        return found


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to."""
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    names = [
        argument.name for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if func is aten.native_batch_norm.default:  # its schema does not say so
        names += ["running_mean", "running_var"]
    return [leaf for name in names for leaf in pytree.tree_leaves(given.get(name)) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside the `with` tensors in memory are computed with as those on a GPU, whose values the host doesn't know. A
    read of such values raises HostRead."""

    def read(*_: Any) -> Any:
        raise HostRead("a tensor is read inside a step")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "cuts", lambda x: False)
        patch.setattr(FixedAssignment, "assigned", property(lambda gates: gates._assigned))
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, read)
        yield


def pretend_one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """From now on a Trainer on the CPU does its steps as on one GPU. Returns the tapes of the trainers that follow."""
    tapes: list[Tape] = []

    def made(device: torch.device) -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    monkeypatch.setattr(Processes, "one_gpu", property(lambda processes: True))
    monkeypatch.setattr(trainer_module, "CudaCapture", made)
    monkeypatch.setattr(masked, "cuts", lambda x: False)
    monkeypatch.setenv("SFG_FAST_BACKEND", "masked")
    return tapes
