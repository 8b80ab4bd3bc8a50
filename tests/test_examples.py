"""The examples run, do what they say, and are short."""

import importlib.util
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sfg_fast import assign, backend
from sfg_fast.networks.controls import sfg_layers
from tests import libmtl_stub
from tests.backends import FAST

FOLDER = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_short(path):
    assert len(path.read_text().splitlines()) < 100


def test_multitask(capsys):
    assert load("multitask").main(150) < 0.2
    assert "shared" in capsys.readouterr().out


def test_comparison():
    errors = load("comparison").main(100)
    assert list(errors) == ["hard sharing", "cross-stitch", "SFG"]
    assert all(0 < error < 0.8 for error in errors.values())


def test_monai_engine():
    found = load("monai_engine").main()
    assert found["dice"] > 0.8
    assert found["mae"] < 0.2


@pytest.mark.parametrize("name", ["reference", *FAST])
def test_monai_engine_on_every_backend(name):
    with backend(name):
        found = load("monai_engine").main(2)
    assert 0 < found["dice"] <= 1
    assert 0 < found["mae"] < 2


@pytest.fixture
def libmtl(monkeypatch):
    """The example, with LibMTL where that can be imported, else with a stub of its interface."""
    try:
        return load("libmtl")
    except SystemExit:
        for name, module in libmtl_stub.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        return load("libmtl")


def test_libmtl_learns(libmtl):
    accuracy = libmtl.main([])
    assert list(accuracy) == ["direction", "spacing", "contrast"]
    assert min(accuracy.values()) > 0.8


def expected_gradients(example, trainer, x, labels):
    """The gradient of each task's loss by the encoder's parameters [task, parameter]: dense masking and autograd."""
    shared, gradients = list(trainer.model.encoder.parameters()), []
    with backend("reference"):
        features = trainer.model.encoder.network(x)
    for task in example.TASKS:
        output = trainer.model.decoders[task](features[0] + features[1 + example.TASKS.index(task)])
        loss = nn.functional.cross_entropy(output, labels[task])
        parts = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(gradients)


def without_conflicts(gradients):
    """PCGrad's sum of gradients (Yu et al. 2020, algorithm 1)."""
    total = torch.zeros_like(gradients[0])
    for i in range(len(gradients)):
        projected, order = gradients[i].clone(), list(range(len(gradients)))
        random.shuffle(order)
        for j in order:
            if (along := projected.dot(gradients[j])) < 0:
                projected = projected - along / gradients[j].dot(gradients[j]) * gradients[j]
        total = total + projected
    return total


@pytest.mark.parametrize(
    ("weighting", "combined"),
    [
        ("EW", lambda gradients: gradients.sum(0)),
        ("UW", lambda gradients: gradients.sum(0) * math.exp(0.5) / 2),
        ("PCGrad", without_conflicts),
    ],
)
def test_libmtl_weightings_get_the_gradients_of_dense_masking(libmtl, float64, weighting, combined):
    """What a weighting leaves in the encoder's parameters, with its starting weights, comes of the tasks' gradients."""
    trainer = libmtl.made(["--weighting", weighting])
    assign(trainer.model, {name: torch.arange(12) % 4 for name in sfg_layers(trainer.model)})
    x, labels = next(libmtl.Batches())
    labels["spacing"] = 1 - labels["direction"]  # these two pull against each other
    gradients = expected_gradients(libmtl, trainer, x, labels)
    random.seed(0)
    expected = combined(gradients)
    assert weighting == "EW" or not torch.allclose(expected, gradients.sum(0))
    outputs = trainer.model(x)
    losses = torch.stack([nn.functional.cross_entropy(outputs[task], labels[task]) for task in libmtl.TASKS])
    trainer.optimizer.zero_grad()
    random.seed(0)
    trainer.model.backward(losses, **trainer.kwargs["weight_args"])
    found = torch.cat([parameter.grad.flatten() for parameter in trainer.model.encoder.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", ["UW", "GradNorm", "PCGrad", "CAGrad", "MGDA", "GradVac", "IMTL"])
def test_libmtl_trains_with_every_weighting(libmtl, weighting):
    if weighting not in sys.modules["LibMTL.weighting"].__all__:
        pytest.skip(f"there is no {weighting} in this LibMTL, or its stub")
    libmtl.Batches.__len__ = lambda self: 5
    accuracy = libmtl.main(["--weighting", weighting], epochs=2)
    assert all(0 <= one <= 1 for one in accuracy.values())


def test_libmtl_says_what_is_wrong(libmtl, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        libmtl.main(["--weighting", "EQUAL"])
    assert ended.value.code == 2
    assert "--weighting EQUAL, expected one of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "LibMTL", None)
    with pytest.raises(SystemExit, match=r"needs LibMTL .* pip install LibMTL"):
        load("libmtl")
