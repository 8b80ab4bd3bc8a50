"""The arithmetic of the routed convolution, and nothing else: no autograd, no modules, no random numbers.

This folder is installed, and imported, as `sfg_fast.kernels`.

Every module here offers the same functions; `spec` (spec.py) says who reads whom, and the geometry:

    sample(log_p [K,G], noise [K,G] | None)       -> assignment [K] (argmax of the sum), order [K], offsets [G+1]
    pack(weight [K,C,R,S], bias [K] | None, spec, dtype)  -> packed, opaque: the parameters as the passes want them
    forward(x, packed, spec)                      live columns -> all rows: y [N,rows,H',W']
    input_gradient(dy, packed, spec, size (H, W)) live rows -> all columns: dx [N,columns,H,W]
    weight_gradient(x, dy, packed, spec, bias=True)
                                                  live rows x live columns -> dw [K,C,R,S], db [K] | None
    missing() -> what this machine lacks for them, or None
    cannot(x) -> why a tensor like x can't be used, or None

x and dy are packed: their channels are sorted by group. Weights come in the layer's own order, and their gradients go
back in it, zero where no row reads. And every module says of itself:

    MEMORY_FORMAT    of the images that it returns; None: that of x
    FUSES            forward(..., relu=False, residual=None) gives relu(conv + bias) + residual, and the gradients take
                     relu=y, the output of the ReLU that dy has yet to go back through
    SHARES_PRODUCTS  if all groups have the same kernels (full rows or columns), the product of an input group with
                     them is computed once and added to all outputs that read it. For the gates' gradient,
                     gate_gradient(x, packed, spec, df [N,rows,H',W'], scale [G,K] | None, shift, relu) gives
                     <df, act(scale * u + shift)> for all (full) rows, and u is never stored: dz [rows]
"""
