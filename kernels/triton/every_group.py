"""Convolutions that need the products of all kernels with every group: relaxed draws, and the gates' gradient.

P_g is the product of the input channels of group g with ALL kernels (or, going back, of the gradient of group g's
outputs with all input channels). Each is computed once:

    forward, arrow    u_shared = P_shared,          u_t = P_shared + P_t
    adjoint, arrow    d_shared = sum over g of P_g, d_t = P_t
    own               u_g = P_g

so that the work is one plain convolution for ANY grouping of the input's channels, where a block-sparse matrix with a
row for every (group, kernel) would take s + T s + sum of t (s: the shared fraction of the input).

A relaxed draw (P.shares_products) has the channels of all groups side by side. If the input has them, too
(P.own_rows), all groups share the weight: each of its tiles is loaded once for all of them. A one-hot draw has drawn
and undrawn rows (kernels/contract.py). A program goes through the groups in the order of the undrawn rows, tasks, then
shared: `place` is where a channel's drawn group stands in this order. So the n-th undrawn row of a channel is in the
n-th group if n < place, else in the next one.
"""

import triton
import triton.language as tl

from .activation import activated
from .convolve import accumulate, pixels, store_tile, taps_of
from .pack import group_of


@triton.jit
def group_product(
    g: tl.constexpr, acc, x, w, in_offsets, i, j, n, H, W, phase, wanted, P: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """acc + P_g, if it is `wanted`."""
    if g < P.in_groups:
        low = tl.load(in_offsets + g).to(tl.int32)
        high = tl.load(in_offsets + g + 1).to(tl.int32)
        start = low // 8 * 8
        chunks = tl.where((high > low) & wanted, tl.cdiv(high - start, P.block_k), 0)
        acc = accumulate(acc, x, w, i, j, n, H, W, phase, 0, start, chunks, low, high, P, T, True)
    return acc


@triton.jit
def all_products(x, w, i, j, n, H, W, phase, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
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
            added = added + (  # noqa: RUF005
                tl.dot(a, b, products[g], input_precision=T.precision, out_dtype=ACC),
            )
        products = added
    return products


@triton.jit
def convolve_all_kernel(
    x, w, bias, y, in_offsets, H, W, OH, OW, IH, IW, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr
):
    """A relaxed draw: one tile of pixels x one tile of kernels (adjoint: of input channels), for every group."""
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
    valid = n < P.out_channels
    start = tl.zeros((PIXELS, BLOCK_N), ACC)
    if T.bias:
        start += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    if P.own_rows:
        products = all_products(x, w, i, j, n, H, W, phase, P, T, ACC)
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
            out = group_product(g, start, x, w, in_offsets, i, j, n, H, W, phase, True, P, T)
            shared += out
            store_tile(out, y, y, image_out, i, j, g * P.out_channels + n, valid, OH, OW, phase, ALL, P, T)
        shared = group_product(0, shared, x, w, in_offsets, i, j, n, H, W, phase, True, P, T)
        store_tile(shared, y, y, image_out, i, j, n, valid, OH, OW, phase, ALL, P, T)
    else:
        shared = group_product(0, start, x, w, in_offsets, i, j, n, H, W, phase, True, P, T)
        store_tile(shared, y, y, image_out, i, j, n, valid, OH, OW, phase, ALL, P, T)
        for g in tl.static_range(1, GROUPS):
            begin = shared if P.routing == "arrow" else start
            out = group_product(g, begin, x, w, in_offsets, i, j, n, H, W, phase, True, P, T)
            store_tile(out, y, y, image_out, i, j, g * P.out_channels + n, valid, OH, OW, phase, ALL, P, T)


@triton.jit
def convolve_kept_kernel(
    x, w, bias, y, kept_product, out_offsets, in_offsets, H, W, OH, OW, IH, IW,
    P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The forward pass of a one-hot draw, arrow, which also writes the kept product, P_shared + bias."""
    GROUPS: tl.constexpr = P.out_groups
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    TILES_N: tl.constexpr = P.columns // P.block_n
    n0 = tl.program_id(0) % TILES_N * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    image_in = tl.cast(H, tl.int64) * W * P.channels
    image_out = tl.cast(OH, tl.int64) * OW * P.out_channels
    image_in, image_out, i, j = pixels(tl.program_id(0) // TILES_N, IH, IW, image_in, image_out, T)
    x += image_in
    valid = n < P.out_channels
    acc = tl.zeros((PIXELS, BLOCK_N), ACC)
    if T.bias:
        acc += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    acc = group_product(0, acc, x, w, in_offsets, i, j, n, H, W, 0, True, P, T)
    h = i * P.out_step_h
    v = j * P.out_step_w
    at = image_out + ((h * OW + v) * P.out_channels)[:, None] + n[None, :]
    tl.store(
        kept_product + at, acc.to(kept_product.dtype.element_ty), mask=((h < OH) & (v < OW))[:, None] & valid[None, :]
    )
    low = P.channels
    high = 0
    for g in tl.static_range(1, GROUPS):  # which tasks' channels the tile reads; the weight is zero in between
        here = (tl.load(out_offsets + g) < n0 + BLOCK_N) & (tl.load(out_offsets + g + 1) > n0)
        own = tl.load(in_offsets + g).to(tl.int32)
        own_end = tl.load(in_offsets + g + 1).to(tl.int32)
        here = here & (tl.load(out_offsets + g + 1) > tl.load(out_offsets + g)) & (own_end > own)
        low = tl.where(here, tl.minimum(low, own), low)
        high = tl.where(here, tl.maximum(high, own_end), high)
    start = low // 8 * 8
    chunks = tl.cdiv(tl.maximum(high - start, 0), P.block_k)
    acc = accumulate(acc, x, w, i, j, n, H, W, 0, 0, start, chunks, low, high, P, T, True)
    store_tile(acc, y, y, image_out, i, j, n, valid, OH, OW, 0, P.out_channels, P, T)


@triton.jit
def place_of(n, offsets, GROUPS: tl.constexpr):
    """Where the drawn group of each channel n stands in the order of the undrawn rows (tasks, then shared)."""
    group = group_of(n, offsets, GROUPS)
    return tl.where(group == 0, GROUPS - 1, group - 1)


@triton.jit
def is_all(g: tl.constexpr, n0, offsets, BLOCK_N: tl.constexpr):
    """Are all channels of the tile drawn into group g? Then none of their undrawn rows is there."""
    return (tl.load(offsets + g) <= n0) & (tl.load(offsets + g + 1) >= n0 + BLOCK_N)


@triton.jit
def convolve_undrawn_kernel(
    x, w, added, added_undrawn, y, undrawn, out_offsets, in_offsets, H, W, OH, OW, IH, IW,
    P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The input gradient of a one-hot draw: of the drawn rows into `y`, of the undrawn rows into `undrawn`, each plus
    what is added to it."""
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    TILES_N: tl.constexpr = P.columns // P.block_n
    GROUPS: tl.constexpr = P.out_groups
    ALL: tl.constexpr = (P.out_groups - 1) * P.out_channels
    n0 = tl.program_id(0) % TILES_N * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    phase = tl.program_id(1)
    image_in = tl.cast(H, tl.int64) * W * P.channels
    image = tl.cast(OH, tl.int64) * OW
    image_in, image, i, j = pixels(tl.program_id(0) // TILES_N, IH, IW, image_in, image, T)
    x += image_in
    valid = n < P.out_channels
    place = place_of(n, out_offsets, GROUPS)[None, :]
    zero = tl.zeros((PIXELS, BLOCK_N), ACC)
    drawn = zero
    before = zero
    total = zero
    for step in tl.static_range(GROUPS):  # the last one is shared
        begin = total if P.routing == "arrow" and step == GROUPS - 1 else zero
        now = group_product(
            (step + 1) % GROUPS, begin, x, w, in_offsets, i, j, n, H, W, phase, True, P, T
        )  # fmt: skip
        total += now
        drawn = tl.where(place == step, now, drawn)
        if step > 0:
            elsewhere = tl.where(place > step - 1, before, now)
            c = (step - 1) * P.out_channels + n
            store_tile(elsewhere, undrawn, added_undrawn, image * ALL, i, j, c, valid, OH, OW, phase, ALL, P, T)
        before = now
    store_tile(drawn, y, added, image * P.out_channels, i, j, n, valid, OH, OW, phase, P.out_channels, P, T)


@triton.jit
def gate_gradient_kernel(
    x, w, bias, kept_product, df, scale, shift, partial, out_offsets, in_offsets, H, W, OH, OW,
    P: tl.constexpr, T: tl.constexpr, KEPT: tl.constexpr, AFFINE: tl.constexpr, EACH_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz = <dL/dF, act(scale * u + shift)> for the undrawn gates of all rows; u is never stored.

    One tile of pixels x one tile of kernels -> partial[pixel tile, n-th undrawn row, k]; torch adds the tiles. Where
    AFFINE, scale and shift are [undrawn rows, k]; where EACH_IMAGE, too, they are [images, undrawn rows, k].
    KEPT: the kept product of the forward pass is u of the shared group, and the tasks' products are added to it.
    """
    BLOCK_N: tl.constexpr = P.block_n
    PIXELS: tl.constexpr = T.pixels_h * T.pixels_w
    TILES_N: tl.constexpr = P.columns // P.block_n
    GROUPS: tl.constexpr = P.out_groups
    ALL: tl.constexpr = (P.out_groups - 1) * P.out_channels
    tile = tl.program_id(0) // TILES_N
    n0 = tl.program_id(0) % TILES_N * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    image_in = tl.cast(H, tl.int64) * W * P.channels
    image_in, image, i, j = pixels(tile, OH, OW, image_in, tl.cast(OH, tl.int64) * OW, T)
    x += image_in
    if EACH_IMAGE:
        number = (tile // (tl.cdiv(OH, T.pixels_h) * tl.cdiv(OW, T.pixels_w))).to(tl.int64)
        scale += number * ALL
        shift += number * ALL
    valid = n < P.out_channels
    inside = (i < OH) & (j < OW)
    mask = inside[:, None] & valid[None, :]
    place = place_of(n, out_offsets, GROUPS)[None, :]
    position = i * OW + j
    begin = tl.zeros((PIXELS, BLOCK_N), ACC)
    if KEPT:
        at = image * P.out_channels + (position * P.out_channels)[:, None] + n[None, :]
        begin += tl.load(kept_product + at, mask=mask, other=0.0).to(ACC)
    elif T.bias:
        begin += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    before = begin
    for step in tl.static_range(GROUPS):  # the last one is shared
        now = begin
        if P.routing != "all" and not (KEPT and step == GROUPS - 1):
            wanted = is_all((step + 1) % GROUPS, n0, out_offsets, BLOCK_N) == 0
            now = group_product(
                (step + 1) % GROUPS, begin, x, w, in_offsets, i, j, n, H, W, 0, wanted, P, T
            )  # fmt: skip
        if step > 0:
            u = tl.where(place > step - 1, before, now)
            c = (step - 1) * P.out_channels + n
            if AFFINE:
                u = u * tl.load(scale + c, mask=valid, other=0.0)[None, :]
                u += tl.load(shift + c, mask=valid, other=0.0)[None, :]
            u = activated(u, u <= 0, ACTIVATION)
            d = tl.load(df + image * ALL + (position * ALL)[:, None] + c[None, :], mask=mask, other=0.0)
            dz = tl.sum(tl.where(inside[:, None], u, 0.0) * d.to(ACC), 0)
            tl.store(partial + tile.to(tl.int64) * ALL + c, dz, mask=valid)
        before = now
