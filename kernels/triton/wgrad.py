"""Weight and bias gradient: a matrix product [input channels, pixels] x [pixels, output channels] for every tap.

The pixels are split over programs; each writes its partial sum (float32) to a place of its own, and a second pass adds
them in a fixed order and scatters back to the layer's order. No atomics: the same bits every time.
"""

import triton
import triton.language as tl

from .convolve import pixels, walk_at


@triton.jit
def reads_any(rows, columns, k0, c0, G: tl.constexpr):
    """Does any row of the tile from k0 read any column of the tile from c0?"""
    ROW_GROUPS: tl.constexpr = G.row_groups
    COLUMN_GROUPS: tl.constexpr = G.column_groups
    live = k0 < 0
    for go in tl.static_range(ROW_GROUPS):
        first = tl.load(rows + go)
        last = tl.load(rows + go + 1)
        row_here = (first < k0 + G.block_k) & (last > k0) & (last > first)
        for gi in tl.static_range(COLUMN_GROUPS):
            if G.routing == "all" or gi == go or (G.routing == "arrow" and gi == 0):
                first = tl.load(columns + gi)
                last = tl.load(columns + gi + 1)
                live = live | (row_here & (first < c0 + G.block_c) & (last > c0) & (last > first))
    return live


@triton.jit(do_not_specialize=["tiles", "tiles_per_split"])
def weight_gradient_kernel(
    x, dy, partial, partial_bias, rows, columns, H, W, OH, OW, tiles, tiles_per_split,
    G: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of rows x columns, G.taps neighbouring taps, one split of the pixels -> partial[split, tap, c, k].

    dy is read once for all G.taps taps. G.flat (few channels): the "columns" are all (tap, channel) pairs.
    """
    BLOCK_C: tl.constexpr = G.block_c
    BLOCK_K: tl.constexpr = G.block_k
    TAPS: tl.constexpr = G.taps
    ALL_TAPS: tl.constexpr = G.taps_h * G.taps_w
    TILES_K: tl.constexpr = (G.out_channels + G.block_k - 1) // G.block_k
    TAP_GROUPS: tl.constexpr = 1 if G.flat else ALL_TAPS // G.taps
    split = tl.program_id(1)
    tap0 = tl.program_id(0) % TAP_GROUPS * TAPS
    k0 = tl.program_id(0) // TAP_GROUPS % TILES_K * BLOCK_K
    c0 = tl.program_id(0) // TAP_GROUPS // TILES_K * BLOCK_C
    with_bias = (tap0 == 0) & (c0 == 0)
    if not G.flat:
        live = reads_any(rows, columns, k0, c0, G)
        if T.bias:
            live = live | with_bias
        if not live:
            return
    k = k0 + tl.arange(0, BLOCK_K)
    c = c0 + tl.arange(0, BLOCK_C)
    image_x = tl.cast(H, tl.int64) * W * G.channels
    image_y = tl.cast(OH, tl.int64) * OW * G.out_channels
    accs = (tl.zeros((BLOCK_C, BLOCK_K), ACC),) * TAPS
    bias = tl.zeros((BLOCK_K,), ACC)
    for tile in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        in_x, in_y, i, j = pixels(tile, OH, OW, image_x, image_y, T)
        valid = (i < OH) & (j < OW)
        at = ((i * OW + j) * G.out_channels)[:, None] + k[None, :]
        mask = valid[:, None] & (k < G.out_channels)[None, :]
        d = tl.load(dy + in_y + at, mask=mask, other=0.0)  # [pixels, BLOCK_K]
        if T.bias:
            bias += tl.sum(d.to(ACC), 0)
        new = ()
        for t in tl.static_range(TAPS):
            if G.flat:
                tap = c // G.channels
                h = (i * G.stride_h - G.padding_h)[:, None] + (tap // G.taps_w * G.dilation_h)[None, :]
                v = (j * G.stride_w - G.padding_w)[:, None] + (tap % G.taps_w * G.dilation_w)[None, :]
                inside = valid[:, None] & (h >= 0) & (h < H) & (v >= 0) & (v < W)
                mask = inside & (c < ALL_TAPS * G.channels)[None, :]
                at = (h * W + v) * G.channels + (c % G.channels)[None, :]
            else:
                h = i * G.stride_h - G.padding_h + (tap0 + t) // G.taps_w * G.dilation_h
                v = j * G.stride_w - G.padding_w + (tap0 + t) % G.taps_w * G.dilation_w
                inside = valid & (h >= 0) & (h < H) & (v >= 0) & (v < W)
                mask = inside[:, None] & (c < G.channels)[None, :]
                at = ((h * W + v) * G.channels)[:, None] + c[None, :]
            a = tl.load(x + in_x + at, mask=mask, other=0.0)  # [pixels, BLOCK_C]
            new = new + (tl.dot(tl.trans(a), d, accs[t], input_precision=T.precision, out_dtype=ACC),)  # noqa: RUF005
        accs = new
    C_END: tl.constexpr = ALL_TAPS * G.channels if G.flat else G.channels
    mask = (c < C_END)[:, None] & (k < G.out_channels)[None, :]
    for t in tl.static_range(TAPS):
        block = ((split * ALL_TAPS + tap0 + t) * G.channels).to(tl.int64) * G.out_channels
        tl.store(partial + block + c[:, None] * G.out_channels + k[None, :], accs[t], mask=mask)
    if T.bias:
        tl.store(partial_bias + split * G.out_channels + k, bias, mask=(k < G.out_channels) & with_bias)


@triton.jit
def shifted_tile(x, h, v, q, c0, H, W, G: tl.constexpr):
    """Pixels (h, v + s * dilation), h one row and v [strip], channels c0 + c, for the pairs of tap and channel
    q = s * block_c + c, s < 3."""
    s = q // G.block_c
    c = c0 + q % G.block_c
    v = v[:, None] + s[None, :] * G.dilation_w
    mask = (h >= 0) & (h < H) & (v >= 0) & (v < W) & ((c < G.channels) & (s < 3))[None, :]
    return tl.load(x + (h * W + v) * G.channels + c[None, :], mask=mask, other=0.0)


@triton.jit
def gradient_tile(dy, row, j, k, OH, OW, G: tl.constexpr):
    """Pixels (row, j) of dy, j [strip], kernels k."""
    mask = ((row >= 0) & (row < OH) & (j < OW))[:, None] & (k < G.out_channels)[None, :]
    return tl.load(dy + ((row * OW + j) * G.out_channels)[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["units", "units_per_split", "steps"])
def rowwalk_weights_kernel(
    x, dy, partial, partial_bias, rows, columns, H, W, OH, OW, units, units_per_split, steps,
    G: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `weight_gradient_kernel`, for 3x3 kernels and stride 1: all nine taps, one split of the pixels. A unit of the
    pixels is a strip of `steps` rows of the input, walked down as in rowwalk.py.

    Each row of the input meets three rows of dy. Up to 32 channels its three shifted copies lie one beside the other,
    so that one product of matrices, tall enough for Hopper's instructions, serves three taps.
    """
    STRIP: tl.constexpr = T.pixels_w
    BLOCK_C: tl.constexpr = G.block_c
    BLOCK_K: tl.constexpr = G.block_k
    TILES_C: tl.constexpr = (G.channels + G.block_c - 1) // G.block_c
    COPIES: tl.constexpr = 4 if G.block_c < 64 else 1  # three, and a power of two
    split = tl.program_id(1)
    c0 = tl.program_id(0) % TILES_C * BLOCK_C
    k0 = tl.program_id(0) // TILES_C * BLOCK_K
    live = reads_any(rows, columns, k0, c0, G)
    if T.bias:
        live = live | (c0 == 0)
    if not live:
        return
    k = k0 + tl.arange(0, BLOCK_K)
    q = tl.arange(0, COPIES * BLOCK_C)
    walks = tl.cdiv(tl.cdiv(OH, G.dilation_h) + 2, steps)
    bias = tl.zeros((STRIP, BLOCK_K), ACC)
    TILES: tl.constexpr = 1 if COPIES == 4 else 3
    sums = (tl.zeros((COPIES * BLOCK_C, BLOCK_K), ACC),) * (3 * TILES)
    for unit in range(split * units_per_split, tl.minimum((split + 1) * units_per_split, units)):
        j, m0, residue, image = walk_at(unit, OW, walks, steps, G.dilation_h, T)
        in_x = x + image * H * W * G.channels
        in_dy = dy + image * OH * OW * G.out_channels
        for m in range(m0, m0 + steps):
            h = residue + m * G.dilation_h - G.padding_h
            new = ()
            for s in tl.static_range(TILES):
                a = shifted_tile(in_x, h, j - G.padding_w + s * G.dilation_w, q, c0, H, W, G)
                for t in tl.static_range(3):
                    d = gradient_tile(in_dy, residue + (m - t) * G.dilation_h, j, k, OH, OW, G)
                    if T.bias and s + t == 0:
                        bias += d.to(ACC)
                    new = new + (  # noqa: RUF005
                        tl.dot(tl.trans(a), d, sums[3 * s + t], input_precision=T.precision, out_dtype=ACC),
                    )
            sums = new
    c = c0 + q % BLOCK_C
    for s in tl.static_range(TILES):
        shift = s + q // BLOCK_C
        mask = ((c < G.channels) & (shift < 3))[:, None] & (k < G.out_channels)[None, :]
        for t in tl.static_range(3):
            at = (split * 9 + 3 * t + shift).to(tl.int64) * G.channels + c
            tl.store(partial + at[:, None] * G.out_channels + k[None, :], sums[3 * s + t], mask=mask)
    if T.bias:
        at = partial_bias + split * G.out_channels + k
        tl.store(at, tl.sum(bias, 0), mask=(k < G.out_channels) & (c0 == 0))


@triton.jit
def sum_of_splits(partial, at, stride, mask, splits, SPLITS: tl.constexpr, ACC: tl.constexpr):
    """The sum over all splits of partial[split * stride + at], `at` [BLOCK]; SPLITS of them are loaded at a time."""
    total = tl.zeros(at.shape, ACC)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        here = (split < splits)[:, None] & mask[None, :]
        where = split.to(tl.int64)[:, None] * stride + at[None, :]
        total += tl.sum(tl.load(partial + where, mask=here, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["splits"])
def reduce_kernel(
    partial, partial_bias, dw, db, row_places, column_places, splits, stride_k, stride_c, stride_tap,
    G: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Sum the splits in order -> dw [K, C, taps] of these strides, db [K] in the layer's order.

    A kernel's entry is the sum over all places that its row and column have in the packed tensors and that are read.
    """
    TAPS: tl.constexpr = G.taps_h * G.taps_w
    ROW_GROUPS: tl.constexpr = G.row_groups
    COLUMN_GROUPS: tl.constexpr = G.column_groups
    ONE_PLACE: tl.constexpr = (G.out_channels == K) & (G.channels == C)  # each kernel and channel is in one group
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = index % K  # fastest: partial sums are read in (nearly) the order they lie in
    c = index // K % C
    tap = index // (K * C)
    valid = tap < TAPS
    stride: tl.constexpr = TAPS * G.channels * G.out_channels
    total = tl.zeros((BLOCK,), ACC)
    row = index * 0 - 1
    column = index * 0 - 1
    live = index < 0
    for go in tl.static_range(ROW_GROUPS):
        row_here = tl.load(row_places + go * K + k)
        row = tl.maximum(row, row_here)
        for gi in tl.static_range(COLUMN_GROUPS):
            if G.routing == "all" or gi == go or (G.routing == "arrow" and gi == 0):
                column_here = tl.load(column_places + gi * C + c)
                column = tl.maximum(column, column_here)
                here = valid & (row_here >= 0) & (column_here >= 0)
                live = live | here
                if not ONE_PLACE:
                    at = (tap * G.channels + column_here) * G.out_channels + row_here
                    total += sum_of_splits(partial, at, stride, here, splits, SPLITS, ACC)
    if ONE_PLACE:
        at = (tap * G.channels + column) * G.out_channels + row
        total = sum_of_splits(partial, at, stride, live, splits, SPLITS, ACC)
    tl.store(dw + k * stride_k + c * stride_c + tap * stride_tap, total, mask=valid)
    if BIAS:
        sums = tl.zeros((BLOCK,), ACC)
        if ONE_PLACE:
            here = (index < K) & (row >= 0)
            sums = sum_of_splits(partial_bias, row, G.out_channels, here, splits, SPLITS, ACC)
        else:
            for go in tl.static_range(ROW_GROUPS):
                row_here = tl.load(row_places + go * K + k)
                here = (index < K) & (row_here >= 0)
                sums += sum_of_splits(partial_bias, row_here, G.out_channels, here, splits, SPLITS, ACC)
        tl.store(db + k, sums, mask=index < K)
