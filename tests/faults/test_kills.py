"""Killed, pre-empted, without disk: an exact resume or one clear error; nothing else is an accepted outcome.

A process is killed at a random call of a random function (tests/processes.py), so also between any two steps of
writing a file; and by the kernel in the middle of a write.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfg_fast.cli import main
from sfg_fast.data import Cache, preprocess, read_cohort
from sfg_fast.errors import InputError, Preempted
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.files import alone_in
from sfg_fast.training import checkpoint
from sfg_fast.training.run import load_run
from sfg_fast.training.trainer import Trainer

from ..processes import launch, moments
from ..training.small_run import config, make_cache

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """cohort, cache, and an uninterrupted run with a validation split."""
    made = tmp_path_factory.mktemp("made")
    make_cache(made, cases=6, test=2)
    assert launch(train, a_run(made, made / "whole")) == [0]
    return made


def a_run(made, out, **options):
    return config(made / "cache", out, folds=2, fold=0, seed=3, **options)


def train(run, resume=True):
    Trainer(run, resume).run()


def write_cache(made, out, processes=1):
    preprocess(read_cohort(made / "cohort"), out, progress=False, processes=processes)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_run(a, b):
    """Losses, weights, statistics and everything else, to the bit."""
    for name in ("final.pt", "best.pt"):
        one, two = (checkpoint.load(out / "checkpoints" / name) for out in (a, b))
        assert one["history"] == two["history"]
        assert one["model"].keys() == two["model"].keys()
        for part in ("model", "drawn_statistics", "objective"):
            for key, value in one[part].items():
                assert torch.equal(value, two[part][key]), (name, part, key)
        for group, other in zip(one["optimiser"]["state"].values(), two["optimiser"]["state"].values(), strict=True):
            assert all(torch.equal(value, other[key]) for key, value in group.items())
    assert (a / "history.json").read_bytes() == (b / "history.json").read_bytes()
    assert not [path for path in b.rglob("*") if "part" in path.name]


def kill_training(made, tmp_path, number, seed):
    for moment in moments(tmp_path / "calls", number, seed, train, a_run(made, tmp_path / "counted")):
        out = tmp_path / f"killed_{moment}"
        assert launch(train, a_run(made, out), killed_at=moment) == [KILLED]
        if not (out / "checkpoints" / "final.pt").exists():  # else it was killed when all was done
            assert launch(train, a_run(made, out)) == [0], moment
        same_run(made / "whole", out)


def test_a_killed_training_resumes_to_the_bit(folder, tmp_path):
    kill_training(folder, tmp_path, 4, 0)


@pytest.mark.slow
def test_a_training_killed_at_many_moments_resumes_to_the_bit(folder, tmp_path):
    kill_training(folder, tmp_path, 20, 1)


def kill_preprocess(made, tmp_path, number, seed, processes=1):
    for moment in moments(tmp_path / "calls", number, seed, write_cache, made, tmp_path / "counted", processes):
        out = tmp_path / f"killed_{moment}"
        assert launch(write_cache, made, out, processes, killed_at=moment) == [KILLED]
        if (out / "manifest.json").exists():
            Cache(out)  # whole, though the process did not live to see it
        assert launch(write_cache, made, out, processes) == [0], moment
        assert contents(out) == contents(tmp_path / "counted")


def test_a_killed_preprocess_goes_on(folder, tmp_path):
    kill_preprocess(folder, tmp_path, 6, 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_preprocess_killed_at_many_moments_goes_on(folder, tmp_path, processes):
    kill_preprocess(folder, tmp_path, 20 if processes == 1 else 5, 3, processes)


def test_a_killed_worker_of_preprocess_is_one_clear_error(folder, tmp_path, monkeypatch, capsys):
    from sfg_fast.data import preprocessing

    monkeypatch.setattr(preprocessing, "_start_worker", killed_soon)
    assert main(["preprocess", str(folder / "cohort"), str(tmp_path / "out"), "--processes", "2"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfg-fast:")]
    assert "a process died, perhaps for want of memory" in line
    monkeypatch.undo()
    write_cache(folder, tmp_path / "out")
    write_cache(folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def killed_soon():
    os.kill(os.getpid(), signal.SIGKILL)


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted(folder):
    """The predictions of an uninterrupted predict."""
    predict(folder, folder / "predictions")
    return folder / "predictions"


def predict(made, out, resume=False):
    cohort = read_cohort(made / "cohort")
    return list(Predictor(made / "whole").cases(cohort, cohort.cases[2:], out, 2, resume=resume))


def predict_by_command(made, out, *options):
    arguments = ["predict", str(made / "whole"), str(made / "cohort"), str(out), "--split", "all", "--draws", "2"]
    return main([*arguments, *options])


def test_a_killed_predict_goes_on(folder, predicted, tmp_path):
    for moment in moments(tmp_path / "calls", 4, 5, predict, folder, tmp_path / "counted"):
        out = tmp_path / f"killed_{moment}"
        assert launch(predict, folder, out, killed_at=moment) == [KILLED]
        predict(folder, out, resume=out.exists())
        assert contents(out) == contents(predicted), moment


def stopped_at(monkeypatch, number, case=2):
    """This process gets the signal while it predicts the n-th case."""
    volume, calls = Predictor.volume, []

    def watched(predictor, *arguments):
        calls.append(1)
        if len(calls) == case:
            os.kill(os.getpid(), number)
        return volume(predictor, *arguments)

    monkeypatch.setattr(Predictor, "volume", watched)
    return calls


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM; --resume goes on"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_stopped_predict_keeps_what_is_complete_and_goes_on(
    folder, tmp_path, monkeypatch, capsys, number, code, said
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped_at(patch, number, case=1)
        assert predict_by_command(folder, out) == code
        assert not out.exists()
    with monkeypatch.context() as patch:
        stopped_at(patch, number)
        assert predict_by_command(folder, out) == code
    assert capsys.readouterr().err.strip().endswith(f"sfg-fast: {said}")
    assert sorted(path.name for path in out.iterdir()) == ["phantom_000", "predictions.json"]
    assert predict_by_command(folder, out) == 2
    assert "not an empty folder; name a new one, or --resume goes on" in capsys.readouterr().err
    calls = stopped_at(monkeypatch, number, case=99)
    assert predict_by_command(folder, out, "--resume") == 0
    assert len(calls) == 5
    assert predict_by_command(folder, tmp_path / "whole") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_resumed_predict_does_again_what_has_changed_and_nothing_else(folder, predicted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(predicted, out)
    (out / ".partial-1-phantom_002").mkdir()  # as a kill leaves it
    told = json.loads((out / "predictions.json").read_text())
    told["cases"]["phantom_003"] = ["0" * 64]
    (out / "predictions.json").write_text(json.dumps(told))
    for name in ("phantom_003", "phantom_004"):
        (out / name / "ct.nii.gz").write_bytes(b"of before")
    shutil.rmtree(out / "phantom_005")
    calls = stopped_at(monkeypatch, signal.SIGTERM, case=99)
    assert [name for name, _ in predict(folder, out, resume=True)] == [f"phantom_00{n}" for n in (2, 3, 4, 5)]
    assert len(calls) == 3  # not phantom_002
    assert contents(out).items() <= contents(predicted).items()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--draws", "3"], "draws is 3 now, the predictions there have 2, expected the same or another folder"),
        (["--by", "draws"], "by is 'draws' now, the predictions there have 'map'"),
        (["--checkpoint", "best"], "checkpoint is 'best' now, the predictions there have 'final'"),
    ],
)
def test_a_resumed_predict_of_another_kind_is_refused(folder, predicted, capsys, options, said):
    before = contents(predicted)
    assert predict_by_command(folder, predicted, "--resume", *options) == 2
    assert f"predictions.json: {said}" in capsys.readouterr().err
    assert contents(predicted) == before


def test_a_resumed_predict_of_another_checkpoint_is_refused(folder, predicted, tmp_path, capsys):
    shutil.copytree(predicted, tmp_path / "out")
    told = json.loads((predicted / "predictions.json").read_text()) | {"digest": "of another"}
    (tmp_path / "out" / "predictions.json").write_text(json.dumps(told))
    assert predict_by_command(folder, tmp_path / "out", "--resume") == 2
    assert "the predictions there have 'of another', expected the same or another folder" in capsys.readouterr().err
    (tmp_path / "out" / "predictions.json").unlink()
    assert predict_by_command(folder, tmp_path / "out", "--resume") == 2
    assert "already there and not an empty folder; name a new one\n" in capsys.readouterr().err


# --- one at a time ----------------------------------------------------------------------------------------------------

NETWORK = ["--network.width", "[3,4,4]", "--network.blocks", "1", "--network.residual", "routed"]
NETWORK += ["--schedule.steps", "4", "--schedule.batch", "2", "--checkpoint-every", "2", "--log-every", "2"]


def command(made, name, out, *options):
    return {
        "train": ["train", "--data", str(made / "cache"), "--out", str(out), *NETWORK],
        "predict": ["predict", str(made / "whole"), str(made / "cohort"), str(out), "--draws", "0"],
    }[name] + list(options)


@pytest.mark.parametrize("name", ["train", "predict"])
@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_two_at_a_time_are_refused(folder, tmp_path, capsys, name, options):
    out = tmp_path / "out"
    with alone_in(out):
        (out / "half.part").touch()
        assert main(command(folder, name, out, *options)) == 2
        assert f"{out}: another process is writing to it" in capsys.readouterr().err
        assert sorted(path.name for path in out.iterdir()) == [".lock", "half.part"]


def test_a_fold_is_for_one_process_at_a_time(folder, tmp_path, capsys):
    with alone_in(tmp_path / "out" / "fold_0"):
        assert main(command(folder, "train", tmp_path / "out", "--folds", "2", "--resume")) == 2
    assert "fold_0: another process is writing to it" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def killed_in_training(arguments):
    step = Trainer._train_step

    def watched(trainer):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    Trainer._train_step = watched
    main(arguments)


def test_a_killed_command_is_resumed_at_once(folder, tmp_path):
    arguments = command(folder, "train", tmp_path / "run")
    assert launch(killed_in_training, arguments) == [KILLED]
    assert (tmp_path / "run" / ".lock").exists()
    assert main([*arguments, "--resume"]) == 0
    assert not (tmp_path / "run" / ".lock").exists()
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "final.pt")["step"] == 4


# --- the disk ---------------------------------------------------------------------------------------------------------


def freeze_with_file_limit(run, out):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    sys.exit(main(["freeze", str(run), str(out)]))


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_the_disk_is_full_when_a_network_is_frozen(folder, tmp_path, ending):
    """torch's own writer would abort the process."""
    if ending == "onnx":
        pytest.importorskip("onnxscript")
    assert launch(freeze_with_file_limit, folder / "whole", tmp_path / f"net.{ending}") == [1]
    assert not list(tmp_path.iterdir())


def with_file_limit(size, killed, run):
    """Files can't grow beyond this: the kernel kills the writer in the middle of a write, or the write fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        Trainer(run, resume=True).run()
    except OSError as error:
        sys.exit(7 if "can't be written" in str(error) and "\n" not in str(error) else str(error))


@pytest.mark.parametrize("killed", [True, False])
def test_the_disk_fills_up_in_the_middle_of_a_checkpoint(folder, tmp_path, killed):
    """Checkpoints grow with the history, so there is a limit at which one still fits and a later one does not."""
    sizes = {path.name: path.stat().st_size for path in (folder / "whole" / "checkpoints").iterdir()}
    limit = (sizes["step_00000002.pt"] + sizes["step_00000004.pt"]) // 2
    assert sizes["step_00000002.pt"] < limit < sizes["step_00000004.pt"]
    out = tmp_path / "run"
    assert launch(with_file_limit, limit, killed, a_run(folder, out)) == [-signal.SIGXFSZ if killed else 7]
    assert checkpoint.newest(out / "checkpoints")[1]["step"] == 2
    assert launch(train, a_run(folder, out)) == [0]
    same_run(folder / "whole", out)


def test_a_full_disk_is_exit_code_1_and_one_line(folder, tmp_path):
    command = [sys.executable, "-m", "sfg_fast.cli", "preprocess", str(folder / "cohort"), str(tmp_path / "out")]
    limit = 5000  # less than one array
    done = subprocess.run(
        [*command, "--processes", "1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sfg-fast:")]
    assert "can't be written" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone"])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(folder, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(folder / "whole", out)
    (out / "checkpoints" / "final.pt").unlink()
    last = out / "checkpoints" / "step_00000006.pt"
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:1000] if damage == "cut" else b"")
    if damage == "gone":
        trainer = Trainer(a_run(folder, out), resume=True)
    else:
        with pytest.warns(UserWarning, match=r"step_00000006.pt: not a readable .* going on from step_00000004.pt"):
            trainer = Trainer(a_run(folder, out), resume=True)
    assert trainer.step == 4
    trainer.run()
    same_run(folder / "whole", out)


def test_a_damaged_final_checkpoint_is_made_again(folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(folder / "whole", out)
    (out / "checkpoints" / "final.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"final.pt: not a readable checkpoint"):
        load_run(out)
    with pytest.warns(UserWarning, match="finishing again"):
        Trainer(a_run(folder, out), resume=True).run()
    same_run(folder / "whole", out)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_sigterm_saves_and_the_run_goes_on_to_the_bit(folder, tmp_path, step):
    out = tmp_path / "run"
    trainer = Trainer(a_run(folder, out))
    one_step = trainer._train_step

    def watched():
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step()

    trainer._train_step = watched
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match=f"stopped by SIGTERM, saved at step {step + 1}; --resume goes on"):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) == before
    trainer = Trainer(a_run(folder, out), resume=True)
    assert trainer.step == step + 1
    trainer.run()
    same_run(folder / "whole", out)


def test_sigterm_is_exit_code_143(folder, tmp_path, monkeypatch, capsys):
    step = Trainer._train_step

    def watched(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    small = ["--network.width", "[3,4,4]", "--network.blocks", "1", "--schedule.batch", "2"]
    assert main(["train", "--data", str(folder / "cache"), "--out", str(tmp_path / "run"), *small]) == 143
    assert "saved at step 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["preprocess", "train"])
def test_an_output_that_can_not_be_written_to(folder, command, capsys):
    """/proc: a place where not even root can make a folder."""
    out = "/proc/sfg_fast_out"
    arguments = {
        "preprocess": ["preprocess", str(folder / "cohort"), out],
        "train": ["train", "--data", str(folder / "cache"), "--out", out, "--network.width", "[3,4,4]"],
    }[command]
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfg-fast:")]
    assert f"{out}: can't be created" in line


def killed_worker(run):
    """One that reads slices, in the middle of the training."""
    trainer = Trainer(run, resume=True)
    step = trainer._train_step

    def watched():
        if trainer.step == 3:
            trainer._batches._workers[0].kill()
            trainer._batches._workers[0].join()
        return step()

    trainer._train_step = watched
    try:
        trainer.run()
    except ChildProcessError as error:
        sys.exit(9 if "a worker that reads ahead died" in str(error) and "\n" not in str(error) else str(error))


def test_a_killed_worker_of_training_is_one_clear_error(folder, tmp_path):
    out = tmp_path / "run"
    options = {"workers": 1, "schedule": {"steps": 30}}  # more than what was read ahead
    assert launch(killed_worker, a_run(folder, out, **options)) == [9]
    assert checkpoint.newest(out / "checkpoints")[1]["step"] >= 2


def torchrun(arguments, restarts, environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "tests" / "faults" / "killed_once.py")]
    place = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=os.environ | place | environment, timeout=300
    )


@pytest.mark.slow
def test_a_killed_process_of_torchrun_is_restarted_and_goes_on_to_the_bit(folder, tmp_path):
    arguments = ["train", "--data", str(folder / "cache"), "--folds", "2", "--fold", "0"]
    arguments += ["--network.width", "[3,4,4]", "--network.blocks", "1", "--schedule.batch", "2"]
    arguments += [
        "--schedule.steps",
        "6",
        "--checkpoint-every",
        "2",
        "--log-every",
        "2",
        "--network.residual",
        "routed",
    ]
    whole = torchrun([*arguments, "--out", str(tmp_path / "whole")], 0, {})
    assert whole.returncode == 0, whole.stderr
    mark = tmp_path / "mark"
    kill = {"KILLED_AT_STEP": "3", "KILLED_MARK": str(mark)}
    killed = torchrun([*arguments, "--out", str(tmp_path / "killed")], 2, kill)
    assert killed.returncode == 0, killed.stderr
    assert mark.exists()
    same_run(tmp_path / "whole", tmp_path / "killed")
    given_up = torchrun([*arguments, "--out", str(tmp_path / "given_up")], 0, kill)
    assert given_up.returncode == 1
    lines = [line for line in given_up.stderr.splitlines() if line.startswith("sfg-fast:")]
    assert all("process 0: another process is gone" in line for line in lines)
    assert checkpoint.newest(tmp_path / "given_up" / "checkpoints")[1]["step"] == 2
