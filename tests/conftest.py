"""Settings for all tests: deterministic, float32 by default, no hypothesis database, threads as a laptop has them."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Before Triton is imported: its kernels run on CPU tensors then. (On a GPU: benchmarks/gpu_suite.py.)
os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("sfg", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("sfg")
torch.set_warn_always(True)  # what torch would say once, it says to each test: the first one is no other than the next
torch.set_num_threads(1)  # the tensors of the tests are tiny: two threads would mostly wait for each other


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> None:
    """New tensors are float64, so that equal means equal to 1e-10."""
    torch.set_default_dtype(torch.float64)
