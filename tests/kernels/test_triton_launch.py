"""Launches without a GPU: see pretend_gpu.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfg_fast.backends import available


@pytest.mark.skipif(not available("triton"), reason="Triton is not installed")
def test_fifty_drawn_groupings_take_one_compiled_kernel_each():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.pretend_gpu"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    # 8 layers: stride 1 or 2, packed or expanded rows, packed columns (64) or streams (192). What is compiled for one
    # layer serves another of the same sizes.
    assert found["compiled"] == {
        "sample": 1,
        "pack": 8,
        "rowwalk": 2,  # forward and back, 64 to 64 channels, stride 1
        "convolve": 4,  # forward with stride 2 or from streams, back with stride 2
        "convolve_all": 6,  # forward to expanded rows, back to streams
        "gate_gradient": 4,
        "weight_gradient": 4,
        "reduce": 4,
    }
    assert found["launched"] == 50 * 2 * (1 + 4 * 5 + 2)
