"""Are the Triton kernels right on this GPU, and are they faster than `masked`? `sfg-fast gpu-check` finds out, in about
a minute.

The check runs in a process of its own, which forks others for the jobs. So a GPU without memory, and a kernel that
crashes or hangs, with whatever it leaves behind, touch nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import kernel_choice
from ..kernel_choice import PRECISIONS, WIDTHS, WORKS, Choice, entry
from . import checks, timing
from .isolated import Job, run

MINUTES = 10.0  # a check that takes longer has failed
BATCH, SIDE, ROUNDS = 8, 128, 9
# `-m` is not used, because the package imports this module, and Python would warn that it is there twice.
COMMAND = [sys.executable, "-c", "import sys; from sfg_fast.gpu.gpu_check import main; main(sys.argv[1:], sys.stdout)"]


def gpu_check(device: torch.device | str = "cuda", again: bool = False) -> Choice:
    """Check the Triton kernels on this GPU, time them against `masked`, and keep the result for the user's later
    processes. From now on `auto` follows the result. If there is a result already, it is taken, unless `again`.

    Whatever goes wrong (out of memory, a crash, a folder that can't be written, another process that checks at the same
    time) is told in one line on stderr, and CUDA tensors then take `masked`.

    Returns the choice. Raises RuntimeError if there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("gpu_check: there is no CUDA device, expected one")
    device = torch.device(device)
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    try:
        choice = kernel_choice.decide(checked(device, again))
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"gpu-check: {text}; CUDA tensors take `masked`", file=sys.stderr)
        choice = Choice(why=f"gpu-check failed: {text}")
    kernel_choice.choose(device, choice)
    return choice


def checked(device: torch.device, again: bool = False) -> dict[str, Any]:
    """The result of a check of this device: the one that is there, or (with `again`, or if there is none) a new one.

    Raises RuntimeError or OSError, saying why, if the check could not be done.
    """
    of = kernel_choice.describe(device)
    file = kernel_choice.file_of(of)
    result = None if again else kernel_choice.read(file, of)
    if result is not None:
        return result
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.with_suffix(".lock")):
        result = None if again else kernel_choice.read(file, of)  # another process may just have finished
        if result is None:
            result = {"of": of, **_in_a_process(device)}
            temporary = file.with_suffix(f".{os.getpid()}.part")
            try:
                temporary.write_text(json.dumps(result, indent=1) + "\n")
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{lock}: another process is checking a GPU of this kind") from None
        yield


def _in_a_process(device: torch.device) -> dict[str, Any]:
    """Runs `measure` in a process apart, shows a progress bar, and returns the result."""
    from tqdm import tqdm

    said: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([*COMMAND, str(device)], stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        deadline = threading.Timer(60 * (MINUTES + 1), process.kill)  # a driver that hangs can't be waited for
        deadline.start()
        try:
            with tqdm(desc="gpu-check", unit="job") as bar:
                for line in process.stdout:
                    said = json.loads(line)
                    if "total" in said:
                        bar.total = said["total"]
                    bar.update("done" in said)
            code = process.wait()
        finally:
            deadline.cancel()
            _end(process)
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    if "result" not in said:
        raise RuntimeError(f"the check of {device} ended with exit code {code} and without a result {last}".strip())
    return said["result"]


def _end(process: Any) -> None:
    """Ends the process: first it is asked to, so that it ends its own processes, too; then it is killed."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    process.kill()
    process.wait()
    process.stdout.close()


# --- in the process apart ---------------------------------------------------------------------------------------------


def measure(
    device: torch.device,
    say: Callable[[dict[str, Any]], None],
    precisions: Sequence[str] = PRECISIONS,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, Any]:
    """Runs all checks and timings of a device, and returns {"wrong": {check: why}, "ratios": {entry: time of Triton /
    time of `masked`}, "untimed": {entry: why}}.

    say: is called with {"total": number of jobs} first, and with {"done": name} after each job. The checks run side by
    side; together with a first run of everything that is timed they fill Triton's cache on the disk, and the timings
    follow one by one. Raises RuntimeError if a check came to no verdict, because being out of memory, a crash or a hang
    say nothing about the kernels' arithmetic; and if nothing could be timed.
    """
    until = time.monotonic() + 60 * MINUTES
    found = {
        name: Job(partial(on, device, check), 120)
        for name, check in checks.checks(device, tuple(widths)).items()
        if name.split()[0] in precisions or name.startswith("draw")
    }
    kinds = [(precision, width, work) for precision in precisions for width in widths for work in WORKS]
    ahead = {f"first run of {entry(*kind)}": Job(partial(on, device, once, device, *kind), 120) for kind in kinds}
    timed = {entry(*kind): Job(partial(on, device, ratio, device, *kind), 60) for kind in kinds}
    say({"total": len(found) + len(ahead) + len(timed)})
    wrong, ratios, untimed = {}, {}, {}
    processes = min(12, len(os.sched_getaffinity(0)))
    for jobs, count in ((ahead | found, processes), (timed, 1)):
        for outcome in run(jobs, count, until):
            say({"done": outcome.name})
            if outcome.name in timed:
                if outcome.error is None:
                    ratios[outcome.name] = outcome.value
                else:
                    untimed[outcome.name] = outcome.error
            elif outcome.name in found and outcome.error is not None:
                if not outcome.error.startswith(checks.WrongResult.__name__):
                    raise RuntimeError(f"{outcome.name}: {outcome.error}")
                wrong[outcome.name] = outcome.error
    if not ratios:
        raise RuntimeError(f"nothing could be timed: {next(iter(untimed.items()))}")
    return {"wrong": wrong, "ratios": ratios, "untimed": untimed}


def on(device: torch.device, call: Callable[..., Any], *arguments: Any) -> Any:
    """Returns call(*arguments), called with `device` as the current one, to which streams, events and graphs belong."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return call(*arguments)


def once(device: torch.device, precision: str, width: int, work: str) -> None:
    """Run the layers on `triton` once, on a single image, so that the kernels are compiled before they are timed."""
    with checks.products(precision):
        timing.layers_at_work(work, width, "triton", device, checks.PRECISIONS[precision].dtype, 1, SIDE)()
        timing.synchronize(device)


def ratio(device: torch.device, precision: str, width: int, work: str) -> float:
    """The time of three layers on `triton`, divided by their time on `masked`: the median over interleaved replays of
    CUDA graphs."""
    dtype = checks.PRECISIONS[precision].dtype
    with checks.products(precision):
        calls = {
            name: timing.captured(timing.layers_at_work(work, width, name, device, dtype, BATCH, SIDE), device)
            for name in ("triton", "masked")
        }
        times = timing.interleaved(calls, ROUNDS, device=device)
    return sorted(a / b for a, b in zip(times["triton"], times["masked"], strict=True))[ROUNDS // 2]


def main(arguments: Sequence[str], output: TextIO) -> None:
    """Checks the device that the first argument names, in the process that `_in_a_process` starts. Writes a line of
    JSON for each step and for the result."""

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=output, flush=True)

    say({"result": measure(torch.device(arguments[0]), say)})
