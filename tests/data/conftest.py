"""A small cohort, and the cache made of it: anew for each test, which may spoil them."""

from pathlib import Path

import pytest

from sfg_fast.data import Cache, Cohort, preprocess

from .small_cohort import write_cohort


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    """Three cases in tmp_path/cohort."""
    return write_cohort(tmp_path / "cohort")


@pytest.fixture
def cache(tmp_path: Path, cohort: Cohort) -> Cache:
    """The preprocessed cohort in tmp_path/cache."""
    return preprocess(cohort, tmp_path / "cache", progress=False)
