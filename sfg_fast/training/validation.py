"""How good the network is on slices that it is not trained on: something to watch and to stop by, not a result.

Results come from whole volumes: `sfg-fast predict` and `evaluate`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.cache import Cache
from ..data.cohort import RANGE_HU
from ..networks.controls import draws_from_constant_p, norm_buffers, recalibrate
from .objective import Objective


def tally(outputs: Mapping[str, Tensor], batch: Mapping[str, Any], ct_scale_hu: float) -> dict[str, Tensor]:
    """Sums over a batch that add up over batches: squared error in the mask and its voxels; per label overlap and
    sizes. float64."""
    sums: dict[str, Tensor] = {}
    if "ct" in outputs and "ct" in batch:
        there = batch["mask"] & batch["has_ct"][:, None, None, None]
        error = (outputs["ct"][:, :1] * ct_scale_hu - batch["ct"])[there].double()
        sums |= {"squared": error.square().sum(), "voxels": there.sum().double()}
    if "organs" in outputs and "labels" in batch:
        classes, there = outputs["organs"].shape[1], batch["has_labels"]
        predicted, true = outputs["organs"].argmax(1)[there], batch["labels"][there]
        count = [
            torch.bincount(x.flatten(), minlength=classes) for x in (predicted[predicted == true], predicted, true)
        ]
        sums |= {"overlap": count[0].double(), "predicted": count[1].double(), "true": count[2].double()}
    return sums


def scores(sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """PSNR in the mask (dB) and the mean Dice of the organs that are there; None for what was not measured."""
    found: dict[str, float | None] = {"psnr": None, "dice": None}
    if "voxels" in sums and sums["voxels"] > 0:
        mean = (sums["squared"] / sums["voxels"]).item()
        found["psnr"] = 10 * math.log10(RANGE_HU**2 / max(mean, 1e-12)) if math.isfinite(mean) else None
    if "true" in sums and (organs := sums["true"][1:] > 0).any():
        dice = 2 * sums["overlap"][1:] / (sums["predicted"] + sums["true"])[1:]
        found["dice"] = dice[organs].mean().item()
    return found


@torch.no_grad()
def validate(
    model: nn.Module,
    objective: Objective,
    calibration: Iterable[Tensor],
    batches: Iterable[dict[str, Any]],
    ct_scale_hu: float,
) -> dict[str, Tensor]:
    """Sums (`tally`) over the batches, and of the negative log-likelihood of each task and how many examples have it.

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
            found = tally(outputs, batch, ct_scale_hu)
            for task, name in (("ct", "ct"), ("organs", "labels")):
                if task in outputs:
                    nll = outputs[task].new_zeros(0, dtype=torch.float64)  # if no case of the split has the target
                    if name in batch:
                        nll = -objective.likelihoods[task](outputs[task], batch[name])[batch[f"has_{name}"]].double()
                    found |= {f"nll/{task}": nll.sum(), f"examples/{task}": nll.new_tensor(len(nll))}
            sums = {name: sums[name] + value if sums else value for name, value in found.items()}
    model.load_state_dict(before, strict=False)
    model.train(training)
    return sums


def held_out_slice(cache: Cache) -> dict[str, Tensor]:
    """The slice with most labelled voxels (else the middle one) of the first case that is not trained on, as a batch of
    one."""
    names = cache.names("val") or cache.names("test") or cache.names("train")
    case = cache.case(names[0])
    z = int((case.labels > 0).sum((1, 2)).argmax()) if case.labels is not None else len(case.inputs) // 2
    there = torch.tensor([True])
    found = {"inputs": _tensor(case.inputs[z]), "mask": _tensor(case.mask[z])[None]}
    if case.ct is not None:
        found |= {"ct": _tensor(case.ct[z])[None], "has_ct": there}
    if case.labels is not None:
        found |= {"labels": _tensor(case.labels[z]).long(), "has_labels": there}
    return found


def _tensor(array: np.ndarray) -> Tensor:
    """A batch of one, a copy."""
    return torch.from_numpy(array.copy())[None]
