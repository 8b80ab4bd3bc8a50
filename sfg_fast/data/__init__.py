"""Cohorts: from volumes, real or synthetic, to training batches; nibabel, SimpleITK, scipy and tqdm load where used."""

from .cache import Cache, CaseArrays
from .cohort import SPLITS, Case, Cohort, LoadedCase, load_case, read_cohort
from .phantom import PhantomCase, make_case, write_phantom
from .preprocessing import body_mask, normalise, preprocess
from .sampler import SliceSampler
from .volumes import Grid, read_labels, read_volume, same_grid, write_volume

__all__ = [
    "SPLITS",
    "Cache",
    "Case",
    "CaseArrays",
    "Cohort",
    "Grid",
    "LoadedCase",
    "PhantomCase",
    "SliceSampler",
    "body_mask",
    "load_case",
    "make_case",
    "normalise",
    "preprocess",
    "read_cohort",
    "read_labels",
    "read_volume",
    "same_grid",
    "write_phantom",
    "write_volume",
]
