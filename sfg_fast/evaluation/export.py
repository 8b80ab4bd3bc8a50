"""A trained run as one file that needs no sfg_fast: ONNX, or a torch.export program (.pt2)."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import make_folder, replacing
from ..networks.controls import draws_from_constant_p
from ..networks.freeze import freeze
from ..training.run import load_run


class Deployed(nn.Module):
    """A frozen network in the units of its users: ct [N, 1, H, W] in HU (with a predicted SD as second channel, in HU,
    if the run has one) and organs [N, classes, H, W] as probabilities."""

    def __init__(self, network: nn.Module, unit_hu: float) -> None:
        super().__init__()
        self.network, self.unit_hu = network, unit_hu

    def forward(self, mr: Tensor) -> dict[str, Tensor]:
        """mr [N, channels, H, W]: minus the mean of the volume's foreground, over its SD (as `preprocess` does it)."""
        y = self.network(mr)
        found = {}
        if "ct" in y:
            ct = y["ct"]
            ct = ct if ct.shape[1] == 1 else torch.cat([ct[:, :1], ct[:, 1:].exp()], 1)
            found["ct"] = ct * self.unit_hu
        if "organs" in y:
            found["organs"] = y["organs"].softmax(1)
        return found


def export_run(run: Path, out: Path, tasks: Sequence[str] | None = None) -> Deployed:
    """Write the learnt architecture of a run (argmax p) to OUT.onnx or OUT.pt2; any batch and image size.

    Returns what was exported. Raises InputError for a file of another kind, one that is there already, a run with a
    constant p, unknown tasks, or ONNX without the packages for it.
    """
    if out.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{out}: expected a file name that ends in .onnx or .pt2")
    if tasks is not None and not tasks:
        raise InputError("tasks=[]: expected one or more of the run's tasks")
    if out.exists():
        raise InputError(f"{out}: is there already, expected a new file")
    trained = load_run(run)
    if draws_from_constant_p(trained.model):
        raise InputError(f"{run}: its grouping is drawn from a constant p, there is no learnt architecture to freeze")
    try:
        frozen = freeze(trained.model, tasks=tasks)
    except ValueError as error:
        raise InputError(f"{run}: {error}") from error
    deployed = Deployed(frozen, trained.config.objective.ct_scale_hu).eval()
    example = torch.zeros(2, len(trained.channel_names), 48, 40)
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    shapes = ({0: batch, 2: height, 3: width},)
    make_folder(out.parent)
    with replacing(out) as temporary, _silence():
        temporary.touch()  # if it can't be, that is known before the work
        program = torch.export.export(deployed, (example,), dynamic_shapes=shapes)
        content = io.BytesIO()  # the writer of torch ends the whole process where the disk is full
        if out.suffix == ".pt2":
            torch.export.save(program, content)
        else:
            content.write(_onnx(program, list(deployed(example))))
        temporary.write_bytes(content.getbuffer())
    return deployed


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing is said by the exporters about themselves, neither as warnings nor in logs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _onnx(program: torch.export.ExportedProgram, outputs: list[str]) -> bytes:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("ONNX needs two more packages, pip install 'sfg_fast[onnx]'") from error
    exported = torch.onnx.export(program, (), dynamo=True, input_names=["mr"], output_names=outputs, verbose=False)
    assert exported is not None
    return exported.model_proto.SerializeToString()
