"""How one call of a routed convolution is done: by which kernels, in which dtype, which way. Decided once a call."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .groups import Routing
from .kernels.contract import Kernels
from .kernels.spec import RoutedConv


class Way(enum.Enum):
    """What is asked of the kernels."""

    ONCE = enum.auto()  # every group convolves the same image with the same kernels: one convolution, repeated
    FOLDED = enum.auto()  # every group convolves with the same kernels: one convolution, the groups in the batch
    GROUPED = enum.auto()  # every group has kernels of its own, as many, and its own input: torch's grouped convolution
    PACKED = enum.auto()  # the routed convolution of the backend


class Run(NamedTuple):
    """Of one call. dtype: of the products; x is cast to it, and u has it."""

    kernels: Kernels
    dtype: torch.dtype
    way: Way


def decide(x: Tensor, weight: Tensor, spec: RoutedConv) -> Run:
    """For x [N, columns, H, W] and weight [K, C, kH, kW] in the layer's own order.

    Raises BackendError, if a backend was asked for that can't, and RuntimeError for an input of another dtype.
    """
    width = weight.shape[0] // (len(spec.rows.names) if spec.rows.alike else 1)
    kernels, dtype = backends.kernels(x, width, spec.rows.all_gates or spec.columns.all_gates)
    if x.dtype != weight.dtype and backends.autocast_dtype(x) is None:
        raise RuntimeError(f"the input is {x.dtype}, the weight {weight.dtype}, expected the same (or torch.autocast)")
    return Run(kernels, dtype, _way(kernels, spec))


def _way(kernels: Kernels, spec: RoutedConv) -> Way:
    if spec.routing is Routing.ALL and spec.rows.full and len(spec.rows.names) > 1:
        return Way.ONCE
    if same_work_for_every_group(spec) and not kernels.SHARES_PRODUCTS:
        return Way.FOLDED
    if kernels.OF_TORCH and spec.columns.full and spec.routing is Routing.OWN and spec.rows.alike:
        return Way.GROUPED
    return Way.PACKED


def same_work_for_every_group(spec: RoutedConv) -> bool:
    """Do all groups convolve full-width tensors with the same kernels? Then one block-masked convolution would do (T+1)
    times the work that is needed."""
    return spec.columns.full and spec.rows.full and spec.routing is not Routing.ALL
