"""Transfer: the shared and the task filters of a trained network, in a network with other tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.streams import Heads, Merge, StreamBlock
from ..norm import KernelNorm
from ..reference import SFGConv2d
from .controls import draws_from_constant_p, sfg_layers

LEAST_P = 0.01
"""Of every group, for a transferred kernel that may learn: one at p = 1 could never leave its group."""

CLOSED = -40.0
"""log p of a group that a kernel can't be drawn into: no draw in the life of the universe, and no infinity."""


class _Part(NamedTuple):
    """Rows of a module of the target, and those of the same module of the source that go there (int64 [rows])."""

    target: nn.Module
    source: nn.Module
    rows: Tensor
    source_rows: Tensor


@torch.no_grad()
def transfer(
    source: nn.Module, target: nn.Module, tasks: Mapping[str, str] | None = None, freeze: bool = False
) -> dict[str, Tensor]:
    """Load the filters of a trained SFG network into one of the same class and widths that has other tasks.

    A kernel goes with its most probable group (or its fixed one) in `source`: kernels of `shared` and of the tasks in
    `tasks` bring their weights, normalisation and p; the others stay as `target` has them, new kernels to be learnt. So
    do the tasks' streams, merges and heads.

    Args:
        source, target: modules whose SFG layers, streams and heads have the same names.
        tasks: {task of the target: task of the source}. None: those of the same name in both; {}: the shared filters
            only. What p gave to source tasks that have no counterpart, the target's new tasks get in equal parts.
        freeze: what was transferred gets no gradient any more, and no other kernel is drawn into its groups: the
            features of `shared` and of the transferred tasks stay what they were (but batch statistics, which follow
            the data in training), and the new tasks learn kernels of their own beside them. Needs a task that is not
            in `tasks`, and an optimiser without weight decay. Hooks do it: a copy of the module learns everything.

    Returns:
        For each SFG layer with a grouping of its own, which of its kernels were transferred, bool [K].

    Raises:
        ValueError: unknown tasks, layers of other shapes, a source drawn from a constant p, a target whose grouping is
            not learnt, nothing to learn beside what is frozen, or a target that would draw kernels into frozen groups.
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
    parts = list(_parts(source, target, names, groups, by_logits))  # all are checked before any is copied

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
    layers: Mapping[str, SFGConv2d], sources: Mapping[str, SFGConv2d], tasks: Mapping[str, str] | None
) -> dict[int, int]:
    """{group of the target: group of the source}."""
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
    layer: SFGConv2d, p: Tensor, assignment: Tensor, groups: Mapping[int, int], new: list[int], freeze: bool
) -> Tensor:
    """Set the layer's p from the source's p [K, T+1]; `assignment`: the transferred kernels' groups, -1 for the others.
    Returns 1 where logits may learn if the rest is frozen, [K, T+1]."""
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
    """What is transferred. ValueError where a module of the source has another shape."""
    theirs = dict(source.named_modules())
    for name, module in target.named_modules():
        other = theirs.get(name)
        if isinstance(module, SFGConv2d | StreamBlock | Merge | Heads) and type(other) is not type(module):
            raise ValueError(f"transfer: the source has no {type(module).__name__} {name!r}")
        if isinstance(module, SFGConv2d) and isinstance(other, SFGConv2d):
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
        elif isinstance(module, nn.Linear) and name.rpartition(".")[2] in names[1:]:  # a head of its own for each task
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
    """Rows of these groups in tensors that hold `channels` rows for each group, from group number `first` on."""
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
        *(part.target.named_buffers(recurse=False) if not isinstance(part.target, SFGConv2d) else ()),
    )
    for name, tensor in own:
        if name == "logits":
            continue
        found = theirs[name].to(tensor.device, tensor.dtype)
        rows, source_rows = part.rows.to(tensor.device), part.source_rows.to(tensor.device)
        if isinstance(part.target, KernelNorm) and tensor.ndim == 2:  # of (group, kernel) pairs
            for t, s in groups.items():
                tensor[t, rows] = found[s, source_rows]
        elif tensor.ndim:
            tensor[rows] = found[source_rows]
        else:
            tensor.copy_(found)


def _mask_gradient(parameter: Tensor, keep: Tensor) -> None:
    """`keep` (1 or 0, broadcast) times whatever gradient the parameter gets."""
    parameter.register_hook(lambda gradient: gradient * keep.to(gradient.device, gradient.dtype))
