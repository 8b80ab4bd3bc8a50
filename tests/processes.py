"""Functions run in processes of their own, which share nothing with a test but files, and can be killed anywhere."""

import multiprocessing
import os
import random
import signal
import socket
import sys

import torch

# Forked from a server that has imported everything and done nothing: quick to start, and autograd in it is unused.
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


def launch(function, *arguments, count=1, killed_at=None):
    """Run function(*arguments) in `count` processes, as torchrun would; their exit codes. With `killed_at` the first
    is killed at that event (see `count_events`). A process that others wait for in vain is killed after a minute."""
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


def _child(function, arguments, environment, killed_at):
    os.environ.update(environment)
    torch.set_num_threads(1)
    if killed_at is not None:
        kill_at(killed_at)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)


def kill_at(moment):
    """This process kills itself, as by kill -9, at the n-th call of any Python or C function from now on."""
    left = moment

    def event(frame, kind, argument):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(event)


def count_events(path, function, *arguments):
    """Run the function and write the number of its calls to a file."""
    seen = 0

    def event(frame, kind, argument):
        nonlocal seen
        seen += 1

    sys.setprofile(event)
    function(*arguments)
    sys.setprofile(None)
    path.write_text(str(seen))


def moments(path, number, seed, function, *arguments):
    """Random moments in the run of a function, which is run once in a process of its own."""
    assert launch(count_events, path, function, *arguments) == [0]
    events = int(path.read_text())
    return sorted(random.Random(seed).sample(range(1, events), number))
