import pytest

from sfg_fast.data import Cache, Cohort, preprocess

from .small_cohort import write_cohort


@pytest.fixture
def cohort(tmp_path) -> Cohort:
    return write_cohort(tmp_path / "cohort")


@pytest.fixture
def cache(tmp_path, cohort) -> Cache:
    return preprocess(cohort, tmp_path / "cache", progress=False)
