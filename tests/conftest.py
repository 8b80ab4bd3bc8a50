"""Settings for all tests: deterministic, float32 by default, no hypothesis database, threads as a laptop has them."""

import os

import hypothesis
import pytest
import torch

# Before Triton is imported: its kernels run on CPU tensors then. (On a GPU: benchmarks/gpu_suite.py.)
os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("sfg", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("sfg")
torch.set_num_threads(1)  # the tensors of the tests are tiny: two threads would mostly wait for each other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    """Everything in double precision, so that equal means 1e-10."""
    torch.set_default_dtype(torch.float64)
