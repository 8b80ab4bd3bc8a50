"""What the layers of a frozen network are: plain convolutions for each group, and the features between them
(freeze.py makes the network).

Where the C++ kernels are there, they do all groups of a layer as one routed convolution (`_together`); elsewhere, and
in a graph, torch does one after the other.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..activations import activate
from ..groups import SHARED, FilterGroups, Routing, indices
from ..kernels.packing import of_channels
from ..kernels.spec import Geometry
from ..layer import SFGLayer
from ..layers.feature_norm import FeatureNorm
from ..layers.stream_conv import StreamConv2d
from ..layers.streams import Heads, Merge, StreamBlock
from ..norm import ImageNorm, KernelNorm, folded, running_affine
from ..plain_ops import TensorLike, check_taken
from ..routed_conv import RoutedConv, routed_conv
from ..routed_conv.run import decide
from ..tracing import in_graph, watched


class GroupTensors(TensorLike):
    """Features of a frozen network: for each group the channels of its own kernels alone, [N, K_g, H, W]. A group is
    computed when somebody first reads it.

    `kernels`: for each group the indices of its kernels, [] for none. `width`: K. `zero`: one channel of zeros of the
    features' size, which stands in where a group has nothing. `side_by_side`: all groups that anybody reads, in order,
    in one tensor, or None; `sizes`: how many channels of it are whose.
    """

    def __init__(
        self,
        compute: Callable[[int], Tensor],
        zero: Callable[[], Tensor],
        kernels: Sequence[Sequence[int]],
        width: int,
        names: tuple[str, ...],
        routing: Routing = Routing.ARROW,
        side_by_side: Tensor | None = None,
        sizes: Sequence[int] = (),
    ) -> None:
        self.zero, self.kernels, self.width, self.names, self.routing = zero, kernels, width, names, routing
        self.groups = kernels  # what another layer takes as its draw
        self.side_by_side, self.sizes = side_by_side, list(sizes)
        self._compute, self._known = compute, {}  # type: ignore[var-annotated]

    def __getitem__(self, group: int) -> Tensor:
        """The channels of a group that has kernels, [N, K_g, H, W]."""
        if group not in self._known:
            if self.side_by_side is not None and self.sizes[group]:
                self._known[group] = self.side_by_side.narrow(1, sum(self.sizes[:group]), self.sizes[group])
            else:
                self._known[group] = self._compute(group)
        return self._known[group]

    def read(self, group: int) -> list[int]:
        """The groups that a group of the next layer reads, and that have kernels."""
        both = (group, 0) if self.routing is Routing.ARROW and group else (group,)
        return [one for one in both if self.kernels[one]]

    def dense(self, group: int | str) -> Tensor:
        """[N, K, H, W], zero where a kernel is in another group."""
        group = self.names.index(group) if isinstance(group, str) else group
        kernels = self.kernels[group]
        if list(kernels) == list(range(self.width)):
            return self[group]
        channels = torch.cat([self[group], self.zero()], 1) if kernels else self.zero()
        place = {kernel: row for row, kernel in enumerate(kernels)}
        rows = tuple(place.get(kernel, len(kernels)) for kernel in range(self.width))
        return channels.index_select(1, indices(rows, channels))

    def merged(self, task: int | str) -> Tensor:
        """[F_task | F_shared] by summation, [N, K, H, W]."""
        group = self.names.index(task) if isinstance(task, str) else task
        parts = [self.dense(one) for one in self.read(group)] or [self.dense(group)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @property
    def shape(self) -> torch.Size:
        """That of one dense tensor, [N, K, H, W]."""
        n, _, *size = self.zero().shape
        return torch.Size((n, self.width, *size))

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> GroupTensors:
        """`operation` on every group: it must treat each channel alone, and keep zeros."""
        return GroupTensors(
            lambda group: operation(self[group]), lambda: operation(self.zero()),
            self.kernels, self.width, self.names, self.routing,
        )  # fmt: skip

    def of_kernels(self, operation: Callable[[Tensor, int], Tensor]) -> GroupTensors:
        """`operation` on every group that has kernels, and the group's number; it must not change the size."""
        return GroupTensors(
            lambda group: operation(self[group], group), self.zero, self.kernels, self.width, self.names, self.routing
        )

    def _own(self, x: Tensor, group: int) -> Tensor:
        """The channels of a group's kernels in x [N, K, H, W], or x itself if it has one channel."""
        if x.numel() == 1:
            return x.reshape([1] * self.dim())
        kernels = tuple(self.kernels[group])
        alike = x.shape[1] == 1 or kernels == tuple(range(self.width))
        return x if alike else x.index_select(1, indices(kernels, x))

    @property
    def streams_of_groups(self) -> bool:
        """See `TensorLike.streams_of_groups`."""
        return self.routing is Routing.OWN

    def as_shared(self, x: Tensor) -> GroupTensors:
        """See `TensorLike.as_shared`."""
        kernels = [list(range(x.shape[1])), *([] for _ in self.names[1:])]
        return GroupTensors(lambda group: x, lambda: x[:, :1] * 0, kernels, x.shape[1], self.names)

    def plus(self, x: float | Tensor) -> GroupTensors:
        """See `TensorLike.plus`."""
        return self.of_kernels(lambda f, group: f + (self._own(x, group) if isinstance(x, Tensor) else x))

    def times(self, factor: Tensor | GroupTensors) -> GroupTensors:
        """See `TensorLike.times`."""
        return self.of_kernels(
            lambda f, group: f * self._own(factor if isinstance(factor, Tensor) else factor[group], group)
        )

    def take(self, kernels: Sequence[int]) -> GroupTensors:
        """See `TensorLike.take`."""
        chosen = check_taken(kernels, self.width)
        taken = [[new for new, old in enumerate(chosen) if old in own] for own in self.kernels]
        rows = [tuple(list(own).index(chosen[new]) for new in of) for own, of in zip(self.kernels, taken, strict=True)]

        def of_group(group: int) -> Tensor:
            before = self[group]
            return before.index_select(1, indices(rows[group], before))

        return GroupTensors(of_group, self.zero, taken, len(chosen), self.names, self.routing)

    def prelu(self, slopes: Tensor) -> GroupTensors:
        """See `TensorLike.prelu`."""
        return self.of_kernels(lambda f, group: F.prelu(f, self._own(slopes[None], group).flatten()))

    def __add__(self, other: GroupTensors | float | Tensor) -> GroupTensors:
        if isinstance(other, int | float | Tensor):
            return self.plus(other)
        if [list(one) for one in self.kernels] != [list(one) for one in other.kernels]:
            raise ValueError(f"features of different groupings can't be added: {self.kernels} and {other.kernels}")
        return GroupTensors(
            lambda group: self[group] + other[group], self.zero, self.kernels, self.width, self.names, self.routing
        )

    __radd__ = __add__

    def concatenate(self, *more: GroupTensors) -> GroupTensors:
        """[F | F' | ..] along the channels: the kernels of all features, each in its own group."""
        every = (self, *more)
        kernels: list[list[int]] = [[] for _ in self.names]
        width = 0
        for one in every:
            for group, own in enumerate(one.kernels):
                kernels[group] += [kernel + width for kernel in own]
            width += one.width
        return GroupTensors(
            lambda group: torch.cat([one[group] for one in every if one.kernels[group]], 1), self.zero,
            kernels, width, self.names, self.routing,
        )  # fmt: skip


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


def _plain_conv(weight: Tensor, bias: Tensor | None, like: Any, **changes: Any) -> Any:
    """A layer of torch with the geometry of `like`, and this weight [K, C / groups, ..], of a transposed convolution
    [C, K / groups, ..]."""
    kind: Any = getattr(like, "PLAIN", nn.Conv2d if len(like.kernel_size) == 2 else nn.Conv3d)
    names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
    transposed = getattr(like, "transposed", False)
    options: dict[str, Any] = {name: getattr(like, name) for name in names + ["output_padding"] * transposed} | changes
    first, second = weight.shape[0], weight.shape[1] * options.get("groups", 1)
    channels = (first, second) if transposed else (second, first)
    conv = kind(*channels, bias=bias is not None, device=weight.device, dtype=weight.dtype, **options)
    conv.weight.data = weight.detach().clone()
    if bias is not None and conv.bias is not None:
        conv.bias.data = bias.detach().clone()
    return conv.requires_grad_(False)


def _only_torch(conv: Any, x: Tensor) -> bool:
    """Has torch to do this convolution of x? It has to in a graph (export, compile) and for what a routed convolution
    is not; and it shall where the kernels are torch's own. The C++ kernels are faster for few and odd numbers of
    channels."""
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        return True
    torch_knows_alone = conv.padding_mode != "zeros" or isinstance(conv.padding, str) or x.dtype != conv.weight.dtype
    looked_at = in_graph() or watched() or x.requires_grad
    return torch_knows_alone or looked_at or x.device.type != "cpu" or backends.current() == "reference"


def _convolve(conv: Any, x: Tensor, relu: bool = False) -> Tensor:
    """conv(x), or relu of it."""
    if not _only_torch(conv, x):
        rows, columns = (FilterGroups.blocks([n], ("all",), x.device) for n in conv.weight.shape[:2])
        spec = RoutedConv(rows, columns, Routing.ALL, _geometry(conv))
        run = decide(x, conv.weight, spec)
        if not run.kernels.OF_TORCH:
            return routed_conv(x, conv.weight, conv.bias, spec, relu, run=run)
    return F.relu(conv(x)) if relu else conv(x)


def _together(
    convolutions: Mapping[int, Any],
    x: Tensor | GroupTensors,
    groups: int,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor | None:
    """The convolutions of several groups, {group: plain convolution}, as one routed convolution, with outputs side by
    side and nothing copied; None where that can't be. `relu` and `residual`: as in `convolve`."""
    read = x if isinstance(x, Tensor) else x.side_by_side
    if read is None or not convolutions or any(_only_torch(conv, read) for conv in convolutions.values()):
        return None
    ordered = dict(sorted(convolutions.items()))
    columns = [read.shape[1]] if isinstance(x, Tensor) else x.sizes
    reads = {group: [0] if isinstance(x, Tensor) else x.read(group) for group in ordered}
    if any(conv.weight.shape[1] != sum(columns[one] for one in reads[group]) for group, conv in ordered.items()):
        return None  # zeros stand in for something
    sizes = [ordered[group].weight.shape[0] if group in ordered else 0 for group in range(groups)]
    names = tuple(map(str, range(groups)))
    rows, read_from = (FilterGroups.blocks(side, names[: len(side)], read.device) for side in (sizes, columns))
    some = next(iter(ordered.values()))
    routing = Routing.ALL if isinstance(x, Tensor) else x.routing
    spec = RoutedConv(rows, read_from, routing, _geometry(some))
    run = decide(read, some.weight, spec)
    if run.kernels.OF_TORCH:
        return None
    weights, starts = [], [0, *itertools.accumulate(columns)]
    for group, conv in ordered.items():
        weight, at = conv.weight.new_zeros(sizes[group], sum(columns), *conv.weight.shape[2:]), 0
        for one in reads[group]:
            weight[:, starts[one] : starts[one + 1]] = conv.weight[:, at : at + columns[one]]
            at += columns[one]
        weights.append(weight)
    bias = None if some.bias is None else torch.cat([conv.bias for conv in ordered.values()])
    return routed_conv(read, torch.cat(weights), bias, spec, relu, residual, run=run)


def _geometry(conv: Any) -> Geometry:
    return Geometry(conv.stride, conv.padding, conv.dilation)


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
        together = None
        if "source" not in self.__dict__:  # all convolutions have been made
            together = _together(made, x, len(self.names), self._relu, add)
        own = GroupTensors(
            lambda group: self._group(x, group), lambda: self._zero(x), self.kernels, self.width, self.names,
            side_by_side=None if together is None else self._behind(together, list(made)), sizes=sizes,
        )  # fmt: skip
        added = add is not None and together is not None
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
        return self._behind(_convolve(conv, read, self._relu), [group])

    def _make(self, source: SFGLayer, group: int, columns: list[int] | None) -> nn.Module:
        rows = self.kernels[group]
        weight, bias = self._weight_and_bias(source, group, rows)
        weight = _columns_of(weight, columns)
        return _plain_conv(source.kernels_first(weight), bias, source)

    def _make_grouped(self, source: SFGLayer, group: int, rows: list[int] | None) -> nn.Module:
        """`rows`: of a depthwise convolution the kernels to take; None: all."""
        if source.transposed:
            bias = source.bias
            conv = _plain_conv(source.weight, bias, source, groups=source.groups)
            if not isinstance(source.norm, KernelNorm):
                return conv
            scale, shift = source.norm.running_affine()
            return nn.Sequential(conv, _affine_norm(scale[group], shift[group], source.dims))
        rows = list(range(self.width)) if rows is None else rows
        weight, bias = self._weight_and_bias(source, group, rows)
        groups = len(rows) if source.groups == self.width else source.groups
        return _plain_conv(weight, bias, source, groups=groups)

    def _weight_and_bias(self, source: SFGLayer, group: int, rows: list[int]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of these kernels, kernels first, with the batch normalisation."""
        weight = source.kernels_first(source.weight)[rows]
        without = isinstance(source.norm, ImageNorm) and source.norm.kind == "instance"  # see SFGLayer.parameters_of
        bias = None if source.bias is None or without else source.bias[rows]
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
            return _plain_conv(weight, bias, source)

        return activate(_convolve(self._convolution(self.names[group], make), read), self.activation)


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
            return _plain_conv(weight, bias, source.conv1, dilation=source.dilation, padding=source.dilation)

        def second(source: StreamBlock) -> nn.Module:
            bias = None if source.conv2.bias is None else source.conv2.bias[rows]
            geometry = {"dilation": source.dilation, "padding": source.dilation}
            return _plain_conv(source.conv2.weight[rows], bias, source.conv2, **geometry)

        h = _convolve(self._convolution(f"{name}_1", first), h, True)
        return shortcut + _convolve(self._convolution(f"{name}_2", second), h)


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
            return _plain_conv(source.conv.weight[rows], bias, source.conv)

        return _convolve(self._convolution(self.names[group], make), torch.cat([x.dense(group), x.dense(SHARED)], 1))


class FrozenHeads(Frozen):
    """A plain 1x1 convolution for each task on [F_t | F_shared]; returns {task: [N, channels, H, W]}."""

    def __init__(self, source: Heads, tasks: Sequence[str]) -> None:
        super().__init__(source)
        self.tasks = {task: 1 + list(source.outputs).index(task) for task in tasks}

    def forward(self, x: GroupTensors) -> dict[str, Tensor]:
        """The outputs of the tasks, {task: [N, channels, H, W]}."""
        if "source" not in self.__dict__:
            y = _together({g: self.convolutions[task] for task, g in self.tasks.items()}, x, len(x.names))
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
            return _plain_conv(_columns_of(source.conv.weight[rows], columns), bias, source.conv)

        return _convolve(self._convolution(task, make), read)
