"""Predictions from overlapping 3-D patches, against weighted means that numpy makes voxel by voxel."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from sfg_fast.cli import main
from sfg_fast.data.preprocessing import normalise
from sfg_fast.evaluation.predict import Predictor, count_patches, padded_to
from sfg_fast.evaluation.report import activation_maps
from sfg_fast.networks.build import NETWORKS
from sfg_fast.training.trainer import Trainer

from ..training.on_volumes import OnVolumes
from ..training.small_run import config, make_cache

PATCH = (4, 8, 6)
SIZES = [(4, 8, 6), (9, 13, 11), (3, 5, 4), (2, 17, 6)]


@pytest.fixture(scope="module", autouse=True)
def network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "volumes", OnVolumes)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """FOLDER/cohort, FOLDER/cache and FOLDER/run, trained on patches of PATCH voxels."""
    folder = tmp_path_factory.mktemp("patches")
    network = {"name": "volumes", "width": 4, "blocks": None, "residual": None, "init": "dirichlet"}
    Trainer(config(make_cache(folder), folder / "run", steps=3, patch=list(PATCH), network=network)).run()
    return folder


def predicting(trained, model):
    """The run's predictor with another network in it."""
    predictor = Predictor(trained / "run")
    predictor.model, predictor._statistics = model, {0: {}, 1: {}}
    return predictor


def mr(size):
    return np.random.default_rng(0).gamma(2, 100, (1, *size)).astype(np.float32)


def windows(size):
    """The patches of a volume, half a patch apart, the last of each axis at its end."""
    starts = []
    for length, wanted in zip(size, PATCH, strict=True):
        steps = range(0, max(length - wanted, 0) + wanted // 2, max(1, wanted // 2))
        starts.append(sorted({min(start, max(length - wanted, 0)) for start in steps}))
    return [tuple(slice(a, a + n) for a, n in zip(start, PATCH, strict=True)) for start in itertools.product(*starts)]


def averaged(size, output):
    """The mean of the outputs of all patches. output: the values [D, H, W] of a window. The weight is a Gaussian around
    the patch's centre, of an eighth of its size, and at least a thousandth."""
    axes = [np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (n / 8) ** 2)) for n in PATCH]
    weight = np.einsum("i,j,k->ijk", *axes).clip(1e-3)
    total, weights = np.zeros(size), np.zeros(size)
    for window in windows(size):
        total[window] += weight * output(window)
        weights[window] += weight
    return total / weights


class VoxelByVoxel(nn.Module):
    """Each voxel's outputs depend on that voxel alone."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"ct": nn.Conv3d(1, 1, 1), "organs": nn.Conv3d(1, 6, 1)})

    def forward(self, x):
        return {task: head(x) for task, head in self.heads.items()}


@pytest.mark.parametrize("size", SIZES)
def test_without_context_patches_predict_what_the_whole_volume_does(trained, size):
    """So the weights of all patches sum to one at each voxel, and nothing is shifted."""
    model = VoxelByVoxel()
    found = predicting(trained, model).volume(mr(size), 0)
    x = torch.from_numpy(normalise(mr(size)))[None]
    with torch.no_grad():
        y = {task: head(x)[0] for task, head in model.heads.items()}
    assert found["ct"][""].shape == found["organs"][""].shape == size
    np.testing.assert_allclose(found["ct"][""], 400 * y["ct"][0], rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(found["organs"][""], y["organs"].argmax(0))
    assert not found["ct"]["uncertainty"].any()


class PlaceInPatch(nn.Module):
    """A voxel's output is where in the patch it lies, and the sum of the patch."""

    def forward(self, x):
        place = torch.arange(x[0, 0].numel(), dtype=x.dtype).view(x.shape[2:])
        y = x.sum((1, 2, 3, 4))[:, None, None, None] + place
        return {"ct": y[:, None], "organs": torch.stack([y, *[-y] * 5], 1)}


@pytest.mark.parametrize("size", SIZES)
def test_overlapping_patches_are_averaged_by_a_gaussian(trained, size):
    found = predicting(trained, PlaceInPatch()).volume(mr(size), 0)
    x = normalise(mr(size))[0].astype(np.float64)
    missing = [max(0, wanted - length) for wanted, length in zip(PATCH, size, strict=True)]
    x = np.pad(x, [(n // 2, n - n // 2) for n in missing], constant_values=x.min())
    place = np.arange(np.prod(PATCH)).reshape(PATCH)
    expected = averaged(x.shape, lambda window: x[window].sum() + place)
    inside = tuple(slice(n // 2, n // 2 + length) for n, length in zip(missing, size, strict=True))
    np.testing.assert_allclose(found["ct"][""], 400 * expected[inside], rtol=1e-4, atol=0.05)


class Drawn(nn.Module):
    """Each draw scales the volume by another number."""

    def forward(self, x):
        y = (1 + torch.rand(())) * x
        return {"ct": y, "organs": torch.cat([y, *[torch.zeros_like(y)] * 5], 1)}


def test_all_patches_see_the_same_drawn_architectures(trained):
    predictor, size = predicting(trained, Drawn()), (9, 13, 11)
    found = predictor.volume(mr(size), 5, "draws")
    torch.manual_seed(predictor.config.seed)
    scales = np.array([1 + torch.rand(()).item() for _ in range(5)])
    x = normalise(mr(size))[0]
    np.testing.assert_allclose(found["ct"][""], 400 * scales.mean() * x, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found["ct"]["uncertainty"], 400 * scales.std() * np.abs(x), rtol=1e-3, atol=1e-2)
    before, y = torch.get_rng_state(), np.multiply.outer(scales, x)  # logits of one label; those of five others are 0
    p = np.exp(y) / (np.exp(y) + 5)
    np.testing.assert_allclose(found["organs"]["uncertainty"] ** 2, p.var(0) * (1 + 1 / 5), rtol=1e-2, atol=1e-5)
    predictor.volume(mr(size), 5, "draws")
    assert torch.equal(torch.get_rng_state(), before)


def test_patches_are_predicted_a_few_at_a_time_and_counted(trained, monkeypatch):
    predictor, seen, size = predicting(trained, VoxelByVoxel()), [], (9, 13, 11)
    predicted = predictor._predict
    monkeypatch.setattr(predictor, "_predict", lambda x, *how: seen.append(len(x)) or predicted(x, *how))
    predictor.volume(mr(size), 0)
    assert set(seen) <= {1, 2}  # the mini-batch of the training
    assert sum(seen) == count_patches(size, PATCH) == len(windows(size))
    assert count_patches((7, 3, 1), (2, 3, 1)) == 6


def test_a_volume_is_padded_with_its_minimum_in_each_channel():
    x = torch.randn(1, 2, 3, 5, 9)
    padded, inside = padded_to(x, (6, 4, 10))
    expected = [np.pad(c, ((1, 2), (0, 0), (0, 1)), constant_values=c.min()) for c in x[0].numpy()]
    np.testing.assert_array_equal(padded[0], np.stack(expected))
    assert torch.equal(padded[(0, slice(None), *inside)], x[0])


def test_the_whole_job(trained, tmp_path):
    cohort, run = str(trained / "cohort"), str(trained / "run")
    out, metrics = str(tmp_path / "predictions"), str(tmp_path / "metrics.json")
    assert main(["predict", run, cohort, out, "--draws", "2"]) == 0
    mr_file = nib.load(f"{cohort}/phantom_002/mr.nii.gz")
    predictor = Predictor(trained / "run")
    volume = predictor.volume(mr_file.get_fdata(dtype=np.float32).T[None], 2)
    for name, array in (("ct", volume["ct"][""]), ("uncertainty", volume["ct"]["uncertainty"])):
        written = nib.load(f"{out}/phantom_002/{name}.nii.gz")
        np.testing.assert_allclose(written.get_fdata(), array.T, atol=0.51)
        np.testing.assert_array_equal(written.affine, mr_file.affine)
    assert volume["ct"]["uncertainty"].any()
    assert main(["evaluate", out, cohort]) == 0
    assert main(["report", run, cohort, out, metrics, "--out", str(tmp_path / "report.html")]) == 0
    assert "The scores of each task are of one held-out patch" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("z", [0, 3, 8])
def test_activation_maps_show_the_slice(trained, z):
    """The network sees the patch in the middle of the slice."""
    predictor = Predictor(trained / "run")
    volume = mr((9, 13, 11))
    seen = []
    predictor.model.layer.register_forward_hook(lambda module, x, y: seen.append(x[0]))
    image, maps = activation_maps(predictor, volume, z)
    x = normalise(volume)[0]
    start = min(max(z - 2, 0), 5)
    np.testing.assert_array_equal(image, x[z, 2:10, 2:8])
    np.testing.assert_array_equal(seen[0][:, 0], x[start : start + 4, 2:10, 2:8])
    assert all(activation.shape == PATCH[1:] for rows in maps.values() for _, activation in rows)


def test_a_network_of_patches_is_exported(trained, tmp_path):
    assert main(["freeze", str(trained / "run"), str(tmp_path / "network.pt2")]) == 0
    predictor = Predictor(trained / "run")
    x = torch.randn(3, 1, *PATCH)
    with torch.no_grad():
        y = predictor.model(x)
        found = torch.export.load(tmp_path / "network.pt2").module()(x)
    torch.testing.assert_close(found["ct"], 400 * y["ct"], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found["organs"], y["organs"].softmax(1), rtol=1e-3, atol=1e-4)
