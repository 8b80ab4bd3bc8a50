"""Finds products of a feature map with what layers compute from it: squeeze-and-excite, spatial attention.

`factor_layers` gives the last convolution before each such product; it becomes a `StreamConv2d`. Squeeze-and-excite is
often written with linear layers on pooled features: these become 1x1 convolutions first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from .record import NUMBER, SHAPE, base_of, inputs_of, name_of

MULTIPLIES = {"mul", "rmul", "imul", "multiply"}
_BOUNDED = {"sigmoid", "hardsigmoid"}
_RESHAPES = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "getitem", "unflatten", "contiguous"}
_EXPANDS = {"expand", "expand_as"}
_ELEMENTWISE = {"relu", "sigmoid", "hardsigmoid", "silu", "gelu", "leaky_relu", "tanh", "dropout"}


def can_be_broadcast(shape: Sequence[int], features: Sequence[int]) -> bool:
    """Are these sizes those of the features, or 1 in place of any of them?"""
    return len(shape) == len(features) > 2 and all(a in (1, b) for a, b in zip(shape, features, strict=True))


def factor_layers(network: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """The nodes of convolutions whose output is one factor of a product, behind at most functions of a single tensor,
    and that nothing else reads. The other factor has the size of the product.

    Where both factors have that size, the one behind a sigmoid is meant. Linear layers that work on pooled features
    become convolutions in the network and the graph.
    """
    found = set()
    for node in list(graph.nodes):
        factors = inputs_of(node)
        if name_of(node) not in MULTIPLIES or len(factors) != 2:
            continue
        paths = [_path(network, one) for one in factors]
        for path, other in zip(paths, factors[::-1], strict=True):
            if path is not None and _is_factor(network, path, other, node) and _all_convolutions(network, graph, path):
                found.add(path[-1])
                break
    return found


def _is_factor(network: nn.Module, path: list[fx.Node], other: fx.Node, product: fx.Node) -> bool:
    shape, whole = path[0].meta.get(SHAPE, ()), other.meta.get(SHAPE, ())
    if whole != product.meta.get(SHAPE) or not can_be_broadcast(shape, whole):
        return False
    smaller = shape != whole or name_of(path[0]) in _EXPANDS
    return smaller or any(_name(network, node) in _BOUNDED for node in path)


def _path(network: nn.Module, node: fx.Node) -> list[fx.Node] | None:
    """The nodes from a factor back to the layer that computes it; None if another node reads one of them, or if one
    reads several tensors."""
    path: list[fx.Node] = []
    while True:
        if len(_readers(node)) != 1:
            return None
        path.append(node)
        if isinstance(_module(network, node), nn.Conv2d | nn.Linear):
            return path
        read = inputs_of(node)
        if len(read) != 1 and name_of(node) != "expand_as":
            return None
        if not read:
            return None
        node = read[0]


def _all_convolutions(network: nn.Module, graph: fx.Graph, path: list[fx.Node]) -> bool:
    """Make linear layers before a product convolutions, and leave `path` with what is left of it. False if it can't be
    done; then nothing is changed."""
    section: list[fx.Node] = []  # from the linear layer back to the pooled features
    if isinstance(_module(network, path[-1]), nn.Linear):
        node = path[-1]
        while len(node.meta.get(SHAPE, ())) == 2:
            if len(inputs_of(node)) != 1 or len(_readers(node)) != 1:
                return False
            section.append(node)
            node = inputs_of(node)[0]
        calls = [one.target for one in graph.nodes if one.op == "call_module"]
        if not all(_can_be_in_section(network, one, calls) for one in (*path[:-1], *section[:-1])):
            return False
        if not (_pools(section[-1]) or node.meta.get(SHAPE, ())[2:] == (1, 1)):
            return False
        _with_four_dimensions(network, graph, section)
    for node in path[:-1]:
        if name_of(node) in _EXPANDS or (section and name_of(node) in _RESHAPES):  # the product broadcasts
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            graph.erase_node(node)
    return True


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the values of a node, not its size alone."""
    return [user for user in node.users if not user.meta.get(NUMBER)]


def _can_be_in_section(network: nn.Module, node: fx.Node, calls: list[object]) -> bool:
    """Does the node do the same to a tensor [N, C, 1, 1] as to [N, C]? `calls`: the names of all modules that are
    called, in every place."""
    module = _module(network, node)
    if module is None:
        return name_of(node) in _ELEMENTWISE | _RESHAPES | _EXPANDS
    if isinstance(module, nn.Linear) and (calls.count(node.target) > 1 or not isinstance(module.weight, nn.Parameter)):
        return False
    base = base_of(module)
    kinds = ("activation", "dropout", "linear")
    return base is not None and base.__module__.rpartition(".")[2] in kinds and base is not nn.Bilinear


def _pools(node: fx.Node) -> bool:
    """Is the node a mean over height and width, without these dimensions?"""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return name_of(node) == "mean" and sorted(dims if isinstance(dims, list | tuple) else []) in ([2, 3], [-2, -1])


def _with_four_dimensions(network: nn.Module, graph: fx.Graph, section: list[fx.Node]) -> None:
    first = section[-1]
    if _pools(first):
        first.args, first.kwargs = (*first.args[:2],), {**first.kwargs, "keepdim": True}
        first.meta[SHAPE] = (*first.meta[SHAPE], 1, 1)
    else:
        first.replace_all_uses_with(inputs_of(first)[0])
        graph.erase_node(first)
    for node in section[:-1]:
        node.meta[SHAPE] = (*node.meta[SHAPE], 1, 1)
        linear = _module(network, node)
        if isinstance(linear, nn.Linear):
            like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, **like)  # type: ignore
            conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], linear.weight.requires_grad)
            conv.bias = linear.bias
            network.set_submodule(str(node.target), conv.train(linear.training))


def _module(network: nn.Module, node: fx.Node) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _name(network: nn.Module, node: fx.Node) -> str:
    module = _module(network, node)
    return name_of(node) if module is None else type(module).__name__.lower()
