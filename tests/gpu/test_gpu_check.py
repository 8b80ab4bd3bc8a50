"""`auto` on CUDA: Triton is taken where a check of this very GPU found it right and faster, and nothing can break it.

The GPU is pretended: its arithmetic is done by Triton's interpreter (pretended_check.py).
"""

import fcntl
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from sfg_fast import backends, cli, gpu_check, kernel_choice, show_config
from sfg_fast.backends import available
from sfg_fast.gpu import gpu_check as checking
from sfg_fast.gpu.checks import products
from sfg_fast.kernel_choice import Choice
from sfg_fast.training.state import TrainingState

GPU = {"device": "NVIDIA Pretended 1", "capability": "9.0", "driver": "1.2", "torch": "2", "triton": "3", "cudnn": 9}
DEVICE = torch.device("cuda", 0)
ALL = frozenset(f"float32/16/{work}" for work in kernel_choice.WORKS)

needs_triton = pytest.mark.skipif(not available("triton"), reason="Triton is not installed")


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A GPU of which nothing is known yet. Returns a dict to change what `describe` says of it."""
    of = {**GPU, "kernels": "abc"}
    monkeypatch.setenv(kernel_choice.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_choice, "describe", lambda device: dict(of))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel_choice.forget()
    yield of
    kernel_choice.forget()


@pytest.fixture
def pretend(monkeypatch):
    """The process that checks does what the mode says."""

    def to(mode):
        monkeypatch.setattr(checking, "COMMAND", [sys.executable, "-m", "tests.gpu.pretended_check", mode])

    return to


def file_of(of):
    return kernel_choice.file_of({**of})


def put(of, wrong=(), **ratios):
    """A result in the cache folder."""
    file = file_of(of)
    file.parent.mkdir(parents=True, exist_ok=True)
    ratios = {name.replace("_", "/", 2): ratio for name, ratio in ratios.items()}
    file.write_text(json.dumps({"of": dict(of), "wrong": dict(wrong), "ratios": ratios, "untimed": {}}))
    return file


# --- the check --------------------------------------------------------------------------------------------------------


@needs_triton
def test_right_and_faster_is_taken_and_remembered(gpu, pretend, monkeypatch):
    pretend("faster")
    choice = gpu_check()
    assert choice.taken == ALL
    assert kernel_choice.chosen(DEVICE) == choice
    kernel_choice.forget()
    assert kernel_choice.chosen(DEVICE) == choice  # from the file
    monkeypatch.setattr(checking, "COMMAND", ["false"])
    assert gpu_check() == choice  # nothing is checked twice
    assert gpu_check(again=True).why.startswith("gpu-check failed")


@needs_triton
@pytest.mark.parametrize("key", ["device", "driver", "torch", "triton", "cudnn", "capability", "kernels"])
def test_a_result_belongs_to_one_gpu_driver_and_version(gpu, key):
    put(gpu, float32_16_selected=0.5)
    assert kernel_choice.chosen(DEVICE).taken == {"float32/16/selected"}
    gpu[key] = "another"
    kernel_choice.forget()
    with pytest.warns(UserWarning, match="sfg-fast gpu-check"):
        assert not kernel_choice.chosen(DEVICE).taken


def test_another_kernel_asks_for_another_check(tmp_path):
    files = kernel_choice.files_that_decide()
    names = {file.name for file in files}
    assert names >= {"rowwalk.py", "config.py", "masked.py", "packing.py", "run.py", "checks.py", "timing.py"}
    assert names >= {"contract.py", "graph.py", "gate_gradient.py", "norm.py"}
    copies = [tmp_path / f"{n}.py" for n in range(len(files))]
    for file, copy in zip(files, copies, strict=True):
        copy.write_bytes(file.read_bytes())
    before = kernel_choice.hash_of(files)
    assert kernel_choice.hash_of(copies) == before
    copies[-1].write_text("# changed\n")
    assert kernel_choice.hash_of(copies) != before


@needs_triton
def test_a_kernel_that_is_wrong_is_never_taken(pretend):
    """Although it is twice as fast."""
    pretend("wrong")
    choice = gpu_check()
    assert choice.taken == frozenset()
    assert "wrong results" in choice.why
    assert "relative errors {'forward'" in choice.why


@needs_triton
def test_a_few_per_cent_are_not_enough(pretend):
    pretend("4 % faster")
    assert gpu_check().taken == frozenset()


@needs_triton
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("crash", "ended with exit code 9 and without a result"),
        ("silent", "ended with exit code 0 and without a result"),
        ("no memory", "CUDA error: out of memory"),
        ("a kernel crashes", "the process died (SIGKILL)"),
        ("not captured", "nothing could be timed"),
    ],
)
def test_a_check_that_fails_leaves_masked_and_one_line(gpu, pretend, capfd, mode, said):
    pretend(mode)
    choice = gpu_check()
    assert choice.taken == frozenset()
    assert choice.why.startswith("gpu-check failed: ")
    assert said in choice.why
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("gpu-check: ") and "job" not in line
    ]
    assert len(lines) == 1
    assert lines[0].endswith("CUDA tensors take `masked`")
    assert not file_of(gpu).exists()
    assert not list(file_of(gpu).parent.glob("*.part"))


@needs_triton
def test_a_folder_that_cannot_be_written(gpu, pretend, tmp_path, capsys):
    pretend("faster")
    (tmp_path / "cache").write_text("a file")
    assert gpu_check().why.startswith("gpu-check failed: ")
    assert str(tmp_path / "cache") in capsys.readouterr().err


@needs_triton
def test_two_at_once(gpu, pretend, capsys):
    pretend("faster")
    file_of(gpu).parent.mkdir(parents=True)
    with file_of(gpu).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert gpu_check().taken == frozenset()
    assert "another process is checking a GPU of this kind; CUDA tensors take `masked`" in capsys.readouterr().err
    assert gpu_check().taken == ALL


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="there is no CUDA device"):
        gpu_check()
    assert cli.main(["gpu-check"]) == 2
    assert "there are 0 CUDA devices here" in capsys.readouterr().err
    assert cli.main(["gpu-check", "--device", "tpu"]) == 2
    assert "device='tpu': expected cuda" in capsys.readouterr().err


@needs_triton
def test_command(gpu, pretend, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    pretend("faster")
    assert cli.main(["gpu-check"]) == 0
    out = capsys.readouterr().out
    assert "float32/16/selected                               0.50   triton" in out
    pretend("crash")
    assert cli.main(["gpu-check"]) == 0  # the result is there
    assert cli.main(["gpu-check", "--again"]) == 1
    assert "sfg-fast: gpu-check: the check of cuda:0 ended with exit code 9" in capsys.readouterr().err


# --- what follows from a result ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"of": 1}',
        '{"of": OF, "ratios": {}, "untimed": {}}',
        '{"of": OF, "wrong": {}, "ratios": {"a": "b"}, "untimed": {}}',
        '{"of": OF, "wrong": null, "ratios": {}, "untimed": {}}',
    ],
)
def test_a_damaged_result_is_none(gpu, content):
    put(gpu).write_text(content.replace("OF", json.dumps(gpu)))
    with pytest.warns(UserWarning, match="not checked"):
        assert not kernel_choice.chosen(DEVICE).taken


def test_a_wrong_check_rules_out_its_precision_alone():
    ratios = {"float16/16/selected": 0.2, "bfloat16/16/selected": 0.3, "bfloat16/64/selected": 0.951}
    choice = kernel_choice.decide({"wrong": {"float16 16->16, ReLU": "off"}, "ratios": ratios, "untimed": {}})
    assert choice.taken == {"bfloat16/16/selected"}
    everything = {"wrong": {"draw of 100 kernels": "off"}, "ratios": ratios, "untimed": {}}
    assert kernel_choice.decide(everything).taken == frozenset()


@pytest.mark.parametrize(("width", "entry"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1000, 128)])
def test_a_width_goes_by_the_next_that_was_timed(width, entry):
    assert kernel_choice.entry("tf32", width, "selected") == f"tf32/{entry}/selected"


def test_nothing_is_known_and_it_is_said_once(gpu, recwarn):
    for _ in range(3):
        assert not kernel_choice.chosen(DEVICE).takes("bfloat16", 64, "selected")
    assert len(recwarn) == 1
    assert "`sfg-fast gpu-check`" in str(recwarn[0].message)


@needs_triton
def test_auto_goes_by_precision_width_and_work(monkeypatch):
    """A CUDA tensor without a GPU: a fake one."""
    from torch._subclasses import FakeTensorMode

    triton, masked = backends.load("triton"), backends.load("masked")
    monkeypatch.setattr(triton, "cannot", lambda x: None)
    kernel_choice.choose(DEVICE, Choice(frozenset({"float32/64/selected", "bfloat16/16/inference"})))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # otherwise fake tensors would start CUDA
    with FakeTensorMode(), products("float32"):
        x, half = (torch.empty(2, 4, 8, 8, device="cuda", dtype=d) for d in (torch.float32, torch.bfloat16))
        assert backends.kernels(x, 64) == (triton, torch.float32)
        assert backends.kernels(x, 16)[0] is masked
        assert backends.kernels(x, 64, learns=True)[0] is masked
        assert backends.kernels(half, 64)[0] is masked
        with torch.no_grad():
            assert backends.kernels(x, 64)[0] is masked
            assert backends.kernels(half, 16)[0] is triton
            with monkeypatch.context() as autocast:
                autocast.setattr(backends, "autocast_dtype", lambda x: torch.bfloat16)
                assert backends.kernels(x, 16) == (triton, torch.bfloat16)
        with products("tf32"):
            assert backends.kernels(x, 64)[0] is masked
        with backends.backend("triton"):
            assert backends.kernels(x, 16)[0] is triton


@needs_triton
def test_triton_draws_where_it_is_taken(monkeypatch):
    log_p = SimpleNamespace(is_cuda=True, device=DEVICE)
    monkeypatch.setattr(backends.load("triton"), "cannot", lambda x: None)
    kernel_choice.choose(DEVICE, Choice())
    assert backends._sampler(log_p, False) == "masked"
    kernel_choice.choose(DEVICE, Choice(ALL))
    assert backends._sampler(log_p, False) == "triton"
    assert backends._sampler(log_p, True) == "masked"  # a compiled graph has plain operations
    with backends.backend("masked"):
        assert backends._sampler(log_p, False) == "masked"
    monkeypatch.setattr(backends, "available", lambda name: name != "triton")  # a choice of another machine
    assert backends._sampler(log_p, False) == "masked"


# --- a training -------------------------------------------------------------------------------------------------------


def training_state(main, lists=None, check="on", gpu=None):
    """Just what chooses kernels: a process, main or not, and what the main one says, of its own GPU."""
    state = TrainingState.__new__(TrainingState)
    state.device, state.config, state.out = DEVICE, SimpleNamespace(gpu_check=check), "RUN"

    def gathered(here):
        return [here] if main else [(lists, gpu or kernel_choice.describe(DEVICE)), here]

    state.processes = SimpleNamespace(main=main, gathered=gathered)
    return state


@needs_triton
def test_the_main_process_checks_and_all_take_what_it_found(pretend, monkeypatch):
    pretend("faster")
    main = training_state(True)
    main._choose_kernels()
    assert kernel_choice.chosen(DEVICE).taken == ALL
    said = main._kernels()[:2]
    monkeypatch.setattr(checking, "COMMAND", ["false"])
    training_state(False, said)._choose_kernels()
    assert kernel_choice.chosen(DEVICE).taken == ALL
    training_state(False, said, gpu={"device": "another"})._choose_kernels()
    assert kernel_choice.chosen(DEVICE) == Choice(why="the processes have different GPUs, drivers or versions")


def test_gpu_check_off(monkeypatch):
    monkeypatch.setattr(checking, "COMMAND", ["false"])
    with pytest.warns(UserWarning, match="not checked"):
        training_state(True, check="off")._choose_kernels()
    assert kernel_choice.chosen(DEVICE).why.startswith(kernel_choice.UNCHECKED)


def test_a_forced_backend_asks_for_no_check(monkeypatch, recwarn):
    monkeypatch.setattr(checking, "COMMAND", ["false"])
    with backends.backend("masked"):
        training_state(True)._choose_kernels()
        assert training_state(True)._kernels() == []
    assert not recwarn


@needs_triton
def test_a_resumed_run_takes_the_kernels_it_had(gpu, capsys):
    """Although a check says something else by now; but not on another GPU, driver or version."""
    put(gpu, float32_16_selected=0.5)
    state = training_state(True)
    for before in (Choice(ALL, "because"), Choice()):
        state._take_kernels([*kernel_choice.as_lists(before), dict(gpu)])
        assert kernel_choice.chosen(DEVICE) == before
    assert not capsys.readouterr().err
    for saved in ([], [sorted(ALL), "because", {**gpu, "driver": "another"}], [[], "", None]):
        state._take_kernels(saved)
        assert kernel_choice.chosen(DEVICE).taken == {"float32/16/selected"}
        assert "its kernels are chosen anew" in capsys.readouterr().err


def test_what_a_trainer_asks_for(tmp_path, monkeypatch):
    """A new run chooses, a resumed one takes what its checkpoint holds."""
    from sfg_fast.training import checkpoint
    from sfg_fast.training.trainer import Trainer
    from tests.training.small_run import config, make_cache

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = []
    monkeypatch.setattr(TrainingState, "_choose_kernels", lambda self: asked.append("new"))
    monkeypatch.setattr(TrainingState, "_take_kernels", lambda self, kernels: asked.append(kernels))
    monkeypatch.setattr(TrainingState, "_kernels", lambda self: [["a"], "why", {"device": "b"}])
    run = config(make_cache(tmp_path), tmp_path / "run")
    Trainer(run).begin()
    assert asked == ["new"]
    assert checkpoint.newest(tmp_path / "run/checkpoints")[1]["kernels"] == [["a"], "why", {"device": "b"}]
    Trainer(run, resume=True).begin()
    assert asked == ["new", [["a"], "why", {"device": "b"}]]


# --- what is pasted into a bug report ---------------------------------------------------------------------------------


def test_show_config(gpu, monkeypatch, capsys):
    properties = SimpleNamespace(name="NVIDIA Pretended 1", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernel_choice, "driver", lambda: "580.1")
    show_config()
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "cuda:0: NVIDIA Pretended 1, capability 9.0, 80 GiB, driver 580.1; auto takes masked: the Triton" in out
    put(gpu, bfloat16_64_selected=0.4)
    kernel_choice.forget()
    show_config()
    out = capsys.readouterr().out
    assert "auto takes triton where that was faster, else masked: gpu-check found" in out
    assert "    bfloat16/64/selected" in out
    assert "cpu: " in out
