"""`SFGConv2d`: the drop-in layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from .. import backends, reference, undrawn
from ..activations import activate
from ..features import SFGFeatures
from ..groups import FilterGroups, Routing
from ..kernels.contract import Normalises
from ..kernels.spec import Geometry, RoutedConv
from ..layer import SFGLayer
from ..norm import KernelNorm
from ..reference import DenseFeatures
from ..routed_conv import convolve, eager, normalise
from ..routed_conv.gate_gradient import DeferredGates, GatedRows, UndrawnRows
from ..routed_conv.run import Run
from ..tracing import refuse_tracers

Features = SFGFeatures | DenseFeatures


class SFGConv2d(SFGLayer):
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

    def forward(
        self,
        x: Tensor | Features | Sequence[Tensor],
        groups: FilterGroups | None = None,
        residual: Features | None = None,
    ) -> Features:
        """Convolves, normalises, activates, gates.

        Args:
            x: an image [N, C, H, W] that every group reads; or features of an SFG layer; or T+1 dense tensors
                [N, C, H, W], shared first, which are merged by summation as features are.
            groups: a draw to use instead of a new one (shortcuts need one grouping: `conv(x, groups=features.groups)`).
            residual: features of the same draw; F + residual is returned, in less time than by adding afterwards.

        Returns:
            `SFGFeatures`; under `backend("reference")` the T+1 dense tensors with the same interface.
        """
        if backends.current() == "reference":
            dense = reference.forward(self, x, groups)  # type: ignore[arg-type]
            return dense if residual is None else residual + dense  # type: ignore[operator]
        refuse_tracers(x, self._parameters.get("weight"))  # (not self.weight: a parametrised one would be computed)
        features = self._features(x)
        groups = self.draw() if groups is None else self.check_groups(groups)
        if self.zero_padding is None:
            features = features.channelwise(self.pad)
        geometry = Geometry(self.stride, self.zero_padding or (0, 0), self.dilation)
        spec = RoutedConv(groups, features.groups, features.routing, geometry)
        weight, bias, norm = self.weight_of(groups), self.bias, self.norm
        if norm is not None and norm.folds(groups):
            (weight, bias), norm = norm.folded(weight, bias, groups), None
        relu = norm is None and self.activation == "relu"  # nothing stands between them: the kernels do both
        add = None
        if (
            norm is None
            and self.activation is None
            and not groups.learns
            and _addable(residual, groups, features.packed)
        ):
            add = residual.packed
        found = convolve(
            features.packed, weight, bias, spec, relu, add,
            undrawn=features.undrawn, deferred=features.deferred, keep_product=groups.all_gates and add is None,
        )  # fmt: skip
        if add is not None:
            return SFGFeatures(found.u, groups)
        kernels = None if norm is None else normalise.in_one_go(norm, found.run, found.u, groups, self.activation)
        if norm is not None and kernels is not None:
            return self._gate_in_one_go(found.u, norm, groups, found.undrawn_rows, residual, kernels)
        gated = self._gate(found.u, norm, groups, found.undrawn_rows, found.run, activated=relu)
        return gated if residual is None else residual + gated  # type: ignore[operator]

    def _gate_in_one_go(
        self,
        u: Tensor,
        norm: KernelNorm,
        groups: FilterGroups,
        rows: UndrawnRows | None,
        residual: Features | None,
        kernels: Normalises,
    ) -> SFGFeatures:
        """F = z * act(norm(u)) + residual, by kernels that do all of it in one go."""
        if residual is not None and (self.activation == "relu_pool" or not _addable(residual, groups, u)):
            return residual + self._gate_in_one_go(u, norm, groups, rows, None, kernels)  # type: ignore
        add = None if residual is None else residual.packed
        h, scale, shift = normalise.normalise_and_gate(norm, u, groups, self.activation, add, kernels)
        of_residual = residual.undrawn if isinstance(residual, SFGFeatures) else None
        if rows is None:
            return SFGFeatures(h, groups, undrawn=of_residual)
        gated = GatedRows(groups, rows, scale, shift, self.activation, wants_drawn=False)
        packed, behind = eager.gate(h, gated)
        if residual is not None:
            return SFGFeatures(packed, groups, undrawn=undrawn.of_sum(behind, of_residual))
        return SFGFeatures(packed, groups, undrawn=behind, deferred=self._deferred(packed, h, gated, rows.run))

    def _gate(
        self,
        u: Tensor,
        norm: KernelNorm | None,
        groups: FilterGroups,
        rows: UndrawnRows | None,
        run: Run,
        activated: bool,
    ) -> SFGFeatures:
        """F = z * act(norm(u)); `activated`: the activation has been applied already."""
        scale = shift = None
        if norm is not None:
            u, scale, shift = norm(u, groups)
        h = u if activated else activate(u, self.activation)
        gates = groups.gates
        assert gates is not None
        if groups.full:  # a relaxed draw; the gates' gradient is summed in float32
            z = gates.t().reshape(-1, 1, 1)
            return SFGFeatures((h.to(z.dtype) * z).to(h.dtype), groups)
        if not gates.requires_grad:
            return SFGFeatures(h, groups)  # the gates of drawn rows are one
        if rows is not None and scale is not None and shift is not None:
            scale, shift = (values[groups.undrawn, groups.order] for values in (scale, shift))
        gated = GatedRows(groups, rows, scale, shift, self.activation, wants_drawn=True)
        packed, behind = eager.gate(h, gated)
        return SFGFeatures(packed, groups, undrawn=behind, deferred=self._deferred(packed, h, gated, run))

    def _deferred(self, packed: Tensor, h: Tensor, rows: GatedRows, run: Run) -> DeferredGates | None:
        """The gates for the layer that reads the features, if it may compute their gradient. In a graph it may not:
        packed and h would both be results of `gate`, and of two views one loses its gradient."""
        if self.activation not in (None, "relu") or run.by_operators:
            return None
        return DeferredGates(packed, h, rows)

    def _features(self, x: Tensor | Features | Sequence[Tensor]) -> SFGFeatures:
        """What the layer reads, as packed features. Raises ValueError for anything else."""
        if isinstance(x, Tensor):
            features = self._image(x)
        elif isinstance(x, SFGFeatures):
            self.check_names(x.groups)
            features = x
        else:
            self.check_sequence(x)
            features = _side_by_side(x, self.group_names[1:])
        if features.packed.dim() != 4 or features.groups.width != self.in_channels:
            raise ValueError(
                f"the input has shape {tuple(features.packed.shape)} and {features.groups.width} channels, "
                f"expected [N, {self.in_channels}, H, W]"
            )
        return features

    def _image(self, x: Tensor) -> SFGFeatures:
        if x.dim() != 4:
            hint = "; of one image: x[None]" if x.dim() == 3 else ""
            raise ValueError(f"the input has shape {tuple(x.shape)}, expected [N, {self.in_channels}, H, W]{hint}")
        if x.is_complex():
            raise ValueError(f"the input is {x.dtype}, expected real numbers (such as its real and imaginary part)")
        return SFGFeatures(x, FilterGroups.blocks([x.shape[1]], ("image",), x.device), Routing.ALL)


def _addable(residual: Features | None, groups: FilterGroups, like: Tensor) -> TypeGuard[SFGFeatures]:
    """Is there a shortcut that the kernels can add to features of these groups, which are like `like`? Raises
    ValueError for one of another draw."""
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
