"""Passes of wide layers that torch's own convolution (cuDNN) does, with a weight that is zero where nothing is read.

What a tile skips does not make up for how much faster cuDNN's tiles are from 64 channels on (measured on an H200:
.79 and .82 of the time at 64 channels, .77 and .74 at 128). It adds nothing to its result in the same pass, so this is
for layers with a norm behind them, and for gradients that no shortcut's are added to (config.by_library).

The gradient of the input is a convolution, too, with the flipped weight: unlike cuDNN's own gradients, whose sums are
in no fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...groups import Routing
from ..spec import RoutedConv
from .config import Pass


def forward(x: Tensor, weight: Tensor, p: Pass, spec: RoutedConv, keep_product: bool) -> tuple[Tensor, Tensor | None]:
    """As `forward` of a backend, by the packed weight of the forward pass p."""
    u = _convolve(x, _dense(weight, p), p)
    if not keep_product:
        return u, None
    return u, _convolve(x, _dense(weight, p, spec.columns.ids[:, None] == 0), p)


def input_gradient(dy: Tensor, weight: Tensor, p: Pass, spec: RoutedConv) -> tuple[Tensor, Tensor | None]:
    """As `input_gradient` of a backend, by the packed weight of the adjoint p."""
    if not p.undrawn:
        return _convolve(dy, _dense(weight, p), p), None
    rows, arrow = spec.rows.ids[:, None], spec.routing is Routing.ARROW

    def dense(groups: Tensor) -> Tensor:
        """For rows of the input in these groups [C]: which rows of dy [K, C] they get a gradient from."""
        gets = rows == groups
        return _dense(weight, p, gets | (groups == 0) if arrow else gets)

    undrawn = torch.cat([dense(groups) for groups in spec.columns.undrawn_groups])
    return _convolve(dy, dense(spec.columns.ids), p), _convolve(dy, undrawn, p)


def _dense(weight: Tensor, p: Pass, read: Tensor | None = None) -> Tensor:
    """[out, in, kH, kW] from a packed weight; zero where `read` [in, out] is false."""
    taps = weight.view(p.taps_h, p.taps_w, p.rows, p.columns)[:, :, : p.channels, : p.out_channels]
    if read is not None:
        taps = taps.where(read, 0)
    taps = taps.permute(3, 2, 0, 1)
    return (taps.flip(2, 3) if p.adjoint else taps).contiguous(memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, p: Pass) -> Tensor:
    padding, stride = [p.padding_h, p.padding_w], [p.stride_h, p.stride_w]
    if p.adjoint:
        padding = [d * (k - 1) - q for d, k, q in zip(_dilation(p), (p.taps_h, p.taps_w), padding, strict=True)]
    if x.is_cuda:  # no benchmark, but a deterministic algorithm, whatever the user has set: the same bits in every run
        y = torch.ops.aten.cudnn_convolution(x, weight, padding, stride, _dilation(p), 1, False, True, False)
    else:  # the interpreter
        y = F.conv2d(x, weight, None, stride, padding, _dilation(p))
    return y.contiguous(memory_format=torch.channels_last)


def _dilation(p: Pass) -> list[int]:
    return [p.dilation_h, p.dilation_w]
