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
    # 6 layers: stride 1 or 2; 32 drawn channels to 32 drawn kernels, whose other groups count or don't, or 96 of
    # streams to a relaxed draw. What is compiled for one layer serves another of the same sizes.
    assert found["compiled"] == {
        "sample": 1,
        "pack": 8,  # and for the weight gradient of relaxed draws
        "rowwalk": 4,  # stride 1: forward and back, with undrawn rows and without
        "rowwalk_gates": 1,
        "rowwalk_weights": 2,
        "convolve": 2,  # forward and back, stride 2
        "convolve_kept": 1,
        "convolve_undrawn": 1,
        "convolve_all": 4,
        "gate_gradient": 1,
        "weight_gradient": 2,
        "reduce": 4,
        **dict.fromkeys(("moments", "statistics", "affine", "gradient_sums", "slopes", "affine_gradient"), 1),
    }
    assert found["launched"] == 50 * 2 * (1 + 4 * 5 + 2 + 1) + 50 * 6
