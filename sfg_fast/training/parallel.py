"""Several processes that train one network: what torchrun tells each of them, and what they tell each other.

DistributedDataParallel averages the gradients; this file does the rest. In a single process all of it does nothing.
"""

from __future__ import annotations

import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import InputError
from ..files import one_line
from ..networks.controls import norm_buffers


def choose_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu", "cuda" or "cuda:N". Raises InputError for other words, or without a GPU."""
    if name not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"device={name!r}: expected auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device={name!r}: there is no CUDA device, expected auto or cpu")
    return torch.device(name)


def has_bfloat16(device: torch.device) -> bool:
    """Is it a GPU that multiplies bfloat16 itself (not one that only knows the dtype)?"""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def launched() -> tuple[int, int]:
    """The rank of this process, and how often torchrun has restarted it; (0, 0) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Processes:
    """The processes that torchrun has started. This one is number `rank` of `count`; without torchrun it is the only
    one.

    `device` is the device that was asked for. On a node with several GPUs each process takes a GPU of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank, restarts = launched()
        self.device = device
        if device.type == "cuda" and self.count > 1:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.count > 1 and not distributed.is_initialized():
            store, rank, count = next(distributed.rendezvous("env://"))
            # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
            store = distributed.PrefixStore(f"start_{restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count)

    @property
    def main(self) -> bool:
        """Is this the process that writes files and shows progress?"""
        return self.rank == 0

    @property
    def one_gpu(self) -> bool:
        """Is this a single process, on a GPU? Then the host need not wait for the end of a step."""
        return self.count == 1 and self.device.type == "cuda"

    def any(self, here: bool) -> bool:
        """Is `here` true in any process?"""
        if self.count == 1:
            return here
        flag = torch.tensor(here, dtype=torch.int32)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)

    def gathered(self, here: Any) -> list[Any]:
        """The objects `here` of all processes, in the order of their ranks."""
        if self.count == 1:
            return [here]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, here)
        return found

    def main_does(self, work: Callable[[], None]) -> None:
        """The main process does `work`, the others wait. If `work` raises InputError, all processes do."""
        refused: list[str | None] = [None]
        if self.main:
            try:
                work()
            except InputError as error:
                refused[0] = str(error)
        if self.count > 1:
            distributed.broadcast_object_list(refused, src=0)
        if refused[0] is not None:
            raise InputError(refused[0])

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each value over the processes in which it isn't NaN; NaN if it is NaN in all."""
        if self.count == 1:
            return values
        here = torch.tensor(list(values.values()), dtype=torch.float64)
        both = torch.stack([here.nan_to_num(nan=0.0), (~here.isnan()).double()])
        distributed.all_reduce(both)
        return dict(zip(values, (both[0] / both[1]).tolist(), strict=True))

    def averaged(self, module: nn.Module) -> nn.Module:
        """The module, wrapped so that every backward pass averages its gradients over all processes.

        Every parameter gets a gradient in every step, if only zeros, so the wrapper need not look for unused ones.
        Running statistics belong to the draws of each process, so the main process does not share its own.
        """
        if self.count == 1:
            return module
        with warnings.catch_warnings():
            # torch 2.13 calls broadcast_buffers deprecated, and says to keep it where buffers belong to a process.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(module, find_unused_parameters=False, broadcast_buffers=False)


@contextmanager
def clear_word_of_lost_processes() -> Iterator[None]:
    """Inside the `with` an error of gloo or NCCL, which tells that another process is gone, becomes ChildProcessError
    with a message of one line."""
    try:
        yield
    except RuntimeError as error:
        text = one_line(error)
        if not distributed.is_initialized() or not re.search(r"gloo|nccl", text, re.IGNORECASE):
            raise
        message = f"process {launched()[0]}: another process is gone ({text[:200]})"
        raise ChildProcessError(f"{message}; --resume goes on, or torchrun itself with --max-restarts") from error


def leave() -> None:
    """Leave the group of processes. It must be called after the last communication: otherwise gloo's threads crash when
    Python ends.

    Nobody may hold a Trainer any more. The Trainer's DistributedDataParallel would be the last to hold the group, and
    when it lets go it would wait, with Python's lock, for threads of gloo that need this lock to drop a tensor.
    """
    if distributed.is_initialized():
        gc.collect()
        distributed.destroy_process_group()


def merged_statistics(every: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The running statistics of all processes, merged. `every` has `controls.norm_buffers` of each process.

    A mean or a variance is weighted by how often the process has drawn its (group, kernel); a count is the mean over
    processes, rounded up.
    """
    if len(every) == 1:
        return every[0]
    merged = {}
    for name in every[0]:
        prefix, _, last = name.rpartition(".")
        values = torch.stack([one[name] for one in every])
        if last == "draws" or not values.is_floating_point():
            merged[name] = (values.double().sum(0) / len(every)).ceil().to(values.dtype)
            continue
        weights = torch.ones(len(every), dtype=torch.float64)
        if (draws := f"{prefix}.draws") in every[0]:
            weights = torch.stack([one[draws] for one in every]).double()
            if last.startswith("pooled"):
                weights = weights.sum(1)
        while weights.dim() < values.dim():
            weights = weights[..., None]
        weights = weights.expand(values.shape).to(values.device)
        sums = weights.sum(0)
        mean = (values.double() * weights).sum(0) / sums.clamp_min(1)
        merged[name] = mean.where(sums > 0, values[0].double()).to(values.dtype)
    return merged


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that this process draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the random generators to the states that `random_state` has returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def own_random_numbers(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Draws inside the `with` (from `seed`, if there is one) don't change the draws after it: the random state is
    restored at the end."""
    before = random_state(device)
    if seed is not None:
        torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(before, device)


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the running statistics on the CPU."""
    return {name: buffer.cpu() for name, buffer in norm_buffers(model).items()}
