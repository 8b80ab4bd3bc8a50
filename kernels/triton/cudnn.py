"""A pass of a wide layer as one convolution of cuDNN. The packed weight is zero where nothing is read.

From 64 channels on, what a tile skips saves less than cuDNN's tiles are faster: on an H200 cuDNN's own forward pass and
input gradient took .79 and .82 of the time at 64 channels, .77 and .74 at 128 (any algorithm, the fastest of several
that were timed; what stands here was not timed). cuDNN adds nothing to its result in the same pass, so this is for
layers with a norm behind them, and for gradients that no shortcut's are added to (config.by_cudnn).

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
    padding = [p.padding_h, p.padding_w]
    if p.adjoint:
        taps = taps.flip(2, 3)
        padding = [k - 1 - q for k, q in zip((p.taps_h, p.taps_w), padding, strict=True)]
    taps, once = taps.contiguous(memory_format=torch.channels_last), [1, 1]
    if x.is_cuda:  # the heuristics' choice among deterministic algorithms, not the fastest of several that are timed
        y = torch.ops.aten.cudnn_convolution(x, taps, padding, once, once, 1, False, True, False)
    else:  # the interpreter
        y = F.conv2d(x, taps, None, once, padding, once)
    return y.contiguous(memory_format=torch.channels_last)
