"""All kernels in every group: the expanded pass, the soft pass, and the gates' gradient (DESIGN: "Gates").

P_g is the product of the input channels of group g with ALL kernels (or, going back, of the gradient of group g's
outputs with all input channels). Each is computed once:

    forward, arrow    u_shared = P_shared,          u_t = P_shared + P_t
    adjoint, arrow    d_shared = sum over g of P_g, d_t = P_t
    own               u_g = P_g

so that the work is one plain convolution for ANY grouping of the input's channels, where a block-sparse matrix with a
row for every (group, kernel) would take s + T s + sum of t (s: the shared fraction of the input).

If the input side holds full-width tensors, too, one for each group (P.own_rows: streams, relaxed draws), all groups
share the weight: each of its tiles is loaded once for all of them.
"""

import triton
import triton.language as tl

from .convolve import accumulate, pixels, store_tile, taps_of


@triton.jit
def group_product(
    g: tl.constexpr, acc, x, passed, w, in_offsets, i, j, n, H, W, phase, P: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """acc + P_g."""
    if g < P.in_groups:
        low = tl.load(in_offsets + g).to(tl.int32)
        high = tl.load(in_offsets + g + 1).to(tl.int32)
        start = low // 8 * 8
        chunks = tl.where(high > low, tl.cdiv(high - start, P.block_k), 0)
        acc = accumulate(acc, x, passed, w, i, j, n, H, W, phase, 0, start, chunks, low, high, P, T)
    return acc


@triton.jit
def all_products(x, passed, w, i, j, n, H, W, phase, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    """P_g of every group, as a tuple, where all groups share the weight: one weight tile for all groups."""
    GROUPS: tl.constexpr = P.in_groups
    WIDTH: tl.constexpr = P.channels // P.in_groups
    BLOCK_K: tl.constexpr = P.block_k
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    first_r, count_r, offset_h, first_s, count_s, offset_w = taps_of(phase, P)
    h_base = i * P.in_step_h + offset_h
    w_base = j * P.in_step_w + offset_w
    taps = count_r * count_s
    products = (tl.zeros((PIXELS, BLOCK_N), ACC),) * GROUPS
    for it in range(0, taps * tl.cdiv(WIDTH, BLOCK_K)):
        tap = it % taps
        r = tap // count_s
        s = tap % count_s
        c = it // taps * BLOCK_K + tl.arange(0, BLOCK_K)
        row = ((first_r + r * P.tap_step_h) * P.taps_w + first_s + s * P.tap_step_w) * P.rows + c
        b = tl.load(w + row[:, None] * P.columns + n[None, :])  # [BK, BN]
        h = h_base + r * P.tap_offset_h
        v = w_base + s * P.tap_offset_w
        inside = (h >= 0) & (h < H) & (v >= 0) & (v < W)
        at = ((h * W + v) * P.channels)[:, None] + c[None, :]
        mask = inside[:, None] & (c < WIDTH)[None, :]
        added = ()
        for g in tl.static_range(GROUPS):
            a = tl.load(x + at + g * WIDTH, mask=mask, other=0.0)
            if P.adjoint and T.relu:
                a = tl.where(tl.load(passed + at + g * WIDTH, mask=mask, other=1.0) <= 0, 0.0, a)
            added = added + (  # noqa: RUF005
                tl.dot(a, b, products[g], input_precision=T.precision, out_dtype=ACC),
            )
        products = added
    return products


@triton.jit
def convolve_all_kernel(
    x, passed, w, bias, y, in_offsets, H, W, OH, OW, IH, IW, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr
):
    """One tile of pixels x one tile of kernels (adjoint: of input channels), for every group of the output side."""
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    TILES_N: tl.constexpr = P.columns // P.block_n
    GROUPS: tl.constexpr = P.out_groups
    ALL: tl.constexpr = P.out_groups * P.out_channels
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = tl.program_id(1)
    image_in = tl.cast(H, tl.int64) * W * P.channels
    image_out = tl.cast(OH, tl.int64) * OW * ALL
    image_in, image_out, i, j = pixels(tl.program_id(0) // TILES_N, IH, IW, image_in, image_out, T)
    x += image_in
    passed += image_in
    valid = n < P.out_channels
    start = tl.zeros((PIXELS, BLOCK_N), ACC)
    if T.bias:
        start += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    if P.own_rows:
        products = all_products(x, passed, w, i, j, n, H, W, phase, P, T, ACC)
        shared = start + products[0]
        for g in tl.static_range(1, GROUPS):
            if P.routing == "arrow" and P.adjoint:
                shared += products[g]
                out = products[g]
            elif P.routing == "arrow":
                out = shared + products[g]
            else:
                out = start + products[g]
            store_tile(out, y, y, image_out, i, j, g * P.out_channels + n, valid, OH, OW, phase, ALL, P, T)
        store_tile(shared, y, y, image_out, i, j, n, valid, OH, OW, phase, ALL, P, T)
    elif P.routing == "arrow" and P.adjoint:
        shared = start
        for g in tl.static_range(1, GROUPS):
            out = group_product(g, start, x, passed, w, in_offsets, i, j, n, H, W, phase, P, T)
            shared += out
            store_tile(out, y, y, image_out, i, j, g * P.out_channels + n, valid, OH, OW, phase, ALL, P, T)
        shared = group_product(0, shared, x, passed, w, in_offsets, i, j, n, H, W, phase, P, T)
        store_tile(shared, y, y, image_out, i, j, n, valid, OH, OW, phase, ALL, P, T)
    else:
        shared = group_product(0, start, x, passed, w, in_offsets, i, j, n, H, W, phase, P, T)
        store_tile(shared, y, y, image_out, i, j, n, valid, OH, OW, phase, ALL, P, T)
        for g in tl.static_range(1, GROUPS):
            begin = shared if P.routing == "arrow" else start
            out = group_product(g, begin, x, passed, w, in_offsets, i, j, n, H, W, phase, P, T)
            store_tile(out, y, y, image_out, i, j, g * P.out_channels + n, valid, OH, OW, phase, ALL, P, T)


@triton.jit
def gate_sum(u, df, scale, shift, image_out, i, j, n, g: tl.constexpr, OW, inside, P: tl.constexpr, T: tl.constexpr,
             AFFINE: tl.constexpr):  # fmt: skip
    """Sum over the tile's pixels of dF[g, n] * act(scale * u + shift)."""
    valid = n < P.out_channels
    if AFFINE:
        u = u * tl.load(scale + g * P.out_channels + n, mask=valid, other=0.0)[None, :]
        u += tl.load(shift + g * P.out_channels + n, mask=valid, other=0.0)[None, :]
    if T.relu:
        u = tl.where(u <= 0, 0.0, u)
    at = image_out + ((i * OW + j) * (P.out_groups * P.out_channels) + g * P.out_channels)[:, None] + n[None, :]
    d = tl.load(df + at, mask=inside[:, None] & valid[None, :], other=0.0)
    return tl.sum(tl.where(inside[:, None], u, 0.0) * d.to(u.dtype), 0)


@triton.jit
def gate_gradient_kernel(
    x, w, bias, df, scale, shift, partial, in_offsets, H, W, OH, OW,
    P: tl.constexpr, T: tl.constexpr, AFFINE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz[g, k] = <dL/dF[g, k], act(scale * U[g, k] + shift)> for all gates of a forward pass; U is never stored.

    One tile of pixels x one tile of kernels -> partial[pixel tile, g, k]; the host's library adds the tiles.
    """
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    TILES_N: tl.constexpr = P.columns // P.block_n
    GROUPS: tl.constexpr = P.out_groups
    ALL: tl.constexpr = P.out_groups * P.out_channels
    tile = tl.program_id(0) // TILES_N
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    image_in = tl.cast(H, tl.int64) * W * P.channels
    image_in, image_out, i, j = pixels(tile, OH, OW, image_in, tl.cast(OH, tl.int64) * OW * ALL, T)
    x += image_in
    valid = n < P.out_channels
    inside = (i < OH) & (j < OW)
    start = tl.zeros((PIXELS, BLOCK_N), ACC)
    if T.bias:
        start += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    if P.own_rows:
        products = all_products(x, x, w, i, j, n, H, W, 0, P, T, ACC)
        shared = start + products[0]
    else:
        shared = group_product(0, start, x, x, w, in_offsets, i, j, n, H, W, 0, P, T)
    out = partial + tile.to(tl.int64) * ALL + n
    tl.store(out, gate_sum(shared, df, scale, shift, image_out, i, j, n, 0, OW, inside, P, T, AFFINE), mask=valid)
    for g in tl.static_range(1, GROUPS):
        u = shared if P.routing == "arrow" else start
        if P.own_rows:
            u += products[g]
        else:
            u = group_product(g, u, x, x, w, in_offsets, i, j, n, H, W, 0, P, T)
        dz = gate_sum(u, df, scale, shift, image_out, i, j, n, g, OW, inside, P, T, AFFINE)
        tl.store(out + g * P.out_channels, dz, mask=valid)
