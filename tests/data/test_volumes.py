"""NIfTI in and out. The oracle is plain numpy: volumes are permuted and flipped by hand, header bytes are patched."""

import gzip
import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sfg_fast.data import Grid, read_labels, read_volume, same_grid, write_volume
from sfg_fast.errors import InputError
from sfg_fast.files import new_folder, read_json, replacing

REAL = Path(__file__).parents[3] / "shared" / "data"
SPACING_XYZ = (1.5, 2.0, 4.0)
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))


def rotation(degrees: float) -> np.ndarray:
    """About an oblique axis, so that no entry of the affine is zero."""
    a, b = np.deg2rad([degrees, degrees / 2])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_z @ about_x


def stored_as(array_zyx, axes, flips, degrees=0.0):
    """The volume [Z, Y, X] as a file of another orientation: stored axis a runs along world axis axes[a]."""
    xyz = array_zyx.transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, 3] = (-7.0, 11.0, 3.0)
    for stored, world in enumerate(axes):
        step = np.zeros(3)
        step[world] = SPACING_XYZ[world]
        if flips[stored]:
            affine[:3, 3] += step * (xyz.shape[world] - 1)
            step = -step
        affine[:3, stored] = step
    affine[:3] = rotation(degrees) @ affine[:3]
    data = np.flip(xyz.transpose(axes), [axis for axis in range(3) if flips[axis]])
    return data, affine.astype(np.float32).astype(np.float64)


def patched(path: Path, **fields) -> Path:
    """Overwrites header fields of an uncompressed NIfTI-1 file by their byte offsets."""
    places = {"dim": (40, "8h"), "scl": (112, "2f"), "codes": (252, "2h"), "srow": (280, "12f"), "datatype": (70, "2h")}
    content = bytearray(path.read_bytes())
    for field, values in fields.items():
        offset, kind = places[field]
        struct.pack_into("<" + kind, content, offset, *values)
    path.write_bytes(content)
    return path


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 3000, (4, 3, 2)).astype(np.int16)


@pytest.mark.parametrize("degrees", [0.0, 25.0])
@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_every_orientation_reads_alike_and_goes_back_exactly(tmp_path, volume, axes, flips, degrees):
    data, affine = stored_as(volume, axes, flips, degrees)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "in.nii")
    array, grid = read_volume(tmp_path / "in.nii")
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, volume)
    np.testing.assert_allclose(grid.spacing, SPACING_XYZ[::-1], rtol=1e-6)
    assert grid.array_shape == volume.shape

    write_volume(tmp_path / "out.nii", array, grid, np.int16)
    back = nib.load(tmp_path / "out.nii")
    assert back.shape == data.shape
    np.testing.assert_array_equal(back.affine, affine)
    np.testing.assert_array_equal(np.asarray(back.dataobj), data)
    np.testing.assert_allclose(back.get_qform(), affine, atol=1e-4)


def test_canonical_affine_gives_the_place_of_each_voxel(tmp_path, volume):
    """Array index -> mm must be the stored index -> mm of the voxel with the same value."""
    data, affine = stored_as(np.arange(24).reshape(4, 3, 2).astype(np.int16), (2, 0, 1), (True, False, True), 20)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "in.nii")
    array, grid = read_volume(tmp_path / "in.nii")
    for z, y, x in np.ndindex(array.shape):
        (stored,) = np.argwhere(data == array[z, y, x])
        np.testing.assert_allclose(grid.canonical_affine @ (x, y, z, 1), affine @ (*stored, 1), atol=1e-9)


def test_axes_grow_towards_superior_anterior_right(tmp_path):
    """An LPS file: a voxel at its largest stored index is left, posterior, superior."""
    data = np.zeros((3, 4, 5), np.uint8)
    data[2, 3, 4] = 1
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1, 1, 1])), tmp_path / "lps.nii.gz")
    array, _ = read_labels(tmp_path / "lps.nii.gz")
    assert np.argwhere(array).tolist() == [[4, 0, 0]]


@pytest.mark.parametrize(("scl", "expected"), [((0.5, -3.0), (0.5, -3.0)), ((0.0, 9.0), (1, 0)), ((1.0, 0.0), (1, 0))])
def test_scl_slope(tmp_path, volume, scl, expected):
    data, affine = stored_as(volume, (0, 1, 2), (True, False, False))
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "in.nii")
    array, _ = read_volume(patched(tmp_path / "in.nii", scl=scl))
    np.testing.assert_allclose(array, volume * expected[0] + expected[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int16"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_written_header(tmp_path, dtype, ending):
    array = np.arange(24).reshape(2, 3, 4)
    grid = Grid(np.diag([2.0, 3, 4, 1]), (4, 3, 2))
    path = tmp_path / f"v{ending}"
    write_volume(path, array, grid, dtype)
    content = gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes()
    slope, inter = struct.unpack_from("<2f", content, 112)
    assert (slope, inter) == (1, 0) or np.isnan(slope)
    assert struct.unpack_from("<2h", content, 252) == (1, 1)  # qform and sform code
    np.testing.assert_array_equal(np.frombuffer(content[352:], dtype), array.ravel())
    again = tmp_path / f"w{ending}"
    write_volume(again, array, grid, dtype)
    assert again.read_bytes() == path.read_bytes()


def test_qform_only_big_endian_and_trailing_axis(tmp_path, volume):
    data, affine = stored_as(volume, (1, 0, 2), (True, True, False), 15)
    image = nib.Nifti1Image(data[..., None].astype(">f4"), None, nib.Nifti1Header(endianness=">"))
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "in.nii.gz")
    array, grid = read_volume(tmp_path / "in.nii.gz")
    np.testing.assert_array_equal(array, volume)
    assert grid.shape == data.shape
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    write_volume(tmp_path / "out.nii", array, grid, np.float32)
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii")[1].affine, grid.affine)


def plain(path: Path, data=None, affine=None, **fields) -> Path:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4) if data is None else data
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return patched(path, **fields) if fields else path


def truncated(path: Path) -> Path:
    noise = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    plain(path, noise)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def rgb(path: Path) -> Path:
    return plain(path, np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def not_nifti(path: Path) -> Path:
    nib.save(nib.freesurfer.MGHImage(np.zeros((2, 2, 2), np.float32), np.eye(4)), path)
    return path


def trailing(path: Path, size: int) -> Path:
    plain(path, np.zeros((size, size, size), np.float32))
    return with_bytes(path, path.read_bytes() + b"garbage")


def voxels_at(path: Path, offset: float) -> Path:
    content = bytearray(plain(path).read_bytes())
    struct.pack_into("<f", content, 108, offset)
    return with_bytes(path, bytes(content))


NAN = np.full((2, 2, 2), np.nan, np.float32)
SINGULAR = (1.0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0)
BAD_FILES = {
    "missing": (lambda p: p / "no.nii", "no such file"),
    "folder": (lambda p: p, "no such file"),
    "not gzip": (lambda p: with_bytes(p / "a.nii.gz", b"no gzip at all"), "not a readable NIfTI file"),
    "empty file": (lambda p: with_bytes(p / "a.nii", b""), "not a readable NIfTI file"),
    "text": (lambda p: with_bytes(p / "a.nii", b"x" * 400), "not a readable NIfTI file"),
    "gzip cut in the voxels": (lambda p: truncated(p / "a.nii.gz"), "the voxels can't be read"),
    "cut in the voxels": (lambda p: truncated(p / "a.nii"), "needs 32000 bytes, more than a file of 3000"),
    "another format": (lambda p: not_nifti(p / "a.mgz"), r"must end in .nii or .nii.gz \(or .mha, .mhd, .nrrd, .nhdr"),
    "bytes after the gzip": (lambda p: trailing(p / "a.nii.gz", 40), "other bytes follow the end of the gzip data"),
    "bytes after a short gzip": (lambda p: trailing(p / "a.nii.gz", 2), "other bytes follow the end of the gzip data"),
    "voxels in the header": (
        lambda p: voxels_at(p / "a.nii", 0.0),
        "start at byte 0, expected .* after the header of 348",
    ),
    "2-D": (lambda p: plain(p / "a.nii", np.zeros((3, 4), np.float32)), r"shape \(3, 4\), expected a 3-D"),
    "4-D": (lambda p: plain(p / "a.nii", np.zeros((3, 4, 5, 2), np.float32)), r"\(3, 4, 5, 2\), expected a 3-D"),
    "no voxels": (lambda p: plain(p / "a.nii", dim=(3, 0, 3, 4, 1, 1, 1, 1)), r"\(0, 3, 4\), an empty volume"),
    "too large": (lambda p: plain(p / "a.nii", dim=(3, 2048, 2048, 2048, 1, 1, 1, 1)), "more than the 536870912"),
    "complex": (lambda p: plain(p / "a.nii", np.zeros((2, 2, 2), np.complex64)), "type complex64, expected real"),
    "rgb": (lambda p: rgb(p / "a.nii"), "expected real numbers"),
    "unknown type": (lambda p: plain(p / "a.nii", datatype=(77, 8)), "not a readable NIfTI file"),
    "singular": (lambda p: plain(p / "a.nii", codes=(0, 2), srow=SINGULAR), "is singular"),
    "nan affine": (lambda p: plain(p / "a.nii", codes=(0, 2), srow=(np.nan,) * 12), "is singular"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("read", [read_volume, read_labels])
def test_bad_files_are_refused(tmp_path, case, read):
    make, message = BAD_FILES[case]
    path = make(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_non_finite_voxels_are_refused(tmp_path, value):
    data = np.zeros((2, 3, 4))
    data[1, 1, 1] = value  # 1e300 is beyond float32
    with pytest.raises(InputError, match="1 of 24 voxels are NaN or infinite"):
        read_volume(plain(tmp_path / "a.nii", data))


@pytest.mark.parametrize(("value", "said"), [(1.5, "1.5"), (-1, "-1"), (256, "256"), (np.nan, "nan"), (np.inf, "inf")])
def test_labels_must_be_whole_numbers(tmp_path, value, said):
    data = np.zeros((2, 3, 4), np.float32)
    data[0, 1, 2] = value
    with pytest.raises(InputError, match=f"label value {said}, expected whole numbers from 0 to 255"):
        read_labels(plain(tmp_path / "a.nii", data))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_labels_of_any_type(tmp_path, dtype):
    data = np.arange(24).reshape(2, 3, 4) * 11
    labels, _ = read_labels(plain(tmp_path / "a.nii", data.astype(dtype)))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, data.transpose(2, 1, 0))


def test_labels_behind_a_slope(tmp_path):
    """1/85 isn't a float32: the values come back as 0.99999.. or 1.00001"""
    raw = np.array([0, 85, 170, 255], np.uint8).reshape(4, 1, 1)
    labels, _ = read_labels(plain(tmp_path / "a.nii", raw, scl=(1 / 85, 0.0)))
    assert labels.ravel().tolist() == [0, 1, 2, 3]


GRID = Grid(np.diag([2.0, 2, 3, 1]), (4, 3, 2))
BAD_WRITES = {
    "ending": ("v.img", np.zeros((2, 3, 4)), "float32", "must end in .nii or .nii.gz"),
    "dtype": ("v.nii", np.zeros((2, 3, 4)), "float64", "can't store float64, expected float32, uint8 or int16"),
    "shape": ("v.nii", np.zeros((4, 3, 2)), "float32", r"has shape \(4, 3, 2\), its grid \(2, 3, 4\)"),
    "nan": ("v.nii", np.full((2, 3, 4), np.nan), "float32", "from nan to nan don't fit float32"),
    "nan as integer": ("v.nii", np.full((2, 3, 4), np.nan), "int16", "don't fit int16"),
    "infinite": ("v.nii", np.full((2, 3, 4), np.inf), "float32", "don't fit float32"),
    "too large": ("v.nii", np.full((2, 3, 4), 40000.0), "int16", "from 40000 to 40000 don't fit int16"),
    "negative": ("v.nii", np.full((2, 3, 4), -1), "uint8", "from -1 to -1 don't fit uint8"),
    "no folder": ("no/v.nii", np.zeros((2, 3, 4)), "uint8", "can't be written"),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_bad_writes_are_refused_and_leave_nothing(tmp_path, case):
    name, array, dtype, message = BAD_WRITES[case]
    with pytest.raises(InputError, match=message):
        write_volume(tmp_path / name, array, GRID, dtype)
    assert list(tmp_path.iterdir()) == []


def test_integers_are_rounded_not_truncated(tmp_path):
    array = np.full((2, 3, 4), -0.6)
    array[1] = 99.7
    write_volume(tmp_path / "v.nii", array, GRID, np.int16)
    assert np.unique(np.asarray(nib.load(tmp_path / "v.nii").dataobj)).tolist() == [-1, 100]


def test_a_failing_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("new")
            raise OSError("disk full")

    with pytest.raises(InputError, match=r"kept\.txt: can't be written \(disk full\)"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_same_grid(tmp_path):
    def moved(mm: float) -> Grid:
        affine = GRID.affine.copy()
        affine[1, 3] += mm
        return Grid(affine, GRID.shape)

    assert same_grid(GRID, moved(0.19))  # voxels of 2 x 2 x 3 mm
    assert not same_grid(GRID, moved(0.21))
    assert not same_grid(GRID, Grid(GRID.affine, (4, 3, 3)))
    turned = GRID.affine.copy()
    turned[:3] = rotation(10) @ turned[:3]
    assert not same_grid(GRID, Grid(turned, GRID.shape))
    reordered = Grid(np.array([[0.0, -2, 0, 6], [2, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]), (3, 4, 2))
    assert same_grid(GRID, reordered)  # the same voxels, stored in another order
    mirrored = Grid(np.diag([-2.0, 2, 3, 1]), GRID.shape)  # the other half of the world
    assert not same_grid(GRID, mirrored)


def test_grid_as_json(tmp_path):
    affine = GRID.affine.copy()
    affine[:3] = rotation(33) @ affine[:3]
    grid = Grid(affine, GRID.shape)
    back = Grid.from_json(json.loads(json.dumps(grid.to_json())))
    np.testing.assert_array_equal(back.affine, affine)
    assert back.shape == grid.shape


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"affine": np.eye(4).tolist()},
        {"affine": np.eye(3).tolist(), "shape": [1, 2, 3]},
        {"affine": np.zeros((4, 4)).tolist(), "shape": [1, 2, 3]},
        {"affine": np.eye(4).tolist(), "shape": [1, 2]},
        {"affine": np.eye(4).tolist(), "shape": [1, 2, 0]},
        {"affine": "x", "shape": [1, 2, 3]},
    ],
)
def test_bad_grids_are_refused(content):
    with pytest.raises(InputError, match="a grid needs an"):
        Grid.from_json(content)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[" * 100000])
def test_bad_json_is_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"a\.json: not readable as JSON"):
        read_json(with_bytes(tmp_path / "a.json", content))


@pytest.mark.parametrize("there", [False, True])
def test_new_folder_takes_back_what_it_put(tmp_path, there):
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)

    def interrupted() -> None:
        with new_folder(out):
            (out / "file").write_text("x")
            (out / "folder").mkdir()
            (out / "folder" / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.exists() == there
    assert not there or not any(out.iterdir())


def test_new_folder_refuses_what_is_there(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="already there and not an empty folder"), new_folder(path):
            pass
    with pytest.raises(InputError, match="can't be created"), new_folder(tmp_path / "file" / "below"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_import_is_light():
    heavy = "{'nibabel', 'SimpleITK', 'scipy', 'matplotlib', 'monai'}"
    code = f"import sys, sfg_fast.data; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not here")
def test_real_volumes_read_and_go_back(tmp_path):
    files = sorted(REAL.glob("*/*.nii*"))
    assert files
    for file in files:
        image = nib.load(file)
        array, grid = read_volume(file)
        write_volume(tmp_path / "back.nii", array, grid, np.float32)
        back = nib.load(tmp_path / "back.nii")
        assert back.shape == image.shape
        np.testing.assert_array_equal(back.affine, image.affine)
        np.testing.assert_allclose(np.asarray(back.dataobj), image.get_fdata(), rtol=1e-6, atol=1e-6)
        assert (array.shape[0], grid.spacing[0]) == (image.shape[2], image.header.get_zooms()[2])  # all axial


@pytest.mark.skipif(not REAL.is_dir(), reason="the real volumes are not here")
@pytest.mark.parametrize("name", ["label.nii.gz", "example_seg_mr.nii.gz"])
def test_real_femurs_lie_left_and_right(name):
    """The cohort's own labels: 1 femur_left, 2 femur_right; the array's last axis grows towards Right."""
    labels, _ = read_labels(REAL / "ts_pelvis_ct" / name)
    left, right = (np.argwhere(labels == value)[:, 2] for value in (1, 2))
    if len(left) and len(right):
        assert left.mean() < right.mean()
    else:
        pytest.skip("one femur only")
