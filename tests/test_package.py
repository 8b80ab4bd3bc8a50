"""The house: light imports, downward imports, a forced backend."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sfg_fast
from sfg_fast import backends
from sfg_fast.backends import BackendError, backend

ROOT = Path(sfg_fast.__file__).parent
KERNELS = Path(sfg_fast.kernels.__file__).parent

FLOORS = [  # lowest first; a file imports only from floors below its own, or from its own folder
    {"activations", "errors", "estimators", "once", "tables", "tracing"},
    {"files", "groups", "plain_ops", "undrawn_features"},
    {"data", "draws", "kernels"},
    {"features", "fixed_assignment", "kernel_choice", "norm", "tasks"},
    {"backends"},
    {"configuration", "gates", "routed_conv"},
    {"layer"},
    {"reference"},
    {"layers"},
    {"gpu", "networks"},
    {"training"},
    {"evaluation"},
    {"demo", "experiment"},
    {"cli"},
]
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
FILES |= {  # where the package is installed in place, kernels/ lies beside it
    ("kernels", *path.relative_to(KERNELS).with_suffix("").parts): path for path in KERNELS.rglob("*.py")
}


def floor(name):
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imported(parts):
    """The files of the package that a file imports. What only a type checker reads does not count."""
    tree = ast.parse(FILES[parts].read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        module = tuple(node.module.split(".")) if node.module else ()
        if not node.level and module[:1] != ("sfg_fast",):
            continue
        target = (*parts[: len(parts) - node.level], *module) if node.level else module[1:]
        for alias in node.names:
            found = [(*target, alias.name), (*target, alias.name, "__init__"), target, (*target, "__init__")]
            yield next(one for one in found if one in FILES)


@pytest.mark.parametrize("parts", sorted(FILES), ids="/".join)
def test_imports_point_downwards(parts):
    if parts == ("__init__",):
        return  # it imports for type checkers only
    for name, *_ in imported(parts):
        assert (name == parts[0] and len(parts) > 1) or floor(name) < floor(parts[0]), f"{parts} imports {name}"


def test_imports_make_no_circle():
    graphlib.TopologicalSorter({
        parts: [one for one in imported(parts) if one not in (("__init__",), (*parts[:-1], "__init__"))]
        for parts in FILES if parts != ("__init__",)
    }).prepare()  # fmt: skip


def test_import_is_light():
    """Torch and numpy are enough, and no device is looked at."""
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: 1 / 0; import sfg_fast; "
        "print([m for m in ('nibabel', 'monai', 'scipy', 'matplotlib', 'yaml', 'jsonargparse', 'tensorboard') "
        "if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_command_line_can_be_interrupted_from_its_first_moment_on():
    """Nothing that takes its time is imported before `main` runs."""
    code = "import sys; from sfg_fast.cli import main; print({'torch', 'numpy', 'yaml', 'tqdm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_public_names():
    for name in sfg_fast.__all__:
        assert getattr(sfg_fast, name).__doc__
    assert sorted(sfg_fast.__all__) == sorted([*sfg_fast._MODULES, "reference"])
    assert set(sfg_fast.__all__) <= set(dir(sfg_fast))
    with pytest.raises(AttributeError, match="module 'sfg_fast' has no attribute 'nothing'"):
        _ = sfg_fast.nothing


@pytest.mark.parametrize(
    "code",
    [
        "import sfg_fast; print(sfg_fast.networks.controls.predict is sfg_fast.predict)",
        "import sfg_fast; print(sfg_fast.layers.conv.SFGConv2d is sfg_fast.SFGConv2d)",
        "import sfg_fast; print(sfg_fast.backends.backend is sfg_fast.backend)",
        "from sfg_fast import *; print(issubclass(SFGConv2d, reference.SFGLayer), end=''); print() if SFGVGG else 0",
        "import sfg_fast.configuration; print(callable(sfg_fast.show_config))",
    ],
)
def test_names_are_there_when_they_are_looked_at(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_backend_is_forced_inside_only():
    assert backends.current() == "auto"
    with backend("masked"):
        assert backends.current() == "masked"
        with backend("reference"):
            assert backends.current() == "reference"
        assert backends.current() == "masked"
    assert backends.current() == "auto"


def test_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("SFG_FAST_BACKEND", "masked")
    assert backends.current() == "masked"
    monkeypatch.setenv("SFG_FAST_BACKEND", "mask")
    with pytest.raises(ValueError, match="SFG_FAST_BACKEND='mask'"):
        backends.current()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not backends.available("triton"), reason="Triton is not installed")
def test_triton_without_a_gpu_says_so(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sfg_fast.cli", "demo", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"SFG_FAST_BACKEND": "triton"})
    assert done.returncode == 2
    reason = "backend 'triton' is not there: there is no GPU, and TRITON_INTERPRET=1 is not set"
    assert done.stderr.strip().endswith(reason)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match=r"backend='cuda' is unknown, expected one of auto, reference"),
        backend("cuda"),
    ):
        pass


def test_forced_backend_never_falls_back(monkeypatch):
    layer = sfg_fast.SFGConv2d(1, 2, 3)
    with monkeypatch.context() as without:
        without.setattr(backends, "_import", lambda name: "No module named 'triton'")
        with backend("triton"), pytest.raises(BackendError, match="'triton' is not there: No module named 'triton'"):
            layer(torch.randn(1, 1, 4, 4))
    if backends.available("triton"):
        with backend("triton"), pytest.raises(BackendError, match="bfloat16, in Triton's interpreter"):
            layer.bfloat16()(torch.randn(1, 1, 4, 4, dtype=torch.bfloat16))
    if backends.available("native"):
        with backend("native"), pytest.raises(BackendError, match="bfloat16"):
            layer.bfloat16()(torch.randn(1, 1, 4, 4, dtype=torch.bfloat16))


@pytest.mark.skipif(not backends.available("native"), reason="not built")
def test_backward_uses_the_kernels_of_the_forward(monkeypatch):
    from sfg_fast.kernels import cpu

    called = []
    monkeypatch.setattr(
        cpu, "weight_gradient", lambda *a, **k: called.append(1) or (torch.zeros(2, 1, 3, 3), torch.zeros(2))
    )
    layer = sfg_fast.SFGConv2d(1, 2, 3)
    with backend("native"):
        y = layer(torch.randn(1, 1, 4, 4))
    y.packed.sum().backward()  # outside the `with`
    assert called


def test_auto_tells_once_for_each_kind_of_tensor_what_it_took_and_why(caplog):
    backends._tell_once.cache_clear()
    layer = sfg_fast.SFGConv2d(1, 2, 3)
    with caplog.at_level("DEBUG", logger="sfg_fast"):
        for _ in range(2):
            layer(torch.randn(1, 1, 4, 4))
        layer.double()(torch.randn(1, 1, 4, 4, dtype=torch.float64))
        with backend("masked"):
            layer(torch.randn(1, 1, 4, 4, dtype=torch.float64))
    took = backends.fastest_on_cpu()
    assert [one.getMessage().split(" in layers")[0] for one in caplog.records] == [
        f"auto takes {took} for torch.float32 tensors on cpu", f"auto takes {took} for torch.float64 tensors on cpu"
    ]  # fmt: skip
    assert all(one.getMessage().split(": ")[1] for one in caplog.records)


def test_a_graph_draws_without_asking_for_the_check_of_the_gpu(monkeypatch):
    """A compiler can't trace through reading its files."""
    monkeypatch.setattr(backends.kernel_choice, "chosen", lambda device: 1 / 0)
    assert backends._sampler(SimpleNamespace(is_cuda=True), compiling=True) == "masked"


def test_auto_never_fails_for_tensors_that_native_can_not_take():
    from torch._subclasses import FakeTensorMode

    layer = sfg_fast.SFGConv2d(1, 2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(1, 1, 5, 5)).packed.shape[2:] == (3, 3)
    half = layer.to(torch.bfloat16)
    assert half(torch.randn(1, 1, 5, 5, dtype=torch.bfloat16)).packed.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["masked", "auto"])
def test_second_derivatives_raise_instead_of_being_wrong(name):
    layer = sfg_fast.SFGConv2d(1, 3, 3, activation="relu")
    with backend(name):
        y = layer(torch.randn(1, 1, 5, 5))
    first = torch.autograd.grad(y.packed.square().sum(), layer.logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="can't be differentiated once more"):
        first.sum().backward()
