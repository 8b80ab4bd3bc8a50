"""report.html stands alone, is well formed, escapes what users give it, and holds every number and figure."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from sfg_fast.evaluation.metrics import case_metrics, metrics_document

from .described import ct_and_organs, of_images, scored

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from sfg_fast.evaluation.html import write_report

NAMES = {"background": 0, "bladder": 1, "<b>femur": 2}
VOID = {"meta", "img"}


class _Page(HTMLParser):
    """Parses strictly: every tag must close in order; keeps the cells of each table, the images and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.images, self.texts, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def document():
    rng = np.random.default_rng(0)
    shape = (3, 4, 5)
    cases = {}
    for name in ("first", "<second>"):
        true = rng.uniform(-1000, 1500, shape)
        labels = rng.integers(0, 3, (2, *shape))
        cases[name] = scored(true, true + rng.normal(0, 80, shape), *labels, np.ones(shape), NAMES)
    cases["first"]["organs"]["dice"]["bladder"] = None
    return metrics_document(cases, ct_and_organs(NAMES))


def _write(path, **change):
    arguments = {"config_yaml": "width: 16", "document": None, "figures": [], "notes": []} | change
    write_report(path, "A <title> & more", **arguments)
    return path.read_text(encoding="utf-8")


def test_page_stands_alone_and_escapes(tmp_path, document):
    text = _write(
        tmp_path / "report.html",
        config_yaml="evil: </pre><script>alert(1)</script>",
        document=document,
        figures=[('caption "one" <1>', Figure((1, 1))), ("two", Figure((1, 1)))],
        notes=["first & <foremost>"],
    )
    page = _Page(text)
    assert "<script" not in text
    assert not re.search(r"https?://|url\(|@import|<link", text)
    assert {name for name, _ in page.attributes} & {"href", "onclick", "srcset"} == set()
    assert [image["alt"] for image in page.images] == ['caption "one" <1>', "two"]
    assert all(image["src"].startswith("data:image/png;base64,iVBOR") for image in page.images)
    for expected in (
        "A <title> & more",
        "first & <foremost>",
        'caption "one" <1>',
        "evil: </pre><script>alert(1)</script>",
    ):
        assert expected in page.texts


def test_every_number_is_there(tmp_path, document):
    page = _Page(_write(tmp_path / "report.html", document=document))
    ct, dice, cases = page.tables
    psnr = [case["ct"]["regions"]["overall"]["psnr_in_mask"] for case in document["cases"].values()]
    mean, sd = np.mean(psnr), np.std(psnr, ddof=1)
    assert ct[0] == ["", "Overall", "Bones", "Organs", "Bladder", "<b>femur"]
    assert ct[1][:2] == ["PSNR in mask [dB]", f"{mean:.2f} ({sd:.2f})"]
    assert dice[1][0] == "Dice"
    assert dice[1][2].endswith(" n=1")
    assert [row[0] for row in cases] == ["Case", "first", "<second>"]
    assert cases[0][1:] == [
        "PSNR in mask [dB]",
        "PSNR gained over the mean CT [dB]",
        "MAE [HU]",
        "PSNR of bones [dB]",
        "Dice",
        "Bladder",
        "<b>femur",
    ]
    for row, case in zip(cases[1:], document["cases"].values(), strict=True):
        regions, bladder = case["ct"]["regions"], case["organs"]["dice"]["bladder"]
        assert row[1:7] == [
            f"{regions['overall']['psnr_in_mask']:.2f}",
            f"{case['ct']['psnr_gain']:+.2f}",
            f"{regions['overall']['mae']:.1f}",
            f"{regions['bones']['psnr_in_mask']:.2f}",
            f"{case['organs']['dice_mean']:.3f}",
            "-" if bladder is None else f"{bladder:.3f}",
        ]
    assert "CT synthesis: PSNR in mask" in page.texts
    assert f"{mean:.2f} dB" in page.texts  # the headline
    assert f"SD {sd:.2f} dB, 2 cases; metrics: paper" in page.texts


def test_a_page_of_the_profile_of_the_field(tmp_path):
    """Its name stands in every card and every caption."""
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1, 1:3, 1:4] = 1
    ct = np.where(labels > 0, 300.0, 0.0)
    volumes = (ct, ct + 40, labels, np.roll(labels, 1, 2), np.ones(ct.shape))
    cases = {"anna": scored(*volumes, NAMES, profile="synthrad2025")}
    text = _write(tmp_path / "report.html", document=metrics_document(cases, ct_and_organs(NAMES, "synthrad2025")))
    page = _Page(text)
    assert {"CT synthesis: MAE", "40.0 HU", "SD 0.0 HU, 1 case; metrics: synthrad2025"} <= set(page.texts)
    assert {"Segmentation of organs: HD95", "1.00 mm"} <= set(page.texts)
    cards, captions = text.count('class="card"'), text.count("<caption>")
    assert (cards, captions) == (5, 3)
    assert text.count("; metrics: synthrad2025<") == cards + captions
    each = dict(zip(*page.tables[-1], strict=True))
    assert (each["MAE [HU]"], each["Bladder: HD95 [mm]"], each["<b>femur: Dice"]) == ("40.0", "1.00", "-")
    assert {"metrics", "synthrad2025"} <= set(page.texts)


def test_conventions_are_stated(tmp_path, document):
    page = _Page(_write(tmp_path / "report.html", document=document))
    for about in document["conventions"]["tasks"].values():
        assert set(about["rules"].values()) <= set(page.texts)
    assert document["conventions"]["rules"]["sd"] in page.texts
    stated = " ".join(page.texts)
    for fact in (
        "the patient's body",
        "[-1024, 3000] HU",
        "4024 HU",
        "above 200 HU",
        "inside the mask",
        "absent from truth and prediction",
    ):
        assert fact in stated


def test_one_task_alone(tmp_path, document):
    dice = {name: {"organs": case["organs"]} for name, case in document["cases"].items()}
    page = _Page(_write(tmp_path / "report.html", document=metrics_document(dice, ct_and_organs(NAMES))))
    assert len(page.tables) == 2
    assert page.tables[1][0] == ["Case", "Dice", "Bladder", "<b>femur"]


def test_no_image_has_a_row(tmp_path):
    pairs = {"anna.png": (30.0, 33.0, 0), "bert.png": (40.0, 41.5, 1)}
    cases = {
        name: case_metrics(of_images(), {"age": true, "gender": gender}, {"age": predicted, "gender": 0}, None)
        for name, (true, predicted, gender) in pairs.items()
    }
    text = _write(tmp_path / "report.html", document=metrics_document(cases, of_images()))
    page = _Page(text)
    assert "anna" not in text
    assert [table[0] for table in page.tables] == [
        ["", "MAE [years]", "Mean error [years]"],
        ["", "Accuracy [%]", "of female [%]", "of male [%]"],
    ]
    assert {"Age: MAE", "2.25 years", "Age: Mean error", "+2.25 years", "Gender: Accuracy", "50.00 %"} <= set(
        page.texts
    )
    assert "SD 1.06 years, 2 images; metrics: paper" in page.texts


def test_without_metrics(tmp_path):
    page = _Page(_write(tmp_path / "report.html", figures=[("only", Figure((1, 1)))]))
    assert page.tables == []
    assert len(page.images) == 1
    assert "width: 16" in page.texts


def test_a_failed_write_leaves_the_old_report(tmp_path, document):
    path = tmp_path / "report.html"
    before = _write(path)

    class Broken(Figure):
        def savefig(self, *args, **kwargs):
            raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        _write(path, document=document, figures=[("broken", Broken())])
    assert path.read_text(encoding="utf-8") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_importing_is_light():
    code = (
        "import sys; from sfg_fast.evaluation import metrics, figures, html; "
        "print(sorted({'matplotlib', 'monai', 'nibabel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
