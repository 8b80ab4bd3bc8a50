"""Scores of examples that the network is not trained on. They serve to watch a training and to stop it; they are no
results.

Results come from whole volumes, or all images: `sfg-fast predict` and `sfg-fast evaluate` make them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.cache import Cache
from ..data.sampler import ImageSampler, SliceSampler
from ..networks.controls import draws_from_constant_p, norm_buffers, recalibrate
from ..tasks import Task
from .objective import Objective

IMAGES_WATCHED = 256


def tally(tasks: Mapping[str, Task], outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The sums of `Task.tally` over a batch, {"TASK/SUM": sum}, for the tasks whose targets the batch has. Sums of
    several batches may be added up."""
    sums: dict[str, Tensor] = {}
    for name, task in tasks.items():
        if name in outputs and task.target in batch:
            there = batch[f"has_{task.target}"]
            found = task.tally(outputs[name], batch[task.target], there, batch.get("mask"))
            sums |= {f"{name}/{key}": value for key, value in found.items()}
    return sums


def scores(tasks: Mapping[str, Task], sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """{"TASK/SCORE": score} from the sums of `tally`; None for a score that was not measured."""
    found: dict[str, float | None] = {}
    for name, task in tasks.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in sums.items() if key.startswith(f"{name}/")}
        found |= {f"{name}/{score}": value for score, value in task.scored(own).items()}
    return found


def titles(tasks: Mapping[str, Task]) -> dict[str, str]:
    """The title of each "TASK/SCORE" in a figure."""
    return {f"{name}/{score.name}": f"{name}: {score.title}" for name, task in tasks.items() for score in task.scores}


@torch.no_grad()
def validate(
    model: nn.Module,
    objective: Objective,
    tasks: Mapping[str, Task],
    calibration: Iterable[Tensor],
    batches: Iterable[dict[str, Any]],
) -> dict[str, Tensor]:
    """The sums of `tally` over the batches; "nll of TASK", the summed negative log-likelihood of each task; and
    "examples of TASK", how many examples have the task's target.

    The network computes as in a prediction: by argmax p, with running statistics of this assignment (re-estimated from
    the `calibration` images), or by a draw where p is constant. Its statistics and its mode are restored at the end.
    """
    drawn, before, training = draws_from_constant_p(model), norm_buffers(model), model.training
    sums: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # argmax p ties in many kernels before p is learnt
        recalibrate(model, calibration, drawn)
        model.eval()
        for batch in batches:
            outputs = {task: y.float() for task, y in model(batch["inputs"]).items()}
            found = tally(tasks, outputs, batch)
            for name, task in tasks.items():
                nll = outputs[name].new_zeros(0, dtype=torch.float64)  # for a split of which no case has the target
                if task.target in batch:
                    there = batch[f"has_{task.target}"]
                    nll = -objective.likelihoods[name](outputs[name], batch[task.target], there)[there].double()
                found |= {f"nll of {name}": nll.sum(), f"examples of {name}": nll.new_tensor(len(nll))}
            sums = {name: sums[name] + value if sums else value for name, value in found.items()}
    model.load_state_dict(before, strict=False)
    model.train(training)
    return sums


def held_out(cache: Cache, patch: Sequence[int] | None = None) -> dict[str, Any]:
    """A batch of the val split, else of the test split, else of the training cases. Of volumes it is one slice of the
    first case, the one with most labelled voxels (the middle one without labels). Where `patch` has three numbers, it
    is a random 3-D patch that shows labels, always the same; of images it is a random batch, always the same."""
    split = next(split for split in ("val", "test", "train") if cache.names(split))
    if cache.images is not None:
        return ImageSampler(cache, split, IMAGES_WATCHED, seed=0)[0]
    if patch is not None and len(patch) == 3:
        return SliceSampler(cache, split, 1, patch, seed=0, foreground=1.0)[0]
    case = cache.case(cache.names(split)[0])
    labelled = [case.targets[name] > 0 for name in case.targets if cache.targets[name].kind == "labels"]
    z = int(np.sum([one.sum((1, 2)) for one in labelled], 0).argmax()) if labelled else len(case.inputs) // 2
    found = {"inputs": _tensor(case.inputs[z]), "mask": _tensor(case.mask[z])[None]}
    for name, volume in case.targets.items():
        one = _tensor(volume[z])
        found[name] = one.long() if cache.targets[name].kind == "labels" else one[None]
        found[f"has_{name}"] = torch.tensor([True])
    return found


def _tensor(array: np.ndarray) -> Tensor:
    """A copy of the array as a batch of one example."""
    return torch.from_numpy(array.copy())[None]
