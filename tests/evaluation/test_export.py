"""`sfg-fast freeze`: a run as a file, against the run."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from sfg_fast.cli import main
from sfg_fast.data import preprocess, read_cohort, write_phantom
from sfg_fast.evaluation.predict import Predictor
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig
from sfg_fast.training.trainer import Trainer

SCHEDULE = ScheduleConfig(steps=3, batch=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_phantom(folder / "cohort", cases=3, test=1, size=24, slices=6, progress=False)
    preprocess(read_cohort(folder / "cohort"), folder / "cache", progress=False)
    tasks = {"ct": {"kind": "synthesis", "noise": "heteroscedastic"}, "organs": {}}
    for name, method in (("run", "sfg"), ("constant", "constant_p")):
        network = NetworkConfig(width=[3, 4, 4], blocks=1, method=method)
        places = str(folder / "cache"), str(folder / name)
        Trainer(TrainConfig(*places, tasks=tasks, network=network, schedule=SCHEDULE, device="cpu")).run()
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


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels(images):
    """Of five test images as any reader gives them, float32 [5, 3, H, W] of 0 .. 255; and what the run predicts."""
    cohort = read_cohort(images / "cohort/list.csv")
    cases = cohort.split("test")[:5]
    arrays = [np.asarray(Image.open(case.inputs[0]), np.float32).transpose(2, 0, 1) for case in cases]
    return np.stack(arrays), Predictor(images / "run").of_images(cases, 0)


def test_onnx_of_images(images, pixels, tmp_path):
    """In years and probabilities, from pixels that nobody has normalised."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(["freeze", str(images / "run"), str(tmp_path / "net.onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (source,) = session.get_inputs()
    assert (source.name, source.shape[1:]) == ("image", [3, 36, 33])
    age, gender = session.run(["age", "gender"], {"image": pixels[0]})
    np.testing.assert_allclose(age[:, 0], pixels[1]["age"][""], rtol=1e-4)
    np.testing.assert_allclose(gender[:, 1], pixels[1]["gender"]["p_female"], rtol=1e-4, atol=1e-5)


def test_torch_export_of_images(images, pixels, tmp_path):
    assert main(["freeze", str(images / "run"), str(tmp_path / "age.pt2"), "--tasks", "[age]"]) == 0
    program = torch.export.load(tmp_path / "age.pt2").module()
    for count in (5, 1):
        found = program(torch.from_numpy(pixels[0][:count]))
        assert list(found) == ["age"]
        np.testing.assert_allclose(found["age"][:, 0], pixels[1]["age"][""][:count], rtol=1e-4)


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
