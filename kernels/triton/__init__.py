"""The routed convolution in Triton, for CUDA and ROCm devices; on CPU tensors in Triton's interpreter.

The kernels work on channels_last tensors; a tensor in another format is copied. No function here waits for the device:
what a draw decides (which channels are read, which row a kernel has) stays in device memory, so a CUDA graph can
capture a training step. Sums are float32 (float64 for float64 tensors) and made in a fixed order, so the bits are the
same every time. `contract.py` says what each function computes.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import fold, fold_rows, plain, same_kernels_for_every_group
from ..spec import NO_SHORTCUT, MovingStatistics, Norm, RoutedConv, ShortcutGradient, UndrawnFormula
from . import config, cudnn
from .config import Launch, Pass
from .convolve import convolve_kernel
from .every_group import convolve_all_kernel, convolve_kept_kernel, convolve_undrawn_kernel, gate_gradient_kernel
from .normalise import (
    affine_gradient_kernel,
    affine_kernel,
    gradient_sums_kernel,
    moments_kernel,
    slopes_kernel,
    statistics_kernel,
)
from .pack import pack_kernel, sample_kernel
from .rowwalk import rowwalk_gates_kernel, rowwalk_kernel
from .wgrad import reduce_kernel, rowwalk_weights_kernel, weight_gradient_kernel

SHARES_PRODUCTS = NORMALISES = True
OF_TORCH = MASKS_GRADIENTS = COMPUTES_GATE_GRADIENTS = READS_NORMALISED = False
MEMORY_FORMAT, KNOWS = torch.channels_last, (None, "relu", "leaky_relu")
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Packed(NamedTuple):
    """A layer's parameters as the passes want them, and where each kernel went."""

    kernel: tuple[int, int]
    format: torch.memory_format  # of the weight, and so of its gradient: autograd would copy another one
    forward: Tensor  # [taps, channels, kernels], padded; zero where a kernel's row does not read a channel
    every: Tensor | None  # the same without these zeros: what undrawn rows want
    backward: Tensor  # [taps, kernels, channels], padded
    bias: Tensor | None  # [rows], float32
    row_places: Tensor  # int32 [groups, K]: the row of kernel k in group g, or -1
    column_places: Tensor  # int32 [groups, C]
    # If all groups have the same kernels: the plain convolution by these, for one weight gradient of all groups.
    folded: tuple[RoutedConv, Packed] | None = None


def missing() -> str | None:
    if INTERPRETED:
        # Its `range` of a tensor converts an array of one element to a number, which numpy refuses from 2.4 on.
        if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
            found = f"Triton {triton.__version__} with numpy {numpy.__version__}"
            return f"{found}: Triton's interpreter needs Triton 3.7, or numpy before 2.4"
        return None
    return None if torch.cuda.is_available() else "there is no GPU, and TRITON_INTERPRET=1 is not set"


def _version(package: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


def cannot(x: Tensor) -> str | None:
    if INTERPRETED:
        if x.device.type != "cpu":
            return f"the tensor is on {x.device}, Triton's interpreter (TRITON_INTERPRET=1) runs on the CPU"
        if x.dtype not in (torch.float16, torch.float32, torch.float64):
            return f"the tensor is {x.dtype}, in Triton's interpreter products are right in float16, 32 and 64 only"
    else:
        if x.device.type != "cuda":
            return f"the tensor is on {x.device}, the Triton kernels run on a GPU (or with TRITON_INTERPRET=1)"
        if x.dtype not in DTYPES:
            return f"the tensor is {x.dtype}, the Triton kernels take {', '.join(map(str, DTYPES))}"
    if x.dim() > 4:
        return f"the tensor has {x.dim()} dimensions, the Triton kernels take images [N, C, H, W]"
    if type(x) not in (Tensor, torch.nn.Parameter) or x.layout is not torch.strided:
        return f"the tensor is a {type(x).__name__} ({x.layout}), the Triton kernels need plain memory"
    return None


def sample(log_p: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    kernels, groups = log_p.shape
    log_p = log_p.contiguous()
    assignment, order = (log_p.new_empty(kernels, dtype=torch.int64) for _ in range(2))
    known = log_p.new_empty((groups + 1, kernels), dtype=torch.int64)
    offsets = log_p.new_empty(groups + 1, dtype=torch.int64)
    noise = None if noise is None else noise.contiguous()
    sizes = (kernels, groups, triton.next_power_of_2(kernels), triton.next_power_of_2(groups))
    arrays = (log_p, log_p if noise is None else noise, assignment, order, known, offsets)
    _launch(sample_kernel, 1, *arrays, *sizes, noise is not None)
    return assignment, order, offsets, {"ids": known[0], "inverse": known[1], "undrawn_groups": known[2:]}


def pack(weight: Tensor, bias: Tensor | None, spec: RoutedConv, dtype: torch.dtype) -> Packed:
    kernels, channels = weight.shape[:2]
    kernel = (weight.shape[2], weight.shape[3])
    forward_pass, backward_pass, gradient = config.passes(spec, kernel, dtype, config.device_of(weight.device))
    if (kernels, channels) != (spec.rows.width, spec.columns.width):
        raise RuntimeError(
            f"the weight has shape {tuple(weight.shape)}, expected [{spec.rows.width}, {spec.columns.width}, ...]"
        )
    if min(kernel) > 1 and weight.stride(2) != weight.stride(3) * kernel[1]:
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    forward_weight, backward_weight = (
        torch.empty(size, dtype=dtype, device=weight.device) for size in (forward_pass.size, backward_pass.size)
    )
    every = torch.empty_like(forward_weight) if forward_pass.undrawn else None
    row_places = torch.empty(gradient.row_groups, kernels, dtype=torch.int32, device=weight.device)
    column_places = torch.empty(gradient.column_groups, channels, dtype=torch.int32, device=weight.device)
    packed_bias = None
    if bias is not None:
        packed_bias = torch.empty(forward_pass.out_channels, dtype=_sums(dtype)[0], device=weight.device)
    orders = [tensor for groups in (spec.rows, spec.columns) for tensor in (groups.order, groups.offsets)]
    block, places = 1024, 64
    programs = sum(config.cdiv(p, block) for p in (forward_pass.size, backward_pass.size, forward_pass.out_channels))
    programs += 0 if every is None else config.cdiv(forward_pass.size, block)
    programs += sum(config.cdiv(p.numel(), places) for p in (row_places, column_places))
    _launch(
        pack_kernel, programs,
        weight, weight if bias is None else bias, forward_weight, forward_weight if every is None else every,
        backward_weight, weight if packed_bias is None else packed_bias, row_places, column_places, *orders,
        *_strides(weight), forward_pass, backward_pass, gradient, kernels, channels,
        bias is not None, block, places,
    )  # fmt: skip
    folded = None
    if same_kernels_for_every_group(spec):
        one = plain(spec, kernels, channels)
        folded = one, pack(weight, None, one, dtype)
    last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    return Packed(
        kernel, memory_format, forward_weight, every, backward_weight, packed_bias, row_places, column_places, folded
    )


def forward(
    x: Tensor,
    packed: Packed,
    spec: RoutedConv,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    keep_product: bool = False,
) -> tuple[Tensor, Tensor | None]:
    p = config.passes(spec, packed.kernel, x.dtype, config.device_of(x.device))[0]
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), packed.kernel)
    offsets = spec.rows.offsets, spec.columns.offsets
    convolve = functools.partial(
        _convolve, x, packed.forward, p, offsets, size, relu=relu, bias=packed.bias, two=keep_product
    )
    if residual is not None and (p.shares_products or keep_product):
        u, kept_product = convolve()
        return u + residual, kept_product
    return convolve(added=(residual, None))


def input_gradient(
    dy: Tensor,
    packed: Packed,
    spec: RoutedConv,
    size: tuple[int, ...],
    *,
    relu_output: Tensor | None = None,
    shortcut: ShortcutGradient = NO_SHORTCUT,
) -> tuple[Tensor, Tensor | None]:
    assert relu_output is None, "dy has gone back through the ReLU already"
    p = config.passes(spec, packed.kernel, dy.dtype, config.device_of(dy.device))[1]
    offsets = spec.columns.offsets, spec.rows.offsets
    # A kernel adds to all that it writes, or to nothing.
    adds = not p.shares_products and shortcut.dx is not None and (shortcut.dundrawn is not None) == p.undrawn
    found = _convolve(dy, packed.backward, p, offsets, size, added=shortcut if adds else NO_SHORTCUT, two=p.undrawn)
    if adds:
        return found
    dx, dundrawn = (d if d is None or more is None else d + more for d, more in zip(found, shortcut, strict=True))
    assert dx is not None
    return dx, dundrawn


def gate_gradient(formula: UndrawnFormula, dundrawn: Tensor) -> Tensor:
    x, kept_product, packed, spec, scale, shift, activation = formula
    p = config.passes(spec, packed.kernel, x.dtype, config.device_of(x.device))[0]
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), packed.kernel)
    channels = (p.out_groups - 1) * p.out_channels
    _check(x, "the input", (dundrawn.shape[0], p.channels, *x.shape[2:]))
    _check(dundrawn, "the gradient", (x.shape[0], channels, *size))
    _check(kept_product, "the kept product", (x.shape[0], p.out_channels, *size))
    x, df = _nhwc(x), _nhwc(dundrawn)
    torch_sum, sum_type = _sums(x.dtype)
    affine, each_image = scale is not None, scale is not None and len(scale) > 1
    scale, shift = (
        df if values is None else values.to(torch_sum).expand(-1, p.out_groups - 1, -1).contiguous()
        for values in (scale, shift)
    )
    fused = False, False, packed.bias is not None, _wide(x, df)
    bits, device = x.element_size() * 8, config.device_of(x.device)
    launch = config.plan(p, bits, x.shape[0], size, device, *fused, gates=True)
    partial = torch.empty(launch.programs // (p.columns // p.block_n), channels, dtype=torch_sum, device=x.device)
    weight = packed.forward if packed.every is None else packed.every
    bias = weight if packed.bias is None else packed.bias
    arrays = x, weight, bias, df if kept_product is None else _nhwc(kept_product), df, scale, shift, partial
    if len(partial):
        sizes = spec.rows.offsets, spec.columns.offsets, x.shape[2], x.shape[3], *size
        options = p, launch.tiles, kept_product is not None, affine, each_image, activation, sum_type
        if launch.kernel == "rowwalk_gates":
            _launch(rowwalk_gates_kernel, launch, *arrays, *sizes, launch.steps, *options)
        else:
            _launch(gate_gradient_kernel, launch, *arrays, *sizes, *options)
    return partial.sum(0).view(p.out_groups - 1, p.out_channels)


def weight_gradient(
    x: Tensor, dy: Tensor, packed: Packed, spec: RoutedConv, *, relu_output: Tensor | None = None, bias: bool = True
) -> tuple[Tensor, Tensor | None]:
    assert relu_output is None, "dy has gone back through the ReLU already"
    if packed.folded is not None:
        x, dy = fold(x, spec), fold_rows(dy, spec)
        spec, packed = packed.folded
    g = config.passes(spec, packed.kernel, x.dtype, config.device_of(x.device))[2]
    size = spec.geometry.output_size((x.shape[2], x.shape[3]), packed.kernel)
    _check(x, "the input", (dy.shape[0], g.channels, *x.shape[2:]))
    _check(dy, "the gradient", (dy.shape[0], g.out_channels, *size))
    x, dy = _nhwc(x), _nhwc(dy)
    fused = bias, _wide(x, dy)
    launch = config.plan_gradient(g, x.element_size() * 8, dy.shape[0], size, config.device_of(x.device), *fused)
    torch_sum, sum_type = _sums(x.dtype)
    new: dict[str, Any] = {"dtype": torch_sum, "device": x.device}
    kernels, channels, splits = spec.rows.width, spec.columns.width, launch.second
    # Products that no row reads stay undefined here; `reduce_kernel` writes zeros for them.
    partial = torch.empty(splits * g.taps_h * g.taps_w * g.channels * g.out_channels, **new)
    partial_bias = torch.empty(splits * g.out_channels if bias else 0, **new)
    dw = torch.empty(kernels, channels, *packed.kernel, **new, memory_format=packed.format)
    db = torch.empty(kernels, **new) if bias else None
    offsets = spec.rows.offsets, spec.columns.offsets
    arrays = x, dy, partial, partial_bias, *offsets, x.shape[2], x.shape[3], *size
    constants = g, launch.tiles, sum_type
    if launch.kernel == "rowwalk_weights":
        rows = config.cdiv(size[0], g.dilation_h) + 2
        units = dy.shape[0] * g.dilation_h * config.cdiv(size[1], launch.tiles.pixels_w)
        units *= config.cdiv(rows, launch.steps)
        per_split = config.cdiv(units, splits)
        _launch(rowwalk_weights_kernel, launch, *arrays, units, per_split, launch.steps, *constants)
    else:
        pixel_tiles = config.cdiv(size[0], launch.tiles.pixels_h) * config.cdiv(size[1], launch.tiles.pixels_w)
        _launch(weight_gradient_kernel, launch, *arrays, dy.shape[0] * pixel_tiles, launch.steps, *constants)
    blocks = config.reduction(splits)
    _launch(
        reduce_kernel, config.cdiv(dw.numel(), blocks[0]), partial, partial_bias, dw, dw if db is None else db,
        packed.row_places, packed.column_places, splits, *_strides(dw), g, kernels, channels, bias, sum_type, *blocks,
    )  # fmt: skip
    return dw, db


def normalise(
    u: Tensor, norm: Norm, residual: Tensor | None, *, moves: MovingStatistics | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(residual, "the residual", tuple(u.shape))
    weight, bias, order, eps, activation, each_image = norm
    u, (torch_sum, sum_type) = _nhwc(u), _sums(u.dtype)
    channels, launch = u.shape[1], _norm(u, norm)
    new: dict[str, Any] = {"dtype": torch_sum, "device": u.device}
    of_each = (len(u),) if each_image else ()
    partial = torch.empty(*of_each, launch.parts, 2, channels, **new)
    mean, var, affine = (torch.empty(*of_each, *size, channels, **new) for size in ((), (), (2,)))
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    blocks = launch.block_p, launch.block_c
    _launch(
        moments_kernel, launch.sums, u, partial, launch.pixels, launch.parts, channels, each_image, sum_type, *blocks
    )
    moving: tuple[Tensor, ...] = (mean,) * 6
    momentum, groups = 0.0, 0
    if moves is not None:
        moving, momentum, groups = (moves.assignment, *moves.running), moves.momentum, len(moves.running.mean)
    _launch(
        statistics_kernel, launch.columns, partial, _order(order, weight), weight, bias, mean, var, affine, *moving,
        launch.pixels, launch.parts, eps, momentum, channels, order is not None, each_image, groups, sum_type,
        launch.together, launch.block_p, launch.block_few,
    )  # fmt: skip
    added = u if residual is None else _nhwc(residual)
    _launch(
        affine_kernel, launch.all, u, added, affine, y, launch.pixels,
        channels, each_image, activation, residual is not None, *blocks,
    )  # fmt: skip
    return y, mean, var, affine.movedim(-2, 0)


def normalise_gradient(
    dy: Tensor, u: Tensor, norm: Norm, mean: Tensor, var: Tensor, shortcut: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(dy, "the gradient", tuple(u.shape))
    _check(shortcut, "the shortcut's gradient", tuple(u.shape))
    weight, bias, order, eps, activation, each_image = norm
    dy, u, (torch_sum, sum_type) = _nhwc(dy), _nhwc(u), _sums(u.dtype)
    channels, launch = u.shape[1], _norm(u, norm)
    new: dict[str, Any] = {"dtype": torch_sum, "device": u.device}
    of_each = (len(u),) if each_image else ()
    partial = torch.empty(*of_each, launch.parts, 2, channels, **new)
    dweight, dbias, slope, offset = (torch.empty(*of_each, channels, **new) for _ in range(4))
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device, memory_format=torch.channels_last)
    known = _order(order, weight), weight, bias, mean, var
    how, blocks = (order is not None, each_image), (launch.block_p, launch.block_c)
    _launch(
        gradient_sums_kernel, launch.sums, dy, u, *known, partial, launch.pixels, launch.parts, eps,
        channels, *how, activation, sum_type, *blocks,
    )  # fmt: skip
    _launch(
        slopes_kernel, launch.columns, partial, *known, dweight, dbias, slope, offset, launch.pixels, launch.parts, eps,
        channels, *how, launch.together, launch.block_few,
    )  # fmt: skip
    added = u if shortcut is None else _nhwc(shortcut)
    _launch(
        affine_gradient_kernel, launch.all, dy, u, *known, slope, offset, added, du, launch.pixels, eps,
        channels, *how, activation, shortcut is not None, *blocks,
    )  # fmt: skip
    return (du, dweight.sum(0), dbias.sum(0)) if each_image else (du, dweight, dbias)


def _norm(u: Tensor, norm: Norm) -> config.Norm:
    images, channels, height, width = u.shape
    device = config.device_of(u.device)
    if norm.each_image:
        return config.norm(height * width, channels, device, images)
    return config.norm(images * height * width, channels, device)


def _strides(weight: Tensor) -> tuple[int, int, int]:
    """Of kernels, channels and taps, which lie one after the other in both memory formats."""
    return weight.stride(0), weight.stride(1), weight.stride(2) if weight.shape[3] == 1 else weight.stride(3)


def _order(order: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if order is None else order


def _convolve(
    x: Tensor,
    weight: Tensor,
    p: Pass,
    offsets: tuple[Tensor, Tensor],
    size: tuple[int, ...],
    *,
    relu: bool = False,
    added: tuple[Tensor | None, Tensor | None] = (None, None),
    bias: Tensor | None = None,
    two: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`offsets`: of the groups of the tensor that is written, which has size `size`, and of the tensor that is read.
    `two`: a second tensor is written, too, in the forward pass the kept product, in the backward pass dundrawn.
    `added`: what is added to the first tensor, and to dundrawn (to both, where there is dundrawn)."""
    channels = p.out_channels * (p.out_groups if p.shares_products else 1)
    _check(x, "the input", (x.shape[0], p.channels, *x.shape[2:]))
    _check(added[0], "the shortcut's gradient" if p.adjoint else "the residual", (x.shape[0], channels, *size))
    _check(added[1], "what is added to dundrawn", (x.shape[0], channels * (p.out_groups - 1), *size))
    x, more = _nhwc(x), channels * (p.out_groups - 1 if p.adjoint else 1)
    wide = max(x[:1].numel(), max(channels, more if two else 0) * size[0] * size[1]) >= 2**31
    fused = relu, added[0] is not None, bias is not None, wide
    bits, device = x.element_size() * 8, config.device_of(x.device)
    may = torch.backends.cudnn.enabled and x.numel() > 0
    launch = config.plan(p, bits, x.shape[0], size, device, *fused, cudnn=may)
    if launch.kernel == "cudnn":
        return cudnn.convolve(x, weight, p), None
    y, second = (
        torch.empty((x.shape[0], c, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        if wanted
        else None
        for c, wanted in ((channels, True), (more, two))
    )
    assert y is not None
    if not y.numel():
        return y, second
    bias = weight if bias is None else bias
    first_added, second_added = (y if tensor is None else _nhwc(tensor) for tensor in added)
    sizes = x.shape[2], x.shape[3], *size
    grid = config.cdiv(size[0], p.out_step_h), config.cdiv(size[1], p.out_step_w)
    constants = p, launch.tiles, _sums(x.dtype)[1]
    if launch.kernel == "rowwalk":
        walked = x, weight, bias, first_added, second_added, y, y if second is None else second
        _launch(rowwalk_kernel, launch, *walked, *offsets, *sizes, launch.steps, *constants)
    elif launch.kernel == "convolve_undrawn":
        tensors = x, weight, first_added, second_added, y, second
        _launch(convolve_undrawn_kernel, launch, *tensors, *offsets, *sizes, *grid, *constants)
    elif launch.kernel == "convolve_kept":
        _launch(convolve_kept_kernel, launch, x, weight, bias, y, second, *offsets, *sizes, *grid, *constants)
    elif launch.kernel == "convolve_all":
        _launch(convolve_all_kernel, launch, x, weight, bias, y, offsets[1], *sizes, *grid, *constants)
    else:
        _launch(convolve_kernel, launch, x, weight, bias, first_added, y, *offsets, *sizes, *grid, *constants)
    return y, second


def _launch(kernel: Any, launch: Launch | int | tuple[int, int], *arguments: Any) -> None:
    """On the device of the first argument, a tensor. `launch` may be just a number of programs, or two."""
    grid: tuple[int, ...]
    options: dict[str, Any] = {}
    if isinstance(launch, Launch):
        grid, options = (launch.programs, launch.second), launch.options
    else:
        grid = launch if isinstance(launch, tuple) else (launch,)
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def _check(x: Tensor | None, what: str, shape: tuple[int, ...]) -> None:
    """Kernels don't look where memory ends."""
    if x is not None and tuple(x.shape) != shape:
        raise RuntimeError(f"{what} has shape {tuple(x.shape)}, expected {shape}")


def _wide(*images: Tensor | None) -> bool:
    """Do offsets inside one image of any of these tensors need 64 bits?"""
    return any(image is not None and image[:1].numel() >= 2**31 for image in images)


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sums(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """What sums are made in."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)
