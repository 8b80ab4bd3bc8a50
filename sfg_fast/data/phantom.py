"""A synthetic pelvis cohort: MR, CT, labels and body mask as NIfTI, for the demo, the tests and experiments.

`pelvis.py` says where each tissue of a patient lies, and `TISSUES` how bright it is; this module images the patient.
Everything is given in mm and depends on the seed alone. The grid only samples the patient, eight times per voxel, so
that a voxel on a border holds a mixture. Cortical bone and rectal gas are both dark in the MR but about 2000 HU apart
in the CT, so that a synthetic CT needs context, not only intensity. Organs differ from their walls and neighbours in
the MR only.

The difficulty, 0 to 1, takes away what makes the job easy. Anatomy varies more. In the MR organs, muscle and stool come
closer together, and marrow becomes as bright as fat. Bias field and noise grow. Tendons, calcifications and gas in the
bowel are dark in the MR, too, and only place and shape tell them apart. And each task has to look at what the other has
no use for. For the organs these are the veins around the prostate: they have its HU, so that the CT does not show its
border. For the CT it is how dense a bone is. Marrow is denser where its texture in the MR is coarser, near the bone's
surface, and in the femoral heads; cortical bone is denser the farther it is from the midline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import new_folder, write_json
from .pelvis import (
    AIR,
    ARTERY,
    CALCIFICATION,
    CARTILAGE,
    CORTICAL,
    FAT,
    GAS,
    GLAND,
    LABELS,
    MARROW,
    MUCOSA,
    MUSCLE,
    PERIPHERAL_ZONE,
    PROSTATE,
    SKIN,
    STOOL,
    TENDON,
    URINE,
    VEIN,
    WALL,
    cut,
    pelvis,
)
from .stored import MAX_VOXELS
from .volumes import Grid, write_volume

FIELD_OF_VIEW_MM = (144.0, 400.0, 400.0)  # along Z, Y, X
SCANNER_UNITS = 1000.0  # about the MR intensity of the brightest tissue
BLUR_MM = 0.8  # SD by which scanners blur in plane
# Samples of a voxel along each axis, and their weights, a little unequal, so that no label wins all ties.
SAMPLES, WEIGHTS = 2, (0.499, 0.501)
# Of each tissue: MR at difficulty 0 and at 1 (1 is about the brightest tissue), HU; the SD among patients of MR
# (relative) and of HU; the SD of the texture in MR (relative) and in HU.
TISSUES = {
    AIR: (0.00, 0.00, -1000, 0.00, 0, 0.00, 0),
    SKIN: (0.35, 0.35, 0, 0.05, 5, 0.00, 5),
    FAT: (0.85, 0.82, -100, 0.03, 4, 0.04, 6),
    MUSCLE: (0.22, 0.28, 55, 0.10, 4, 0.15, 5),
    CORTICAL: (0.04, 0.05, 1050, 0.10, 50, 0.00, 40),
    MARROW: (0.66, 0.76, 220, 0.08, 40, 0.10, 25),
    CARTILAGE: (0.42, 0.36, 90, 0.10, 10, 0.05, 5),
    URINE: (1.15, 0.92, 8, 0.08, 4, 0.02, 0),
    PROSTATE: (0.46, 0.42, 42, 0.08, 2, 0.20, 2),
    PERIPHERAL_ZONE: (0.82, 0.54, 40, 0.08, 2, 0.12, 2),
    GLAND: (0.95, 0.66, 38, 0.08, 2, 0.15, 2),
    WALL: (0.28, 0.33, 42, 0.08, 2, 0.05, 2),
    MUCOSA: (0.60, 0.44, 40, 0.08, 2, 0.05, 2),
    STOOL: (0.44, 0.42, 35, 0.25, 15, 0.20, 40),
    GAS: (0.03, 0.05, -900, 0.00, 20, 0.00, 0),
    ARTERY: (0.12, 0.06, 48, 0.10, 3, 0.00, 2),
    VEIN: (0.70, 0.62, 45, 0.10, 3, 0.10, 2),
    TENDON: (0.05, 0.05, 90, 0.00, 10, 0.00, 5),
    CALCIFICATION: (0.05, 0.05, 600, 0.00, 60, 0.00, 40),
}


@dataclass(frozen=True, eq=False)
class PhantomCase:
    """One synthetic patient, all arrays [Z, Y, X]: mr float32 in scanner units (> 0), ct float32 in HU, labels uint8
    (their values are those of `pelvis.LABELS`), mask bool."""

    mr: np.ndarray
    ct: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def phantom_grid(size: int = 96, slices: int = 24) -> Grid:
    """The grid of a case of size x size voxels in a slice: RAS+, with the field of view around the world's origin."""
    z, y, x = (extent / count for extent, count in zip(FIELD_OF_VIEW_MM, (slices, size, size), strict=True))
    affine = np.diag([x, y, z, 1.0])
    affine[:3, 3] = [-x * (size - 1) / 2, -y * (size - 1) / 2, -z * (slices - 1) / 2]
    return Grid(affine.astype(np.float32).astype(np.float64), (size, size, slices))


def make_case(rng_seed: int | Sequence[int], size: int = 96, slices: int = 24, difficulty: float = 0.0) -> PhantomCase:
    """Makes one patient, as a function of the seed and the difficulty (0 to 1). Arrays are [slices, size, size], with
    axes towards Superior, Anterior, Right."""
    shape = (slices, size, size)
    of_anatomy, of_images, of_noise = np.random.default_rng(rng_seed).spawn(3)
    patient = _Patient(of_anatomy, of_images, difficulty)
    z, y, x = (
        ((np.arange(n * SAMPLES) + 0.5) / (n * SAMPLES) - 0.5) * extent
        for n, extent in zip(shape, FIELD_OF_VIEW_MM, strict=True)
    )
    mr, ct, body = np.empty(shape), np.empty(shape), np.empty(shape)
    labels = np.empty(shape, np.uint8)
    for index in range(slices):
        sections = [patient.section(height, y, x) for height in z[index * SAMPLES :][:SAMPLES]]
        samples = np.reshape(sections, (SAMPLES, -1, size, SAMPLES, size, SAMPLES))
        mixed = np.einsum("zkyaxb,z,a,b->kyx", samples, WEIGHTS, WEIGHTS, WEIGHTS, optimize=True)
        mr[index], ct[index], body[index] = mixed[:3]
        labels[index] = mixed[3:].argmax(axis=0)
    mr, ct = _with_noise(of_noise, mr, ct, difficulty)
    return PhantomCase(mr, ct, labels, body >= 0.5)


def write_phantom(
    out: Path | str,
    cases: int = 15,
    test: int = 5,
    size: int = 96,
    slices: int = 24,
    seed: int = 0,
    progress: bool = True,
    difficulty: float = 0.0,
) -> None:
    """Writes a cohort in the folder layout of `read_cohort`: OUT/phantom_000/{mr,ct,labels,mask}.nii.gz, .., and
    OUT/dataset.json with label names, split (the last `test` cases are the test split) and difficulty. If it fails or
    is stopped, nothing stays.

    Raises InputError for a folder that isn't empty, size < 24, slices < 4, more than MAX_VOXELS voxels, test not in
    0 .. cases - 1, seed < 0, difficulty not in 0 .. 1.
    """
    from tqdm import tqdm

    if size < 24 or slices < 4 or not 0 <= test < cases or seed < 0 or not 0 <= difficulty <= 1:
        raise InputError(
            f"phantom: size {size}, slices {slices}, cases {cases}, test {test}, seed {seed}, difficulty "
            f"{difficulty}: expected size >= 24, slices >= 4, 0 <= test < cases, seed >= 0, 0 <= difficulty <= 1"
        )
    if (voxels := size * size * slices) > MAX_VOXELS:
        raise InputError(
            f"phantom: size {size} and slices {slices} make {voxels} voxels, expected at most {MAX_VOXELS}"
        )
    out, grid = Path(out), phantom_grid(size, slices)
    names = [f"phantom_{index:03d}" for index in range(cases)]
    with new_folder(out):
        for index, name in enumerate(tqdm(names, desc="phantom", unit="case", disable=not progress)):
            case = make_case((seed, index), size, slices, difficulty)
            (out / name).mkdir()
            for kind, dtype in (("mr", np.float32), ("ct", np.int16), ("labels", np.uint8), ("mask", np.uint8)):
                write_volume(out / name / f"{kind}.nii.gz", getattr(case, kind), grid, dtype)
        split = {"train": names[: cases - test], "val": [], "test": names[cases - test :]}
        about = {"channel_names": {"0": "MR"}, "labels": LABELS, "file_ending": ".nii.gz", "split": split}
        write_json(out / "dataset.json", {**about, "difficulty": difficulty})


class _Patient:
    """The solids of a patient, and all that varies smoothly from place to place."""

    def __init__(self, of_anatomy: np.random.Generator, of_images: np.random.Generator, difficulty: float):
        self.difficulty = difficulty
        self.middle = (*of_anatomy.normal(0, 4, 2), of_anatomy.uniform(-16, -4))  # where the hips are in the field
        self.scale = of_anatomy.uniform((0.9, 0.9, 0.94), (1.0, 1.02, 1.04))
        self.bend = [_Field(of_anatomy, (80, 120, 120)) for _ in range(2)]
        self.bulge = [_Field(of_anatomy, (25, 28, 28)) for _ in range(2)]
        self.sheets = _Field(of_anatomy, (24, 18, 18))
        self.solids = pelvis(of_anatomy, difficulty)

        self.grain, self.coarseness = _Field(of_images, (5, 5, 5)), _Field(of_images, (24, 24, 24))
        self.coil, self.streaks = _Field(of_images, (100, 180, 180)), _Field(of_images, (5, 5, 70))
        columns = np.array([TISSUES[kind] for kind in sorted(TISSUES)]).T
        easy, hard, hu, mr_spread, hu_spread, self.mr_grain, self.hu_grain = columns
        self.mr = (easy + difficulty * (hard - easy)) * (1 + mr_spread * of_images.normal(size=len(hu)))
        self.hu = hu + hu_spread * of_images.normal(size=len(hu))

    def section(self, z: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Images the axial plane at height z: float32 [3 + labels, Y, X] with MR, CT, body (0 or 1), and a plane for
        each label (0 or 1). z, y, x: places in mm from the middle of the field of view."""
        from scipy import ndimage

        place, difficulty = (np.array([z]), y, x), self.difficulty
        bent, front = (
            (at - self.middle[axis] + (5 + 3 * difficulty) * self.bend[axis](*place) + 1.5 * self.bulge[axis](*place))
            / self.scale[axis]
            for axis, at in enumerate((x, y[:, None]))
        )
        height = float((z - self.middle[2]) / self.scale[2])
        tissue, label, depth = cut(self.solids, bent.astype(np.float32), front.astype(np.float32), height)
        sheet = self.sheets(*place)
        tissue[(tissue == MUSCLE) & (np.abs(sheet) < 0.03)] = FAT
        tissue[(tissue == MUSCLE) & (np.abs(sheet - 1) < 0.1 * difficulty)] = TENDON

        grain, coarseness = self.grain(*place), np.maximum(1 + 0.6 * self.coarseness(*place), 0)
        marrow = tissue == MARROW
        mr = self.mr[tissue] * (1 + self.mr_grain[tissue] * grain)
        ct = self.hu[tissue] + self.hu_grain[tissue] * grain
        mr *= 1 + difficulty * 0.2 * coarseness * grain * marrow
        dense = 200 * (coarseness - 1) - 40 * coarseness * grain + 200 * (np.exp(-depth / 6) - 0.3) + 150 * (label >= 4)
        ct += difficulty * np.where(marrow, dense, 0)
        ct += difficulty * np.where(tissue == CORTICAL, 200 * np.clip((np.abs(bent) - 80) / 60, -1, 1), 0)
        ct += 8 * np.exp(-((height / 25) ** 2)) * self.streaks(*place) * (tissue != AIR)
        mr *= np.exp((0.15 + 0.2 * difficulty) * np.tanh(self.coil(*place)))
        blur = [BLUR_MM / (at[1] - at[0]) for at in (y, x)]
        images = [ndimage.gaussian_filter(image, blur) for image in (mr, ct)]
        return np.array([*images, tissue != AIR, *(label == value for value in LABELS.values())], np.float32)


def _with_noise(
    rng: np.random.Generator, mr: np.ndarray, ct: np.ndarray, difficulty: float
) -> tuple[np.ndarray, np.ndarray]:
    """The MR in scanner units with Rician noise, and the CT with noise that is smooth in plane and strongest deep in
    the body."""
    from scipy import ndimage

    gain = SCANNER_UNITS * rng.uniform(0.8, 1.25)
    sd = 0.04 + 0.04 * difficulty
    mr = np.hypot(mr + sd * rng.normal(size=mr.shape), sd * rng.normal(size=mr.shape))
    y, x = (
        ((np.arange(n) + 0.5) / n - 0.5) * extent for n, extent in zip(ct.shape[1:], FIELD_OF_VIEW_MM[1:], strict=True)
    )
    deep = 1 + np.exp(-((y[:, None] / 70) ** 2) - (x / 110) ** 2)
    smooth = ndimage.gaussian_filter(rng.normal(size=ct.shape), (0, 2 / (y[1] - y[0]), 2 / (x[1] - x[0])))
    ct = ct + 9 * deep * smooth / smooth.std()
    return (gain * mr).astype(np.float32), np.maximum(ct, -1024).astype(np.float32)


class _Field:
    """A smooth random function of place with mean 0 and SD 1: cubic B-splines with a random coefficient every so many
    mm (`every`) along Z, Y, X."""

    def __init__(self, rng: np.random.Generator, every: tuple[float, float, float]):
        self.every = every
        self.coefficients = rng.normal(
            size=[int(extent / mm) + 4 for extent, mm in zip(FIELD_OF_VIEW_MM, every, strict=True)]
        )
        self.coefficients /= (151 / 315) ** 1.5  # a cubic B-spline's integral of squares, along three axes

    def __call__(self, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The values [Y, X] at one z ([1]) and the places y, x, in mm from the middle of the field of view."""
        (of_z,), of_y, of_x = (
            _splines((at + extent / 2) / mm + 1, count)
            for at, extent, mm, count in zip(
                (z, y, x), FIELD_OF_VIEW_MM, self.every, self.coefficients.shape, strict=True
            )
        )
        near = np.flatnonzero(of_z)
        return of_y @ np.tensordot(of_z[near], self.coefficients[near], 1) @ of_x.T


def _splines(at: np.ndarray, count: int) -> np.ndarray:
    """The values of the cubic B-splines around 0, 1 .. count - 1 at the places `at`: [places, count]."""
    distance = np.abs(at[:, None] - np.arange(count))
    near = (4 - 6 * distance**2 + 3 * distance**3) / 6
    return np.where(distance < 1, near, np.maximum(2 - distance, 0) ** 3 / 6)
