"""A pass of a wide layer as one convolution of torch (cuDNN). The packed weight is zero where nothing is read.

From 64 channels on, what a tile skips saves less than cuDNN's tiles are faster (measured on an H200: .79 and .82 of the
time at 64 channels, .77 and .74 at 128). cuDNN adds nothing to its result in the same pass, so this is for layers with
a norm behind them, and for gradients that no shortcut's are added to (config.by_library).

The gradient of the input is a convolution, too, with the flipped weight. cuDNN has functions of its own for gradients,
whose bits may differ from run to run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Pass


def convolve(x: Tensor, weight: Tensor, p: Pass) -> Tensor:
    """What the forward pass p, or its adjoint, makes of x, by its packed weight."""
    taps = weight.view(p.taps_h, p.taps_w, p.rows, p.columns)[:, :, : p.channels, : p.out_channels].permute(3, 2, 0, 1)
    padding, dilation = [p.padding_h, p.padding_w], [p.dilation_h, p.dilation_w]
    if p.adjoint:
        taps = taps.flip(2, 3)
        padding = [d * (k - 1) - q for d, k, q in zip(dilation, (p.taps_h, p.taps_w), padding, strict=True)]
    stride, taps = [p.stride_h, p.stride_w], taps.contiguous(memory_format=torch.channels_last)
    if x.is_cuda:  # no benchmark, but a deterministic algorithm, whatever the user has set: the same bits in every run
        y = torch.ops.aten.cudnn_convolution(x, taps, padding, stride, dilation, 1, False, True, False)
    else:  # the interpreter
        y = F.conv2d(x, taps, None, stride, padding, dilation)
    return y.contiguous(memory_format=torch.channels_last)
