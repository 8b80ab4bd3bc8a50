"""The examples run, do what they say, and are short."""

import importlib.util
from pathlib import Path

import pytest

from sfg_fast import backend
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


def test_libmtl():
    assert load("libmtl").train(150) < 0.4
