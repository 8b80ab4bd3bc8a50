"""`pytest benchmarks/`: its options, its table, and that all contestants do the same work."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import layers, networks, timing
from benchmarks.conftest import Row, notes, table
from benchmarks.layers import Layer
from sfg_fast.backends import available

ROOT = Path(__file__).parents[2]
SPREAD = re.compile(r"\d+\.\d\d \(\d+\.\d\d-\d+\.\d\d\)")
CASES = {  # the smallest of each file
    "bench_layers.py::test_layer[16-forward]": {
        "dense masking / ours",
        "ours / one plain",
        "one for each group / ours",
    },
    "bench_networks.py::test_network[vgg-96-inference]": {"dense masking / ours", "ours / one plain", "frozen / ours"},
    "bench_reference.py::test_reference_is_as_fast_as_a_plain_script[demo, routed]": {
        "dense masking / ours",
        "reference / plain script",
    },
}


def run(*arguments):
    """pytest in a process of its own, as people call it, but with one thread: two would wait for each other where
    other tests run beside this one."""
    # (In a process of pytest-xdist's pytest-benchmark would measure nothing.)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow  # it collects all benchmarks twice
def test_every_case_is_there_once_and_full_adds_to_them():
    quick, full = (
        [line for line in run("benchmarks", "--collect-only", *options).stdout.splitlines() if "::" in line]
        for options in (["--device", "cpu"], ["--device", "cpu", "--full"])
    )
    assert len(set(quick)) == len(quick)
    assert set(quick) < set(full)
    assert {f"benchmarks/{case}" for case in CASES} < set(quick)
    for kind in ("routed-96", "separate-96", "vgg-96", "unet-128"):
        assert f"benchmarks/bench_networks.py::test_network[{kind}-training]" in quick
    assert sum("test_layer" in line for line in full) == 2 * len(layers.layers(full=True))


def test_every_case_exists_for_a_gpu():
    assert {case.kind for case in networks.cases("cuda", full=False)} == {"routed", "separate", "vgg", "unet"}
    for case in networks.cases("cuda", full=True):
        assert case.device == "cuda"
        assert all(", channels_last" in name for name in networks.names(case.kind, "cuda", full=False)[:-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line():
    done = run("benchmarks", "--device", "cuda")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert (done.stdout + done.stderr).strip() == (
        "ERROR: --device cuda: torch finds no GPU here, expected one (or --device cpu)"
    )


def test_ratios_with_their_spread_are_in_the_table_and_the_json(tmp_path):
    file = tmp_path / "found.json"
    done = run(*(f"benchmarks/{case}" for case in CASES), "--device", "cpu", "--benchmark-json", file)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    benchmarks = json.loads(file.read_text())["benchmarks"]
    assert {benchmark["fullname"] for benchmark in benchmarks} == {f"benchmarks/{case}" for case in CASES}
    *_, head, _, first, second, third, _ = done.stdout.splitlines()
    titles = [title.strip() for title in head.strip("|").split("|")]
    rows = [dict(zip(titles, map(str.strip, row.strip("|").split("|")), strict=True)) for row in (first, second, third)]
    for benchmark in benchmarks:
        found = benchmark["extra_info"]
        (row,) = [row for row in rows if row["case"] == found["case"]]
        assert row["ours"] == found["ours"]
        assert set(found["ratios"]) >= CASES[benchmark["fullname"].removeprefix("benchmarks/")]
        for title, spread in found["ratios"].items():
            low, high = spread["quartiles"]
            assert 0 < low <= spread["median"] <= high
            assert SPREAD.fullmatch(row[title])
        if "network" in benchmark["name"]:
            assert f"{found['slices_per_s']:.1f} slices/s" in row["ours"]
            assert set(found["memory_MiB"]) == {"dense", "network"}
            assert "MiB" in row["memory"]


def test_the_table_has_every_column_and_what_took_no_part():
    rows = [
        Row("a", "native", {"dense masking / ours": (2.0, 1.5, 2.5)}, "", {}),
        Row("b", "triton", {"masked / ours": (1.0, 0.9, 1.125)}, "3 MiB", {"MONAI": "it waits"}),
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(rows)]
    assert lines[0] == ["case", "ours", "dense masking / ours", "masked / ours", "memory"]
    assert lines[2:] == [
        ["a", "native", "2.00 (1.50-2.50)", "-", "-"],
        ["b", "triton", "-", "1.00 (0.90-1.12)", "3 MiB"],
    ]
    assert notes(rows) == ["b: MONAI took no part: it waits"]


def test_on_a_gpu_graphs_repeat_a_call_and_what_cannot_be_captured_takes_no_part(monkeypatch):
    """With a pretended device."""
    calls = []

    def captured(call, device):
        call()
        if "waits" in calls:
            raise RuntimeError("it waits\nfor the device")
        return call

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(
        timing, "interleaved", lambda graphs, rounds, device: {name: [40.0] * rounds for name in graphs}
    )
    two = {"ours": lambda: calls.append("ours"), "other": lambda: calls.append("waits")}
    times, left_out = timing.timed(two, "cuda", rounds=3, repeat=20)
    assert calls == ["ours"] * 20 + ["waits"] * 20
    assert times == {"ours": [2.0] * 3}
    assert left_out == {"other": "RuntimeError: it waits"}


TINY = [
    Layer("arrow", (3, 2, 3), (6, 7), batch=2, dilation=2),
    Layer("image", (3, 2, 3), (6, 7), batch=2, routing="all"),
    Layer("own", (4, 4, 4), (6, 7), batch=2, routing="own"),
    Layer("merge", (4, 4, 4), (6, 7), batch=2, kernel=1),
]


@pytest.mark.parametrize("layer", TINY, ids=str)
def test_the_contestants_of_a_layer_do_the_same_work(layer):
    make = layers.contestants if layer.name in ("arrow", "image") else layers.stream_contestants
    work = make(layer)
    assert set(work) > {"masked"}
    packed = work["masked"].forward()
    for name, entry in work.items():
        y = entry.forward()
        if "dense masking" in name:  # the groups are numbered in order, so that packed channels are the kernels
            y = sum(y)
        elif not isinstance(y, torch.Tensor):
            y = torch.cat(y, 1)
        if "one plain" not in name or layer.routing == "all":
            torch.testing.assert_close(y, packed)
        assert all(leaf.is_leaf for leaf in entry.leaves)
        entry.step()
    leaves = [id(leaf) for entry in work.values() for leaf in entry.leaves]
    assert len(set(leaves)) == len(leaves)


def test_without_native_masked_is_ours(monkeypatch):
    assert layers.fastest("cpu") == ("native" if available("native") else "masked")
    monkeypatch.setattr(layers, "available", lambda name: False)
    assert layers.fastest("cpu") == layers.fastest("cuda") == "masked"
    assert "native" not in layers.contestants(TINY[0])


def test_the_faster_form_of_each_contestant():
    times = {"dense": [4.0], "dense, channels_last": [3.0], "dense compiled, channels_last": [2.0], "selected": [1.0]}
    found = networks.faster(times)
    assert found == {"dense": [3.0], "dense compiled": [2.0], "dense faster": [2.0], "selected": [1.0]}
