"""Training runs on a tiny phantom cohort: what they leave behind, resuming to the bit, schedules, refusals."""

import dataclasses
import json
import math
import shutil
import warnings
import zipfile

import numpy as np
import pytest
import torch
import yaml

from sfg_fast.data import Cache, preprocess, read_cohort, write_phantom
from sfg_fast.errors import InputError, Preempted
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.training import checkpoint
from sfg_fast.training import trainer as trainer_module
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TransferConfig, difference
from sfg_fast.training.folds import make_splits, read_fold
from sfg_fast.training.run import load_run
from sfg_fast.training.schedule import learning_rate_at
from sfg_fast.training.trainer import Trainer

from .small_run import config, killed_behind, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data"))


def newest(trainer):
    return checkpoint.steps(trainer.checkpoints)[0]


def test_a_run_leaves_everything_behind(cache, tmp_path):
    run = config(cache, tmp_path / "run")
    trainer = Trainer(run)
    trainer.run()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved == dataclasses.asdict(dataclasses.replace(run, precision="float32"))  # it was auto
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["groups"] == ["shared", "ct", "organs"]
    assert history["curves"]["step"] == history["allocation"]["step"] == [2, 4, 6]
    layers = sfg_layers(trainer.model)
    assert list(history["allocation"]["p"]) == list(layers)
    for rows in history["allocation"]["p"].values():
        assert all(abs(sum(row) - 1) < 1e-5 for row in rows)
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "final.pt")
    assert state["finished"]
    assert state["step"] == 6
    assert not any(layer.assigned for layer in layers.values())
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    assert not [path for path in (tmp_path / "run").rglob("*") if "part" in path.suffix]


@pytest.mark.parametrize("stop", [2, 4])  # before and after the grouping is fixed
def test_resume_is_exact_to_the_bit(cache, tmp_path, stop):
    whole = Trainer(config(cache, tmp_path / "whole"))
    whole.run()
    first = Trainer(config(cache, tmp_path / "cut"))
    killed_behind(first, stop)
    second = Trainer(config(cache, tmp_path / "cut"), resume=True)
    assert second.step == stop
    torch.manual_seed(99)  # whatever the generator held before
    second = Trainer(config(cache, tmp_path / "cut"), resume=True)
    second.run()
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.history == second.history


def test_weights_and_grouping_learn_and_the_grouping_is_then_fixed(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", steps=10, schedule={"draw_until": 0.5}))
    layer = next(iter(sfg_layers(trainer.model).values()))
    seen = []
    step = trainer._train_step

    def watched():
        before = layer.logits.detach().clone(), layer.weight.detach().clone()
        terms = step()
        seen.append([(a != b).any().item() for a, b in zip(before, (layer.logits, layer.weight), strict=True)])
        return terms

    trainer._train_step = watched
    trainer.run()
    assert [logits for logits, _ in seen] == [True] * 5 + [False] * 5
    assert all(weights for _, weights in seen)


def test_logits_learn_faster_and_are_not_decayed(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", schedule={"warmup": 0, "logits_factor": 7.0}))
    trainer._train_step()
    rates = {group["name"]: group["lr"] for group in trainer.optimiser.param_groups}
    assert rates["logits"] == pytest.approx(7 * rates["weights"])
    assert all(group["weight_decay"] == 0 for group in trainer.optimiser.param_groups)
    weights = {id(p) for group in trainer.optimiser.param_groups if group["name"] == "weights" for p in group["params"]}
    assert not any(id(layer.logits) in weights for layer in sfg_layers(trainer.model).values())


def test_learning_rate_schedule():
    schedule = ScheduleConfig(steps=100, learning_rate=1.0, warmup=10, decay_from=0.5)
    assert learning_rate_at(schedule, 0) == pytest.approx(0.1)
    assert learning_rate_at(schedule, 9) == learning_rate_at(schedule, 50) == 1.0
    assert learning_rate_at(schedule, 75) == pytest.approx(0.05 + 0.95 / 2)
    assert learning_rate_at(schedule, 100) == pytest.approx(0.05)


def test_other_decays():
    polynomial = ScheduleConfig(steps=100, learning_rate=1.0, warmup=0, decay="polynomial", decay_from=0.0)
    assert learning_rate_at(polynomial, 50) == pytest.approx(0.5**0.9)
    assert learning_rate_at(polynomial, 100) == 0
    constant = ScheduleConfig(steps=100, learning_rate=1.0, warmup=0, decay="constant")
    assert learning_rate_at(constant, 99) == 1


def test_heads_start_from_the_mean_ct_and_the_class_frequencies(cache, tmp_path):

    trainer = Trainer(config(cache, tmp_path / "run"))
    bias = trainer.model.heads.conv.bias
    found = {name: target.statistics for name, target in Cache(cache).described("train").items()}
    assert bias[0].item() * 400 == pytest.approx(found["ct"]["mean"], rel=1e-5)
    frequencies = torch.tensor(found["labels"]["frequencies"]).float()
    torch.testing.assert_close(bias[1:].softmax(0), frequencies, atol=1e-5, rtol=0)


def test_one_task(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", tasks=["organs"], network={"method": "one_task"}))
    trainer.run()
    assert set(trainer.model.outputs) == {"organs"}


def test_cases_without_a_target_train_the_other_task(tmp_path):
    """One case has no CT, the other no labels: both train. Where there was no target the history has no number."""
    write_phantom(tmp_path / "cohort", cases=3, test=1, size=24, slices=6, progress=False)
    first, second = (case for case in read_cohort(tmp_path / "cohort").cases if case.split == "train")
    first.targets["ct"].unlink()
    second.targets["labels"].unlink()
    preprocess(read_cohort(tmp_path / "cohort"), tmp_path / "cache", progress=False)
    trainer = Trainer(config(tmp_path / "cache", tmp_path / "run", schedule={}, log_every=1))
    trainer.run()
    curves = json.loads((tmp_path / "run" / "history.json").read_text())["curves"]["nll"]
    for task in ("ct", "organs"):
        assert any(value is not None for value in curves[task])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


@pytest.mark.parametrize("network", [{"estimator": "reinmax", "every": 2}, {"estimator": "gumbel_rao"}])
def test_every_estimator_can_be_configured(cache, tmp_path, network):
    trainer = Trainer(config(cache, tmp_path / "run", network=network))
    before = [layer.logits.clone() for layer in trainer._layers()]
    trainer.run()
    assert all((a != b.logits).any() for a, b in zip(before, trainer._layers(), strict=True))


def test_predicted_noise(cache, tmp_path):
    tasks = {"ct": {"noise": "heteroscedastic"}, "organs": {"noise": "learned"}}
    Trainer(config(cache, tmp_path / "run", tasks=tasks)).run()
    case = Cache(cache).case(Cache(cache).names("test")[0])
    found = Predictor(tmp_path / "run").volume(np.ascontiguousarray(case.inputs.swapaxes(0, 1)), 2)
    assert found["ct"][""].shape == found["ct"]["noise"].shape == case.mask.shape
    assert (found["ct"]["noise"] > 0).all()
    assert found["organs"][""].max() < 6


def test_constant_p_trains_and_keeps_p(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", network={"method": "constant_p"}))
    trainer.run()
    for layer in sfg_layers(trainer.model).values():
        torch.testing.assert_close(layer.probabilities(), torch.full(layer.logits.shape, 1 / 3))


def test_a_run_killed_at_once_can_be_resumed(cache, tmp_path, monkeypatch):
    def killed(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(cache, tmp_path / "run")).run()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 0
    assert Trainer(config(cache, tmp_path / "run"), resume=True).step == 0


@pytest.mark.parametrize("resume", [False, True])
def test_making_a_trainer_writes_nothing(with_val, tmp_path, resume):
    """Neither the run's folder nor the cache, into which the folds are written when the run begins."""
    data = copied(with_val, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    trainer = Trainer(config(data, tmp_path / "run", folds=2, fold=0), resume)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    trainer.begin()
    assert (data / "splits_final.json").exists()
    assert (tmp_path / "run" / "config.yaml").exists()
    assert [path.name for path in checkpoint.steps(trainer.checkpoints)] == ["step_00000000.pt"]


def test_making_a_resumed_trainer_writes_nothing(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run")).begin()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    trainer = Trainer(config(cache, tmp_path / "run"), resume=True)
    trainer.begin()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_folder_that_was_taken_since_the_trainer_was_made_is_refused(cache, tmp_path):
    trainers = [Trainer(config(cache, tmp_path / "run"), resume) for resume in (False, False, True)]
    trainers[0].begin()
    for trainer in trainers[1:]:
        with pytest.raises(InputError, match="holds a run already"):
            trainer.begin()
    trainers[0].begin()  # once more: nothing


def test_folds_that_changed_since_the_trainer_was_made_are_refused(with_val, tmp_path):
    data = copied(with_val, tmp_path / "cache")
    trainer = Trainer(config(data, tmp_path / "run", folds=2, fold=0))
    make_splits(Cache(data), 2)
    splits = json.loads((data / "splits_final.json").read_text())
    (data / "splits_final.json").write_text(json.dumps(splits[::-1]))
    with pytest.raises(InputError, match=r"splits_final.json: fold 0 has changed, expected it as it was before"):
        trainer.begin()
    assert not (tmp_path / "run").exists()


def test_statistics_for_draws_are_kept_beside_those_of_the_best_assignment(cache, tmp_path):
    """Mostly shared, separate stacks: argmax p leaves the tasks' streams without a kernel. With its statistics, whose
    variance is zero there, a drawn prediction would be wrong by orders of magnitude."""
    from sfg_fast.data import load_case

    network = {"init": "mostly_shared"}
    run = config(cache, tmp_path / "run", steps=20, network=network)
    run.network.residual = "separate"
    Trainer(run).run()
    predictor = Predictor(tmp_path / "run")
    case = load_case(read_cohort(cache.parent / "cohort").split("test")[0], {})
    best, drawn = predictor.volume(case.inputs, 0), predictor.volume(case.inputs, 8)
    assert (best["organs"][""] == drawn["organs"][""]).all()  # the prediction itself is that of argmax p
    assert (best["ct"][""] == drawn["ct"][""]).all()
    assert not best["ct"]["uncertainty"].any()
    assert 1 < drawn["ct"]["uncertainty"].mean() < 2000


def test_prediction_by_the_mean_over_drawn_architectures(cache, tmp_path):
    from sfg_fast.data import load_case
    from sfg_fast.data.preprocessing import normalise
    from sfg_fast.networks.controls import sampling

    run = config(cache, tmp_path / "run", steps=3)
    Trainer(run).run()
    predictor = Predictor(tmp_path / "run")
    case = load_case(read_cohort(cache.parent / "cohort").split("test")[0], {})
    found = predictor.volume(case.inputs, 3, "draws")
    model = predictor.model  # left with the statistics of draws
    torch.manual_seed(run.seed)
    with torch.no_grad(), sampling(model):
        outputs = [model(torch.from_numpy(normalise(case.inputs)).transpose(0, 1)) for _ in range(3)]
    ct = torch.stack([y["ct"][:, 0] for y in outputs]).double() * 400
    torch.testing.assert_close(torch.from_numpy(found["ct"][""]).double(), ct.mean(0), rtol=1e-5, atol=1e-2)
    uncertainty = torch.from_numpy(found["ct"]["uncertainty"]).double()
    torch.testing.assert_close(uncertainty, ct.std(0, correction=0), rtol=1e-3, atol=1e-2)
    probabilities = torch.stack([y["organs"].softmax(1) for y in outputs]).mean(0)
    assert (torch.from_numpy(found["organs"][""]) == probabilities.argmax(1)).double().mean() > 0.999
    assert (found["ct"][""] != predictor.volume(case.inputs, 3)["ct"][""]).any()


@pytest.mark.parametrize(("by", "draws", "said"), [("mean", 2, "by='mean': expected map"), ("draws", 0, "draws=0")])
def test_predictions_by_something_else_are_refused(cache, tmp_path, by, draws, said):
    Trainer(config(cache, tmp_path / "run", steps=1)).run()
    cohort = read_cohort(cache.parent / "cohort")
    with pytest.raises(InputError, match=said):
        Predictor(tmp_path / "run").cases(cohort, cohort.cases, tmp_path / "out", draws, by)
    assert not (tmp_path / "out").exists()


def test_transfer_from_a_run_and_frozen_filters_through_a_resume(cache, tmp_path):
    Trainer(config(cache, tmp_path / "ct", tasks=["ct"])).run()
    source = load_run(tmp_path / "ct").model
    options = {"transfer": TransferConfig(str(tmp_path / "ct"), freeze=True)}
    whole = Trainer(config(cache, tmp_path / "both", **options))
    whole.run()
    cut = Trainer(config(cache, tmp_path / "cut", **options))
    cut.begin()
    for _ in range(2):
        cut._train_step()
        cut.step += 1
    cut._save()
    cut = Trainer(config(cache, tmp_path / "cut", **options), resume=True)
    cut.run()
    for run in (whole, cut):
        for name, layer in sfg_layers(run.model).items():
            assert torch.equal(layer.weight, sfg_layers(source)[name].weight)  # both of its groups are transferred
        rows = run.model.heads.rows("ct")
        assert torch.equal(run.model.heads.conv.weight[rows], source.heads.conv.weight)
        assert run.model.heads.conv.bias.grad[rows.stop :].any()


@pytest.mark.parametrize(
    ("transfer", "said"),
    [
        ({"freeze": True}, "transfer.run=None: expected the folder of a run"),
        ({"run": "nowhere"}, "nowhere/checkpoints/final.pt: no such checkpoint"),
        ({"run": "ct", "tasks": {"ct": "pet"}}, "ct': tasks: 'pet' is no task of the source, expected one of ct"),
    ],
)
def test_transfers_that_can_not_be_are_refused(cache, tmp_path, monkeypatch, transfer, said):
    monkeypatch.chdir(tmp_path)
    Trainer(config(cache, tmp_path / "ct", steps=1, tasks=["ct"])).run()
    with pytest.raises(InputError, match=said):
        Trainer(config(cache, tmp_path / "run", transfer=TransferConfig(**transfer)))
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run")).begin()
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(config(cache, tmp_path / "run"))


def test_resume_refuses_another_configuration(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run")).begin()
    with pytest.raises(InputError, match=r"schedule.learning_rate=0.5: the run to resume has 0.003"):
        Trainer(config(cache, tmp_path / "run", schedule={"learning_rate": 0.5}), resume=True)


def test_no_tasks_to_transfer_are_others_than_those_of_the_same_name():
    one, other = (dataclasses.asdict(config("data", "out", transfer=TransferConfig("run", t))) for t in ({}, None))
    assert difference(one, other) == ("transfer.tasks", {}, None)
    assert difference(one, {**one, "out": "elsewhere", "workers": 3}) is None


def test_a_norm_that_is_chosen_for_the_network_is_that_of_the_run_before():
    now = dataclasses.asdict(config("data", "out"))
    before = {**now, "network": {**now["network"], "norm": "batch"}}  # of a version without "auto"
    assert difference(now, before) is None
    assert difference(before, now) == ("network.norm", "batch", "auto")


def test_resume_refuses_a_finished_run(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run", steps=2)).run()
    with pytest.raises(InputError, match="finished"):
        Trainer(config(cache, tmp_path / "run", steps=2), resume=True)


# --- onlookers --------------------------------------------------------------------------------------------------------


class Broken:
    """A bar, a board or a figure that fails."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *arguments, **options):
        raise self.error

    def __getattr__(self, name):
        return self


def without(monkeypatch, what, error):
    """Trainer's third argument, and a training in which something that looks on fails."""
    broken = Broken(error)
    if what == "the figure of its progress":
        return broken
    name = {"the progress bar": "_bar", "the tensorboard": "_board"}[what]
    monkeypatch.setattr(Trainer, name, lambda trainer: broken)
    return lambda history, folder: None


ONLOOKERS = ["the figure of its progress", "the progress bar", "the tensorboard"]


@pytest.mark.parametrize("what", ONLOOKERS)
def test_nothing_that_only_looks_on_ends_a_training(cache, tmp_path, monkeypatch, capsys, what):
    observe = without(monkeypatch, what, RuntimeError("no\nroom"))
    trainer = Trainer(config(cache, tmp_path / "run"), False, observe)
    trainer.run()
    assert checkpoint.load(trainer.checkpoints / "final.pt")["step"] == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert [line[line.index(what) :] for line in said] == [
        f"{what} failed (RuntimeError: no room); training goes on without it"
    ]


@pytest.mark.parametrize("what", ONLOOKERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, Preempted])
def test_what_is_no_fault_of_an_onlooker_passes(cache, tmp_path, monkeypatch, what, error):
    observe = without(monkeypatch, what, error())
    with pytest.raises(error):
        Trainer(config(cache, tmp_path / "run"), False, observe).run()


def test_a_tensorboard_without_room_is_told_in_one_line(cache, tmp_path, monkeypatch, capsys):
    """Its thread would print a traceback besides."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    Trainer(config(cache, tmp_path / "run")).run()
    error = capsys.readouterr().err
    assert error.count("the tensorboard failed (OSError: [Errno 28] No space left on device)") == 1
    assert "Traceback" not in error


def test_nobody_has_to_read_what_a_training_says(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", Broken(BrokenPipeError(32, "Broken pipe")))
    run = config(spoilt(cache, tmp_path / "bad"), tmp_path / "run", steps=4, schedule={"batch": 1}, max_bad_steps=4)
    trainer = Trainer(run, False, Broken(RuntimeError("no display")))
    trainer.run()
    assert trainer.history["bad_steps"]
    assert checkpoint.load(trainer.checkpoints / "final.pt")["step"] == 4


def test_a_lost_network_stops_the_run_and_names_the_cases(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run"))
    with torch.no_grad():
        trainer.model.heads.conv.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match="phantom_00"):
        trainer.run()


def spoilt(cache, folder, value=np.nan, file="inputs"):
    """A copy of the cache in which one case has a number that preprocess would have refused."""
    shutil.copytree(cache, folder)
    array = np.load(folder / "phantom_001" / f"{file}.npy", mmap_mode="r+")
    array[:, ..., 3] = value
    array.flush()
    return folder


@pytest.mark.parametrize(("file", "value"), [("inputs", np.nan), ("inputs", np.inf), ("ct", np.nan)])
def test_steps_that_are_not_finite_are_left_out_and_tell_whose_they_were(cache, tmp_path, capsys, file, value):
    """Three cases in batches of one: a third of the steps is bad. Without the spoilt case the weights would be those of
    the good steps alone; here they, and the running statistics, are finite."""
    bad = spoilt(cache, tmp_path / "bad", value, file)
    run = config(bad, tmp_path / "run", steps=8, schedule={"batch": 1}, max_bad_steps=4)
    trainer = Trainer(run)
    trainer.run()
    left_out = trainer.history["bad_steps"]
    batches = [trainer.sampler[step]["case"] for step in range(8)]
    assert [one["step"] for one in left_out] == [step for step in range(8) if batches[step] == ["phantom_001"]]
    assert len(left_out) == 4
    assert all(one["cases"] == ["phantom_001"] for one in left_out)
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
    assert "the gradient is not finite (cases phantom_001); left out, 4 of at most 4" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_steps"] == 4
    run = config(bad, tmp_path / "again", steps=8, schedule={"batch": 1}, max_bad_steps=3)
    with pytest.raises(FloatingPointError, match=r"\(cases phantom_001\), 4 such steps; lower"):
        Trainer(run).run()


def test_a_run_without_a_good_step_is_no_run(cache, tmp_path):
    with pytest.raises(FloatingPointError, match="no step had a finite gradient"):
        Trainer(config(spoilt(cache, tmp_path / "spoilt", file="ct"), tmp_path / "run", steps=2, foreground=0.0)).run()
    assert not (tmp_path / "run" / "checkpoints" / "final.pt").exists()


def test_a_step_that_is_left_out_changes_nothing(cache, tmp_path):
    trainer = Trainer(config(spoilt(cache, tmp_path / "bad"), tmp_path / "run", schedule={"batch": 4}))
    trainer.history["bad_steps"] = []
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._train_step()
    assert trainer.history["bad_steps"][0]["cases"] == ["phantom_001"]
    for name, value in trainer.model.state_dict().items():
        if "learning_steps" not in name:
            assert torch.equal(before[name], value), name
    assert not trainer.optimiser.state


def test_gradients_of_mini_batches_are_averaged_into_a_step(cache, tmp_path):
    """By hand, with the same draws: the mean of the gradients of three mini-batches."""
    run = config(cache, tmp_path / "run", schedule={"accumulate": 3, "clip": 1e9, "pooled": 0})
    trainer = Trainer(run)
    state = torch.get_rng_state()
    trainer._train_step()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    other = Trainer(config(cache, tmp_path / "other", schedule={"accumulate": 3}))
    torch.set_rng_state(state)
    other.model.train()
    for step in range(3):
        other.loss(other.sampler[step])[0].backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, other.model.get_parameter(name).grad / 3, rtol=1e-4, atol=1e-6)


def test_steps_follow_the_mean_gradient_of_a_layer(cache, tmp_path):
    """Of logits alone, and by as much as `schedule.pooled` says: by hand from the gradients without it."""
    found = {}
    for pooled in (0.0, 0.5):
        trainer = Trainer(config(cache, tmp_path / str(pooled), schedule={"pooled": pooled, "clip": 1e9}))
        torch.manual_seed(5)
        trainer._train_step()
        found[pooled] = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    logits = [name for name in found[0.0] if name.endswith("logits")]
    assert logits
    for name, own in found[0.0].items():
        expected = own + 0.5 * len(own) ** 0.5 * own.mean(0) if name in logits else own
        torch.testing.assert_close(found[0.5][name], expected)
        assert name not in logits or not torch.equal(found[0.5][name], own)


def test_bfloat16_trains_with_float32_weights_and_losses(cache, tmp_path):
    from sfg_fast import backend

    with backend("masked"):  # native computes in float32 under autocast
        plain = Trainer(config(cache, tmp_path / "plain"))
        low = Trainer(config(cache, tmp_path / "low", precision="bfloat16"))
        seen = []
        low.model.final[-1].register_forward_hook(lambda module, inputs, y: seen.append(y.packed.dtype))
        torch.manual_seed(5)
        expected = plain._train_step()
        torch.manual_seed(5)
        found = low._train_step()
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert found["objective"] == pytest.approx(expected["objective"], rel=0.02)
    assert found["objective"] != expected["objective"]


@pytest.fixture(scope="module")
def with_val(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("val"), cases=6, test=2)


def test_validation_keeps_the_best(with_val, tmp_path, monkeypatch):
    """The validation split gets worse from the second look on: best.pt is of step 2, final.pt of step 6."""
    worse = iter([3.0, 2.0, 2.5, 2.6])
    real = trainer_module.validate

    def made_up(*arguments):
        sums = real(*arguments)
        value = next(worse)
        return sums | {"nll of ct": value * sums["examples of ct"], "nll of organs": 0 * sums["examples of organs"]}

    monkeypatch.setattr(trainer_module, "validate", made_up)
    run = config(with_val, tmp_path / "run", steps=8, folds=2, fold=1)
    trainer = Trainer(run)
    trainer.run()
    validation = trainer.history["validation"]
    assert (validation["step"], validation["nll"]) == ([2, 4, 6, 8], [3.0, 2.0, 2.5, 2.6])
    best, final = (checkpoint.load(trainer.checkpoints / f"{name}.pt") for name in ("best", "final"))
    assert (best["step"], best["finished"], final["step"]) == (4, True, 8)
    at_4 = checkpoint.load(trainer.checkpoints / "step_00000004.pt")
    for name, value in at_4["model"].items():
        if "running" not in name and "pooled" not in name and "draws" not in name and "fixed" not in name:
            assert torch.equal(best["model"][name], value), name
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["validation"]["best"]["step"], summary["validation"]["last"]["nll"]) == (4, 2.6)
    predictor = {which: Predictor(tmp_path / "run", "cpu", which) for which in ("best", "final")}
    weights = {which: one.model.heads.conv.weight for which, one in predictor.items()}
    assert torch.equal(weights["best"], best["model"]["heads.conv.weight"])
    assert not torch.equal(weights["best"], weights["final"])


def test_validation_is_what_prediction_would_give(with_val, tmp_path):
    """By hand, over the same slices, with the network as it is finished: argmax p and its own statistics."""
    run = config(with_val, tmp_path / "run", folds=2, fold=0, validation_slices=10**6)
    trainer = Trainer(run)
    trainer.run()
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]["last"]
    model = load_run(tmp_path / "run").model.eval()
    squared = voxels = 0.0
    nll = {"ct": [], "organs": []}
    with torch.no_grad():
        for step in range(len(trainer.validation) // 2):
            batch = trainer.validation[step]
            outputs = model(batch["inputs"])
            error = (outputs["ct"].double() * 400 - batch["ct"])[batch["mask"]]
            squared, voxels = squared + error.square().sum().item(), voxels + error.numel()
            unit = (outputs["ct"] - batch["ct"] / 400).square() / 2 + 0.5 * np.log(2 * np.pi)
            nll["ct"].append(unit.mean().item())
            nll["organs"].append(torch.nn.functional.cross_entropy(outputs["organs"], batch["labels"]).item())
    assert last["scores"]["ct/psnr"] == pytest.approx(10 * np.log10(4024**2 / (squared / voxels)), abs=1e-3)
    assert last["nll"] == pytest.approx(np.mean(nll["ct"]) + np.mean(nll["organs"]), rel=1e-4)


def test_validating_moves_nothing(with_val, tmp_path):
    trainers = [Trainer(config(with_val, tmp_path / name, folds=2, fold=0)) for name in ("a", "b")]
    for trainer in trainers:
        torch.manual_seed(1)
        for _ in range(3):
            trainer._train_step()
            trainer.step += 1
            if trainer is trainers[0]:
                trainer._validate()
    for (name, a), b in zip(
        trainers[0].model.state_dict().items(), trainers[1].model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_early_stop_waits_for_the_fixed_grouping(with_val, tmp_path, monkeypatch):
    rising = iter(range(100))
    real = trainer_module.validate
    monkeypatch.setattr(
        trainer_module, "validate", lambda *a: (s := real(*a)) | {"nll of ct": next(rising) * s["examples of ct"]}
    )
    schedule = {"patience": 2, "draw_until": 0.5}
    trainer = Trainer(config(with_val, tmp_path / "run", steps=20, folds=2, fold=0, schedule=schedule))
    trainer.run()
    assert trainer.step == 12  # worse at 4, 6, 8 (still drawn), at 10 and at 12
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_early"]
    assert checkpoint.load(trainer.checkpoints / "final.pt")["finished"]


def test_folds(with_val, tmp_path):
    cache = Cache(with_val)
    make_splits(cache, 2)
    folds = [read_fold(cache, 2, fold) for fold in (0, 1)]
    for fold in folds:
        assert sorted(fold.names("train") + fold.names("val")) == cache.names("train")
        assert not fold.names("test")
    assert sorted(folds[0].names("val") + folds[1].names("val")) == cache.names("train")
    run = config(with_val, tmp_path / "run", folds=2, fold=1)
    trainer = Trainer(run)
    assert trainer.sampler.names == folds[1].names("train")
    assert trainer.validation.names == folds[1].names("val")
    with pytest.raises(InputError, match=r"folds=5: .*has 4 train and val cases, expected at least 5"):
        make_splits(Cache(copied(with_val, tmp_path / "copy")), 5)


def test_folds_that_leave_out_new_cases_warn(with_val, tmp_path):
    make_splits(Cache(with_val), 2)
    path = copied(with_val, tmp_path / "grown") / "splits_final.json"
    splits = json.loads((with_val / "splits_final.json").read_text())
    new = splits[0]["train"].pop()
    path.write_text(json.dumps(splits))
    with pytest.warns(UserWarning, match=rf"splits_final.json: fold 0 leaves out {new} \("):
        assert new not in read_fold(Cache(path.parent), 2, 0).cases
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_fold(Cache(path.parent), 2, 1)


@pytest.mark.parametrize("lacks", ["ct", "labels"])
def test_a_validation_split_without_a_target_validates_the_other_task(tmp_path, lacks):
    write_phantom(tmp_path / "cohort", cases=4, test=1, size=24, slices=6, progress=False)
    first, *others = (case for case in read_cohort(tmp_path / "cohort").cases if case.split == "train")
    first.targets[lacks].unlink()
    preprocess(read_cohort(tmp_path / "cohort"), tmp_path / "cache", progress=False)
    parts = [[first.name], [case.name for case in others]]
    splits = [{"train": parts[1 - i], "val": parts[i]} for i in (0, 1)]
    (tmp_path / "cache" / "splits_final.json").write_text(json.dumps(splits))
    Trainer(config(tmp_path / "cache", tmp_path / "run", folds=2, fold=0)).run()
    last = json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]["last"]
    assert [last["scores"][name] is None for name in ("ct/psnr", "organs/dice")] == [lacks == "ct", lacks == "labels"]
    assert math.isfinite(last["nll"])


def copied(cache, folder):
    shutil.copytree(cache, folder, ignore=shutil.ignore_patterns("splits_final.json"))
    return folder


def test_resume_refuses_another_cohort(cache, tmp_path):
    data = copied(cache, tmp_path / "cache")
    Trainer(config(data, tmp_path / "run")).begin()
    shutil.copytree(data, tmp_path / "moved")
    Trainer(config(tmp_path / "moved", tmp_path / "run"), resume=True)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["cases"]["phantom_000"]["source"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="the cohort has changed since the run began, expected the same"):
        Trainer(config(data, tmp_path / "run"), resume=True)


def test_workers_and_what_is_kept_may_change_on_the_way(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run")).begin()
    assert Trainer(config(cache, tmp_path / "run", keep=1, max_bad_steps=0, workers=2), resume=True).step == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_array_that_is_lost_on_the_way_is_one_clear_line(cache, tmp_path, workers):
    data = copied(cache, tmp_path / "cache")
    trainer = Trainer(config(data, tmp_path / "run", workers=workers))
    for path in data.glob("*/ct.npy"):
        path.unlink()
    with pytest.raises(InputError, match=r"^\S+ct.npy: can't be read .*; preprocess the cohort again$"):
        trainer.run()


def test_waiting_for_slices_is_measured(cache, tmp_path, monkeypatch):
    clock = iter(range(10**6))  # every look at the clock is a second later
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: next(clock))
    trainer = Trainer(config(cache, tmp_path / "run"))
    trainer._train_step()
    assert trainer._waited_share() == 1 / 3  # a step of three looks, the wait between the inner two


def test_without_torchrun_there_is_one_process(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", same_assignment=True))
    assert (trainer.processes.count, trainer.processes.main) == (1, True)
    assert not any(getattr(module, "synchronised", False) for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["ct", "dose"]}, "tasks='dose'"),
        ({"tasks": []}, "tasks="),
        ({"patch": [16]}, "patch="),
        ({"device": "tpu"}, "device='tpu'"),
        ({"log_every": 0}, "log_every=0"),
        ({"schedule": {"learning_rate": -1.0}}, "schedule.learning_rate=-1.0"),
        ({"schedule": {"draw_until": 2.0}}, "schedule.draw_until=2.0"),
        ({"network": {"method": "magic"}}, "method='magic'"),
        ({"network": {"estimator": "reinforce"}}, "estimator='reinforce'"),
        ({"network": {"estimator": "none"}}, "network.estimator='none'"),
        ({"schedule": {"temperature_end": 2.0}}, "schedule.temperature_end=2.0"),
        ({"bias": -0.1}, "bias=-0.1"),
        ({"foreground": 1.5}, "foreground=1.5"),
        ({"gpu_check": "maybe"}, "gpu_check='maybe'"),
        ({"precision": "float16"}, "precision='float16': expected one of auto, float32, bfloat16"),
        ({"graph": "maybe"}, "graph='maybe': expected one of auto, on, off"),
        ({"graph": "on"}, "graph='on': expected auto or off, because steps are captured in one process on a GPU alone"),
        ({"workers": -1}, "workers=-1"),
        ({"keep": 0}, "keep=0"),
        ({"max_bad_steps": -1}, "max_bad_steps=-1"),
        ({"validation_slices": 0}, "validation_slices=0"),
        ({"schedule": {"accumulate": 0}}, "schedule.accumulate=0"),
        ({"schedule": {"decay": "step"}}, "schedule.decay='step'"),
        ({"schedule": {"patience": 0}}, "schedule.patience=0"),
        ({"schedule": {"patience": 3}}, "schedule.patience=3: .* has no case of split val"),
        ({"folds": 1}, "folds=1"),
        ({"fold": 0}, "fold=0: expected null, because folds is"),
        ({"folds": 2, "fold": 2}, "fold=2: expected null, or a number below folds"),
        ({"folds": 2}, "folds=2: a run is one fold, expected fold to be given"),
    ],
)
def test_values_that_can_not_be(cache, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        Trainer(config(cache, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_architecture(cache, tmp_path):
    run = config(cache, tmp_path / "run")
    trainer = Trainer(run)
    trainer._save()
    state = checkpoint.load(newest(trainer))
    other = Trainer(
        dataclasses.replace(run, out=str(tmp_path / "other"), network=NetworkConfig(width=[3, 4, 5], blocks=1))
    )
    with pytest.raises(InputError, match=r"another architecture .*final.0.fixed_gates"):
        checkpoint.load_weights(other.model, state["model"], newest(trainer))
    state["model"]["heads.conv.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"another architecture \('heads.conv.weight' has shape \(1,\)"):
        checkpoint.load_weights(trainer.model, state["model"], newest(trainer))


def test_checkpoint_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save({"version": 99}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=f"version 99, expected {checkpoint.VERSION}"):
        checkpoint.load(tmp_path / "last.pt")


STATE = dict.fromkeys(checkpoint.KEYS)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "step_00000001.pt"
    checkpoint.save(path, {**STATE, "step": 1})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step_00000001.pt: can't be written .no space left"):
        checkpoint.save(path, {**STATE, "step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_the_newest_checkpoints_are_kept_and_nothing_half_written(tmp_path):
    for step in (5, 30, 1000):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {**STATE, "step": step})
    (tmp_path / "step_00001500.pt.77.part").write_bytes(b"half")
    checkpoint.save(tmp_path / "best.pt", STATE)
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "step_00000030.pt", "step_00001000.pt"]
    assert checkpoint.newest(tmp_path)[1]["step"] == 1000


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def one_bit(path):
    """In the middle of a tensor: torch would read it without a word."""
    content = bytearray(path.read_bytes())
    content[content.index(b"needle-in-here") + 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, emptied, one_bit])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    needle = torch.frombuffer(bytearray(b"needle-in-here" * 9), dtype=torch.uint8)
    for step in (1, 2):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {**STATE, "step": step, "model": {"w": needle}})
    damage(checkpoint.step_path(tmp_path, 2))
    with pytest.warns(
        UserWarning, match=r"step_00000002.pt: not a readable checkpoint .*going on from step_00000001.pt"
    ):
        assert checkpoint.newest(tmp_path)[1]["step"] == 1
    damage(checkpoint.step_path(tmp_path, 1))
    with pytest.raises(InputError, match=r"step_00000002.pt: not a readable"):
        checkpoint.newest(tmp_path)


def test_a_bomb_is_refused_before_it_unpacks(tmp_path):
    checkpoint.save(tmp_path / "a.pt", STATE)
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry, source.read(entry))
        target.writestr("archive/data/9", bytes(10**7), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="unpacks to more than its"):
        checkpoint.load(tmp_path / "b.pt")


def test_a_checkpoint_can_not_run_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    (tmp_path / "last.pt").write_bytes(pickle.dumps({"version": 2, "model": Evil()}))
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
