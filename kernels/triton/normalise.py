"""Batch and instance normalisation, the activation and the shortcut behind it, of channels_last images of C channels.

P pixels are normalised together: those of all images, or, with EACH_IMAGE, those of one image. In that case every image
has programs of its own, and its own part of each array that holds statistics.

Statistics are sums over pixels. Programs make them of a part of the pixels each (`PARTS` parts), and a last one adds
these up, so that the bits are the same every time.
"""

import triton
import triton.language as tl

from .activation import activated, through_activation


@triton.jit
def image_and_number(programs, EACH_IMAGE: tl.constexpr):
    """The image of a program, and the program's number (along the first axis) among the `programs` of its image."""
    if EACH_IMAGE:
        return (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    else:
        return 0, tl.program_id(0)


@triton.jit
def block_at(part, parts, P, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a program (part, channels): its first pixel, the pixel behind its last, and its channels."""
    per_part = tl.cdiv(tl.cdiv(P, BLOCK_P), parts) * BLOCK_P
    first = part * per_part
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return first, tl.minimum(first + per_part, P), c


@triton.jit
def affine_of(order, weight, bias, mean, var, eps, c, C: tl.constexpr, ORDER: tl.constexpr):
    """Kernel, scale, shift and mean of channels c."""
    valid = c < C
    kernel = tl.load(order + c, mask=valid, other=0) if ORDER else c
    average = tl.load(mean + kernel, mask=valid, other=0.0)
    scale = tl.load(weight + kernel, mask=valid, other=0.0).to(average.dtype)
    scale = scale / tl.sqrt(tl.load(var + kernel, mask=valid, other=1.0) + eps)
    shift = tl.load(bias + kernel, mask=valid, other=0.0).to(average.dtype) - average * scale
    return kernel, scale, shift, average


@triton.jit
def moments_kernel(
    u, partial, P, parts,
    C: tl.constexpr, EACH_IMAGE: tl.constexpr, ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of each part, and sum of squares about it -> partial [images, parts, 2, C]."""
    image, part = image_and_number(parts, EACH_IMAGE)
    u += image * P * C
    first, last, c = block_at(part, parts, P, BLOCK_P, BLOCK_C)
    valid = c < C
    # Sums of differences to one of the values: with a mean far from zero those of the values themselves would cancel.
    pivot = tl.load(u + first.to(tl.int64) * C + c, mask=valid & (first < P), other=0.0).to(ACC)
    sums = tl.zeros((BLOCK_C,), ACC)
    squares = tl.zeros((BLOCK_C,), ACC)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & valid[None, :]
        value = tl.load(u + p.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)
        difference = tl.where(mask, value - pivot[None, :], 0.0)
        sums += tl.sum(difference, 0)
        squares += tl.sum(difference * difference, 0)
    count = tl.maximum(last - first, 1).to(ACC)
    to = partial + tl.program_id(0) * 2 * C + c
    tl.store(to, pivot + sums / count, mask=valid)
    tl.store(to + C, squares - sums * sums / count, mask=valid)


@triton.jit
def moved(old, rate, new):
    """`old`, moved towards `new` at this rate."""
    return old + rate.to(old.dtype) * (new.to(old.dtype) - old)


@triton.jit
def move_statistics(
    mean, var, kernel, valid, count, assignment, running_mean, running_var, draws, pooled_mean, pooled_var, momentum,
    K: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Moves the running statistics of these kernels in the groups that they are drawn into: see kernels/spec.py."""
    at = tl.load(assignment + kernel, mask=valid, other=0) * K + kernel
    times = tl.load(draws + at, mask=valid, other=0) + 1
    of_all = tl.full(kernel.shape, 1, draws.dtype.element_ty)
    for g in tl.static_range(GROUPS):
        of_all += tl.load(draws + g * K + kernel, mask=valid, other=0)
    unbiased = var * (count / tl.maximum(count - 1, 1))
    rate = tl.maximum(1 / times, momentum)
    new_mean = moved(tl.load(running_mean + at, mask=valid, other=0.0), rate, mean)
    new_var = moved(tl.load(running_var + at, mask=valid, other=0.0), rate, unbiased)
    rate = tl.maximum(1 / of_all, momentum)
    new_pooled_mean = moved(tl.load(pooled_mean + kernel, mask=valid, other=0.0), rate, mean)
    new_pooled_var = moved(tl.load(pooled_var + kernel, mask=valid, other=0.0), rate, unbiased)
    tl.debug_barrier()  # several threads may hold the same number: all have read it before one of them writes
    tl.store(draws + at, times, mask=valid)
    tl.store(running_mean + at, new_mean, mask=valid)
    tl.store(running_var + at, new_var, mask=valid)
    tl.store(pooled_mean + kernel, new_pooled_mean, mask=valid)
    tl.store(pooled_var + kernel, new_pooled_var, mask=valid)


@triton.jit
def part_at(partial, first, parts, per_part, P, c, C: tl.constexpr, PARTS: tl.constexpr):
    """Of PARTS parts: their numbers of pixels [PARTS, 1], where their means lie, and which of these there are."""
    part = first + tl.arange(0, PARTS)
    count = tl.minimum(tl.maximum(P - part * per_part, 0), per_part)
    count = tl.where(part < parts, count, 0)[:, None]
    return count, partial + part[:, None] * 2 * C + c[None, :], (count > 0) & (c < C)[None, :]


@triton.jit
def statistics_kernel(
    partial, order, weight, bias, mean, var, affine, assignment, running_mean, running_var, draws, pooled_mean,
    pooled_var, P, parts, eps, momentum,
    C: tl.constexpr, ORDER: tl.constexpr, EACH_IMAGE: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of all parts: mean and variance [images, C] of each channel's kernel, and scale and shift [images, 2, C] of each
    channel. Where there are GROUPS the running statistics move, too."""
    image, block = image_and_number(tl.cdiv(C, BLOCK_C), EACH_IMAGE)
    partial += image * parts * 2 * C
    mean += image * C
    var += image * C
    affine += image * 2 * C
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < C
    per_part = tl.cdiv(tl.cdiv(P, BLOCK_P), parts) * BLOCK_P
    sums = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, parts, PARTS):
        count, at, mask = part_at(partial, first, parts, per_part, P, c, C, PARTS)
        sums += tl.sum(tl.load(at, mask=mask, other=0.0) * count.to(ACC), 0)
    average = sums / P.to(ACC)
    squares = tl.zeros((BLOCK_C,), ACC)
    for first in range(0, parts, PARTS):  # once more, about the mean: about any other value they could cancel
        count, at, mask = part_at(partial, first, parts, per_part, P, c, C, PARTS)
        off = tl.where(mask, tl.load(at, mask=mask, other=0.0) - average[None, :], 0.0)
        squares += tl.sum(tl.load(at + C, mask=mask, other=0.0) + count.to(ACC) * off * off, 0)
    variance = squares / P.to(ACC)
    kernel = tl.load(order + c, mask=valid, other=0) if ORDER else c
    tl.store(mean + kernel, average, mask=valid)
    tl.store(var + kernel, variance, mask=valid)
    scale = tl.load(weight + kernel, mask=valid, other=0.0).to(ACC) / tl.sqrt(variance + eps)
    shift = tl.load(bias + kernel, mask=valid, other=0.0).to(ACC) - average * scale
    tl.store(affine + c, scale, mask=valid)
    tl.store(affine + C + c, shift, mask=valid)
    if GROUPS > 0:
        move_statistics(
            average, variance, kernel, valid, P.to(ACC), assignment, running_mean, running_var, draws, pooled_mean,
            pooled_var, momentum, C, GROUPS,
        )  # fmt: skip


@triton.jit
def affine_kernel(
    u, residual, affine, y, P,
    C: tl.constexpr, EACH_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(scale * u + shift) + residual, where affine [images, 2, C] are scale and shift."""
    image, block = image_and_number(tl.cdiv(P, BLOCK_P), EACH_IMAGE)
    u += image * P * C
    residual += image * P * C
    affine += image * 2 * C
    y += image * P * C
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < P)[:, None] & (c < C)[None, :]
    at = p.to(tl.int64)[:, None] * C + c[None, :]
    scale = tl.load(affine + c, mask=c < C, other=0.0)
    shift = tl.load(affine + C + c, mask=c < C, other=0.0)
    value = tl.load(u + at, mask=mask, other=0.0).to(scale.dtype) * scale[None, :] + shift[None, :]
    value = activated(value, value < 0, ACTIVATION)
    if RESIDUAL:
        value += tl.load(residual + at, mask=mask, other=0.0).to(scale.dtype)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gradient_at(dy, u, at, mask, scale, shift, ACTIVATION: tl.constexpr):
    """u, and g = dL/d(scale * u + shift)."""
    value = tl.load(u + at, mask=mask, other=0.0).to(scale.dtype)
    g = tl.load(dy + at, mask=mask, other=0.0).to(scale.dtype)
    return value, through_activation(g, value * scale[None, :] + shift[None, :], ACTIVATION)


@triton.jit
def gradient_sums_kernel(
    dy, u, order, weight, bias, mean, var, partial, P, parts, eps,
    C: tl.constexpr, ORDER: tl.constexpr, EACH_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * (u - mean) over each part -> partial [images, parts, 2, C]; g = dL/d(scale * u + shift)."""
    image, part = image_and_number(parts, EACH_IMAGE)
    dy += image * P * C
    u += image * P * C
    mean += image * C
    var += image * C
    first, last, c = block_at(part, parts, P, BLOCK_P, BLOCK_C)
    _, scale, shift, average = affine_of(order, weight, bias, mean, var, eps, c, C, ORDER)
    sums = tl.zeros((BLOCK_C,), ACC)
    moments = tl.zeros((BLOCK_C,), ACC)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < last)[:, None] & (c < C)[None, :]
        value, g = gradient_at(dy, u, p.to(tl.int64)[:, None] * C + c[None, :], mask, scale, shift, ACTIVATION)
        g = tl.where(mask, g, 0.0)
        sums += tl.sum(g, 0)
        moments += tl.sum(g * (value - average[None, :]), 0)
    to = partial + tl.program_id(0) * 2 * C + c
    tl.store(to, sums, mask=c < C)
    tl.store(to + C, moments, mask=c < C)


@triton.jit
def slopes_kernel(
    partial, order, weight, bias, mean, var, dweight, dbias, slope, offset, P, parts, eps,
    C: tl.constexpr, ORDER: tl.constexpr, EACH_IMAGE: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight and dbias [images, K], and slope and offset [images, C] of du = scale * g + slope * u + offset."""
    image, block = image_and_number(tl.cdiv(C, BLOCK_C), EACH_IMAGE)
    partial += image * parts * 2 * C
    mean += image * C
    var += image * C
    dweight += image * C
    dbias += image * C
    slope += image * C
    offset += image * C
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    kernel, scale, _, average = affine_of(order, weight, bias, mean, var, eps, c, C, ORDER)
    plain = tl.zeros((BLOCK_C,), scale.dtype)
    moment = tl.zeros((BLOCK_C,), scale.dtype)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (c < C)[None, :]
        at = partial + part[:, None] * 2 * C + c[None, :]
        plain += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        moment += tl.sum(tl.load(at + C, mask=mask, other=0.0), 0)
    variance = tl.load(var + kernel, mask=c < C, other=1.0) + eps
    total = P.to(plain.dtype)
    a = -scale * moment / variance / total
    tl.store(dbias + kernel, plain, mask=c < C)
    tl.store(dweight + kernel, moment / tl.sqrt(variance), mask=c < C)
    tl.store(slope + c, a, mask=c < C)
    tl.store(offset + c, -scale * plain / total - a * average, mask=c < C)


@triton.jit
def affine_gradient_kernel(
    dy, u, order, weight, bias, mean, var, slope, offset, add, du, P, eps,
    C: tl.constexpr, ORDER: tl.constexpr, EACH_IMAGE: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """du = scale * g + slope * u + offset + add."""
    image, block = image_and_number(tl.cdiv(P, BLOCK_P), EACH_IMAGE)
    dy += image * P * C
    u += image * P * C
    mean += image * C
    var += image * C
    slope += image * C
    offset += image * C
    add += image * P * C
    du += image * P * C
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    _, scale, shift, _ = affine_of(order, weight, bias, mean, var, eps, c, C, ORDER)
    mask = (p < P)[:, None] & (c < C)[None, :]
    at = p.to(tl.int64)[:, None] * C + c[None, :]
    value, g = gradient_at(dy, u, at, mask, scale, shift, ACTIVATION)
    gradient = scale[None, :] * g + tl.load(slope + c, mask=c < C, other=0.0)[None, :] * value
    gradient += tl.load(offset + c, mask=c < C, other=0.0)[None, :]
    if ADD:
        gradient += tl.load(add + at, mask=mask, other=0.0).to(gradient.dtype)
    tl.store(du + at, gradient.to(du.dtype.element_ty), mask=mask)
