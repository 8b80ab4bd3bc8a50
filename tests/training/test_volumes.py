"""Training on 3-D patches, with a small network in the place of a real one."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from sfg_fast import backend
from sfg_fast.cli import main
from sfg_fast.data import Cache
from sfg_fast.data.targets import Target
from sfg_fast.errors import InputError
from sfg_fast.networks.build import NETWORKS, build
from sfg_fast.tasks import read_tasks
from sfg_fast.training.run import load_run
from sfg_fast.training.step import on_device
from sfg_fast.training.trainer import Trainer
from sfg_fast.training.validation import held_out, scores, tally

from .on_volumes import OnVolumes
from .small_run import config, killed_behind, make_cache
from .tape import pretend_one_gpu

PATCH = [4, 9, 10]
NETWORK = {"name": "volumes", "width": 4, "blocks": None, "residual": None}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("volumes"), cases=4, test=1)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    monkeypatch.setitem(NETWORKS, "volumes", OnVolumes)


def of_patches(cache, out, **options):
    return config(cache, out, **{"patch": PATCH, "network": NETWORK, **options})


def test_a_run_on_patches_resumes_to_the_bit(cache, tmp_path):
    whole = Trainer(of_patches(cache, tmp_path / "whole"))
    assert next(whole._batches_of_step([]))["inputs"].shape == (2, 1, *PATCH)
    whole = Trainer(of_patches(cache, tmp_path / "whole"))
    whole.run()
    killed_behind(Trainer(of_patches(cache, tmp_path / "cut")), 2)
    torch.manual_seed(99)  # whatever the generator held before
    second = Trainer(of_patches(cache, tmp_path / "cut", workers=1), resume=True)
    second.run()
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert whole.history == second.history
    assert all(np.isfinite(whole.history["curves"]["objective"]))
    assert whole.history["curves"]["scores"]["ct/psnr"][-1] > 0
    assert load_run(tmp_path / "whole").config.patch == PATCH


def test_mixed_precision_and_gradients_of_several_batches(cache, tmp_path):
    options = {"precision": "bfloat16", "schedule": {"accumulate": 2}}
    trainer = Trainer(of_patches(cache, tmp_path / "run", steps=2, **options))
    dtypes = []
    trainer.model.heads["ct"].register_forward_hook(lambda module, x, y: dtypes.append(y.dtype))
    trainer._train_step()
    assert dtypes == [torch.bfloat16] * 2
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainer.model.parameters())


def test_on_one_gpu_steps_on_patches_are_replayed(cache, tmp_path, monkeypatch):
    """The pretended GPU refuses a step that the host has to wait for, and replays what it captured of another batch."""
    options = {"schedule": {"draw_until": 1.0}, "precision": "float32", "steps": 4}
    with backend("masked"):
        eager = Trainer(of_patches(cache, tmp_path / "eager", **options))
        eager.run()
    tapes = pretend_one_gpu(monkeypatch)
    captured = Trainer(of_patches(cache, tmp_path / "captured", graph="on", **options))
    captured.run()
    assert (tapes[0].captures, tapes[0].replays) == (1, 3)
    for (name, a), b in zip(eager.model.state_dict().items(), captured.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)


def test_folds_are_validated_on_patches(cache, tmp_path):
    arguments = ["--patch", "[4,9,10]", "--network.name", "volumes", "--network.width", "4", "--schedule.steps", "2"]
    arguments += ["--schedule.batch", "2", "--folds", "3", "--checkpoint_every", "1", "--validation_slices", "4"]
    assert main(["train", "--data", str(cache), "--out", str(tmp_path / "run"), *arguments]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["folds"]) == 3
    assert math.isfinite(summary["summary"]["ct/psnr"]["mean"])


def test_the_held_out_patch_shows_labels_and_stays_the_same(cache):
    first, again = (held_out(Cache(cache), [1, 2, 2]) for _ in range(2))  # few of these show labels by chance
    assert first["inputs"].shape == (1, 1, 1, 2, 2)
    assert first["labels"].any()
    assert all(torch.equal(first[name], again[name]) for name in ("inputs", "labels", "ct", "mask"))


def test_scores_of_patches_are_those_of_their_voxels():
    """As many examples as slices: what belongs to an example must not be taken for what belongs to a slice."""
    ct, labels = Target("ct", "intensities", "HU"), Target("labels", "labels", names={"background": 0, "a": 1, "b": 2})
    tasks = read_tasks(["ct", "organs"], {"ct": ct, "labels": labels})
    shape = (3, 3, 4, 5)
    batch = {
        "ct": 500 * torch.randn(3, 1, *shape[1:]),
        "labels": torch.randint(3, shape),
        "mask": torch.rand(3, 1, *shape[1:]) < 0.5,
        "has_ct": torch.tensor([True, False, True]),
        "has_labels": torch.tensor([True, True, False]),
    }
    outputs = {"ct": torch.randn(3, 1, *shape[1:]), "organs": torch.randn(3, 3, *shape[1:])}
    errors = [
        (400 * float(outputs["ct"][i][place]) - float(batch["ct"][i][place])) ** 2
        for i in (0, 2)
        for place in map(tuple, np.argwhere(batch["mask"][i].numpy()))
    ]
    found = scores(tasks, tally(tasks, outputs, batch))
    assert found["ct/psnr"] == pytest.approx(10 * math.log10(4024**2 / np.mean(errors)), rel=1e-5)
    true, predicted = (one[:2].numpy() for one in (batch["labels"], outputs["organs"].argmax(1)))
    dice = [2 * ((true == k) & (predicted == k)).sum() / ((true == k).sum() + (predicted == k).sum()) for k in (1, 2)]
    assert found["organs/dice"] == pytest.approx(np.mean(dice))


def test_batches_of_patches_keep_their_layout_on_a_gpu():
    """Labels [N, D, H, W] have as many axes as images, but they are none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = {"inputs": torch.zeros(2, 3, 4, 4, 4), "labels": torch.zeros(2, 4, 4, 4)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = on_device(batch, torch.device("cuda", 0))
    assert all(one.device.type == "cuda" and one.is_contiguous() for one in moved.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"network": {}},
            "patch=.4, 9, 10.: expected null, or height and width, because network.name highresnet reads",
        ),
        ({"patch": [4, 0, 9]}, r"patch=\[4, 0, 9\]: expected null, or height and width in voxels, or depth, height"),
        ({"patch": [2, 4, 9, 9]}, r"patch=\[2, 4, 9, 9\]: expected null, or height and width in voxels, or depth"),
        ({"patch": [1, 4, 9]}, "patch is 1 x 4 x 9, expected at least 2 x 2 x 2 for network volumes"),
    ],
)
def test_patches_that_cannot_be_are_refused_before_any_work(cache, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        Trainer(of_patches(cache, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_networks_are_built_for_volumes_where_they_can_be():
    with pytest.raises(ValueError, match="spatial_dims=3: highresnet has no such option"):
        build("highresnet", 1, {"ct": 1}, spatial_dims=3)
    assert build("volumes", 2, {"ct": 1}, spatial_dims=3)(torch.zeros(1, 2, 3, 4, 5))["ct"].shape == (1, 1, 3, 4, 5)


def test_the_unet_is_trained_on_patches(cache, tmp_path):
    network = build("unet", 1, {"ct": 1, "organs": 3}, spatial_dims=3)
    shapes = {task: tuple(y.shape) for task, y in network(torch.randn(2, 1, 16, 16, 16)).items()}
    assert shapes == {"ct": (2, 1, 16, 16, 16), "organs": (2, 3, 16, 16, 16)}
    options = {"patch": [16, 16, 16], "network": dataclasses.asdict(config(cache, "").network) | {"name": "unet"}}
    options["network"] |= {"width": None, "blocks": None, "residual": None}
    trainer = Trainer(config(cache, tmp_path / "run", steps=2, **options))
    trainer.run()
    assert all(np.isfinite(trainer.history["curves"]["objective"]))
