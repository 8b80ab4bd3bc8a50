"""The layers of the layer suite, and for each layer the contestants that all do the same work, on the CPU or a GPU.

Parameters, inputs, incoming gradients and the drawn groups are made before the time is taken. Every contestant has
leaves of its own: a step is captured in a CUDA graph, which fails if the autograd graph of another stream still holds
one of them. On a GPU all tensors are channels_last, as cuDNN and Triton want them.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sfg_fast.kernels.spec import Geometry
from torch import Tensor

from sfg_fast import FilterGroups, SFGConv2d, SFGFeatures, backend
from sfg_fast.backends import available
from sfg_fast.groups import Routing
from sfg_fast.routed_conv import RoutedConv, routed_conv

FORMATS = {
    "cpu": {"": torch.contiguous_format, ", channels_last": torch.channels_last},
    "cuda": {", channels_last": torch.channels_last},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
KERNELS = {"cpu": "native", "cuda": "triton"}  # the backend that is made for a device
Call = Callable[[], Tensor | Sequence[Tensor]]


class Layer(NamedTuple):
    """One row of the table: a layer of three groups (shared, two tasks)."""

    name: str
    groups: tuple[int, int, int]  # how many kernels each group has
    size: tuple[int, int] = (128, 128)
    dilation: int = 1
    routing: str = "arrow"  # or "own": streams with weights of their own; or "all": one image channel for everybody
    kernel: int = 3
    batch: int = 4

    @property
    def width(self) -> int:
        return sum(self.groups)

    @property
    def flops(self) -> int:
        """The FLOPs of the necessary work in the forward pass."""
        shared, *tasks = self.groups
        products = {
            "all": self.width,
            "own": sum(g * g for g in self.groups),
            # a 1x1 merge has no shared outputs: it passes unchanged
            "arrow": (shared * shared if self.kernel > 1 else 0) + sum(g * (g + shared) for g in tasks),
        }[self.routing]
        return 2 * products * self.kernel**2 * self.batch * self.size[0] * self.size[1]


LAYERS = [
    Layer("1->16", (5, 6, 5), routing="all"),
    Layer("16", (5, 6, 5)),
    Layer("32", (11, 10, 11)),
    Layer("64", (21, 22, 21)),
    Layer("64, dilation 2", (21, 22, 21), dilation=2),
    Layer("64, dilation 4", (21, 22, 21), dilation=4),
    Layer("128", (43, 42, 43), (64, 64)),
    Layer("16, shared-heavy", (12, 2, 2)),
    Layer("64, shared-heavy", (52, 6, 6)),
    Layer("64, specialised", (6, 29, 29)),
]
STREAMS = [
    *(Layer(f"own, 3 x {k}", (k, k, k), routing="own") for k in (16, 32, 64)),
    *(Layer(f"1x1 merge, {k}", (k, k, k), kernel=1) for k in (16, 32, 64)),
]
WIDTHS = [Layer(f"32, width {w}", (11, 10, 11), (128, w)) for w in (128, 1, 7, 100, 130)]
COMPILED = ("16", "64")  # only here dense masking is compiled, too: compiling takes longer than timing
QUICK = ("1->16", "16", "64", "128", "own, 3 x 16", "1x1 merge, 16")


def layers(full: bool) -> list[Layer]:
    """Every layer, or a quick choice of them."""
    every = [*LAYERS, *STREAMS, *WIDTHS]
    return every if full else [layer for layer in every if layer.name in QUICK]


def fastest(device: str) -> str:
    """Our backend for a device: the one that is made for it, or `masked` if that is not available."""
    return KERNELS[device] if available(KERNELS[device]) else "masked"


class Work(NamedTuple):
    """A contestant: its forward pass, the leaves that a training step differentiates it by, and the gradients of its
    outputs. It has the outputs that the next layer of its kind would take, one or several."""

    forward: Call
    leaves: Sequence[Tensor]
    gradients: Sequence[Tensor]

    def step(self) -> None:
        y = self.forward()
        torch.autograd.grad([y] if isinstance(y, Tensor) else list(y), self.leaves, self.gradients)


def _leaf(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return tensor.detach().clone(memory_format=memory_format).requires_grad_()


def _gradient(shape: Sequence[int], like: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device).contiguous(memory_format=memory_format)


def _on(name: str, call: Call) -> Call:
    def forward() -> Tensor | Sequence[Tensor]:
        with backend(name):
            return call()

    return forward


def _packed_by(device: str) -> tuple[list[str], torch.memory_format]:
    """The backends for packed tensors on a device, and the memory format of their tensors."""
    names = list(dict.fromkeys([fastest(device), "masked"]))
    return names, next(iter(FORMATS[device].values()))


def contestants(
    layer: Layer, device: str = "cpu", dtype: torch.dtype = torch.float32, compiled: bool = True
) -> dict[str, Work]:
    """The contestants of an SFG layer (convolution, bias, ReLU, masks), by name; with `compiled` also
    torch.compile's."""
    torch.manual_seed(0)
    assignment = torch.repeat_interleave(torch.arange(3), torch.tensor(layer.groups)).to(device)
    groups = FilterGroups.from_assignment(assignment)
    image = layer.routing == "all"
    channels = 1 if image else layer.width
    options = {"padding": layer.dilation, "dilation": layer.dilation, "device": device, "dtype": dtype}
    conv = SFGConv2d(channels, layer.width, 3, activation="relu", **options)  # type: ignore[arg-type]
    weight, bias = conv.weight.detach(), conv.bias.detach()  # type: ignore[union-attr]
    x = torch.randn(layer.batch, channels, *layer.size, dtype=dtype, device=device)
    masks = groups.gates.t()[:, :, None, None].to(dtype)  # type: ignore[union-attr]
    shape = (layer.batch, layer.width, *layer.size)
    work: dict[str, Work] = {}

    def packed(own: SFGConv2d, leaf: Tensor) -> Tensor:
        return own(leaf if image else SFGFeatures(leaf, groups), groups).packed

    names, memory_format = _packed_by(device)
    for name in names:
        own = copy.deepcopy(conv).to(memory_format=memory_format)  # type: ignore[call-overload]
        leaf = _leaf(x, memory_format)
        call = _on(name, functools.partial(packed, own, leaf))
        work[name] = Work(call, (leaf, own.weight, own.bias), [_gradient(shape, x, memory_format)])

    for suffix, memory_format in FORMATS[device].items():

        def parameters(layout: torch.memory_format = memory_format) -> tuple[Tensor, Tensor]:
            return _leaf(weight, layout), _leaf(bias)

        def inputs(layout: torch.memory_format = memory_format) -> list[Tensor]:
            return [_leaf(x, layout)] if image else [_leaf(x * mask, layout) for mask in masks]

        leaves = (_leaf(x, memory_format), *parameters())
        call = functools.partial(_plain, *leaves, layer.dilation)
        work["one plain convolution" + suffix] = Work(call, leaves, [_gradient(shape, x, memory_format)])

        dense = inputs()
        three = [_gradient(shape, x, memory_format) for _ in masks]
        masking = copy.deepcopy(conv).to(memory_format=memory_format)  # type: ignore[call-overload]
        call = _on("reference", functools.partial(_reference, masking, dense[0] if image else dense, groups))
        work["dense masking" + suffix] = Work(call, (*dense, masking.weight, masking.bias), three)
        if compiled and layer.name in COMPILED:
            script = torch.compile(_dense_masking, dynamic=False)
            dense, own_parameters = inputs(), parameters()
            call = functools.partial(script, dense, *own_parameters, masks, layer.dilation)
            work["dense masking, compiled" + suffix] = Work(call, (*dense, *own_parameters), three)
        if not image:
            pieces = [_leaf(piece, memory_format) for piece in x.split(layer.groups, 1)]
            rows = [_leaf(rows, memory_format) for rows in _read_weights(weight, layer)]
            biases = [_leaf(piece) for piece in bias.split(layer.groups)]
            call = functools.partial(_sliced, pieces, rows, biases, layer)
            gradients = [_gradient(piece.shape, x, memory_format) for piece in pieces]
            work["T+1 sliced convolutions" + suffix] = Work(call, (*pieces, *rows, *biases), gradients)
    return work


def _plain(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, 1, dilation, dilation))


def _reference(conv: SFGConv2d, x: Tensor | list[Tensor], groups: FilterGroups) -> list[Tensor]:
    return list(conv(x, groups))


def _dense_masking(
    dense: list[Tensor], weight: Tensor, bias: Tensor, masks: Tensor, dilation: int
) -> tuple[Tensor, ...]:
    """Dense masking as a script would write it, for torch.compile."""
    if len(dense) == 1:  # the image: convolved once
        u = F.relu(F.conv2d(dense[0], weight, bias, 1, dilation, dilation))
        return tuple(u * mask for mask in masks)
    reads = [dense[0], dense[1] + dense[0], dense[2] + dense[0]]
    return tuple(
        F.relu(F.conv2d(x, weight, bias, 1, dilation, dilation)) * mask for x, mask in zip(reads, masks, strict=True)
    )


def _read_weights(weight: Tensor, layer: Layer) -> list[Tensor]:
    """The weights of each group's kernels for the channels that the group reads, shared first."""
    shared, starts = layer.groups[0], itertools.accumulate(layer.groups, initial=0)
    rows = []
    for group, (start, size) in enumerate(zip(starts, layer.groups, strict=False)):
        own = weight[start : start + size]
        rows.append(torch.cat([own[:, :shared], own[:, start : start + size]], 1) if group else own[:, :shared])
    return rows


def _sliced(pieces: list[Tensor], rows: list[Tensor], biases: list[Tensor], layer: Layer) -> list[Tensor]:
    """One torch convolution for each group, on the channels it reads."""
    reads = [pieces[0], *(torch.cat([pieces[0], piece], 1) for piece in pieces[1:])]
    return [
        F.relu(F.conv2d(x, weight, bias, 1, layer.dilation, layer.dilation))
        for x, weight, bias in zip(reads, rows, biases, strict=True)
    ]


def stream_contestants(layer: Layer, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Work]:
    """The contestants of a convolution between streams (`own` 3x3, or the 1x1 `arrow` merge) with bias and no
    activation. The torch convolutions run one after the other on tensors of their own, which are concatenated
    before."""
    torch.manual_seed(0)
    k, names = layer.groups[0], ("shared", "task1", "task2")
    own = layer.routing == "own"
    tasks = 3 if own else 2
    where = torch.device(device)
    columns = FilterGroups.streams(k, 2, where) if own else FilterGroups.concatenated(k, 2, where)
    rows = FilterGroups.blocks([k] * 3 if own else [0, k, k], names, where)
    reads = k if own else 2 * k
    padding = layer.kernel // 2
    routing = Routing.OWN if own else Routing.ARROW
    spec = RoutedConv(rows, columns, routing, Geometry((1, 1), (padding, padding), (1, 1)))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    x, weight, bias = (
        random(layer.batch, 3 * k, *layer.size),
        random(tasks * k, reads, *[layer.kernel] * 2),
        random(tasks * k),
    )
    shape = (layer.batch, tasks * k, *layer.size)
    work: dict[str, Work] = {}
    packed_by, memory_format = _packed_by(device)
    for name in packed_by:
        leaves = [_leaf(x, memory_format), _leaf(weight, memory_format), _leaf(bias)]
        call = _on(name, functools.partial(routed_conv, *leaves, spec))
        work[name] = Work(call, leaves, [_gradient(shape, x, memory_format)])
    for suffix, memory_format in FORMATS[device].items():
        streams = x.split(k, 1)
        inputs = streams if own else [torch.cat([streams[t], streams[0]], 1) for t in (1, 2)]
        leaves = [_leaf(t, memory_format) for t in (*inputs, *weight.split(k))] + [_leaf(t) for t in bias.split(k)]

        def separate(leaves: list[Tensor] = leaves) -> list[Tensor]:
            return [F.conv2d(leaves[t], leaves[tasks + t], leaves[2 * tasks + t], 1, padding) for t in range(tasks)]

        gradients = [_gradient((layer.batch, k, *layer.size), x, memory_format) for _ in range(tasks)]
        work["torch, separately" + suffix] = Work(separate, leaves, gradients)
    return work


def works(layer: Layer, device: str = "cpu", compiled: bool = True) -> dict[str, Work]:
    """The contestants of any layer, in the device's precision."""
    if layer in STREAMS:
        return stream_contestants(layer, device, DTYPES[device])
    return contestants(layer, device, DTYPES[device], compiled)
