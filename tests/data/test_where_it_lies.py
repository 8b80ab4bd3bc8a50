"""Where volumes lie, by an independent reader: SimpleITK reads MR and prediction, and both must lie at one place.

A NIfTI header says in two forms, with two codes and a unit, where its voxels lie, and programs differ in which they
read: a prediction must say all of it as its MR does.
"""

import json
import struct
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from sfg_fast.data import Case, Grid, load_case, read_labels, read_volume, same_grid, write_volume
from sfg_fast.data.cohort import USUAL
from sfg_fast.data.volumes import onto
from sfg_fast.errors import InputError
from sfg_fast.evaluation.evaluate import read_prediction
from sfg_fast.tasks import own_tasks

from .test_volumes import patched

SHAPE = (5, 4, 3)  # stored [x, y, z]
VOXELS = np.arange(60, dtype=np.float32).reshape(SHAPE)  # each says which it is
AFFINE = np.array([[2.0, 0, 0, -40], [0, 2, 0, -30], [0, 0, 3, -9], [0, 0, 0, 1]])


def turned(degrees: float, affine=AFFINE) -> np.ndarray:
    """About Superior."""
    a = np.deg2rad(degrees)
    about = np.array([[np.cos(a), -np.sin(a), 0, 0], [np.sin(a), np.cos(a), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return about @ affine


def oblique() -> np.ndarray:
    tilt = np.array([[1, 0, 0, 0], [0, 0.96, -0.28, 0], [0, 0.28, 0.96, 0], [0, 0, 0, 1]])
    return tilt @ turned(20)


def flipped() -> np.ndarray:
    """Stored towards Left, Superior, Posterior."""
    return np.array([[-2.0, 0, 0, 40], [0, 0, -3, 30], [0, 2, 0, -9], [0, 0, 0, 1]])


def sheared() -> np.ndarray:
    """A gantry tilt that nobody resampled."""
    affine = AFFINE.copy()
    affine[1, 2] = 1.2
    return affine


def nifti(path, affine=AFFINE, unit="mm", qform=True, sform=True, kind=nib.Nifti1Image, dtype=np.float32, order="<"):
    """A file whose affine is in its unit; qform and sform: their affines, or whether there is such a form."""
    header = kind.header_class(endianness=order)
    image = kind(VOXELS.astype(dtype), None, header)
    image.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    image.header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    for form, put in ((qform, image.set_qform), (sform, image.set_sform)):
        put(affine if form is True else None if form is False else form, 0 if form is False else 1)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, path)
    return path


def in_unit(mm: float, affine=AFFINE) -> np.ndarray:
    """The affine in a unit of so many mm."""
    return np.diag([1 / mm, 1 / mm, 1 / mm, 1]) @ affine


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[2, 3] += mm
    return affine


FORM_FIELDS = [*(f"quatern_{axis}" for axis in "bcd"), *(f"qoffset_{axis}" for axis in "xyz")]
FORM_FIELDS += [*(f"srow_{axis}" for axis in "xyz"), "qform_code", "sform_code", "xyzt_units", "pixdim"]


def by_itk(path) -> sitk.Image:
    """What ITK reads; of NIfTI-2, which it doesn't, the same fields as NIfTI-1."""
    if isinstance(found := nib.load(path) if ".nii" in path.name else None, nib.Nifti2Image):
        copy = nib.Nifti1Image(np.asarray(found.dataobj), None)
        for name in FORM_FIELDS:
            copy.header[name] = found.header[name]
        path = path.with_name("as_nifti_1.nii")
        nib.save(copy, path)
    return sitk.ReadImage(str(path))


def places(path) -> np.ndarray:
    """Where ITK puts each voxel, in the order of their values. [voxels, 3], mm"""
    image = by_itk(path)
    values = sitk.GetArrayFromImage(image)
    found = np.empty((values.size, 3))
    for z, y, x in np.ndindex(values.shape):
        found[round(float(values[z, y, x]))] = image.TransformIndexToPhysicalPoint((x, y, z))
    return found


FILES = {
    "mm": {},
    "unit unknown": {"unit": "unknown"},
    "micron": {"affine": in_unit(0.001), "unit": "micron"},
    "metre": {"affine": in_unit(1000), "unit": "meter"},
    "oblique": {"affine": oblique()},
    "oblique in micron, qform alone": {"affine": in_unit(0.001, oblique()), "unit": "micron", "sform": False},
    "flipped": {"affine": flipped()},
    "qform alone": {"affine": oblique(), "sform": False},
    "sform alone": {"affine": oblique(), "qform": False},
    "no form": {"qform": False, "sform": False},
    "forms differ": {"qform": moved(50)},
    "sheared, with a qform": {"affine": sheared(), "qform": AFFINE},
    "NIfTI-2": {"affine": oblique(), "kind": nib.Nifti2Image},
    "NIfTI-2 in metre": {"affine": in_unit(1000, flipped()), "unit": "meter", "kind": nib.Nifti2Image},
    "big-endian": {"affine": oblique(), "order": ">"},
    "45 degrees": {"affine": turned(45)},
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_prediction_lies_where_its_mr_lies(tmp_path, what, ending):
    mr = nifti(tmp_path / f"mr{ending}", **FILES[what])
    array, grid = read_volume(mr)
    write_volume(tmp_path / "prediction.nii.gz", array, grid, np.float32)
    np.testing.assert_array_equal(places(tmp_path / "prediction.nii.gz"), places(mr))
    before, after = nib.load(mr).header, nib.load(tmp_path / "prediction.nii.gz").header
    assert type(before) is type(after)
    for name in FORM_FIELDS:
        np.testing.assert_array_equal(after[name], before[name], name)
    as_json = Grid.from_json(json.loads(json.dumps(grid.to_json())))
    write_volume(tmp_path / "again.nii.gz", array, as_json, np.float32)
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "prediction.nii.gz").read_bytes()


@pytest.mark.parametrize("what", ["mm", "micron", "metre", "oblique in micron, qform alone", "NIfTI-2 in metre"])
def test_all_lengths_are_mm(tmp_path, what):
    array, grid = read_volume(nifti(tmp_path / "mr.nii", **FILES[what]))
    np.testing.assert_allclose(sorted(grid.spacing), (2, 2, 3), rtol=1e-5)
    for value, place in enumerate(places(tmp_path / "mr.nii")):
        ((z, y, x),) = np.argwhere(array == value)
        np.testing.assert_allclose(grid.canonical_affine @ (x, y, z, 1), [-place[0], -place[1], place[2], 1], atol=1e-3)


def test_what_itk_refuses_of_the_mr_it_refuses_of_the_prediction(tmp_path):
    """It reads no sheared volume; one whose shears were dropped it would show centimetres away."""
    array, grid = read_volume(nifti(tmp_path / "mr.nii", sheared(), qform=False))
    write_volume(tmp_path / "prediction.nii", array, grid, np.float32)
    for name in ("mr.nii", "prediction.nii"):
        with pytest.raises(RuntimeError, match="orthonormal"):
            sitk.ReadImage(str(tmp_path / name))
    np.testing.assert_array_equal(nib.load(tmp_path / "prediction.nii").affine, nib.load(tmp_path / "mr.nii").affine)


def test_a_sheared_grid_without_forms_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"v\.nii: the affine .* can't be written as a qform, .*at right angles"):
        write_volume(tmp_path / "v.nii", np.zeros((3, 4, 5)), Grid(sheared(), SHAPE), np.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["micron", "metre", "oblique", "NIfTI-2 in metre", "45 degrees"])
@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".NII.GZ"])
def test_every_file_of_a_case_lies_at_one_place(tmp_path, what, ending):
    """CT and labels as ITK writes them: in mm, with other axes stored first, and in its own formats."""
    mr = nifti(tmp_path / "mr.nii", **FILES[what])
    image = sitk.Flip(sitk.PermuteAxes(by_itk(mr), (2, 0, 1)), (True, False, True), False)
    for name, pixel in (("ct", sitk.sitkInt16), ("labels", sitk.sitkUInt8)):
        written = tmp_path / f"{name}{ending.lower()}"
        sitk.WriteImage(sitk.Cast(image, pixel), str(written))
        written.rename(tmp_path / f"{name}{ending}")
    case = Case("a", (mr,), {"ct": tmp_path / f"ct{ending}", "labels": tmp_path / f"labels{ending}"}, None, "train")
    loaded = load_case(case, USUAL)
    np.testing.assert_array_equal(loaded.targets["ct"], loaded.inputs[0])
    np.testing.assert_array_equal(loaded.targets["labels"], loaded.inputs[0])


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_a_prediction_of_another_format_s_mr_is_nifti_at_the_same_place(tmp_path, ending):
    nifti(tmp_path / "mr.nii", oblique())
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "mr.nii")), str(tmp_path / f"mr{ending}"))
    array, grid = read_volume(tmp_path / f"mr{ending}")
    write_volume(tmp_path / "ct.nii.gz", array, grid, np.float32)
    np.testing.assert_allclose(places(tmp_path / "ct.nii.gz"), places(tmp_path / f"mr{ending}"), atol=1e-4)


# --- the same grid ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "mm", "edge"), [("meter", 1000, 2.0), ("micron", 0.001, 2.0), ("mm", 1, 0.02)])
@pytest.mark.parametrize(("voxels", "same"), [(0.0, True), (0.08, True), (0.12, False), (1.0, False), (30.0, False)])
def test_a_tenth_of_a_voxel_in_any_unit(tmp_path, unit, mm, edge, voxels, same):
    affine = np.diag([edge / mm, edge / mm, edge / mm, 1])
    other = affine.copy()
    other[0, 3] += voxels * edge / mm
    grids = [read_volume(nifti(tmp_path / f"{name}.nii", one, unit))[1] for name, one in (("a", affine), ("b", other))]
    assert same_grid(*grids) == same


def test_the_unit_counts(tmp_path):
    """The same numbers, a thousand times as large."""
    grids = [read_volume(nifti(tmp_path / f"{unit}.nii", unit=unit))[1] for unit in ("mm", "micron")]
    assert not same_grid(*grids)


def tie(folder, degrees_ct):
    """An MR at 45 degrees, and a CT a hair beside it, for which other patient axes are closest."""
    mr, ct = (nifti(folder / f"{name}.nii.gz", turned(by)) for name, by in (("mr", 45), ("ct", degrees_ct)))
    return Case("a", (mr,), {"ct": ct}, None, "train")


@pytest.mark.parametrize("degrees", [45 - 6e-5, 45, 45 + 6e-5])
def test_at_45_degrees_both_files_are_turned_alike(tmp_path, degrees):
    case = tie(tmp_path, degrees)
    loaded = load_case(case, USUAL)
    np.testing.assert_array_equal(loaded.targets["ct"], loaded.inputs[0])
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "ct.nii.gz").rename(tmp_path / "out" / "a" / "ct.nii.gz")
    found = read_prediction(tmp_path / "out", case, loaded, own_tasks({"ct": USUAL["ct"]}))
    np.testing.assert_array_equal(found["ct"], loaded.inputs[0])


def test_at_45_degrees_the_axes_do_tip_over(tmp_path):
    """What the test above is about."""
    shapes = {read_volume(nifti(tmp_path / "a.nii", turned(45 + by)))[0].shape for by in (-6e-5, 6e-5)}
    assert len(shapes) == 2


def test_other_grids_are_not_turned():
    array, grid = np.zeros((3, 4, 5)), Grid(AFFINE, SHAPE)
    for affine, shape in (
        (moved(1.0), SHAPE),
        (AFFINE, (5, 4, 2)),
        (turned(2), SHAPE),
        (AFFINE[:, [1, 0, 2, 3]], SHAPE),
    ):
        assert onto(Grid(affine, shape), array, grid) is None


# --- what a person should know ----------------------------------------------------------------------------------------


def kinds(grid: Grid) -> list[str]:
    return [note.kind for note in grid.notes]


def test_forms_that_differ_are_told(tmp_path):
    path = nifti(tmp_path / "mr.nii", qform=moved(50))
    case = Case("a", (path,), {}, None, "train")
    with pytest.warns(UserWarning, match=r"mr\.nii: qform and sform lie 50 mm apart; the sform is used") as told:
        loaded = load_case(case, USUAL)
    assert [str(one.message) for one in told] == [note.text for note in loaded.notes]
    np.testing.assert_array_equal(loaded.grid.affine, AFFINE)


@pytest.mark.parametrize(("by", "told"), [(0.19, []), (0.21, ["forms"])])
def test_forms_may_differ_by_a_tenth_of_a_voxel(tmp_path, by, told):
    assert kinds(read_volume(nifti(tmp_path / "a.nii", qform=moved(by)))[1]) == told
    micron = {"affine": in_unit(0.001), "qform": in_unit(0.001, moved(by)), "unit": "micron"}
    assert kinds(read_volume(nifti(tmp_path / "b.nii", **micron))[1]) == told


def test_a_file_that_says_no_place_is_told(tmp_path):
    grid = read_volume(nifti(tmp_path / "a.nii", qform=False, sform=False))[1]
    assert kinds(grid) == ["place"]
    assert "a.nii: neither qform nor sform says where it lies" in grid.notes[0].text


def test_what_nibabel_mends_is_told_with_the_file_s_name(tmp_path, capfd):
    path = nifti(tmp_path / "a.nii", sform=False)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 76, 0.0)  # qfac
    path.write_bytes(content)
    array, grid = read_volume(path)
    assert [note.text for note in grid.notes] == [
        f"{path}: pixdim[0] (qfac) should be 1 (default) or -1; setting qfac to 1"
    ]
    write_volume(tmp_path / "p.nii", array, grid, np.float32)
    np.testing.assert_array_equal(places(tmp_path / "p.nii"), places(path))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("field", [(256, "6f"), (76, "4f")])  # the quaternion and its offsets, pixdim
def test_a_form_that_is_no_number_is_refused(tmp_path, field):
    path = nifti(tmp_path / "a.nii")
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + field[1], content, field[0], *[float("nan")] * int(field[1][0]))
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.nii: .*holds \[nan.*expected finite numbers"):
        read_volume(path)


def test_a_form_that_says_nothing_may_be_no_number(tmp_path):
    path = patched(nifti(tmp_path / "a.nii", sform=False), srow=[float("nan")] * 12)
    array, grid = read_volume(path)
    write_volume(tmp_path / "p.nii", array, Grid.from_json(grid.to_json()), np.float32)
    np.testing.assert_array_equal(places(tmp_path / "p.nii"), places(path))


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"version": True},
        {"pixdim": [1, 2, 3]},
        {"sform": "0" * 12},
        {"qform": [float("nan")] * 6},
        {"units": 2.0},
        {"colour": 1},
    ],
)
def test_forms_that_no_header_has_are_refused(tmp_path, change):
    content = read_volume(nifti(tmp_path / "a.nii"))[1].to_json()
    with pytest.raises(InputError, match="a grid needs"):
        Grid.from_json({**content, "forms": {**content["forms"], **change}})


# --- MetaImage and NRRD -----------------------------------------------------------------------------------------------


def itk_file(path, affine=AFFINE, voxels=VOXELS):
    nifti(path.with_name("source.nii"), affine)
    image = sitk.ReadImage(str(path.with_name("source.nii")))
    found = sitk.GetImageFromArray(voxels.T)
    found.CopyInformation(image)
    sitk.WriteImage(found, str(path))
    path.with_name("source.nii").unlink()
    return path


def test_without_simpleitk_the_line_says_what_to_install(tmp_path, monkeypatch):
    path = itk_file(tmp_path / "mr.mha")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(InputError, match=r"mr\.mha: SimpleITK reads \.mha files .* pip install 'sfg_fast\[itk\]'"):
        read_volume(path)
    read_volume(nifti(tmp_path / "mr.nii"))


@pytest.mark.parametrize(
    ("dtype", "read"), [(np.int16, read_volume), (np.float64, read_volume), (np.uint16, read_labels)]
)
@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_types_of_voxels(tmp_path, dtype, read, ending):
    array, _ = read(itk_file(tmp_path / f"a{ending}", voxels=VOXELS.astype(dtype)))
    np.testing.assert_array_equal(array, VOXELS.transpose(2, 1, 0))


def test_voxels_beside_the_header_must_be_there_and_beside_it(tmp_path):
    mhd, nhdr = itk_file(tmp_path / "a.mhd"), itk_file(tmp_path / "b.nhdr")
    for path in (mhd, nhdr):
        text, data = path.read_bytes(), path.with_suffix(".raw")
        for elsewhere in (b"../a.raw", b"/etc/passwd", b"LIST", b"%d.raw 1 3 1"):
            path.write_bytes(text.replace(data.name.encode(), elsewhere))
            with pytest.raises(InputError, match="expected one file in the header's own folder"):
                read_volume(path)
        path.write_bytes(text)
        read_volume(path)
        content = data.read_bytes()
        data.write_bytes(content[:50])
        with pytest.raises(InputError, match=rf"{path.name}: SimpleITK can't read it"):
            read_volume(path)
        data.unlink()
        with pytest.raises(InputError, match=rf"{path.name}: its voxels are in {data.name}, but there is no such file"):
            read_volume(path)


BAD = {
    "text.mha": lambda path: path.write_bytes(b"hello"),
    "text.nrrd": lambda path: path.write_bytes(b"hello"),
    "nifti.mha": lambda path: nifti(path.with_name("x.nii")).rename(path),
    "plane.mha": lambda path: sitk.WriteImage(sitk.Image(3, 4, sitk.sitkFloat32), str(path)),
    "two.nrrd": lambda path: sitk.WriteImage(sitk.Image([3, 4, 5, 2], sitk.sitkFloat32), str(path)),
    "vectors.mha": lambda path: sitk.WriteImage(sitk.Image(3, 4, 5, sitk.sitkVectorFloat32), str(path)),
    "huge.mha": lambda path: path.write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 900 900 600\nElementType = MET_FLOAT\nElementDataFile = LOCAL\n"
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_line(tmp_path, name):
    BAD[name](tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: (SimpleITK can't read it|shape|voxels of type vector)") as error:
        read_volume(tmp_path / name)
    assert "0x" not in str(error.value)


def test_axes_that_a_prediction_could_not_have_are_refused(tmp_path):
    path = itk_file(tmp_path / "a.nrrd")
    path.write_bytes(path.read_bytes().replace(b"(0,0,3)", b"(0,1.2,3)"))
    with pytest.raises(InputError, match=r"a\.nrrd: .*(at right angles|SimpleITK can't read it)"):
        read_volume(path)
