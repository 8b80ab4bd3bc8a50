"""What the layers of a frozen network are: plain convolutions and norms for each group (plain_convs.py does the
convolutions, group_tensors.py has the features between the layers, freeze.py makes the network)."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..activations import activate
from ..groups import SHARED, Routing, indices
from ..kernels.packing import of_channels
from ..layer import SFGLayer
from ..layers.feature_norm import FeatureNorm
from ..layers.stream_conv import StreamConv2d
from ..layers.streams import Heads, Merge, StreamBlock
from ..norm import ImageNorm, KernelNorm, folded, running_affine
from .group_tensors import GroupTensors
from .plain_convs import convolve, plain_conv, together


class Frozen(nn.Module):
    """Plain convolutions, made from `source` when they are first asked for."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.__dict__["source"] = source  # not a submodule: what is not used goes
        self.convolutions = nn.ModuleDict()

    def _convolution(self, name: str, make: Callable[[Any], nn.Module]) -> nn.Module:
        if name not in self.convolutions:
            if "source" not in self.__dict__:
                raise RuntimeError(f"the frozen network was built without {name!r}: freeze it with that task")
            self.convolutions[name] = make(self.source)
        return self.convolutions[name]


class _Reach:
    """Gives zeros the size of a convolution's output: padded, without what a kernel reaches over, every stride-th."""

    def __init__(self, conv: Any, pads: Sequence[int]) -> None:
        self.stride, self.pads, self.transposed = conv.stride, tuple(pads), getattr(conv, "transposed", False)
        self.reach = [d * (size - 1) for d, size in zip(conv.dilation, conv.kernel_size, strict=True)]
        if self.transposed:
            self.more = [more - 2 * padding for more, padding in zip(conv.output_padding, conv.padding, strict=True)]

    def of(self, zero: Tensor) -> Tensor:
        if self.transposed:
            lengths = zip(zero.shape[2:], self.stride, self.reach, self.more, strict=True)
            size = [(length - 1) * stride + reach + more + 1 for length, stride, reach, more in lengths]
            return zero.new_zeros(zero.shape[0], 1, *size)
        zero = F.pad(zero, self.pads)
        for dim, (reach, stride) in enumerate(zip(self.reach, self.stride, strict=True), 2):
            end = zero.shape[dim] - reach
            zero = zero[(slice(None),) * dim + (slice(0, end, stride),)]
        return zero


class FrozenConv(Frozen):
    """An SFG layer with a fixed assignment: a plain convolution for each group, and the normalisation, which is folded
    in if it is a batch normalisation."""

    def __init__(self, source: SFGLayer, assignment: Sequence[int]) -> None:
        super().__init__(source)
        self.names, self.width, self.activation = source.group_names, source.out_channels, source.activation
        self.kernels = [[k for k, of in enumerate(assignment) if of == group] for group in range(len(self.names))]
        self.reach, self.normalises = _Reach(source, source.pad_before), isinstance(source.norm, ImageNorm)
        self.groups_of_channels = source.groups

    def forward(
        self,
        x: Tensor | GroupTensors,
        groups: Sequence[Sequence[int]] | None = None,
        residual: GroupTensors | None = None,
    ) -> GroupTensors:
        """`groups`: of other features, whose assignment the layer takes."""
        if groups is not None and [list(own) for own in groups] != self.kernels:
            if self.convolutions:
                raise ValueError("freeze: a layer is called with two groupings, expected one")
            self.kernels = [list(own) for own in groups]
        made = {g: self.convolutions[name] for g, name in enumerate(self.names) if name in self.convolutions}
        sizes = [len(own) if group in made else 0 for group, own in enumerate(self.kernels)]
        add = None
        if residual is not None and self.activation is None and not self.normalises and residual.sizes == sizes:
            add = residual.side_by_side
        every = None
        if "source" not in self.__dict__:  # all convolutions have been made
            every = together(made, x, len(self.names), self._relu, add)
        own = GroupTensors(
            lambda group: self._group(x, group), lambda: self._zero(x), self.kernels, self.width, self.names,
            side_by_side=None if every is None else self._behind(every, list(made)), sizes=sizes,
        )  # fmt: skip
        added = add is not None and every is not None
        return own if residual is None or added else residual + own

    @property
    def _relu(self) -> bool:
        """Does the activation begin with a ReLU, which the kernels can do?"""
        return self.activation in ("relu", "relu_pool") and not self.normalises

    def _behind(self, y: Tensor, groups: Sequence[int]) -> Tensor:
        """What follows the convolution, and the ReLU if the kernels have done it; y has the channels of these
        groups."""
        if self.normalises:
            parts = y.split([len(self.kernels[group]) for group in groups], 1)
            norms = [self._norm(group) for group in groups]
            if all(type(norm) is _INSTANCE[y.dim() - 2] for norm in norms):  # all channels alone
                weights, biases = ([getattr(norm, name) for norm in norms] for name in ("weight", "bias"))
                weight, bias = (None if one[0] is None else torch.cat(one) for one in (weights, biases))
                y = F.instance_norm(y, weight=weight, bias=bias, eps=norms[0].eps)
            else:
                y = torch.cat([norm(part) for norm, part in zip(norms, parts, strict=True)], 1)
        if self.activation == "relu_pool":
            return F.max_pool2d(y if self._relu else F.relu(y), 2)
        kernels = tuple(kernel for group in groups for kernel in self.kernels[group])
        return y if self._relu else activate(y, self.activation, indices(kernels, y))

    def _norm(self, group: int) -> Any:
        """The norm of a group's kernels, for a norm that is not folded into the convolution."""
        kernels = self.kernels[group]
        return self._convolution(
            f"{self.names[group]}_norm", lambda source: _image_norm(source.norm, kernels, source.dims)
        )

    def _zero(self, x: Tensor | GroupTensors) -> Tensor:
        """A channel of zeros as large as the output."""
        zero = self.reach.of(x[:, :1] * 0 if isinstance(x, Tensor) else x.zero())
        kernel = indices((0,), zero)
        return activate(zero, self.activation, kernel) * 0  # an activation may change the size, too

    def _group(self, x: Tensor | GroupTensors, group: int) -> Tensor:
        rows = self.kernels[group]
        if self.groups_of_channels > 1:
            depthwise = not self.reach.transposed and not isinstance(x, Tensor)
            depthwise = depthwise and self.groups_of_channels == x.width == self.width  # type: ignore[union-attr]
            if depthwise and list(x.kernels[group]) == rows:  # type: ignore[union-attr]
                read, taken = x[group], rows
            else:  # torch does all kernels, which lie anywhere in their groups of channels
                read, taken = x if isinstance(x, Tensor) else x.merged(group), None
            conv = self._convolution(self.names[group], lambda source: self._make_grouped(source, group, taken))
            y = conv(read)
            y = y if taken is not None else y.index_select(1, indices(tuple(rows), y))
            return self._behind(F.relu(y) if self._relu else y, [group])
        read, columns = _columns(x, group)
        conv = self._convolution(self.names[group], lambda source: self._make(source, group, columns))
        return self._behind(convolve(conv, read, self._relu), [group])

    def _make(self, source: SFGLayer, group: int, columns: list[int] | None) -> nn.Module:
        rows = self.kernels[group]
        weight, bias = self._weight_and_bias(source, group, rows)
        weight = _columns_of(weight, columns)
        return plain_conv(source.kernels_first(weight), bias, source)

    def _make_grouped(self, source: SFGLayer, group: int, rows: list[int] | None) -> nn.Module:
        """`rows`: of a depthwise convolution the kernels to take; None: all."""
        if source.transposed:
            conv = plain_conv(source.weight, source.used_bias, source, groups=source.groups)
            if not isinstance(source.norm, KernelNorm):
                return conv
            scale, shift = source.norm.running_affine()
            return nn.Sequential(conv, _affine_norm(scale[group], shift[group], source.dims))
        rows = list(range(self.width)) if rows is None else rows
        weight, bias = self._weight_and_bias(source, group, rows)
        groups = len(rows) if source.groups == self.width else source.groups
        return plain_conv(weight, bias, source, groups=groups)

    def _weight_and_bias(self, source: SFGLayer, group: int, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of these kernels, kernels first, with the batch normalisation."""
        weight = source.kernels_first(source.weight)[rows]
        bias = None if source.used_bias is None else source.used_bias[rows]
        if isinstance(source.norm, KernelNorm):
            scale, shift = (affine[group, rows] for affine in source.norm.running_affine())
            weight, bias = folded(weight, bias, scale, shift)
        return weight, bias


_INSTANCE: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BATCH: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _image_norm(norm: ImageNorm, kernels: list[int], dims: int) -> nn.Module:
    """The plain norm of these kernels, which are all in one filter group."""
    affine = norm.weight is not None
    like: dict[str, Any] = {"eps": norm.eps} | ({"device": norm.weight.device, "dtype": norm.weight.dtype}
                                                if norm.weight is not None else {})  # fmt: skip
    made: Any
    if norm.kind == "instance":
        made = _INSTANCE[dims](len(kernels), affine=affine, **like)
    elif norm.kind == "layer":
        made = _NormOfParts([len(kernels)], True, affine, **like)
    else:
        assert norm.num_groups is not None
        size = norm.kernels // norm.num_groups
        sizes = list(collections.Counter(kernel // size for kernel in kernels).values())
        made = _NormOfParts(sizes, False, affine, **like)
    if norm.weight is not None and norm.bias is not None:
        made.weight.data, made.bias.data = norm.weight[kernels].detach().clone(), norm.bias[kernels].detach().clone()
    return made.eval().requires_grad_(False)


class _NormOfParts(nn.Module):
    """Normalises parts of the channels, of these sizes, each by its own mean and variance: over the part and all
    positions as a group norm does, or at each position (`at_positions`) as a layer norm does."""

    def __init__(self, sizes: list[int], at_positions: bool, affine: bool, eps: float, **factory: Any) -> None:
        super().__init__()
        self.sizes, self.at_positions, self.eps = sizes, at_positions, eps
        self.weight = nn.Parameter(torch.empty(sum(sizes), **factory)) if affine else None
        self.bias = nn.Parameter(torch.empty(sum(sizes), **factory)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.at_positions:
            return F.layer_norm(x.movedim(1, -1), (x.shape[1],), self.weight, self.bias, self.eps).movedim(-1, 1)
        if len(set(self.sizes)) == 1:
            return F.group_norm(x, len(self.sizes), self.weight, self.bias, self.eps)
        x = torch.cat([F.group_norm(part, 1, eps=self.eps) for part in x.split(self.sizes, 1)], 1)
        if self.weight is None or self.bias is None:
            return x
        return x * of_channels(self.weight, x) + of_channels(self.bias, x)


def _affine_norm(scale: Tensor, shift: Tensor, dims: int) -> nn.Module:
    """A batch normalisation that computes scale * x + shift: of mean 0 and variance 1."""
    norm = _BATCH[dims](len(scale), 0.0, device=scale.device, dtype=scale.dtype)
    norm.weight.data, norm.bias.data = scale.detach().clone(), shift.detach().clone()
    return norm.eval().requires_grad_(False)


def _columns(x: Tensor | GroupTensors, group: int) -> tuple[Tensor, list[int] | None]:
    """What a group reads, and which input channels that is. (None: all, of an image.)"""
    if isinstance(x, Tensor):
        return x, None
    read = x.read(group)
    if not read:  # nothing at all: a channel of zeros stands for it
        return x.zero(), []
    parts = [x[one] for one in read]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1), [k for one in read for k in x.kernels[one]]


def _columns_of(weight: Tensor, columns: list[int] | None) -> Tensor:
    if columns is None:
        return weight
    return weight[:, columns] if columns else torch.zeros_like(weight[:, :1])


class FrozenStreamConv(Frozen):
    """A plain convolution for each stream, with the kernels that are there as input channels."""

    def __init__(self, source: StreamConv2d) -> None:
        super().__init__(source)
        self.names, self.width, self.activation = source.group_names, source.out_channels, source.activation
        self.reach = _Reach(source, source._reversed_padding_repeated_twice)

    def forward(self, x: GroupTensors) -> GroupTensors:
        """The streams."""
        every = [list(range(self.width))] * len(self.names)
        return GroupTensors(
            lambda group: self._group(x, group),
            lambda: self.reach.of(x.zero()),
            every,
            self.width,
            self.names,
            Routing.OWN,
        )

    def _group(self, x: GroupTensors, group: int) -> Tensor:
        read, columns = _columns(x, group)

        def make(source: StreamConv2d) -> nn.Module:
            weight, bias = _columns_of(source.weight, columns), source.bias
            if source.norm is not None:
                weight, bias = folded(weight, bias, *running_affine(source.norm, source.rows(group)))
            return plain_conv(weight, bias, source)

        return activate(convolve(self._convolution(self.names[group], make), read), self.activation)


class FrozenStreamBlock(Frozen):
    """Plain residual blocks, one for each stream; the second normalisation is folded into the first convolution."""

    def __init__(self, source: StreamBlock) -> None:
        super().__init__(source)
        self.names, self.width, self.first = source.names, source.channels, source.first

    def forward(self, x: GroupTensors) -> GroupTensors:
        """The streams behind the block."""
        every = [list(range(self.width))] * len(self.names)
        return GroupTensors(lambda group: self._group(x, group), x.zero, every, self.width, self.names)

    def _group(self, x: GroupTensors, group: int) -> Tensor:
        name, rows = self.names[group], slice(group * self.width, (group + 1) * self.width)
        shortcut, columns = x.dense(group), None
        h = shortcut
        if self.first:
            kernels = x.kernels[group]
            h, columns = (x[group], list(kernels)) if kernels else (x.zero(), [])
        else:
            norm = self._convolution(f"{name}_norm", lambda source: _slice_of(source.norm1, rows))
            h = F.relu(norm(h))

        def first(source: StreamBlock) -> nn.Module:
            weight, bias = _columns_of(source.conv1.weight[rows], columns), source.conv1.bias
            bias = None if bias is None else bias[rows]
            if source.norm2 is not None:
                weight, bias = folded(weight, bias, *running_affine(source.norm2, rows))
            return plain_conv(weight, bias, source.conv1, dilation=source.dilation, padding=source.dilation)

        def second(source: StreamBlock) -> nn.Module:
            bias = None if source.conv2.bias is None else source.conv2.bias[rows]
            geometry = {"dilation": source.dilation, "padding": source.dilation}
            return plain_conv(source.conv2.weight[rows], bias, source.conv2, **geometry)

        h = convolve(self._convolution(f"{name}_1", first), h, True)
        return shortcut + convolve(self._convolution(f"{name}_2", second), h)


def _slice_of(norm: nn.BatchNorm2d | None, rows: slice) -> nn.Module:
    if norm is None:
        return nn.Identity()
    own = nn.BatchNorm2d(rows.stop - rows.start, norm.eps, device=norm.weight.device, dtype=norm.weight.dtype)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(own, name).data = getattr(norm, name)[rows].detach().clone()
    return own.eval().requires_grad_(False)


class FrozenNorm(Frozen):
    """A plain normalisation for the kernels of each group."""

    def forward(self, x: GroupTensors) -> GroupTensors:
        """The features, normalised."""
        return GroupTensors(lambda group: self._group(x, group), x.zero, x.kernels, x.width, x.names, x.routing)

    def _group(self, x: GroupTensors, group: int) -> Tensor:
        def make(source: FeatureNorm) -> nn.Module:
            kernels, dims = list(x.kernels[group]), len(x.shape) - 2
            if isinstance(source.norm, ImageNorm):
                return _image_norm(source.norm, kernels, dims)
            scale, shift = (affine[group, kernels] for affine in source.norm.running_affine())
            return _affine_norm(scale, shift, dims)

        return self._convolution(x.names[group], make)(x[group])


class FrozenMerge(Frozen):
    """[F_t | F_s] and a plain 1x1 convolution, for each task."""

    def __init__(self, source: Merge) -> None:
        super().__init__(source)
        self.names, self.width = source.names, source.channels

    def forward(self, x: GroupTensors) -> GroupTensors:
        """The merged streams."""
        every = [list(range(self.width))] * len(self.names)
        return GroupTensors(lambda group: self._group(x, group), x.zero, every, self.width, self.names, Routing.OWN)

    def _group(self, x: GroupTensors, group: int) -> Tensor:
        if group == 0:
            return x.dense(SHARED)
        rows = slice((group - 1) * self.width, group * self.width)

        def make(source: Merge) -> nn.Module:
            bias = None if source.conv.bias is None else source.conv.bias[rows]
            return plain_conv(source.conv.weight[rows], bias, source.conv)

        return convolve(self._convolution(self.names[group], make), torch.cat([x.dense(group), x.dense(SHARED)], 1))


class FrozenHeads(Frozen):
    """A plain 1x1 convolution for each task on [F_t | F_shared]; returns {task: [N, channels, H, W]}."""

    def __init__(self, source: Heads, tasks: Sequence[str]) -> None:
        super().__init__(source)
        self.tasks = {task: 1 + list(source.outputs).index(task) for task in tasks}

    def forward(self, x: GroupTensors) -> dict[str, Tensor]:
        """The outputs of the tasks, {task: [N, channels, H, W]}."""
        if "source" not in self.__dict__:
            y = together({g: self.convolutions[task] for task, g in self.tasks.items()}, x, len(x.names))
            if y is not None:
                by_group = sorted(self.tasks, key=self.tasks.__getitem__)
                sizes: list[int] = [self.convolutions[task].out_channels for task in by_group]  # type: ignore[misc]
                parts = dict(zip(by_group, y.split(sizes, 1), strict=True))
                return {task: parts[task] for task in self.tasks}
        return {task: self._task(x, task, group) for task, group in self.tasks.items()}

    def _task(self, x: GroupTensors, task: str, group: int) -> Tensor:
        read, columns = _columns(x, group)

        def make(source: Heads) -> nn.Module:
            rows = source.rows(task)
            bias = None if source.conv.bias is None else source.conv.bias[rows]
            return plain_conv(_columns_of(source.conv.weight[rows], columns), bias, source.conv)

        return convolve(self._convolution(task, make), read)
