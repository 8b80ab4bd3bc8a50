"""`SFGConv2d`: the drop-in layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends, reference
from ..features import SFGFeatures
from ..groups import FilterGroups, Routing
from ..kernels.packing import channels_last, select_channels
from ..kernels.spec import Geometry
from ..reference import DenseFeatures, activate
from ..routed_conv import AllRows, RoutedConv, routed_conv, routed_conv_expanded

Features = SFGFeatures | DenseFeatures


class SFGConv2d(reference.SFGConv2d):
    """A 2-D convolution whose K kernels are drawn into T+1 groups: `shared` and one for each task (paper, section 2.1).

    y[n,k] = z[k] * act(norm(b[k] + sum over c with reads(group(k), group(c)) of W[k,c] (*) x[n,c])). What the drawn
    grouping zeroes is never computed. Positional arguments as `torch.nn.Conv2d`.

    Args:
        tasks: number of tasks, or their names in order. Groups are numbered 0 (`shared`), then the tasks.
        norm: None or "batch" (`KernelNorm`: statistics of the drawn rows).
        activation: None, "relu", or a callable that acts on each element alone. It stands before the gate.
        init: initial p, see `gates.initial_probabilities`.
        estimator: how the gradient reaches the logits, a name of `gates.ESTIMATORS`.

    Attributes:
        weight [K, C, kH, kW], bias [K] or None, logits [K, T+1], temperature (0-dim), norm.

    Raises:
        ValueError: for arguments that can't be (groups other than 1, unknown names), at construction.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Features | Sequence[Tensor],
        groups: FilterGroups | None = None,
    ) -> Features:
        """Convolve, normalise, activate, gate.

        Args:
            x: an image [N, C, H, W] that every group reads; or features of an SFG layer; or T+1 dense tensors
                [N, C, H, W], shared first, which are merged by summation as features are.
            groups: a draw to use instead of a new one (shortcuts need one grouping: `conv(x, groups=features.groups)`).

        Returns:
            `SFGFeatures`; under `backend("reference")` the T+1 dense tensors with the same interface.
        """
        if backends.current() == "reference":
            return super().forward(x, groups)  # type: ignore[arg-type]
        image = isinstance(x, Tensor)
        features = _image(x) if isinstance(x, Tensor) else self._features(x)
        self._check_channels(features)
        groups = self.draw() if groups is None else self.check_groups(groups)
        packed, padding = self.pad(features.packed), self.zero_padding or (0, 0)
        geometry = Geometry(self.stride, padding, self.dilation)
        routing = Routing.ALL if image else features.routing
        spec = RoutedConv(groups, features.groups, routing, geometry)
        weight = self.weight_of(groups)
        relu = self.norm is None and self.activation == "relu"  # nothing stands between them: the kernels do both
        if groups.drawn is None:
            u = routed_conv(packed, weight, self.bias, spec, relu)
            return SFGFeatures(self._epilogue(u, groups, relu), groups)
        live, all_rows = routed_conv_expanded(packed, weight, self.bias, spec, relu)
        return SFGFeatures(self._epilogue_expanded(live, all_rows, groups, relu), groups)

    def _epilogue(self, u: Tensor, groups: FilterGroups, activated: bool) -> Tensor:
        """Norm, activation (unless done) and gate for rows that are all live."""
        if self.norm is not None:
            u = self.norm(u, groups)[0]
        h = u if activated else activate(u, self.activation)
        if not groups.full:
            return h  # one-hot gates of the drawn rows are one
        gates = groups.row_gates()
        assert gates is not None
        return (h.to(gates.dtype) * gates[:, None, None]).to(h.dtype)  # so that the gates' gradient is summed in fp32

    def _epilogue_expanded(self, live: Tensor, all_rows: AllRows, groups: FilterGroups, activated: bool) -> Tensor:
        """The same for expanded groups: autograd follows the live rows; the others only give their gate a gradient."""
        assert groups.drawn is not None
        affine = None
        if self.norm is not None:
            live, *affine = self.norm(live, groups.drawn)
        activation = None if activated else self.activation
        live, gates = activate(live, activation), groups.row_gates()
        assert gates is not None
        return _Gate.apply(live, gates, all_rows, affine, activation, groups.drawn.rows_in_streams)

    def _features(self, x: Features | Sequence[Tensor]) -> SFGFeatures:
        if isinstance(x, SFGFeatures):
            self.check_names(x.groups)
            return x
        self.check_sequence(x)
        return _side_by_side(x, self.group_names[1:])

    def _check_channels(self, features: SFGFeatures) -> None:
        if features.packed.dim() != 4 or features.groups.width != self.in_channels:
            raise ValueError(
                f"the input has shape {tuple(features.packed.shape)} and {features.groups.width} channels, "
                f"expected [N, {self.in_channels}, H, W]"
            )


def for_backend(x: Features) -> Features:
    """Features as the backend in force has them: packed, or T+1 dense tensors under `backend("reference")`."""
    if isinstance(x, SFGFeatures) and backends.current() == "reference":
        return DenseFeatures(list(x), x.groups, x.routing)
    if isinstance(x, DenseFeatures) and backends.current() != "reference":
        return _side_by_side(x, x.groups.tasks)
    return x


def _side_by_side(x: Sequence[Tensor], tasks: tuple[str, ...]) -> SFGFeatures:
    """T+1 dense tensors as packed streams."""
    routing = x.routing if isinstance(x, DenseFeatures) else Routing.ARROW
    streams = FilterGroups.streams(x[0].shape[1], tasks, x[0].device)
    return SFGFeatures(torch.cat(list(x), 1), streams, routing)


def _image(x: Tensor) -> SFGFeatures:
    channels = x.shape[1] if x.dim() == 4 else 0
    return SFGFeatures(x, FilterGroups.blocks([channels], ("image",), x.device), Routing.ALL)


def _affine(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    scale, shift = (values.reshape(-1, 1, 1).to(h.dtype) for values in (scale, shift))
    return torch.addcmul(shift, h, scale)


class _Gate(torch.autograd.Function):
    """F[g,k] = z[g,k] h[g,k], h = act(scale * u + shift), for all rows of a one-hot draw.

    Forward only has to put the live rows in place: the other gates are zero. Backward gives every gate its
    dz[g,k] = <dL/dF[g,k], h[g,k]>.
    """

    @staticmethod
    def forward(
        ctx: Any,
        live: Tensor,
        gates: Tensor,
        all_rows: AllRows,
        affine: Sequence[Tensor] | None,
        activation: Any,
        live_rows: Tensor,
    ) -> Tensor:
        """`affine`: scale and shift, each [T+1, K]."""
        tensors, ctx.all_rows = all_rows.split()
        ctx.save_for_backward(live_rows, *(affine or (None, None)), *tensors)
        ctx.gates_dtype, ctx.activation = gates.dtype, activation
        n, _, h, w = live.shape
        layout = torch.channels_last if channels_last(live) else torch.contiguous_format
        out = torch.empty((n, gates.numel(), h, w), dtype=live.dtype, device=live.device, memory_format=layout)
        return out.zero_().index_copy_(1, live_rows, live)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor) -> Any:
        live_rows, scale, shift, *tensors = ctx.saved_tensors
        all_rows = ctx.all_rows.joined(tensors)
        dz = None
        if ctx.activation in (None, "relu"):
            dz = all_rows.gate_gradient(df, scale, shift, ctx.activation == "relu")
        if dz is None:
            h = all_rows.values()
            if scale is not None:
                h = _affine(h, scale, shift)
            h = activate(h, ctx.activation)
            precise = torch.promote_types(df.dtype, ctx.gates_dtype)  # half precision would overflow in the sum
            dz = torch.linalg.vecdot(df.flatten(2).to(precise), h.flatten(2).to(precise)).sum(0)
        return select_channels(df, live_rows), dz.to(ctx.gates_dtype), None, None, None, None
