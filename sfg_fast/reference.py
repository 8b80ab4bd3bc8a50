"""Dense masking: SFG layers word for word as in the paper. The oracle of every other backend, and the baseline.

"We first convolve the input features with all kernels, and generate the output features from each filter group by
zeroing out the channels that root from the kernels in the other groups, resulting in F_reg, F_s, F_seg that are sparse
at non-overlapping channel indices." (section 2.1.) Features are T+1 dense tensors [N, K, H, W], shared first; an SFG
layer costs T+1 full convolutions (one for the image). This file is plain torch, and uses nothing of the fast path: no
backend, no packed tensors, a draw of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activate
from .groups import FilterGroups, Routing, indices, sort_by_group
from .layer import Conv2dLayer, Conv3dLayer, ConvTranspose2dLayer, ConvTranspose3dLayer, SFGLayer
from .norm import ImageNorm, KernelNorm, of_channels
from .plain_ops import TensorLike, as_plain, check_factor, check_image, check_taken


class DenseFeatures(TensorLike, list[Tensor]):
    """The T+1 dense tensors F_shared, F_1, .., F_T; `dense`, `merged`, `packed` and + as in `SFGFeatures`."""

    def __init__(self, tensors: Iterable[Tensor], groups: FilterGroups, routing: Routing = Routing.ARROW) -> None:
        super().__init__(tensors)
        self.groups, self.routing = groups, routing

    def dense(self, group: int | str) -> Tensor:
        """F_group, [N, K, H, W]."""
        return self[self.groups.index(group)]

    def merged(self, task: int | str) -> Tensor:
        """[F_task | F_shared] by summation, [N, K, H, W]."""
        group = self.groups.index(task)
        return self[group] if self.routing is Routing.OWN or group == 0 else self[group] + self[0]

    @property
    def packed(self) -> Tensor:
        """[N, rows, H, W], as `SFGFeatures.packed`."""
        streams = torch.cat(list(self), 1)
        return streams if self.groups.full else streams.index_select(1, self.groups.rows_in_streams)

    @property
    def shape(self) -> torch.Size:
        """That of each tensor."""
        return self[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the tensors."""
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        """That of the tensors."""
        return self[0].device

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> DenseFeatures:
        """`operation` on every tensor."""
        return DenseFeatures(map(operation, self), self.groups, self.routing)

    def concatenate(self, *more: DenseFeatures) -> DenseFeatures:
        """[F | F' | ..] along the channels, for each group."""
        tensors = [torch.cat(parts, 1) for parts in zip(self, *more, strict=True)]
        return DenseFeatures(tensors, FilterGroups.joined([one.groups for one in (self, *more)]), self.routing)

    @property
    def streams_of_groups(self) -> bool:
        """See `TensorLike.streams_of_groups`."""
        return self.groups.streams_of_groups and self.routing is Routing.OWN

    def as_shared(self, x: Tensor) -> DenseFeatures:
        """See `TensorLike.as_shared`."""
        check_image(x, self.dim())
        groups = FilterGroups.all_shared(x.shape[1], self.groups.tasks, x.device)
        return DenseFeatures([x, *(torch.zeros_like(x) for _ in groups.tasks)], groups)

    def plus(self, x: float | Tensor) -> DenseFeatures:
        """See `TensorLike.plus`."""
        x = as_plain(x, self.shape)
        if self.groups.gates is None:
            if self.routing is not Routing.OWN:
                raise ValueError(f"{self.groups} and something else can't be added: what would a task read of it?")
            return DenseFeatures([f + x for f in self], self.groups, self.routing)
        z = of_channels(self.groups.gates.detach().to(self.dtype).t(), self[0])
        return DenseFeatures([f + z[g] * x for g, f in enumerate(self)], self.groups, self.routing)

    def times(self, factor: Tensor | DenseFeatures) -> DenseFeatures:
        """See `TensorLike.times`."""
        if isinstance(factor, DenseFeatures):
            check_factor(self.groups.names, self.shape[1], factor.groups, factor.groups)
        factors = list(factor) if isinstance(factor, DenseFeatures) else [factor] * len(self)
        factors = [as_plain(one, self.shape) for one in factors]
        return DenseFeatures([f * s for f, s in zip(self, factors, strict=True)], self.groups, self.routing)

    def take(self, kernels: Sequence[int]) -> DenseFeatures:
        """See `TensorLike.take`."""
        chosen = indices(check_taken(kernels, self.shape[1]), self[0])
        return DenseFeatures([f.index_select(1, chosen) for f in self], self.groups.taken(chosen), self.routing)

    def prelu(self, slopes: Tensor) -> DenseFeatures:
        """See `TensorLike.prelu`."""
        return self.channelwise(lambda x: F.prelu(x, slopes))

    def __add__(self, other: DenseFeatures | float | Tensor) -> DenseFeatures:  # type: ignore[override]
        if isinstance(other, int | float | Tensor):
            return self.plus(other)
        if self.routing is not other.routing or not self.groups.same_as(other.groups):
            raise ValueError(
                "features of different groupings can't be added: let both convolutions share one draw "
                f"(conv(x, groups=features.groups)); got {self.groups} and {other.groups}"
            )
        return DenseFeatures([a + b for a, b in zip(self, other, strict=True)], self.groups, self.routing)

    __radd__ = __add__


def merge(features: Sequence[Tensor], routing: Routing) -> list[Tensor]:
    """What each group reads: F_s for shared, [F_t | F_s] by "pixel-wise summation" for task t (section 2.1)."""
    if routing is Routing.OWN:
        return list(features)
    return [features[0], *(task + features[0] for task in features[1:])]


def normalise(u: list[Tensor], norm: KernelNorm | ImageNorm, groups: FilterGroups) -> list[Tensor]:
    """u normalised: all rows of a kernel by the statistics of its drawn row; of a batch norm in `eval()` by the running
    ones (norm.py).

    `u` holds T+1 tensors, or one if all groups read the same image (then all rows of a kernel are equal).
    """
    assert groups.assignment is not None
    scales, shifts = norm.of_dense(u, groups.assignment)
    if isinstance(norm, KernelNorm) and not norm.training and len(u) == 1:
        u = u * len(scales)  # the running statistics of the groups differ
    return [torch.addcmul(shifts[group], one, scales[group]) for group, one in enumerate(u)]


def forward(layer: SFGLayer, x: Tensor | Sequence[Tensor], groups: FilterGroups | None = None) -> DenseFeatures:
    """The forward pass of an SFG layer by dense masking: F_g = z_g * act(norm(u_g)) for every group g."""
    groups = layer.draw() if groups is None else layer.check_groups(groups)
    assert groups.gates is not None
    weight, bias = layer.parameters_of(groups)
    if isinstance(x, Tensor):
        u = [layer.plain(x, weight, bias)]  # every group reads the same image: convolve once, then mask
    else:
        layer.check_sequence(x)
        u = [layer.plain(read, weight, bias) for read in merge(list(x), getattr(x, "routing", Routing.ARROW))]
    if layer.norm is not None:
        u = normalise(u, layer.norm, groups)
    h = [activate(tensor, layer.activation) for tensor in u]
    h = h if len(h) > 1 else h * len(layer.group_names)
    z = of_channels(groups.gates.to(h[0].dtype).t(), h[0])
    return DenseFeatures([z[group] * tensor for group, tensor in enumerate(h)], groups)


class _Dense(SFGLayer):
    """An SFG layer by dense masking. It has the constructor, parameters and state_dict of the fast layer of its name,
    and returns the list of T+1 dense tensors."""

    def forward(self, x: Tensor | Sequence[Tensor], groups: FilterGroups | None = None) -> DenseFeatures:
        """x: one image [N, C, H, W] for all groups, or T+1 dense tensors [N, C, H, W]. `groups`: a draw to use instead
        of a new one."""
        return forward(self, x, groups)

    @staticmethod
    def _sample(log_p: Tensor, noise: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Any]]]:
        """As `backends.sample`, in plain torch."""
        assignment = (log_p if noise is None else log_p + noise).detach().argmax(1)
        return assignment, (*sort_by_group(assignment, log_p.shape[1]), {})


class SFGConv2d(_Dense, Conv2dLayer):
    """A convolution whose K kernels are drawn into T+1 groups. See `sfg_fast.SFGConv2d`."""


class SFGConv3d(_Dense, Conv3dLayer):
    """The same for volumes. See `sfg_fast.SFGConv3d`."""


class SFGConvTranspose2d(_Dense, ConvTranspose2dLayer):
    """A transposed convolution whose K kernels are drawn. See `sfg_fast.SFGConvTranspose2d`."""


class SFGConvTranspose3d(_Dense, ConvTranspose3dLayer):
    """The same for volumes. See `sfg_fast.SFGConvTranspose3d`."""
