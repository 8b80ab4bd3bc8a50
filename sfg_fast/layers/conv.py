"""`SFGConv2d`: the drop-in layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import backends, reference
from ..activations import Activation, activate
from ..features import SFGFeatures, joined_others
from ..groups import FilterGroups, Routing
from ..kernels import masked
from ..kernels.contract import Normalises
from ..kernels.masked import channel_dots
from ..kernels.spec import Geometry
from ..norm import KernelNorm
from ..once import once_differentiable
from ..reference import DenseFeatures
from ..routed_conv import Others, Producer, RoutedConv, convolve, routed_conv
from ..tracing import in_graph

Features = SFGFeatures | DenseFeatures


class SFGConv2d(reference.SFGConv2d):
    """A 2-D convolution whose K kernels are drawn into T+1 groups: `shared` and one for each task (paper, section 2.1).

    y[n,k] = z[k] * act(norm(b[k] + sum over c with reads(group(k), group(c)) of W[k,c] (*) x[n,c])). What the drawn
    grouping zeroes is never computed. Positional arguments as `torch.nn.Conv2d`.

    Args:
        tasks: number of tasks, or their names in order. Groups are numbered 0 (`shared`), then the tasks.
        norm: None or "batch" (`KernelNorm`: statistics of the drawn rows).
        activation: None, "relu", "relu_pool" (`activations.relu_pool`: ReLU and 2x2 max-pooling), or a callable that
            acts on each channel alone. It stands before the gate.
        init: initial p, see `gates.initial_probabilities`.
        estimator: how the gradient reaches the logits: a name of `estimators.ESTIMATORS`, or an `Estimator`.

    Attributes:
        weight: [K, C, kH, kW].
        bias: [K] or None.
        norm: a `KernelNorm` or None.
        logits: [K, T+1], temperature: 0-dim, every: see `GroupGates`.

    Raises:
        ValueError: for arguments that can't be (groups other than 1, unknown names), at construction.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor | Features | Sequence[Tensor],
        groups: FilterGroups | None = None,
        residual: Features | None = None,
    ) -> Features:
        """Convolve, normalise, activate, gate.

        Args:
            x: an image [N, C, H, W] that every group reads; or features of an SFG layer; or T+1 dense tensors
                [N, C, H, W], shared first, which are merged by summation as features are.
            groups: a draw to use instead of a new one (shortcuts need one grouping: `conv(x, groups=features.groups)`).
            residual: features of the same draw; F + residual is returned, with less to do than by adding afterwards.

        Returns:
            `SFGFeatures`; under `backend("reference")` the T+1 dense tensors with the same interface.
        """
        if backends.current() == "reference":
            dense = super().forward(x, groups)  # type: ignore[arg-type]
            return dense if residual is None else residual + dense  # type: ignore[operator]
        if not torch.compiler.is_compiling():
            self._refuse_tracers(x)
        image = isinstance(x, Tensor)
        features = self._image(x) if isinstance(x, Tensor) else self._features(x)
        self._check_channels(features)
        groups = self.draw() if groups is None else self.check_groups(groups)
        if self.zero_padding is None:
            features = features.channelwise(self.pad)
        geometry = Geometry(self.stride, self.zero_padding or (0, 0), self.dilation)
        routing = Routing.ALL if image else features.routing
        spec = RoutedConv(groups, features.groups, routing, geometry)
        weight, bias, norm = self.weight_of(groups), self.bias, self.norm
        if norm is not None and norm.folds(groups):
            (weight, bias), norm = norm.folded(weight, bias, groups), None
        relu = norm is None and self.activation == "relu"  # nothing stands between them: the kernels do both
        arguments = features.packed, weight, bias, spec, relu
        source = {"others": features.others, "producer": features.producer}
        nothing_between = norm is None and self.activation is None and not groups.learns
        if nothing_between and _addable(residual, groups, features.packed):
            return SFGFeatures(routed_conv(*arguments, **source, residual=residual.packed), groups)  # type: ignore
        found = convolve(*arguments, **source, keep=groups.all_gates)
        u, others = found.u, found.made_of
        in_one_go = None if norm is None else norm.in_one_go(found.run.kernels, u, groups, self.activation)
        if in_one_go is not None:
            return self._normalised(u, groups, others, residual, in_one_go)
        features = self._epilogue(u, groups, norm, relu, others)
        return features if residual is None else residual + features  # type: ignore[operator]

    def _normalised(
        self, u: Tensor, groups: FilterGroups, others: Others | None, residual: Features | None, kernels: Normalises
    ) -> SFGFeatures:
        """Norm, activation, gate and shortcut in one go, by these kernels."""
        assert self.norm is not None
        if residual is not None and (self.activation == "relu_pool" or not _addable(residual, groups, u)):
            return residual + self._normalised(u, groups, others, None, kernels)  # type: ignore[operator,return-value]
        add = None if residual is None else residual.packed
        h, scale, shift = self.norm.normalise_and_gate(u, groups, self.activation, add, kernels)
        without_memory = None if residual is None else residual.others
        if others is None:
            return SFGFeatures(h, groups, others=without_memory)
        gates = groups.gates
        assert gates is not None
        packed, own = _Gates.apply(h, gates, groups, others, scale, shift, self.activation, False)
        if residual is not None:
            return SFGFeatures(packed, groups, others=joined_others(own, without_memory))
        producer = self._producer(packed, h, groups, others, scale, shift, False)
        return SFGFeatures(packed, groups, others=own, producer=producer)

    def _producer(
        self,
        packed: Tensor,
        h: Tensor,
        groups: FilterGroups,
        others: Others | None,
        scale: Tensor | None,
        shift: Tensor | None,
        own: bool,
    ) -> Producer | None:
        assert groups.gates is not None
        # None in a graph: packed and h would both be its results, and of two views one loses its gradient.
        if self.activation not in (None, "relu") or in_graph():
            return None
        return Producer(packed, h, groups.gates, groups, others, scale, shift, self.activation, own)

    def _epilogue(
        self, u: Tensor, groups: FilterGroups, norm: KernelNorm | None, activated: bool, others: Others | None
    ) -> SFGFeatures:
        """Norm and activation (unless they are done) and gate."""
        scale = shift = None
        if norm is not None:
            u, scale, shift = norm(u, groups)
        h = u if activated else activate(u, self.activation)
        gates = groups.gates
        assert gates is not None
        if groups.full:  # a relaxed draw; the gates' gradient is summed in fp32
            z = gates.t().reshape(-1, 1, 1)
            return SFGFeatures((h.to(z.dtype) * z).to(h.dtype), groups)
        if not gates.requires_grad:
            return SFGFeatures(h, groups)  # the gates of the drawn rows are one
        if others is not None and scale is not None and shift is not None:
            scale, shift = (values[groups.others, groups.order] for values in (scale, shift))
        packed, without_memory = _Gates.apply(h, gates, groups, others, scale, shift, self.activation, True)
        producer = self._producer(packed, h, groups, others, scale, shift, True)
        return SFGFeatures(packed, groups, others=without_memory, producer=producer)

    def _refuse_tracers(self, x: Any) -> None:
        """The kernels are no operations that torch's tracers and transforms know."""
        if torch.jit.is_tracing():
            raise RuntimeError(
                "SFG layers can't be traced, expected torch.compile, or sfg_fast.freeze and torch.export"
            )
        if isinstance(x, fx.Proxy):
            raise TypeError("SFG layers can't be traced by torch.fx, expected torch.export, or sfg_fast.freeze before")
        transformed = torch._C._functorch.is_functorch_wrapped_tensor  # there is no public way to ask
        weight = self._parameters.get("weight")  # (the attribute of a parametrised one would compute it)
        if any(isinstance(one, Tensor) and transformed(one) for one in (x, weight)):
            raise RuntimeError(
                "SFG layers don't know torch.func (vmap, grad, jvp), expected batches [N, C, H, W] and backward(); or "
                "with sfg_fast.backend('reference')"
            )

    def _image(self, x: Tensor) -> SFGFeatures:
        if x.dim() != 4:
            hint = "; of one image: x[None]" if x.dim() == 3 else ""
            raise ValueError(f"the input has shape {tuple(x.shape)}, expected [N, {self.in_channels}, H, W]{hint}")
        if x.is_complex():
            raise ValueError(f"the input is {x.dtype}, expected real numbers (such as its real and imaginary part)")
        return SFGFeatures(x, FilterGroups.blocks([x.shape[1]], ("image",), x.device), Routing.ALL)

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


def _addable(residual: Features | None, groups: FilterGroups, like: Tensor) -> bool:
    """Is there a shortcut that the kernels can add to features of these groups? ValueError for one of another draw."""
    if not isinstance(residual, SFGFeatures) or residual.dtype != like.dtype or groups.full:
        return False
    residual.check_same_draw(groups)
    return True


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


class _Gates(torch.autograd.Function):
    """The gates of a one-hot draw: those of the drawn rows are one, so forward has nothing to do; those of the others
    are zero, and so are these, without memory. Backward: dz = <dL/dF, h> for all gates that want it.

    `others`: what u of the others is made of; h = act(scale * u + shift), scale and shift [T, rows] or
    [1, rows]. Not `own`: the gates of the drawn rows have their gradient already.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        gates: Tensor,
        groups: FilterGroups,
        others: Others | None,
        scale: Tensor | None,
        shift: Tensor | None,
        activation: Activation,
        own: bool,
    ) -> tuple[Tensor, Tensor | None]:
        tensors, ctx.others = ((), None) if others is None else others.split()
        ctx.save_for_backward(h if own else None, gates, scale, shift, *tensors)
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.activation = groups, activation
        packed = h.view_as(h)
        if others is None:
            return packed, None
        n, rows, height, width = h.shape
        return packed, h.new_zeros(()).expand(n, (len(groups.names) - 1) * rows, height, width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, df: Tensor | None, dothers: Tensor | None) -> Any:
        h, gates, scale, shift, *tensors = ctx.saved_tensors
        own = None if df is None or h is None else channel_dots(df, h)
        dz = None
        if dothers is not None:
            others = ctx.others.joined(tensors)
            if ctx.activation in others.kernels.KNOWS:
                dz = others.gate_gradient(dothers, scale, shift, ctx.activation)
            else:
                values = others.values()
                parts = zip(values, dothers.chunk(len(values), 1), strict=True)
                dz = torch.stack([
                    channel_dots(d, activate(masked.affine(u, scale, shift, n), ctx.activation))
                    for n, (u, d) in enumerate(parts)
                ])  # fmt: skip
        return df, ctx.groups.by_kernel(own, dz, gates), None, None, None, None, None, None
