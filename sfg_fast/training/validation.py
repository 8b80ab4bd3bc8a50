"""How good the network is on examples that it is not trained on: something to watch and to stop by, not a result.

Results come from whole volumes, or all images: `sfg-fast predict` and `evaluate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.cache import Cache
from ..data.sampler import ImageSampler
from ..networks.controls import draws_from_constant_p, norm_buffers, recalibrate
from ..tasks import Task
from .objective import Objective

IMAGES_WATCHED = 256


def tally(tasks: Mapping[str, Task], outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sums over a batch that add up over batches, "TASK/SUM" (`Task.tally`), of the tasks that it has targets of."""
    sums: dict[str, Tensor] = {}
    for name, task in tasks.items():
        if name in outputs and task.target in batch:
            there = batch[f"has_{task.target}"]
            found = task.tally(outputs[name], batch[task.target], there, batch.get("mask"))
            sums |= {f"{name}/{key}": value for key, value in found.items()}
    return sums


def scores(tasks: Mapping[str, Task], sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """ "TASK/SCORE" from these sums; None for what was not measured."""
    found: dict[str, float | None] = {}
    for name, task in tasks.items():
        own = {key.removeprefix(f"{name}/"): value for key, value in sums.items() if key.startswith(f"{name}/")}
        found |= {f"{name}/{score}": value for score, value in task.scored(own).items()}
    return found


def titles(tasks: Mapping[str, Task]) -> dict[str, str]:
    """What "TASK/SCORE" is called in a figure."""
    return {f"{name}/{score.name}": f"{name}: {score.title}" for name, task in tasks.items() for score in task.scores}


@torch.no_grad()
def validate(
    model: nn.Module,
    objective: Objective,
    tasks: Mapping[str, Task],
    calibration: Iterable[Tensor],
    batches: Iterable[dict[str, Any]],
) -> dict[str, Tensor]:
    """Sums (`tally`) over the batches, and "nll of TASK", "examples of TASK": of the negative log-likelihood of each
    task, and how many examples have it.

    As in prediction: argmax p, with running statistics of that very assignment (from the `calibration` images), or
    draws where p is constant. Statistics and mode are left as they were.
    """
    drawn, before, training = draws_from_constant_p(model), norm_buffers(model), model.training
    sums: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties of argmax p, which are no news before p is learnt
        recalibrate(model, calibration, drawn)
        model.eval()
        for batch in batches:
            outputs = {task: y.float() for task, y in model(batch["inputs"]).items()}
            found = tally(tasks, outputs, batch)
            for name, task in tasks.items():
                nll = outputs[name].new_zeros(0, dtype=torch.float64)  # if no case of the split has the target
                if task.target in batch:
                    there = batch[f"has_{task.target}"]
                    nll = -objective.likelihoods[name](outputs[name], batch[task.target], there)[there].double()
                found |= {f"nll of {name}": nll.sum(), f"examples of {name}": nll.new_tensor(len(nll))}
            sums = {name: sums[name] + value if sums else value for name, value in found.items()}
    model.load_state_dict(before, strict=False)
    model.train(training)
    return sums


def held_out(cache: Cache) -> dict[str, Any]:
    """A batch that is not trained on. Of volumes: one slice, that with most labelled voxels (else the middle one) of
    the first case. Of images: the first ones of a random order."""
    split = next(split for split in ("val", "test", "train") if cache.names(split))
    if cache.images is not None:
        return ImageSampler(cache, split, IMAGES_WATCHED, seed=0)[0]
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
    """A batch of one, a copy."""
    return torch.from_numpy(array.copy())[None]
