"""Exports a trained run as one file that needs no sfg_fast: ONNX, or a torch.export program (.pt2)."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..data.images import ImageForm
from ..errors import InputError
from ..files import make_folder, replacing
from ..networks.controls import draws_from_constant_p
from ..networks.freeze import freeze
from ..tasks import Task, to_json
from ..training.run import load_run


class Deployed(nn.Module):
    """A frozen network whose outputs are in the units of users: {task: `Task.deployed` of the task's output}.

    It reads MR slices [N, channels, H, W] that are normalised as `preprocess` does it: minus the mean of the volume's
    foreground, divided by its SD. A network of 3-D patches reads patches [N, channels, D, H, W] of it, of the size that
    it was trained on. With `images` it reads images [N, channels, H, W] of 0 .. 255, of the size that the network was
    trained on, and normalises them itself.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, network: nn.Module, tasks: Mapping[str, Task], images: ImageForm | None) -> None:
        super().__init__()
        self.network, self.tasks, self.images = network, dict(tasks), images
        form = ([0.0], [1.0]) if images is None else (images.mean, images.sd)
        for name, values in zip(("mean", "sd"), form, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    @override
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.images is not None:
            x = (x - self.mean) / self.sd
        return {name: self.tasks[name].deployed(y) for name, y in self.network(x).items()}


def export_run(run: Path, out: Path, tasks: Sequence[str] | None = None) -> Deployed:
    """Write the learnt architecture of a run (argmax p) to OUT.onnx or OUT.pt2.

    The exported network takes any number of MR slices of any size, or of 3-D patches or images of the size that the run
    was trained on. The file says as JSON (`tasks.to_json`) what its outputs are, with units, labels and classes: in
    ONNX's metadata as "tasks", in a .pt2 as the extra file "tasks.json". tasks: the tasks that it has as outputs; None:
    all.

    Returns the network that was exported. Raises InputError for another file ending, a file that is there already, a
    run with a constant p, unknown tasks, or ONNX without the packages for it.
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
    images, channels = trained.images, len(trained.channel_names)
    dynamic = {0: torch.export.Dim("batch")}
    sizes: Sequence[int] = (48, 40) if images is None else images.size
    if trained.config.spatial_dims == 3:
        assert trained.config.patch is not None
        sizes = trained.config.patch
    elif images is None:
        dynamic |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    example = torch.zeros(2, channels, *sizes)
    try:
        frozen = freeze(trained.model, tasks=tasks, example=example)
    except ValueError as error:
        raise InputError(f"{run}: {error}") from error
    deployed = Deployed(frozen, trained.tasks, images).eval()
    about = json.dumps({name: one for name, one in to_json(trained.tasks).items() if tasks is None or name in tasks})
    make_folder(out.parent)
    with replacing(out) as temporary, _silence():
        temporary.touch()  # if the file can't be written, that is known before the work
        program = torch.export.export(deployed, (example,), dynamic_shapes=(dynamic,))
        content = io.BytesIO()  # torch's own writer to a file would end the whole process if the disk is full
        if out.suffix == ".pt2":
            torch.export.save(program, content, extra_files={"tasks.json": about})
        else:
            content.write(_onnx(program, "mr" if images is None else "image", list(deployed(example)), about))
        temporary.write_bytes(content.getbuffer())
    return deployed


@contextmanager
def _silence() -> Iterator[None]:
    """Silences the exporters, which speak of themselves in warnings and logs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _onnx(program: torch.export.ExportedProgram, source: str, outputs: list[str], about: str) -> bytes:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("ONNX needs two more packages, pip install 'sfg_fast[onnx]'") from error
    exported = torch.onnx.export(program, (), dynamo=True, input_names=[source], output_names=outputs, verbose=False)
    assert exported is not None
    exported.model.metadata_props["tasks"] = about
    return exported.model_proto.SerializeToString()
