"""The same convolution for 3x3 kernels, stride 1 and few channels, where memory is the limit.

A program walks down the rows of a strip of the image. The nine weight tiles stay where they are, each row of the input
is read three times (shifted) instead of nine, and adds to the three output rows that it touches. With dilation d the
program walks over every d-th row, so that these three are always the last three of the walk.

Nothing is skipped: up to 32 channels (measured on an H200) that costs less than reading the input nine times.
"""

import triton
import triton.language as tl


@triton.jit
def weight_tile(w, t, s, c, n, P: tl.constexpr):
    """Tap (t, s) of the walk; an adjoint pass meets the kernel's taps in reverse."""
    tap = 8 - (3 * t + s) if P.adjoint else 3 * t + s
    return tl.load(w + (tap * P.rows + c)[:, None] * P.columns + n[None, :])


@triton.jit
def input_tile(x, h, v, c, H, W, P: tl.constexpr):
    """Pixels (h, v), h one row and v [strip], all channels."""
    mask = ((h >= 0) & (h < H) & (v >= 0) & (v < W))[:, None] & (c < P.channels)[None, :]
    at = ((h * W + v) * P.channels)[:, None] + c[None, :]
    return tl.load(x + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["steps"])
def rowwalk_kernel(x, w, bias, residual, y, H, W, OH, OW, steps, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    """One strip, `steps` output rows, one tile of output channels."""
    BLOCK_N: tl.constexpr = P.block_n
    STRIP: tl.constexpr = T.pixels_w
    CHUNK: tl.constexpr = 16 if P.channels <= 16 else 32
    TILES_N: tl.constexpr = P.columns // P.block_n
    strips = tl.cdiv(OW, STRIP)
    walks = tl.cdiv(tl.cdiv(OH, P.dilation_h), steps)
    program = tl.program_id(0)
    n = program % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    program = program // TILES_N
    j = program % strips * STRIP + tl.arange(0, STRIP)
    program = program // strips
    m0 = program % walks * steps
    program = program // walks
    residue = program % P.dilation_h
    image = (program // P.dilation_h).to(tl.int64)
    x += image * H * W * P.channels
    image_out = image * OH * OW * P.out_channels
    if T.wide:
        j = j.to(tl.int64)
        residue = residue.to(tl.int64)
    c = tl.arange(0, CHUNK)
    w00 = weight_tile(w, 0, 0, c, n, P)
    w01 = weight_tile(w, 0, 1, c, n, P)
    w02 = weight_tile(w, 0, 2, c, n, P)
    w10 = weight_tile(w, 1, 0, c, n, P)
    w11 = weight_tile(w, 1, 1, c, n, P)
    w12 = weight_tile(w, 1, 2, c, n, P)
    w20 = weight_tile(w, 2, 0, c, n, P)
    w21 = weight_tile(w, 2, 1, c, n, P)
    w22 = weight_tile(w, 2, 2, c, n, P)
    first_h = residue + (P.padding_h - 2 * P.dilation_h if P.adjoint else -P.padding_h)
    first_w = j + (P.padding_w - 2 * P.dilation_w if P.adjoint else -P.padding_w)
    valid = n < P.out_channels
    if T.bias:
        start = tl.load(bias + n, mask=valid, other=0.0)[None, :] + tl.zeros((STRIP, BLOCK_N), ACC)
    else:
        start = tl.zeros((STRIP, BLOCK_N), ACC)
    last = start  # the output row that this input row completes
    middle = start
    for m in range(m0, m0 + steps + 2):
        h = first_h + m * P.dilation_h
        a0 = input_tile(x, h, first_w, c, H, W, P)
        a1 = input_tile(x, h, first_w + P.dilation_w, c, H, W, P)
        a2 = input_tile(x, h, first_w + 2 * P.dilation_w, c, H, W, P)
        last = tl.dot(a0, w20, last, input_precision=T.precision, out_dtype=ACC)
        last = tl.dot(a1, w21, last, input_precision=T.precision, out_dtype=ACC)
        last = tl.dot(a2, w22, last, input_precision=T.precision, out_dtype=ACC)
        middle = tl.dot(a0, w10, middle, input_precision=T.precision, out_dtype=ACC)
        middle = tl.dot(a1, w11, middle, input_precision=T.precision, out_dtype=ACC)
        middle = tl.dot(a2, w12, middle, input_precision=T.precision, out_dtype=ACC)
        begun = tl.dot(a0, w00, start, input_precision=T.precision, out_dtype=ACC)
        begun = tl.dot(a1, w01, begun, input_precision=T.precision, out_dtype=ACC)
        begun = tl.dot(a2, w02, begun, input_precision=T.precision, out_dtype=ACC)
        row = residue + (m - 2) * P.dilation_h
        at = image_out + ((row * OW + j) * P.out_channels)[:, None] + n[None, :]
        mask = ((m >= m0 + 2) & (row < OH) & (j < OW))[:, None] & valid[None, :]
        out = last
        if T.relu:
            out = tl.where(out <= 0, 0.0, out)
        if T.residual:
            out += tl.load(residual + at, mask=mask, other=0.0).to(ACC)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)
        last = middle
        middle = begun
