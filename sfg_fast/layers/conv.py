"""`SFGConv2d`, the drop-in layer; transposed convolutions; and both for volumes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends, reference
from ..features import SFGFeatures
from ..groups import FilterGroups, Routing
from ..kernels.spec import Geometry, RoutedConv
from ..layer import Conv2dLayer, Conv3dLayer, ConvTranspose2dLayer, ConvTranspose3dLayer, SFGLayer
from ..norm import KernelNorm
from ..reference import DenseFeatures
from ..routed_conv import convolve
from ..routed_conv.epilogue import Epilogue, features_of
from ..tracing import refuse_tracers
from .other_convs import grouped, transposed

Features = SFGFeatures | DenseFeatures


class _Routed(SFGLayer):
    """The forward pass of the layers here."""

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
        features = self._packed(x)
        groups = self.draw() if groups is None else self.check_groups(groups)
        (weight, bias), norm = self.parameters_of(groups), self.norm
        if self.groups == 1:
            weight = self.kernels_first(weight)
            if isinstance(norm, KernelNorm) and norm.folds(groups):
                (weight, bias), norm = norm.folded(weight, bias, groups), None
        packed = residual if isinstance(residual, SFGFeatures) else None
        if packed is not None:
            packed.check_same_draw(groups)
        relu = False
        if self.groups > 1:
            found = grouped(self, features, groups, weight, bias)
        elif self.transposed:
            found = transposed(self, features, groups, weight, bias)
        else:
            relu = norm is None and self.activation == "relu"  # with no norm between them the kernels do both at once
            add = None
            if norm is None and self.activation is None and not groups.learns and not groups.full:  # u + residual
                add = packed.packed if packed is not None and packed.dtype == features.dtype else None
            geometry = Geometry(self.stride, self.zero_padding or (0,) * self.dims, self.dilation)
            spec = RoutedConv(groups, features.groups, features.routing, geometry)
            found = convolve(
                features.packed, weight, bias, spec, relu, add, undrawn=features.undrawn, deferred=features.deferred,
                keep_product=groups.all_gates and add is None,
            )  # fmt: skip
            if add is not None:
                return SFGFeatures(found.u, groups)
        made = features_of(found, Epilogue(groups, norm, self.activation, activated=relu), packed)
        return made if residual is packed else residual + made  # type: ignore[operator, arg-type]

    def _packed(self, x: Tensor | Features | Sequence[Tensor]) -> SFGFeatures:
        """What the layer reads, as packed features, padded where the convolution can't do it. Raises ValueError for
        anything that it can't read."""
        size = ("D, H, W", "H, W")[self.dims == 2]
        if isinstance(x, Tensor):
            if x.dim() != self.dims + 2:
                hint = "; of one image: x[None]" if x.dim() == self.dims + 1 else ""
                raise ValueError(
                    f"the input has shape {tuple(x.shape)}, expected [N, {self.in_channels}, {size}]{hint}"
                )
            if x.is_complex():
                raise ValueError(f"the input is {x.dtype}, expected real numbers (such as its real and imaginary part)")
            features = SFGFeatures.of_image(x)
        elif isinstance(x, SFGFeatures):
            self.check_names(x.groups)
            features = x
        else:
            self.check_sequence(x)
            features = SFGFeatures.of_dense(x, self.group_names[1:], getattr(x, "routing", Routing.ARROW))
        if features.packed.dim() != self.dims + 2 or features.groups.width != self.in_channels:
            raise ValueError(
                f"the input has shape {tuple(features.packed.shape)} and {features.groups.width} channels, "
                f"expected [N, {self.in_channels}, {size}]"
            )
        if self.transposed or self.zero_padding is not None or self.groups > 1:
            return features
        return features.channelwise(self.pad)


class SFGConv2d(_Routed, Conv2dLayer):
    """A 2-D convolution whose K kernels are drawn into T+1 groups: `shared` and one for each task (paper, section 2.1).

    y[n,k] = z[k] * act(norm(b[k] + sum over c with reads(group(k), group(c)) of W[k,c] (*) x[n,c])). What the drawn
    grouping zeroes is never computed. Positional arguments as `torch.nn.Conv2d`.

    Args:
        groups: as in `torch.nn.Conv2d`. Kernel k then reads, of the channels of its own group of channels, those that
            its filter group reads. A depthwise layer (as many groups as channels) should take the draw of its input,
            `conv(x, groups=x.groups)`: a kernel that is drawn into another group than its channel reads nothing.
            Grouped convolutions are done by dense masking, depthwise ones that take the draw of their input are not.
        tasks: number of tasks, or their names in order. Filter groups are numbered 0 (`shared`), then the tasks.
        norm: None, "batch" (`KernelNorm`), "instance", "group" or "layer" (`ImageNorm`); or the name and arguments of
            the norm, such as ("group", {"num_groups": 8}), which "group" needs. See norm.py for what a norm over
            channels takes together.
        activation: None, "relu", "leaky_relu" (of slope 0.01), "relu_pool" (`activations.relu_pool`: ReLU and 2x2
            max-pooling), or a callable that acts on each channel alone. It stands before the gate.
            `nn.PReLU(out_channels)` has a slope for each kernel.
        init: initial p, see `draws.initial_probabilities`.
        estimator: how the gradient reaches the logits: a name of `estimators.ESTIMATORS`, or an `Estimator`.

    Attributes:
        weight: [K, C / groups, kH, kW].
        bias: [K] or None. In front of an instance norm, which would take it away, it is not used, and its gradient is
            zero.
        norm: a `KernelNorm`, an `ImageNorm` or None.
        logits: [K, T+1], temperature: 0-dim, every: see `GroupGates`.

    Raises:
        ValueError: for arguments that can't be (unknown names), at construction.
    """


class SFGConvTranspose2d(_Routed, ConvTranspose2dLayer):
    """A transposed convolution whose K kernels are drawn into T+1 groups, with the positional arguments of
    `torch.nn.ConvTranspose2d`. Everything else is as in `SFGConv2d`; `weight` is [C, K / groups, kH, kW], as torch has
    it. It is computed as a convolution of stride 1 for each place between the strides (routed_conv/places.py), and
    costs what the drawn grouping leaves."""


class SFGConv3d(_Routed, Conv3dLayer):
    """`SFGConv2d` for volumes [N, C, D, H, W], with the positional arguments of `torch.nn.Conv3d`. The backends
    `reference` and `masked` compute it, not `native` and `triton`; `auto` takes `masked`."""


class SFGConvTranspose3d(_Routed, ConvTranspose3dLayer):
    """`SFGConvTranspose2d` for volumes [N, C, D, H, W], with the positional arguments of `torch.nn.ConvTranspose3d`.
    Backends as for `SFGConv3d`."""


def for_backend(x: Features) -> Features:
    """Features as the backend in force has them: packed, or T+1 dense tensors under `backend("reference")`."""
    if isinstance(x, SFGFeatures) and backends.current() == "reference":
        return DenseFeatures(list(x), x.groups, x.routing)
    if isinstance(x, DenseFeatures) and backends.current() != "reference":
        return SFGFeatures.of_dense(x, x.groups.tasks, x.routing)
    return x
