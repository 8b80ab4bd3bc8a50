"""A cohort of three small cases whose every voxel is known."""

import json

import numpy as np

from sfg_fast.data import Cohort, Grid, read_cohort, write_volume

LABELS = {"background": 0, "prostate": 1, "bladder": 2}
SHAPES = {"a": (4, 7, 6), "b": (3, 5, 9), "c": (2, 7, 6)}  # Z, Y, X
AFFINE = np.diag([-2.0, -3, 4, 1])  # stored LPS


def arrays(name: str) -> dict[str, np.ndarray]:
    """Random volumes of a case: two MR channels, CT, labels, mask."""
    rng = np.random.default_rng(ord(name))
    shape = SHAPES[name]
    return {
        "mr_0": rng.gamma(2, 100, shape).astype(np.float32),
        "mr_1": rng.normal(50, 3, shape).astype(np.float32),
        "ct": rng.integers(-1000, 2000, shape).astype(np.int16),
        "labels": rng.integers(0, 3, shape).astype(np.uint8),
        "mask": rng.integers(0, 2, shape).astype(np.uint8),
    }


def write_cohort(root, names="abc", leave_out=()) -> Cohort:
    """Cases in folders; c is the test split. leave_out: pairs (case, file)."""
    for name in names:
        (root / name).mkdir(parents=True)
        for kind, array in arrays(name).items():
            if (name, kind) not in leave_out:
                z, y, x = array.shape
                write_volume(root / name / f"{kind}.nii", array, Grid(AFFINE, (x, y, z)), array.dtype)
    split = {"train": [name for name in names if name != "c"], "test": [name for name in names if name == "c"]}
    (root / "dataset.json").write_text(json.dumps({"labels": LABELS, "split": split}))
    return read_cohort(root)


def spoil(cohort: Cohort, file: str, value, case="b") -> Cohort:
    z, y, x = SHAPES[case]
    write_volume(cohort.root / case / f"{file}.nii", np.full((z, y, x), value), Grid(AFFINE, (x, y, z)), np.float32)
    return cohort
