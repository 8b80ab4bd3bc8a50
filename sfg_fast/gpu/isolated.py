"""Jobs in processes of their own: a job that crashes, hangs or spoils its GPU context loses its own result only.

Processes are forked, so the process that calls `run` must not have touched a GPU. A job that failed takes its process
with it, because after an illegal access nothing that a CUDA context says can be trusted.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A function without arguments, whose result can be pickled. It is killed after `patience` seconds."""

    call: Callable[[], Any]
    patience: float = 30.0


class Outcome(NamedTuple):
    """What became of a job."""

    name: str
    value: Any = None  # what the job returned, if `error` is None
    error: str | None = None  # why it has no value, in one line
    seconds: float = 0.0


class _Worker(NamedTuple):
    process: Any
    connection: Connection


def run(
    jobs: Mapping[str, Job],
    processes: int,
    until: float = math.inf,
    begin: Callable[[str], None] = lambda name: None,
    log: Path | None = None,
) -> Iterator[Outcome]:
    """Run jobs (by name) in the order given, `processes` at a time; yields an outcome for each as it ends.

    until: the time (of time.monotonic) at which jobs that still run are killed, and the others left out. begin: is
    called with each job's name as the job starts. log: the file that gets what the processes print.
    """
    waiting: list[str] = list(jobs)
    idle: list[_Worker] = []
    busy: dict[Connection, tuple[_Worker, str, float]] = {}
    try:
        while waiting or busy:
            now = time.monotonic()
            while waiting and len(busy) < processes and now < until:
                worker = idle.pop() if idle else _start(jobs, [*busy, *(one.connection for one in idle)], log)
                try:
                    worker.connection.send(waiting[0])
                except OSError:  # the worker died while it had nothing to do; another one takes the job
                    _kill(worker)
                    continue
                name = waiting.pop(0)
                begin(name)
                busy[worker.connection] = worker, name, now
            if now >= until and not busy:
                for name in waiting:
                    yield Outcome(name, error="left out: the time was up")
                return
            ends = [started + jobs[name].patience for _, name, started in busy.values()]
            ready = wait(list(busy), max(0.0, min([*ends, until]) - now))
            now = time.monotonic()
            for connection in list(busy):
                worker, name, started = busy[connection]
                patience = jobs[name].patience
                late = now >= min(started + patience, until)
                if connection not in ready and not late:
                    continue
                value, error = _answer(worker) if connection in ready else (None, None)
                if connection not in ready:
                    limit = "the time was up" if now >= until else f"no answer in {patience:g} s"
                    error = f"{limit}: killed"
                del busy[connection]
                if error is None:
                    idle.append(worker)
                else:
                    _kill(worker)
                yield Outcome(name, value, error, now - started)
    finally:
        for worker in [*idle, *(worker for worker, _, _ in busy.values())]:
            _kill(worker)


def _start(jobs: Mapping[str, Job], others: list[Connection], log: Path | None) -> _Worker:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, jobs, [here, *others], log), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _work(connection: Connection, jobs: Mapping[str, Job], others: list[Connection], log: Any) -> None:
    """What a worker does: it receives the name of a job and sends (value, error), again and again. It ends with the
    first error, or with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    for other in others:  # while these copies were open, no worker would be told that the parent is gone
        other.close()
    output = os.open(os.devnull if log is None else log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            connection.send((jobs[name].call(), None))
        except BaseException as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            connection.send((None, f"{type(error).__name__}: {text}"[:500]))
            return


def _answer(worker: _Worker) -> tuple[Any, str | None]:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join(5)
        code = worker.process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return None, f"the process died ({how})"


def _kill(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join(5)  # not forever: a driver that hangs may not let the process go
