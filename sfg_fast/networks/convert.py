"""An existing network with SFG layers in place of its convolutions, pretrained weights kept."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..groups import group_names
from ..layers.conv import SFGConv2d
from ..layers.feature_norm import FeatureNorm
from ..norm import KernelNorm
from ..plain_ops import CHANNELWISE
from .controls import sfg_layers
from .record import pads_channels, record

_ADD = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.relu6, F.selu, F.celu, F.softplus,
                     torch.sigmoid, torch.tanh)
}  # fmt: skip
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip
_NORMS = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.LocalResponseNorm


def convert(
    module: nn.Module,
    tasks: Mapping[str, int] | Iterable[str],
    skip: Iterable[str] = (),
    example: Tensor | None = None,
    **options: Any,
) -> fx.GraphModule:
    """The same network for several tasks: every convolution an SFG layer, up to a head of its own for each task.

    `module` is run once on `example`, and what it does is recorded as a graph: each `nn.Conv2d` becomes an `SFGConv2d`
    with the batch normalisation, the activation and, behind a ReLU, the 2x2 max-pooling that follow it, because these
    belong before the gate; what is added up shares one grouping (shortcuts); concatenations, other pooling,
    interpolation stay; a batch normalisation that follows a sum becomes a `FeatureNorm`. The last convolution, or all
    that follows the last feature map (pooling, flattening, linear layers), becomes a head for each task. Weights are
    those of `module`: with all kernels shared each task's output is `module`'s, but for heads of another size. That is
    checked, on the example and on noise of its shape.

    Args:
        module: a network of one image [N, C, H, W] and one output. It is left alone.
        tasks: {name: number of outputs}, or names: as many outputs as `module` has. A head of another size starts anew.
        skip: names of modules to be left plain. They must stand before the SFG layers: a plain convolution in between
            would mix what belongs to different tasks.
        example: an image, by default noise [1, C, 64, 64]. What the forward pass of `module` makes of its size (an
            `if`, a number) is kept as it was for the example.
        options: of all SFG layers: `init`, `estimator`.

    Returns:
        A module that returns {task: output}. Modules have the names that they had in `module`.

    Raises:
        ValueError: for what can't be converted, with its name: another norm than batch normalisation, a transposed or
            grouped convolution, a sum with something that is no feature of an SFG layer, a function that does
            something else on another image of the same shape, ..
    """
    tasks = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(group_names(tasks)[1:])
    network = copy.deepcopy(module)
    modes = {child: child.training for child in network.modules()}
    first = next((child for child in network.modules() if isinstance(child, nn.Conv2d)), None)
    if first is None:
        raise ValueError("convert: the module has no nn.Conv2d")
    if example is None:
        example = _noise(first.weight.new_empty(1, first.in_channels, 64, 64), 0)
    network.eval()
    graph, expected = record(network, example)
    other = 1 + 2 * _noise(example, 1)  # of another mean and spread, too
    with torch.no_grad():
        pairs = (example, expected), (other, copy.deepcopy(network)(other))
    conversion = _Conversion(network, graph, tuple(tasks), set(skip), options, modes)
    conversion.run()
    converted = fx.GraphModule(network, graph)
    converted.graph.eliminate_dead_code()
    converted.graph.lint()
    converted.recompile()
    for image, output in pairs:
        _check_equal(converted, image, output)
    for task, size in tasks.items():
        if size is not None and conversion.last is not None:
            name = f"{conversion.last}.{task}"
            converted.set_submodule(name, _resized(converted.get_submodule(name), size))
    converted.train(module.training)
    for child, training in modes.items():
        child.training = training
    return converted


# --- what becomes of it ----------------------------------------------------------------------------------------------


class _Conversion:
    """Rewrites a recorded graph. Every node is plain (the image, and what skipped modules make of it), features of SFG
    layers, or the tail, which is done once for each task."""

    def __init__(
        self, network: nn.Module, graph: fx.Graph, tasks: tuple[str, ...], skip: set[str], options: Any,
        modes: dict[nn.Module, bool],
    ) -> None:  # fmt: skip
        """`modes`: of the modules, in training or not; what is put in their place gets theirs."""
        self.modes = modes
        self.network, self.graph, self.tasks, self.options = network, graph, tasks, options
        self.modules = dict(network.named_modules())
        if unknown := skip - self.modules.keys():
            raise ValueError(f"skip: there is no module {', '.join(map(repr, sorted(unknown)))}")
        self.skip = {name for name in self.modules if any(name == one or name.startswith(f"{one}.") for one in skip)}
        self.kind: dict[fx.Node, str] = {}
        self.stream: dict[fx.Node, Any] = {}  # the convolution whose grouping features have
        self.same: dict[fx.Node, fx.Node] = {}  # convolutions whose outputs are added up
        self.last: str | None = None  # the layer of the tail that gives the output its size

    def run(self) -> None:
        self._dropouts()
        output = next(node for node in self.graph.nodes if node.op == "output")
        self.head = self._head(output.args[0])
        for node in list(self.graph.nodes):
            if node.op != "output":
                self._node(node)
        if self.kind[output.args[0]] != "tail" or not sfg_layers(self.network):
            raise ValueError("convert: nothing is left to be an SFG layer, or nothing behind them to be a head")
        self._share_groupings()
        self._tails(output)

    def _dropouts(self) -> None:
        """F.dropout(x, p, self.training) as a module: what was recorded never drops, because that was in `eval()`.
        (Whose `training` it was is not known: the whole network's is taken.)"""
        for node in list(self.graph.nodes):
            if node.target not in _DROPOUTS:
                continue
            number = next(n for n in itertools.count() if not hasattr(self.network, f"dropout_{n}"))
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            name, dropout = f"dropout_{number}", _DROPOUTS[node.target](p)
            self.network.add_module(name, dropout)
            self.modules[name], self.modes[dropout] = dropout, self.modes[self.network]
            with self.graph.inserting_before(node):
                node.replace_all_uses_with(self.graph.call_module(name, (node.kwargs.get("input", *node.args[:1]),)))
            self.graph.erase_node(node)

    def _head(self, node: fx.Node) -> fx.Node | None:
        """The last convolution, if nothing but channelwise functions follow it; else None: the tail starts later."""
        while node.op != "placeholder":
            module = self._module(node)
            if isinstance(module, nn.Conv2d):
                return node
            if isinstance(module, nn.Linear | _NORMS) or len(node.all_input_nodes) != 1:
                return None
            node = node.all_input_nodes[0]
        return None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _uses(self, node: fx.Node) -> int:
        return sum(other.op == "call_module" and other.target == node.target for other in self.graph.nodes)

    def _node(self, node: fx.Node) -> None:
        kinds = {self.kind[one] for one in node.all_input_nodes}
        features = [one for one in node.all_input_nodes if self.kind[one] == "features"]
        module = self._module(node)
        if "tail" in kinds or node is self.head:
            self.kind[node] = "tail"
        elif isinstance(module, nn.Conv2d) and node.target not in self.skip:
            self._conv(node, module)
        elif not features:
            self._plain(node, module)
        else:
            self._on_features(node, module, features)

    def _plain(self, node: fx.Node, module: nn.Module | None) -> None:
        if isinstance(module, nn.modules.conv._ConvTransposeNd) and node.target not in self.skip:
            raise ValueError(f"convert: {node.target!r} is a transposed convolution, expected nn.Conv2d (or skip it)")
        self.kind[node] = "plain"

    def _conv(self, node: fx.Node, conv: nn.Conv2d) -> None:
        name = str(node.target)
        if conv.groups != 1:
            raise ValueError(f"convert: {name!r} is a convolution of {conv.groups} groups, expected 1 (or skip it)")
        if self._uses(node) > 1:
            raise ValueError(f"convert: {name!r} is used more than once, expected one place for each convolution")
        norm, activation = self._followers(node)
        self._replace(name, self._sfg(conv, norm, activation))
        self.kind[node], self.stream[node] = "features", node

    def _sfg(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: Any) -> SFGConv2d:
        layer = SFGConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
            conv.dilation, 1, conv.bias is not None, conv.padding_mode, tasks=self.tasks,  # type: ignore[arg-type]
            norm=None if norm is None else "batch", activation=activation, device=conv.weight.device,
            dtype=conv.weight.dtype, **self.options,
        )  # fmt: skip
        layer.weight, layer.bias = conv.weight, conv.bias
        self.modes[layer] = self.modes.get(conv, True)
        if norm is not None and layer.norm is not None:
            copy_batch_norm(norm, layer.norm)
            self.modes[layer.norm] = self.modes[norm]
        return layer

    def _followers(self, node: fx.Node) -> tuple[nn.BatchNorm2d | None, Any]:
        """The batch normalisation and the activation that read this convolution and nobody else does; they are taken
        out of the graph."""
        norm, activation = None, None
        follower = _only_user(node)
        found = None if follower is None else self._module(follower)
        if follower is not None and isinstance(found, nn.BatchNorm2d) and self._uses(follower) == 1:
            norm = found
            self._take_out(follower, node)
            follower = _only_user(node)
        if follower is not None and (activation := self._activation(follower)) is not None:
            self._take_out(follower, node)
            follower = _only_user(node)
            if activation == "relu" and follower is not None and _halves(self._module(follower)):
                # Behind the gate the maximum would tell it nothing (see networks/vgg.py).
                activation = "relu_pool"
                self._take_out(follower, node)
        return norm, activation

    def _activation(self, node: fx.Node) -> Any:
        module = self._module(node)
        if isinstance(module, nn.ReLU):
            return "relu"
        if isinstance(module, nn.PReLU):
            return module if module.num_parameters == 1 else None
        if module is not None:
            elementwise = type(module).__module__ == "torch.nn.modules.activation"
            return copy.copy(module) if elementwise and not isinstance(module, _NOT_ELEMENTWISE) else None
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
        name = getattr(node.target, "__name__", "").removesuffix("_")
        if name == "relu":
            return "relu"
        if name in _ACTIVATIONS:
            kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "input")}
            return functools.partial(_elementwise, name=name, args=tuple(node.args[1:]), kwargs=kwargs)
        return None

    def _take_out(self, node: fx.Node, before: fx.Node) -> None:
        node.replace_all_uses_with(before)
        self.graph.erase_node(node)
        self.kind[node] = "gone"

    def _replace(self, name: str, module: nn.Module) -> None:
        self.network.set_submodule(name, module)

    def _on_features(self, node: fx.Node, module: nn.Module | None, features: list[fx.Node]) -> None:
        name = getattr(node.target, "__name__", str(node.target))
        self.kind[node], self.stream[node] = "features", self.stream[features[0]]
        if isinstance(module, nn.BatchNorm2d):
            norm = FeatureNorm(module.num_features, 1 + len(self.tasks), module.eps, module.momentum or 0.0,
                               device=module.weight.device, dtype=module.weight.dtype)  # fmt: skip
            copy_batch_norm(module, norm.norm)
            self.modes[norm] = self.modes[norm.norm] = self.modes[module]
            self._replace(str(node.target), norm)
        elif isinstance(module, _NORMS):
            raise ValueError(
                f"convert: {node.target!r} is {type(module).__name__}, which would give values to channels that the "
                "grouping zeroes, expected nn.BatchNorm2d"
            )
        elif isinstance(module, nn.modules.conv._ConvNd):
            raise ValueError(
                f"convert: {node.target!r} ({type(module).__name__}) reads features of SFG layers and would mix what "
                "belongs to different tasks: only nn.Conv2d becomes an SFG layer, and only what stands before all of "
                "them can be skipped"
            )
        elif module is not None and pads_channels(module):
            self._channel_pad(node, module)
        elif name in _ADD:
            self._add(node, features)
        elif name in ("cat", "concat", "concatenate"):
            if len(features) < len(node.all_input_nodes):
                raise ValueError("convert: features of SFG layers are concatenated with something else")
            self.stream[node] = node
        elif not (_acts_on_channels(module) if module is not None else node.target in CHANNELWISE):
            del self.stream[node]
            self.kind[node] = "tail"

    def _channel_pad(self, node: fx.Node, module: Any) -> None:
        """A shortcut to more channels is an SFG layer of 1x1 kernels: zeros and ones, or the projection."""
        if module.project is not None:
            conv = module.project
        elif module.pad is not None:
            before = module.pad[-4]
            width = self._width(node.all_input_nodes[0])
            conv = nn.Conv2d(width, before + width + module.pad[-3], 1, bias=False)
            nn.init.zeros_(conv.weight)
            conv.weight.data[before : before + width, :, 0, 0] = torch.eye(width)
        else:
            self._replace(str(node.target), nn.Identity())
            return
        self._replace(str(node.target), self._sfg(conv, None, None))
        self.stream[node] = node

    def _width(self, node: fx.Node) -> int:
        return self.network.get_submodule(str(self.stream[node].target)).out_channels  # type: ignore[return-value]

    def _add(self, node: fx.Node, features: list[fx.Node]) -> None:
        if len(features) == 1 and node.args[0] is not node.args[1]:
            raise ValueError(f"convert: {node.name!r} adds features of SFG layers and something else")
        if node.kwargs.get("alpha", 1) != 1:
            raise ValueError(f"convert: {node.name!r} adds {node.kwargs['alpha']} times, expected a plain sum")
        node.target, node.args, node.kwargs = operator.add, node.args[:2], {}  # not in place
        first, *rest = (self._owner(self.stream[one]) for one in features)
        for other in rest:
            if first.op != "call_module" or other.op != "call_module":
                raise ValueError(f"convert: {node.name!r} adds concatenated features, whose groupings differ")
            if other is not first:
                self.same[other] = first

    def _owner(self, node: fx.Node) -> fx.Node:
        while node in self.same:
            node = self.same[node]
        return node

    def _share_groupings(self) -> None:
        """Convolutions whose outputs are added share the grouping of the first of them, and its draw."""
        order = {node: number for number, node in enumerate(self.graph.nodes)}
        classes: dict[fx.Node, list[fx.Node]] = {}
        for node in {node for pair in self.same.items() for node in pair}:
            classes.setdefault(self._owner(node), []).append(node)
        for members in classes.values():
            owner, *others = sorted(members, key=order.__getitem__)
            with self.graph.inserting_after(owner):
                groups = self.graph.call_function(getattr, (owner, "groups"))
            for node in others:
                self._module(node).share_grouping(self._module(owner))  # type: ignore[union-attr, operator]
                node.kwargs = {**node.kwargs, "groups": groups}

    def _tails(self, output: fx.Node) -> None:
        """The nodes of the tail, once for each task, on what that task reads."""
        tail = [node for node in self.graph.nodes if self.kind.get(node) == "tail"]
        sized = [str(node.target) for node in tail if isinstance(self._module(node), nn.Conv2d | nn.Linear)]
        self.last = sized[-1] if sized else None
        results: dict[str, fx.Node] = {}
        names: dict[str, dict[str, nn.Module]] = {}
        with self.graph.inserting_before(output):
            for task in self.tasks:
                copies: dict[fx.Node, fx.Node] = {}

                def read(node: fx.Node, task: str = task, copies: dict[fx.Node, fx.Node] = copies) -> fx.Node:
                    if self.kind[node] == "features" and node not in copies:
                        copies[node] = self.graph.call_method("merged", (node, task))
                    return copies.get(node, node)

                for node in tail:
                    module = self._module(node)
                    copies[node] = self.graph.node_copy(node, read)
                    if module is not None:
                        own = names.setdefault(str(node.target), {})[task] = copy.deepcopy(module)
                        self.modes |= {
                            twin: self.modes[child]
                            for child, twin in zip(module.modules(), own.modules(), strict=True)
                            if child in self.modes
                        }
                        copies[node].target = f"{node.target}.{task}"
                results[task] = copies[output.args[0]]  # type: ignore[index]
            for name, modules in names.items():
                self._replace(name, nn.ModuleDict(modules))
        output.args = (results,)
        for node in reversed(tail):
            self.graph.erase_node(node)


_NOT_ELEMENTWISE = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


def _elementwise(x: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _ACTIVATIONS[name](x, *args, **kwargs)


def _acts_on_channels(module: nn.Module) -> bool:
    kinds = ("activation", "pooling", "dropout", "upsampling", "padding", "linear")
    folder = type(module).__module__.rpartition(".")[2]
    if isinstance(module, nn.Linear | nn.Bilinear):
        return False
    return folder in kinds


def _halves(module: nn.Module | None) -> bool:
    """Is this the pooling of `activations.relu_pool`?"""
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return [pair if isinstance(pair, tuple) else (pair, pair) for pair in sizes] == [(2, 2), (2, 2), (0, 0), (1, 1)]


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and len(users[0].all_input_nodes) == 1 else None


def _resized(module: nn.Module, size: int) -> nn.Module:
    if isinstance(module, nn.Linear):
        if module.out_features == size:
            return module
        return nn.Linear(module.in_features, size, module.bias is not None).to(module.weight)
    assert isinstance(module, nn.Conv2d)
    if module.out_channels == size:
        return module
    return nn.Conv2d(
        module.in_channels, size, module.kernel_size, module.stride, module.padding, module.dilation,  # type: ignore[arg-type]
        bias=module.bias is not None, padding_mode=module.padding_mode,
    ).to(module.weight)  # fmt: skip


@torch.no_grad()
def copy_batch_norm(norm: nn.BatchNorm2d, to: KernelNorm) -> None:
    """Scale and shift, and the running statistics as every kernel's pooled ones: each group starts its own with its
    first draw."""
    if norm.momentum == 0:
        raise ValueError("convert: a batch normalisation has momentum=0, expected it in eval() to keep its statistics")
    to.eps, to.momentum = norm.eps, norm.momentum or 0.0
    if norm.affine:
        for own, given in ((to.weight, norm.weight), (to.bias, norm.bias)):
            own.copy_(given)
            own.requires_grad_(given.requires_grad)
    else:
        to.requires_grad_(False)
    if norm.running_mean is not None and norm.running_var is not None:
        to.pooled_mean.copy_(norm.running_mean)
        to.pooled_var.copy_(norm.running_var)
    else:
        raise ValueError("convert: a batch normalisation has no running statistics (track_running_stats=False)")


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _check_equal(converted: fx.GraphModule, image: Tensor, expected: Tensor) -> None:
    """With all kernels shared every task's output is what the module gave."""
    layers = list(sfg_layers(converted).values())
    converted.eval()
    for layer in layers:
        layer.assign(torch.zeros(layer.out_channels, dtype=torch.int64))
    with torch.no_grad():
        found: dict[str, Tensor] = _Naming(converted).run(image)
    for layer in layers:
        layer.assign(None)
    # Of the largest output: sums are made in another order, and in half precision in another dtype.
    allowed = max(1e-3, 8 * torch.finfo(expected.dtype).eps) * expected.nan_to_num().abs().max().item()
    for y in found.values():
        if not torch.allclose(y, expected, rtol=0, atol=allowed, equal_nan=True):
            raise ValueError(
                "convert: with all kernels shared the outputs differ from the module's, so it does something that was "
                f"not seen (largest difference {(y - expected).abs().max():.3g})"
            )


class _Naming(fx.Interpreter):
    """Runs a graph, and says where it can't."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except TypeError as error:  # of features, on what can't be done to them
            raise ValueError(f"convert: {getattr(n.target, '__name__', n.target)!r}: {error}") from error
