"""What plain torch code may do to features of SFG layers, packed, dense or frozen, as if they were a tensor.

A function may act if it treats every channel alone and keeps zeros, because channels of other groups are zero and are
not even there. Everything else raises, and says what to do instead: nothing is made dense silently.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from .tracing import in_graph

# relu'(0) = 0: behind a gate, where an undrawn row is zero, these tell its gate nothing.
_FLAT_AT_ZERO = {F.relu, torch.relu, F.relu6, F.hardtanh, F.threshold, F.hardshrink, F.softshrink}
CHANNELWISE = _FLAT_AT_ZERO | {
    F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.softsign, F.tanhshrink,
    torch.tanh, F.tanh, torch.sin, torch.erf, torch.abs, torch.neg, torch.square, torch.sqrt, torch.clone,
    Tensor.tanh, Tensor.abs, Tensor.neg, Tensor.square, Tensor.clone,
    F.dropout, F.dropout2d, F.dropout3d,
    F.max_pool2d, F.avg_pool2d, F.lp_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
    F.max_pool3d, F.avg_pool3d, F.lp_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d,
    F.interpolate, F.upsample, F.pad, torch.mean, Tensor.mean,
}  # fmt: skip
_NORMS: dict[Any, str] = {  # what the `norm` of a layer is that does the same
    F.batch_norm: "'batch'", torch.batch_norm: "'batch'", F.instance_norm: "'instance'", F.layer_norm: "'layer'",
    F.group_norm: "('group', {'num_groups': ..})",
}  # fmt: skip
_CONVOLUTIONS = {F.conv2d, torch.conv2d, F.conv_transpose2d, F.conv3d, F.conv_transpose3d, F.linear}
# They treat every value alone, but give values to zeros: only streams, which no gate has zeroed, may be given to them.
ELEMENTWISE = {F.sigmoid, torch.sigmoid, F.hardsigmoid, F.softplus, F.logsigmoid, torch.exp, torch.cos, torch.log}
_REVIVES = ELEMENTWISE | {F.softmax, F.log_softmax, F.softmin, F.alpha_dropout, F.feature_alpha_dropout}

# Called by name, because a compiler gives an operator of features and a tensor to `__torch_function__` again.
_OPERATORS: dict[Any, str] = {
    torch.add: "__add__", Tensor.add: "__add__", Tensor.__add__: "__add__", Tensor.__radd__: "__add__",
    torch.mul: "__mul__", Tensor.mul: "__mul__", Tensor.__mul__: "__mul__", Tensor.__rmul__: "__mul__",
}  # fmt: skip

INSTEAD = "take dense tensors, features.dense(group) or features.merged(task)"


class TensorLike:
    """The part of a tensor's interface that all features have."""

    @property
    def shape(self) -> torch.Size:
        """That of one dense tensor, [N, K, H, W]."""
        raise NotImplementedError

    @property
    def streams_of_groups(self) -> bool:
        """Has every group a tensor of its own, which it reads alone, and in which no gate has zeroed anything?"""
        raise NotImplementedError

    def channelwise(self, operation: Callable[[Tensor], Tensor]) -> Self:
        """`operation` on every channel: it must treat each alone, and keep zeros."""
        raise NotImplementedError

    def as_shared(self, x: Tensor) -> Self:
        """x [N, C, H, W], which is no feature of a layer, as features of the same groups: its channels become kernels
        of the shared group, with constant gates, so every group reads them."""
        raise NotImplementedError

    def plus(self, x: float | Tensor) -> Self:
        """F'_g = F_g + z_g * x for a number x, or a tensor [N, K, H, W] with 1 in place of any size. The sum stands
        before the gate, so what the grouping zeroes stays zero; z counts as a constant in z * x. Raises ValueError for
        another shape."""
        raise NotImplementedError

    def times(self, factor: Any) -> Self:
        """F'_g = F_g * s_g, where s_g has K channels, or one. `factor` is a tensor s [N, K, H, W], the same for all
        groups, or streams with an s_g for each group, which no gate has zeroed (`StreamConv2d` makes them). Any of
        their sizes may be 1. Raises ValueError for another shape, and for features of a draw."""
        raise NotImplementedError

    def take(self, kernels: Sequence[int]) -> Self:
        """Some kernels in the order of `kernels`; each stays in its group. A split, a range and a shuffle of channels
        are such. Raises ValueError for a kernel that comes twice, or isn't there."""
        raise NotImplementedError

    def prelu(self, slopes: Tensor) -> Self:
        """As `F.prelu` with a slope for each kernel [K], or one for all [1]."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `Tensor.to`, for the values (the groupings keep their dtype)."""
        return self.channelwise(lambda x: x.to(*args, **kwargs))

    def detach(self) -> Self:
        """The same values, without a graph of autograd."""
        return self.channelwise(Tensor.detach)

    def crop(self, index: tuple[slice, ...]) -> Self:
        """[:, :, from:to, from:to] of a tensor."""
        return self.channelwise(lambda x: x[index])

    def dim(self) -> int:
        """4, of volumes 5."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As `Tensor.size`, of `shape`."""
        return self.shape if dim is None else self.shape[dim]

    def __mul__(self, factor: Any) -> Self:
        """Times a number or a tensor of one number, or as `times`."""
        if _are_features(factor) or (isinstance(factor, Tensor) and factor.numel() > 1):
            return self.times(factor)
        return self._scaled(operator.mul, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> Self:
        return self._scaled(operator.truediv, divisor)

    def _scaled(self, operation: Callable[[Any, Any], Any], number: float | Tensor) -> Self:
        if isinstance(number, Tensor) and number.numel() == 1:
            number = number.reshape(())
        elif not isinstance(number, int | float):
            return NotImplemented
        return self.channelwise(lambda x: operation(x, number))

    def __getattr__(self, name: str) -> Any:
        """What to raise for what features don't have."""
        text = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(f"{text}, because it is no tensor: {INSTEAD}" if hasattr(Tensor, name) else text)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return act_on_features(function, args, dict(kwargs or {}))


def act_on_features(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(features, ..)` with features of an SFG layer in place of a tensor. Raises TypeError if it can't be."""
    name = getattr(function, "__name__", str(function))
    if function in (torch.cat, torch.concat, torch.concatenate):
        return _concatenate(*args, **kwargs)
    if function in _OPERATORS and len(args) == 2:
        if kwargs:
            raise TypeError(f"{name}({', '.join(kwargs)}=...): features can only be added and multiplied as they are")
        first, second = args if _are_features(args[0]) else args[::-1]
        return getattr(first, _OPERATORS[function])(second)
    if function in (F.prelu, torch.prelu) and _are_features(args[0]):
        return args[0].prelu(*args[1:], **kwargs)
    if function in _NORMS:
        raise TypeError(
            f"{name} would give values to the channels that the grouping zeroes: let the layer before do it, "
            f"SFGConv2d(..., norm={_NORMS[function]})"
        )
    if function in _CONVOLUTIONS:
        raise TypeError(
            f"{name} would mix what belongs to different tasks: use SFGConv2d, or give it what one task reads, "
            "features.merged(task)"
        )
    if function in ELEMENTWISE and args and args[0].streams_of_groups:
        return args[0].channelwise(lambda x: function(x, *args[1:], **kwargs))
    if function in _REVIVES:
        raise TypeError(
            f"{name} would give values to the channels that the grouping zeroes: let the layer before do it, "
            f"SFGConv2d(..., activation={_qualified(function, name)})"
        )
    features = args[0] if args else kwargs.pop("input", None)
    rest = args[1:]
    if function not in CHANNELWISE or any(map(_are_features, (*rest, *kwargs.values()))):
        if name.endswith("_with_indices"):
            raise TypeError(f"{name}: SFG features have no indices, expected return_indices=False")
        raise TypeError(
            f"{name} is not known to act on each channel alone and to keep zeros, so it can't act on SFG features: "
            f"{INSTEAD}"
        )
    _check_keeps_zeros(function, name, features.dim(), rest, kwargs)
    if kwargs.get("inplace"):  # the packed tensor is the layer's own
        kwargs = {**kwargs, "inplace": False}
    if function in _FLAT_AT_ZERO and getattr(features, "undrawn", None) is not None:
        _warn_flat(name)
    return features.channelwise(lambda x: function(x, *rest, **kwargs))


def _are_features(x: Any) -> bool:
    return hasattr(type(x), "merged")


def as_plain(x: float | Tensor, shape: Sequence[int]) -> Any:
    """x, to be added to features of this shape [N, K, H, W] or multiplied with them: a number, or a tensor of as many
    dimensions. Raises ValueError for a tensor that can't be broadcast to this shape."""
    if not isinstance(x, Tensor):
        return x
    if x.numel() == 1:
        return x.reshape([1] * len(shape))
    if x.dim() != len(shape) or not all(a in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"a tensor {tuple(x.shape)} meets features {tuple(shape)}, expected the same {len(shape)} sizes, or 1 for "
            "any of them"
        )
    return x


def check_image(x: Tensor, dims: int) -> None:
    """Raises ValueError unless x has `dims` dimensions, those of features."""
    if x.dim() != dims:
        size = ("D, H, W", "H, W")[dims == 4]
        raise ValueError(f"a tensor {tuple(x.shape)} can't be features, expected [N, C, {size}]")


def check_taken(kernels: Sequence[int], width: int) -> tuple[int, ...]:
    """`kernels` as a tuple. Raises ValueError unless they are different ones of `width` kernels."""
    if len(set(kernels)) != len(kernels) or not all(0 <= kernel < width for kernel in kernels) or not kernels:
        raise ValueError(f"kernels={list(kernels)}: expected some of 0 to {width - 1}, each once")
    return tuple(kernels)


def check_factor(names: Sequence[str], width: int, of: Any, groups: Any) -> None:
    """Raises ValueError unless features `of`, which have these `groups`, can be a factor of features with groups of
    these names and `width` kernels."""
    if not groups.streams_of_groups or tuple(groups.names) != tuple(names) or groups.width not in (1, width):
        raise ValueError(
            f"features can be multiplied with a number, a tensor, or streams of {width} kernels or one, such as "
            f"StreamConv2d makes; got {of}. (A product of two features has two gates.)"
        )


def _check_keeps_zeros(function: Any, name: str, axes: int, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Some functions keep zeros only with the right arguments. `axes`: the dimensions of the features."""
    if function is F.pad:
        mode = kwargs.get("mode", rest[1] if len(rest) > 1 else "constant")
        value = kwargs.get("value", rest[2] if len(rest) > 2 else None)
        if mode == "constant" and value:
            raise TypeError(
                f"pad(value={value}) would give values to the channels that the grouping zeroes, expected 0"
            )
        if len(rest[0] if rest else kwargs["pad"]) > 2 * (axes - 2):
            sizes = ("depth, height and width", "height and width")[axes == 4]
            raise TypeError(f"pad={rest[0] if rest else kwargs['pad']}: only {sizes} can be padded")
    elif function in (torch.mean, Tensor.mean):
        dims = rest[0] if rest else kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        keeps = rest[1] if len(rest) > 1 else kwargs.get("keepdim", False)
        if not dims or not keeps or any(dim % axes < 2 for dim in dims):
            positions = tuple(range(2, axes))
            raise TypeError(f"mean(dim={dims}, keepdim={keeps}): expected dim={positions}, keepdim=True")
    elif function in (F.hardtanh, F.threshold):
        zero = torch.zeros(1)
        if function(zero, *rest, **{**kwargs, "inplace": False}) != 0:
            raise TypeError(f"{name} with these limits moves zero, expected limits on either side of it")


def _concatenate(features: Any, dim: int = 0, **other: Any) -> Any:
    if other or not all(map(_are_features, features)) or dim not in (1, 1 - features[0].dim()):
        raise TypeError(
            f"torch.cat(dim={dim}) of {', '.join(type(one).__name__ for one in features)}: SFG features can be "
            "concatenated along their channels (dim=1), and only with one another"
        )
    return features[0].concatenate(*features[1:])


def _warn_flat(name: str) -> None:
    if not in_graph():
        warnings.warn(
            f"{name} behind a gate: the values are right, but the gates of groups that a kernel was not drawn into get "
            "no gradient through it, so p is learnt poorly; put it before the gate, SFGConv2d(..., activation='relu')",
            stacklevel=5,
        )


def _qualified(function: Any, name: str) -> str:
    module = getattr(function, "__module__", None)
    return f"{'torch.nn.functional' if module == 'torch.nn.functional' else 'torch'}.{name}"
