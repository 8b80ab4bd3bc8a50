"""Predictions on disk against their truth: what is scored, what is refused, and what the report of it shows."""

import csv
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance

from sfg_fast.cli import main
from sfg_fast.data import read_cohort, read_volume, write_volume
from sfg_fast.errors import InputError
from sfg_fast.evaluation import figures
from sfg_fast.evaluation.evaluate import evaluate, predicted_cases, predicted_tasks, read_evaluated, scene_of
from sfg_fast.evaluation.predict import Predictor


def predicted(folder, cohort, out, **options):
    predictor = Predictor(folder / "run")
    for _ in predictor.cases(cohort, cohort.split("test"), out, 2, **options):
        pass
    return out


def refused(capsys, arguments, message):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfg-fast:")]
    assert len(lines) == 1
    assert message in lines[0], lines[0]


# --- volumes ----------------------------------------------------------------------------------------------------------


class Watched:
    """What a report draws by one of the functions of `figures`."""

    def __init__(self, patch, name):
        self.calls, draw = [], getattr(figures, name)
        patch.setattr(figures, name, lambda *given: self.calls.append(given) or draw(*given))


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_DPI", 30)
        yield patch


@pytest.fixture(scope="module")
def case_panels(patch):
    return Watched(patch, "case_panel")


@pytest.fixture(scope="module")
def of_volumes(volumes, case_panels, tmp_path_factory):
    """Predictions, metrics.json and report.html of the run with four tasks."""
    folder, cohort = tmp_path_factory.mktemp("of_volumes"), str(volumes / "cohort")
    predicted(volumes, read_cohort(cohort), folder / "p")
    assert main(["evaluate", str(folder / "p"), cohort]) == 0
    assert main(["report", str(volumes / "run"), cohort, str(folder / "p"), str(folder / "metrics.json"),
                 "--out", str(folder / "report.html")]) == 0  # fmt: skip
    return folder


def test_every_task_is_scored_where_its_target_is(volumes, of_volumes):
    document = json.loads((of_volumes / "metrics.json").read_text())
    cases = document["cases"]
    assert {name: list(case) for name, case in cases.items()} == {
        "phantom_002": ["ct", "pet", "organs", "vessels"],
        "phantom_003": ["ct", "pet", "organs"],
    }
    assert document["summary"]["vessels"]["dice_mean"]["n"] == 1

    def voxels(folder, name):
        return nib.load(folder / "phantom_002" / f"{name}.nii.gz").get_fdata()

    truth, found = volumes / "cohort", of_volumes / "p"
    mask, organs = voxels(truth, "mask") > 0, voxels(truth, "labels") > 0
    error = np.abs(voxels(truth, "pet") - voxels(found, "pet"))
    pet = cases["phantom_002"]["pet"]["regions"]
    assert pet["overall"]["mae"] == pytest.approx(error[mask].mean(), rel=1e-5)
    assert pet["organs"]["mae"] == pytest.approx(error[mask & organs].mean(), rel=1e-5)
    # The regions are those of the first label map, for all volumes.
    names = ["organs", *json.loads((truth / "dataset.json").read_text())["labels"]]
    names.remove("background")
    assert list(pet) == ["overall", *names]
    assert list(cases["phantom_002"]["ct"]["regions"]) == ["overall", "bones", *names]
    true, guessed = voxels(truth, "vessels") > 0, voxels(found, "vessels") > 0
    dice = 2 * (true & guessed).sum() / (true.sum() + guessed.sum())
    assert cases["phantom_002"]["vessels"]["dice"]["artery"] == pytest.approx(dice, abs=1e-6)


def test_a_report_of_several_tasks(of_volumes):
    page = (of_volumes / "report.html").read_text()
    for said in (
        "PET synthesis: PSNR in mask",
        "(d) Segmentation of vessels, mean (SD)",
        "PSNR in mask [dB] (pet)",
        "pet: clip",
        "Network highresnet, method sfg, residual blocks routed, 3 steps, 2 cases predicted.",
        "The predictions come from the most probable architecture, checkpoint final.",
    ):
        assert said in page
    pictures = {path.name for path in (of_volumes / "figures").iterdir()}
    assert {"activation_maps.png", "case_phantom_002.png", "case_phantom_003.png"} < pictures


def test_a_case_is_drawn_as_its_tasks_say(of_volumes, case_panels):
    drawn = {title.partition(",")[0]: panels for panels, _, title in case_panels.calls}
    titles = {name: [panel.title for panel in panels] for name, panels in drawn.items()}
    uncertainty = [f"{name}: SD over draws" for name in ("ct", "pet", "organs", "vessels")]
    volume = ["MR", "CT", "synthetic CT", "synthetic CT - CT", "PET", "synthetic PET", "synthetic PET - PET"]
    assert titles["phantom_002"] == [*volume, "organs", "vessels", *uncertainty]
    assert [panel.unit for panel in drawn["phantom_002"][-4:]] == ["HU", "SUV", "probability", "probability"]
    vessels = {name: panels[titles[name].index("vessels")].contours for name, panels in drawn.items()}
    assert vessels["phantom_002"].true is not None
    assert vessels["phantom_003"].true is None  # which has no vessels
    assert vessels["phantom_003"].predicted is not None


def test_predictions_of_others_are_of_the_cohorts_targets(volumes, of_volumes, tmp_path):
    """No predictions.json; of one case a label map alone."""
    cohort = read_cohort(volumes / "cohort")
    shutil.copytree(of_volumes / "p", tmp_path / "p")
    (tmp_path / "p/predictions.json").unlink()
    for path in (tmp_path / "p/phantom_003").iterdir():
        if path.name != "labels.nii.gz":
            path.unlink()
    own = json.loads((of_volumes / "metrics.json").read_text())["cases"]
    found = evaluate(tmp_path / "p", cohort)
    assert found["cases"] == {
        "phantom_002": own["phantom_002"],
        "phantom_003": {"organs": own["phantom_003"]["organs"]},
    }
    assert list(found["conventions"]["tasks"]) == ["ct", "organs", "pet", "vessels"]
    (tmp_path / "p/phantom_003/labels.nii.gz").unlink()
    said = "phantom_003: holds neither ct.nii.gz nor labels.nii.gz nor pet.nii.gz nor vessels.nii.gz"
    with pytest.raises(InputError, match=said):
        evaluate(tmp_path / "p", cohort)


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")  # MONAI's, about its own call
def test_the_profile_of_the_field(volumes, of_volumes, tmp_path, capsys):
    """Of a CT and labels, with the voxels' spacing; a PET it refuses."""
    metrics, cohort = tmp_path / "m.json", tmp_path / "cohort"
    options = ["--metrics", "synthrad2025", "--out", metrics]
    said = "metrics='synthrad2025': task pet is of a volume in 'SUV', expected one in HU, or metrics paper"
    refused(capsys, ["evaluate", of_volumes / "p", volumes / "cohort", *options], said)
    refused(
        capsys, ["evaluate", of_volumes / "p", volumes / "cohort", "--metrics", "x"], "metrics='x': expected one of"
    )
    shutil.copytree(volumes / "cohort", cohort)
    about = json.loads((cohort / "dataset.json").read_text())
    del about["targets"]
    (cohort / "dataset.json").write_text(json.dumps(about))
    shutil.copytree(of_volumes / "p", tmp_path / "p")
    (tmp_path / "p/predictions.json").unlink()
    labels = nib.load(cohort / "phantom_002/labels.nii.gz")
    shifted = np.roll(np.asanyarray(labels.dataobj), (2, 1, 1), (0, 1, 2))
    nib.save(nib.Nifti1Image(shifted, labels.affine), tmp_path / "p/phantom_002/labels.nii.gz")
    # Voxels of other edges, in files whose axes run elsewhere than those of the arrays.
    for path in [*cohort.glob("phantom_002/*.nii.gz"), *(tmp_path / "p/phantom_002").glob("*.nii.gz")]:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), np.diag([-2.0, 1.5, 4.0, 1.0])), path)
    with pytest.warns(UserWarning, match="7 images are not read"):  # of targets that are declared no more
        assert main([str(argument) for argument in ("evaluate", tmp_path / "p", cohort, *options)]) == 0
    assert "(a) CT synthesis, mean (SD); metrics: synthrad2025" in capsys.readouterr().out
    document = json.loads(metrics.read_text())
    assert document["conventions"]["metrics"] == "synthrad2025"
    case = document["cases"]["phantom_002"]

    def voxels(folder, name):
        return nib.load(folder / "phantom_002" / f"{name}.nii.gz").get_fdata()

    error = (voxels(cohort, "ct") - voxels(tmp_path / "p", "ct"))[voxels(cohort, "mask") > 0]
    assert case["ct"]["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert case["ct"]["psnr"] == pytest.approx(20 * np.log10(4095) - 10 * np.log10(np.square(error).mean()), rel=1e-5)
    labels, found = voxels(cohort, "labels"), voxels(tmp_path / "p", "labels")
    for name, value in about["labels"].items():
        one, other = (torch.from_numpy(volume == value)[None, None] for volume in (found, labels))
        if value:
            expected = compute_hausdorff_distance(one, other, True, percentile=95, spacing=(2.0, 1.5, 4.0)).item()
            assert case["organs"]["hd95"][name] == pytest.approx(expected, rel=1e-6)
    with pytest.warns(UserWarning, match="7 images are not read"):
        its_cohort = read_cohort(cohort)
    cases = predicted_cases(tmp_path / "p", its_cohort, {})
    tasks, _ = predicted_tasks(tmp_path / "p", its_cohort, cases, {})
    assert read_evaluated(metrics, tmp_path / "p", its_cohort, cases, tasks) == document  # as a report does


def test_targets_of_another_kind_or_unit_are_refused(volumes, of_volumes, tmp_path, capsys):
    shutil.copytree(volumes / "cohort", tmp_path / "cohort")
    about = json.loads((volumes / "cohort/dataset.json").read_text())
    for change, said in (
        ({"pet": {"unit": "Bq/ml"}}, "the run's pet are in 'SUV', the cohort's in 'Bq/ml', expected the same"),
        ({"vessels": {"labels": {"background": 0, "vein": 1}}}, "the run's vessels are {'background': 0, 'artery': 1}"),
        ({"vessels": {"unit": "HU"}}, "the run's vessels are labels, the cohort's intensities"),
    ):
        changed = about | {"targets": about["targets"] | change}
        (tmp_path / "cohort/dataset.json").write_text(json.dumps(changed))
        where = f"{of_volumes / 'p' / 'predictions.json'}: {said}"
        refused(capsys, ["evaluate", of_volumes / "p", tmp_path / "cohort", "--out", tmp_path / "m.json"], where)


def test_labels_that_nobody_named_are_called_as_the_run_does(volumes, of_volumes, tmp_path):
    shutil.copytree(volumes / "cohort", tmp_path / "cohort")
    about = json.loads((volumes / "cohort/dataset.json").read_text())
    names = about.pop("labels")
    (tmp_path / "cohort/dataset.json").write_text(json.dumps(about))
    cohort = read_cohort(tmp_path / "cohort")
    assert cohort.targets["labels"].names == {}
    found = evaluate(of_volumes / "p", cohort)
    assert found["cases"] == json.loads((of_volumes / "metrics.json").read_text())["cases"]
    # Predictions of others, of which nobody knows: by their values, and those of the truth.
    shutil.copytree(of_volumes / "p", tmp_path / "p")
    (tmp_path / "p/predictions.json").unlink()
    labels, grid = read_volume(tmp_path / "p/phantom_002/labels.nii.gz")
    labels[0, 0, 0] = 9
    write_volume(tmp_path / "p/phantom_002/labels.nii.gz", labels, grid, np.uint8)
    dice = evaluate(tmp_path / "p", cohort)["cases"]["phantom_002"]["organs"]["dice"]
    assert list(dice) == [f"label_{value}" for value in range(1, 10)]
    assert dice["label_9"] == 0  # predicted where there is none
    assert len(names) == 6


def test_where_there_is_no_mask_a_target_in_hu_has_one(volumes):
    from sfg_fast.data import body_mask, load_case

    cohort = read_cohort(volumes / "cohort")
    case = load_case(cohort.cases[0], cohort.targets)
    targets = {name: case.targets[name] for name in ("pet", "ct", "labels")}
    bare = {"inputs": case.inputs, "targets": targets, "mask": None, "grid": case.grid}
    np.testing.assert_array_equal(scene_of(type(case)(**bare), cohort.targets).mask, body_mask(case.targets["ct"]))
    without = bare | {"targets": {"pet": case.targets["pet"]}}
    scene = scene_of(type(case)(**without), cohort.targets)
    assert scene.mask.all()
    assert scene.regions == {}


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def charts(patch):
    return Watched(patch, "chart")


@pytest.fixture(scope="module")
def of_images(images, charts, tmp_path_factory):
    """Predictions, metrics.json and report.html of images."""
    folder, cohort = tmp_path_factory.mktemp("of_images"), str(images / "cohort/list.csv")
    predicted(images, read_cohort(cohort), folder / "p", by="mode", statistics="batch")
    assert main(["evaluate", str(folder / "p"), cohort]) == 0
    assert main(["report", str(images / "run"), cohort, str(folder / "p"), str(folder / "metrics.json"),
                 "--out", str(folder / "report.html")]) == 0  # fmt: skip
    return folder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_images_against_the_two_tables(images, of_images):
    """Both lists read plainly; two ages (every tenth) and a gender (every seventh) are missing."""
    truth = {row["image"].replace("/", "_"): row for row in rows(images / "cohort/list.csv")}
    table = rows(of_images / "p/predictions.csv")
    errors = [float(row["age"]) - float(truth[row["case"]]["age"]) for row in table if truth[row["case"]]["age"]]
    correct = [row["gender"] == truth[row["case"]]["gender"] for row in table if truth[row["case"]]["gender"]]
    document = json.loads((of_images / "metrics.json").read_text())
    age, gender = document["summary"]["age"], document["summary"]["gender"]
    assert age["absolute_error"] == {
        "mean": pytest.approx(np.abs(errors).mean()),
        "sd": pytest.approx(np.abs(errors).std(ddof=1)),
        "n": len(errors),
    }
    assert age["error"]["mean"] == pytest.approx(np.mean(errors))
    assert (gender["correct"]["mean"], gender["correct"]["n"]) == (pytest.approx(np.mean(correct)), len(correct))
    assert len(errors) < len(table) == 8
    assert len(correct) < 8
    assert list(document["cases"]["faces_0039.png"]) == ["gender"]


def test_a_report_of_images_shows_none(of_images):
    page = (of_images / "report.html").read_text()
    assert "faces" not in page.split("<pre>")[0]
    pictures = {path.stem for path in (of_images / "figures").iterdir()}
    assert pictures == {"allocation", "allocation_over_training", "entropy", "curves", "task_age", "task_gender"}
    assert page.count("<img") == len(pictures)
    for said in (
        "The predictions come from drawn architectures, of numbers their mean, of classes the most frequent one",
        "Features were normalised by the statistics of each batch that was predicted",
        "Network vgg, method sfg, 3 steps, 8 images predicted.",
        "Age: predictions against the truth, 7 images.",
    ):
        assert said in page


def test_the_charts_are_of_all_images(images, of_images, charts):
    (scatter,), (matrix,) = charts.calls
    truth = {row["image"].replace("/", "_"): row for row in rows(images / "cohort/list.csv")}
    table = rows(of_images / "p/predictions.csv")
    pairs = [(float(truth[row["case"]]["age"]), float(row["age"])) for row in table if truth[row["case"]]["age"]]
    assert list(zip(scatter.true, scatter.predicted, strict=True)) == pairs
    assert matrix.names == ("male", "female")
    found = [(truth[row["case"]]["gender"], row["gender"]) for row in table]
    for place, count in np.ndenumerate(matrix.counts):
        assert count == found.count((matrix.names[place[0]], matrix.names[place[1]]))


def evaluated(images, folder, table, about=None):
    """The metrics of a table of others."""
    (folder / "p").mkdir()
    (folder / "p/predictions.csv").write_text(table)
    return evaluate(folder / "p", read_cohort(images / "cohort/list.csv"))


def test_a_table_of_others(images, tmp_path):
    """Columns case and those of targets, in any order, others beside them; an empty cell is none."""
    text = "gender,remark,case\nfemale,?,faces_0033.png\n,,faces_0034.png\nmale,,faces_0035.png\nmale,,elsewhere\n"
    found = evaluated(images, tmp_path, text)
    assert found["cases"] == {
        "faces_0033.png": {"gender": {"true": "female", "predicted": "female", "correct": 1, "recall": {"female": 1}}},
        "faces_0035.png": {"gender": {"true": "female", "predicted": "male", "correct": 0, "recall": {"female": 0}}},
    }
    assert list(found["conventions"]["tasks"]) == ["age", "gender"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("case,sex\nfaces_0033.png,male\n", "columns case, sex, expected case and age or gender"),
        ("name,age\nfaces_0033.png,30\n", "columns name, age, expected one that is called case"),
        ("case,age\nfaces_0033.png,old\n", "age of case faces_0033.png is 'old', expected a finite number"),
        ("case,age\nfaces_0033.png,nan\n", "age of case faces_0033.png is 'nan', expected a finite number"),
        ("case,gender\nfaces_0033.png,other\n", "is 'other', expected one of male, female"),
        ("case,age\nfaces_0033.png,3\nfaces_0033.png,3\n", "line 3: case faces_0033.png is there twice"),
        ("case,age\nfaces_0033.png\n", "line 2: 1 values for 2 columns"),
        ("case,age\nelsewhere,3\n", "holds no prediction of an image of the cohort"),
        ("case,age\nfaces_0039.png,3\n", "no predicted case has anything to compare with"),
    ],
)
def test_a_table_that_can_not_be(images, tmp_path, table, said):
    with pytest.raises(InputError, match=re.escape(said)):
        evaluated(images, tmp_path, table)


def test_no_table(images, tmp_path, capsys):
    command = ["evaluate", tmp_path, images / "cohort/list.csv", "--out", tmp_path / "m.json"]
    refused(capsys, command, f"{tmp_path / 'predictions.csv'}: no such file")
    (tmp_path / "predictions.json").write_text('{"finished": false}')
    refused(capsys, command, "predict was interrupted there, expected predictions.csv; predict --resume goes on")


def test_what_is_not_as_predict_wrote_it(images, of_images, tmp_path, capsys):
    """The table, an image, the truth, the metrics: none may be another than those of the others."""
    shutil.copytree(of_images / "p", tmp_path / "p")
    shutil.copytree(images / "cohort", tmp_path / "cohort")
    cohort, metrics, table = tmp_path / "cohort/list.csv", tmp_path / "m.json", tmp_path / "p/predictions.csv"
    command = ["evaluate", tmp_path / "p", cohort, "--out", metrics]
    report = ["report", images / "run", cohort, tmp_path / "p", metrics, "--out", tmp_path / "report.html"]
    assert main([str(argument) for argument in command]) == 0
    whole, truth = table.read_bytes(), cohort.read_text()
    assert "faces/0033.png,test,53,female\n" in truth.replace("\r", "")
    cohort.write_text(truth.replace("0033.png,test,53", "0033.png,test,52"))
    refused(capsys, report, "case faces_0033.png was compared with other values than those of")
    cohort.write_text(truth)
    table.write_bytes(whole.replace(b"0033", b"0003"))
    for one in (command, report):
        refused(capsys, one, f"{table}: not as predict wrote it; predict --resume makes it again")
    table.write_bytes(whole)
    image = tmp_path / "cohort/faces/0034.png"
    shutil.copy(images / "cohort/faces/0001.png", image)
    for one in (command, report):
        refused(capsys, one, f"case faces_0034.png was predicted from another image than {image}")
    shutil.copy(images / "cohort/faces/0034.png", image)
    document = json.loads(metrics.read_text())
    document["predictions"][""]["predictions.csv"] = "0"
    metrics.write_text(json.dumps(document))
    refused(capsys, report, f"it was not made from {table} as it is now; run evaluate again")
    assert not (tmp_path / "report.html").exists()


def test_another_run_or_kind_of_cohort_has_no_such_report(images, volumes, of_images, tmp_path, capsys):
    shutil.copytree(of_images / "p", tmp_path / "p")
    about = tmp_path / "p/predictions.json"
    told = json.loads(about.read_text())
    told["tasks"]["age"]["about"]["unit"] = "months"
    about.write_text(json.dumps(told))
    rest = [tmp_path / "p", of_images / "metrics.json", "--out", tmp_path / "report.html"]
    refused(
        capsys,
        ["report", images / "run", images / "cohort/list.csv", *rest],
        f"{about}: tasks.age.about.unit is 'months', the run's is 'years', expected the same",
    )
    told["tasks"]["age"]["options"]["kind"] = "dance"
    about.write_text(json.dumps(told))
    refused(capsys, ["report", images / "run", images / "cohort/list.csv", *rest], f"{about}: tasks.age.kind='dance'")
    about.unlink()
    refused(capsys, ["report", volumes / "run", images / "cohort/list.csv", *rest], "the run was trained on volumes")
