"""Launches without a GPU: see pretend_gpu.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfg_fast.backends import available

pytestmark = pytest.mark.skipif(not available("triton"), reason="Triton is not installed")


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.pretend_gpu"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_fifty_drawn_groupings_take_one_compiled_kernel_each(found):
    # 6 layers: stride 1 or 2; 32 drawn channels to 32 drawn kernels, whose other groups count or don't, or 96 of
    # streams to a relaxed draw. What is compiled for one layer serves another of the same sizes.
    assert found["compiled"] == {
        "sample": 1,
        "pack": 8,  # and for the weight gradient of relaxed draws
        "rowwalk": 4,  # stride 1: forward and back, with undrawn rows and without
        "rowwalk_gates": 2,  # and with scale and shift of each image
        "rowwalk_weights": 2,
        "convolve": 2,  # forward and back, stride 2
        "convolve_kept": 1,
        "convolve_undrawn": 1,
        "convolve_all": 4,
        "gate_gradient": 2,
        "weight_gradient": 2,
        "reduce": 4,
        # batch norm and ReLU; instance norm and leaky ReLU
        **dict.fromkeys(("moments", "statistics", "affine", "gradient_sums", "slopes", "affine_gradient"), 2),
    }
    assert found["launched"] == 50 * 2 * (1 + 4 * 5 + 2 + 2) + 50 * 2 * 6


def test_launches_and_operations_of_a_layer(found):
    """Of one layer 32 -> 32 with a norm and an activation amid others, whose groups are drawn already: batch norm and
    ReLU, or instance norm (of two images, in as many launches) and leaky ReLU."""
    assert found["of a layer"] == {
        # pack, convolve, moments, statistics, affine; gates, sums, slopes, affine, input, weight, the sum of its splits
        "straight_through": {
            "launches, forward": 5,
            "operations, forward": 1,  # the zero that stands for all undrawn features
            "launches, backward": 7,
            "operations, backward": 10,
        },
        "straight_through, instance norm": {
            "launches, forward": 5,
            "operations, forward": 1,
            "launches, backward": 7,
            "operations, backward": 12,  # dweight and dbias, summed over the images
        },
        "selected": {
            "launches, forward": 5,
            "operations, forward": 0,
            "launches, backward": 6,
            "operations, backward": 3,  # the drawn gates' gradient
        },
    }
