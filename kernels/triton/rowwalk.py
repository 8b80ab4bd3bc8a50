"""The same convolutions for 3x3 kernels, stride 1 and few channels, where memory is the limit.

A program walks down the rows of a strip of the image. The nine weight tiles stay where they are, each row of the input
is read three times (shifted) instead of nine, and adds to the three output rows that it touches. With dilation d the
program walks over every d-th row, so that these three are always the last three of the walk.

A walk makes one or more products of the rows that it reads, each with a weight of its own:

    plain             one, with the packed weight
    kept product      two: with the shared channels (the kept product), and with the channels of the row's own task
    dundrawn          one for each group, in the order of the drawn row and the undrawn rows (kernels/contract.py)
    gates' gradient   one for each undrawn row

Nothing is skipped, what a product does not read is multiplied with zeros: up to 32 channels (measured on an H200 for
one product) that costs less than reading the input nine times.
"""

import triton
import triton.language as tl

from .activation import activated
from .convolve import walk_at
from .pack import group_of, undrawn_group


@triton.jit
def weight_tile(w, t, s, c, n, read, P: tl.constexpr):
    """Tap (t, s) of the walk, zero where n does not `read` c; an adjoint pass meets the kernel's taps in reverse."""
    tap = 8 - (3 * t + s) if P.adjoint else 3 * t + s
    return tl.load(w + (tap * P.rows + c)[:, None] * P.columns + n[None, :], mask=read, other=0.0)


@triton.jit
def weight_tiles(w, c, n, read, P: tl.constexpr):
    """All nine."""
    tiles = ()
    for t in tl.static_range(3):
        for s in tl.static_range(3):
            tiles = tiles + (weight_tile(w, t, s, c, n, read, P),)  # noqa: RUF005
    return tiles


@triton.jit
def reads(group, read_group, P: tl.constexpr):
    """Does a row of `group` read a channel of `read_group`, or, going back, get the gradient of one?"""
    own = group == read_group
    if P.routing == "arrow":
        own = own | ((group if P.adjoint else read_group) == 0)
    return own


@triton.jit
def where_to(OH, OW, steps, P: tl.constexpr, T: tl.constexpr):
    """Of this program: its channels n, columns j, first step of the walk, first row, image, and number among all that
    have these channels."""
    BLOCK_N: tl.constexpr = P.block_n
    TILES_N: tl.constexpr = P.columns // P.block_n
    walks = tl.cdiv(tl.cdiv(OH, P.dilation_h), steps)
    n = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.program_id(0) // TILES_N
    j, m0, residue, image = walk_at(number, OW, walks, steps, P.dilation_h, T)
    return n, j, m0, residue, image, number


@triton.jit
def first_read(residue, j, P: tl.constexpr):
    """The row and the columns of the input that the first tap of output pixel (residue, j) meets."""
    if P.adjoint:
        return residue + (P.padding_h - 2 * P.dilation_h), j + (P.padding_w - 2 * P.dilation_w)
    else:
        return residue - P.padding_h, j - P.padding_w


@triton.jit
def input_tile(x, h, v, c, H, W, P: tl.constexpr):
    """Pixels (h, v), h one row and v [strip], all channels."""
    mask = ((h >= 0) & (h < H) & (v >= 0) & (v < W))[:, None] & (c < P.channels)[None, :]
    at = ((h * W + v) * P.channels)[:, None] + c[None, :]
    return tl.load(x + at, mask=mask, other=0.0)


@triton.jit
def add_row(sums, starts, weights, x, h, v, c, H, W, P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    """Adds row h of the input to the sums of the three output rows that it touches.

    sums: of every product the row that h completes, and the one below it. Returns the completed rows, and new `sums`.
    """
    PRODUCTS: tl.constexpr = len(starts)
    a0 = input_tile(x, h, v, c, H, W, P)
    a1 = input_tile(x, h, v + P.dilation_w, c, H, W, P)
    a2 = input_tile(x, h, v + 2 * P.dilation_w, c, H, W, P)
    rows = (a0, a1, a2)
    done = ()
    new = ()
    for q in tl.static_range(PRODUCTS):
        last = sums[2 * q]
        middle = sums[2 * q + 1]
        begun = starts[q]
        for s in tl.static_range(3):
            last = tl.dot(rows[s], weights[q][6 + s], last, input_precision=T.precision, out_dtype=ACC)
            middle = tl.dot(rows[s], weights[q][3 + s], middle, input_precision=T.precision, out_dtype=ACC)
            begun = tl.dot(rows[s], weights[q][s], begun, input_precision=T.precision, out_dtype=ACC)
        done = done + (last,)  # noqa: RUF005
        new = new + (middle, begun)  # noqa: RUF005
    return done, new


@triton.jit
def store_row(out, y, added, at, mask, T: tl.constexpr):
    """relu(out) + added."""
    if T.relu:
        out = tl.where(out <= 0, 0.0, out)
    if T.residual:
        out += tl.load(added + at, mask=mask, other=0.0).to(out.dtype)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps"])
def rowwalk_kernel(
    x, w, bias, added, added_undrawn, y, second, out_offsets, in_offsets, H, W, OH, OW, steps,
    P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One strip, `steps` output rows, one tile of output channels: u into y; and where undrawn rows count, into
    `second` the kept product, or going back dundrawn."""
    BLOCK_N: tl.constexpr = P.block_n
    STRIP: tl.constexpr = T.pixels_w
    CHUNK: tl.constexpr = 16 if P.channels <= 16 else 32
    GROUPS: tl.constexpr = P.out_groups
    ALL: tl.constexpr = (P.out_groups - 1) * P.out_channels
    n, j, m0, residue, image, _ = where_to(OH, OW, steps, P, T)
    x += image * H * W * P.channels
    image_out = image * OH * OW
    c = tl.arange(0, CHUNK)
    valid = n < P.out_channels
    zero = tl.zeros((STRIP, BLOCK_N), ACC)
    start = zero
    if T.bias:
        start += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    starts = (start,)
    if P.products > 1:
        drawn = group_of(n, out_offsets, P.out_groups)[None, :]
        read_group = group_of(c, in_offsets, P.in_groups)[:, None]
        if P.adjoint:
            weights = (weight_tiles(w, c, n, reads(drawn, read_group, P), P),)
            for index in tl.static_range(GROUPS - 1):
                read = reads(undrawn_group(drawn, index, GROUPS), read_group, P)
                weights = weights + (weight_tiles(w, c, n, read, P),)  # noqa: RUF005
                starts = starts + (zero,)  # noqa: RUF005
        else:
            shared = weight_tiles(w, c, n, (read_group == 0) & valid[None, :], P)
            weights = (shared, weight_tiles(w, c, n, (read_group == drawn) & (read_group > 0), P))
            starts = (start, zero)
    else:
        weights = (weight_tiles(w, c, n, (c >= 0)[:, None] & (n >= 0)[None, :], P),)
    sums = ()
    for q in tl.static_range(len(starts)):
        sums = sums + (starts[q], starts[q])  # noqa: RUF005
    top, left = first_read(residue, j, P)
    for m in range(m0, m0 + steps + 2):
        h = top + m * P.dilation_h
        done, sums = add_row(sums, starts, weights, x, h, left, c, H, W, P, T, ACC)
        row = residue + (m - 2) * P.dilation_h
        inside = (m >= m0 + 2) & (row < OH) & (j < OW)
        mask = inside[:, None] & valid[None, :]
        pixel = (row * OW + j)[:, None]
        at = image_out * P.out_channels + pixel * P.out_channels + n[None, :]
        if P.products > 1 and not P.adjoint:
            tl.store(second + at, done[0].to(second.dtype.element_ty), mask=mask)
            store_row(done[0] + done[1], y, added, at, mask, T)
        else:
            store_row(done[0], y, added, at, mask, T)
        for index in tl.static_range(1, len(done) if P.adjoint else 1):
            at = image_out * ALL + pixel * ALL + ((index - 1) * P.out_channels + n)[None, :]
            store_row(done[index], second, added_undrawn, at, mask, T)


@triton.jit(do_not_specialize=["steps"])
def rowwalk_gates_kernel(
    x, w, bias, kept_product, df, scale, shift, partial, out_offsets, in_offsets, H, W, OH, OW, steps,
    P: tl.constexpr, T: tl.constexpr, KEPT: tl.constexpr, AFFINE: tl.constexpr, EACH_IMAGE: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `gate_gradient_kernel` (every_group.py): dz of the undrawn gates of one strip, `steps` rows and one tile of
    kernels -> partial[number of the walk, undrawn row, k]."""
    BLOCK_N: tl.constexpr = P.block_n
    STRIP: tl.constexpr = T.pixels_w
    CHUNK: tl.constexpr = 16 if P.channels <= 16 else 32
    GROUPS: tl.constexpr = P.out_groups
    ALL: tl.constexpr = (P.out_groups - 1) * P.out_channels
    n, j, m0, residue, image, number = where_to(OH, OW, steps, P, T)
    x += image * H * W * P.channels
    image_out = image * OH * OW
    if EACH_IMAGE:
        scale += image * ALL
        shift += image * ALL
    c = tl.arange(0, CHUNK)
    valid = n < P.out_channels
    start = tl.zeros((STRIP, BLOCK_N), ACC)
    if T.bias and not KEPT:
        start += tl.load(bias + n, mask=valid, other=0.0)[None, :]
    drawn = group_of(n, out_offsets, P.out_groups)[None, :]
    read_group = group_of(c, in_offsets, P.in_groups)[:, None]
    weights = ()
    starts = ()
    sums = ()
    dz = ()
    for index in tl.static_range(GROUPS - 1):
        read = reads(undrawn_group(drawn, index, GROUPS), read_group, P)
        if KEPT:
            read = read & (read_group > 0)
        weights = weights + (weight_tiles(w, c, n, read, P),)  # noqa: RUF005
        starts = starts + (start,)  # noqa: RUF005
        sums = sums + (start, start)  # noqa: RUF005
        dz = dz + (tl.zeros((STRIP, BLOCK_N), ACC),)  # noqa: RUF005
    top, left = first_read(residue, j, P)
    for m in range(m0, m0 + steps + 2):
        h = top + m * P.dilation_h
        done, sums = add_row(sums, starts, weights, x, h, left, c, H, W, P, T, ACC)
        row = residue + (m - 2) * P.dilation_h
        inside = (m >= m0 + 2) & (row < OH) & (j < OW)
        mask = inside[:, None] & valid[None, :]
        pixel = (row * OW + j)[:, None]
        kept = tl.zeros((STRIP, BLOCK_N), ACC)
        if KEPT:
            at = image_out * P.out_channels + pixel * P.out_channels + n[None, :]
            kept += tl.load(kept_product + at, mask=mask, other=0.0).to(ACC)
        more = ()
        for index in tl.static_range(GROUPS - 1):
            u = done[index] + kept
            k = index * P.out_channels + n
            if AFFINE:
                u = u * tl.load(scale + k, mask=valid, other=0.0)[None, :]
                u += tl.load(shift + k, mask=valid, other=0.0)[None, :]
            u = activated(u, u <= 0, ACTIVATION)
            d = tl.load(df + image_out * ALL + pixel * ALL + k[None, :], mask=mask, other=0.0)
            more = more + (dz[index] + tl.where(mask, u, 0.0) * d.to(ACC),)  # noqa: RUF005
        dz = more
    for index in tl.static_range(GROUPS - 1):
        to = partial + number.to(tl.int64) * ALL + index * P.out_channels + n
        tl.store(to, tl.sum(dz[index], 0), mask=valid)
