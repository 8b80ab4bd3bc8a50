"""The GPU suite runs from a checkout, in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfg_fast.backends import available

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_suite.py"


@pytest.mark.skipif(not available("triton"), reason="Triton is not installed")
def test_dry_run(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--dry-run"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "gpu_suite.json").read_text())
    assert len(results["checks"]) == 8
    assert all(check["ok"] for check in results["checks"])
    assert results["graph"]["ok"]
    assert set(results["layer 16"]["step"]["graph_us"]) >= {"triton", "masked", "dense masking"}
    assert results["network routed, 6x6"]["graph_us"]["straight_through"] > 0
    assert results["inference routed, 6x6"]["slices_per_s"].keys() == {"frozen", "network", "two plain"}
    assert "left_out" not in results


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"], capture_output=True, text=True)
    if available("triton"):
        assert done.returncode == 2
        assert "there is no GPU here; --dry-run" in done.stderr
    assert not (tmp_path / "out").exists()
