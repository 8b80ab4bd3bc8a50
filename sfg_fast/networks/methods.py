"""The methods that are compared. The paper's baselines are special cases of an SFG network (section 3, "Baselines"),
and so are the other methods here, except cross-stitch networks (cross_stitch.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import LEAKY_SLOPE
from ..layer import SFGLayer
from ..norm import NormName

METHODS = {
    "one_task": "all kernels belong to the only task: p(shared) = 0",
    "hard_sharing": "all kernels are shared up to the task-specific heads",
    "constant_mask": "a fixed share of the kernels, 1/(T+1) unless it is given, is shared, the rest split evenly",
    "constant_p": "p = 1/(T+1) for every group, never learnt; drawn anew at every step",
    "sfg": "the grouping is learnt",
    "even_split": "no kernel is shared: a fixed even split among the tasks, learnt jointly",
    "cross_stitch": "a network for each task, which read one another after every stage (Misra et al. 2016)",
    "retrain": "as sfg, but the grouping is fixed from the start: one that another run has learnt",
}


FIXED: dict[str, float | None] = {"one_task": 0.0, "hard_sharing": 1.0, "even_split": 0.0, "constant_mask": None}
"""The methods with a fixed mask as grouping, and the share of each layer's kernels that is shared. None: the option
`shared`, by default 1/(T+1)."""


def layer_options(
    method: str, tasks: Sequence[str], norm: NormName, init: str | Sequence[Any] | Tensor, estimator: str
) -> dict[str, Any]:
    """The options of the network's SFG layers.

    With `retrain` the grouping is drawn from a constant p, as with `constant_p`, until `assign` fixes it.

    Raises ValueError for an unknown method, for cross_stitch, for several tasks with one_task, and for a task with a
    name that no module can have.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(METHODS)}")
    if method == "cross_stitch":
        raise ValueError("method='cross_stitch' is a network of its own, expected networks.build.build(..)")
    for task in tasks:  # heads and parts of frozen networks have the tasks' names
        if "." in task or hasattr(nn.ModuleDict(), task):
            raise ValueError(f"outputs: a module of torch can't be called {task!r}, expected another name for the task")
    if method == "one_task" and len(tasks) != 1:
        raise ValueError(f"method='one_task' needs exactly one output, got {list(tasks)}")
    options = {"tasks": tuple(tasks), "norm": norm, "bias": norm is None, "init": init, "estimator": estimator}
    constant = {"init": "uniform", "estimator": "none"}
    return options | constant if method in ("constant_p", "retrain") else options


def fix_grouping(
    network: nn.Module,
    method: str,
    noise_on: str = "log_p",
    explore: float = 0.0,
    shared: float | Sequence[float] | None = None,
) -> None:
    """Fix the grouping of a network's SFG layers, if the method has a fixed one, and set how they draw.

    Args:
        network: the network.
        method: a name of `METHODS`.
        noise_on, explore: see `GroupGates`.
        shared: for constant_mask, the share of each layer's kernels that is shared: one number, or one for each layer
            with a grouping of its own.

    Raises ValueError for `shared` with another method, a share outside 0 .. 1, or another number of shares.
    """
    layers = [m for m in network.modules() if isinstance(m, SFGLayer) and not m.shares_grouping]
    shares = _shares(method, shared, len(layers))
    for module, share in zip(layers, shares, strict=True):
        if method in FIXED:
            kernels, groups = module.logits.shape
            module.assign(_mask(kernels, groups, share))
        module.noise_on, module.explore = noise_on, explore
        if method != "sfg":
            module.estimator = "none"


def _shares(method: str, shared: float | Sequence[float] | None, layers: int) -> list[float | None]:
    """The share of each layer's kernels that is shared; None stands for 1/(T+1)."""
    if shared is None:
        return [FIXED.get(method)] * layers
    shares = [float(share) for share in shared] if isinstance(shared, Sequence) else [float(shared)] * layers
    if method != "constant_mask":
        raise ValueError(f"shared={shared!r}: expected it with method constant_mask alone, got {method}")
    if len(shares) != layers or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shared={shared!r}: expected a share from 0 to 1, or one for each of the {layers} layers")
    return list(shares)


def _mask(kernels: int, groups: int, share: float | None) -> Tensor:
    """The assignment [K] of a constant mask: first the shared kernels, then those of each task, as many for each."""
    if share is None:
        return torch.arange(kernels) * groups // kernels
    own = kernels - round(share * kernels)
    specific = 1 + torch.arange(own) * (groups - 1) // max(own, 1)
    return torch.cat([specific.new_zeros(kernels - own), specific])


def he_initialise(network: nn.Module) -> None:
    """Initialise all convolutions after He et al. for ReLU, or for the LeakyReLU of the layer; their biases with
    zeros."""
    for module in network.modules():
        if isinstance(module, SFGLayer | nn.Conv2d | nn.Conv3d):
            slope = LEAKY_SLOPE if getattr(module, "activation", None) == "leaky_relu" else 0.0
            nn.init.kaiming_normal_(module.weight, slope, nonlinearity="leaky_relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
