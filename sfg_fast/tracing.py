"""Who looks on while something is computed: a compiler, fake tensors, a counter of operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from .kernels.contract import Kernels


def in_graph() -> bool:
    """Is there a graph to be made, or shapes alone (FakeTensorMode)? Then nothing may be kept for later, because it is
    no tensor, and no kernel may be called but through an operator."""
    if torch.compiler.is_compiling():
        return True
    return watched() and any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())


def through_operators(kernels: Kernels) -> bool:
    """Are these kernels to be called through operators of torch (operators.py)? In a graph, and where a mode looks at
    every operation, as a counter of FLOPs does: it sees what is made of torch's operations, but no other kernels."""
    return in_graph() or (watched() and not kernels.OF_TORCH)


def watched() -> bool:
    """Does a mode look at every operation?"""
    return torch._C._len_torch_dispatch_stack() > 0  # there is no public way to ask; this one takes 50 ns
