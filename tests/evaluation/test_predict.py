"""Predictions against forward passes by hand, and the table of images, which outlives its process."""

import copy
import csv
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from sfg_fast.data import load_images, read_cohort
from sfg_fast.errors import InputError
from sfg_fast.evaluation import predict
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.networks.controls import assign, map_assignment, sampling
from sfg_fast.norm import KernelNorm

from ..data.small_cohort import picture

SEED = 0


def images_to_test(folder):
    cohort = read_cohort(folder / "cohort" / "list.csv")
    return cohort, cohort.split("test")


def drawn(predictor, x, draws):
    """The network's outputs for x under each of the architectures that a prediction draws."""
    predictor.model.load_state_dict(predictor._statistics[1], strict=False)
    with torch.no_grad(), torch.random.fork_rng(), sampling(predictor.model):
        torch.manual_seed(SEED)
        return [predictor.model(x) for _ in range(draws)]


# --- volumes ----------------------------------------------------------------------------------------------------------


def test_each_task_has_its_files_in_its_units(volumes, tmp_path):
    cohort, predictor = read_cohort(volumes / "cohort"), Predictor(volumes / "run")
    cases = cohort.split("test")
    done = dict(predictor.cases(cohort, cases, tmp_path / "out", 2))
    assert done == {name: tmp_path / "out" / name for name in ("phantom_002", "phantom_003")}
    stems = ["ct", "labels", "noise_pet", "pet", "uncertainty", "uncertainty_labels", "uncertainty_pet"]
    stems += ["uncertainty_vessels", "vessels"]
    folder = tmp_path / "out" / "phantom_002"
    assert sorted(path.name for path in folder.iterdir()) == [f"{stem}.nii.gz" for stem in stems]
    files = {stem: nib.load(folder / f"{stem}.nii.gz").get_fdata(dtype=np.float32) for stem in stems}
    mr = nib.load(volumes / "cohort/phantom_002/mr.nii.gz").get_fdata(dtype=np.float32)  # RAS, [X, Y, Z]
    foreground = mr[mr > mr.mean(dtype=np.float64)]
    x = torch.from_numpy(((mr - foreground.mean()) / foreground.std()).transpose(2, 1, 0)[:, None].copy())
    draws = drawn(predictor, x, 2)
    predictor.model.load_state_dict(predictor._statistics[0], strict=False)
    with torch.no_grad():
        y = predictor.model(x)

    def back(array):
        return np.asarray(array).transpose(2, 1, 0)

    sd = json.loads((volumes / "run/data.json").read_text())["targets"]["pet"]["statistics"]["sd"]
    np.testing.assert_allclose(files["ct"], back(y["ct"][:, 0] * 400), rtol=1e-3, atol=0.5)
    np.testing.assert_allclose(files["pet"], back(y["pet"][:, 0] * sd), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(files["noise_pet"], back(y["pet"][:, 1].exp() * sd), rtol=1e-3, atol=1e-3)
    for task, stem in (("organs", "labels"), ("vessels", "vessels")):
        assert (files[stem] == back(y[task].argmax(1))).mean() > 0.999
        p = torch.stack([one[task].softmax(1) for one in draws])
        np.testing.assert_allclose(
            files[f"uncertainty_{stem}"], back(p.var(0, correction=0).sum(1).sqrt()), rtol=1e-2, atol=1e-4
        )
    for task, stem, unit in (("ct", "uncertainty", 400), ("pet", "uncertainty_pet", sd)):
        both = torch.stack([one[task][:, 0] for one in draws]) * unit
        np.testing.assert_allclose(files[stem], back(both.std(0, correction=0)), rtol=1e-2, atol=1e-3 * unit)
    assert files["uncertainty"].max() > 0


# --- by draws ---------------------------------------------------------------------------------------------------------


class Unpredictor(torch.nn.Module):
    """Whatever it is shown, each draw says something else, now and then firmly."""

    def forward(self, x):
        return {"age": torch.randn(len(x), 1), "gender": 3 * torch.randn(len(x), 2)}


def test_the_mode_of_draws_is_what_most_of_them_choose(images):
    predictor, (_, cases) = Predictor(images / "run"), images_to_test(images)
    predictor.model, predictor._statistics = Unpredictor(), {0: {}, 1: {}}
    torch.manual_seed(SEED)
    outputs = [predictor.model(cases) for _ in range(5)]
    votes = [[int(one["gender"][index].argmax()) for one in outputs] for index in range(len(cases))]
    most = [max((0, 1), key=own.count) for own in votes]
    mean_p = torch.stack([one["gender"].softmax(1) for one in outputs]).mean(0)
    assert most != mean_p.argmax(1).tolist()  # or this test would tell nothing
    found = predictor.of_images(cases, 5, "mode")
    assert found["gender"][""].tolist() == most
    shares = [own.count(1) / 5 for own in votes]
    np.testing.assert_allclose(found["gender"]["p_female"], shares, atol=1e-6)
    np.testing.assert_allclose(found["gender"]["uncertainty"], [(2 * p * (1 - p)) ** 0.5 for p in shares], atol=1e-5)
    ages = torch.stack([one["age"][:, 0] for one in outputs]) * predictor.tasks["age"].output_unit
    np.testing.assert_allclose(found["age"][""], ages.mean(0), rtol=1e-4)
    by_mean = predictor.of_images(cases, 5, "draws")
    np.testing.assert_allclose(by_mean["gender"]["p_male"], mean_p[:, 0], atol=1e-6)
    assert by_mean["gender"][""].tolist() == mean_p.argmax(1).tolist()
    np.testing.assert_allclose(by_mean["age"]["uncertainty"], ages.std(0, correction=0), rtol=1e-4)
    # Of what is fixed there is no other draw to choose from, and probabilities are no votes.
    predictor.draws_anything = False
    torch.manual_seed(SEED)
    p = predictor.model(cases)["gender"].softmax(1)
    np.testing.assert_allclose(predictor.of_images(cases, 5, "mode")["gender"]["p_male"], p[:, 0], atol=1e-6)


def test_the_most_probable_architecture_is_uncertain_by_the_drawn_ones(images):
    predictor, (_, cases) = Predictor(images / "run"), images_to_test(images)
    x = torch.from_numpy(load_images(cases, predictor.images))
    found = predictor.of_images(cases, 3)
    ages = torch.stack([one["age"][:, 0] for one in drawn(predictor, x, 3)]) * predictor.tasks["age"].output_unit
    np.testing.assert_allclose(found["age"]["uncertainty"], ages.std(0, correction=0), rtol=1e-4)
    predictor.model.load_state_dict(predictor._statistics[0], strict=False)
    with torch.no_grad():
        age = predictor.model(x)["age"][:, 0] * predictor.tasks["age"].output_unit
    np.testing.assert_allclose(found["age"][""], age, rtol=1e-5)
    assert not predictor.of_images(cases, 0)["age"]["uncertainty"].any()


def test_all_images_see_the_same_drawn_architectures(images, monkeypatch):
    predictor, (_, cases) = Predictor(images / "run"), images_to_test(images)
    whole = predictor.of_images(cases, 4, "draws")
    monkeypatch.setattr(predict, "IMAGES_AT_ONCE", 3)
    parts = predictor.of_images(cases, 4, "draws")
    for task, found in whole.items():
        for key, values in found.items():
            np.testing.assert_allclose(parts[task][key], values, rtol=1e-5, atol=1e-6)


def test_statistics_of_the_batch(images):
    """Every normalisation as in training, in a plain copy of the network; others in the batch move a prediction, and
    the network keeps its own statistics."""
    predictor = Predictor(images / "run")
    _, cases = images_to_test(images)
    before = predictor.of_images(cases, 0)
    by_hand = copy.deepcopy(predictor.model).eval()
    assign(by_hand, map_assignment(by_hand))
    norms = [module for module in by_hand.modules() if isinstance(module, KernelNorm | torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        norm.train()
    with torch.no_grad():
        age = by_hand(torch.from_numpy(load_images(cases, predictor.images)))["age"][:, 0]
    found = predictor.of_images(cases, 0, "map", "batch")
    np.testing.assert_allclose(found["age"][""], age * predictor.tasks["age"].output_unit, rtol=1e-4)
    alone = predictor.of_images(cases[:2], 0, "map", "batch")
    assert not np.allclose(alone["age"][""], found["age"][""][:2], rtol=1e-3)
    np.testing.assert_array_equal(predictor.of_images(cases, 0)["age"][""], before["age"][""])
    np.testing.assert_allclose(predictor.of_images(cases[:2], 0)["age"][""], before["age"][""][:2], rtol=1e-5)


def test_batches_of_a_sorted_list_take_from_all_over(images, monkeypatch):
    """Neighbours in a list are often alike; by statistics of the batch they would be normalised by one another."""
    predictor, (_, cases) = Predictor(images / "run"), images_to_test(images)
    cases = cases[:7]
    alone = [predictor.of_images(cases[first::3], 0, "map", "batch")["age"][""] for first in range(3)]
    running = predictor.of_images(cases, 0)["age"][""]
    monkeypatch.setattr(predict, "IMAGES_AT_ONCE", 3)
    found = predictor.of_images(cases, 0, "map", "batch")["age"][""]
    for first in range(3):
        np.testing.assert_allclose(found[first::3], alone[first], rtol=1e-5)
    np.testing.assert_allclose(predictor.of_images(cases, 0)["age"][""], running, rtol=1e-5)


# --- the table --------------------------------------------------------------------------------------------------------


def written(images, out, *, split="test", draws=2, resume=False, cohort=None, **options):
    cohort = cohort or read_cohort(images / "cohort" / "list.csv")
    predictor = Predictor(images / "run")
    cases = predictor.of_split(cohort, split)
    done = list(predictor.cases(cohort, cases, out, draws, resume=resume, **options))
    assert sorted(name for name, _ in done) == sorted(case.name for case in cases)
    return predictor, cases


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_row_for_each_image(images, tmp_path):
    predictor, cases = written(images, tmp_path / "out", by="draws")
    found = predictor.of_images(cases, 2, "draws")
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = "case age age_uncertainty gender gender_uncertainty gender_p_male gender_p_female"
    assert list(rows[0]) == columns.split()
    assert [row["case"] for row in rows] == [case.name for case in cases] == [f"faces_00{n}.png" for n in range(32, 40)]
    for key in ("", "uncertainty", "p_male", "p_female"):
        for task in ("age", "gender") if not key.startswith("p_") else ("gender",):
            cells = [row[f"{task}_{key}" if key else task] for row in rows]
            if (task, key) == ("gender", ""):
                assert cells == [("male", "female")[index] for index in found["gender"][""]]
            else:
                assert [float(cell) for cell in cells] == found[task][key].tolist()  # to the bit
    about = json.loads((tmp_path / "out/predictions.json").read_text())
    assert (about["by"], about["statistics"], about["draws"], about["finished"]) == ("draws", "running", 2, True)
    assert list(about["tasks"]) == ["age", "gender"]
    assert sorted(contents(tmp_path / "out")) == ["predictions.csv", "predictions.json"]


@pytest.fixture
def counted(images, monkeypatch):
    """Predicted batches, by the names of their images; they are of 2, and what they give was computed before."""
    predictor = Predictor(images / "run")
    _, cases = images_to_test(images)
    known, calls = predictor.of_images(cases, 2), []
    index = {case.name: position for position, case in enumerate(cases)}

    def of_images(predictor, batch, *options):
        calls.append([case.name for case in batch])
        chosen = [index[case.name] for case in batch]
        return {task: {key: values[chosen] for key, values in found.items()} for task, found in known.items()}

    monkeypatch.setattr(predict, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(Predictor, "of_images", of_images)
    return calls


def test_a_table_that_is_cut_at_any_byte_goes_on(images, tmp_path, counted):
    predictor, (cohort, cases) = Predictor(images / "run"), images_to_test(images)
    cases = cases[:3]
    list(predictor.cases(cohort, cases, tmp_path / "whole", 2))
    whole = contents(tmp_path / "whole")
    table, about = whole["predictions.csv"], json.loads(whole["predictions.json"])
    names = [case.name for case in cases]
    started = json.dumps({key: value for key, value in about.items() if key != "table"} | {"finished": False})
    out = tmp_path / "out"
    for cut in range(len(table) + 1):
        out.mkdir()
        (out / "predictions.json").write_text(started)
        (out / "predictions.csv.part").write_bytes(table[:cut])
        counted.clear()
        assert [name for name, _ in predictor.cases(cohort, cases, out, 2, resume=True)] == names
        done = table[:cut].count(b"\n") - 1  # rows behind the heading
        assert contents(out) == whole, cut
        assert counted == ([] if done == 3 else [names[2:]] if done == 2 else [names[:2], names[2:]]), cut
        shutil.rmtree(out)


@pytest.mark.parametrize("when", ["before the first row", "between rows", "at the end"])
def test_what_interrupts_leaves_what_is_complete(images, tmp_path, monkeypatch, counted, when):
    written(images, tmp_path / "whole")
    out, (cohort, cases), predictor = tmp_path / "out", images_to_test(images), Predictor(images / "run")
    with monkeypatch.context() as patch:
        if when == "before the first row":
            patch.setattr(predict, "_as_text", lambda rows: 1 / 0)
        elif when == "at the end":
            patch.setattr(os, "replace", lambda *paths: 1 / 0 if paths[1].name.endswith(".csv") else os.rename(*paths))
        rows = predictor.cases(cohort, cases, out, 2)
        if when == "between rows":
            assert [next(rows)[0] for _ in range(4)] == [case.name for case in cases[:4]]
            rows.close()
        else:
            with pytest.raises(ZeroDivisionError):
                list(rows)
    if when == "before the first row":
        assert not out.exists()
        return
    assert sorted(contents(out)) == ["predictions.csv.part", "predictions.json"]
    assert json.loads((out / "predictions.json").read_text())["finished"] is False
    counted.clear()
    written(images, out, resume=True)
    assert contents(out) == contents(tmp_path / "whole")
    missing = [cases[4:6], cases[6:]] if when == "between rows" else []
    assert counted == [[case.name for case in batch] for batch in missing]


def test_a_finished_table_is_left_alone_or_done_again_from_where_it_differs(images, tmp_path, counted):
    shutil.copytree(images / "cohort", tmp_path / "cohort")
    cohort = read_cohort(tmp_path / "cohort" / "list.csv")
    _, cases = written(images, tmp_path / "out", cohort=cohort)
    whole = contents(tmp_path / "out")
    for name, spoil, again in (
        ("nothing", lambda: None, []),
        ("a damaged table", lambda: (tmp_path / "out/predictions.csv").write_bytes(b"case\n"), [0, 2, 4, 6]),
        ("another", lambda: shutil.copy(cases[0].inputs[0], cases[5].inputs[0]), [4, 6]),
    ):
        spoil()
        counted.clear()
        written(images, tmp_path / "out", resume=True, cohort=cohort)
        assert counted == [[case.name for case in cases[start : start + 2]] for start in again], name
        assert contents(tmp_path / "out")["predictions.csv"] == whole["predictions.csv"]


def test_a_table_by_statistics_of_the_batch_goes_on_in_the_order_of_its_work(images, tmp_path, counted):
    """Batches of a table of three are the images 0 and 2, then 1; what is written at the end is the cohort's order."""
    predictor, (cohort, cases) = Predictor(images / "run"), images_to_test(images)
    cases, how = cases[:3], {"statistics": "batch"}
    list(predictor.cases(cohort, cases, tmp_path / "whole", 2, **how))
    names = [case.name for case in cases]
    assert counted == [[names[0], names[2]], [names[1]]]
    whole = contents(tmp_path / "whole")
    header, *rows = whole["predictions.csv"].splitlines(keepends=True)
    assert [row.split(b",")[0].decode() for row in rows] == names
    about = json.loads(whole["predictions.json"])
    started = json.dumps({key: value for key, value in about.items() if key != "table"} | {"finished": False})
    work, out = header + rows[0] + rows[2] + rows[1], tmp_path / "out"
    for cut in range(len(work) + 1):
        out.mkdir()
        (out / "predictions.json").write_text(started)
        (out / "predictions.csv.part").write_bytes(work[:cut])
        counted.clear()
        list(predictor.cases(cohort, cases, out, 2, resume=True, **how))
        done = work[:cut].count(b"\n") - 1
        assert contents(out) == whole, cut
        assert (
            counted == [[], [[names[1]]], [[names[0], names[2]], [names[1]]]][0 if done == 3 else 1 if done == 2 else 2]
        )
        shutil.rmtree(out)


def test_with_statistics_of_the_batch_another_image_moves_all(images, tmp_path, counted):
    shutil.copytree(images / "cohort", tmp_path / "cohort")
    cohort = read_cohort(tmp_path / "cohort" / "list.csv")
    _, cases = written(images, tmp_path / "out", cohort=cohort, statistics="batch")
    counted.clear()
    written(images, tmp_path / "out", cohort=cohort, statistics="batch", resume=True)
    assert counted == []
    shutil.copy(cases[0].inputs[0], cases[5].inputs[0])
    written(images, tmp_path / "out", cohort=cohort, statistics="batch", resume=True)
    assert len(counted) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": 3}, "draws is 3 now, the predictions there have 2"),
        ({"by": "mode"}, "by is 'mode' now, the predictions there have 'map'"),
        ({"statistics": "batch"}, "statistics is 'batch' now, the predictions there have 'running'"),
    ],
)
def test_a_table_of_another_kind_is_refused(images, tmp_path, counted, options, said):
    written(images, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=said):
        written(images, tmp_path / "out", resume=True, **options)
    with pytest.raises(InputError, match="already there and not an empty folder; name a new one, or --resume goes on"):
        written(images, tmp_path / "out")
    assert contents(tmp_path / "out") == before


# --- what can't be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "mean"}, "by='mean': expected map"),
        ({"statistics": "none"}, "statistics='none': expected running"),
        ({"draws": -1}, "draws=-1: expected at least 0"),
        ({"draws": 0, "by": "mode"}, "draws=0: expected at least 1"),
    ],
)
def test_options_that_can_not_be(images, tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        written(images, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_cohort_of_another_kind_is_refused(images, volumes, tmp_path):
    for run, cohort, said in (
        (images, read_cohort(volumes / "cohort"), "cohort: a cohort of volumes, the run was trained on images"),
        (
            volumes,
            read_cohort(images / "cohort/list.csv"),
            "cohort: a cohort of images, the run was trained on volumes",
        ),
    ):
        with pytest.raises(InputError, match=said):
            Predictor(run / "run").cases(cohort, cohort.cases, tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()


def test_an_image_of_another_size_is_named_and_what_was_predicted_stays(images, tmp_path, monkeypatch):
    from PIL import Image

    shutil.copytree(images / "cohort", tmp_path / "cohort")
    Image.fromarray(picture(1, (36, 34))).save(tmp_path / "cohort/faces/0036.png")
    cohort = read_cohort(tmp_path / "cohort/list.csv")
    monkeypatch.setattr(predict, "IMAGES_AT_ONCE", 3)
    with pytest.raises(InputError, match=r"case faces_0036.png: .*0036.png: 36 x 34 pixels"):
        written(images, tmp_path / "out", cohort=cohort)
    assert (tmp_path / "out/predictions.csv.part").read_text().count("\n") == 4
    shutil.copy(images / "cohort/faces/0036.png", tmp_path / "cohort/faces")
    written(images, tmp_path / "out", resume=True, cohort=read_cohort(tmp_path / "cohort/list.csv"))
    written(images, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
