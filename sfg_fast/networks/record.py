"""`record` runs a network once on an image, and writes down its operations as a graph. (Python code in the forward pass
runs as it is; symbolic tracing would stop at the first `if`.)

Sizes of tensors, and numbers that the forward pass computes from them, are nodes of the graph. So a recorded
`x.view(x.size(0), -1)` works for any batch, and `F.interpolate(y, size=x.shape[-2:])` for any image. Every other number
stays what it was in the recording.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

# The keys of a node's `meta`: the name of the innermost module whose forward pass made the node; whether it is a number
# made of sizes, no tensor; the number it was; the shape of its tensor; whether gradients were on when it was made.
WHERE, NUMBER, VALUE, SHAPE = "sfg_fast_where", "sfg_fast_number", "sfg_fast_value", "sfg_fast_shape"
WITH_GRADIENT = "sfg_fast_with_gradient"


EXAMPLE_SIZES = {2: (64, 64), 3: (32, 32, 32)}
"""The size of an image that a network is run on if nobody gives one, by the number of its dimensions."""


class _Size(int):
    """A size of a recorded tensor, or a whole number made of sizes. `node` is the node of the graph that gives it."""

    node: fx.Node


class _Ratio(float):
    """A number made of sizes that is not whole. `node` is the node of the graph that gives it."""

    node: fx.Node


def _number(value: float, node: fx.Node, where: str) -> Any:
    node.meta |= {NUMBER: True, VALUE: value, WHERE: where}
    found = _Ratio(value) if isinstance(value, float) else _Size(value)
    found.node = node
    return found


def _remembers(operation: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    """A method of `_Size` and `_Ratio` that does the operation and adds it to the graph."""

    def method(self: Any, *others: Any) -> Any:
        values = [_plain(one) for one in (self, *others)]
        nodes = [getattr(one, "node", one) for one in (self, *others)]
        if not all(isinstance(value, int | float) for value in values):
            return NotImplemented
        if swapped:
            values, nodes = values[::-1], nodes[::-1]
        node = self.node.graph.call_function(operation, tuple(nodes))
        return _number(operation(*values), node, self.node.meta[WHERE])

    return method


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, _Size) else float(value) if isinstance(value, _Ratio) else value


class AnotherWay(ValueError):
    """A forward pass would decide something else for an image of this size than it did in the recording."""


@fx.node.has_side_effect
def as_recorded(comparison: str, left: Any, right: Any, expected: bool) -> None:
    """Raise AnotherWay unless a comparison of two numbers gives `expected`, what it gave in the recording. The forward
    pass has an `if`, a maximum or the like there."""
    if getattr(operator, comparison)(left, right) != expected:
        raise AnotherWay(
            f"the network was converted for images of other sizes: its forward pass asks {comparison}({left}, "
            f"{right}), which was {expected} there; expected convert(.., example=<images of this size>)"
        )


class Rereader(fx.Tracer):
    """Makes a graph from its code when it is unpickled. `as_recorded` must stay one node."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(as_recorded,))


def _decides(comparison: str) -> Callable[..., Any]:
    """A method of `_Size` and `_Ratio` that compares and adds `as_recorded` to the graph: whenever the graph is run,
    the comparison must give the same."""

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        found = getattr(operator, comparison)(_plain(self), _plain(other))
        arguments = (comparison, self.node, getattr(other, "node", other), found)
        node = self.node.graph.call_function(as_recorded, arguments)
        node.meta |= {NUMBER: True, WHERE: self.node.meta[WHERE]}
        return found

    return method


for _kind in (_Size, _Ratio):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "rshift", "lshift", "and_", "or_"):
        _own = _name.strip("_")
        setattr(_kind, f"__{_own}__", _remembers(getattr(operator, _name)))
        setattr(_kind, f"__r{_own}__", _remembers(getattr(operator, _name), swapped=True))
    _kind.__divmod__ = lambda self, other: (self // other, self % other)  # type: ignore
    _kind.__abs__ = _remembers(operator.abs)  # type: ignore[method-assign]
    _kind.__pos__ = _remembers(operator.pos)  # type: ignore[method-assign]
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _decides(_name))
    _kind.__bool__ = lambda self: self != 0  # type: ignore
    _kind.__hash__ = _kind.__base__.__hash__  # type: ignore
    _kind.__neg__ = _remembers(operator.neg)  # type: ignore[method-assign]
    _kind.__ceil__ = _remembers(math.ceil)  # type: ignore[method-assign]
    _kind.__floor__ = _remembers(math.floor)  # type: ignore[method-assign]
    _kind.__round__ = _remembers(round)  # type: ignore[method-assign]


# The names of functions that draw random numbers. (Dropout may draw: it is recorded as a module.)
_RANDOM = re.compile(
    r"(rand|randn|randint|randperm|bernoulli|normal|multinomial|poisson|binomial)(_like)?"
    r"|(bernoulli|uniform|normal|exponential|geometric|cauchy|log_normal|random)_"
)


_LOOKS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist")  # they read the values of a tensor


class _Tape(TorchFunctionMode):
    """Records which modules and functions make the output of the image, as a graph.

    Attributes:
        graph: the graph so far.
        inside: how many leaves (modules that are one node) are being run; what they call is not recorded.
        known: the node of each recorded tensor, by the tensor's id.
        kept: all recorded tensors, so that no id is given twice.
        scopes: the names of the modules whose forward passes are being run.
        decided: the places where the forward pass looked at values of a tensor.
        attributes: the names of parameters and buffers, by their ids.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.graph, self.inside, self.known = fx.Graph(tracer_cls=Rereader), 0, {}  # type: ignore[var-annotated]
        self.kept: list[Any] = []
        self.scopes = [""]
        self.decided: list[str] = []
        self.attributes = {id(p): name for name, p in (*network.named_parameters(), *network.named_buffers())}

    def write(self, out: Any, make: Callable[[Any], fx.Node], arguments: Any) -> None:
        """Record an operation with the result `out`, if the graph makes one of its arguments. `make` makes its node."""
        if not self.knows(arguments):
            return
        if isinstance(out, Tensor):
            self.tell(out, make(map_aggregate(arguments, self.node)))
        elif isinstance(out, tuple | list) and any(isinstance(one, Tensor) for one in out):
            self.tell_parts(out, self.marked(make(map_aggregate(arguments, self.node))))

    def knows(self, arguments: Any) -> bool:
        """Does the graph make any of the arguments, or a number in a slice among them?"""
        return any(isinstance(leaf, _Size | _Ratio) or id(leaf) in self.known for leaf in leaves_of(arguments))

    def whose(self) -> str:
        """The module whose forward pass is being run, for a message."""
        return repr(self.scopes[-1]) if self.scopes[-1] else "the module"

    def marked(self, node: fx.Node) -> fx.Node:
        """The node, once its `meta` says where it was made."""
        node.meta |= {WHERE: self.scopes[-1], WITH_GRADIENT: torch.is_grad_enabled()}
        return node

    def tell(self, tensor: Any, node: fx.Node) -> None:
        """Remember that a node makes a tensor."""
        self.known[id(tensor)] = self.marked(node)
        node.meta[SHAPE] = tuple(map(int, tensor.shape))
        self.kept.append(tensor)

    def tell_parts(self, tensors: Any, whole: fx.Node) -> None:
        """Remember that a node makes several tensors."""
        for index, one in enumerate(tensors):
            self.tell(one, self.graph.call_function(operator.getitem, (whole, index)))

    def node(self, value: Any) -> Any:
        """The node that makes an argument, or the argument itself if no node does. Raises ValueError for a tensor that
        the forward pass has made of nothing in the graph."""
        if isinstance(value, _Size | _Ratio):
            return value.node
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.known:
            name = self.attributes.get(id(value))
            if name is None:
                if isinstance(value, nn.Parameter):
                    raise ValueError(
                        f"convert: {self.whose()} reads weights of shape {tuple(value.shape)} that are no parameters "
                        "of the module (in a list? nn.ModuleList knows its modules)"
                    )
                raise ValueError(
                    f"convert: {self.whose()} makes a tensor {tuple(value.shape)} in its forward "
                    "pass, which can't be recorded, expected one made of the image, a parameter or a buffer"
                )
            self.tell(value, self.graph.get_attr(name))
        return self.known[id(value)]

    def sizes(self, tensor: Tensor, found: Any) -> Any:
        """The sizes `found` of a recorded tensor, as `_Size`s that know their nodes."""
        node = self.known[id(tensor)]

        def one(dim: int, value: int) -> Any:
            return _number(value, self.graph.call_method("size", (node, dim)), self.scopes[-1])

        return torch.Size([one(dim, value) for dim, value in enumerate(found)])

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = (args, dict(kwargs or {}))
        if self.inside:
            return function(*args, **arguments[1])
        numbers: Any = map_aggregate(arguments, _plain)  # comparisons in torch's own code are not recorded
        out = function(*numbers[0], **numbers[1])
        name = getattr(function, "__name__", "")
        if _RANDOM.fullmatch(name):
            raise ValueError(
                f"convert: {self.whose()} draws random numbers in its forward pass ({name}), which one recording can't "
                "hold: use nn.Dropout, or switch it off (a drop path of rate 0)"
            )
        if name in _LOOKS and args and id(args[0]) in self.known:
            self.decided.append(f"{name}() in {self.whose()}")
        if function is Tensor.register_hook and id(args[0]) in self.known:
            raise ValueError(f"convert: {self.whose()} puts a hook on a tensor, which the converted network would not")
        changed = self.attributes.get(id(args[0])) if args and name.endswith("_") and not name.endswith("__") else None
        if changed is not None and not changed.endswith("num_batches_tracked"):
            raise ValueError(
                f"convert: {self.whose()} changes {changed!r} in its forward pass ({name}), which "
                "the converted network would not: make it a module of torch.nn, or leave it out"
            )
        if args and id(args[0]) in self.known:
            if isinstance(out, torch.Size):
                return self.sizes(args[0], out)
            if function is Tensor.size:  # the size of one dimension
                return self.sizes(args[0], args[0].shape)[args[1] if len(args) > 1 else kwargs["dim"]]
            if function in (Tensor.numel, Tensor.nelement):
                return math.prod(self.sizes(args[0], args[0].shape))
            if function is Tensor.__len__:  # Python wants a plain number of it
                _decides("eq")(self.sizes(args[0], args[0].shape)[0], out)
                return out
            if function is Tensor.__setitem__:
                raise ValueError(f"convert: {self.whose()} writes to a part of a tensor, which can't be recorded")
        if name == "__get__":  # it reads a property, as x.shape
            function, arguments = getattr, ((*args, function.__self__.__name__), {})
        if name and getattr(Tensor, name, None) is function:  # as a function the node couldn't be pickled
            self.write(out, lambda a: self.graph.call_method(name, *a), arguments)
        else:
            self.write(out, lambda a: self.graph.call_function(function, *a), arguments)
        return out


def base_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch.nn whose forward pass the module has; None if its class defines another one."""
    kind = type(module)
    for base in kind.__mro__:
        if base.__module__.startswith("torch.nn.") and not base.__module__.startswith("torch.nn.utils"):
            parts = ("forward", "_conv_forward", "__call__")
            same = all(getattr(kind, part, None) is getattr(base, part, None) for part in parts)
            return base if same and base is not nn.Module else None
    return None


def is_leaf(module: nn.Module) -> bool:
    """Is the module recorded as one node of the graph?"""
    base = base_of(module)
    return (
        pads_channels(module)
        or drops_paths(module)
        or (base is not None and not issubclass(base, nn.Sequential | nn.ModuleList))
    )


def pads_channels(module: nn.Module) -> bool:
    """Is the module MONAI's ChannelPad, a shortcut to more channels?"""
    return type(module).__name__ == "ChannelPad"


def drops_paths(module: nn.Module) -> bool:
    """Is the module stochastic depth of single images: torchvision's StochasticDepth (mode "row"), or DropPath of timm
    or MONAI?"""
    kind = type(module).__name__
    return kind == "DropPath" or (kind == "StochasticDepth" and getattr(module, "mode", None) == "row")


def record(network: nn.Module, example: Tensor) -> fx.Graph:
    """Run a network on images [N, C, H, W] and record its operations. Returns the graph.

    The nodes of the graph are modules with the forward pass of a class of torch.nn, and functions outside of these. Its
    output is what the network returns, with a node for each tensor: one tensor, or tensors in dicts, lists and tuples.

    Raises ValueError for an output that holds anything but None and tensors made of the images, and for tensors that
    the forward pass makes of nothing. Warns if the forward pass looks at the values of a tensor.
    """
    tape = _Tape(network)
    hooks = []
    stack: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any, name: str, leaf: bool) -> None:
        tape.scopes.append(name)
        if not leaf:
            return
        tape.inside += 1
        known = tape.inside == 1 and tape.knows((args, kwargs))
        stack.append(map_aggregate((args, kwargs), tape.node) if known else None)

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str, leaf: bool) -> None:
        if leaf:
            tape.inside -= 1
            nodes = stack.pop()
            if nodes is not None and not tape.inside:
                bound = inspect.signature(module.forward).bind(*nodes[0], **nodes[1])  # SFG layers call it x, not input
                made = tape.graph.call_module(name, bound.args, bound.kwargs)
                if isinstance(out, Tensor):
                    tape.tell(out, made)
                elif getattr(module, "return_indices", False):
                    tape.tell_parts(out, tape.marked(made))
                else:
                    raise ValueError(f"convert: module {name!r} returns {type(out).__name__}, expected a tensor")
        tape.scopes.pop()

    for name, child in network.named_modules():
        if name:
            which = {"name": name, "leaf": is_leaf(child)}
            hooks.append(child.register_forward_pre_hook(functools.partial(enter, **which), with_kwargs=True))
            hooks.append(child.register_forward_hook(functools.partial(leave, **which), with_kwargs=True))
    example = example.clone()  # the forward pass may write to it
    tape.tell(example, tape.graph.placeholder("x"))
    try:
        with torch.enable_grad(), _no_autocast_inside(tape), tape:
            out = network(example)
    finally:
        for hook in hooks:
            hook.remove()
    if tape.decided:
        warnings.warn(
            f"convert: the forward pass looks at the values of a tensor ({tape.decided[0]}), which the converted "
            "network won't: what it decides by them stays as for the example",
            stacklevel=5,
        )
    tape.graph.output(_output(tape, out))
    remove_unused(tape.graph)  # sizes that nothing reads
    return tape.graph


def _output(tape: _Tape, out: Any) -> Any:
    """What the network returned, with the nodes of its tensors. Raises ValueError if it is not made of tensors that
    the graph makes."""

    def node(leaf: Any) -> fx.Node | None:
        if leaf is None:
            return None
        if not isinstance(leaf, Tensor) or id(leaf) not in tape.known or not leaf.is_floating_point():
            what = f"a tensor of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            if isinstance(leaf, Tensor) and id(leaf) not in tape.known:
                what += " that is not made of its input"
            raise ValueError(
                f"convert: the module returns {what}, expected floating point tensors made of its input: one, or "
                "several in dicts, lists and tuples"
            )
        return tape.known[id(leaf)]

    found = map_aggregate(out, node)
    if not leaves_of(found) or all(leaf is None for leaf in leaves_of(found)):
        raise ValueError(f"convert: the module returns {out!r}, expected tensors made of its input")
    return found


def output_of(graph: fx.Graph) -> fx.Node:
    """The output node of a graph. `args[0]` has the node of each tensor that the network returns."""
    return next(node for node in graph.nodes if node.op == "output")


def results_of(returned: Any) -> list[Any]:
    """The tensors (or nodes) in what a network returns, in order: those in dicts, lists and tuples, without None."""
    return [leaf for leaf in leaves_of(returned) if leaf is not None]


def _form(graph: fx.Graph) -> str:
    """In which dicts, lists and tuples a network returns its tensors."""
    form = map_aggregate(output_of(graph).args[0], lambda leaf: None if leaf is None else "tensor")
    return str(form).replace("'tensor'", "tensor")


@contextmanager
def _no_autocast_inside(tape: _Tape) -> Iterator[None]:
    """Inside the `with` a forward pass that enters autocast raises ValueError, because the converted network would not
    enter it."""
    enter = torch.amp.autocast_mode.autocast.__enter__

    def refused(self: Any) -> Any:
        raise ValueError(
            f"convert: {tape.whose()} enters torch.autocast in its forward pass, which the converted network would "
            "not: enter it around the whole network"
        )

    torch.amp.autocast_mode.autocast.__enter__ = refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.amp.autocast_mode.autocast.__enter__ = enter  # type: ignore[method-assign]


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads."""
    return [one for one in node.all_input_nodes if not one.meta.get(NUMBER)]


def backwards(
    node: fx.Node,
    stops: Callable[[fx.Node], bool] = lambda node: False,
    inputs: Callable[[fx.Node], list[fx.Node]] = lambda node: node.all_input_nodes,
) -> Iterator[fx.Node]:
    """The node, and all nodes that it is made of, found through `inputs`. The search does not go on behind nodes for
    which `stops` is true."""
    seen, waiting = set(), [node]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            yield one
            if not stops(one):
                waiting += inputs(one)


def remove_unused(graph: fx.Graph) -> None:
    """Remove the nodes that nothing reads, except inputs, the output and `as_recorded`."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.target is as_recorded)


def differences(evaluating: fx.Graph, training: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of the graph `evaluating`, recorded in `eval()`, with an argument that is another bool in `training`,
    the graph recorded in `train()`: the argument tells them the mode.

    Every node of `evaluating` also gets WITH_GRADIENT from `training`, because in `eval()` the forward pass may switch
    gradients off. Raises ValueError, which names the place, if the graphs differ otherwise: in what they return, in the
    operations of the two modes, or in numbers that come from the image.
    """
    if _form(evaluating) != _form(training):
        raise ValueError(
            f"convert: the module returns {_form(training)} in train() and {_form(evaluating)} in eval(), which one "
            "recording can't hold: let it return the same in both modes, or switch the additional outputs off "
            "(deep_supervision=False, aux_logits=False, aux_loss=False)"
        )
    numbers: dict[fx.Node, int] = {}
    for number, (one, other) in enumerate(itertools.zip_longest(_that_work(evaluating), _that_work(training))):
        if one is None or other is None or (one.op, one.target) != (other.op, other.target):
            both = [node for node in (other, one) if node is not None]
            found = next((node for node in both if node.op.startswith(("call_f", "call_me"))), both[0])
            raise ValueError(
                f"convert: the forward pass of {_module_of(found)} does something else in train() than in eval() "
                f"({called(other)} instead of {called(one)}), which one recording can't hold: make it a module that "
                "acts on each channel alone, such as nn.Dropout, or switch it off (a drop path of rate 0)"
            )
        numbers[one] = numbers[other] = number
        one.meta[WITH_GRADIENT] = other.meta.get(WITH_GRADIENT, True)
        told = False
        for a, b in itertools.zip_longest(*(_arguments(node, numbers) for node in (one, other))):
            if type(a) is type(b) is bool and a is not b:
                told = True
            elif a is not b and (type(a) is not type(b) or a != b):
                raise ValueError(
                    f"convert: {called(one)}() in the forward pass of {_module_of(one)} is given {a!r} on one image "
                    f"and {b!r} on another (or in train()), which one recording can't hold: numbers must not come from "
                    "the image, but from its size (x.shape[0], not len(x) or int(x.shape[0]))"
                )
        if told:
            yield one


def _that_work(graph: fx.Graph) -> list[fx.Node]:
    """The nodes without `as_recorded`, and without nodes that only these read."""
    asked: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target is as_recorded or (node.users and asked.issuperset(node.users)):
            asked.add(node)
    return [node for node in graph.nodes if node not in asked]


def _arguments(node: fx.Node, numbers: dict[fx.Node, int]) -> list[Any]:
    leaves = leaves_of((node.args, node.kwargs))
    return [("node", numbers.get(leaf)) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]


def leaves_of(arguments: Any) -> list[Any]:
    """Everything that the arguments hold in tuples, lists, dicts and slices."""
    found: list[Any] = []
    map_aggregate(arguments, found.append)
    return found


def _module_of(node: fx.Node | None) -> str:
    name = node.meta.get(WHERE) if node is not None else None
    return repr(name) if name else "the module"


def called(node: fx.Node | None) -> str:
    """The name of the function, method or attribute of a node, for a message."""
    if node is None:
        return "nothing"
    if node.target is getattr:
        return str(node.args[1])
    return str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def name_of(node: fx.Node) -> str:
    """The name of a node's function, the same for all its forms: relu for torch.relu, F.relu_ and Tensor.relu."""
    return called(node).strip("_")
