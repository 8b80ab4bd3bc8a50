"""Runs functions in processes of their own, which share only files with a test, and can be killed anywhere."""

import multiprocessing
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

# Processes are forked from a server that has imported everything and run nothing, so they start quickly, and no
# thread of autograd is lost in the fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.processes",
        "sfg_fast.training.trainer",
        "sfg_fast.data",
        "torch.utils.tensorboard",
        "nibabel",
        "scipy.ndimage",
    ]
)


def launch(
    function: Callable[..., object], *arguments: Any, count: int = 1, killed_at: int | None = None
) -> list[int | None]:
    """Runs function(*arguments) in `count` processes, as torchrun would, and returns their exit codes.

    With `killed_at` the first process is killed at that event (see `count_events`). A process that has not ended after
    a minute is killed: it may wait in vain for one that has died.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if count > 1 else {}
    processes = []
    for rank in range(count):
        environment = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {}
        moment = killed_at if rank == 0 else None
        processes.append(CONTEXT.Process(target=_child, args=(function, arguments, environment, moment)))
        processes[-1].start()
    for process in processes:
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _child(
    function: Callable[..., object], arguments: tuple[Any, ...], environment: dict[str, str], killed_at: int | None
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if killed_at is not None:
        kill_at(killed_at)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)


def kill_at(moment: int) -> None:
    """Lets this process kill itself, as by kill -9, at event number `moment` from now on (see `count_events`)."""
    left = moment

    def event(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(event)


def count_events(path: Path, function: Callable[..., object], *arguments: Any) -> None:
    """Runs the function and writes the number of its events to a file.

    An event is a call of, or a return from, any Python or C function.
    """
    seen = 0

    def event(frame: FrameType, kind: str, argument: Any) -> None:
        nonlocal seen
        seen += 1

    sys.setprofile(event)
    function(*arguments)
    sys.setprofile(None)
    path.write_text(str(seen))


def moments(path: Path, number: int, seed: int, function: Callable[..., object], *arguments: Any) -> list[int]:
    """Returns `number` random events of a run of the function, in order, for `killed_at` of `launch`.

    The function is run once in a process of its own, to count its events; `path` is a file for their number.
    """
    assert launch(count_events, path, function, *arguments) == [0]
    events = int(path.read_text())
    return sorted(random.Random(seed).sample(range(1, events), number))
