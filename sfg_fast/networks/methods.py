"""The paper's methods: all are special cases of an SFG network, by configuration (section 3, "Baselines")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.conv import SFGConv2d

METHODS = {
    "one_task": "all kernels belong to the only task: p(shared) = 0",
    "hard_sharing": "all kernels are shared up to the task-specific heads",
    "constant_mask": "a fixed even split of the kernels, 1/(T+1) each",
    "constant_p": "p = 1/(T+1) for every group, never learnt; drawn anew at every step",
    "sfg": "the grouping is learnt",
}


def layer_options(
    method: str, tasks: Sequence[str], norm: str | None, init: str | Sequence[Any] | Tensor, estimator: str
) -> dict[str, Any]:
    """Options of the network's SFG layers. Raises ValueError for an unknown method, or several tasks with one_task."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown, expected one of {', '.join(METHODS)}")
    if method == "one_task" and len(tasks) != 1:
        raise ValueError(f"method='one_task' needs exactly one output, got {list(tasks)}")
    options = {"tasks": tuple(tasks), "norm": norm, "bias": norm is None, "init": init, "estimator": estimator}
    return options | {"init": "uniform", "estimator": "none"} if method == "constant_p" else options


def fix_grouping(network: nn.Module, method: str) -> None:
    """Assign what the method has fixed."""
    for module in network.modules():
        if not isinstance(module, SFGConv2d) or module.shares_grouping:
            continue
        kernels, groups = module.logits.shape
        if method == "one_task":
            module.assign(torch.ones(kernels, dtype=torch.int64))
        elif method == "hard_sharing":
            module.assign(torch.zeros(kernels, dtype=torch.int64))
        elif method == "constant_mask":
            module.assign(torch.arange(kernels) * groups // kernels)
        if method != "sfg":
            module.estimator = "none"


def he_initialise(network: nn.Module) -> None:
    """He initialisation of all convolutions (ReLU follows)."""
    for module in network.modules():
        if isinstance(module, SFGConv2d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
