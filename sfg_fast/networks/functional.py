"""Puts modules in place of functions of a recorded network that do what a module of torch.nn does. rewrite.py then has
modules alone to look at."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .record import WHERE, remove_unused

DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip

# The functions of a weight for which torch.nn has a module, and the names of their arguments in order.
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_PLAIN: dict[Any, Any] = {F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d, F.conv_transpose2d: nn.ConvTranspose2d,
          F.conv_transpose3d: nn.ConvTranspose3d}  # fmt: skip
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.conv_transpose2d: _TRANSPOSED,
    F.conv_transpose3d: _TRANSPOSED,
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.linear: ("input", "weight", "bias"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


class FunctionsAsModules:
    """Puts modules in place of functions. Each is given the parameters that the function reads, and is in the mode of
    the module that called it.

    `modules`, the network's by name, and `modes`, the mode of each (True for training), are kept up to date. `told` are
    the nodes that an argument tells whether the network is in training.
    """

    def __init__(
        self,
        network: nn.Module,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        modes: dict[nn.Module, bool],
        told: set[fx.Node],
    ) -> None:
        self.network, self.graph, self.modules, self.modes, self.told = network, graph, modules, modes, told

    def run(self) -> None:
        """Put modules in place of F.conv2d, F.linear, F.batch_norm and the like that read parameters of the network (a
        subclass of nn.Conv2d with another forward pass calls them), and of F.dropout."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node.target not in _FUNCTIONS:
                continue
            given = dict(zip(_FUNCTIONS[node.target], node.args, strict=False)) | dict(node.kwargs)
            x, parts = given.pop("input"), {}
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = given.pop(key, None)
                parts[key] = held(self.network, value) if isinstance(value, fx.Node) else value
                if isinstance(value, fx.Node) and parts[key] is None:
                    break  # the forward pass computes it
            else:
                self._as_module(node, x, parts, given)
        remove_unused(self.graph)  # nodes that read the parameters
        self._dropouts()

    def _as_module(self, node: fx.Node, x: fx.Node, parts: Mapping[str, Tensor | None], given: dict[str, Any]) -> None:
        weight, bias = parts["weight"], parts["bias"]
        if any(isinstance(value, fx.Node) for value in given.values()):
            return
        module: Any
        if node.target in (F.batch_norm, torch.batch_norm):
            module = self._batch_norm(node, parts, given)
        elif weight is None:
            return
        elif node.target is F.group_norm:
            module = nn.GroupNorm(given["num_groups"], len(weight), given.get("eps", 1e-5), device="meta")
        elif node.target is F.linear:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        else:
            groups = given.get("groups", 1)
            channels = weight.shape[1] * groups, weight.shape[0]
            if node.target in (F.conv_transpose2d, F.conv_transpose3d):
                channels = weight.shape[0], weight.shape[1] * groups
            how: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in given.items()}
            how |= {"bias": bias is not None, "device": "meta"}
            module = _PLAIN[node.target](*channels, tuple(weight.shape[2:]), **how)
        if module is None:
            return
        if not isinstance(module, nn.BatchNorm2d):
            module.weight, module.bias = weight, bias
        name = self._place_for(module, _weight_name(node))
        with self.graph.inserting_before(node):
            made = self.graph.call_module(name, (x,))
        made.meta |= node.meta
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _place_for(self, module: nn.Module, weight: str) -> str:
        """The name of a module that has this weight and does the same as `module`. If there is none, `module` is added:
        in place of the weight's owner, if that is a subclass without children, else beside the weight."""
        owner, _, own = weight.rpartition(".")
        before = self.modules[owner]
        if type(before) is type(module) and _settings(before) == _settings(module):
            return owner
        if (
            owner
            and isinstance(before, type(module))
            and type(before) is not type(module)
            and not _has_children(before)
        ):
            name = owner
            self.network.set_submodule(name, module)
        else:
            name = f"{owner}.{own}_{type(module).__name__.lower()}".lstrip(".")
            if name not in self.modules:
                before.add_module(name.rpartition(".")[2], module)
        if self.network.get_submodule(name) is module:
            self.modules[name], self.modes[module] = module, self.modes[before]
        return name

    def _batch_norm(
        self, node: fx.Node, parts: Mapping[str, Tensor | None], given: Mapping[str, Any]
    ) -> nn.BatchNorm2d | None:
        """The nn.BatchNorm2d that does the same in both modes; None if there is none."""
        mean, var, weight, bias = (parts[key] for key in ("running_mean", "running_var", "weight", "bias"))
        if node not in self.told or mean is None or var is None or weight is None or bias is None:
            return None
        norm = nn.BatchNorm2d(len(weight), given.get("eps", 1e-5), given.get("momentum", 0.1), device="meta")
        norm.weight, norm.bias = weight, bias  # type: ignore[assignment]
        norm.running_mean, norm.running_var = mean, var
        norm.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=mean.device)
        return norm

    def _dropouts(self) -> None:
        """Put modules in place of F.dropout(x, p, self.training). The recorded function, in `eval()`, would never
        drop."""
        for node in [one for one in self.graph.nodes if one in self.told and one.target in DROPOUTS]:
            number = next(n for n in itertools.count() if not hasattr(self.network, f"dropout_{n}"))
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            name, dropout = f"dropout_{number}", DROPOUTS[node.target](p)
            self.network.add_module(name, dropout)
            owner = self.modules.get(node.meta[WHERE], self.network)
            self.modules[name], self.modes[dropout] = dropout, self.modes[owner]
            with self.graph.inserting_before(node):
                made = self.graph.call_module(name, (node.kwargs.get("input", *node.args[:1]),))
            made.meta |= node.meta
            node.replace_all_uses_with(made)
            self.graph.erase_node(node)


def held(network: nn.Module, node: fx.Node) -> Tensor | None:
    """The parameter or buffer of the network that a node reads; None for another node."""
    return operator.attrgetter(str(node.target))(network) if node.op == "get_attr" else None


def _settings(module: nn.Module) -> list[Any]:
    """Everything that determines what a layer computes, except the values of its parameters."""
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "eps", "momentum")
    pairs = [(one, one) if isinstance(one, int) else one for one in (getattr(module, name, None) for name in names)]
    return [*pairs, getattr(module, "bias", None) is None]


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _weight_name(node: fx.Node) -> str:
    """The name of the weight that a function of `_FUNCTIONS` reads."""
    given = dict(zip(_FUNCTIONS[node.target], node.args, strict=False)) | dict(node.kwargs)
    weight = given["weight"]
    assert isinstance(weight, fx.Node)
    return str(weight.target)
