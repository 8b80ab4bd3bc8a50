"""Cohorts: this package takes volumes or images, real or synthetic, to training batches.

nibabel, SimpleITK, scipy, Pillow and tqdm are imported where they are used, not with the package.
"""

from .cache import BlockArrays, Cache, CaseArrays
from .cases import SPLITS, Case, Cohort, LoadedCase
from .cohort import load_case, read_cohort
from .images import ImageForm, load_images
from .phantom import PhantomCase, make_case, write_phantom
from .preprocessing import body_mask, normalise, preprocess
from .sampler import ImageSampler, SliceSampler
from .targets import Target
from .volumes import Grid, read_labels, read_volume, same_grid, write_volume

__all__ = [
    "SPLITS",
    "BlockArrays",
    "Cache",
    "Case",
    "CaseArrays",
    "Cohort",
    "Grid",
    "ImageForm",
    "ImageSampler",
    "LoadedCase",
    "PhantomCase",
    "SliceSampler",
    "Target",
    "body_mask",
    "load_case",
    "load_images",
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
