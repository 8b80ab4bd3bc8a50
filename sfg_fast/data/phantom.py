"""A synthetic pelvis cohort: MR, CT, labels and body mask as NIfTI, for the demo and the tests.

Each case is drawn tissue by tissue from simple solids in mm, with a shape, position, smooth deformation, tissue
contrast, bias field and noise of its own. Cortical bone and rectal gas are both dark in the MR but about 1900 HU
apart in the CT, so that a synthetic CT needs context, not only intensity. The anatomy depends on the seed alone and
is sampled on whatever grid is asked for.

The difficulty, 0 to 1, takes away what makes the job easy: anatomy varies more; organs, muscle and stool come closer
together in the MR, marrow becomes as bright as fat; bias field and noise grow; and there is more that only place and
shape tell apart: tendons, calcifications and gas in the bowel, all dark in the MR, and marrow of two densities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import new_folder, write_json
from .stored import MAX_VOXELS
from .volumes import Grid, write_volume

FIELD_OF_VIEW_MM = (144.0, 400.0, 400.0)  # along Z, Y, X
LABELS = {"background": 0, "prostate": 1, "bladder": 2, "rectum": 3, "left_femoral_head": 4, "right_femoral_head": 5}
SCANNER_UNITS = 1000.0  # MR intensity of the brightest tissue, about
AIR, FAT, MUSCLE, CORTICAL, MARROW, URINE, PROSTATE, PERIPHERAL_ZONE, WALL, STOOL, GAS = range(11)
DENSE_MARROW, TENDON, CALCIFICATION = range(11, 14)  # of a difficult phantom only


@dataclass(frozen=True, eq=False)
class PhantomCase:
    """mr float32 in scanner units (> 0), ct float32 HU, labels uint8 (see LABELS), mask bool; all [Z, Y, X]."""

    mr: np.ndarray
    ct: np.ndarray
    labels: np.ndarray
    mask: np.ndarray


def phantom_grid(size: int = 48, slices: int = 16) -> Grid:
    """The grid of a case: RAS+, the field of view centred on the world's origin."""
    z, y, x = (extent / count for extent, count in zip(FIELD_OF_VIEW_MM, (slices, size, size), strict=True))
    affine = np.diag([x, y, z, 1.0])
    affine[:3, 3] = [-x * (size - 1) / 2, -y * (size - 1) / 2, -z * (slices - 1) / 2]
    return Grid(affine.astype(np.float32).astype(np.float64), (size, size, slices))


def make_case(rng_seed: int | Sequence[int], size: int = 48, slices: int = 16, difficulty: float = 0.0) -> PhantomCase:
    """One patient, a function of the seed and the difficulty (0 to 1); arrays [slices, size, size], axes towards
    Superior, Anterior, Right."""
    rng = np.random.default_rng(rng_seed)
    shape = (slices, size, size)
    tissue, labels = _anatomy(rng, shape, difficulty)
    mr, ct = _images(rng, tissue, difficulty)
    return PhantomCase(mr, ct, labels, tissue != AIR)


def write_phantom(
    out: Path | str,
    cases: int = 15,
    test: int = 5,
    size: int = 48,
    slices: int = 16,
    seed: int = 0,
    progress: bool = True,
    difficulty: float = 0.0,
) -> None:
    """Writes a cohort in the folder layout of `read_cohort`: OUT/phantom_000/{mr,ct,labels,mask}.nii.gz, .., and
    OUT/dataset.json with label names, split (the last `test` cases are the test split) and difficulty. All of it or
    nothing.

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


def _anatomy(rng: np.random.Generator, shape: tuple[int, int, int], difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    """Tissue index and label of every voxel."""

    def draw(low: float, high: float, size: int | None = None) -> Any:
        """From an interval that is 40 % wider at difficulty 1."""
        margin = 0.2 * difficulty * (high - low)
        return rng.uniform(low - margin, high + margin, size)

    bend = 7.5 + 4.5 * difficulty  # SD of the smooth deformation in mm
    # x grows towards the patient's right, back towards posterior (against axis 1), z upwards from the lowest slice.
    z, y, x = np.meshgrid(
        *((np.arange(n) + 0.5) * extent / n for n, extent in zip(shape, FIELD_OF_VIEW_MM, strict=True)), indexing="ij"
    )
    size_of_patient = draw(0.92, 1.06)
    shift_x, shift_y = rng.normal(0, 5, 2)
    x = (x - FIELD_OF_VIEW_MM[2] / 2 - shift_x + bend * _smooth_field(rng, shape, (3, 3, 3))) / size_of_patient
    back = (FIELD_OF_VIEW_MM[1] / 2 - y - shift_y + bend * _smooth_field(rng, shape, (3, 3, 3))) / size_of_patient

    def ellipse(at_x: float, at_back: float, radius_x: float, radius_back: float) -> np.ndarray:
        return ((x - at_x) / radius_x) ** 2 + ((back - at_back) / radius_back) ** 2

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        return ellipse(*centre[:2], *radii[:2]) + ((z - centre[2]) / radii[2]) ** 2 < 1

    tissue = np.full(shape, AIR, np.uint8)
    labels = np.zeros(shape, np.uint8)

    half_width, half_depth, skin_fat = draw(150, 168), draw(118, 136), draw(15, 35)
    inside = ellipse(0, 0, half_width - skin_fat, half_depth - skin_fat * draw(0.8, 1.2)) < 1
    tissue[ellipse(0, 0, half_width, half_depth) < 1] = FAT
    tissue[inside] = MUSCLE
    pelvic_fat = ellipsoid((0, draw(-10, 10), 76), (draw(55, 75), draw(65, 85), 270))
    fat_planes = _smooth_field(rng, shape, (8, 20, 20)) > 1.9
    tissue[inside & (pelvic_fat | fat_planes)] = FAT

    # Bones, from the hips outwards; cortical shells around marrow. side: -1 the patient's left, +1 the right.
    hip_x, hip_back, hip_z, cortex = draw(90, 105), draw(-10, 10), draw(58, 85), draw(5, 9)
    for side, name in ((-1, "left_femoral_head"), (1, "right_femoral_head")):
        radius, head_back = draw(26, 33), hip_back + rng.normal(0, 3.5)
        from_axis = np.sqrt(ellipse(side * hip_x, head_back, 1, 1))
        cup = (np.abs(from_axis - radius - 13) < draw(5.5, 9.5)) & (side * x - hip_x < 10) & (np.abs(z - hip_z) < 45)
        tissue[cup] = CORTICAL

        above_hip = z > hip_z + 31
        wing = ((0.8 * (side * x - draw(70, 90)) + 0.45 * (back + 10)) / draw(10, 17.5)) ** 2
        wing_shell = above_hip & (wing + ((back + 5) / draw(45, 60)) ** 2 < 1)
        wing_core = ((0.8 * (side * x - 80) + 0.45 * (back + 10)) / 8) ** 2 + ((back + 5) / 40) ** 2 < 1
        _bone(tissue, wing_shell, wing_core)

        ischium_x, ischium_back = side * (hip_x - 15), head_back + 45
        ischium = (ellipse(ischium_x, ischium_back, 18, 22) < 1) & (z < hip_z + 9)
        _bone(tissue, ischium, ellipse(ischium_x, ischium_back, 11.5, 15.5) < 1)

        from_centre = np.sqrt(from_axis**2 + (z - hip_z) ** 2)
        _bone(tissue, from_centre < radius, from_centre < radius - cortex)
        labels[from_centre < radius] = LABELS[name]

    sacrum = ellipse(0, draw(85, 95), draw(30, 42), draw(13, 18))
    _bone(tissue, (sacrum < 1) & (z > 50), sacrum < 0.45)
    pubis_back, pubis_width, pubis_depth = draw(-75, -65), draw(16, 20), draw(11, 15)
    for side in (-1, 1):
        pubis = ellipse(side * 21, pubis_back, pubis_width, pubis_depth)
        _bone(tissue, (pubis < 1) & (z < hip_z - 9), pubis < 0.4)

    bladder_radius = draw(27, 47)
    bladder = ellipsoid(
        (rng.normal(0, 5), draw(-30, -15), draw(90, 108)),
        (bladder_radius, bladder_radius * draw(0.7, 0.95), draw(29, 43)),
    )
    prostate = ellipsoid((rng.normal(0, 2.5), draw(-5, 7.5), draw(45, 58)), (draw(22, 31), draw(18, 24), draw(27, 36)))
    for organ, filling, name in ((bladder, URINE, "bladder"), (prostate, PROSTATE, "prostate")):
        tissue[organ] = filling
        labels[organ] = LABELS[name]
    tissue[prostate & (back > 7.5)] = PERIPHERAL_ZONE

    rectum_back = draw(40, 55)
    rectum_x = rng.normal(0, 5) + 7.5 * np.sin(z / 45 + draw(0, 2 * np.pi))
    rectum_radius = draw(16, 23) * (1 + 0.2 * np.sin(z / 13 + draw(0, 2 * np.pi)))
    from_axis = np.sqrt((x - rectum_x) ** 2 + (back - rectum_back) ** 2)
    rectum, lumen = from_axis < rectum_radius, from_axis < rectum_radius - 5.5
    tissue[rectum] = WALL
    tissue[lumen] = STOOL
    labels[rectum] = LABELS["rectum"]
    gas_from, gas_to = np.sort(draw(0, FIELD_OF_VIEW_MM[0], 2))
    gas_rises_above = back < rectum_back + draw(-7.5, 12.5)  # the patient lies on the back
    tissue[lumen & (z >= gas_from) & (z <= gas_to + 18) & gas_rises_above] = GAS
    if difficulty > 0:
        # A generator of its own: whatever is drawn here changes nothing else.
        _ambiguous_tissue(rng.spawn(1)[0], tissue, labels, (x, back, z), difficulty)
    return tissue, labels


def _ambiguous_tissue(
    rng: np.random.Generator,
    tissue: np.ndarray,
    labels: np.ndarray,
    place: tuple[np.ndarray, np.ndarray, np.ndarray],
    difficulty: float,
) -> None:
    """Add what looks alike in the MR and differs in the CT; each kind has its places and its shape.

    place: of every voxel in mm, towards the patient's right, posterior and superior.
    """

    def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
        """Squared distance from the centre, in radii."""
        x, back, z = ((at - c) / radius for at, c in zip(place, centre, strict=True))
        return x**2 + back**2 + z**2

    heads = [LABELS["left_femoral_head"], LABELS["right_femoral_head"]]
    tissue[(tissue == MARROW) & np.isin(labels, heads)] = DENSE_MARROW

    sheets = np.abs(_smooth_field(rng, tissue.shape, (5, 12, 12))) < 0.12 * difficulty
    tissue[(tissue == MUSCLE) & sheets] = TENDON
    for _ in range(round(4 * difficulty)):  # loops of bowel above the bladder, gas on top of what they hold
        centre = (rng.uniform(-70, 70), rng.uniform(-75, -15), rng.uniform(100, 144))
        loop = ball(centre, rng.uniform(15, 24))
        free = np.isin(tissue, (FAT, MUSCLE, TENDON))
        tissue[free & (loop < 1)] = WALL
        tissue[free & (loop < 0.55)] = STOOL
        tissue[free & (loop < 0.55) & (place[1] < centre[1] + rng.uniform(-8, 8))] = GAS
    for index in range(round(6 * difficulty)):  # in veins beside the pelvic organs, left and right in turn
        centre = ((-1) ** index * rng.uniform(35, 65), rng.uniform(0, 55), rng.uniform(15, 100))
        tissue[np.isin(tissue, (FAT, MUSCLE)) & (ball(centre, rng.uniform(5, 9)) < 1)] = CALCIFICATION
    gland = np.isin(tissue, (PROSTATE, PERIPHERAL_ZONE))
    middle = [float(at[gland].mean()) for at in place]
    for _ in range(round(2 * difficulty)):
        centre = (middle[0] + rng.normal(0, 9), middle[1] + rng.normal(0, 7), middle[2] + rng.normal(0, 12))
        tissue[gland & (ball(centre, rng.uniform(5, 8)) < 1)] = CALCIFICATION


def _images(rng: np.random.Generator, tissue: np.ndarray, difficulty: float) -> tuple[np.ndarray, np.ndarray]:
    """MR and CT of the tissues. This is where intensities go from those of difficulty 0 to those of 1."""
    from scipy import ndimage

    def between(easy: float, hard: float) -> float:
        return easy + difficulty * (hard - easy)

    def about(value: float, spread: float = 0.08) -> float:
        return value * (1 + spread * rng.normal())

    intensity = {  # tissue: (MR in relative units, CT in HU)
        AIR: (0.0, -1000.0),
        FAT: (about(0.8), -100.0),
        MUSCLE: (about(between(0.28, 0.32)), 50.0),
        CORTICAL: (0.05, rng.uniform(850, 1100)),
        MARROW: (about(between(0.68, 0.8)), rng.uniform(200, 300)),
        URINE: (about(between(1.05, 0.85)), rng.uniform(0, 15)),
        PROSTATE: (about(between(0.5, 0.42)), 40.0),
        PERIPHERAL_ZONE: (about(between(0.75, 0.5)), 38.0),
        WALL: (about(between(0.35, 0.37)), 40.0),
        STOOL: (about(between(0.45, 0.42), 0.3), rng.uniform(0, 60)),
        GAS: (between(0.03, 0.05), -900.0),
        TENDON: (0.05, 90.0),
        CALCIFICATION: (0.05, 600.0),
    }
    intensity[DENSE_MARROW] = (intensity[MARROW][0], between(intensity[MARROW][1], 480))
    table = np.array([intensity[index] for index in sorted(intensity)])
    partial_volume = (0, 0.6, 0.6)  # voxels
    mr, ct = (ndimage.gaussian_filter(table[tissue, column], partial_volume) for column in (0, 1))

    shape = tissue.shape
    texture, bias = between(0.1, 0.14), between(0.15, 0.35)  # SD, of the bias field's logarithm
    mr *= 1 + texture * _smooth_field(rng, shape, (16, 24, 24))
    mr *= np.exp(bias * _smooth_field(rng, shape, (2, 2, 2))) * rng.uniform(0.8, 1.25)  # receiver gain
    noise = between(0.05, 0.09)  # Rician, as a fraction of the brightest MR tissue
    mr = np.hypot(mr + noise * rng.normal(size=shape), noise * rng.normal(size=shape))
    ct += np.where(tissue == MARROW, 30 * _smooth_field(rng, shape, (16, 24, 24)), 0)
    ct += 15 * rng.normal(size=shape)
    return (SCANNER_UNITS * mr).astype(np.float32), np.maximum(ct, -1024).astype(np.float32)


def _bone(tissue: np.ndarray, shell: np.ndarray, core: np.ndarray) -> None:
    tissue[shell] = CORTICAL
    tissue[shell & core] = MARROW


def _smooth_field(rng: np.random.Generator, shape: tuple[int, ...], nodes: tuple[int, int, int]) -> np.ndarray:
    """A random field over the field of view, of mean 0 and SD 1: cubic interpolation between nodes [Z, Y, X]."""
    from scipy import ndimage

    zoom = [n / m for n, m in zip(shape, nodes, strict=True)]
    field = ndimage.zoom(rng.normal(size=nodes), zoom, order=3, mode="nearest")
    return (field - field.mean()) / field.std()
