"""Several processes against one, and against arithmetic by hand."""

import copy
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn

from sfg_fast.data import Cache, SliceSampler
from sfg_fast.errors import Preempted
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.norm import synchronise
from sfg_fast.training import checkpoint
from sfg_fast.training.parallel import merged_statistics
from sfg_fast.training.trainer import Trainer

from ..processes import launch
from .small_run import config, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data"), cases=6)


def train(run, resume=False):
    Trainer(run, resume).run()


def in_double_precision(run):
    torch.set_default_dtype(torch.float64)
    get = SliceSampler.__getitem__

    def double(sampler, step):
        return {
            name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in get(sampler, step).items()
        }

    SliceSampler.__getitem__ = double
    trainer = Trainer(run)
    trainer.monitored = {k: v.double() if v.is_floating_point() else v for k, v in trainer.monitored.items()}
    trainer.run()


def state(out, name="final.pt"):
    return checkpoint.load(out / "checkpoints" / name)


@pytest.mark.parametrize("residual", ["routed", "separate"])
def test_two_processes_with_one_draw_equal_one_with_the_whole_batch(cache, tmp_path, residual):
    """To 1e-9 after six steps of Adam, with statistics over both processes; 1e-6 is asked for."""
    options = {"network": {"residual": residual, "init": "uniform"}, "same_assignment": True, "foreground": 0.5}
    whole = config(cache, tmp_path / "whole", schedule={"batch": 4}, **dict(options))
    assert launch(in_double_precision, whole) == [0]
    halves = config(cache, tmp_path / "halves", schedule={"batch": 2}, **dict(options))
    assert launch(in_double_precision, halves, count=2) == [0, 0]
    one, two = (state(tmp_path / name, "step_00000006.pt") for name in ("whole", "halves"))
    for name, value in one["model"].items():
        np.testing.assert_allclose(two["model"][name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    found, expected = (run["history"]["curves"] for run in (two, one))
    np.testing.assert_allclose(found["objective"], expected["objective"], rtol=1e-9)
    for name in ("ct/psnr", "organs/dice"):
        np.testing.assert_allclose(found["scores"][name], expected["scores"][name], rtol=1e-9)


def watch_draws(run, folder):
    """Train, and write down what each process drew and ended with."""
    trainer, draws = Trainer(run), []
    layer = next(iter(sfg_layers(trainer.model).values()))
    layer.register_forward_hook(lambda module, inputs, y: draws.append(y.groups.assignment.tolist()))
    for _ in range(4):
        trainer._train_step()
        trainer.step += 1
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()
    grads = [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    (folder / f"{trainer.processes.rank}.json").write_text(
        json.dumps({"draws": draws, "weights": weights, "none": grads})
    )
    trainer._save()


@pytest.mark.parametrize("same", [False, True])
def test_each_process_draws_its_own_assignment_and_weights_agree(cache, tmp_path, same):
    run = config(cache, tmp_path / "run", network={"init": "uniform"}, same_assignment=same)
    assert launch(watch_draws, run, tmp_path, count=2) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["draws"] == second["draws"]) == same
    assert first["weights"] == second["weights"]
    assert first["none"] == second["none"] == []  # every parameter got a gradient
    saved = state(tmp_path / "run", "step_00000004.pt")
    own = [process["statistics"] for process in saved["processes"]]
    counted = [name for name in own[0] if name.endswith("draws")]
    assert counted
    for name in counted:
        draws = np.stack([one[name] for one in own])
        assert draws.sum() == 2 * 4 * draws.shape[2]
        for kind in ("mean", "var"):
            key = name.replace("draws", f"running_{kind}")
            values = np.stack([one[key] for one in own])
            seen = draws.sum(0) > 0
            expected = (values * draws).sum(0)[seen] / draws.sum(0)[seen]
            np.testing.assert_allclose(saved["model"][key].numpy()[seen], expected, rtol=1e-6)
        assert ((saved["model"][name].numpy() > 0) == (draws.sum(0) > 0)).all()


def test_gradients_are_the_mean_of_what_each_process_has(cache, tmp_path):
    """By hand: the gradients of both draws and half batches, in one process."""
    run = config(cache, tmp_path / "run", network={"init": "uniform"})
    assert launch(save_gradients, run, tmp_path, count=2) == [0, 0]
    together, each = (torch.load(tmp_path / name, weights_only=True) for name in ("averaged.pt", "own.pt"))
    for name, value in together.items():
        torch.testing.assert_close(value, (each[0][name] + each[1][name]) / 2, rtol=1e-5, atol=1e-7)


def save_gradients(run, folder):
    trainer = Trainer(run)
    trainer.model.train()
    generator = torch.get_rng_state()
    batch = trainer.sampler[0]
    trainer.loss.module(batch)[0].backward()
    own = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    torch.set_rng_state(generator)
    trainer.loss(batch)[0].backward()
    every = trainer.processes.gathered(own)
    if trainer.processes.main:
        torch.save({name: trainer.model.get_parameter(name).grad for name in own}, folder / "averaged.pt")
        torch.save(every, folder / "own.pt")


def test_a_bad_step_is_left_out_by_all_and_names_the_case_of_one(cache, tmp_path):
    """One case has a NaN: whichever process meets it, both leave the step out, and nobody else is blamed."""
    shutil.copytree(cache, tmp_path / "bad")
    spoilt = np.load(tmp_path / "bad" / "phantom_002" / "inputs.npy", mmap_mode="r+")
    spoilt[:, ..., 3] = np.nan
    spoilt.flush()
    run = config(tmp_path / "bad", tmp_path / "run", steps=5, schedule={"batch": 1})
    assert launch(train, run, count=2) == [0, 0]
    found = state(tmp_path / "run")
    parts = [SliceSampler(Cache(cache), "train", 1, None, 0, rank=rank, ranks=2) for rank in (0, 1)]
    met = [step for step in range(5) if "phantom_002" in (parts[0][step]["case"] + parts[1][step]["case"])]
    assert found["history"]["bad_steps"] == [{"step": step, "cases": ["phantom_002"]} for step in met]
    assert met
    assert all(torch.isfinite(value).all() for value in found["model"].values())


@pytest.mark.parametrize(("norm", "size"), [(nn.BatchNorm2d, (4, 5)), (nn.BatchNorm3d, (3, 4, 5))])
def test_a_synchronised_norm_of_one_process_is_torch_s(tmp_path, norm, size, float64):
    plain = norm(3)
    nn.init.normal_(plain.weight)
    ours = nn.Sequential(copy.deepcopy(plain))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        synchronise(ours)
        assert type(ours[0]) is not norm
        x = torch.randn(2, 3, *size, requires_grad=True)
        results = [(y := one(x), torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), x)[0])
                   for one in (plain, ours)]  # fmt: skip
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(ours[0].state_dict(), plain.state_dict())
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_merging_the_statistics_of_one_process_changes_nothing():
    own = {"norm.running_mean": torch.randn(3, 4)}
    assert merged_statistics([own]) is own


def stop_in_the_middle(run):
    """As a cluster: SIGTERM to every process, here at the end of step 3."""
    trainer = Trainer(run)
    step = trainer._train_step

    def watched():
        if trainer.step == 2 and trainer.processes.main:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer._train_step = watched
    try:
        trainer.run()
    except Preempted:
        sys.exit(143)


@pytest.mark.parametrize("options", [{}, {"same_assignment": True, "schedule": {"accumulate": 2}}])
def test_two_processes_resume_to_the_bit(cache, tmp_path, options):
    def run(name, workers=0):
        return config(cache, tmp_path / name, checkpoint_every=4, workers=workers, **copy.deepcopy(options))

    assert launch(train, run("whole"), count=2) == [0, 0]
    assert launch(stop_in_the_middle, run("cut"), count=2) == [143, 143]
    assert checkpoint.newest(tmp_path / "cut" / "checkpoints")[1]["step"] == 3
    assert launch(train, run("cut", workers=len(options) // 2), True, count=2) == [0, 0]
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert whole["history"] == cut["history"]
    for name, value in whole["model"].items():
        assert torch.equal(value, cut["model"][name]), name


def test_another_number_of_processes_resumes_with_a_warning(cache, tmp_path):
    run = config(cache, tmp_path / "run", checkpoint_every=4)
    assert launch(stop_in_the_middle, run, count=2) == [143, 143]
    with pytest.warns(UserWarning, match="of 2 processes, resumed by 1: not to the bit"):
        trainer = Trainer(run, resume=True)
    assert trainer.step == 3


def test_slices_of_processes_do_not_overlap(cache):
    parts = [SliceSampler(Cache(cache), "train", 1, None, 0, rank=rank, ranks=5) for rank in range(5)]
    assert sorted(part[0]["case"][0] for part in parts) == Cache(cache).names("train")  # an epoch
