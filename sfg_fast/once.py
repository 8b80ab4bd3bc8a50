"""Backward passes that can't be differentiated themselves. They say so, where somebody tries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "the gradient of an SFG layer can't be differentiated once more (double backward), expected first derivatives; for "
    "second ones: with sfg_fast.backend('reference')"
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """As torch's own decorator, with a message of this package. And under `create_graph=True` it refuses for every
    gradient: torch leaves out those whose incoming gradient is constant, and a gradient penalty would then silently
    be none."""

    @functools.wraps(backward)
    def without_graph(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        return tuple(_NotTwice.apply(one.detach().requires_grad_()) if _real(one) else one for one in found)

    return without_graph


def _real(gradient: Any) -> bool:
    return isinstance(gradient, Tensor) and gradient.is_floating_point()


class _NotTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(MESSAGE)
