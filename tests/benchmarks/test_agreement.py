"""Products of gradients by hand; and that a run whose kernels are shared can be measured."""

import pytest
import torch

from benchmarks.experiment import agreement
from sfg_fast.data import preprocess, read_cohort, write_phantom
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig
from sfg_fast.training.trainer import Trainer


def test_products_by_hand():
    """Two kernels of two weights, two tasks, batches a and b."""
    a = [[torch.tensor([[1.0, 0.0], [0.0, 2.0]])], [torch.tensor([[0.0, 1.0], [1.0, 1.0]])]]
    b = [[torch.tensor([[3.0, 1.0], [0.0, 1.0]])], [torch.tensor([[2.0, 0.0], [0.0, -1.0]])]]
    found = agreement.products(a, b, 0)
    assert found["mean 0"] == pytest.approx((3 + 2) / 2)
    assert found["mean 1"] == pytest.approx((0 - 1) / 2)
    assert found["whole 0"] == pytest.approx(((1 + 4) / 2 + (10 + 1) / 2) / 2)
    assert found["0 1"] == pytest.approx(((2 - 2) / 2 + (1 + 1) / 2) / 2)


def test_a_run_is_measured_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "EVERY", 1)
    write_phantom(tmp_path / "cohort", cases=2, test=1, size=24, slices=6, progress=False)
    preprocess(read_cohort(tmp_path / "cohort"), tmp_path / "cache", progress=False)
    network = NetworkConfig(width=[3, 4, 4], blocks=1, residual="routed", method="hard_sharing")
    places, schedule = (str(tmp_path / "cache"), str(tmp_path / "run")), ScheduleConfig(steps=6, batch=2)
    Trainer(TrainConfig(*places, network=network, schedule=schedule, device="cpu")).begin()
    table = agreement.measure(tmp_path / "run", tmp_path / "out", steps=6)
    assert table.header == ["layer", "cosine of ct and organs", "noise of ct", "noise of organs"]
    assert len(table.rows) == 8
