"""Fuzzers: whatever stands in a header, a manifest or a checkpoint, the answer is a result or one clear sentence.

Each has a quick form, the same every time, and a long one (`make test-all`, ten minutes together) that looks elsewhere
every time and prints what it finds. Findings belong into test_bad_inputs.py.
"""

import copy
import gzip
import json
import tracemalloc
import warnings

import hypothesis
import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from sfg_fast.data import (
    Cache,
    ImageSampler,
    SliceSampler,
    preprocess,
    read_cohort,
    read_labels,
    read_volume,
    write_phantom,
)
from sfg_fast.data.images import read_image
from sfg_fast.data.targets import Target
from sfg_fast.errors import InputError
from sfg_fast.evaluation import figures, html, metrics
from sfg_fast.tasks import read_tasks
from sfg_fast.tasks.task import Scene
from sfg_fast.training import checkpoint, history
from sfg_fast.training.folds import read_fold

from ..data.small_cohort import picture, small_images

MEMORY = 64 * 2**20  # bytes that a file of a few kilobytes may take


def quick_and_long(quick, long):
    """Parametrize a test with its number of examples."""
    return pytest.mark.parametrize("examples", [quick, pytest.param(long, marks=pytest.mark.slow)])


def fuzz(examples, strategy, check):
    """Give examples to the check. The long form starts somewhere else every time."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=examples < 1000,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
    )
    settings(hypothesis.given(strategy)(lambda value: check(value)))()


def answers(work):
    """The result, or None after one clear sentence; anything else fails."""
    said = ""
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return work()
    except InputError as error:
        said = str(error)
        return None
    finally:
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert taken < MEMORY
        assert "\n" not in said
        assert len(said) < 2000


changes = st.lists(
    st.tuples(
        st.integers(0, 700),
        st.one_of(
            st.binary(min_size=1, max_size=4),
            st.sampled_from(
                [
                    b"\0\0\0\0",
                    b"\xff\xff\xff\x7f",
                    b"\xff\xff\xff\xff",
                    b"\0\0\xc0\x7f",
                    b"\0\0\x80\x7f",
                    b"\0\0\x80\xff",
                    b"\1\0",
                ]
            ),
        ),
    ),
    min_size=1,
    max_size=5,
)


def with_changes(content, places):
    content = bytearray(content)
    for where, what in places:
        content[where : where + len(what)] = what
    return bytes(content)


@quick_and_long(150, 8_000)
@pytest.mark.parametrize("kind", ["nii", "nii.gz", "nifti2"])
@pytest.mark.parametrize("read", [read_volume, read_labels])
def test_headers(tmp_path, examples, kind, read):
    image = (nib.Nifti2Image if kind == "nifti2" else nib.Nifti1Image)(
        np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([-2.0, 3, 4, 1])
    )
    original = image.to_bytes()
    path = tmp_path / ("a.nii.gz" if kind == "nii.gz" else "a.nii")

    def check(places):
        content = with_changes(original, places)
        path.write_bytes(gzip.compress(content, 1) if kind == "nii.gz" else content)
        found = answers(lambda: read(path))
        if found is not None:
            array, grid = found
            assert array.shape == grid.array_shape
            assert np.isfinite(array).all()
            assert np.isfinite(grid.affine).all()

    fuzz(examples, changes, check)


words = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.sampled_from(["case", "mr", "ct", "labels", "train", "val", "..", "/", "a.nii.gz", "../a.nii.gz", "background"]),
)
nested = st.recursive(
    words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def altered(draw, content, likely=0.1):
    """The content with a few values, keys or items replaced, doubled or left out."""
    if draw(st.floats(0, 1)) < likely:
        return draw(nested)
    if isinstance(content, dict):
        changed = {key: altered(draw, value) for key, value in content.items() if draw(st.integers(0, 30))}
        return changed | ({draw(st.text(max_size=5)): draw(nested)} if not draw(st.integers(0, 9)) else {})
    if isinstance(content, list):
        changed = [altered(draw, value) for value in content if draw(st.integers(0, 30))]
        return changed + changed[:1] if not draw(st.integers(0, 9)) else changed
    return content


def alterations(content):
    return st.composite(lambda draw: altered(draw, copy.deepcopy(content), 0.02))()


ROWS = [
    {"case": "a", "mr": "a.nii.gz", "ct": "a.nii.gz", "split": "train"},
    {"case": "b", "mr": "a.nii.gz", "labels": ""},
]


DECLARED = {"pet": {"unit": "SUV"}, "vessels": {"labels": {"background": 0, "x": 1}}}
IMAGES = [{"image": "a.png", "age": 3, "kind": "x", "split": "train"}, {"image": "b.png", "case": "b", "split": "val"}]


@quick_and_long(150, 5_000)
@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        {"labels": {"background": 0, "x": 1}, "channel_names": {"0": "T2"}, "targets": DECLARED, "cases": ROWS},
        {"targets": {"age": {"unit": "y"}, "kind": {"classes": ["x", "y"]}}, "cases": IMAGES},
    ],
)
def test_json_lists(tmp_path, examples, content):
    (tmp_path / "a.nii.gz").touch()
    path = tmp_path / "list.json"

    def check(changed):
        path.write_text(json.dumps(changed))
        found = answers(lambda: read_cohort(path))
        for case in found.cases if found else ():
            assert all(file.resolve().parent == tmp_path.resolve() for file in case.inputs)

    fuzz(examples, alterations(content), check)


@quick_and_long(150, 20_000)
@pytest.mark.parametrize(
    "original",
    [
        b"case,mr,ct,split\na,a.nii.gz,,train\nb,a.nii.gz,a.nii.gz,test\n",
        b"image,age,kind,split\na.png,3,x,train\nb.png,-4.5e1,,test\n",
    ],
)
def test_csv_lists(tmp_path, examples, original):
    (tmp_path / "a.nii.gz").touch()
    path = tmp_path / "list.csv"
    pieces = st.lists(
        st.tuples(
            st.integers(0, 60),
            st.sampled_from(
                [
                    b",",
                    b"\n",
                    b'"',
                    b"\0",
                    b"\xff",
                    b"../",
                    b"/",
                    b"\r",
                    b"",
                    b"mr",
                    b"a" * 300,
                    "\u00e9".encode(),
                    b";",
                    b" ",
                ]
            ),
        ),
        min_size=1,
        max_size=4,
    )

    def check(places):
        path.write_bytes(with_changes(original, places))
        answers(lambda: read_cohort(path))

    fuzz(examples, pieces, check)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_phantom(folder / "cohort", cases=3, test=1, size=24, slices=4, progress=False)
    return preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)


@quick_and_long(100, 2_000)
def test_cache_manifests(cache, tmp_path, examples):
    original = json.loads((cache.path / "manifest.json").read_text())
    for name in cache.cases:
        (tmp_path / name).symlink_to(cache.path / name)

    def look():
        opened = Cache(tmp_path)
        opened.fingerprint()
        opened.described()
        return SliceSampler(opened, "train", 2, (8, 8), 0, 0.1, 0.5)[0]

    def check(changed):
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        batch = answers(look)
        assert batch is None or batch["inputs"].shape[2:] == (8, 8)

    fuzz(examples, alterations(original), check)


@quick_and_long(100, 2_000)
def test_manifests_of_images(tmp_path, examples):
    cache = preprocess(read_cohort(small_images(tmp_path / "cohort")), tmp_path / "cache", progress=False)
    original = json.loads((cache.path / "manifest.json").read_text())

    def look():
        opened = Cache(cache.path)
        opened.fingerprint()
        opened.described()
        return ImageSampler(opened, "train", 2, 0, flip=True, shift=1)[0]

    def check(changed):
        (cache.path / "manifest.json").write_text(json.dumps(changed))
        batch = answers(look)
        assert batch is None or batch["inputs"].isfinite().all()

    fuzz(examples, alterations(original), check)


@quick_and_long(200, 20_000)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_image_files(tmp_path, examples, kind):
    Image.fromarray(picture(0)).save(tmp_path / "a", kind)
    original = (tmp_path / "a").read_bytes()
    places = st.lists(
        st.tuples(st.integers(0, len(original)), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    )

    def check(places):
        (tmp_path / "a").write_bytes(with_changes(original, places))
        found = answers(lambda: read_image(tmp_path / "a"))
        assert found is None or found.dtype == np.uint8

    fuzz(examples, places, check)


@quick_and_long(150, 10_000)
def test_splits(cache, examples):
    names = cache.names("train")
    path = cache.path / "splits_final.json"

    def check(changed):
        path.write_text(json.dumps(changed))
        fold = answers(lambda: read_fold(cache, 2, 0))
        assert fold is None or not set(fold.names("train")) & set(fold.names("val"))

    fuzz(examples, alterations([{"train": names[:1], "val": names[1:]}, {"train": names[1:], "val": names[:1]}]), check)
    path.unlink()


CURVES = {name: [1.5, 2.0] for name in history.CURVES} | {"step": [2, 4], "nll": {"ct": [1.0, None]}}
CURVES |= {"scores": {"ct/psnr": [20.0, None]}}
HISTORY = {
    "groups": ["shared", "ct"],
    "titles": {"ct/psnr": "PSNR"},
    "curves": CURVES,
    "allocation": {"step": [2, 4], "p": {"a": [[0.5, 0.5], [0.25, 0.75]]}, "entropy": {"a": [0.7, 0.6]}},
    "validation": {"step": [2], "nll": [1.5], "scores": {"ct/psnr": [20.0]}},
}


@quick_and_long(60, 2_000)
def test_histories(examples):
    def draw(changed):
        history.check_history(changed, "final.pt")
        for figure in (figures.allocation, figures.allocation_over_training, figures.entropy, figures.curves):
            figures.to_data_uri(figure(changed))

    def check(changed):
        answers(lambda: draw(json.loads(json.dumps(changed))))

    fuzz(examples, alterations(HISTORY), check)


@quick_and_long(150, 10_000)
def test_metrics(tmp_path, examples):
    number, names = np.random.default_rng(0), {"background": 0, "x": 1}
    targets = {
        "ct": Target("ct", "intensities", "HU"),
        "labels": Target("labels", "labels", names=names),
        "age": Target("age", "number", "years"),
        "gender": Target("gender", "class", names={"male": 0, "female": 1}),
    }
    volumes = read_tasks(["ct", "organs"], targets)
    ct, labels = (number.normal(0, 300, (2, 3, 4)) for _ in range(2)), number.integers(0, 2, (2, 3, 4))
    true, predicted = ct
    scene = Scene(np.ones((2, 3, 4), bool), {"organs": labels > 0, "x": labels == 1}, (1.0, 1.0, 1.0))
    case = metrics.case_metrics(volumes, {"ct": true, "labels": labels}, {"ct": predicted, "organs": labels}, scene)
    originals = [metrics.metrics_document({"a": case, "b": case}, volumes)]
    images = read_tasks({"age": {"kind": "regression"}, "gender": {"kind": "classification"}}, targets)
    image = metrics.case_metrics(images, {"age": 31.0, "gender": 1}, {"age": 28.5, "gender": 0}, None)
    originals.append(metrics.metrics_document({"a": image, "b": image}, images))
    path = tmp_path / "metrics.json"

    def write():
        document = metrics.read_metrics(path)
        html.write_report(tmp_path / "a.html", "", config_yaml="", document=document, figures=[], notes=[])

    def check(changed):
        path.write_text(json.dumps(changed))
        answers(write)

    for original in originals:
        fuzz(examples // 2, alterations(original), check)


@quick_and_long(100, 10_000)
def test_checkpoints(tmp_path, examples):
    path = tmp_path / "step_00000001.pt"
    checkpoint.save(path, {**dict.fromkeys(checkpoint.KEYS), "model": {"w": torch.arange(64.0)}, "step": 1})
    original = path.read_bytes()
    places = st.lists(
        st.tuples(st.integers(0, len(original)), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3
    )

    def check(changed):
        path.write_bytes(with_changes(original, changed))
        state = answers(lambda: checkpoint.load(path))
        assert state is None or torch.equal(state["model"]["w"], torch.arange(64.0))

    fuzz(examples, places, check)
