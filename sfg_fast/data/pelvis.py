"""The anatomy of the synthetic patient: solids in mm, which are drawn at random once and can be cut at any height.

The origin lies midway between the femoral heads; x points to the patient's right, front to anterior, z to superior. A
shape takes x and front (float32 arrays of an axial plane) and z (a number). It gives the distance of each place to its
surface in mm, approximately, which is negative inside; or None if the plane misses the shape. Most shapes are
symmetric: their x is the distance from the midline, and only the bending of the patient makes the sides differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LABELS = {"background": 0, "prostate": 1, "bladder": 2, "rectum": 3, "left_femoral_head": 4, "right_femoral_head": 5}
AIR, SKIN, FAT, MUSCLE, CORTICAL, MARROW, CARTILAGE, URINE, PROSTATE, PERIPHERAL_ZONE = range(10)
GLAND, WALL, MUCOSA, STOOL, GAS, ARTERY, VEIN, TENDON, CALCIFICATION = range(10, 19)
REACH = 5.0  # how far above and below its surface a shape is still measured, in mm

Shape = Callable[[np.ndarray, np.ndarray, float], np.ndarray | None]
Limit = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # a shape that every plane meets
Knot = Sequence[float]


@dataclass(frozen=True)
class Solid:
    """A shape and what it is made of.

    layers: from outside to inside, (tissue, edge): the tissue fills all that lies deeper than edge mm (a negative edge
    lies outside the shape). label: the labels of what is inside the shape, on the patient's left and right (0: it gets
    none). over: the tissues that the solid replaces (empty: all).
    """

    shape: Shape
    layers: tuple[tuple[int, float], ...] = ()
    label: tuple[int, int] = (0, 0)
    over: tuple[int, ...] = ()


def cut(solids: Sequence[Solid], x: np.ndarray, front: np.ndarray, z: float) -> tuple[np.ndarray, ...]:
    """Cuts all solids by an axial plane: tissue (uint8), label (uint8), and depth below the surface of the solid
    (float32, mm), each of the shape of x. Later solids replace earlier ones, and lie within the first."""
    tissue, label = np.zeros(x.shape, np.uint8), np.zeros(x.shape, np.uint8)
    depth = np.zeros(x.shape, np.float32)
    _draw(solids[0], x, front, z, tissue, label, depth)
    rows, columns = (np.flatnonzero(tissue.any(axis=axis)) for axis in (1, 0))
    if rows.size:
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        for solid in solids[1:]:
            _draw(solid, x[box], front[box], z, tissue[box], label[box], depth[box])
    return tissue, label, depth


def _draw(
    solid: Solid, x: np.ndarray, front: np.ndarray, z: float, tissue: np.ndarray, label: np.ndarray, depth: np.ndarray
) -> None:
    distance = solid.shape(x, front, z)
    if distance is None:
        return
    if solid.over:
        replaced = np.zeros(CALCIFICATION + 1, bool)
        replaced[list(solid.over)] = True
        distance = np.where(replaced[tissue], distance, np.float32(np.inf))
    for kind, edge in solid.layers:
        tissue[distance < -edge] = kind
    inside = distance < 0
    if solid.layers:
        depth[inside] = -distance[inside]
    if any(solid.label):
        label[inside] = np.where(x[inside] < 0, *solid.label)


# --- shapes -----------------------------------------------------------------------------------------------------------


def ellipsoid(centre: Knot, radii: Knot) -> Shape:
    """An ellipsoid; its centre and its radii in mm along x, front, z."""

    def shape(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        w = (z - centre[2]) / radii[2]
        if abs(w) > 1 + REACH / radii[2]:
            return None
        u, v = (x - centre[0]) / radii[0], (front - centre[1]) / radii[1]
        tiny = 1e-6  # keeps the centre from 0 / 0: it lies as deep as the shortest radius
        radius = np.sqrt(u**2 + v**2 + w**2 + tiny)
        slope = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2 + tiny / min(radii) ** 2)
        return radius * (radius - 1) / slope

    return shape


def tube(*knots: Knot) -> Shape:
    """A tube along a line in space from knot to knot; a knot is x, front, z, radius in mm."""

    def shape(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        nearest = None
        for (x0, front0, z0, r0), (x1, front1, z1, r1) in itertools.pairwise(knots):
            reach = max(r0, r1) + REACH
            if not min(z0, z1) - reach < z < max(z0, z1) + reach:
                continue
            dx, df, dz = x1 - x0, front1 - front0, z1 - z0
            length2 = max(dx * dx + df * df + dz * dz, 1e-6)
            u, v, w = x - x0, front - front0, z - z0
            along = np.clip((u * (dx / length2) + v * (df / length2) + w * dz / length2), 0, 1)
            distance = np.sqrt((u - along * dx) ** 2 + (v - along * df) ** 2 + (w - along * dz) ** 2)
            distance -= r0 + along * (r1 - r0)
            nearest = distance if nearest is None else np.minimum(nearest, distance)
        return nearest

    return shape


def strap(planes: Mapping[int, Sequence[Knot]]) -> Shape:
    """A shape that is, in each axial plane, a tube from knot to knot; the knots move with height.

    planes: {z: knots}, with z rising and as many knots in each plane; a knot is x, front, radius in mm. Between two
    planes the knots are interpolated.
    """
    heights, table = list(planes), np.array(list(planes.values()), float)

    def shape(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        if not heights[0] <= z <= heights[-1]:
            return None
        above = min(max(int(np.searchsorted(heights, z)), 1), len(heights) - 1)
        share = (z - heights[above - 1]) / (heights[above] - heights[above - 1])
        knots = table[above - 1] + share * (table[above] - table[above - 1])
        return tube(*((x, front, z, radius) for x, front, radius in knots.tolist()))(x, front, z)

    return shape


def both_sides(shape: Shape) -> Shape:
    """A shape of the patient's right, where x is positive, and its mirror image on the left."""
    return lambda x, front, z: shape(np.abs(x), front, z)


def union(*shapes: Shape, blend: float = 4.0) -> Shape:
    """All shapes as one; blend: the mm over which they flow into each other."""

    def shape(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        found = [one for one in (part(x, front, z) for part in shapes) if one is not None]
        if not found:
            return None
        nearest = found[0]
        for one in found[1:]:
            closeness = np.maximum(blend - np.abs(nearest - one), 0)
            nearest = np.minimum(nearest, one) - closeness**2 / (4 * blend)
        return nearest

    return shape


def apart(*shapes: Shape, gap: float, more: float) -> Shape:
    """Shapes that grow by `more` mm, but keep a gap of `gap` mm where two of them meet."""

    def shape(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        found = [one for one in (part(x, front, z) for part in shapes) if one is not None]
        if not found:
            return None
        nearest, second = found[0], np.full_like(found[0], np.inf)
        for one in found[1:]:
            second = np.minimum(second, np.maximum(nearest, one))
            nearest = np.minimum(nearest, one)
        return np.maximum(nearest - more, (gap - (second - nearest)) / 2)

    return shape


def within(shape: Shape, limit: Limit) -> Shape:
    """The part of a shape that also lies inside a limit."""

    def limited(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        distance = shape(x, front, z)
        return None if distance is None else np.maximum(distance, limit(x, front, z))

    return limited


# --- the patient ------------------------------------------------------------------------------------------------------


def pelvis(rng: np.random.Generator, difficulty: float) -> list[Solid]:
    """A patient's solids, in the order in which `cut` needs them: from the skin to the organs. difficulty: 0 to 1."""

    def draw(low: float, high: float) -> float:
        """A number from the interval, which is 40 % wider at difficulty 1."""
        margin = 0.2 * difficulty * (high - low)
        return float(rng.uniform(low - margin, high + margin))

    solids = [solid for part in (_trunk, _muscles, _bones, _organs) for solid in part(draw)]
    return solids + _scattered(rng, difficulty)


def _trunk(draw: Callable[[float, float], float]) -> list[Solid]:
    fat, skin = draw(-6, 8), draw(2, 3)
    outline = strap(
        {
            -90: [(95, -20, 82), (75, -20, 90)],
            -55: [(88, -20, 90), (40, -18, 92)],
            -20: [(80, -18, 98), (0, -14, 104)],
            30: [(72, -12, 104), (0, -6, 114)],
            95: [(58, -2, 116), (0, 2, 124)],
        }
    )
    cleft = strap({-90: [(0, -160, 9), (0, -62, 1)], 0: [(0, -160, 6), (0, -108, 0)], 35: [(0, -160, 2), (0, -128, 0)]})

    def body(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray | None:
        surface, between = outline(x, front, z), cleft(x, front, z)
        if surface is None or between is None:
            return None if surface is None else surface - fat
        return np.maximum(surface - fat, -between)

    return [Solid(both_sides(body), ((SKIN, 0), (FAT, skin)))]


def _muscles(draw: Callable[[float, float], float]) -> list[Solid]:
    """Groups of muscles; planes of fat keep the muscles of a group apart."""
    bulk, gap = draw(2.5, 5.5), draw(1.5, 3)
    return [
        Solid(both_sides(apart(*map(strap, group.values()), gap=gap, more=more)), ((MUSCLE, 0),), over=(FAT,))
        for group, more in ((HIP_AND_THIGH, bulk), (ABDOMINAL_WALL, bulk / 2), (PELVIC_FLOOR, 0.0))
    ]


HIP_AND_THIGH: dict[str, dict[int, list[Knot]]] = {
    "gluteus maximus": {
        -90: [(96, -82, 3), (116, -80, 5), (142, -56, 4)],
        -62: [(66, -78, 9), (105, -76, 11), (144, -46, 9)],
        -35: [(34, -84, 10), (80, -80, 16), (142, -48, 13)],
        0: [(24, -88, 10), (85, -78, 15), (150, -42, 11)],
        40: [(34, -98, 9), (85, -84, 15), (140, -44, 11)],
        75: [(48, -98, 7), (80, -90, 12), (122, -62, 7)],
        95: [(60, -96, 4), (80, -90, 6), (110, -72, 3)],
    },
    "gluteus medius": {
        -22: [(152, 8, 4), (150, -10, 5), (142, -34, 4)],
        0: [(148, 24, 13), (146, -6, 13), (132, -34, 9)],
        40: [(136, 40, 12), (140, 4, 19), (118, -42, 13)],
        95: [(146, 42, 9), (146, 0, 14), (110, -58, 14)],
    },
    "gluteus minimus": {
        -10: [(126, 28, 5), (124, 6, 4)],
        8: [(118, 30, 9), (116, -14, 8)],
        40: [(116, 28, 8), (102, -24, 9)],
        70: [(122, 20, 4), (104, -30, 4)],
    },
    "tensor fasciae latae": {
        -90: [(142, 40, 12), (152, 20, 10)],
        -10: [(140, 60, 12), (156, 42, 8)],
        40: [(134, 66, 8), (142, 56, 4)],
    },
    "iliopsoas": {
        -70: [(106, 2, 7), (104, -2, 6)],
        -40: [(104, 24, 12), (98, 20, 10)],
        0: [(98, 45, 15), (84, 42, 13)],
        30: [(100, 54, 9), (72, 36, 15)],
        60: [(74, 26, 16), (62, 16, 17)],
        95: [(56, 8, 19), (50, -2, 20)],
    },
    "iliacus": {
        12: [(104, 54, 6), (92, 46, 6), (86, 40, 5)],
        36: [(100, 46, 9), (86, 28, 10), (72, 2, 5)],
        64: [(104, 44, 8), (90, 10, 13), (74, -18, 8)],
        95: [(118, 36, 8), (104, 4, 13), (84, -24, 9)],
    },
    "sartorius": {-90: [(86, 72, 10), (94, 70, 9)], 0: [(114, 74, 9), (122, 68, 7)], 45: [(120, 72, 6), (122, 70, 5)]},
    "rectus femoris": {
        -90: [(112, 56, 15), (122, 48, 12)],
        0: [(116, 50, 9), (112, 44, 8)],
        25: [(110, 44, 4), (108, 42, 3)],
    },
    "vasti": {-90: [(152, -22, 15), (146, 18, 16), (112, 26, 12)], -30: [(156, -6, 5), (142, 20, 8), (120, 26, 6)]},
    "pectineus": {-58: [(58, 40, 7), (90, 20, 6)], -35: [(48, 44, 9), (82, 30, 10)], -10: [(40, 44, 4), (60, 38, 6)]},
    "adductor longus": {
        -90: [(40, 46, 18), (62, 40, 18)],
        -48: [(30, 46, 8), (46, 42, 9)],
        -38: [(22, 46, 2), (30, 44, 3)],
    },
    "adductor brevis": {-90: [(38, 10, 19), (72, 12, 18)], -50: [(36, 12, 9), (64, 14, 10)]},
    "adductor magnus": {-90: [(42, -26, 20), (88, -28, 20)], -62: [(48, -16, 10), (80, -18, 9)]},
    "hamstrings": {-90: [(62, -62, 16), (100, -58, 17)], -50: [(70, -58, 5), (74, -58, 4)]},
    "quadratus femoris": {-58: [(72, -42, 8), (112, -40, 9)], -26: [(74, -44, 7), (116, -44, 7)]},
    "obturator externus": {-55: [(38, 6, 8), (84, -10, 7)], -24: [(46, 16, 6), (90, -18, 6)]},
    "gemelli": {-16: [(62, -54, 5), (118, -38, 6)], 14: [(60, -56, 6), (112, -34, 5)]},
    "piriformis": {
        12: [(50, -70, 5), (104, -46, 7)],
        30: [(36, -80, 8), (96, -54, 9)],
        56: [(40, -76, 7), (62, -66, 5)],
    },
}
ABDOMINAL_WALL: dict[str, dict[int, list[Knot]]] = {
    "rectus": {-18: [(14, 64, 4), (22, 64, 3)], 0: [(14, 74, 6), (34, 72, 5)], 95: [(18, 106, 7), (52, 98, 6)]},
    "obliques": {
        28: [(62, 86, 5), (100, 82, 4), (122, 70, 3)],
        60: [(66, 92, 6), (114, 76, 7), (132, 58, 4)],
        95: [(64, 98, 7), (122, 72, 9), (150, 30, 8)],
    },
}
PELVIC_FLOOR: dict[str, dict[int, list[Knot]]] = {
    "obturator internus": {
        -52: [(36, 0, 3), (46, -24, 5), (48, -40, 4)],
        -25: [(38, 16, 8), (41, -14, 10), (46, -46, 8)],
        24: [(47, 22, 4), (47, -10, 7), (52, -40, 6)],
    },
    "levator ani": {
        -50: [(8, -30, 2), (12, -40, 3), (4, -54, 3)],
        -30: [(22, 4, 2), (26, -28, 3), (6, -58, 3)],
        -4: [(36, 10, 1), (36, -36, 2), (8, -76, 2)],
    },
}


def _bones(draw: Callable[[float, float], float]) -> list[Solid]:
    cortex, radius = draw(2.6, 3.8), draw(22, 26)
    head = (draw(80, 86), 0.0, 0.0)
    sacrum = strap(
        {
            -16: [(0, -82, 3), (3, -82, 2), (4, -82, 2)],
            8: [(0, -88, 5), (8, -87, 4), (14, -86, 3)],
            30: [(0, -91, 7), (22, -90, 7), (34, -86, 5)],
            44: [(0, -86, 9), (24, -86, 8), (38, -82, 7)],
            60: [(0, -70, 14), (26, -74, 12), (42, -72, 9)],
            78: [(0, -46, 20), (30, -58, 15), (46, -60, 10)],
            95: [(0, -28, 24), (34, -44, 13), (48, -52, 8)],
        }
    )
    arch = strap({44: [(0, -98, 3), (16, -94, 3)], 62: [(0, -102, 4), (24, -92, 5)], 95: [(0, -104, 5), (26, -84, 5)]})
    canal = strap({48: [(0, -96, 2), (3, -96, 2)], 66: [(0, -88, 4), (10, -88, 4)], 95: [(0, -68, 7), (8, -68, 6)]})
    foramina = tube((18, -80, 46, 3), (17, -76, 48, 3)), tube((20, -72, 66, 4), (19, -62, 70, 4))

    ilium = strap(
        {
            12: [(92, 24, 5), (84, 6, 6), (74, -20, 10), (66, -34, 9)],
            22: [(92, 34, 8), (84, 8, 15), (76, -14, 15), (68, -32, 10)],
            32: [(96, 38, 8), (87, 12, 11), (76, -14, 12), (68, -30, 11)],
            44: [(106, 42, 6), (95, 10, 9), (76, -24, 11), (68, -42, 10)],
            58: [(110, 56, 5), (100, 8, 7), (78, -30, 9), (52, -72, 9)],
            76: [(116, 58, 5), (108, -4, 6), (80, -40, 7), (54, -86, 9)],
            95: [(130, 40, 6), (118, 0, 5), (82, -44, 6), (52, -90, 10)],
        }
    )
    front_column = tube((84, 24, 16, 11), (60, 24, 4, 9), (50, 28, -12, 8), (30, 42, -22, 7), (15, 44, -28, 10))
    pubis = strap({-50: [(10, 34, 4), (16, 22, 5)], -36: [(12, 44, 8), (18, 24, 8)], -16: [(13, 46, 6), (18, 40, 6)]})
    back_column = tube((72, -26, 14, 13), (60, -40, 0, 11), (58, -40, -22, 12), (58, -44, -42, 13), (54, -42, -60, 10))
    lower_ramus = tube((54, -40, -60, 8), (34, -6, -58, 6), (16, 24, -46, 6))
    plate = strap({-26: [(53, 20, 3), (54, -40, 4)], 16: [(54, 26, 4), (57, -36, 4)]})
    ball = ellipsoid(head, (radius + 9,) * 3)

    def medial(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray:
        """The plane of the cup's rim: the cup opens to the side, downwards and to the front."""
        return 0.9 * (x - head[0]) + 0.3 * front - 0.3 * z - 5

    hip = union(ilium, front_column, pubis, back_column, lower_ramus, plate, within(ball, medial))

    neck = tube((*head, 16), (110, -10, -8, 14), (134, -20, -20, 13))
    trochanter = ellipsoid((140, -22, -16), (13, 19, 22))
    shaft = tube((132, -18, -28, 15), (127, -8, -50, 17), (122, -4, -100, 15))
    lesser = tube((112, -12, -50, 8), (104, -16, -60, 6))
    sphere = ellipsoid(head, (radius,) * 3)
    femur = union(sphere, neck, trochanter, shaft, lesser)

    bone = ((CORTICAL, 0), (MARROW, cortex))
    thin = ((CORTICAL, 0), (MARROW, 0.7 * cortex))
    cuff = strap({-52: [(0, 20, 2), (0, 36, 2)], -34: [(0, 22, 4), (0, 48, 4)], -16: [(0, 36, 3), (0, 48, 3)]})
    return [
        Solid(both_sides(union(sacrum, arch)), thin),
        Solid(both_sides(canal), ((FAT, 0), (VEIN, 1.5))),
        Solid(both_sides(union(*foramina)), ((FAT, 0),)),
        Solid(both_sides(ilium), ((CARTILAGE, -2),), over=(CORTICAL, MARROW)),
        Solid(both_sides(hip), thin),
        Solid(both_sides(cuff), ((CARTILAGE, 0),)),
        Solid(both_sides(sphere), ((CARTILAGE, -3),)),
        Solid(both_sides(femur), bone),
        Solid(both_sides(sphere), label=(LABELS["left_femoral_head"], LABELS["right_femoral_head"])),
    ]


def _organs(draw: Callable[[float, float], float]) -> list[Solid]:
    # The vessels are the external iliac and femoral ones, artery beside vein, and then those of the pelvic wall.
    artery = tube((56, 36, 95, 5), (52, 46, 40, 5), (62, 62, 5, 5), (68, 66, -30, 5), (76, 58, -95, 5))
    vein = tube((46, 24, 95, 7), (46, 34, 40, 7), (52, 56, 5, 6), (57, 60, -30, 6), (66, 50, -95, 6))
    inner = tube((36, -20, 70, 3), (42, -28, 40, 3), (36, -30, 10, 3), (30, -10, -10, 2))
    cord = tube((46, 76, 10, 3), (32, 72, -20, 4), (24, 66, -60, 6), (20, 62, -95, 8))
    bulb = tube((0, 30, -95, 13), (0, 10, -72, 12), (0, -6, -56, 8))
    crus = tube((12, 34, -90, 9), (24, 12, -72, 8), (40, -20, -58, 5))

    # The rectum follows the sacrum, from the anus to the sigmoid.
    sway, wide = draw(-8, 8), draw(0.8, 1.25)
    course = [
        (0, -44, -80, 9),
        (0, -42, -55, 10),
        (0, -36, -38, 13 * wide),
        (0, -40, -20, 16 * wide),
        (sway, -56, 6, 18 * wide),
        (-sway, -62, 30, 16 * wide),
        (sway, -50, 52, 15 * wide),
    ]
    rectum = tube(*course)
    sigmoid = tube(course[-1], (-20, -34, 66, 14), (-44, 0, 72, 14), (-60, 12, 98, 14))
    level, gas_top = draw(-4, 9), draw(-40, 70)

    prostate_size = draw(0.92, 1.2)
    gland = (0, draw(8, 14), -24)
    prostate = ellipsoid(gland, (25 * prostate_size, 18 * prostate_size, 23 * prostate_size))
    inner_gland = ellipsoid((0, gland[1] + 5, -20), (18 * prostate_size, 13 * prostate_size, 18 * prostate_size))
    urethra = tube((0, gland[1] + 4, -4, 2), (0, gland[1], -24, 2.5), (0, gland[1] - 3, -46, 2))
    base = -24 + 20 * prostate_size
    seminal = tube((5, gland[1] - 15, base - 2, 4), (18, gland[1] - 22, base + 6, 6), (32, gland[1] - 24, base + 12, 5))

    filling = draw(0, 1)
    height = 18 + 14 * filling
    bladder = union(
        ellipsoid((0, 30, base + height - 5), (30 + 14 * filling, 26 + 10 * filling, height)),
        ellipsoid((0, 26, base + 8), (26 + 12 * filling, 22 + 8 * filling, 13)),
        blend=10,
    )
    bladder_wall = draw(2.5, 5)

    def above_the_stool(x: np.ndarray, front: np.ndarray, z: float) -> np.ndarray:
        axis = np.interp(z, [knot[2] for knot in course], [knot[1] for knot in course])
        return axis + level - front if z < gas_top else np.ones_like(x)

    tubes = ((WALL, 0), (MUCOSA, 2.5), (STOOL, 5.5))
    return [
        Solid(both_sides(vein), ((VEIN, 0),), over=(FAT, MUSCLE)),
        Solid(both_sides(artery), ((ARTERY, 0),), over=(FAT, MUSCLE, VEIN)),
        Solid(both_sides(inner), ((VEIN, 0),), over=(FAT,)),
        Solid(both_sides(cord), ((WALL, 0), (FAT, 1.5), (VEIN, 4)), over=(FAT,)),
        Solid(union(bulb, both_sides(crus)), ((WALL, 0), (GLAND, 1.5))),
        Solid(sigmoid, tubes),
        Solid(both_sides(seminal), ((WALL, 0), (GLAND, 1)), over=(FAT,)),
        Solid(bladder, ((WALL, 0), (URINE, bladder_wall)), (LABELS["bladder"],) * 2),
        Solid(rectum, tubes, (LABELS["rectum"],) * 2),
        Solid(within(rectum, above_the_stool), ((GAS, 0),), over=(STOOL,)),
        Solid(prostate, ((WALL, 0), (PERIPHERAL_ZONE, 1.2)), (LABELS["prostate"],) * 2),
        Solid(inner_gland, ((PROSTATE, 0),), over=(PERIPHERAL_ZONE,)),
        Solid(urethra, ((GLAND, 0),), over=(PROSTATE, PERIPHERAL_ZONE)),
    ]


def _scattered(rng: np.random.Generator, difficulty: float) -> list[Solid]:
    """The solids of small vessels and loops of bowel. What only a difficult patient has is drawn last, so that the rest
    stays the same."""

    def in_front_of(level: float) -> Limit:
        return lambda x, front, z: level - front

    solids = []
    for index in range(24):
        start, way = rng.uniform((-45, -60, -50), (45, 60, 90)), rng.normal(0, 14, 3)
        vessel = tube((*(start - way), rng.uniform(1, 2.5)), (*(start + way), rng.uniform(1, 2.5)))
        solids.append(Solid(vessel, (((ARTERY, VEIN)[index % 2], 0),), over=(FAT,)))
    for _ in range(12):
        x, front, z = rng.uniform((-60, -10, 40), (60, 54, 90))
        turn, size, level = rng.uniform(0, 2 * np.pi), rng.uniform(9, 15), rng.uniform(0.3, 1.5) - 0.8 * difficulty
        dx, df = 24 * np.cos(turn), 24 * np.sin(turn)
        loop = tube((x - dx, front - df, z - 6, size), (x, front, z + 5, size), (x + dx, front + df, z, size))
        solids.append(Solid(loop, ((WALL, 0), (MUCOSA, 1.5), (STOOL, 3)), over=(FAT,)))
        gas = within(loop, in_front_of(front + level * size))
        solids.append(Solid(gas, ((GAS, 2),), over=(STOOL,)))
    if difficulty > 0:
        plexus = ellipsoid((0, 10, -22), (38, 30, 26))
        solids.append(Solid(plexus, ((VEIN, 8 * (1 - difficulty)),), over=(FAT,)))
        for index in range(round(8 * difficulty)):  # stones in veins beside the organs, left and right in turn
            where = rng.uniform((34, -50, -50), (60, 30, 40)) * ((-1) ** index, 1, 1)
            stone = ellipsoid(tuple(where), (rng.uniform(3, 6),) * 3)
            solids.append(Solid(stone, ((CALCIFICATION, 0),), over=(FAT, MUSCLE)))
        for _ in range(round(3 * difficulty)):
            where = rng.normal((0, 12, -24), (8, 6, 9))
            stone = ellipsoid(tuple(where), (rng.uniform(2.5, 5),) * 3)
            solids.append(Solid(stone, ((CALCIFICATION, 0),), over=(PROSTATE, PERIPHERAL_ZONE)))
    return solids
