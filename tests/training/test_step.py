"""The step of training: what it may not do on a GPU, and that captured steps train as eager ones do, to the bit. A tape
stands for a CUDA graph here; `benchmarks/gpu_jobs.py` does the same on a GPU."""

import contextlib
import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from sfg_fast import backend
from sfg_fast.data import SliceSampler, preprocess, read_cohort
from sfg_fast.errors import InputError, Preempted
from sfg_fast.estimators import ESTIMATORS
from sfg_fast.gates import GroupGates
from sfg_fast.networks.controls import pool_gradients, set_estimator, set_explore, set_noise_on, sfg_layers
from sfg_fast.networks.transfer import _mask_gradient
from sfg_fast.training import checkpoint, graphs, state
from sfg_fast.training import trainer as trainer_module
from sfg_fast.training.run import load_run
from sfg_fast.training.schedule import build_optimiser, load_optimiser, optimiser_state
from sfg_fast.training.step import Statistics, Step, Unread, on_device
from sfg_fast.training.trainer import Trainer

from ..data.small_cohort import small_images
from .small_run import config, killed_behind, make_cache
from .tape import HostRead, NoHostReads, OneDevice, Tape, as_on_a_gpu, pretend_one_gpu
from .test_trainer import spoilt


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data"), cases=6, test=2)


@pytest.fixture(scope="module")
def bad_cache(cache, tmp_path_factory):
    return spoilt(cache, tmp_path_factory.mktemp("bad") / "cache")


@pytest.fixture
def tapes(monkeypatch):
    return pretend_one_gpu(monkeypatch)


# --- no read of the host ----------------------------------------------------------------------------------------------

NETWORKS = [
    *({"estimator": name} for name in ESTIMATORS if name != "none"),
    *({"estimator": name, "every": 2} for name in ("straight_through", "gumbel_softmax")),
    {"residual": "separate"},
    {"residual": "separate", "estimator": "gumbel_softmax", "every": 2},
    {"norm": None},
    {"explore": 0.2, "dropout": 0.2, "noise_on": "p"},
    *({"method": name} for name in ("hard_sharing", "constant_mask", "constant_p", "even_split")),
    {"method": "cross_stitch", "residual": None},
    {"method": "one_task"},
    {"method": "one_task", "residual": "separate"},
]


def without_host_reads(trainer, batch):
    """Two steps, of which the first may read: in it torch and the optimiser make what they need once."""
    trainer._step([batch])
    with as_on_a_gpu(), NoHostReads():
        return trainer._step([batch])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_step_reads_nothing_from_the_device(cache, tmp_path, tapes, network, fixed):
    tasks = ["organs"] if network.get("method") == "one_task" else {"ct": {"noise": "learned"}, "organs": {}}
    trainer = Trainer(config(cache, tmp_path / "run", tasks=tasks, network=network, graph="off"))
    if fixed:
        for layer in sfg_layers(trainer.model).values():
            layer.assign(torch.arange(len(layer.logits)) % layer.logits.shape[1])
    trainer.model.train()
    for step in range(2):  # with every=2 both kinds of steps
        without_host_reads(trainer, trainer.sampler[step])


def on_the_meta_device(trainer, monkeypatch):
    """The step of a trainer whose tensors are on the meta device, and a mini-batch there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know that device
    monkeypatch.setattr(Step, "_change_weights_if", lambda step, good: pool_gradients(step.model))  # nor does Adam
    trainer.loss.to("meta").train()
    optimiser = build_optimiser(trainer.config.schedule, trainer.model, trainer.objective, waits=False)
    step = Step(trainer.loss, trainer.model, optimiser, trainer.config.schedule, trainer._step.targets, waits=False)
    return step, on_device(trainer.sampler[0], torch.device("meta"))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_step_has_no_tensor_in_memory(cache, tmp_path, tapes, monkeypatch, network):
    """On the CPU nobody would notice a tensor that is made there and copied to the device."""
    tasks = ["organs"] if network.get("method") == "one_task" else {"ct": {"noise": "learned"}, "organs": {}}
    trainer = Trainer(config(cache, tmp_path / "run", tasks=tasks, network=network, graph="off"))
    step, batch = on_the_meta_device(trainer, monkeypatch)
    with OneDevice():
        assert step([batch]).good.is_meta


def test_the_mask_of_frozen_filters_is_copied_to_the_device_once():
    parameter = torch.nn.Parameter(torch.ones(2, device="meta"))
    _mask_gradient(parameter, torch.tensor([0.0, 1.0]))
    (parameter * 2).sum().backward()
    with OneDevice():
        (parameter * 2).sum().backward()


@pytest.mark.parametrize("loss", ["gaussian", "rmse"])
def test_a_step_of_images_reads_nothing_from_the_device(tmp_path, tapes, loss):
    preprocess(read_cohort(small_images(tmp_path / "cohort", 20, (32, 32))), tmp_path / "cache", progress=False)
    tasks = {"age": {"kind": "regression", "loss": loss}, "gender": {"kind": "classification"}}
    network = {"name": "vgg", "width": 4, "blocks": None, "residual": None}
    trainer = Trainer(config(tmp_path / "cache", tmp_path / "run", tasks=tasks, network=network, graph="off"))
    trainer.model.train()
    without_host_reads(trainer, trainer.sampler[0])


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.tolist(),
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: torch.repeat_interleave(x[0, 0, 0].long().abs()),
    ],
)
def test_a_step_that_reads_would_be_noticed(cache, tmp_path, tapes, read):
    trainer = Trainer(config(cache, tmp_path / "run", graph="off"))
    trainer._step([trainer.sampler[0]])
    trainer.model.heads.register_forward_hook(lambda module, inputs, y: read(y["ct"].detach()) and None)
    with as_on_a_gpu(), NoHostReads(), pytest.raises(HostRead, match="inside a step"):
        trainer._step([trainer.sampler[0]])


# --- captured steps train as eager ones -------------------------------------------------------------------------------

HARD = {  # three kinds of drawn steps, then fixed groupings; two mini-batches a step; half of the steps is bad
    "network": {"estimator": "gumbel_rao", "every": 3, "dropout": 0.1, "explore": 0.1, "init": "dirichlet"},
    "schedule": {"batch": 1, "accumulate": 2, "draw_until": 0.5},
    "log_every": 3,
    "checkpoint_every": 4,
    "max_bad_steps": 99,
}


def hard(data, out, **options):
    return config(data, out, 16, **{name: options.pop(name, value) for name, value in HARD.items()}, **options)


def content(trainer):
    """All that a run has made: weights, statistics, moments, random numbers, and its history."""
    state = checkpoint.load(checkpoint.steps(trainer.checkpoints)[0])
    return {name: state[name] for name in ("model", "objective", "optimiser", "processes", "history", "best", "step")}


def assert_same(found, expected, where=""):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_same(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}[{number}]")
    else:
        assert found == expected, where


def ran(run, resume=False):
    trainer = Trainer(run, resume)
    trainer.run()
    return trainer


OPTIONS = {
    "hard": {},
    "separate": {"network": {"residual": "separate", "every": 2}},
    "relaxed": {"network": {"estimator": "gumbel_softmax", "every": 2}},
    "constant p": {"network": {"method": "constant_p"}},
    "cross-stitch": {"network": {"method": "cross_stitch", "residual": None}},
    "bfloat16": {"precision": "bfloat16"},
    "learned noise": {"tasks": {"ct": {"noise": "heteroscedastic"}, "organs": {"noise": "learned"}}},
    "validation": {"folds": 4, "fold": 0},
}


# Steps that look at undrawn gates in the first, the second or no mini-batch; and those of a fixed grouping.
KINDS = dict.fromkeys(OPTIONS, 4) | {"separate": 2, "relaxed": 2, "constant p": 1, "cross-stitch": 1}


@pytest.mark.parametrize("name", OPTIONS)
def test_captured_steps_train_as_eager_ones_to_the_bit(bad_cache, tmp_path, tapes, name):
    captured = ran(hard(bad_cache, tmp_path / "captured", graph="on", **OPTIONS[name]))
    eager = ran(hard(bad_cache, tmp_path / "eager", graph="off", **OPTIONS[name]))
    assert 0 < len(eager.history["bad_steps"]) < 16
    assert_same(content(captured), content(eager))
    (tape,) = tapes
    kinds = tape.captures
    assert kinds == KINDS[name]
    assert tape.replays == 16 - kinds  # all but the first step of each kind


def test_a_step_that_the_device_leaves_out_changes_nothing(bad_cache, tmp_path, tapes):
    """Neither weights, nor moments, nor statistics; and the cases to blame are named."""
    trainer = Trainer(hard(bad_cache, tmp_path / "run", schedule={"batch": 2}))
    steps = [step for step in range(16) if "phantom_001" in trainer.sampler[step]["case"]]
    for trainer.step in range(16):
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        optimiser = [value.clone() for one in trainer.optimiser.state.values() for value in one.values()]
        trainer._train_step()
        after = [value for one in trainer.optimiser.state.values() for value in one.values()]
        changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(before[name], value)}
        if trainer.step in steps:
            assert all("learning_steps" in name or "temperature" in name for name in changed)
            assert all(torch.equal(*both) for both in zip(optimiser, after, strict=bool(optimiser)))
        else:
            assert any("running_mean" in name for name in changed)
            assert any("weight" in name for name in changed)
    trainer._read()
    assert trainer.history["bad_steps"] == [{"step": step, "cases": ["phantom_001"]} for step in steps]
    assert steps[0] > 0
    assert tapes[0].replays > len(steps)


def test_a_device_that_decides_trains_as_a_host_that_does(bad_cache, tmp_path, monkeypatch):
    """Another Adam of torch, so to rounding alone: the history is that of a Trainer on the CPU."""
    options = {"network": {"every": 2}, "schedule": {"draw_until": 0.5, "batch": 1, "accumulate": 2}}
    options |= {"max_bad_steps": 99, "log_every": 1}
    with backend("masked"):
        host = ran(config(bad_cache, tmp_path / "host", 8, **options))
    pretend_one_gpu(monkeypatch)
    device = ran(config(bad_cache, tmp_path / "device", 8, **options))
    assert 0 < len(host.history["bad_steps"]) < 8
    assert device.history["bad_steps"] == host.history["bad_steps"]
    for name in ("objective", "learning_rate", "temperature"):
        assert device.history["curves"][name] == pytest.approx(host.history["curves"][name], rel=1e-4, nan_ok=True)


def test_values_are_read_one_step_late(cache, tmp_path, tapes, monkeypatch):
    """But a log has those of its own step."""
    options = {"schedule": {"batch": 1}, "log_every": 4, "checkpoint_every": 4}
    trainer = Trainer(config(cache, tmp_path / "late", 8, **options))
    own, step = [], trainer._step

    def noted(batches):
        outcome = step(batches)
        own.append(outcome.losses[0, 0].item() * len(trainer.sampler))
        return outcome

    trainer._graphs._step = noted  # (a replay does without it)
    monkeypatch.setattr(Tape, "__call__", lambda tape, call: call)
    read = []
    train_step = trainer._train_step
    trainer._train_step = lambda: read.append(train_step()) or read[-1]
    trainer.run()
    assert read[0] == {}
    # At steps 4 and 8 the log has read the outcome; the step behind it finds none that is newer.
    assert [terms["objective"] for terms in read[1:]] == [*own[:3], own[3], *own[4:7]]
    assert trainer.history["curves"]["objective"] == [own[3], own[7]]


def test_a_slow_host_reads_what_its_step_has_told(cache, tmp_path, tapes):
    """A replay writes to the tensors of the step before: what is still unread was copied."""
    trainer = Trainer(config(cache, tmp_path / "run", 8, schedule={"batch": 1, "draw_until": 1.0}))
    for trainer.step in range(4):
        trainer._train_step()
    told = trainer._unread.read().losses[0].tolist()
    trainer.step = 4
    terms = trainer._train_step()
    assert tapes[0].replays == 4
    assert [terms[f"nll/{task}"] for task in trainer.tasks] == told[1:]
    assert trainer._unread.read().losses[0].tolist() != told


class BetweenLogs(NoHostReads):
    """Refuses reads of the host, except inside the functions that `allows` has seen."""

    inside = 0

    def allows(self, function):
        def watched(*arguments):
            self.inside += 1
            try:
                return function(*arguments)
            finally:
                self.inside -= 1

        return watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if self.inside else super().__torch_dispatch__(func, types, args, kwargs)


def test_the_loop_waits_for_nothing_but_the_outcome_of_the_step_before(cache, tmp_path, tapes, monkeypatch, capsys):
    trainer, mode = Trainer(config(cache, tmp_path / "run", 8, log_every=4, checkpoint_every=4)), BetweenLogs()
    for name in ("begin", "_log", "_save", "_validate", "_finish", "_next_batch"):
        setattr(trainer, name, mode.allows(getattr(trainer, name)))
    monkeypatch.setattr(Unread, "read", mode.allows(Unread.read))
    # It fixes the assignment once, and checks temperatures that are in memory on a GPU, too.
    monkeypatch.setattr(trainer_module, "apply_schedule", mode.allows(trainer_module.apply_schedule))
    monkeypatch.setattr(trainer_module.Trainer, "_read", mode.allows(trainer_module.Trainer._read))
    with mode:
        trainer.run()
    assert trainer.history["curves"]["step"] == [4, 8]
    assert "failed" not in capsys.readouterr().err  # neither did the progress bar, of which this is told


@pytest.fixture(scope="module")
def whole(bad_cache, tmp_path_factory):
    """A captured run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend_one_gpu(monkeypatch)
        torch.manual_seed(0)
        return ran(hard(bad_cache, tmp_path_factory.mktemp("whole") / "run"))


@pytest.mark.parametrize("stop", [4, 8, 12])
def test_a_captured_run_resumes_to_the_bit(bad_cache, tmp_path, tapes, whole, stop):
    first = Trainer(hard(bad_cache, tmp_path / "cut"))
    killed_behind(first, stop)
    torch.manual_seed(99)
    second = ran(hard(bad_cache, tmp_path / "cut"), resume=True)
    assert_same(content(second), content(whole))


def test_sigterm_saves_what_was_not_read_yet_and_goes_on_to_the_bit(bad_cache, tmp_path, tapes, whole):
    stop = whole.history["bad_steps"][2]["step"]
    assert (stop + 1) % 3 != 0  # no log would read it
    assert (stop + 1) % 4 != 0
    trainer = Trainer(hard(bad_cache, tmp_path / "run"))
    one_step = trainer._train_step

    def watched():
        if trainer.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step()

    trainer._train_step = watched
    with pytest.raises(Preempted, match=f"saved at step {stop + 1}"):
        trainer.run()
    saved = checkpoint.newest(trainer.checkpoints)[1]["history"]["bad_steps"]
    assert saved == whole.history["bad_steps"][:3]
    again = ran(hard(bad_cache, tmp_path / "run"), resume=True)
    assert_same(content(again), content(whole))


def test_too_many_bad_steps_and_lost_weights_end_a_captured_run(bad_cache, tmp_path, tapes):
    with pytest.raises(FloatingPointError, match=r"\(cases phantom_001\), 3 such steps; lower"):
        ran(hard(bad_cache, tmp_path / "run", max_bad_steps=2))
    trainer = Trainer(hard(bad_cache, tmp_path / "lost", schedule={"batch": 2}))
    with torch.no_grad():
        trainer.model.heads.conv.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 0: .* \(cases phantom_000, phantom_002\), 1 such steps"):
        trainer.run()
    assert trainer.step <= 2


def test_slices_of_other_sizes_have_graphs_of_their_own(bad_cache, tmp_path, tapes, monkeypatch):
    get = SliceSampler.__getitem__

    def cropped(sampler, step):
        size = (24, 20, 16)[step % 3] if sampler.rank_of_test else 24
        batch = get(sampler, step)
        return {
            name: value[..., :size] if name != "case" and value.dim() > 1 else value for name, value in batch.items()
        }

    monkeypatch.setattr(SliceSampler, "__getitem__", cropped)
    monkeypatch.setattr(SliceSampler, "rank_of_test", True, raising=False)
    options = {"schedule": {"batch": 1}, "log_every": 5, "checkpoint_every": 5, "max_bad_steps": 99}
    captured, eager = (ran(config(bad_cache, tmp_path / graph, 24, graph=graph, **options)) for graph in ("on", "off"))
    assert_same(content(captured), content(eager))
    assert tapes[0].captures == 6  # three sizes, drawn and fixed
    assert tapes[0].replays == 24 - 6


def test_only_so_many_kinds_are_captured(cache, tmp_path, tapes, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    captured = ran(hard(cache, tmp_path / "captured"))
    said = [line for line in capsys.readouterr().err.splitlines() if "kinds" in line]
    assert said == ["training has more than 1 kinds of steps; other kinds are not captured, which is slower"]
    assert tapes[0].captures == 1
    assert_same(content(captured), content(ran(hard(cache, tmp_path / "eager", graph="off"))))


@pytest.mark.parametrize("room", [True, False])
def test_without_memory_for_a_first_step_graphs_are_captured_anew(monkeypatch, room):
    """The first step of a kind can't use the memory of the graphs of other kinds."""
    done, tape = [], Tape()
    monkeypatch.setattr(tape, "has_room", lambda: room)
    monkeypatch.setattr(Tape, "__call__", lambda tape, call: done.append("captured") or call)
    module = torch.nn.Linear(1, 1)

    def step(batches):
        done.append(f"step of {len(batches[0]['inputs'])}")

    step.model = step.loss = module
    steps = graphs.CapturedSteps(step, tape, torch.device("cpu"), required=True)
    for size in (1, 1, 2, 1, 2, 1):
        steps([{"inputs": torch.zeros(size)}])
    again = [] if room else ["captured"]
    one, two = "step of 1", "step of 2"
    assert done == [one, "captured", one, two, *again, one, "captured", two, one]


def broken(tapes, after):
    """From its capture number `after` on the newest tape fails in the middle of a step."""
    tape, capture = tapes[-1], tapes[-1].__call__

    class Broken:
        beside, eagerly, has_room = tape.beside, tape.eagerly, tape.has_room

        def __call__(self, call):
            replay = capture(call)
            if tape.captures <= after:
                return replay
            tape.replays = 0
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    return Broken()


@pytest.mark.parametrize("after", [0, 1])
def test_a_step_that_can_not_be_captured_is_told_once_and_done_eagerly(bad_cache, tmp_path, tapes, capsys, after):
    trainer = Trainer(hard(bad_cache, tmp_path / "run"))
    trainer._graphs._capture = broken(tapes, after)
    trainer.run()
    said = [line for line in capsys.readouterr().err.splitlines() if "captured" in line]
    assert said == [
        "the step can't be captured in a CUDA graph (RuntimeError: operation not permitted when stream is capturing); "
        "training goes on without, which is slower"
    ]
    assert_same(content(trainer), content(ran(hard(bad_cache, tmp_path / "eager", graph="off"))))
    assert tapes[0].replays == 0  # since it failed: earlier graphs would draw from another generator
    trainer = Trainer(hard(bad_cache, tmp_path / "on", graph="on"))
    trainer._graphs._capture = broken(tapes, after)
    with pytest.raises(InputError, match=r"graph='on': the step can't be captured \(RuntimeError: operation not"):
        trainer.run()


def test_what_the_host_decides_makes_another_kind():
    """A key for each thing that the forward pass depends on; temperatures are read on the device."""
    from sfg_fast import SFGConv2d

    def layer():
        return SFGConv2d(1, 6, 3)

    changes = [
        lambda one: None,
        lambda one: one.assign([0, 1, 2, 0, 1, 2]),
        lambda one: set_estimator(one, "reinmax"),
        lambda one: set_estimator(one, "straight_through", every=2),
        lambda one: set_estimator(one, "none"),
        lambda one: set_noise_on(one, "p"),
        lambda one: set_explore(one, 0.5),
        lambda one: one.logits.requires_grad_(False),
        lambda one: setattr(one, "sampling", True),
        lambda one: (set_estimator(one, "straight_through", every=2), setattr(one, "phase", 1)),
    ]
    keys = []
    for change in changes:
        one = layer()
        change(one)
        keys.append(one.host_decides(1))
    assert len(set(keys)) == len(keys)
    one = layer()
    one.temperature = 0.3
    assert one.host_decides(1) == keys[0]
    assert isinstance(one, GroupGates)


# --- the optimiser's state on other devices ---------------------------------------------------------------------------


def test_a_checkpoint_goes_from_one_gpu_to_the_cpu_and_back(cache, tmp_path, monkeypatch):
    """Learning rates are numbers in it, and nothing tells which Adam has written it."""
    options = {"schedule": {"batch": 1}, "precision": "float32"}
    with backend("masked"):
        Trainer(config(cache, tmp_path / "cpu", 4, **options)).run()
    with monkeypatch.context() as patch:
        pretend_one_gpu(patch)
        Trainer(config(cache, tmp_path / "gpu", 4, **options)).run()
    saved = {name: checkpoint.newest(tmp_path / name / "checkpoints")[1]["optimiser"] for name in ("cpu", "gpu")}
    for on_gpu, on_cpu in zip(*(saved[name]["param_groups"] for name in ("gpu", "cpu")), strict=True):
        assert type(on_gpu["lr"]) is float
        assert on_gpu["lr"] == pytest.approx(on_cpu["lr"], rel=1e-6)
        assert on_gpu | {"lr": 0} == on_cpu | {"lr": 0}
    for number, moments in saved["cpu"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(saved["gpu"]["state"][number][name], value, rtol=1e-2, atol=1e-4)
    for name in ("cpu", "gpu"):
        (tmp_path / name / "checkpoints" / "final.pt").unlink()
        (tmp_path / name / "checkpoints" / "step_00000004.pt").unlink()
    with backend("masked"):
        trainer = ran(config(cache, tmp_path / "gpu", 4, **options), resume=True)
    assert {group["fused"] for group in trainer.optimiser.param_groups} == {None}
    pretend_one_gpu(monkeypatch)
    trainer = ran(config(cache, tmp_path / "cpu", 4, **options), resume=True)
    assert {group["fused"] for group in trainer.optimiser.param_groups} == {True}
    assert all(isinstance(group["lr"], torch.Tensor) for group in trainer.optimiser.param_groups)
    ends = [checkpoint.newest(tmp_path / name / "checkpoints")[1]["model"] for name in ("cpu", "gpu")]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_moments_get_the_layout_of_the_parameter_and_rates_stay_the_same_tensors():
    """A checkpoint of a CPU is contiguous, a network on a GPU is channels_last; torch's fused Adam wants one layout."""
    from sfg_fast import SFGConv2d

    plain, last = SFGConv2d(3, 6, 3), SFGConv2d(3, 6, 3).to(memory_format=torch.channels_last)
    optimisers = [
        build_optimiser(config("", "").schedule, one, torch.nn.Identity(), one is plain) for one in (plain, last)
    ]
    plain(torch.randn(1, 3, 8, 8)).packed.square().mean().backward()
    optimisers[0].step()
    rates = [group["lr"] for group in optimisers[1].param_groups]
    load_optimiser(optimisers[1], optimiser_state(optimisers[0]))
    moments = optimisers[1].state[last.weight]
    assert moments["exp_avg"].stride() == last.weight.stride() != plain.weight.stride()
    assert torch.equal(moments["exp_avg"], optimisers[0].state[plain.weight]["exp_avg"])
    assert all(group["lr"] is rate for group, rate in zip(optimisers[1].param_groups, rates, strict=True))
    assert {group["fused"] for group in optimisers[1].param_groups} == {True}


def test_statistics_are_read_and_written_as_they_are(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", network={"residual": "separate"}))
    statistics = Statistics(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    taken = statistics.values()
    assert {one.dtype for one in taken} == {torch.float32, torch.int64}
    trainer._train_step()
    assert not torch.equal(taken[0], statistics.values()[0])
    statistics.write(taken)
    for name, value in trainer.model.state_dict().items():
        if "running" in name or "pooled" in name or "draws" in name or "tracked" in name:
            assert torch.equal(before[name], value), name


# --- the precision ----------------------------------------------------------------------------------------------------


def test_auto_is_bfloat16_where_a_gpu_has_it_and_stays_so(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "has_bfloat16", lambda device: True)
    run = config(cache, tmp_path / "run", 4)
    trainer = Trainer(run)
    assert trainer.config.precision == trainer.loss.precision == "bfloat16"
    trainer.begin()
    monkeypatch.setattr(state, "has_bfloat16", lambda device: False)  # on another device
    assert Trainer(config(cache, tmp_path / "new")).config.precision == "float32"
    for precision in ("auto", "bfloat16"):
        again = Trainer(dataclasses.replace(run, precision=precision), resume=True)
        assert again.config.precision == again.loss.precision == "bfloat16"
    with pytest.raises(InputError, match="precision='float32': the run to resume has 'bfloat16', expected the same"):
        Trainer(dataclasses.replace(run, precision="float32"), resume=True)
    again = Trainer(run, resume=True)
    again.run()
    assert load_run(tmp_path / "run").config.precision == "bfloat16"
    assert "precision: bfloat16" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("known", "capability", "expected"), [(True, (8, 0), True), (True, (7, 5), False), (False, (9, 0), False)]
)
def test_bfloat16_is_taken_where_the_gpu_multiplies_it(monkeypatch, known, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: known)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert state.has_bfloat16(torch.device("cuda", 0)) == expected
    assert not state.has_bfloat16(torch.device("cpu"))


def test_images_on_a_gpu_are_channels_last():
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = {
        "inputs": torch.zeros(2, 3, 4, 4),
        "labels": torch.zeros(2, 4, 4),
        "has_ct": torch.ones(2),
        "case": ["a", "b"],
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = on_device(batch, torch.device("cuda", 0))
    assert moved["inputs"].device.type == "cuda"
    assert moved["inputs"].is_contiguous(memory_format=torch.channels_last)
    assert moved["labels"].is_contiguous()
    assert moved["case"] == ["a", "b"]
    assert on_device(batch, torch.device("cpu"))["inputs"] is batch["inputs"]


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


class PretendedCuda:
    """Notes what is asked of torch.cuda. A graph is what `call` did between the begin and the end of its capture."""

    def __init__(self, monkeypatch, fails=False):
        self.free = 599
        self.told, self.now, self.fails = [], "default", fails
        generator = SimpleNamespace(
            clone_state=lambda: "state", graphsafe_set_state=lambda state: self.told.append("generator repaired")
        )
        pretended = {
            "Stream": lambda device=None: self.stream("side"),
            "current_stream": lambda device=None: self.stream(self.now),
            "stream": lambda stream: self.on(stream.name),
            "set_stream": lambda stream: self.told.append(f"back on {stream.name}"),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 700,
            "empty_cache": lambda: self.told.append("emptied"),
            "mem_get_info": lambda device: (self.free, 1000),
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.told.append(f"replayed on {self.now}")),
            "graph": self.graph,
            "current_device": lambda: 0,
            "default_generators": [generator],
        }
        for name, value in pretended.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.told.append(f"{name} waits for {other.name}"))

    @contextlib.contextmanager
    def on(self, name):
        before, self.now = self.now, name
        yield
        self.now = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, stream.name, capture_error_mode) == ("pool", "side", "thread_local")
        self.told.append("capture")
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_steps_are_captured_on_a_stream_of_their_own_that_waits_and_is_waited_for(monkeypatch):
    cuda = PretendedCuda(monkeypatch)
    capture = graphs.CudaCapture(torch.device("cuda", 0))
    with capture.beside():
        replay = capture(lambda: cuda.told.append(f"call on {cuda.now}") or "outcome")
        assert replay() == "outcome"
    assert cuda.told == [
        "side waits for default", "capture", "call on side", "replayed on side", "default waits for side",
    ]  # fmt: skip


def test_after_a_failed_capture_the_generator_is_repaired(monkeypatch):
    cuda = PretendedCuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.CudaCapture(torch.device("cuda", 0))(lambda: None)
    assert cuda.told == ["capture", "back on default", "generator repaired"]


def test_room_is_what_an_eager_step_took(monkeypatch):
    cuda = PretendedCuda(monkeypatch)
    capture = graphs.CudaCapture(torch.device("cuda", 0))
    assert capture.eagerly(lambda: "outcome") == "outcome"
    assert not capture.has_room()
    cuda.free = 600
    assert capture.has_room()
    assert cuda.told == ["emptied", "emptied"]
