"""`sfg-fast freeze`: a run as a file, against the run."""

import logging

import numpy as np
import pytest
import torch

from sfg_fast.cli import main
from sfg_fast.data import preprocess, read_cohort, write_phantom
from sfg_fast.evaluation.predict import Predictor

NETWORK = ["--network.width", "[3,4,4]", "--network.blocks", "1", "--schedule.steps", "3", "--schedule.batch", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_phantom(folder / "cohort", cases=3, test=1, size=24, slices=6, progress=False)
    preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)
    for name, options in {
        "run": ["--objective.ct_noise", "heteroscedastic"],
        "constant": ["--network.method", "constant_p"],
    }.items():
        assert main(["train", "--data", str(folder / "cache"), "--out", str(folder / name), *NETWORK, *options]) == 0
    return folder


def expected(made, x):
    predictor = Predictor(made / "run")
    with torch.no_grad():
        y = predictor.model(x)
    return torch.cat([y["ct"][:, :1], y["ct"][:, 1:].exp()], 1) * 400, y["organs"].softmax(1)


def test_onnx(made, capfd, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    capfd.readouterr()
    assert main(["freeze", str(made / "run"), str(made / "net.onnx")]) == 0
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]  # of the exporter, about itself
    assert capfd.readouterr().err == ""
    session = onnxruntime.InferenceSession(str(made / "net.onnx"))
    assert [x.name for x in session.get_inputs()] == ["mr"]
    assert [y.name for y in session.get_outputs()] == ["ct", "organs"]
    x = torch.randn(3, 1, 30, 26)
    for found, wanted in zip(session.run(None, {"mr": x.numpy()}), expected(made, x), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=400e-5)


def test_torch_export_of_one_task(made):
    assert main(["freeze", str(made / "run"), str(made / "ct.pt2"), "--tasks", "[ct]"]) == 0
    x = torch.randn(1, 1, 32, 20)
    found = torch.export.load(made / "ct.pt2").module()(x)
    assert list(found) == ["ct"]
    torch.testing.assert_close(found["ct"], expected(made, x)[0], rtol=1e-5, atol=400e-5)


@pytest.mark.parametrize(
    ("run", "out", "options", "said"),
    [
        ("run", "net.pth", [], "net.pth: expected a file name that ends in .onnx or .pt2"),
        ("nowhere", "net.onnx", [], "no such checkpoint"),
        ("run", "there.onnx", [], "there.onnx: is there already"),
        ("constant", "net.pt2", [], "constant: its grouping is drawn from a constant p"),
        ("run", "net.pt2", ["--tasks", "[pet]"], "'pet' is no task"),
    ],
)
def test_refusals_are_one_line(made, tmp_path, capsys, run, out, options, said):
    (tmp_path / "there.onnx").write_text("mine")
    assert main(["freeze", str(made / run), str(tmp_path / out), *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]
