"""Makes cohorts of the real volumes of one patient. Slabs of a volume are cases; every third slab is a test case.

    python -m benchmarks.experiment.real_volumes pelvis CT.nii.gz LABELS.nii.gz LABELS.json COHORT
    python -m benchmarks.experiment.real_volumes head MR.nii CT.nii GREY.nii WHITE.nii CSF.nii COHORT
    sfg-fast experiment benchmarks/experiment/real.yaml --cohort COHORT --out OUT

pelvis needs a CT in HU with labels; its MR is simulated from the CT. head needs a population-average MR and CT (whose
numbers are HU plus 1024) with maps of tissue; the label of a voxel is the tissue with the largest value. Neighbouring
slabs are of one patient. So this tests that the whole job runs on real anatomy; its scores are no result.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import ndimage

from sfg_fast.data import Grid, read_labels, read_volume, write_volume

SLICES = 12
# A T2-like contrast: HU of air, lung, fat, water, muscle, marrow, cortical bone, metal -> signal.
HU = (-1000, -500, -100, 5, 55, 250, 800, 3000)
SIGNAL = (0.02, 0.1, 0.8, 0.9, 0.3, 0.6, 0.05, 0.0)


def simulated_mr(ct: np.ndarray, seed: int) -> np.ndarray:
    """A simulated MR [Z, Y, X]: a contrast that depends on HU, with a smooth bias field and Rician noise."""
    rng = np.random.default_rng(seed)
    field = ndimage.zoom(rng.normal(size=(2, 3, 3)), np.array(ct.shape) / (2, 3, 3), order=1)
    signal = np.interp(ndimage.gaussian_filter(ct, 0.5), HU, SIGNAL) * np.exp(0.2 * field)
    noise = 0.04 * rng.normal(size=(2, *ct.shape))
    return 1000 * np.hypot(signal + noise[0], noise[1])


def write_slabs(out: Path, mr: np.ndarray, ct: np.ndarray, labels: np.ndarray, grid: Grid, names: dict) -> None:
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index, first in enumerate(range(0, len(ct) - SLICES + 1, SLICES)):
        part = slice(first, first + SLICES)
        if (ct[part] > -500).mean() < 0.05:
            continue
        case, affine = f"slab_{index:02d}", grid.affine.copy()
        affine[:3, 3] += affine[:3, 2] * first
        own = Grid(affine, (*grid.shape[:2], SLICES))
        (out / case).mkdir(parents=True)
        for name, array, dtype in (("mr", mr, np.float32), ("ct", ct, np.int16), ("labels", labels, np.uint8)):
            write_volume(out / case / f"{name}.nii.gz", array[part].astype(dtype), own, dtype)
        split["test" if index % 3 == 1 else "train"].append(case)
    (out / "dataset.json").write_text(json.dumps({"labels": names, "split": split}))
    print({which: len(cases) for which, cases in split.items()})


def main(kind: str, *paths: str) -> None:
    out = Path(paths[-1])
    if kind == "pelvis":
        ct, grid = read_volume(Path(paths[0]))
        labels, _ = read_labels(Path(paths[1]))
        names = json.loads(Path(paths[2]).read_text())
        write_slabs(out, simulated_mr(ct, 0), np.clip(ct, -1024, 3000), labels, grid, names)
    else:
        (mr, grid), (ct, _) = (read_volume(Path(path)) for path in paths[:2])
        maps = np.stack([read_volume(Path(path))[0] for path in paths[2:5]])
        labels = np.where(maps.max(0) > 0.5, maps.argmax(0) + 1, 0)
        names = {"background": 0, "grey": 1, "white": 2, "csf": 3}
        write_slabs(out, mr, ct - 1024, labels, grid, names)


if __name__ == "__main__":
    main(*sys.argv[1:])
