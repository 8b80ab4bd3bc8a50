"""The GPU suite runs from a checkout, in Triton's interpreter; what breaks in it costs one line."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sfg_fast.backends import available
from sfg_fast.gpu.isolated import Job

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from sfg_fast.kernels import triton as kernels

from benchmarks import gpu_jobs, gpu_suite, gpu_tables
from sfg_fast.gpu import checks

SCRIPT = Path(gpu_suite.__file__)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "gpu_suite.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_dry_run(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path / "out", "--dry-run"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ended = check_dry_run(tmp_path / "out", done.stdout)
    assert sum(name.startswith(("float16 ", "float32 ")) for name in ended) == 14


def test_dry_run_without_what_repeats_itself(tmp_path, capsys):
    """One precision, without the layers of test_checks.py, and nothing twice that later parts do."""
    checking, *others = gpu_jobs.parts(compiled=False)
    again = ("float32 ", "float16 16->16 in 3 groups, packed", "float16 16->16 in 3 groups, undrawn")
    again += ("compile network", "compile what the host calls, s")
    jobs = {name: job for name, job in checking.jobs.items() if not name.startswith(again)}
    assert gpu_suite.suite(tmp_path, 6, [checking._replace(jobs=jobs), *others]) == 0
    ended = check_dry_run(tmp_path, capsys.readouterr().out)
    assert sum(name.startswith(("float16 ", "float32 ")) for name in ended) == 5


def check_dry_run(out, printed):
    """The lines of the jobs that have ended, by name."""
    lines = lines_of(out)
    ended = {line["name"]: line for line in lines if "name" in line}
    assert all(line["error"] is None for line in ended.values())
    assert set(ended) - {"where"} == {line["begin"] for line in lines if "begin" in line}
    assert ended["layer 16"]["value"]["passes"]["forward + ReLU"].keys() >= {"ours", "cuDNN", "floor", "predicted"}
    assert ended["network routed, 6x6"]["value"]["graph_us"]["straight_through"][1] > 0
    assert ended["graph of training steps"]["value"].endswith("tensors equal to the bit after 12 steps")
    assert ended["training steps"]["value"]["2 slices of 8x8"].keys() == {"captured", "eager"}
    assert "frozen" in ended["inference routed, 6x6"]["value"]["graph_us"]
    assert len(ended["variants of the convolutions, 16 kernels"]["value"]) == 2
    table = (out / "gpu_suite.md").read_text()
    assert table in printed
    for title in (
        "## Checks",
        "## Passes of a layer",
        "## Network routed",
        "## Steps as",
        "## Variants",
        "## The host",
    ):
        assert title in table
    return ended


def right():
    return checks.checks(torch.device("cpu"))["float32 1->16 in 3 groups, packed, all, 3x3"]()


def wrong():
    """The same with a kernel that is off by one part in ten thousand."""
    convolve = kernels._convolve
    kernels._convolve = lambda *a, **k: tuple(y if y is None else y * 1.0001 for y in convolve(*a, **k))
    return right()


def crash():
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_a_hang_and_a_wrong_kernel_cost_one_line_each(tmp_path, capsys):
    checking = {
        "float32 planted, crashes": Job(crash),
        "float32 right": Job(right),
        "float32 planted, hangs": Job(threading.Event().wait, patience=1),
        "float32 planted, wrong": Job(wrong),
        "float32 right again": Job(right),
    }
    host = {"host": Job(lambda: {"a call": 12.0})}
    parts = [gpu_jobs.Part("checks", checking, 1, 0.5), gpu_jobs.Part("variants", host, 1, 1.0)]
    assert gpu_suite.suite(tmp_path, 5, parts) == 1
    ended = {line["name"]: line["error"] for line in lines_of(tmp_path) if "name" in line}
    assert ended["float32 planted, crashes"] == "the process died (SIGSEGV)"
    assert ended["float32 planted, hangs"] == "no answer in 1 s: killed"
    assert ended["float32 planted, wrong"].startswith("WrongResult: relative errors {'forward': ")
    assert [name for name, error in ended.items() if error is None] == [
        "where", "float32 right", "float32 right again", "host",
    ]  # fmt: skip
    table = (tmp_path / "gpu_suite.md").read_text()
    assert table.count("- WRONG float32 planted") == table.count("WRONG") == 3
    assert "- float32: 2 right" in table
    assert "- a call: 12" in table
    assert "3 wrong, 4 of 7 jobs done" in capsys.readouterr().out


def test_the_minutes_hold(tmp_path):
    checking = {"float32 right": Job(right), "float32 slow": Job(threading.Event().wait), "float32 late": Job(right)}
    part = gpu_jobs.Part("checks", checking, 1, 1.0)
    assert gpu_suite.suite(tmp_path, 0.1, [part]) == 0  # what came not to its turn is not wrong
    ended = {line["name"]: line["error"] for line in lines_of(tmp_path) if "name" in line}
    assert ended["float32 slow"] == "the time was up: killed"
    assert ended["float32 late"] == "left out: the time was up"
    assert "- not done in time: 2" in (tmp_path / "gpu_suite.md").read_text()


def test_one_check_alone():
    name = "float32 normalisation of 16 channels"
    command = [sys.executable, SCRIPT, "--dry-run", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'forward': " in done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpu_suite: no GPU can be used here (")
    assert not (tmp_path / "out").exists()


def test_tables_in_the_repository_are_those_of_their_lines():
    files = sorted((SCRIPT.parent / "results/gpu").glob("*.jsonl"))
    assert files
    for file in files:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        ended = [line for line in lines if "name" in line]
        outcomes = [gpu_tables.Outcome(*(line[key] for key in gpu_tables.Outcome._fields)) for line in ended]
        assert gpu_tables.report(outcomes) == file.with_suffix(".md").read_text()
