"""The whole experiment by its command on a tiny phantom: what each method is, killed and resumed, refused."""

import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import statistics
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sfg_fast.cli import main
from sfg_fast.data import load_case, read_cohort
from sfg_fast.evaluation.evaluate import scene_of
from sfg_fast.evaluation.metrics import case_metrics, summarise
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.experiment.config import PAPER_ROWS
from sfg_fast.files import alone_in
from sfg_fast.training import checkpoint
from sfg_fast.training.trainer import Trainer

from ..processes import launch

TRAIN = {
    "log_every": 2,
    "checkpoint_every": 2,
    "keep": 9,
    "network": {"width": [3, 4, 4], "blocks": 1},
    "schedule": {"steps": 6, "batch": 2, "draw_until": 0.6},  # four steps, so that a second checkpoint has learnt more
}
DRAWS = 3
SMALL = {"methods": {"mask": {"method": "constant_mask"}, "ours": {"method": "sfg"}}, "subsets": {}, "seeds": [4]}


def write_config(folder, name, **options):
    """OUT is FOLDER/NAME."""
    common = {"cohort": str(folder / "cohort"), "draws": DRAWS, "seeds": [0, 5], "subsets": {"paper": 1}}
    content = {**common, "out": str(folder / name), "train": TRAIN, **options}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cohort, the experiment of the paper's five methods, and a small one that was never interrupted."""
    made = tmp_path_factory.mktemp("experiment")
    shape = ["--cases", "4", "--test", "2", "--size", "24", "--slices", "6", "--difficulty", "0.5"]
    assert main(["phantom", str(made / "cohort"), *shape]) == 0
    assert main(["experiment", write_config(made, "paper")]) == 0
    assert main(["experiment", write_config(made, "whole", **SMALL)]) == 0
    return made


def numbers(out):
    """Every metrics.json below a folder, but for the digests of the networks: these know in which folder they are."""
    found = {path.relative_to(out): json.loads(path.read_text()) for path in sorted(out.rglob("metrics.json"))}
    return {path: json.dumps(one | {"digests": None}) for path, one in found.items()}


def seed_folder(folder, row, seed=0):
    return folder / "paper" / "runs" / row / f"seed_{seed}"


def states(run):
    """The weights of every checkpoint of a run in the order of the steps, the finished one last."""
    paths = [*checkpoint.steps(run / "checkpoints")[::-1], run / "checkpoints" / "final.pt"]
    assert len(paths) == 5
    return [checkpoint.load(path)["model"] for path in paths]


def course(run, name):
    """[checkpoints, all SFG layers together]: "logits", or "fixed_gates" as the groups' numbers, -1: drawn."""

    def of(tensor):
        return tensor.flatten() if name == "logits" else tensor.argmax(1).where(tensor.sum(1) == 1, -1)

    return torch.stack([torch.cat([of(s[key]) for key in s if key.endswith(f".{name}")]) for s in states(run)])


# --- the methods are what they are called -----------------------------------------------------------------------------


def test_one_task_has_a_network_for_each_task_and_shares_nothing(folder):
    run = seed_folder(folder, "One-task (HighResNet)")
    for task in ("ct", "organs"):
        assert (course(run / task, "fixed_gates") == 1).all()
        history = json.loads((run / task / "history.json").read_text())
        assert history["groups"] == ["shared", task]
        assert all(p == [0, 1] for rows in history["allocation"]["p"].values() for p in rows)
    assert not (run / "checkpoints").exists()


def test_hard_sharing_has_no_kernels_of_a_task(folder):
    run = seed_folder(folder, "MT-hard sharing")
    assert (course(run, "fixed_gates") == 0).all()
    history = json.loads((run / "history.json").read_text())
    assert history["groups"] == ["shared", "ct", "organs"]
    assert all(p == [1, 0, 0] for rows in history["allocation"]["p"].values() for p in rows)


def test_constant_mask_is_even_and_never_changes(folder):
    assignments = course(seed_folder(folder, "MT-constant mask"), "fixed_gates")
    assert (assignments == assignments[0]).all()
    assert assignments[0, :3].tolist() == [0, 1, 2]
    assert torch.bincount(assignments[0]).tolist() == [1 + 4 * 2, 1 + 4, 1 + 4]


def test_constant_p_stays_uniform_and_is_drawn(folder):
    run = seed_folder(folder, "MT-constant p")
    logits = course(run, "logits")
    assert (logits == logits[0, 0]).all()
    assert (course(run, "fixed_gates") == -1).all()
    assert json.loads((run / "metrics.json").read_text())["how"]["draws"] == DRAWS


def test_sfg_learns_its_logits(folder):
    run = seed_folder(folder, "MT-SFG")
    logits = course(run, "logits")
    assert (logits[1] != logits[0]).any()
    assert (logits[2] != logits[1]).any()
    assert json.loads((run / "metrics.json").read_text())["how"]["draws"] == 0


def test_rows_and_seeds_are_different_networks(folder):
    found = numbers(folder / "paper" / "runs")
    assert {path.parts[:2] for path in found} == {(row, f"seed_{seed}") for row in PAPER_ROWS for seed in (0, 5)}
    assert len(set(found.values())) == 10


@pytest.mark.parametrize("row", PAPER_ROWS)
def test_metrics_are_those_of_the_predictors(folder, row):
    """One-task: the CT of one network, the labels of the other; constant p: the mean over draws, argmax p otherwise."""
    cohort, run = read_cohort(folder / "cohort"), seed_folder(folder, row, 5)
    alone = row.startswith("One-task")
    networks = {task: Predictor(run / task if alone else run) for task in ("ct", "organs")}
    saved = json.loads((run / "metrics.json").read_text())["cases"]
    assert list(saved) == ["phantom_002", "phantom_003"]
    for case in cohort.split("test"):
        truth = load_case(case, cohort.targets)
        draws = DRAWS if row == "MT-constant p" else 0
        tasks = {task: network.tasks[task] for task, network in networks.items()}
        found = {task: network.volume(truth.inputs, draws)[task][""] for task, network in networks.items()}
        expected = case_metrics(tasks, truth.targets, found, scene_of(truth, cohort.targets))
        assert saved[case.name] == json.loads(json.dumps(expected))


# --- what it leaves ---------------------------------------------------------------------------------------------------


def test_results(folder):
    out = folder / "paper"
    document = json.loads((out / "metrics.json").read_text())
    assert document["subsets"] == {"paper": ["phantom_002"], "all": ["phantom_002", "phantom_003"]}
    assert document["reference"] == "MT-SFG"
    for row, seeds in document["methods"].items():
        for seed, cases in seeds.items():
            assert cases == json.loads((seed_folder(folder, row, seed) / "metrics.json").read_text())["cases"]
    assert {name: len(rows) for name, rows in document["tests"].items()} == {"paper": 12, "all": 12}

    table = (out / "table.md").read_text()
    assert "## paper: the first 1 test cases\n" in table
    every = table[table.index("## All 2 test cases\n") :]
    first = every[every.index("(a) CT synthesis: PSNR in mask [dB]") :]
    header, _, *rows = [line for line in first.splitlines() if line.startswith("|")][:7]
    assert header.split("|")[2].strip() == "Overall"
    assert [line.split("|")[1].strip() for line in rows] == list(PAPER_ROWS)
    by_seed = document["methods"]["MT-SFG"]
    values = [
        statistics.mean(by_seed[seed][case]["ct"]["regions"]["overall"]["psnr_in_mask"] for seed in ("0", "5"))
        for case in ("phantom_002", "phantom_003")
    ]
    cell = f"{statistics.mean(values):.2f} ({statistics.stdev(values):.2f})"
    assert rows[-1].split("|")[2].strip(" *") == cell
    assert "With 2 subjects the least p is 2/2^2 = 0.5: no difference" in every

    page = (out / "report.html").read_text()
    names = ["subjects"] + [
        f"{kind} MT-SFG"
        for kind in ("activation_maps", "allocation", "allocation_over_training", "architecture", "entropy")
    ]
    assert sorted(path.stem for path in (out / "figures").iterdir()) == sorted(names)
    assert page.count("<img") == len(names)
    assert page.count("<table") == sum(line.startswith("| ---") for line in table.splitlines())
    assert cell in page
    assert yaml.safe_load((out / "experiment.yaml").read_text())["draws"] == DRAWS


def test_a_finished_experiment_is_only_written_again(folder):
    out = folder / "paper"
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    table = (out / "table.md").read_bytes()
    (out / "table.md").unlink()
    assert main(["experiment", str(folder / "paper.yaml")]) == 0
    assert (out / "table.md").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()} == before


def test_rows_that_learn_otherwise(folder):
    """An ablation is a row like the others, with options of its own; those that are done stay as they are."""
    methods = {**SMALL["methods"], "reinmax": {"method": "sfg", "network.estimator": "reinmax", "objective.lambda2": 1}}
    shutil.copytree(folder / "whole", folder / "ablation")
    assert main(["experiment", write_config(folder, "ablation", **{**SMALL, "methods": methods})]) == 0
    runs = folder / "ablation" / "runs"
    saved = {name: yaml.safe_load((runs / name / "seed_4" / "config.yaml").read_text()) for name in methods}
    assert {name: one["network"]["estimator"] for name, one in saved.items()} == {
        "mask": "straight_through",
        "ours": "straight_through",
        "reinmax": "reinmax",
    }
    assert (saved["ours"]["objective"]["lambda2"], saved["reinmax"]["objective"]["lambda2"]) == (0.001, 1.0)
    done = numbers(folder / "ablation" / "runs")
    assert done.items() >= numbers(folder / "whole" / "runs").items()
    assert json.loads((folder / "ablation" / "metrics.json").read_text())["reference"] == "ours"
    assert (folder / "ablation" / "figures" / "architecture reinmax.png").exists()


def test_rows_that_predict_otherwise(folder):
    """A row may take the runs of another, which are not trained again, and predict in its own way; dropout is drawn."""
    extra = {
        "ours, by draws": {"runs_of": "ours", "by": "draws"},
        "mask, drops": {"method": "constant_mask", "network.dropout": 0.3, "network.shared": 0.5, "by": "draws"},
    }
    shutil.copytree(folder / "whole", folder / "ways")
    config = write_config(folder, "ways", **{**SMALL, "methods": {**extra, **SMALL["methods"]}})
    assert main(["experiment", config]) == 0
    runs, cohort = folder / "ways" / "runs", read_cohort(folder / "cohort")
    assert [path.name for path in (runs / "ours, by draws" / "seed_4").iterdir()] == ["metrics.json"]
    case = cohort.split("test")[0]
    truth = load_case(case, cohort.targets)
    for row, run, by in (
        ("ours", "ours", "map"),
        ("ours, by draws", "ours", "draws"),
        ("mask, drops",) * 2 + ("draws",),
    ):
        saved = json.loads((runs / row / "seed_4" / "metrics.json").read_text())
        network = Predictor(runs / run / "seed_4")
        found = network.volume(truth.inputs, DRAWS, by)
        predicted = {task: parts[""] for task, parts in found.items()}
        expected = case_metrics(network.tasks, truth.targets, predicted, scene_of(truth, cohort.targets))
        assert saved["cases"][case.name] == json.loads(json.dumps(expected))
        assert found["ct"]["uncertainty"].any()
    before = numbers(folder / "ways")
    assert main(["experiment", config]) == 0  # and again, when all is there
    assert numbers(folder / "ways") == before
    assert "ours, by draws by draws" in (folder / "ways" / "table.md").read_text()


# --- killed, stopped, in several processes ----------------------------------------------------------------------------


def killed_at_call(target, name, number, config):
    """The experiment, killed as by kill -9 at the n-th call of a function of a module or class."""
    target = pkgutil.resolve_name(target)
    original, calls = getattr(target, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(target, name, counted)
    main(["experiment", config])


def test_killed_it_goes_on_to_the_same_numbers(folder):
    trainer, run = "sfg_fast.training.trainer:Trainer", "sfg_fast.experiment.run"
    config, out = write_config(folder, "killed", **SMALL), folder / "killed"
    moments = [
        (trainer, "_train_step", 4),  # in the first training
        (run, "_score", 2),  # between its test cases
        (trainer, "_finish", 1),  # at the end of the second training
        (run, "write_results", 1),  # when all is trained
    ]
    finished = []
    for moment in moments:
        assert launch(killed_at_call, *moment, config) == [-signal.SIGKILL]
        finished.append(len(numbers(out)))
    assert finished == [0, 0, 1, 2]
    assert main(["experiment", config]) == 0
    assert numbers(out) == numbers(folder / "whole")
    assert (out / "table.md").read_text() == (folder / "whole" / "table.md").read_text()


def test_sigterm_saves_and_the_same_command_goes_on(folder, monkeypatch, capsys):
    config, step = write_config(folder, "stopped", **SMALL), Trainer._train_step

    def stopped(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        assert main(["experiment", config]) == 143
    assert capsys.readouterr().err.strip().endswith("everything is saved; the same command goes on")
    assert checkpoint.steps(folder / "stopped" / "runs" / "mask" / "seed_4" / "checkpoints")[0].name.endswith("3.pt")
    assert main(["experiment", config]) == 0
    assert numbers(folder / "stopped") == numbers(folder / "whole")


def test_several_processes(folder, monkeypatch, capfd):
    """SIGTERM stops them all; then they come to the same numbers as one."""
    config, wait = write_config(folder, "parallel", **SMALL, processes=2), multiprocessing.connection.wait

    def stopped(*arguments):
        if threading.current_thread() is threading.main_thread():  # in the trainings; preprocessing waits, too
            os.kill(os.getpid(), signal.SIGTERM)
        return wait(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.connection.wait", stopped)
        assert main(["experiment", config]) == 143
    assert not multiprocessing.active_children()
    capfd.readouterr()
    assert main(["experiment", config]) == 0
    bars = capfd.readouterr().err
    assert "experiment:" in bars
    assert "train" not in bars, "those of the processes"
    assert numbers(folder / "parallel") == numbers(folder / "whole")


def test_an_error_in_a_process_is_that_of_the_command(folder, capsys):
    """The folder of a run is a file: one row can't be trained."""
    config = write_config(folder, "broken", **SMALL, processes=2)
    (folder / "broken").mkdir()
    (folder / "broken" / "experiment.yaml").touch()
    (folder / "broken" / "runs").mkdir()
    (folder / "broken" / "runs" / "mask").touch()
    assert main(["experiment", config]) == 2
    assert "runs/mask/seed_4: can't be created" in capsys.readouterr().err.splitlines()[-1]
    assert not multiprocessing.active_children()


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(capsys, arguments, text):
    capsys.readouterr()
    assert main(["experiment", *arguments]) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("sfg-fast: ")
    assert text in last
    assert error.count("sfg-fast: ") == 1


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"train": {**TRAIN, "bias": 0.3}}, "methods['mask']: bias=0.3, but "),
        (
            {"train": {**TRAIN, "schedule": {**TRAIN["schedule"], "steps": 8}}},
            "methods['mask']: schedule.steps=8, but ",
        ),
        ({"methods": {"mask": {"method": "hard_sharing"}}}, "methods['mask']: network.method='hard_sharing', but "),
        ({"methods": {"ours": {"method": "one_task"}}}, "methods['ours']: network.method='one_task', but "),
        ({"methods": {"ours": {"method": "sfg", "network.every": 2}}}, "methods['ours']: network.every=2, but "),
    ],
)
def test_a_changed_configuration_is_named(folder, capsys, changed, text):
    before = numbers(folder / "whole")
    refused(capsys, [write_config(folder, "whole", **{**SMALL, **changed})], text)
    assert numbers(folder / "whole") == before


def test_changed_draws_are_named(folder, capsys):
    refused(capsys, [str(folder / "paper.yaml"), "--draws", "4"], "draws=4: ")


def test_other_metrics_are_named_and_measured_again_without_training(folder, capsys):
    shutil.copytree(folder / "whole", folder / "field")
    options = {**SMALL, "methods": {"mask": SMALL["methods"]["mask"]}, "metrics": "synthrad2025"}
    out, config = folder / "field", write_config(folder, "field", **options)
    scores = out / "runs" / "mask" / "seed_4" / "metrics.json"
    paper = json.loads(scores.read_text())["cases"]
    refused(capsys, [config], f"metrics='synthrad2025': {scores} has 'paper', expected the same (what has no ")
    trained = {path: path.stat().st_mtime_ns for path in scores.parent.rglob("*.pt")}
    scores.unlink()
    assert main(["experiment", config]) == 0
    assert {path: path.stat().st_mtime_ns for path in scores.parent.rglob("*.pt")} == trained
    document, table = json.loads((out / "metrics.json").read_text()), (out / "table.md").read_text()
    assert document["metrics"] == yaml.safe_load((out / "experiment.yaml").read_text())["metrics"] == "synthrad2025"
    assert json.loads((folder / "whole" / "metrics.json").read_text())["metrics"] == "paper"
    cases = json.loads(scores.read_text())["cases"]
    assert document["methods"] == {"mask": {"4": cases}}
    for name, case in cases.items():  # the same predictions, of which nothing is beyond the paper's range
        assert case["ct"]["mae"] == pytest.approx(paper[name]["ct"]["regions"]["overall"]["mae"])
    captions = [line for line in table.splitlines() if line.endswith("; metrics: synthrad2025")]
    assert [line.partition(";")[0] for line in captions] == [
        "Overview: mean (SD over seeds)",
        "(a) CT synthesis",
        "(b) Segmentation of organs: Dice",
        "Spread over seeds of the mean over subjects: mean (SD over seeds)",
    ]
    assert sum(line.startswith("| ---") for line in table.splitlines()) == len(captions)
    assert "| Method | MAE [HU]" in table
    assert "- metrics: synthrad2025\n" in table


def test_a_changed_cohort_is_named(folder, capsys):
    shutil.copytree(folder / "whole", folder / "other")
    path = folder / "other" / "runs" / "ours" / "seed_4" / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "of another cohort"}))
    refused(capsys, [write_config(folder, "other", **SMALL)], "the cohort has changed since this training")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"methods": {"a": {"method": "sluice"}}},
            "methods['a'].method='sluice': expected one of",
        ),
        ({"methods": {"a": {"network.blocks": 2}}}, "methods['a'].method=None: expected one of one_task"),
        ({"methods": {}}, "methods={}: expected at least one row"),
        ({"methods": {"../a": {"method": "sfg"}}}, "methods='../a': expected names that can be folder names"),
        ({"methods": {"/etc/a": {"method": "sfg"}}}, "methods='/etc/a': expected names"),
        ({"methods": {"..": {"method": "sfg"}}}, "methods='..': expected names"),
        ({"methods": {"": {"method": "sfg"}}}, "methods='': expected names"),
        ({"methods": {"a\nb": {"method": "sfg"}}}, "methods='a\\nb': expected names"),
        (
            {"methods": {"a": {"method": "sfg"}, "A": {"method": "sfg"}}},
            "names that differ in more than upper and",
        ),
        ({"methods": {"a": {"method": "sfg", "network.depth": 3}}}, "methods['a']: network.depth=3, expected options"),
        ({"methods": {"a": {"method": "sfg", "seed": 3}}}, "methods['a']: seed=3, expected options"),
        ({"methods": {"a": {"method": "sfg", "network.method": "sfg"}}}, "network.method='sfg', expected options"),
        ({"methods": {"a": {"method": "sfg", "network.blocks": "two"}}}, "methods['a']: "),
        (
            {"methods": {"a": {"method": "sfg", "network.blocks": 0}}},
            "methods['a']: network.blocks=0: expected",
        ),
        ({"methods": {"a": {"method": "sfg", "network.estimator": "x"}}}, "methods['a']: network: "),
        ({"methods": {"a": 3}}, "methods"),
        (
            {"methods": {"a": {"runs_of": "b"}}},
            "methods['a']: runs_of='b', expected the name of a row that has a method",
        ),
        (
            {"methods": {"a": {"runs_of": "a"}}},
            "methods['a']: runs_of='a', expected the name of a row that has a method",
        ),
        (
            {"methods": {"a": {"runs_of": "b", "network.width": 3}, "b": {"method": "sfg"}}},
            "methods['a']: network.width=3, expected runs_of, by and published alone",
        ),
        (
            {"methods": {"a": {"method": "sfg", "by": "luck"}}},
            "methods['a'].by='luck': expected one of map, draws, mode",
        ),
        (
            {"methods": {"a": {"method": "sfg", "network.shared": 0.5}}},
            "shared=0.5: expected it with method constant_mask",
        ),
        ({"methods": {"a": {"method": "sfg", "network.dropout": 1}}}, "network.dropout=1.0: expected a probability"),
        ({"seeds": []}, "seeds=[]: expected at least one number"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: expected"),
        ({"seeds": [-1]}, "seeds=[-1]: expected"),
        ({"reference": "b"}, "reference='b': expected null, or one of One-task"),
        ({"subsets": {"paper": 3}}, "the cohort has 2 test cases"),
        ({"subsets": {"paper": 0}}, "subsets={'paper': 0}: expected"),
        ({"subsets": {"all": 1}}, "subsets={'all': 1}: expected"),
        ({"draws": 0}, "draws=0: expected at least 1"),
        ({"metrics": "mine", "cohort": "nowhere"}, "metrics='mine': expected one of paper, synthrad2025"),
        ({"processes": 0}, "processes=0: expected at least 1"),
        ({"train": {"seed": 1}}, "seed"),
        ({"train": {"schedule": {"steps": 0}}}, "schedule.steps=0: expected at least 1"),
        ({"cohort": "nowhere"}, "nowhere: no such file or folder"),
        ({"cohort": None}, "cohort"),
        ({"speed": 3}, "speed"),
    ],
)
def test_bad_configurations(folder, capsys, options, text):
    refused(capsys, [write_config(folder, "bad", **options)], text)
    assert not (folder / "bad" / "runs").exists()
    shutil.rmtree(folder / "bad", ignore_errors=True)


def test_a_name_that_is_there_twice(folder, capsys):
    path = Path(write_config(folder, "twice"))
    path.write_text(path.read_text() + "methods:\n  a: {method: sfg}\n  a: {method: constant_p}\n")
    refused(capsys, [str(path)], "the key 'a' is there twice, expected once")


def test_a_folder_with_something_else(folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").touch()
    refused(capsys, [write_config(folder, "mine")], "already there and not an empty folder; name a new one")
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.txt"]


def test_two_at_the_same_time(folder, capsys):
    for place in (folder / "whole", folder / "whole" / "runs" / "ours" / "seed_4"):
        final = place / "checkpoints" / "final.pt"
        if final.parent.exists():  # what is to be done again is locked
            final.unlink()
            (place / "metrics.json").unlink()
        with alone_in(place):
            refused(capsys, [write_config(folder, "whole", **SMALL)], f"{place}: another process is writing to it")
    assert main(["experiment", write_config(folder, "whole", **SMALL)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.json", "[]", "it is [], expected an object"),
        ("metrics.json", '{"how": {}}', "there is no 'conventions'"),
        ("config.yaml", "[]", "its configuration is not one of this version"),
        ("config.yaml", b"\xfc", "not text in UTF-8"),
        ("data.json", "{}", "there is no 'in_channels'"),
    ],
)
def test_damaged_files_of_a_job_are_named_before_anything_is_trained(folder, tmp_path, capsys, name, content, said):
    shutil.copytree(folder / "whole", tmp_path / "damaged")
    shutil.copytree(folder / "cohort", tmp_path / "cohort")
    shutil.rmtree(tmp_path / "damaged" / "cache")
    shutil.rmtree(tmp_path / "damaged" / "runs" / "mask")  # what would be trained
    path = tmp_path / "damaged" / "runs" / "ours" / "seed_4" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, [write_config(tmp_path, "damaged", **SMALL)], f"{path}: {said}")
    assert not (tmp_path / "damaged" / "runs" / "mask").exists()


def test_scores_of_other_cases_are_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "whole", tmp_path / "other")
    shutil.copytree(folder / "cohort", tmp_path / "cohort")
    shutil.rmtree(tmp_path / "other" / "cache")
    path = tmp_path / "other" / "runs" / "ours" / "seed_4" / "metrics.json"
    document = json.loads(path.read_text())
    document["cases"]["another"] = document["cases"]["phantom_002"]
    path.write_text(json.dumps({**document, "summary": summarise(document["cases"])}))
    refused(capsys, [write_config(tmp_path, "other", **SMALL)], "its cases are not the cohort's test cases (another is")


def test_no_configuration(capsys):
    refused(capsys, [], "cohort")
    refused(capsys, ["nowhere.yaml"], "nowhere.yaml")


def test_options_beside_the_file(folder):
    """As `train`: what stands on the command line wins."""
    config = write_config(folder, "beside", **SMALL)
    assert main(["experiment", config, "--seeds", "[7]", "--train.schedule.steps", "2"]) == 0
    saved = yaml.safe_load((folder / "beside" / "runs" / "ours" / "seed_7" / "config.yaml").read_text())
    assert (saved["seed"], saved["schedule"]["steps"], saved["schedule"]["batch"]) == (7, 2, 2)
    assert np.isfinite(json.loads((folder / "beside" / "metrics.json").read_text())["tests"]["all"][0]["p"])


def test_a_test_case_with_nothing_to_compare_with_is_refused_before_anything_is_trained(folder, tmp_path, capsys):
    shutil.copytree(folder / "cohort", tmp_path / "cohort")
    case = read_cohort(tmp_path / "cohort").split("test")[1]
    for path in case.targets.values():
        path.unlink()
    assert main(["experiment", write_config(tmp_path, "out", **SMALL)]) == 2
    assert f"test case {case.name} has none of ct, labels to compare with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
