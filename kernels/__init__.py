"""The arithmetic of the routed convolution, and nothing else: no autograd, no modules, no sampling.

This folder is installed, and imported, as `sfg_fast.kernels`.

Every module here offers the same four functions:

    forward(x [N,C,H,W], weight [K,C,R,S], bias [K] | None, blocks, geometry)  -> y [N,K,H',W']
    input_gradient(dy, weight, blocks, geometry, size (H, W))                  -> dx [N,C,H,W]
    weight_gradient(x, dy, blocks, geometry, kernel (R, S), bias=True)         -> dw [K,C,R,S], db [K] | None
    cannot(x) -> why a tensor like x can't be used, or None

Channels are packed (sorted by group); `blocks` says which blocks of the weight are read. The weight comes packed; dw is
zero where it is not read. `masked` wants the weight zero there, too; the others don't look.

Kernels of our own (not `masked`, behind which torch's operations follow) also fuse what stands around a convolution:

    forward(..., relu=False, residual=None)   y = relu(conv + bias) + residual
    *_gradient(..., relu=None)                relu: the output y of the ReLU that dy has yet to go back through
"""
