"""Forward pass and input gradient: the routed convolution as an implicit matrix product.

[pixels, channels] x [channels, output channels], summed over the taps of the kernel.

Both passes are one kernel. It reads one tensor ("in": x, or the incoming gradient dy), writes another ("out": y, or dx)
and walks over a grid of pixels (i, j):

    in  pixel = i * IN_STEP + first offset + t * TAP_OFFSET   for the t-th of the taps that meet
    out pixel = i * OUT_STEP + phase

Forward: IN_STEP = stride, OUT_STEP = 1, all taps meet. Input gradient: IN_STEP = 1, OUT_STEP = stride, and the stride's
phases (parity classes for stride 2) each meet taps of their own, so that no product with an inserted zero is computed.

Tensors are NHWC (channels_last). A weight is [taps, in channels, out channels], padded with zeros (config.py).
What a tile of output channels reads follows from the groups' offsets, which lie in device memory.
"""

import triton
import triton.language as tl


@triton.jit
def axis_taps(
    phase, SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Of one axis of an input gradient: the first tap that meets this phase, how many do (every STEP-th), and the first
    one's offset. Tap r joins output pixel o with input pixel o * STRIDE - PADDING + r * DILATION."""
    enough: tl.constexpr = SIZE * DILATION  # keeps numerators from being negative
    first = phase * 0 + SIZE
    for r in tl.static_range(STEP):
        meets = (phase + PADDING + STRIDE * enough - r * DILATION) % STRIDE == 0
        first = tl.where((first == SIZE) & meets, r, first)
    count = tl.where(first < SIZE, (SIZE - first + STEP - 1) // STEP, 0)
    offset = (phase + PADDING + STRIDE * enough - first * DILATION) // STRIDE - enough
    return first, count, offset


@triton.jit
def taps_of(phase, P: tl.constexpr):
    """First tap, number of taps and first offset, vertically and horizontally."""
    if P.adjoint:
        TAPS_H: tl.constexpr = P.taps_h
        TAPS_W: tl.constexpr = P.taps_w
        STEP_H: tl.constexpr = P.tap_step_h
        STEP_W: tl.constexpr = P.tap_step_w
        r, rs, h = axis_taps(phase // P.out_step_w, TAPS_H, P.stride_h, P.padding_h, P.dilation_h, STEP_H)
        s, ss, w = axis_taps(phase % P.out_step_w, TAPS_W, P.stride_w, P.padding_w, P.dilation_w, STEP_W)
        return r, rs, h, s, ss, w
    else:
        zero = phase * 0  # folded by the compiler
        return zero, zero + P.taps_h, zero - P.padding_h, zero, zero + P.taps_w, zero - P.padding_w


@triton.jit
def pixels(tile, height, width, image_in, image_out, T: tl.constexpr):
    """Of one tile of a grid of pixels: offsets of its image in both tensors (64 bits; `image_*` are the sizes of one
    image) and coordinates (i, j)."""
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    tiles_w = tl.cdiv(width, T.pixels_w)
    tiles = tl.cdiv(height, T.pixels_h) * tiles_w
    image = (tile // tiles).to(tl.int64)
    rest = tile % tiles
    m = tl.arange(0, PIXELS)
    i = (rest // tiles_w) * T.pixels_h + m // T.pixels_w
    j = (rest % tiles_w) * T.pixels_w + m % T.pixels_w
    if T.wide:
        i = i.to(tl.int64)
        j = j.to(tl.int64)
    return image * image_in, image * image_out, i, j


@triton.jit
def walk_at(number, OW, walks, steps, dilation: tl.constexpr, T: tl.constexpr):
    """Where a walk down the rows of a strip is: its columns j, first step, first row, and image (64 bits). Each strip
    has `walks` of `steps` steps in each of `dilation` series of rows."""
    STRIP: tl.constexpr = T.pixels_w
    strips = tl.cdiv(OW, STRIP)
    j = number % strips * STRIP + tl.arange(0, STRIP)
    m0 = number // strips % walks * steps
    residue = number // strips // walks % dilation
    image = (number // strips // walks // dilation).to(tl.int64)
    if T.wide:
        j = j.to(tl.int64)
        residue = residue.to(tl.int64)
    return j, m0, residue, image


@triton.jit
def ranges_read(out_offsets, in_offsets, n0, P: tl.constexpr):
    """Which input channels the output channels n0 .. n0 + block_n read, as chunks of block_k: the first `prefix` of all
    `chunks` start at channel 0 (the shared group), the others at `start`."""
    OUT_GROUPS: tl.constexpr = P.out_groups
    prefix_end = 0
    low = P.channels
    high = 0
    for g in tl.static_range(OUT_GROUPS):
        first = tl.load(out_offsets + g).to(tl.int32)
        last = tl.load(out_offsets + g + 1).to(tl.int32)
        here = (first < n0 + P.block_n) & (last > n0) & (last > first)
        if P.routing == "all" or (P.routing == "arrow" and P.adjoint and g == 0):
            low = tl.where(here, 0, low)
            high = tl.where(here, P.channels, high)
        elif g < P.in_groups:
            own = tl.load(in_offsets + g).to(tl.int32)
            own_end = tl.load(in_offsets + g + 1).to(tl.int32)
            here_own = here & (own_end > own)
            low = tl.where(here_own, tl.minimum(low, own), low)
            high = tl.where(here_own, tl.maximum(high, own_end), high)
        if P.routing == "arrow" and not P.adjoint:
            prefix_end = tl.where(here, tl.load(in_offsets + 1).to(tl.int32), prefix_end)
    # Rounded outwards to 8 channels, 16 bytes: the weight is zero there.
    prefix = tl.cdiv(prefix_end, P.block_k)
    start = tl.maximum(low // 8 * 8, prefix * P.block_k)
    return prefix, start, prefix + tl.cdiv(tl.maximum(high - start, 0), P.block_k)


@triton.jit
def accumulate(
    acc, x, w, i, j, n, H, W, phase, prefix, start, chunks, low, high,
    P: tl.constexpr, T: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] + the product over all taps and over the chunks of channels. Taps are innermost: a chunk's shifted
    reads follow one another and hit the cache.

    EXACT: only channels low .. high count (every_group.py). Otherwise the weight is zero where it is not read.
    A turn of the loop does T.together taps, one or a row of the kernel: what it computes besides is done once for them.
    """
    BLOCK_K: tl.constexpr = P.block_k
    TOGETHER: tl.constexpr = T.together
    first_r, count_r, offset_h, first_s, count_s, offset_w = taps_of(phase, P)
    h_base = i * P.in_step_h + offset_h
    w_base = j * P.in_step_w + offset_w
    turns = count_r * count_s if TOGETHER == 1 else count_r
    for it in range(0, turns * chunks):
        chunk = it // turns
        turn = it % turns
        c0 = tl.where(chunk < prefix, chunk * P.block_k, start + (chunk - prefix) * P.block_k)
        c = tl.multiple_of(c0, 8) + tl.arange(0, BLOCK_K)
        r = turn // count_s if TOGETHER == 1 else turn
        h = h_base + r * P.tap_offset_h
        for following in tl.static_range(TOGETHER):
            s = turn % count_s if TOGETHER == 1 else following
            v = w_base + s * P.tap_offset_w
            inside = (h >= 0) & (h < H) & (v >= 0) & (v < W)
            at = ((h * W + v) * P.channels)[:, None] + c[None, :]
            mask = inside[:, None] & (c < P.channels)[None, :]
            a = tl.load(x + at, mask=mask, other=0.0)  # [BM, BK]
            row = ((first_r + r * P.tap_step_h) * P.taps_w + first_s + s * P.tap_step_w) * P.rows + c
            if EXACT:
                wanted = (c >= low) & (c < high)
                b = tl.load(w + row[:, None] * P.columns + n[None, :], mask=wanted[:, None], other=0.0)
            else:
                b = tl.load(w + row[:, None] * P.columns + n[None, :])  # [BK, BN]
            acc = tl.dot(a, b, acc, input_precision=T.precision, out_dtype=acc.dtype)
    return acc


@triton.jit
def accumulate_flat(acc, x, w, i, j, n, H, W, P: tl.constexpr, T: tl.constexpr):
    """The same for few channels (an image): taps and channels together are the summed dimension, so that a matrix
    instruction is not filled up with zeros. Skips nothing."""
    BLOCK_K: tl.constexpr = P.block_k
    h_base = i * P.in_step_h + (P.padding_h if P.adjoint else -P.padding_h)
    w_base = j * P.in_step_w + (P.padding_w if P.adjoint else -P.padding_w)
    products: tl.constexpr = P.taps_h * P.taps_w * P.channels
    for it in range(0, tl.cdiv(products, BLOCK_K)):
        q = it * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = q // P.channels
        h = h_base[:, None] + (tap // P.taps_w * P.tap_offset_h)[None, :]
        v = w_base[:, None] + (tap % P.taps_w * P.tap_offset_w)[None, :]
        mask = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (q < products)[None, :]
        at = (h * W + v) * P.channels + (q % P.channels)[None, :]
        a = tl.load(x + at, mask=mask, other=0.0)
        b = tl.load(w + q[:, None] * P.columns + n[None, :])
        acc = tl.dot(a, b, acc, input_precision=T.precision, out_dtype=acc.dtype)
    return acc


@triton.jit
def store_tile(
    acc, y, residual, image_out, i, j, c, valid, OH, OW, phase, CHANNELS: tl.constexpr, P: tl.constexpr, T: tl.constexpr
):
    """relu(acc) + residual, to channels c of the CHANNELS of y."""
    h = i * P.out_step_h + phase // P.out_step_w
    v = j * P.out_step_w + phase % P.out_step_w
    at = image_out + ((h * OW + v) * CHANNELS)[:, None] + c[None, :]
    mask = ((h < OH) & (v < OW))[:, None] & valid[None, :]
    if T.relu:
        acc = tl.where(acc <= 0, 0.0, acc)
    if T.residual:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(acc.dtype)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def convolve_kernel(
    x, w, bias, residual, y, out_offsets, in_offsets, H, W, OH, OW, IH, IW,
    P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of pixels x one tile of output channels; (IH, IW) is the grid of pixels."""
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    TILES_N: tl.constexpr = P.columns // P.block_n
    n0 = tl.program_id(0) % TILES_N * BLOCK_N
    phase = tl.program_id(1)
    image_in = tl.cast(H, tl.int64) * W * P.channels
    image_out = tl.cast(OH, tl.int64) * OW * P.out_channels
    image_in, image_out, i, j = pixels(tl.program_id(0) // TILES_N, IH, IW, image_in, image_out, T)
    n = n0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros((PIXELS, BLOCK_N), ACC)
    if P.flat:
        acc = accumulate_flat(acc, x + image_in, w, i, j, n, H, W, P, T)
    else:
        prefix, start, chunks = ranges_read(out_offsets, in_offsets, n0, P)
        acc = accumulate(acc, x + image_in, w, i, j, n, H, W, phase, prefix, start, chunks, 0, 0, P, T, False)
    valid = n < P.out_channels
    if T.bias:
        acc += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    store_tile(acc, y, residual, image_out, i, j, n, valid, OH, OW, phase, P.out_channels, P, T)
