"""Finds out which channels of a feature map a recorded function takes, and in which order: a split, a range, a shuffle.

A function is run on numbers that say where they stand. What it returns says which channels they are of.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from .record import NUMBER, SHAPE, VALUE, inputs_of, name_of

# Functions that only move values, of which several make a shuffle of channels, and functions that give several tensors.
_MOVES = {
    "view", "reshape", "transpose", "permute", "contiguous", "flatten", "unflatten", "swapaxes", "swapdims", "movedim",
    "moveaxis",
}  # fmt: skip
_SELECTS = {"getitem", "index_select", "narrow", "flip", "roll"}
SPLITS = {"chunk", "split", "tensor_split", "split_with_sizes", "unbind"}


class Selection:
    """Runs recorded functions of a network on places.

    `network`: whose parameters and buffers the functions read.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def of_parts(self, node: fx.Node) -> list[list[int] | None]:
        """The channels of each part of a split; None for a part that is no selection of channels."""
        places = _places(node)
        return [_channels(part, places) for part in self._run(node, places)]

    def through(self, node: fx.Node) -> tuple[list[fx.Node], list[int]] | None:
        """The nodes from this one to the first that gives the image's positions again, and the channels that they take
        together; None if they do something else. (A shuffle is a view, a transposition, and another view.)"""
        several = SHAPE not in node.all_input_nodes[0].meta  # it takes one result of a function that has several
        if several or (name_of(node) not in _MOVES | _SELECTS and node.op != "call_module"):
            return None
        places = _places(node)
        found: Any = places
        nodes: list[fx.Node] = []
        while True:
            nodes.append(node)
            try:
                found = self._run(node, found)
            except (RuntimeError, TypeError, IndexError, KeyError):  # it does something that places can't be given to
                return None
            channels = _channels(found, places)
            if channels is not None:
                return nodes, channels
            users = list(node.users)
            if name_of(node) not in _MOVES or len(users) != 1 or users[0].meta.get(NUMBER):
                return None
            node = users[0]
            if inputs_of(node) != [nodes[-1]] or name_of(node) not in _MOVES:
                return None

    def _run(self, node: fx.Node, places: Tensor) -> Any:
        def value(one: fx.Node) -> Any:
            if one.meta.get(NUMBER):
                return one.meta[VALUE]
            if one.op == "get_attr":
                return _attribute(self.network, str(one.target))
            return places

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self.network.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _places(node: fx.Node) -> Tensor:
    """Numbers 0, 1, .. in the shape of what a node reads."""
    shape = node.all_input_nodes[0].meta[SHAPE]
    return torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def _channels(found: Any, places: Tensor) -> list[int] | None:
    """The channels that were taken, if `found` is channels of `places` and nothing else."""
    if not isinstance(found, Tensor) or found.dim() != places.dim() or found.dim() < 3 or not found.numel():
        return None
    channels = (found[0].flatten(1)[:, 0] // places[0, 0].numel()).long() % places.shape[1]
    same = torch.equal(found, places[:, channels])
    return channels.tolist() if same and channels.unique().numel() == channels.numel() else None


def _attribute(network: nn.Module, name: str) -> Any:
    owner, _, last = name.rpartition(".")
    return getattr(network.get_submodule(owner), last)
