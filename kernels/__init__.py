"""The arithmetic of the routed convolution, and nothing else: no autograd, no modules, no random numbers.

This folder is installed, and imported, as `sfg_fast.kernels`.

Every module here offers the same functions; `spec` (spec.py) says who reads whom, and the geometry:

    sample(log_p [K,G], noise [K,G] | None)       -> assignment [K] (argmax of the sum), order [K], offsets [G+1], and
                                                  what else of the `FilterGroups` is known already, by its name there
    pack(weight [K,C,R,S], bias [K] | None, spec, dtype, gates=False)
                                                  -> packed, opaque: the parameters as the passes want them; `gates`:
                                                  as a recipe does
    forward(x, packed, spec, keep=False)          -> y [N,rows,H',W'], a
    input_gradient(dy, packed, spec, size (H, W)) -> dx [N,columns,H,W], dothers
    weight_gradient(x, dy, packed, spec, bias=True)       -> dw [K,C,R,S], db [K] | None
    gate_gradient(recipe, dothers)                -> dz [G-1,rows]
    keep_statistics(mean [K], var [K], assignment [K], count, momentum,
                    running_mean [G,K], running_var [G,K], draws [G,K], pooled_mean [K], pooled_var [K])
                                                  -> None: running statistics of (group, kernel) pairs go towards those
                                                  of a batch, var the biased one of `count` values, at a rate of
                                                  max(1/n, momentum), n the pair's draws, this one too; the pooled ones
                                                  of all groups as well (draws: in their dtype,
                                                  for averages of models are averages of counts, too)
    missing() -> what this machine lacks for them, or None
    cannot(x) -> why a tensor like x can't be used, or None

x and dy are packed: their channels are sorted by group. Weights come in the layer's own order, and their gradients go
back in it, zero where no row reads.

The gate z of a kernel in a group it was not drawn into wants a gradient, too (DESIGN: "Gates"): an OTHER of its row,
in the order tasks, then shared (`FilterGroups.others`). The features of others are zero and never stored, but

    forward          with `keep` (spec.rows.all_gates) also returns a [N,rows,H',W'], what others are made of: the
                     product of the shared channels with all rows, and the bias; u of task t is a + what t's channels
                     add. (Routing.ALL: all u are alike, a is y. Routing.OWN: nothing is shared, a is None.)
    input_gradient   where spec.columns.all_gates, also returns the gradient of the columns' others, dothers
                     [N,(G-1)*columns,H,W]; otherwise None
    gate_gradient    dz = <dothers, act(scale * u + shift)> for the others of all rows, summed over images and
                     positions. u is never stored.

Every module says of itself:

    MEMORY_FORMAT    of the images that it returns; None: that of x
    FUSES            forward(..., relu=False, residual=None) gives relu(conv + bias) + residual; input_gradient takes
                     around=(dx | None, dothers | None), gradients by a shortcut around the convolution, and adds them
    FUSES_BACK       the gradients take relu=y, the output of the ReLU that dy has yet to go back through; without it dy
                     has gone through already
    FUSES_GATES      input_and_gate_gradient(dy, packed, spec, features, recipe | None, relu=y | None, own=True,
                     around=(None, None)) -> dx, dz: what the features dx belongs to contribute to the gradient of
                     their gates, [1,columns], the gates of the groups drawn (not `own`: zeros); with their recipe also
                     the others', [G,columns] in all. dothers is never stored. Stride 1 only.
    KNOWS            activations of recipes (names, activations.py)
    NORMALISES       normalise(u, weight [K], bias [K], order, eps, activation, residual | None, keep=False)
                     -> y, mean [K], var [K], affine: batch normalisation, activation (one it knows) and the sum with
                     the residual in one go, none where the activation pools; var is the biased one, and both are at
                     least float32. affine [2,rows] with `keep`: scale and shift. order [rows]: which kernel each row of
                     u is, each once, or None: as they come.
                     normalise_gradient(dy, u, weight, bias, order, mean, var, eps, activation, add | None)
                     -> du (+ add), dweight [K], dbias [K]
    READS_NORMALISED statistics(u, weight [K], bias [K], eps, running_mean [K], running_var [K], rate)
                     -> affine [2,K], mean [K], var [K]: affine holds scale and shift of batch normalisation,
                     weight * (u - mean) / sqrt(var + eps) + bias = scale * u + shift; the running statistics go towards
                     those of the batch at this rate.
                     forward(..., affine=) convolves relu(scale * x + shift), which is never stored, and
                     normalise_gradient(..., again=True) returns it as well, in the memory of dy: for weight_gradient
    OF_TORCH         made of torch's own operations, each of which a counter of FLOPs sees
    SHARES_PRODUCTS  if all groups have the same kernels (full rows or columns), the product of an input group with
                     them is computed once and added to all outputs that read it
"""
