"""Puts SFG layers in place of the convolutions of a recorded network, and a head for each task. `convert` calls it."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..plain_ops import CHANNELWISE, ELEMENTWISE
from .controls import sfg_layers
from .conversion_report import COPIED, HEAD, PLAIN, SFG, UNREACHED, Report, Row
from .functional import DROPOUTS, FunctionsAsModules, held
from .parts import PathDropout
from .products import MULTIPLIES, can_be_broadcast, factor_layers
from .record import (
    NUMBER,
    SHAPE,
    WHERE,
    WITH_GRADIENT,
    backwards,
    base_of,
    called,
    drops_paths,
    inputs_of,
    name_of,
    output_of,
    pads_channels,
    results_of,
)
from .replacements import SFG_LAYERS, feature_norm, is_norm, sfg_layer, stream_conv
from .selection import SPLITS, Selection

_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish, F.relu6, F.selu, F.celu, F.softplus,
                     torch.sigmoid, torch.tanh)
}  # fmt: skip
_NORMS = nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.LocalResponseNorm
_NAMES = "nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d and nn.ConvTranspose3d"
_NOT_ELEMENTWISE = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)

# What functions do to features of SFG layers. The names of the functions stand here without underscores.
_SAME = {"contiguous", "as_tensor", "clone", "requires_grad"}
_RESHAPES = {"view", "reshape", "view_as", "reshape_as", "expand", "expand_as"}
_CASTS = {"to": None, "type": None, "float": torch.float32, "half": torch.float16, "double": torch.float64,
          "bfloat16": torch.bfloat16}  # fmt: skip
_SCALES = {"mul": operator.mul, "multiply": operator.mul, "div": operator.truediv, "divide": operator.truediv,
           "truediv": operator.truediv, "true_divide": operator.truediv}  # fmt: skip
_ADDS, _SUBTRACTS = {"add", "radd", "iadd"}, {"sub", "rsub", "subtract", "isub"}
REMOVE_HOOKS = (
    "remove it before (of weight_norm, spectral_norm or pruning: torch.nn.utils.remove_weight_norm, "
    "remove_spectral_norm, prune.remove)"
)


class Rewriting:
    """Rewrites a recorded graph. Every node has one of four kinds: "plain" (the image, and what skipped modules make of
    it), "number" (made of sizes), "features" (of SFG layers), and "tail", which is copied for each task.

    Each thing that can't be converted adds a sentence to `obstacles`. The other nodes are then looked at as if that
    thing were no problem, so that one message can tell everything.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: fx.Graph,
        told: set[fx.Node],
        tasks: tuple[str, ...],
        skip: set[str],
        options: Mapping[str, Any],
        modes: dict[nn.Module, bool],
    ) -> None:
        """`told` are the nodes that an argument tells whether the network is in training (`record.differences`).
        `modes` has the mode of each module, True for training; a module that takes the place of another gets its
        mode."""
        self.modes, self.told = modes, told
        self.network, self.graph, self.tasks, self.options = network, graph, tasks, options
        self.modules = dict(network.named_modules())
        self.hooked = {name: hook for name, module in self.modules.items() if (hook := hook_of(module))}
        if unknown := skip - self.modules.keys():
            raise ValueError(f"skip: there is no module {', '.join(map(repr, sorted(unknown)))}")
        self.skipped = {one: set(network.get_submodule(one).modules()) for one in skip}  # by identity, not by name
        self.skip = {name for name, m in self.modules.items() if any(m in one for one in self.skipped.values())}
        self.kind: dict[fx.Node, str] = {}
        self.stream: dict[fx.Node, Any] = {}  # features: the convolution whose grouping they have
        self.selection = Selection(network)
        # Convolution -> a convolution whose grouping it takes (sums), or concatenated or taken features.
        self.same: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, int] = {}  # which node comes first
        self.factors: set[fx.Node] = set()  # convolutions whose output becomes streams, because it is a factor
        self.streams: set[fx.Node] = set()  # features that are streams
        self.ended: dict[fx.Node, str] = {}  # tail: what ended the SFG layers before it
        # Layers of the tail that set the number of outputs, and norms behind them; and which results they are of.
        self.sized: list[str] = []
        self.main: list[int] = []
        self.obstacles: list[str] = []
        self.report = Report()

    def run(self) -> None:
        """Rewrite the graph, and fill the report. With `obstacles` the graph is left half done."""
        self._without_gradients()
        FunctionsAsModules(self.network, self.graph, self.modules, self.modes, self.told).run()
        convolutions = {name: m for name, m in self.network.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
        self._find_factors()
        self.order = {node: number for number, node in enumerate(self.graph.nodes)}
        output = output_of(self.graph)
        self.heads = self._heads(results_of(output.args[0]))
        for node in list(self.graph.nodes):
            if node.op != "output" and node not in self.kind:  # (a node may have been rewritten with one before it)
                self._node(node)
        self._fill_report(convolutions)
        self._hooks()
        of_tasks = {self.kind[node] for node in results_of(output.args[0])} & {"tail", "features"}
        if not self.obstacles and not (of_tasks and sfg_layers(self.network)):
            self.obstacles.append("nothing is left to be an SFG layer, or nothing behind them to be a head")
        if not self.obstacles:
            self._vain_skips()
        if not self.obstacles:
            self._share_groupings()
            self._tails(output)

    def _vain_skips(self) -> None:
        """Add an obstacle for each skipped module that does not stand before the SFG layers."""
        left = {self._module(node) for node in self.graph.nodes if self.kind.get(node) == "plain"}
        for name, modules in self.skipped.items():
            if not modules & left:
                self.obstacles.append(
                    f"{name!r} can't be skipped, because it does not stand in front of the SFG layers (a normalisation "
                    "or an activation goes with its convolution, and what gives the output is a head)"
                )

    # --- node by node -------------------------------------------------------------------------------------------------

    def _find_factors(self) -> None:
        """Find the convolutions that compute a factor of a product. (Linear layers among them become convolutions.)"""
        self.factors = factor_layers(self.network, self.graph)
        for name, before in list(self.modules.items()):
            module = self.network.get_submodule(name)
            if module is not before:
                self.modules[name], self.modes[module] = module, self.modes[before]

    def _heads(self, results: list[fx.Node]) -> set[fx.Node]:
        """The last convolutions: those from which a result is reached without another convolution or linear layer, and
        whose outputs no other layer before a result reads. Where linear layers give a result there are none; the tail
        then starts before these. (Of an encoder that returns the features of every stage, the last stage alone ends in
        heads.)"""
        last = {
            node
            for result in results
            for node in backwards(result, self._gives_size, inputs_of)
            if self._gives_size(node)
        }
        read = {node for one in last for node in backwards(one, inputs=inputs_of) if node is not one}
        return {node for node in last - read if isinstance(self._module(node), nn.modules.conv._ConvNd)}

    def _gives_size(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), nn.modules.conv._ConvNd | nn.Linear)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _uses(self, node: fx.Node) -> int:
        return sum(other.op == "call_module" and other.target == node.target for other in self.graph.nodes)

    def _node(self, node: fx.Node) -> None:
        kinds = {self.kind[one] for one in node.all_input_nodes}
        features = [one for one in inputs_of(node) if self.kind[one] == "features"]
        module = self._module(node)
        if node in self.told and node.target not in DROPOUTS:
            self.obstacles.append(f"{_place(node)} is told whether it is training, which one recording can't hold")
        if "tail" in kinds or node in self.heads:
            self.kind[node] = "tail"
            self.ended[node] = next((self.ended[one] for one in node.all_input_nodes if one in self.ended), "")
        elif node.meta.get(NUMBER):
            self.kind[node] = "number"
        elif node in self.factors and not features:
            self.kind[node] = "plain"  # a factor that is the same for all groups
        elif isinstance(module, tuple(SFG_LAYERS)) and node.target not in self.skip:
            self._conv(node, module, bool(features))
        elif not features:
            self.kind[node] = "plain"
        else:
            self._on_features(node, module, features)

    def _conv(self, node: fx.Node, conv: Any, on_features: bool) -> None:
        name = str(node.target)
        self.kind[node], self.stream[node] = "features", node
        if conv.groups == conv.in_channels == conv.out_channels > 1 and on_features:
            self._depthwise(node)
        if self._uses(node) > 1:
            self.obstacles.append(f"{name!r} is used more than once, expected one place for each convolution")
        elif nn.utils.parametrize.is_parametrized(conv):
            self.obstacles.append(
                f"{name!r} has a parametrised weight, which an SFG layer would not compute: call "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') before"
            )
        elif not isinstance(conv.weight, nn.Parameter):
            if name not in self.hooked:  # `_hooks` adds an obstacle for these
                self.obstacles.append(f"{name!r} has a weight that is no nn.Parameter, expected one")
        else:
            norm, activation = self._followers(node)
            if node in self.factors and on_features:
                self.streams.add(node)
                self._put(name, lambda: stream_conv(conv, norm, activation, self.tasks), conv, norm)
            else:
                self._put(name, lambda: sfg_layer(conv, norm, activation, self.tasks, self.options), conv, norm)

    def _depthwise(self, node: fx.Node) -> None:
        """Let a depthwise convolution take the draw of its input: a kernel in another group than its channel would read
        nothing."""
        self.same[node] = self._owner(self.stream[node.all_input_nodes[0]])

    def _put(self, name: str, make: Callable[..., nn.Module], before: nn.Module, norm: nn.Module | None) -> None:
        """Put the module that `make` makes in place of the module `before`; `norm`: the one behind it, which the new
        module does as well. A ValueError is an obstacle, of the norm."""
        try:
            made: Any = make()
        except ValueError as error:
            whose = before if norm is None else norm
            of = next((name for name, module in self.modules.items() if module is whose), name)
            self.obstacles.append(f"{of!r} {error}")
            return
        self.modes[made] = self.modes.get(before, True)
        if getattr(made, "norm", None) is not None:
            self.modes[made.norm] = self.modes[before if norm is None else norm]
        self.network.set_submodule(name, made)

    def _followers(self, node: fx.Node) -> tuple[nn.Module | None, Any]:
        """The normalisation and the activation behind this convolution, if nothing else reads what stands before
        them. Both are taken out of the graph, because the SFG layer does their work."""
        norm, activation = None, None
        follower = _only_user(node)
        found = None if follower is None else self._module(follower)
        if follower is not None and is_norm(found) and self._uses(follower) == 1:
            norm = found
            self._take_out(follower, node)
            follower = _only_user(node)
        if follower is not None and (activation := self._activation(follower)) is not None:
            self._take_out(follower, node)
            follower = _only_user(node)
            sized = any(user.meta.get(NUMBER) for user in node.users)  # the size before the pooling is read
            if activation == "relu" and follower is not None and not sized and _halves(self._module(follower)):
                # Behind the gate the maximum would give it no gradient (see networks/vgg.py).
                activation = "relu_pool"
                self._take_out(follower, node)
        return norm, activation

    def _activation(self, node: fx.Node) -> Any:
        module = self._module(node)
        if module is not None:
            base = base_of(module)
            if base is nn.ReLU:
                return "relu"
            if base is nn.PReLU:
                return module
            elementwise = base is not None and base.__module__ == "torch.nn.modules.activation"
            return copy.copy(module) if elementwise and not isinstance(module, _NOT_ELEMENTWISE) else None
        if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
            return None
        name = name_of(node)
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

    def _on_features(self, node: fx.Node, module: nn.Module | None, features: list[fx.Node]) -> None:
        self.kind[node], self.stream[node] = "features", self.stream[features[0]]
        known = self._module_on_features(node, module) if module is not None else self._function(node, features)
        if known and self.streams.issuperset(features):
            self.streams.add(node)
        if not known:
            del self.stream[node]
            self.kind[node] = "tail"
            of = f" of {len(features)} features" if len(features) > 1 else ""
            self.ended[node] = f"{_place(node)}{of}, which is not known to act on each channel alone and to keep zeros"

    def _module_on_features(self, node: fx.Node, module: nn.Module) -> bool:
        """Is it known what a module does to features? (It is, too, for a module that adds an obstacle.)"""
        name = repr(node.target)
        if is_norm(module):
            if self._uses(node) > 1:
                self.obstacles.append(f"{name} is used more than once, expected one place for each normalisation")
                return True
            width = node.all_input_nodes[0].meta[SHAPE][1]
            self._put(str(node.target), lambda: feature_norm(module, width, self.tasks), module, None)
        elif drops_paths(module):
            p = module.p if hasattr(module, "p") else module.drop_prob
            scales = getattr(module, "scale_by_keep", True)
            self._put(str(node.target), lambda: PathDropout(p, scales), module, None)  # type: ignore[arg-type]
        elif isinstance(module, _NORMS):
            self.obstacles.append(
                f"{name} is {type(module).__name__}, which would give values to channels that the grouping zeroes, "
                "expected a batch, instance or group norm"
            )
        elif isinstance(module, nn.modules.conv._ConvNd):
            self.stream[node] = node
            self.obstacles.append(
                f"{name} ({type(module).__name__}) reads features of SFG layers and would mix what belongs to "
                f"different tasks: only {_NAMES} become SFG layers, and only what stands before all of them can be "
                "skipped"
            )
        elif pads_channels(module):
            self._channel_pad(node, module)
        elif isinstance(module, nn.ChannelShuffle):
            return self._taken(node, node.all_input_nodes[0])
        elif getattr(module, "return_indices", False) or isinstance(module, nn.modules.pooling._MaxUnpoolNd):
            self._no_indices(node)
        else:
            return _acts_on_channels(module)
        return True

    def _function(self, node: fx.Node, features: list[fx.Node]) -> bool:
        """Is it known what a function does to features? Then the node is rewritten to do it. (It is known, too, for a
        function that adds an obstacle.)"""
        name, rest, dims = name_of(node), _given(node)[1:], len(features[0].meta.get(SHAPE, ()))
        alone = len(inputs_of(node)) == 1
        if len(features) > 1 and (name in MULTIPLIES or self.streams.intersection(features)):
            return self._product(node, features)
        if name in ("cat", "concat", "concatenate"):
            parts, *how = _given(node)
            node.args, node.kwargs = (list(parts), *how), {}  # compiled graphs would take a tuple apart
            self._join_plain(node, features[0])
            self.stream[node] = node
        elif name in _ADDS | _SUBTRACTS:
            self._add(node, features, name)
        elif name in _SCALES and (scale := self._scale(node)) is not None:
            if isinstance(scale, fx.Node) and len(scale.meta.get(SHAPE, ())) == dims > 2:
                self._method(node, "times", features[0], scale)
            else:
                self._call(node, _SCALES[name], features[0], scale)
        elif not alone:
            return len(features) == 1 and self._taken(node, features[0])
        elif name in ("neg", "negative"):
            self._call(node, operator.mul, features[0], -1)
        elif _changes_nothing(node, name, rest):
            self._pass(node, features[0])
        elif name in _CASTS:
            self._cast(node, features[0], name, rest)
        elif name in ("detach", "data"):
            self._method(node, "detach", features[0])
        elif name == "getitem" and _crops(rest[0], dims):
            self._method(node, "crop", features[0], _written_out(rest[0], dims))
        elif name == "mean" and _of_positions(node):
            node.op, node.target = "call_function", torch.mean
        elif name.endswith("with_indices"):
            self._no_indices(node)
        elif name in SPLITS:
            return self._split(node, features[0])
        else:
            known = CHANNELWISE | ELEMENTWISE if features[0] in self.streams else CHANNELWISE
            function = node.target if node.target in known else getattr(torch, name, None)
            if function not in known or name == "mean":
                return self._taken(node, features[0])
            node.op, node.target = "call_function", function
        return True

    def _split(self, node: fx.Node, before: fx.Node) -> bool:
        """Rewrite a split along the channels: each part that somebody reads takes some of the kernels."""
        parts = self.selection.of_parts(node)
        if called(node) == "unbind" and node.kwargs.get("dim", (*node.args, 0)[1]) in (1, -3):
            self._single_channel(node)
            return True
        if any(part is None for part in parts):
            return False
        for user in list(node.users):
            channels = parts[user.args[1]]  # type: ignore[index]
            assert channels is not None
            self._take(user, before, channels)
        self.graph.erase_node(node)
        self.kind[node] = "gone"
        return True

    def _taken(self, node: fx.Node, before: fx.Node) -> bool:
        """Rewrite a node that takes some of the channels, or gives them another order, alone or together with the nodes
        behind it. Is it such a node?"""
        dims = len(before.meta.get(SHAPE, ()))
        index = _written_out(_given(node)[1], dims) if name_of(node) == "getitem" else ()
        if isinstance(index, tuple) and len(index) > 1 and index[0] == slice(None):
            if isinstance(index[1], int):
                self._single_channel(node)
                return True
            crop = (*index[:1], slice(None), *index[2:])
            if index[1] != slice(None) and _crops(crop, dims) and any(one != slice(None) for one in crop):
                # The channels first, and then the positions.
                with self.graph.inserting_before(node):
                    channels = self.graph.call_function(operator.getitem, (before, (slice(None), index[1])))
                channels.meta |= before.meta
                if not self._taken(channels, before):
                    return False
                self._method(node, "crop", channels, crop)
                self.stream[node] = self.stream[channels]
                return True
        found = self.selection.through(node)
        if found is None:
            return False
        nodes, kernels = found
        self._take(nodes[-1], before, kernels)
        for one in reversed(nodes[:-1]):
            self.graph.erase_node(one)
            self.kind[one] = "gone"
        return True

    def _take(self, node: fx.Node, before: fx.Node, kernels: list[int]) -> None:
        if kernels == list(range(before.meta[SHAPE][1])):
            self._pass(node, before)
            self.stream[node] = self.stream[before]
        else:
            self._method(node, "take", before, tuple(kernels))
            self.stream[node] = node
        self.kind[node] = "features"

    def _single_channel(self, node: fx.Node) -> None:
        self.obstacles.append(
            f"{_place(node)} takes single channels of features, without the dimension of the channels: expected ranges "
            "of channels, as h[:, 0:1]"
        )

    def _product(self, node: fx.Node, features: list[fx.Node]) -> bool:
        """Rewrite a product of features and streams."""
        whole = [one for one in features if one not in self.streams]
        if name_of(node) not in MULTIPLIES or len(features) != 2:
            return False
        if len(whole) == 2:
            self.obstacles.append(
                f"{_place(node)} multiplies two features of SFG layers, which have a gate each: expected that the last "
                "layer of one factor is a convolution or a linear layer that nothing else reads (squeeze-and-excite, "
                "spatial attention), or an activation in place of the product (nn.SiLU)"
            )
            return True
        if len(whole) != 1:
            return False
        self.stream[node] = self.stream[whole[0]]
        self._method(node, "times", whole[0], *self.streams.intersection(features))
        return True

    def _no_indices(self, node: fx.Node) -> None:
        self.obstacles.append(
            f"{_place(node)} works with the indices of a max-pooling, which say where the largest value was. In "
            "features of SFG layers that is another place for each grouping, and none for a channel that is zeroed: "
            "expected return_indices=False, and interpolation or a convolution in place of the unpooling"
        )

    def _pass(self, node: fx.Node, before: fx.Node) -> None:
        """Rewrite a node that does not change the values."""
        self._call(node, same, before)

    def _call(self, node: fx.Node, function: Callable[..., Any], *arguments: Any) -> None:
        node.op, node.target, node.args, node.kwargs = "call_function", function, arguments, {}

    def _cast(self, node: fx.Node, before: fx.Node, name: str, rest: list[Any]) -> None:
        """Rewrite a cast to a dtype. A cast to a device or a memory format is dropped: features stay where they are."""
        dtype = next((one for one in rest if isinstance(one, torch.dtype)), _CASTS[name])
        if dtype is None:
            self._pass(node, before)
        else:
            self._method(node, "to", before, dtype)

    def _method(self, node: fx.Node, name: str, *arguments: Any) -> None:
        node.op, node.target, node.args, node.kwargs = "call_method", name, arguments, {}

    def _scale(self, node: fx.Node) -> Any:
        """The number, or parameter of one number, that features are multiplied with or divided by, or something plain
        of their shape, or with 1 in place of a size, that they are multiplied with; None for other things."""
        values = _given(node)
        if len(values) != 2:  # there is a rounding mode
            return None
        scales = [one for one in values if self.kind.get(one) != "features"]
        if len(scales) != 1 or (_SCALES[name_of(node)] is operator.truediv and scales[0] is values[0]):
            return None
        scale = scales[0]
        if isinstance(scale, fx.Node) and not scale.meta.get(NUMBER):
            shape = scale.meta.get(SHAPE, ())
            value = held(self.network, scale)
            if value is not None and value.numel() == 1:
                return scale
            multiplies = _SCALES[name_of(node)] is operator.mul
            like = next(one for one in values if self.kind.get(one) == "features")
            return scale if multiplies and can_be_broadcast(shape, like.meta.get(SHAPE, ())) else None
        return scale if isinstance(scale, int | float | fx.Node) else None

    def _channel_pad(self, node: fx.Node, module: Any) -> None:
        """Put an SFG layer of 1x1 kernels in place of MONAI's ChannelPad. Its weights are zeros and ones, or those of
        the pad's projection."""
        if module.project is not None:
            conv = module.project
        elif module.pad is not None:
            before = module.pad[-4]
            width = node.all_input_nodes[0].meta[SHAPE][1]
            like = next(self.network.parameters())
            factory = {"device": like.device, "dtype": like.dtype}
            conv = nn.Conv2d(width, before + width + module.pad[-3], 1, bias=False, **factory)  # type: ignore[arg-type]
            nn.init.zeros_(conv.weight)
            conv.weight.data[before : before + width, :, 0, 0] = torch.eye(width)
        else:
            self.network.set_submodule(str(node.target), nn.Identity())
            return
        self._put(str(node.target), lambda: sfg_layer(conv, None, None, self.tasks, self.options), module, None)
        self.stream[node] = node

    def _join_plain(self, node: fx.Node, like: fx.Node) -> None:
        """Let what a concatenation joins with features, and is plain, be features of the shared group."""
        parts, *how = node.args
        assert isinstance(parts, list)
        with self.graph.inserting_before(node):
            node.args = ([self._shared(part, like) for part in parts], *how)

    def _shared(self, part: fx.Node, like: fx.Node) -> fx.Node:
        if self.kind[part] == "features":
            return part
        shared = self.graph.call_method("as_shared", (like, part))
        self.kind[shared] = "features"
        return shared

    def _add(self, node: fx.Node, features: list[fx.Node], name: str) -> None:
        """Rewrite a sum or a difference of features, or of features and something plain, as `a + factor * b`, and a sum
        of features and 0 as the features."""
        alpha: Any = node.kwargs.get("alpha", 1)
        values, factor = _given(node)[:2], alpha * (-1 if name in _SUBTRACTS else 1)
        if name == "rsub":
            values = values[::-1]
        if name in _ADDS and any(isinstance(one, int | float) and one == 0 for one in values):
            self._pass(node, features[0])  # Python's `sum` starts with 0
            return
        if not all(self._can_be_added(one, features[0]) for one in values):
            self.obstacles.append(
                f"{_place(node)} adds features of SFG layers and something of another shape, expected a number, or a "
                "tensor of four dimensions that the sum does not make larger than the features"
            )
            return
        if factor != 1:
            with self.graph.inserting_before(node):
                scaled = self.graph.call_function(operator.mul, (values[1], factor))
            if self.kind.get(values[1]) == "features":
                self.kind[scaled], self.stream[scaled] = "features", self.stream[values[1]]
            values[1] = scaled
        values.sort(key=lambda one: self.kind.get(one) != "features")
        if len(features) < len(values):
            self._method(node, "plus", *values)
        else:
            self._call(node, operator.add, *values)  # also where the network adds in place
        first, *rest = (self._owner(self.stream[one]) for one in features)
        for other in rest:
            if other is not first and not self._agree(first, other):
                self.obstacles.append(
                    f"{_place(node)} adds features of which one is joined of others or taken out of others, so their "
                    "groupings differ"
                )

    def _agree(self, first: fx.Node, other: fx.Node) -> bool:
        """Can two convolutions, or a convolution and features that are joined or taken, have one grouping? Then they
        will. Features that are joined or taken have theirs already, so the convolution must come behind them."""
        if first.op == other.op == "call_module":
            self.same[other] = first
            return True
        conv, joined = (first, other) if first.op == "call_module" else (other, first)
        members = [conv, *(one for one in self.same if self._owner(one) is conv)]
        if conv.op != "call_module" or any(self.order[one] < self.order[joined] for one in members):
            return False
        self.same[conv] = joined
        return True

    def _can_be_added(self, value: Any, like: fx.Node) -> bool:
        """Is it features, or something plain of their shape, or with 1 in place of a size, or a number?"""
        if not isinstance(value, fx.Node):
            return isinstance(value, int | float)
        if self.kind.get(value) == "features" or value.meta.get(NUMBER):
            return True
        shape = value.meta.get(SHAPE, ())
        return math.prod(shape) == 1 or can_be_broadcast(shape, like.meta[SHAPE])

    def _owner(self, node: fx.Node) -> fx.Node:
        while node in self.same:
            node = self.same[node]
        return node

    # --- obstacles that are no node; the report -----------------------------------------------------------------------

    def _hooks(self) -> None:
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        stay = {str(node.target) for node in calls if self.kind.get(node) in ("plain", "tail")}
        for name, hook in self.hooked.items():
            if name not in stay:
                whose = repr(name) if name else "the module itself"
                self.obstacles.append(
                    f"{whose} has a hook ({hook}), which the converted network would not call: {REMOVE_HOOKS}"
                )

    def _without_gradients(self) -> None:
        without = [node for node in self.graph.nodes if node.meta.get(WITH_GRADIENT) is False]
        if without:
            self.obstacles.append(
                f"{_place(without[0])} is done under torch.no_grad() or in an autograd.Function, which the converted "
                "network would not be: freeze the parameters instead (requires_grad_(False)), leave the function out, "
                "or checkpoint with use_reentrant=False"
            )

    def _fill_report(self, convolutions: Mapping[str, nn.Module]) -> None:
        nodes = {str(node.target): node for node in self.graph.nodes if node.op == "call_module"}
        for name, conv in convolutions.items():
            node = nodes.get(name)
            kind = self.kind.get(node) if node is not None else None
            if node is None:
                becomes, why = UNREACHED, "the forward pass does not come here"
            elif kind == "features":
                becomes, why = SFG, "computed for every group, as a factor" if node in self.streams else ""
            elif node in self.heads:
                becomes, why = HEAD, "one for each task"
            elif kind == "tail":
                becomes, why = COPIED, f"behind {self.ended[node] or 'the head'}"
            else:
                becomes, why = PLAIN, "skipped" if name in self.skip else "no features of SFG layers come here"
            self.report.append(Row(name, _described(conv), becomes, why))

    # --- groupings and heads ------------------------------------------------------------------------------------------

    def _share_groupings(self) -> None:
        """Let convolutions whose outputs are added up share the grouping, and the draw, of the first of them, or of
        features that are joined or taken."""
        classes: dict[fx.Node, list[fx.Node]] = {}
        for node in {node for pair in self.same.items() for node in pair}:
            classes.setdefault(self._owner(node), []).append(node)
        for members in classes.values():
            owner, *others = sorted(members, key=self.order.__getitem__)
            with self.graph.inserting_after(owner):
                groups = self.graph.call_function(getattr, (owner, "groups"))
            for node in others:
                layer: Any = self._module(node)
                if owner.op == "call_module":
                    layer.share_grouping(self._module(owner))
                else:
                    layer.take_draws()
                node.kwargs = {**node.kwargs, "groups": groups}

    def _tails(self, output: fx.Node) -> None:
        """Copy the nodes of the tail for each task, with their layers and parameters. The copies read the task's
        features. A result that is features of SFG layers is what the task reads of them."""
        for node in self.graph.nodes:
            if node.op == "get_attr" and all(self.kind.get(user) == "tail" for user in node.users):
                self.kind[node] = "tail" if isinstance(held(self.network, node), nn.Parameter) else self.kind[node]
        tail = [node for node in self.graph.nodes if self.kind.get(node) == "tail"]
        self.main, self.sized = self._sized(results_of(output.args[0]))
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        used_before = {str(node.target) for node in calls if self.kind[node] != "tail"}  # one ReLU may serve all places
        results: dict[str, Any] = {}
        own: dict[str, dict[str, Any]] = {}
        with self.graph.inserting_before(output):
            for task in self.tasks:
                copies: dict[fx.Node, fx.Node] = {}

                def read(node: fx.Node, task: str = task, copies: dict[fx.Node, fx.Node] = copies) -> fx.Node:
                    if self.kind[node] == "features" and node not in copies:
                        copies[node] = self.graph.call_method("merged", (node, task))
                    return copies.get(node, node)

                for node in tail:
                    copies[node] = self.graph.node_copy(node, read)
                    if node.op in ("call_module", "get_attr"):
                        name = f"{node.target}{'_of_heads' * (str(node.target) in used_before)}"
                        of_tasks = own.setdefault(name, {})
                        if task not in of_tasks:
                            of_tasks[task] = self._copied(node)
                        copies[node].target = f"{name}.{task}"
                results[task] = self._with_named_tuples(fx.map_arg(output.args[0], read))
            for name, of_tasks in own.items():
                owner, _, last = name.rpartition(".")
                module, first = self.network.get_submodule(owner), next(iter(of_tasks.values()))
                if isinstance(first, nn.Parameter):
                    delattr(module, last)
                kind = nn.ParameterDict if isinstance(first, nn.Parameter) else nn.ModuleDict
                module.add_module(last, kind(of_tasks))
        output.args = (results,)
        for node in reversed(tail):
            self.graph.erase_node(node)

    def _with_named_tuples(self, result: Any) -> Any:
        """The result of a task, with a node for each named tuple in it: the code of a graph can't write them down."""
        if isinstance(result, dict):
            return {key: self._with_named_tuples(value) for key, value in result.items()}
        if not isinstance(result, list | tuple):
            return result
        parts = [self._with_named_tuples(value) for value in result]
        if hasattr(result, "_fields"):
            return self.graph.call_function(type(result), tuple(parts))
        return type(result)(parts)

    def _copied(self, node: fx.Node) -> nn.Module | Tensor | None:
        """A copy of a module of the tail, or of a parameter, for one task."""
        module = self._module(node)
        own = copy.deepcopy(held(self.network, node) if module is None else module)
        if module is not None and isinstance(own, nn.Module):
            pairs = zip(module.modules(), own.modules(), strict=True)
            self.modes |= {twin: self.modes[child] for child, twin in pairs if child in self.modes}
        return own

    def _sized(self, results: list[fx.Node]) -> tuple[list[int], list[str]]:
        """Which results have as many outputs as the first one, and the names of the layers of the tail that set how
        many these are, and of the norms behind them."""
        width = _width(results[0])
        main = [number for number, result in enumerate(results) if _width(result) == width]
        found: dict[str, None] = {}
        for result in (results[number] for number in main):
            for node in backwards(result, lambda node: self._gives_size(node) or _width(node) != width, inputs_of):
                module = self._module(node)
                sizes = (getattr(module, name, None) for name in ("out_channels", "out_features", "num_features"))
                if self.kind.get(node) == "tail" and width in sizes:
                    found[str(node.target)] = None
        return main, list(found)


def _of_positions(node: fx.Node) -> bool:
    """Is the node a mean over height and width (and depth) that keeps the dimensions, and the dtype?"""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    over: list[Any] = [dims] if isinstance(dims, int) else list(dims or ())  # type: ignore[arg-type]
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    named = node.kwargs.keys() <= {"dim", "keepdim"}
    number = len(inputs_of(node)[0].meta.get(SHAPE, ()))
    return bool(over and keeps and named and number > 2) and all(dim % number >= 2 for dim in over)


def same(x: Any) -> Any:
    """x itself. It stands where the network did something that does not change the values."""
    return x


def _elementwise(x: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _ACTIVATIONS[name](x, *args, **kwargs)


def _place(node: fx.Node) -> str:
    """The name of a node and of the module that calls it, for a message."""
    if node.op == "call_module":
        return repr(node.target)
    where = f" in {node.meta[WHERE]!r}" if node.meta.get(WHERE) else ""
    return f"{called(node)}(){where}"


def _width(node: fx.Node) -> int | None:
    """How many channels a recorded tensor has; None if it has no dimension of channels."""
    shape = node.meta.get(SHAPE, ())
    return shape[1] if len(shape) > 1 else None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [user for user in node.users if not user.meta.get(NUMBER)]
    return users[0] if len(users) == 1 and len(users[0].all_input_nodes) == 1 else None


def _given(node: fx.Node) -> list[Any]:
    """The arguments of a function: those by place, then those by name that are not None or False."""
    by_name = (value for value in node.kwargs.values() if value is not None and value is not False)
    return [*node.args, *by_name]


def _changes_nothing(node: fx.Node, name: str, rest: list[Any]) -> bool:
    """Does the function return the same values in the same places?"""
    if name in _RESHAPES:
        return node.meta.get(SHAPE) == inputs_of(node)[0].meta.get(SHAPE)
    return name in _SAME and not any(isinstance(one, torch.dtype) for one in rest)


def _crops(index: Any, dims: int) -> bool:
    """Is the index of a tensor of so many dimensions [:, :, from:to, ..]?"""
    whole, index = slice(None), _written_out(index, dims)
    slices = isinstance(index, tuple) and len(index) <= dims and all(isinstance(one, slice) for one in index)
    return slices and all(one == whole for one in index[:2])


def _written_out(index: Any, dims: int) -> Any:
    """The index of a tensor of so many dimensions, with `..` written out."""
    if isinstance(index, tuple) and index[0] is Ellipsis:
        return (*[slice(None)] * (dims + 1 - len(index)), *index[1:])
    return index


def _acts_on_channels(module: nn.Module) -> bool:
    base = base_of(module)
    if base is None or issubclass(base, nn.Linear | nn.Bilinear):
        return False
    kinds = ("activation", "pooling", "upsampling", "padding", "linear")
    return base in (nn.Dropout, nn.Dropout2d, nn.Dropout3d) or base.__module__.rpartition(".")[2] in kinds


def _halves(module: nn.Module | None) -> bool:
    """Is the module the 2x2 max-pooling of `activations.relu_pool`?"""
    if not isinstance(module, nn.MaxPool2d) or module.ceil_mode or module.return_indices:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return [pair if isinstance(pair, tuple) else (pair, pair) for pair in sizes] == [(2, 2), (2, 2), (0, 0), (1, 1)]


def hook_of(module: nn.Module) -> str:
    """The name of a hook that somebody has put on the module; "" without a hook."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return next((getattr(hook, "__name__", type(hook).__name__) for one in hooks for hook in one.values()), "")


def _described(conv: nn.Module) -> str:
    size = "x".join(map(str, conv.kernel_size))  # type: ignore[arg-type]
    return f"{type(conv).__name__}({conv.in_channels}, {conv.out_channels}, {size})"
