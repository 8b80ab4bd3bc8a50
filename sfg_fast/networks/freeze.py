"""`freeze` makes a plain network of the learnt architecture: a plain convolution (2-D or 3-D, transposed or not) for
each group of each layer that is used.

An SFG network with a fixed assignment is T+1 networks that read one another: the shared network, and for each task a
network that reads itself and the shared one. So every SFG layer becomes up to T+1 plain convolutions of those kernels
that an output depends on. A batch normalisation is folded into them. (It becomes a plain norm behind a transposed
convolution of several groups of channels.) An instance, group or layer normalisation has statistics of each image, so
it becomes a plain norm behind them.

To find these kernels, the frozen network is run once for the wanted tasks. A layer computes its features when another
layer reads them, and makes a convolution when it is first asked for one, with the input channels that there are. Nobody
asks for kernels that no output depends on. (frozen.py has what each kind of layer becomes.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layer import SFGLayer
from ..layers.feature_norm import FeatureNorm
from ..layers.stream_conv import StreamConv2d
from ..layers.streams import Heads, Merge, StreamBlock
from .controls import draws_from_constant_p, map_assignment, sfg_layers
from .frozen import Frozen, FrozenConv, FrozenHeads, FrozenMerge, FrozenNorm, FrozenStreamBlock, FrozenStreamConv
from .parts import ChannelDropout
from .record import EXAMPLE_SIZES, as_recorded, backwards, output_of, remove_unused, results_of


def freeze(
    model: nn.Module,
    assignment: Mapping[str, Tensor | Sequence[int]] | None = None,
    tasks: Iterable[str] | None = None,
    example: Tensor | None = None,
) -> nn.Module:
    """A network of plain modules with the same outputs as `model` in `eval()`: it runs, exports and compiles without
    sfg_fast's kernels, and has only the filters that its outputs depend on.

    Args:
        model: any module with SFG layers whose outputs come from `Heads`, or that reads `features.merged(task)`.
        assignment: {layer name: int [K]}, by default argmax p of each layer (or its fixed assignment). The running
            statistics must be those of this assignment: call `recalibrate(model, batches)` before.
        tasks: which tasks' outputs are kept; None: all.
        example: an image [N, C, H, W] or a volume [N, C, D, H, W] that `model` can read, by default zeros [1, C, 64,
            64], of volumes [1, C, 32, 32, 32]. The frozen network takes other sizes, too. (A network that `convert`
            made still checks sizes as its forward pass does: see `convert`.)

    Raises:
        ValueError: for a model without SFG layers, a constant p, unknown tasks, or an assignment of other layers.
    """
    layers = sfg_layers(model)
    if not layers:
        raise ValueError("freeze: the model has no SFG layer")
    if assignment is None and draws_from_constant_p(model):
        raise ValueError("freeze: the grouping is drawn from a constant p, there is no learnt architecture")
    chosen: dict[str, Tensor] = map_assignment(model) if assignment is None else {}
    for name, groups in (assignment or {}).items():
        if name not in layers:
            raise ValueError(f"freeze: {name!r} is no SFG layer with a grouping of its own")
        chosen[name] = torch.as_tensor(groups)
    if missing := layers.keys() - chosen.keys():
        raise ValueError(f"freeze: no assignment for {', '.join(sorted(missing))}")
    names = next(iter(layers.values())).group_names
    wanted = names[1:] if tasks is None else tuple(tasks)
    for task in wanted:
        if task not in names[1:]:
            raise ValueError(f"freeze: {task!r} is no task of the model, expected one of {', '.join(names[1:])}")

    by_logits = {id(layer.logits): chosen[name].tolist() for name, layer in layers.items()}
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    pairs = zip(list(model.named_modules()), list(frozen.modules()), strict=True)
    replaced = {
        name: _plain(original, twin, by_logits, wanted)
        for (name, original), twin in pairs
        if isinstance(original, SFGLayer | StreamBlock | StreamConv2d | Merge | Heads | FeatureNorm | ChannelDropout)
        or (isinstance(original, nn.ModuleDict) and set(original) == set(names[1:]))
    }
    for name, module in replaced.items():
        frozen.set_submodule(name, module) if name else None
    frozen = replaced.get("", frozen)
    if example is None:
        parameter = next(model.parameters())
        # A network that `convert` made may read nothing else than its example.
        first = next(iter(layers.values()))
        shape = getattr(model, "meta", {}).get("image", (first.in_channels, *EXAMPLE_SIZES[first.dims]))
        example = parameter.new_zeros(1, *shape)
    if isinstance(frozen, fx.GraphModule):  # `convert` made it, so the heads are in the graph
        _keep_outputs(frozen, wanted)
    with torch.no_grad():
        frozen(example)
    for module in frozen.modules():
        if isinstance(module, Frozen):
            module.__dict__.pop("source", None)
    return frozen


def _keep_outputs(network: fx.GraphModule, tasks: Sequence[str]) -> None:
    output = output_of(network.graph)
    outputs: Any = output.args[0]
    output.args = ({task: outputs[task] for task in tasks},)
    needed = {node for task in tasks for result in results_of(outputs[task]) for node in backwards(result)}
    for node in reversed(network.graph.nodes):  # questions about the tensors of other tasks
        if node.target is as_recorded and not needed.issuperset(node.all_input_nodes):
            network.graph.erase_node(node)
    remove_unused(network.graph)
    network.delete_all_unused_submodules()
    network.recompile()


def _plain(original: nn.Module, twin: nn.Module, by_logits: Mapping[int, list[int]], tasks: Sequence[str]) -> nn.Module:
    if isinstance(twin, SFGLayer):
        assert isinstance(original, SFGLayer)
        # A layer that takes the draw of its input has none of its own: it is given one at its first call.
        return FrozenConv(twin, by_logits.get(id(original.logits), [0] * original.out_channels))
    if isinstance(twin, StreamBlock):
        return FrozenStreamBlock(twin)
    if isinstance(twin, StreamConv2d):
        return FrozenStreamConv(twin)
    if isinstance(twin, FeatureNorm):
        return FrozenNorm(twin)
    if isinstance(twin, Merge):
        return FrozenMerge(twin)
    if isinstance(twin, Heads):
        return FrozenHeads(twin, tasks)
    if isinstance(twin, ChannelDropout):
        return nn.Identity()
    assert isinstance(twin, nn.ModuleDict)
    return nn.ModuleDict({task: twin[task] for task in tasks})
