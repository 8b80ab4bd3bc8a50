"""Small launches around the convolutions: parameters to packed order, and a draw to an order, without the host."""

import triton
import triton.language as tl


@triton.jit
def group_of(row, offsets, GROUPS: tl.constexpr):
    """The group that owns a packed row."""
    group = row * 0
    for g in tl.static_range(1, GROUPS):
        group += (row >= tl.load(offsets + g)).to(group.dtype)
    return group


@triton.jit
def undrawn_group(drawn, index: tl.constexpr, GROUPS: tl.constexpr):
    """The group of the undrawn row `index` of channels that are drawn into the groups `drawn`: the order is tasks, then
    shared, without the drawn one."""
    place = tl.where(drawn == 0, GROUPS - 1, drawn - 1)
    return (tl.where(place > index, index, index + 1) + 1) % GROUPS


@triton.jit
def pack_weight(
    block, weight, packed, out_order, out_offsets, in_order, in_offsets, stride_out, stride_in, stride_tap,
    P: tl.constexpr, EVERYTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight of one pass, [taps, rows (in), columns (out)].

    Zero in the padding and where an output does not read an input, unless all products with EVERYTHING are wanted.
    Where P.shares_products, the output side stays in the layer's order.
    """
    OUT_GROUPS: tl.constexpr = P.out_groups
    IN_GROUPS: tl.constexpr = P.in_groups
    index = block * BLOCK + tl.arange(0, BLOCK)
    o = index % P.columns
    i = index // P.columns % P.rows
    tap = index // (P.columns * P.rows)
    inputs: tl.constexpr = P.channels // P.in_groups if P.own_rows else P.channels
    valid = (o < P.out_channels) & (i < inputs) & (tap < P.taps_h * P.taps_w)
    kernel = o
    channel = i
    if not P.shares_products:
        kernel = tl.load(out_order + o, mask=valid, other=0).to(tl.int32)
    if not P.shares_products and not EVERYTHING:
        go = group_of(o, out_offsets, OUT_GROUPS)
        gi = group_of(i, in_offsets, IN_GROUPS)
        if P.routing == "arrow":
            valid = valid & (((go if P.adjoint else gi) == 0) | (gi == go))
        elif P.routing == "own":
            valid = valid & (gi == go)
    if not P.own_rows:
        channel = tl.load(in_order + i, mask=valid, other=0).to(tl.int32)
    at = kernel.to(tl.int64) * stride_out + channel.to(tl.int64) * stride_in + tap.to(tl.int64) * stride_tap
    value = tl.load(weight + at, mask=valid, other=0.0)
    tl.store(packed + index, value.to(packed.dtype.element_ty), mask=index < P.size)


@triton.jit
def find_places(
    block, places, order, offsets, WIDTH: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """places[g, k]: the packed row that kernel k has in group g, or -1. The inverse of `order`."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    g = index // WIDTH
    first = tl.load(offsets + g, mask=g < GROUPS, other=0)
    last = tl.load(offsets + g + 1, mask=g < GROUPS, other=0)
    place = index * 0 - 1
    for r0 in range(0, ROWS, 16):
        row = r0 + tl.arange(0, 16)
        kernel = tl.load(order + row, mask=row < ROWS, other=-1)
        here = (kernel[None, :] == (index % WIDTH)[:, None]) & (row[None, :] >= first[:, None])
        here = here & (row[None, :] < last[:, None])
        place += tl.sum(tl.where(here, row[None, :] + 1, 0), 1)
    tl.store(places + index, place, mask=g < GROUPS)


@triton.jit
def pack_kernel(
    weight, bias, forward, every, backward, packed_bias, row_places, column_places,
    row_order, row_offsets, column_order, column_offsets, stride_k, stride_c, stride_tap,
    F: tl.constexpr, B: tl.constexpr, G: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Everything that the forward pass F, its adjoint B, the weight gradient G and, where undrawn rows count, the
    gates' gradient want, in one launch: the weights, the bias, and where each kernel and input channel went. A program
    does BLOCK elements, or PLACES places."""
    ROW_GROUPS: tl.constexpr = G.row_groups
    COLUMN_GROUPS: tl.constexpr = G.column_groups
    ROWS: tl.constexpr = G.out_channels
    COLUMNS: tl.constexpr = G.channels
    forward_end: tl.constexpr = (F.size + BLOCK - 1) // BLOCK
    every_end: tl.constexpr = forward_end + (forward_end if F.undrawn else 0)
    backward_end: tl.constexpr = every_end + (B.size + BLOCK - 1) // BLOCK
    rows_end: tl.constexpr = backward_end + (G.row_groups * K + PLACES - 1) // PLACES
    columns_end: tl.constexpr = rows_end + (G.column_groups * C + PLACES - 1) // PLACES
    block = tl.program_id(0)
    if block < forward_end:
        pack_weight(
            block, weight, forward, row_order, row_offsets, column_order, column_offsets, stride_k, stride_c,
            stride_tap, F, False, BLOCK,
        )  # fmt: skip
    elif block < every_end:
        pack_weight(
            block - forward_end, weight, every, row_order, row_offsets, column_order, column_offsets, stride_k,
            stride_c, stride_tap, F, True, BLOCK,
        )  # fmt: skip
    elif block < backward_end:
        pack_weight(
            block - every_end, weight, backward, column_order, column_offsets, row_order, row_offsets,
            stride_c, stride_k, stride_tap, B, B.undrawn, BLOCK,
        )  # fmt: skip
    elif block < rows_end:
        find_places(block - backward_end, row_places, row_order, row_offsets, K, ROWS, ROW_GROUPS, PLACES)
    elif block < columns_end:
        block -= rows_end
        find_places(block, column_places, column_order, column_offsets, C, COLUMNS, COLUMN_GROUPS, PLACES)
    elif BIAS:
        row = (block - columns_end) * BLOCK + tl.arange(0, BLOCK)
        valid = row < F.out_channels
        kernel = row.to(tl.int64)
        if not F.shares_products:
            kernel = tl.load(row_order + row, mask=valid, other=0)
        value = tl.load(bias + kernel, mask=valid, other=0.0)
        tl.store(packed_bias + row, value.to(packed_bias.dtype.element_ty), mask=valid)


@triton.jit
def sample_kernel(
    log_p, noise, assignment, order, known, offsets, K: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS_2: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Each kernel's group, argmax(log_p + noise); the kernels sorted by group, stably; and known [GROUPS + 1, K]: each
    row's group, each kernel's row, and the groups of each row's undrawn rows (`FilterGroups`). One program."""
    k = tl.arange(0, BLOCK)
    g = tl.arange(0, GROUPS_2)
    at = k[:, None] * GROUPS + g[None, :]
    valid = (k < K)[:, None] & (g < GROUPS)[None, :]
    score = tl.load(log_p + at, mask=valid, other=float("-inf"))
    if NOISE:
        score += tl.load(noise + at, mask=valid, other=0.0)
    score = tl.where(valid & (score != score), float("inf"), score)  # NaN is the largest, as in torch
    drawn = tl.argmax(score, 1, tie_break_left=True)
    onehot = ((drawn[:, None] == g[None, :]) & valid).to(tl.int32)
    before = tl.cumsum(onehot, 0) - onehot  # how many kernels of the same group come first
    counts = tl.sum(onehot, 0)
    start = tl.cumsum(counts, 0) - counts
    row = tl.sum(tl.where(onehot > 0, before + start[None, :], 0), 1)
    tl.store(assignment + k, drawn.to(tl.int64), mask=k < K)
    tl.store(order + row, k.to(tl.int64), mask=k < K)
    tl.store(known + row, drawn.to(tl.int64), mask=k < K)
    tl.store(known + K + k, row.to(tl.int64), mask=k < K)
    for index in tl.static_range(GROUPS - 1):
        group = undrawn_group(drawn, index, GROUPS)
        tl.store(known + (2 + index) * K + row, group.to(tl.int64), mask=k < K)
    tl.store(offsets + g, start.to(tl.int64), mask=g < GROUPS)
    tl.store(offsets + GROUPS + g, tl.full((GROUPS_2,), K, tl.int64), mask=g == 0)
