"""The command line: the whole job on a tiny cohort, and one clear line with exit code 2 for every bad input."""

import errno
import gc
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from sfg_fast.cli import main
from sfg_fast.data import Grid, read_volume, write_volume
from sfg_fast.errors import Preempted
from sfg_fast.training import checkpoint
from sfg_fast.training.trainer import Trainer

from .processes import launch

TINY = [
    "--network.width", "[3,4,4]", "--network.blocks", "1", "--network.residual", "routed",
    "--schedule.steps", "6", "--schedule.batch", "2", "--log_every", "3", "--checkpoint_every", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cohort, its cache, a run, predictions and metrics, each made by its command."""
    folder = tmp_path_factory.mktemp("job")
    cohort, cache, run = (str(folder / name) for name in ("cohort", "cache", "run"))
    commands = [
        ["phantom", cohort, "--cases", "3", "--test", "1", "--size", "24", "--slices", "6"],
        ["preprocess", cohort, cache],
        ["train", "--data", cache, "--out", run, *TINY],
        ["predict", run, cohort, f"{run}/predictions", "--draws", "2"],
        ["evaluate", f"{run}/predictions", cohort],
        ["report", run, cohort, f"{run}/predictions", f"{run}/metrics.json"],
    ]
    for command in commands:
        assert main(command) == 0, command
    return folder


def test_the_whole_job(made):
    run = made / "run"
    case = made / "cohort" / "phantom_002"
    mr = nib.load(case / "mr.nii.gz")
    for name, dtype in (("ct", np.float32), ("labels", np.uint8), ("uncertainty", np.float32)):
        image = nib.load(run / "predictions" / "phantom_002" / f"{name}.nii.gz")
        assert image.shape == mr.shape
        np.testing.assert_allclose(image.affine, mr.affine)
        assert image.get_data_dtype() == dtype
        assert np.isfinite(image.get_fdata()).all()
    assert nib.load(run / "predictions/phantom_002/uncertainty.nii.gz").get_fdata().any()
    document = json.loads((run / "metrics.json").read_text())
    assert list(document["cases"]) == ["phantom_002"]
    page = (run / "report.html").read_text()
    assert "phantom_002" in page
    assert (run / "figures" / "allocation.png").stat().st_size > 1000
    assert yaml.safe_load((run / "config.yaml").read_text())["network"]["width"] == [3, 4, 4]


def test_predicted_values_are_the_network_s(made):
    """The NIfTI in the scanner's own orientation against a forward pass by hand."""
    from sfg_fast.evaluation.predict import Predictor

    predictor = Predictor(made / "run")
    mr = nib.load(made / "cohort/phantom_002/mr.nii.gz").get_fdata(dtype=np.float32)  # RAS, [X, Y, Z]
    foreground = mr[mr > mr.mean(dtype=np.float64)]
    x = torch.from_numpy(((mr - foreground.mean()) / foreground.std()).transpose(2, 1, 0)[:, None].copy())
    with torch.no_grad():
        y = predictor.model(x)
    ct = nib.load(made / "run/predictions/phantom_002/ct.nii.gz").get_fdata(dtype=np.float32)
    np.testing.assert_allclose(ct, y["ct"][:, 0].numpy().transpose(2, 1, 0) * 400, rtol=1e-3, atol=0.5)
    labels = nib.load(made / "run/predictions/phantom_002/labels.nii.gz").get_fdata()
    assert (labels == y["organs"].argmax(1).numpy().transpose(2, 1, 0)).mean() > 0.999


def test_train_from_a_file_with_overrides_and_resume(made, tmp_path):
    content = {"data": str(made / "cache"), "out": str(tmp_path / "run"), "network": {"width": [3, 3, 3], "blocks": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    arguments = ["train", "--config", str(tmp_path / "config.yaml"), "--schedule.steps", "2", "--schedule.batch", "2"]
    assert main(arguments) == 0
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (saved["network"]["width"], saved["schedule"]["steps"]) == ([3, 3, 3], 2)
    assert main([*arguments, "--resume"]) == 2  # finished


def test_cross_validation_over_folds(made, tmp_path, capsys):
    out = tmp_path / "runs"
    shutil.copytree(made / "cache", tmp_path / "cache")
    arguments = ["train", "--data", str(tmp_path / "cache"), "--out", str(out), "--folds", "2", *TINY]
    assert main(arguments) == 0
    assert "2 folds: " in capsys.readouterr().out
    splits = json.loads((tmp_path / "cache" / "splits_final.json").read_text())
    assert [sorted(fold["train"] + fold["val"]) for fold in splits] == [["phantom_000", "phantom_001"]] * 2
    document = json.loads((out / "summary.json").read_text())
    each = [json.loads((out / f"fold_{fold}" / "summary.json").read_text())["validation"]["last"] for fold in (0, 1)]
    assert [document["folds"][f"fold_{fold}"] for fold in (0, 1)] == each
    for name in ("nll", "ct/psnr"):
        values = [one["nll"] if name == "nll" else one["scores"][name] for one in each]
        assert document["summary"][name]["mean"] == pytest.approx(np.mean(values))
        assert document["summary"][name]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (out / "fold_1" / "progress.png").stat().st_size > 1000
    assert (
        main(["predict", str(out / "fold_1"), str(made / "cohort"), str(tmp_path / "p"), "--checkpoint", "best"]) == 0
    )
    for content in ("[]", '{"validation": {"last": {"nll": 1, "scores": {"ct/psnr": "2"}}}}', None):
        shutil.copytree(out, tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged" / "fold_1")  # what would be trained
        summary = tmp_path / "damaged" / "fold_0" / "summary.json"
        summary.write_text(content) if content else summary.unlink()
        damaged = [str(tmp_path / "damaged") if argument == str(out) else argument for argument in arguments]
        refused(capsys, [*damaged, "--resume"], "fold_0/summary.json: ")
        assert not (tmp_path / "damaged" / "fold_1").exists()
        shutil.rmtree(tmp_path / "damaged")
    shutil.rmtree(out / "fold_1")  # not come to yet, when it was killed
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((out / "summary.json").read_text()) == document


def test_bad_cases_are_skipped_and_listed(made, tmp_path, capsys):
    break_cohort(made, tmp_path / "cohort", "NaN voxels")
    command = ["preprocess", str(tmp_path / "cohort"), str(tmp_path / "cache"), "--on-bad-case", "skip"]
    assert main([*command, "--processes", "1"]) == 0
    captured = capsys.readouterr()
    assert "2 cases in" in captured.out
    assert "1 rejected" in captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("rejected:")]
    assert "case phantom_000" in line
    assert "ct.nii.gz: 1 of 3456 voxels are NaN" in line


def test_patches(made, tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", "--data", str(made / "cache"), "--out", out, "--patch", "[16,12]", *TINY]) == 0
    assert main(["predict", out, str(made / "cohort"), f"{out}/predictions", "--draws", "2"]) == 0
    assert nib.load(f"{out}/predictions/phantom_002/ct.nii.gz").shape == (24, 24, 6)


def break_cohort(made, target, how):
    """A copy of the cohort with one thing wrong."""
    shutil.copytree(made / "cohort", target)
    case = target / "phantom_000"
    image = nib.load(case / "ct.nii.gz")
    values = image.get_fdata(dtype=np.float32)

    def save(name, array, affine=image.affine):
        nib.save(nib.Nifti1Image(array, affine), case / f"{name}.nii.gz")

    if how == "unreadable gzip":
        (case / "mr.nii.gz").write_bytes((case / "mr.nii.gz").read_bytes()[:200])
    elif how == "mismatched shapes":
        save("ct", values[:-1])
    elif how == "mismatched affines":
        save("ct", values, image.affine @ np.diag([1.1, 1, 1, 1]))
    elif how == "NaN voxels":
        values[0, 0, 0] = np.nan
        save("ct", values)
    elif how == "unknown label value":
        labels = nib.load(case / "labels.nii.gz").get_fdata().astype(np.uint8)
        labels[0, 0, 0] = 77
        save("labels", labels)
    elif how == "missing file":
        (case / "mr.nii.gz").unlink()
    elif how == "empty cohort":
        shutil.rmtree(target)
        target.mkdir()
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unreadable gzip", "mr.nii.gz"),
        ("mismatched shapes", "ct.nii.gz"),
        ("mismatched affines", "ct.nii.gz"),
        ("NaN voxels", "ct.nii.gz"),
        ("unknown label value", "77"),
        ("missing file", "phantom_000"),
        ("empty cohort", "cohort"),
    ],
)
def test_bad_cohorts(made, tmp_path, capsys, how, message):
    break_cohort(made, tmp_path / "cohort", how)
    refused(capsys, ["preprocess", str(tmp_path / "cohort"), str(tmp_path / "cache")], message)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def refused(capsys, arguments, message):
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sfg-fast:")]
    assert len(lines) == 1, captured.err
    assert message in lines[0], lines[0]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preprocess", "{cohort}/nowhere", "{new}"], "nowhere"),
        (["preprocess", "{cohort}", "{cohort}"], "not an empty folder"),
        (["phantom", "{cohort}"], "not an empty folder"),
        (["phantom", "{new}", "--cases", "0"], "cases"),
        (["phantom", "{new}", "--cases", "many"], "many"),
        (["phantom"], "out"),
        (["dance"], "dance"),
        ([], "subcommand"),
        (["train", "--data", "{cohort}", "--out", "{new}"], "manifest.json"),
        (["train", "--data", "{cache}", "--out", "{run}"], "not an empty folder"),
        (["train", "--data", "{cache}"], "out"),
        (["train", "--data", "{cache}", "--out", "{new}", "--network.witdh", "[1,2,3]"], "network.witdh"),
        (["train", "--data", "{cache}", "--out", "{new}", "--config", "{yaml}"], "colour"),
        (["train", "--data", "{cache}", "--out", "{new}", "--config", "{new}.yaml"], "does not exist"),
        (["train", "--data", "{cache}", "--out", "{new}", "--tasks", "[dose]"], "dose"),
        (["train", "--data", "{cache}", "--out", "{new}", "--network.residual", "dense"], "dense"),
        (["train", "--data", "{cache}", "--out", "{new}", "--network.width", "[0,4,4]"], "network.width"),
        (["train", "--data", "{cache}", "--out", "{yaml}/run"], "bad.yaml"),
        (["predict", "{cohort}", "{cohort}", "{new}"], "no such checkpoint"),
        (["predict", "{run}", "{cohort}", "{new}", "--split", "val"], "val"),
        (["predict", "{run}", "{cohort}", "{new}", "--draws", "-1"], "draws=-1"),
        (["predict", "{run}", "{cohort}", "{run}"], "not an empty folder"),
        (["predict", "{run}", "{cohort}", "{new}", "--device", "tpu"], "tpu"),
        (["evaluate", "{cache}", "{cohort}"], "neither ct.nii.gz nor labels.nii.gz"),
        (["evaluate", "{new}", "{cohort}"], "no prediction"),
        (["report", "{cohort}", "{cohort}", "{run}/predictions", "{run}/metrics.json"], "no such checkpoint"),
        (["report", "{run}", "{cohort}", "{run}/predictions", "{new}.json"], "no such file"),
    ],
)
def test_bad_arguments(made, tmp_path, capsys, arguments, message):
    (tmp_path / "bad.yaml").write_text("colour: green\n")
    names = {name: str(made / name) for name in ("cohort", "cache", "run")}
    names |= {"new": str(tmp_path / "new"), "yaml": str(tmp_path / "bad.yaml")}
    refused(capsys, [argument.format(**names) for argument in arguments], message)
    assert not (tmp_path / "new").exists()


def test_no_labels_for_a_task(made, tmp_path, capsys):
    shutil.copytree(made / "cohort", tmp_path / "cohort")
    for path in (tmp_path / "cohort").glob("*/labels.nii.gz"):
        path.unlink()
    assert main(["preprocess", str(tmp_path / "cohort"), str(tmp_path / "cache")]) == 0
    refused(capsys, ["train", "--data", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), *TINY], "organs")
    assert not (tmp_path / "run").exists()
    one = ["--tasks", "[ct]", "--network.method", "one_task"]
    assert main(["train", "--data", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), *TINY, *one]) == 0


def test_one_task_runs_are_compared_by_organ(made, tmp_path):
    """A CT-only run on a cohort with labels: the true labels are the regions. Another case has no truth at all."""
    run, cohort = str(tmp_path / "run"), tmp_path / "cohort"
    shutil.copytree(made / "cohort", cohort)
    for name in ("ct", "labels", "mask"):
        (cohort / "phantom_001" / f"{name}.nii.gz").unlink()
    one = ["--tasks", "[ct]", "--network.method", "one_task"]
    assert main(["train", "--data", str(made / "cache"), "--out", run, *TINY, *one]) == 0
    assert main(["predict", run, str(cohort), f"{run}/predictions", "--split", "all"]) == 0
    assert main(["evaluate", f"{run}/predictions", str(cohort)]) == 0
    document = json.loads((tmp_path / "run/metrics.json").read_text())
    assert set(document["cases"]) == {"phantom_000", "phantom_002"}
    assert {"overall", "bones", "bladder"} <= set(document["cases"]["phantom_002"]["ct"]["regions"])
    assert "organs" not in document["cases"]["phantom_002"]
    assert not nib.load(f"{run}/predictions/phantom_002/uncertainty.nii.gz").get_fdata().any()  # nothing is drawn


def test_constant_p_is_predicted_and_reported_by_draws(made, tmp_path, capsys):
    run, cohort = str(tmp_path / "run"), str(made / "cohort")
    method = ["--network.method", "constant_p"]
    assert main(["train", "--data", str(made / "cache"), "--out", run, *TINY, *method]) == 0
    refused(capsys, ["predict", run, cohort, f"{run}/predictions", "--draws", "0"], "draws=0")
    assert main(["predict", run, cohort, f"{run}/predictions", "--draws", "3"]) == 0
    assert main(["evaluate", f"{run}/predictions", cohort]) == 0
    assert main(["report", run, cohort, f"{run}/predictions", f"{run}/metrics.json"]) == 0


def test_labels_and_channels_of_another_cohort_are_compared(made, tmp_path, capsys):
    """Numbers mean what the run's cohort says; a cohort that numbers the organs otherwise, or has its MR channels in
    another order, is no cohort to predict or to compare with."""
    run, cohort, other = str(tmp_path / "run"), tmp_path / "cohort", tmp_path / "other"
    shutil.copytree(made / "cohort", cohort)
    for case in cohort.glob("phantom_*"):
        (case / "mr.nii.gz").rename(case / "mr_0.nii.gz")
        shutil.copy(case / "mr_0.nii.gz", case / "mr_1.nii.gz")
    about = json.loads((cohort / "dataset.json").read_text()) | {"channel_names": {"0": "T1", "1": "T2"}}
    (cohort / "dataset.json").write_text(json.dumps(about))
    assert main(["preprocess", str(cohort), str(tmp_path / "cache")]) == 0
    assert main(["train", "--data", str(tmp_path / "cache"), "--out", run, *TINY]) == 0
    assert main(["predict", run, str(cohort), f"{run}/predictions"]) == 0
    told = json.loads((tmp_path / "run/predictions/predictions.json").read_text())
    assert told["tasks"]["organs"]["about"]["names"] == about["labels"]
    assert {name: told[name] for name in ("channels", "checkpoint", "draws", "by", "patch", "finished")} == {
        "channels": ["T1", "T2"],
        "checkpoint": "final",
        "draws": 8,
        "by": "map",
        "patch": None,
        "finished": True,
    }
    assert told["digest"] == torch.load(tmp_path / "run/checkpoints/final.pt", weights_only=True)["digest"]
    mr = (cohort / "phantom_002" / f"mr_{channel}.nii.gz" for channel in (0, 1))
    assert told["cases"] == {"phantom_002": [hashlib.sha256(path.read_bytes()).hexdigest() for path in mr]}
    assert main(["evaluate", f"{run}/predictions", str(cohort)]) == 0

    shutil.copytree(cohort, other)
    names = list(about["labels"])
    swapped = dict(zip([names[0], *names[:0:-1]], range(len(names)), strict=True))
    (other / "dataset.json").write_text(json.dumps(about | {"labels": swapped}))
    refused(
        capsys, ["evaluate", f"{run}/predictions", str(other)], "predictions/predictions.json: the run's labels are"
    )
    (other / "dataset.json").write_text(json.dumps(about | {"channel_names": {"0": "T2", "1": "T1"}}))
    refused(capsys, ["predict", run, str(other), f"{run}/new"], "MR channels T2, T1, the run was trained on T1, T2")
    del about["channel_names"], about["labels"]
    (other / "dataset.json").write_text(json.dumps(about))  # names nothing: nothing to compare
    assert main(["predict", run, str(other), f"{run}/new"]) == 0
    assert main(["evaluate", f"{run}/new", str(other)]) == 0
    refused(capsys, ["predict", run, str(made / "cohort"), f"{run}/newer"], "MR channels MR, the run was trained on T1")


def test_folds_predict_their_own_validation_cases_and_resume_as_they_began(made, tmp_path, capsys):
    cohort, cache, out = tmp_path / "cohort", str(tmp_path / "cache"), str(tmp_path / "run")
    shutil.copytree(made / "cohort", cohort)
    about = json.loads((cohort / "dataset.json").read_text())
    names = [name for cases in about["split"].values() for name in cases]
    about["split"] = {"train": names[:2], "val": names[2:]}
    (cohort / "dataset.json").write_text(json.dumps(about))
    assert main(["preprocess", str(cohort), cache]) == 0
    assert "3 with ct, 3 with labels, 2 train, 1 val, 0 test" in capsys.readouterr().out
    folds = ["train", "--data", cache, "--out", out, *TINY, "--folds", "3"]
    assert main(folds) == 0
    splits = json.loads((tmp_path / "cache/splits_final.json").read_text())
    for fold in range(3):
        assert main(["predict", f"{out}/fold_{fold}", str(cohort), f"{out}/{fold}", "--split", "val"]) == 0
        predicted = [path.name for path in (tmp_path / "run" / str(fold)).iterdir() if path.is_dir()]
        assert sorted(predicted) == sorted(splits[fold]["val"])
    shutil.rmtree(f"{out}/fold_1")
    refused(capsys, [*folds, "--resume", "--schedule.steps", "7"], "schedule.steps=7: the run to resume has 6")
    assert not (tmp_path / "run/fold_1").exists()
    (tmp_path / "cache/splits_final.json").unlink()  # a cache made anew: the same parts again
    assert main([*folds, "--resume"]) == 0
    assert json.loads((tmp_path / "cache/splits_final.json").read_text()) == splits
    data = tmp_path / "run/fold_2/data.json"
    data.write_text(json.dumps(json.loads(data.read_text()) | {"cases": {"train": 2, "val": 1}}))
    refused(
        capsys, ["predict", f"{out}/fold_2", str(cohort), f"{out}/3", "--split", "val"], "cases.train is 2, expected"
    )
    capsys.readouterr()
    assert main(["evaluate", f"{out}/0", str(cohort)]) == 0
    assert "1 of the cohort's 3 cases" in capsys.readouterr().out
    told = tmp_path / "run/0/predictions.json"
    told.write_text(told.read_text().replace("true", "false"))  # as a kill leaves it
    with pytest.warns(UserWarning, match="0: predict was interrupted there"):
        assert main(["evaluate", f"{out}/0", str(cohort)]) == 0


def test_reports_say_what_was_predicted_and_refuse_what_is_no_part_of_it(made, tmp_path, capsys):
    run, cohort, metrics = str(made / "run"), str(made / "cohort"), str(tmp_path / "metrics.json")
    predictions, out = str(tmp_path / "predictions"), str(tmp_path / "report.html")
    assert main(["predict", run, cohort, predictions, "--by", "draws", "--draws", "2"]) == 0
    told = tmp_path / "predictions/predictions.json"
    told.write_text(told.read_text().replace("true", "false"))  # as a kill leaves it
    with pytest.warns(UserWarning, match="predict was interrupted there"):
        assert main(["evaluate", predictions, cohort]) == 0
    assert main(["report", run, cohort, predictions, metrics, "--out", out]) == 0
    page = (tmp_path / out).read_text()
    assert "the mean over drawn architectures, checkpoint final" in page
    assert "predict was interrupted: some cases may lack." in page
    refused(capsys, ["report", run, cohort, str(tmp_path / "none"), metrics], "none: holds no prediction of a case")
    for name in ("data.json", "history.json"):
        refused(capsys, ["report", run, cohort, predictions, f"{run}/{name}"], f"{name}: there is no 'conventions'")


def test_a_report_takes_the_metrics_of_its_very_predictions(made, tmp_path, capsys):
    run, cohort = str(made / "run"), str(made / "cohort")
    predictions, metrics, out = str(tmp_path / "p"), str(tmp_path / "metrics.json"), str(tmp_path / "report.html")
    assert main(["predict", run, cohort, predictions, "--split", "all", "--draws", "0"]) == 0
    command = ["report", run, cohort, predictions, metrics, "--out", out]
    other = json.loads((made / "run/metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps(other))
    refused(capsys, command, f"metrics.json: case phantom_000 is in {predictions}, but not in {metrics}; run evaluate")
    assert main(["evaluate", predictions, cohort]) == 0
    document = json.loads((tmp_path / "metrics.json").read_text())
    labels = tmp_path / "p/phantom_001/labels.nii.gz"
    assert document["predictions"]["phantom_001"]["labels.nii.gz"] == hashlib.sha256(labels.read_bytes()).hexdigest()
    evaluated = ["evaluate", predictions, cohort, "--out", str(tmp_path / "new.json")]
    ct, uncertainty = labels.with_name("ct.nii.gz"), labels.with_name("uncertainty.nii.gz")
    whole = ct.read_bytes()
    for spoil, what in (
        (lambda: ct.write_bytes(uncertainty.read_bytes()), f"{ct}: not as predict wrote it; predict --resume"),
        (ct.unlink, f"{ct}: no such file, but predictions.json lists it; predict --resume makes it again"),
        (lambda: shutil.copy(uncertainty, ct.with_name("noise.nii.gz")), "noise.nii.gz: not as predict wrote it"),
        (lambda: shutil.rmtree(ct.parent), f"{ct.parent}: no such folder, but predictions.json lists the case"),
    ):
        spoil()
        refused(capsys, evaluated, what)
        refused(capsys, command, what)
        if ct.parent.exists():
            ct.write_bytes(whole)
            ct.with_name("noise.nii.gz").unlink(missing_ok=True)
    (tmp_path / "p/predictions.json").unlink()  # as others' predictions, of which nobody knows
    refused(capsys, command, f"case phantom_001 is in {metrics}, but not in {predictions}; run evaluate again")
    shutil.copytree(tmp_path / "p/phantom_000", ct.parent)
    refused(capsys, command, f"it was not made from {ct} as it is now; run evaluate again")
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "figures").exists()


@pytest.fixture(scope="module")
def others(made, tmp_path_factory):
    """Another run of the same cohort; and another cohort of the same names, of which nothing is known but its files."""
    folder = tmp_path_factory.mktemp("others")
    cohort, run = str(folder / "cohort"), str(folder / "run")
    commands = [
        ["phantom", cohort, "--cases", "3", "--test", "1", "--size", "24", "--slices", "6", "--seed", "5"],
        ["train", "--data", str(made / "cache"), "--out", run, *TINY, "--seed", "3"],
        ["predict", run, str(made / "cohort"), f"{run}/predictions", "--draws", "0"],
        ["evaluate", f"{run}/predictions", str(made / "cohort")],
    ]
    for command in commands:
        assert main(command) == 0, command
    return folder


def test_what_belongs_to_another_run_or_cohort_is_refused(made, others, tmp_path, capsys):
    run, cohort, there = made / "run", made / "cohort", others / "run"
    out = ["--out", str(tmp_path / "report.html")]

    def report(run, cohort, predictions, metrics):
        return ["report", *map(str, (run, cohort, predictions, metrics)), *out]

    another = report(run, cohort, there / "predictions", there / "metrics.json")
    refused(capsys, another, f"predictions.json: predicted by another run than {run}/checkpoints/final.pt")
    mr = others / "cohort/phantom_002/mr.nii.gz"
    said = f"case phantom_002 was predicted from another MR than {mr}, expected the cohort that was predicted"
    refused(capsys, report(run, others / "cohort", run / "predictions", run / "metrics.json"), said)
    refused(capsys, ["evaluate", str(run / "predictions"), str(others / "cohort"), *out], said)
    # Truth of another kind for the same MR.
    shutil.copytree(cohort, tmp_path / "cohort")
    shutil.copy(others / "cohort/phantom_002/ct.nii.gz", tmp_path / "cohort/phantom_002")
    here = report(run, tmp_path / "cohort", run / "predictions", run / "metrics.json")
    refused(capsys, here, "metrics.json: case phantom_002 was compared with other files than those in")
    metrics = tmp_path / "metrics.json"
    assert main(["evaluate", str(run / "predictions"), str(tmp_path / "cohort"), "--out", str(metrics)]) == 0
    refused(capsys, report(run, cohort, run / "predictions", metrics), "case phantom_002 was compared with other files")
    # Labels that are numbered otherwise.
    names = json.loads((tmp_path / "cohort/dataset.json").read_text())
    names["labels"] |= {"prostate": 2, "bladder": 1}
    (tmp_path / "cohort/dataset.json").write_text(json.dumps(names))
    shutil.rmtree(tmp_path / "cohort/phantom_002")
    shutil.copytree(cohort / "phantom_002", tmp_path / "cohort/phantom_002")
    refused(capsys, here, f"{run}: the run's labels are")
    assert not (tmp_path / "report.html").exists()


def test_a_report_draws_the_history_of_the_run_s_own_checkpoint(made, others, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    history = tmp_path / "run/history.json"
    shutil.copy(others / "run/history.json", history)
    places = [
        str(tmp_path / "run"),
        str(made / "cohort"),
        *(str(made / "run" / p) for p in ("predictions", "metrics.json")),
    ]
    refused(capsys, ["report", *places], f"{history}: it is not the history in {tmp_path}")
    history.unlink()
    assert main(["report", *places]) == 0
    for name in ("allocation", "curves"):
        drawn = [folder / f"run/figures/{name}.png" for folder in (made, tmp_path)]
        assert drawn[0].read_bytes() == drawn[1].read_bytes()


def test_predictions_of_others_need_no_word_of_theirs(made, tmp_path, capsys):
    shutil.copytree(made / "run/predictions", tmp_path / "p")
    (tmp_path / "p/predictions.json").write_text('{"by": "hand"}')
    (tmp_path / "p/phantom_002/uncertainty.nii.gz").unlink()
    assert main(["evaluate", str(tmp_path / "p"), str(made / "cohort")]) == 0
    places = [str(made / "run"), str(made / "cohort"), str(tmp_path / "p"), str(tmp_path / "metrics.json")]
    assert main(["report", *places, "--out", str(tmp_path / "report.html")]) == 0
    ct, grid = read_volume(made / "run/predictions/phantom_002/ct.nii.gz")
    affine = grid.affine.copy()
    affine[:3, 3] += 9
    uncertainty = tmp_path / "p/phantom_002/uncertainty.nii.gz"
    write_volume(uncertainty, ct, Grid(affine, grid.shape), np.float32)
    refused(capsys, ["report", *places, "--out", str(tmp_path / "report.html")], f"{uncertainty}: grid shape")


def test_the_file_to_write(made, tmp_path, capsys, monkeypatch):
    """Through a link to what it leads to; no folder and no device, which is known before anything is done."""
    monkeypatch.chdir(tmp_path)
    evaluated = ["evaluate", str(made / "run/predictions"), str(made / "cohort"), "--out"]
    reported = [
        "report",
        *map(str, (made / "run", made / "cohort", made / "run/predictions", made / "run/metrics.json")),
        "--out",
    ]
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to("real/metrics.json")
    assert main([*evaluated, "link.json"]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real/metrics.json").read_text())["cases"]
    for command in (evaluated, reported):
        for out in ("", "/", "/dev/null", str(tmp_path)):
            refused(capsys, [*command, out], "a folder or a device, expected the name of a file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link.json", "metrics.json", "real"]


def test_what_can_not_be_made_is_refused_before_it_is_begun(tmp_path, capsys):
    refused(capsys, ["demo", "--out", str(tmp_path / "new"), "--steps", "0"], "schedule.steps=0: expected at least 1")
    refused(capsys, ["phantom", str(tmp_path / "new"), "--size", "1000000000"], "voxels, expected at most 536870912")
    assert not any(tmp_path.iterdir())


LATE = """
import atexit, os, signal, sys
import sfg_fast.cli as cli

def send(*_):
    os.kill(os.getpid(), signal.{name})

atexit.register(send)  # when Python ends
flush = cli._Patient.flush
cli._Patient.flush = lambda stream: (send(), flush(stream))  # when all is done, but not yet everything printed

def run(arguments):
    if arguments:
        raise cli.InputError("nothing to do")
    print("done")
    return 0

cli._run = run
sys.argv = ["sfg-fast", *{arguments}]
sys.exit(cli.main())
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("arguments", "said"), [([], (0, "done\n", "")), (["x"], (2, "", "sfg-fast: nothing to do\n"))]
)
def test_a_signal_after_all_is_done_changes_nothing(name, arguments, said):
    source = LATE.format(name=name, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == said


WARNING = """
import sys, warnings
from tqdm import tqdm
import sfg_fast.cli as cli

def run(arguments):
    for number in tqdm(range(2), mininterval=0):
        warnings.warn(f"word {number}")
    return 0

cli._run = run
sys.exit(cli.main([]))
"""


def test_a_warning_has_a_line_of_its_own():
    done = subprocess.run([sys.executable, "-c", WARNING], capture_output=True, text=True)
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert [line for line in lines if "warning" in line] == ["warning: word 0", "warning: word 1"]


def test_warnings_as_errors_end_no_command(tmp_path):
    code = "import warnings; warnings.simplefilter('error'); from sfg_fast.cli import main; raise SystemExit(main())"
    arguments = ["phantom", str(tmp_path / "new"), "--cases", "1", "--test", "0", "--size", "24", "--slices", "4"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_two_lists_of_one_folder_are_two_cohorts(made, tmp_path, capsys):
    cohort = tmp_path / "cohort"
    shutil.copytree(made / "cohort", cohort)
    for number in (0, 1):
        row = f"phantom_00{number},phantom_00{number}/mr.nii.gz,phantom_00{number}/ct.nii.gz"
        (cohort / f"{number}.csv").write_text(f"case,mr,ct\n{row}\n")
    assert main(["preprocess", str(cohort / "0.csv"), str(tmp_path / "cache")]) == 0
    refused(capsys, ["preprocess", str(cohort / "1.csv"), str(tmp_path / "cache")], "0.csv")
    assert (tmp_path / "cache/phantom_000/case.json").exists()


@pytest.mark.parametrize("stopped", [False, True])
def test_no_trainer_is_left_when_processes_part(made, tmp_path, monkeypatch, stopped):
    """It would hold the processes' group, which can't be destroyed then (parallel.leave)."""
    trainers, left = [], []

    class Watched(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trainers.append(weakref.ref(self))

        def run(self):
            if stopped:
                raise Preempted("stopped")
            super().run()

    def leave():
        gc.collect()
        left.extend(ref() for ref in trainers)

    monkeypatch.setattr("sfg_fast.training.trainer.Trainer", Watched)
    monkeypatch.setattr("sfg_fast.training.parallel.leave", leave)
    command = ["train", "--data", str(made / "cache"), "--out", str(tmp_path / "run"), *TINY]
    assert main(command) == (143 if stopped else 0)
    assert left == [None]


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    for error in (MemoryError("9 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 GiB")):
        monkeypatch.setattr("sfg_fast.cli._run", Mock(side_effect=error))
        assert main([]) == 1
        assert "not enough memory" in capsys.readouterr().err
    monkeypatch.setattr("sfg_fast.cli._run", Mock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        main([])


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.EACCES, 2, "/a/b: permission denied, expected a place that this user may use"),
        (errno.EPERM, 2, "/a/b: operation not permitted, expected a place that this user may use"),
        (errno.EROFS, 2, "/a/b: read-only file system, expected a place that can be written to"),
        (errno.ENOENT, 2, "/a/b: no such file or directory, expected something that is there"),
        (errno.ENOTDIR, 2, "/a/b: not a directory, expected a folder"),
        (errno.EISDIR, 2, "/a/b: is a directory, expected a file"),
        (errno.ENAMETOOLONG, 2, "/a/b: file name too long, expected a shorter name"),
        (errno.ELOOP, 2, "/a/b: too many levels of symbolic links, expected links that lead somewhere"),
        (errno.ENOSPC, 1, "[Errno 28] No space left on device: '/a/b'"),
    ],
)
def test_what_the_system_says_of_a_place(monkeypatch, capsys, number, code, said):
    monkeypatch.setattr("sfg_fast.cli._run", Mock(side_effect=OSError(number, os.strerror(number), "/a/b")))
    assert main([]) == code
    assert capsys.readouterr().err == f"sfg-fast: {said}\n"


def test_impossible_paths(made, tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for path, said in (("a" * 300, "name too long"), ("loop/x", "loop/x"), ("file/x", "file/x")):
        place = str(tmp_path / path)
        refused(capsys, ["preprocess", place, str(tmp_path / "new")], said)
        refused(capsys, ["preprocess", str(made / "cohort"), place, "--processes", "1"], said)
        refused(capsys, ["predict", place, str(made / "cohort"), str(tmp_path / "new")], said)
        refused(capsys, ["train", "--data", place, "--out", str(tmp_path / "new"), *TINY], said)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "loop"]


def test_paths_from_home(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").symlink_to(made / "cache")
    (tmp_path / "c.yaml").write_text("data: ~/cache\nout: ~/run\n")
    assert main(["train", "--config=~/c.yaml", *TINY]) == 0
    assert (tmp_path / "run/checkpoints/final.pt").exists()
    assert main(["predict", "~/run", str(made / "cohort"), "~/p", "--draws", "0"]) == 0
    assert main(["evaluate", "~/p", str(made / "cohort"), "--out=~/m.json"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "cache", "m.json", "p", "run"]


INTERRUPTED = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
from sfg_fast.cli import main
sys.exit(main(["predict", "run", "cohort", "out"]))
"""


@pytest.mark.parametrize("module", ["torch"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped by SIGTERM; --resume goes on")],
)
def test_a_signal_while_libraries_are_imported(module, number, code, said):
    source = INTERRUPTED.format(module=module, number=int(number))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"sfg-fast: {said}\n")


def test_a_signal_that_a_library_makes_something_else_of(monkeypatch, capsys):
    def run(arguments):
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise ImportError("a module failed") from error

    monkeypatch.setattr("sfg_fast.cli._run", run)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):  # noqa: B007
        assert main(["preprocess"]) == code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err.splitlines() == ["sfg-fast: interrupted", "sfg-fast: stopped by SIGTERM"]


def test_nobody_has_to_read_what_is_printed(made, tmp_path, monkeypatch):
    """A pipe without a reader, a closed stream, none at all, and one that has no letters for a name."""
    command = ["evaluate", str(made / "run/predictions"), str(made / "cohort"), "--out", str(tmp_path / "m.json")]
    reader, writer = os.pipe()
    os.close(reader)
    gone, closed = os.fdopen(writer, "w", buffering=1), io.StringIO()
    closed.close()
    for stream in (gone, closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(command) == 0
        assert sys.stderr is stream
        (tmp_path / "m.json").unlink()
    gone.write("Python's own last flush")
    gone.close()
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main([*command[:-1], str(tmp_path / "m\u00e4rz.json")]) == 0
    ascii_only.flush()
    assert b"m\\xe4rz.json" in ascii_only.buffer.getvalue()


def with_backend_of_a_notebook(arguments):
    os.environ["MPLBACKEND"] = "module://not_there"
    sys.exit(main(arguments))


def test_the_backend_of_a_notebook_does_not_matter(made, tmp_path):
    arguments = ["train", "--data", str(made / "cache"), "--out", str(tmp_path / "run"), *TINY]
    assert launch(with_backend_of_a_notebook, arguments) == [0]
    assert (tmp_path / "run/progress.png").exists()


def test_unnamed_labels(made, tmp_path):
    """No dataset.json: labels are called label_1, ..; a prediction may hold one that the test truth lacks."""
    cohort, run = tmp_path / "cohort", str(tmp_path / "run")
    shutil.copytree(made / "cohort", cohort)
    (cohort / "dataset.json").unlink()
    assert main(["preprocess", str(cohort), str(tmp_path / "cache")]) == 0
    assert main(["train", "--data", str(tmp_path / "cache"), "--out", run, *TINY]) == 0
    assert main(["predict", run, str(cohort), f"{run}/predictions", "--split", "train"]) == 0
    assert main(["evaluate", f"{run}/predictions", str(cohort)]) == 0
    tasks = json.loads((tmp_path / "run/metrics.json").read_text())["conventions"]["tasks"]
    assert "label_5" in tasks["organs"]["about"]["names"]


def test_unfinished_run_is_not_predicted(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoints/final.pt"
    state = torch.load(path, weights_only=True)
    checkpoint.save(path, {**state, "finished": False, "step": 3})
    refused(
        capsys, ["predict", str(tmp_path / "run"), str(made / "cohort"), str(tmp_path / "new")], "stopped at step 3"
    )


@pytest.mark.parametrize(("value", "message"), [("foo", "SFG_FAST_BACKEND='foo'"), ("triton", "not there")])
def test_backend_of_the_environment(monkeypatch, tmp_path, capsys, value, message):
    monkeypatch.setattr("sfg_fast.backends._import", lambda name: "no such module")
    monkeypatch.setenv("SFG_FAST_BACKEND", value)
    refused(capsys, ["phantom", str(tmp_path / "cohort")], message)


def test_duplicate_case_names(made, tmp_path, capsys):
    case = made / "cohort/phantom_000"
    (tmp_path / "list.csv").write_text(f"case,mr\na,{case}/mr.nii.gz\na,{case}/mr.nii.gz\n")
    refused(
        capsys,
        ["preprocess", str(tmp_path / "list.csv"), str(tmp_path / "cache"), "--allow-outside"],
        "case a is there twice",
    )


def test_checkpoint_of_another_architecture(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoints/final.pt"
    state = torch.load(path, weights_only=True)
    state["config"]["network"]["width"] = [3, 4, 5]
    checkpoint.save(path, state)
    refused(
        capsys, ["predict", str(tmp_path / "run"), str(made / "cohort"), str(tmp_path / "new")], "another architecture"
    )


@pytest.mark.parametrize("command", ["phantom", "preprocess", "train", "predict", "evaluate", "report", "demo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "type: str" in text
    assert "function" not in text
