"""Transfer: a network with other tasks takes the shared filters and the task filters of a trained network (section
4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layer import SFGLayer
from ..layers.streams import Heads, Merge, StreamBlock
from ..norm import KernelNorm
from .controls import draws_from_constant_p, sfg_layers

LEAST_P = 0.01
"""A transferred kernel that may learn has at least this p in every group: with p = 1 it could never leave its group."""

CLOSED = -40.0
"""log p of a group that a kernel is never drawn into. It is finite, because infinities would make NaN."""


class _Part(NamedTuple):
    """Rows of a module of the target, int64 [rows], and the rows of the same module of the source that are copied
    there."""

    target: nn.Module
    source: nn.Module
    rows: Tensor
    source_rows: Tensor


@torch.no_grad()
def transfer(
    source: nn.Module, target: nn.Module, tasks: Mapping[str, str] | None = None, freeze: bool = False
) -> dict[str, Tensor]:
    """Load the filters of a trained SFG network into one of the same class and widths that has other tasks.

    A kernel belongs to its most probable group (or its fixed group) in `source`. Kernels of `shared` and of the tasks
    in `tasks` are copied with their normalisation and p. The others stay as `target` has them, as new kernels to be
    learnt. The tasks' streams, merges and heads are treated alike.

    Args:
        source, target: modules whose SFG layers, streams and heads have the same names.
        tasks: {task of the target: task of the source}. None: tasks of the same name in both; {}: the shared filters
            only. The p of source tasks without a counterpart is shared equally by the target's new tasks.
        freeze: whether transferred kernels get no gradient, and no other kernel is drawn into their groups. The
            features of `shared` and of the transferred tasks then stay what they were (except batch statistics, which
            follow the data in training), and the new tasks learn kernels of their own. There must be a task that is not
            in `tasks`, and the optimiser must have no weight decay. Hooks on the parameters do it, so a copy of the
            module learns everything.

    Returns:
        {layer name: which of its kernels were transferred, bool [K]}, for each SFG layer with a grouping of its own.

    Raises:
        ValueError: for unknown tasks, layers of other shapes, a source drawn from a constant p, a target whose grouping
            is not learnt, nothing to learn beside what is frozen, or a target that would draw kernels into frozen
            groups.
    """
    layers, sources = sfg_layers(target), sfg_layers(source)
    groups = _groups(layers, sources, tasks)
    if draws_from_constant_p(source):
        raise ValueError("transfer: the source draws its grouping from a constant p, so its kernels have no group")
    names = next(iter(layers.values())).group_names
    new = [group for group in range(len(names)) if group not in groups]
    if freeze and not new:
        raise ValueError(f"freeze: each task of the target ({', '.join(names[1:])}) would be frozen, nothing to learn")
    if freeze and any(layer.noise_on == "p" for layer in layers.values()):
        raise ValueError("freeze: the target's noise is on p, which draws kernels into every group, expected 'log_p'")
    if freeze and (exploring := max(layer.explore for layer in layers.values())):
        raise ValueError(
            f"freeze: the target has explore={exploring}, which draws kernels into every group, expected 0"
        )

    transferred, assignments = {}, {}
    for name, layer in layers.items():
        if not layer.learns_grouping:
            raise ValueError(f"transfer: layer {name!r} of the target doesn't learn its grouping")
        if sources[name].out_channels != layer.out_channels:
            raise ValueError(
                f"transfer: layer {name!r} has {sources[name].out_channels} kernels in the source, "
                f"expected {layer.out_channels}"
            )
        group_of = {s: t for t, s in groups.items()}
        best = [group_of.get(group, -1) for group in sources[name].probabilities().argmax(1).tolist()]
        assignments[name] = torch.tensor(best, device=layer.logits.device)
        transferred[name] = assignments[name] >= 0
    by_logits = {layer.logits: transferred[name] for name, layer in layers.items()}
    parts = list(_parts(source, target, names, groups, by_logits))  # a list: all are checked before any is copied

    for name, layer in layers.items():
        p = sources[name].probabilities().to(layer.logits)
        learns = _set_p(layer, p, assignments[name], groups, new, freeze)
        if freeze:
            _mask_gradient(layer.logits, learns)
    for part in parts:
        _copy(part, groups)
        if freeze:
            for name, parameter in part.target.named_parameters(recurse=False):
                if name != "logits":
                    keep = torch.ones(len(parameter), device=parameter.device)
                    keep[part.rows] = 0
                    _mask_gradient(parameter, keep.reshape(-1, *(1,) * (parameter.ndim - 1)))
    return transferred


def _groups(
    layers: Mapping[str, SFGLayer], sources: Mapping[str, SFGLayer], tasks: Mapping[str, str] | None
) -> dict[int, int]:
    """The transferred groups, {group of the target: group of the source}. Raises ValueError if the layers or tasks of
    both don't fit."""
    if not layers or layers.keys() != sources.keys():
        raise ValueError(
            f"transfer: the target has SFG layers {', '.join(layers) or 'nowhere'}, "
            f"the source {', '.join(sources) or 'nowhere'}: expected the same"
        )
    names, found = (next(iter(of.values())).group_names for of in (layers, sources))
    if tasks is None:
        tasks = {name: name for name in names[1:] if name in found[1:]}
    for mine, theirs in tasks.items():
        for what, name, known in (("target", mine, names), ("source", theirs, found)):
            if name not in known[1:]:
                raise ValueError(f"tasks: {name!r} is no task of the {what}, expected one of {', '.join(known[1:])}")
    return {0: 0} | {names.index(mine): found.index(theirs) for mine, theirs in tasks.items()}


def _set_p(
    layer: SFGLayer, p: Tensor, assignment: Tensor, groups: Mapping[int, int], new: list[int], freeze: bool
) -> Tensor:
    """Set the layer's p from the source's p [K, T+1]. `assignment` has the groups of the transferred kernels, -1 for
    the others. Returns 1 for each logit that may learn when transferred kernels are frozen, else 0, [K, T+1]."""
    log_p, mine, transferred = layer.log_p(), list(groups), assignment >= 0
    closed = torch.full_like(log_p, CLOSED)
    if freeze:
        old = closed.scatter(1, assignment.clamp_min(0)[:, None], 0.0)
        fresh = closed.clone()
        fresh[:, new] = log_p[:, new].log_softmax(1)
    else:
        values = torch.zeros_like(log_p)
        values[:, mine] = p[:, list(groups.values())].to(values.dtype)
        values[:, new] = (1 - values.sum(1, keepdim=True)).clamp_min(0) / max(len(new), 1)
        values = values.clamp_min(LEAST_P)
        old, fresh = (values / values.sum(1, keepdim=True)).log(), log_p
    layer.logits.copy_(torch.where(transferred[:, None], old, fresh))
    learns = (~transferred)[:, None].repeat(1, log_p.shape[1])
    learns[:, mine] = False
    return learns.to(log_p.dtype)


def _parts(
    source: nn.Module,
    target: nn.Module,
    names: tuple[str, ...],
    groups: Mapping[int, int],
    kernels: Mapping[nn.Parameter, Tensor],
) -> Iterator[_Part]:
    """The parts that are transferred. Raises ValueError if a module of the source has another shape."""
    theirs = dict(source.named_modules())
    for name, module in target.named_modules():
        other = theirs.get(name)
        if isinstance(module, SFGLayer | StreamBlock | Merge | Heads) and type(other) is not type(module):
            raise ValueError(f"transfer: the source has no {type(module).__name__} {name!r}")
        if isinstance(module, SFGLayer) and isinstance(other, SFGLayer):
            rows = kernels[module.logits].nonzero().flatten()
            found = [_Part(module, other, rows, rows)]
            if module.norm is not None and other.norm is not None:
                found.append(_Part(module.norm, other.norm, rows, rows))
            elif module.norm is not other.norm:
                raise ValueError(f"transfer: layer {name!r} has a norm in only one of source and target")
        elif isinstance(module, StreamBlock) and isinstance(other, StreamBlock):
            rows, source_rows = _blocks(groups, module.channels, 0)
            found = [
                _Part(mine, part, rows, source_rows)
                for child, mine in module.named_children()
                if (part := getattr(other, child)) is not None
            ]
        elif isinstance(module, Merge) and isinstance(other, Merge):
            rows, source_rows = _blocks({t: s for t, s in groups.items() if t}, module.channels, 1)
            found = [_Part(module.conv, other.conv, rows, source_rows)]
        elif isinstance(module, Heads) and isinstance(other, Heads):
            found = []
            for t, s in groups.items():
                if t:
                    mine, of = names[t], list(other.outputs)[s - 1]
                    if module.outputs[mine] != other.outputs[of]:
                        raise ValueError(
                            f"transfer: the head of {of!r} has {other.outputs[of]} outputs in the source, "
                            f"expected {module.outputs[mine]} as that of {mine!r}"
                        )
                    rows, source_rows = (
                        torch.arange(span.start, span.stop) for span in (module.rows(mine), other.rows(of))
                    )
                    found.append(_Part(module.conv, other.conv, rows, source_rows))
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] in names[1:]:  # each task has a head of its own
            t = names.index(name.rpartition(".")[2])
            if t not in groups:
                continue
            head = next(iter(sfg_layers(source).values())).group_names[groups[t]]
            part = theirs[f"{name.rpartition('.')[0]}.{head}"]
            found = [_Part(module, part, *(torch.arange(len(one.weight)) for one in (module, part)))]
        else:
            continue
        for part in found:
            _check_shapes(name, part)
        yield from found


def _blocks(groups: Mapping[int, int], channels: int, first: int) -> tuple[Tensor, Tensor]:
    """The rows of the groups, in target and source. The tensors hold `channels` rows for each group, from group number
    `first` on."""
    mine, theirs = (
        torch.tensor([(group - first) * channels for group in of], dtype=torch.int64)[:, None] + torch.arange(channels)
        for of in (groups.keys(), groups.values())
    )
    return mine.flatten(), theirs.flatten()


def _check_shapes(name: str, part: _Part) -> None:
    mine, theirs = (
        {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False) if key != "logits"}
        for module in (part.target, part.source)
    )
    for key in sorted(mine.keys() | theirs.keys()):
        if key not in mine or key not in theirs or mine[key][1:] != theirs[key][1:]:
            raise ValueError(
                f"transfer: {key!r} of layer {name!r} has shape {theirs.get(key)} in the source, "
                f"expected rows as in {mine.get(key)}"
            )


def _copy(part: _Part, groups: Mapping[int, int]) -> None:
    theirs = dict(part.source.named_parameters(recurse=False)) | dict(part.source.named_buffers(recurse=False))
    own = (
        *part.target.named_parameters(recurse=False),
        *(part.target.named_buffers(recurse=False) if not isinstance(part.target, SFGLayer) else ()),
    )
    for name, tensor in own:
        if name == "logits":
            continue
        found = theirs[name].to(tensor.device, tensor.dtype)
        rows, source_rows = part.rows.to(tensor.device), part.source_rows.to(tensor.device)
        if isinstance(part.target, KernelNorm) and tensor.ndim == 2:  # it has a number for each (group, kernel)
            for t, s in groups.items():
                tensor[t, rows] = found[s, source_rows]
        elif tensor.ndim:
            tensor[rows] = found[source_rows]
        else:
            tensor.copy_(found)


def _mask_gradient(parameter: Tensor, keep: Tensor) -> None:
    """Multiply every gradient that the parameter gets by `keep` (1 or 0, broadcast)."""

    def masked(gradient: Tensor) -> Tensor:
        nonlocal keep
        keep = keep.to(gradient.device, gradient.dtype)  # once: a copy to a device can't be captured in a CUDA graph
        return gradient * keep

    parameter.register_hook(masked)
