"""What a network does to an image, as a graph: run once and written down. (Python in the forward pass runs as it is;
symbolic tracing would stop at the first `if`.)"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class _Tape(TorchFunctionMode):
    """Writes down which modules and functions make the output of the image, as a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.graph, self.inside, self.known = fx.Graph(), 0, {}  # type: ignore[var-annotated]
        self.kept: list[Any] = []  # so that no id is given twice
        self.attributes = {id(p): name for name, p in (*network.named_parameters(), *network.named_buffers())}

    def write(self, out: Any, make: Callable[[Any], fx.Node], arguments: Any) -> None:
        if not any(isinstance(leaf, Tensor) and id(leaf) in self.known for leaf in pytree.tree_leaves(arguments)):
            return
        if isinstance(out, Tensor):
            self.tell(out, make(pytree.tree_map_only(Tensor, self.node, arguments)))
        elif isinstance(out, tuple | list) and any(isinstance(one, Tensor) for one in out):
            whole = make(pytree.tree_map_only(Tensor, self.node, arguments))
            for index, one in enumerate(out):
                self.tell(one, self.graph.call_function(operator.getitem, (whole, index)))

    def tell(self, tensor: Any, node: fx.Node) -> None:
        self.known[id(tensor)] = node
        self.kept.append(tensor)

    def node(self, tensor: Tensor) -> Any:
        if id(tensor) not in self.known:
            name = self.attributes.get(id(tensor))
            if name is None:
                raise ValueError(f"convert: a tensor {tuple(tensor.shape)} made in the forward pass can't be recorded")
            self.tell(tensor, self.graph.get_attr(name))
        return self.known[id(tensor)]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = (args, dict(kwargs or {}))
        if self.inside:
            return function(*args, **arguments[1])
        out = function(*args, **arguments[1])
        self.write(out, lambda a: self.graph.call_function(function, *a), arguments)
        return out


def _is_leaf(module: nn.Module) -> bool:
    return not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) and (
        type(module).__module__.startswith("torch.nn") or pads_channels(module)
    )


def pads_channels(module: nn.Module) -> bool:
    """MONAI's ChannelPad: a shortcut to more channels."""
    return type(module).__name__ == "ChannelPad"


def record(network: nn.Module, example: Tensor) -> tuple[fx.Graph, Tensor]:
    """Run a network and write down what it does to the image. Leaves of the graph are modules of torch.nn, and
    functions outside of them; numbers, also those made of the image's size, are what they were. Returns the graph and
    the output.

    Raises ValueError for outputs that are no tensor made of the image, and for tensors made on the way.
    """
    tape = _Tape(network)
    hooks = []
    stack: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        tape.inside += 1
        known = any(isinstance(leaf, Tensor) and id(leaf) in tape.known for leaf in pytree.tree_leaves((args, kwargs)))
        stack.append(pytree.tree_map_only(Tensor, tape.node, (args, kwargs)) if known and tape.inside == 1 else None)

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str) -> None:
        tape.inside -= 1
        nodes = stack.pop()
        if nodes is not None and not tape.inside:
            if not isinstance(out, Tensor):
                raise ValueError(f"convert: module {name!r} returns {type(out).__name__}, expected a tensor")
            tape.tell(out, tape.graph.call_module(name, *nodes))

    for name, child in network.named_modules():
        if name and _is_leaf(child):
            hooks.append(child.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(child.register_forward_hook(functools.partial(leave, name=name), with_kwargs=True))
    tape.tell(example, tape.graph.placeholder("x"))
    try:
        with torch.no_grad(), tape:
            out = network(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor) or id(out) not in tape.known:
        raise ValueError(f"convert: the module returns {type(out).__name__}, expected one tensor made of its input")
    tape.graph.output(tape.known[id(out)])
    return tape.graph, out
