"""Who looks on while something is computed: a compiler, fake tensors, a counter of operations.

This file alone asks torch about it. For most of these questions torch has no public function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # torch's documentation names them, here
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # the modes have no public list

if TYPE_CHECKING:
    from .kernels.contract import Kernels


def in_graph() -> bool:
    """Is torch making a graph, or computing shapes alone (FakeTensorMode)? Then no tensor may be kept for later,
    because it has no values, and a kernel may be called only through an operator of torch."""
    if torch.compiler.is_compiling():
        return True
    return watched() and any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def through_operators(kernels: Kernels) -> bool:
    """Have these kernels to be called through operators of torch (routed_conv/graph.py)? So it is in a graph, and where
    a mode looks at every operation, as a counter of FLOPs does: it sees torch's operations, but no other kernels."""
    return in_graph() or (watched() and not kernels.OF_TORCH)


def watched() -> bool:
    """Does a mode look at every operation?"""
    return torch._C._len_torch_dispatch_stack() > 0  # torch has no public function that asks this


def without_values(x: Tensor) -> bool:
    """Has the tensor a shape, but no values?"""
    return isinstance(x, FakeTensor) or x.is_meta


def in_backward() -> bool:
    """Is a backward pass going on in this thread? (Activation checkpointing runs a forward pass inside it.)"""
    # torch has no public function that asks this.
    return not in_graph() and torch._C._current_graph_task_id() != -1


def refuse_tracers(*inputs: Any) -> None:
    """Raises RuntimeError or TypeError, where tracers or transforms of torch look on that don't know the kernels:
    `torch.jit.trace`, `torch.fx`, `torch.func`. `inputs`: tensors, and whatever else a layer is given."""
    if in_graph():
        return
    if torch.jit.is_tracing():
        raise RuntimeError("SFG layers can't be traced, expected torch.compile, or sfg_fast.freeze and torch.export")
    if any(isinstance(one, fx.Proxy) for one in inputs):
        raise TypeError("SFG layers can't be traced by torch.fx, expected torch.export, or sfg_fast.freeze before")
    transformed = torch._C._functorch.is_functorch_wrapped_tensor  # torch has no public function that asks this
    if any(isinstance(one, Tensor) and transformed(one) for one in inputs):
        raise RuntimeError(
            "SFG layers don't know torch.func (vmap, grad, jvp), expected batches [N, C, H, W] and backward(); or "
            "with sfg_fast.backend('reference')"
        )
