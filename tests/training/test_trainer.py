"""Training runs on a tiny phantom cohort: what they leave behind, resuming to the bit, schedules, refusals."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml

from sfg_fast.data import Cache, preprocess, read_cohort, write_phantom
from sfg_fast.errors import InputError
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.training import checkpoint
from sfg_fast.training.config import NetworkConfig, ObjectiveConfig, ScheduleConfig, TrainConfig, TransferConfig
from sfg_fast.training.run import load_run
from sfg_fast.training.trainer import Trainer, learning_rate_at


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_phantom(folder / "cohort", cases=3, test=1, size=24, slices=6, progress=False)
    preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)
    return folder / "cache"


def config(cache, out, steps=6, **options):
    network = NetworkConfig(width=[3, 4, 4], blocks=1, residual="routed", **options.pop("network", {}))
    schedule = ScheduleConfig(steps=steps, batch=2, **options.pop("schedule", {}))
    defaults = {"log_every": 2, "checkpoint_every": 2}
    return TrainConfig(str(cache), str(out), network=network, schedule=schedule, **{**defaults, **options})


def test_a_run_leaves_everything_behind(cache, tmp_path):
    run = config(cache, tmp_path / "run")
    trainer = Trainer(run)
    trainer.run()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved == dataclasses.asdict(run)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history["groups"] == ["shared", "ct", "organs"]
    assert history["curves"]["step"] == history["allocation"]["step"] == [2, 4, 6]
    layers = sfg_layers(trainer.model)
    assert list(history["allocation"]["p"]) == list(layers)
    for rows in history["allocation"]["p"].values():
        assert all(abs(sum(row) - 1) < 1e-5 for row in rows)
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")
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
    save = first._save

    def killed(drawn_statistics=None):
        save(drawn_statistics)
        if first.step == stop:
            raise KeyboardInterrupt

    first._save = killed
    with pytest.raises(KeyboardInterrupt):
        first.run()
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


def test_heads_start_from_the_mean_ct_and_the_class_frequencies(cache, tmp_path):

    trainer = Trainer(config(cache, tmp_path / "run"))
    bias = trainer.model.heads.conv.bias
    assert bias[0].item() * 400 == pytest.approx(Cache(cache).mean_ct(), rel=1e-5)
    torch.testing.assert_close(
        bias[1:].softmax(0), torch.tensor(Cache(cache).class_frequencies()).float(), atol=1e-5, rtol=0
    )


def test_one_task(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", tasks=["organs"], network={"method": "one_task"}))
    trainer.run()
    assert set(trainer.model.outputs) == {"organs"}


def test_cases_without_a_target_train_the_other_task(tmp_path):
    """One case has no CT, the other no labels: both train. Where there was no target the history has no number."""
    write_phantom(tmp_path / "cohort", cases=3, test=1, size=24, slices=6, progress=False)
    first, second = (case for case in read_cohort(tmp_path / "cohort").cases if case.split == "train")
    first.ct.unlink()
    second.labels.unlink()
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
    run = config(cache, tmp_path / "run")
    run.objective = ObjectiveConfig(ct_noise="heteroscedastic", organs_noise="learned")
    Trainer(run).run()
    case = Cache(cache).case(Cache(cache).names("test")[0])
    found = Predictor(tmp_path / "run").volume(np.ascontiguousarray(case.inputs.swapaxes(0, 1)), 2)
    assert found.ct.shape == found.noise.shape == case.mask.shape
    assert (found.noise > 0).all()
    assert found.labels.max() < 6


def test_constant_p_trains_and_keeps_p(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run", network={"method": "constant_p"}))
    trainer.run()
    for layer in sfg_layers(trainer.model).values():
        torch.testing.assert_close(layer.probabilities(), torch.full(layer.logits.shape, 1 / 3))


def test_a_run_killed_at_once_can_be_resumed(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run"))
    assert Trainer(config(cache, tmp_path / "run"), resume=True).step == 0


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
    assert (best.labels == drawn.labels).all()  # the prediction itself is that of argmax p
    assert (best.ct == drawn.ct).all()
    assert not best.uncertainty.any()
    assert 1 < drawn.uncertainty.mean() < 2000


def test_prediction_by_the_mean_over_drawn_architectures(cache, tmp_path):
    from sfg_fast.data import load_case
    from sfg_fast.data.cache import normalise
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
    torch.testing.assert_close(torch.from_numpy(found.ct).double(), ct.mean(0), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(
        torch.from_numpy(found.uncertainty).double(), ct.std(0, correction=0), rtol=1e-3, atol=1e-2
    )
    probabilities = torch.stack([y["organs"].softmax(1) for y in outputs]).mean(0)
    assert (torch.from_numpy(found.labels) == probabilities.argmax(1)).double().mean() > 0.999
    assert (found.ct != predictor.volume(case.inputs, 3).ct).any()


@pytest.mark.parametrize(("by", "draws", "said"), [("mean", 2, "by='mean': expected map"), ("draws", 0, "draws=0")])
def test_predictions_by_something_else_are_refused(cache, tmp_path, by, draws, said):
    Trainer(config(cache, tmp_path / "run", steps=1)).run()
    cases = read_cohort(cache.parent / "cohort").split("test")
    with pytest.raises(InputError, match=said):
        list(Predictor(tmp_path / "run").cases(cases, tmp_path / "out", draws, by))
    assert not (tmp_path / "out").exists()


def test_transfer_from_a_run_and_frozen_filters_through_a_resume(cache, tmp_path):
    Trainer(config(cache, tmp_path / "ct", tasks=["ct"])).run()
    source = load_run(tmp_path / "ct").model
    options = {"transfer": TransferConfig(str(tmp_path / "ct"), freeze=True)}
    whole = Trainer(config(cache, tmp_path / "both", **options))
    whole.run()
    cut = Trainer(config(cache, tmp_path / "cut", **options))
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
        ({"run": "nowhere"}, "nowhere/checkpoints/last.pt: no such checkpoint"),
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
    Trainer(config(cache, tmp_path / "run"))
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(config(cache, tmp_path / "run"))


def test_resume_refuses_another_configuration(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run"))._save()
    with pytest.raises(InputError, match=r"schedule.learning_rate=0.5: the run to resume has 0.003"):
        Trainer(config(cache, tmp_path / "run", schedule={"learning_rate": 0.5}), resume=True)


def test_resume_refuses_a_finished_run(cache, tmp_path):
    Trainer(config(cache, tmp_path / "run", steps=2)).run()
    with pytest.raises(InputError, match="finished"):
        Trainer(config(cache, tmp_path / "run", steps=2), resume=True)


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_cases(cache, tmp_path):
    trainer = Trainer(config(cache, tmp_path / "run"))
    with torch.no_grad():
        trainer.model.heads.conv.weight[:] = torch.nan
    with pytest.raises(FloatingPointError, match="phantom_00"):
        trainer.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["ct", "dose"]}, "tasks="),
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
    state = checkpoint.load(trainer.last_checkpoint)
    other = Trainer(
        dataclasses.replace(run, out=str(tmp_path / "other"), network=NetworkConfig(width=[3, 4, 5], blocks=1))
    )
    with pytest.raises(InputError, match=r"another architecture .*final.0.fixed_assignment"):
        checkpoint.load_weights(other.model, state["model"], trainer.last_checkpoint)
    state["model"]["heads.conv.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"another architecture \('heads.conv.weight' has shape \(1,\)"):
        checkpoint.load_weights(trainer.model, state["model"], trainer.last_checkpoint)


def test_checkpoint_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    torch.save({"version": 99}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="version 99, expected 1"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_can_not_run_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    (tmp_path / "last.pt").write_bytes(pickle.dumps({"version": 1, "model": Evil()}))
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
