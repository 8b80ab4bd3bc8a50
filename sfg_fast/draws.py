"""One draw of groups, and the probabilities that it starts from (paper, section 2.2).

The gate of kernel k is z = one_hot(Cat(p)), p = softmax(logits), drawn as argmax(log p + Gumbel noise). The authors'
public code adds the noise to p itself, which draws from Cat(softmax(p)): `noise_on="p"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .estimators import Estimator, straight_through
from .groups import FilterGroups

INITIAL = ("uniform", "dirichlet", "mostly_shared", "mostly_specific", "vertex")
NOISE_ON = ("log_p", "p")

Sample = Callable[[Tensor, Tensor | None], tuple[Tensor, tuple[Tensor, Tensor, dict[str, Any]]]]
"""(log_p [K, T+1], noise) -> assignment [K], and the kernels sorted by it, as `FilterGroups.from_assignment` takes
them."""


def initial_probabilities(init: str | Sequence[Any] | Tensor, kernels: int, groups: int) -> Tensor:
    """p [K, T+1] to start from.

    `uniform` 1/(T+1); `dirichlet` a flat Dirichlet draw per kernel; `mostly_shared` .9 shared; `mostly_specific` .1
    shared; `vertex` .99 on a random group per kernel; or an array of probabilities, [T+1] or [K, T+1].
    Raises ValueError for an unknown name or an array that holds no probabilities.
    """
    if not isinstance(init, str):
        p = torch.as_tensor(init, dtype=torch.get_default_dtype()).detach()
        if p.shape not in ((groups,), (kernels, groups)):
            raise ValueError(f"init has shape {tuple(p.shape)}, expected ({groups},) or ({kernels}, {groups})")
        if not (p >= 0).all() or not torch.allclose(p.sum(-1), torch.ones(()), atol=1e-3):
            raise ValueError(f"init={init!r}: probabilities must be at least 0 and sum to 1 for each kernel")
        return p.expand(kernels, groups)
    if init == "dirichlet":
        return torch.distributions.Dirichlet(torch.ones(groups)).sample((kernels,))
    if init == "vertex":
        p = torch.full((kernels, groups), 0.01 / (groups - 1))
        return p.scatter(1, torch.randint(groups, (kernels, 1)), 0.99)
    shared = {"uniform": 1 / groups, "mostly_shared": 0.9, "mostly_specific": 0.1}.get(init)
    if shared is None:
        raise ValueError(f"init={init!r} is unknown, expected one of {', '.join(INITIAL)} or an array of probabilities")
    return torch.tensor([shared] + [(1 - shared) / (groups - 1)] * (groups - 1)).expand(kernels, groups)


def temperature_at(progress: float, start: float = 1.0, end: float = 0.1, until: float = 0.8) -> float:
    """The annealed temperature: exponential from `start` to `end`, reached at `until` of the run (progress in 0..1),
    constant after that ("we start at a high temperature and anneal to a small but non-zero value", section 2.2)."""
    return start * (end / start) ** min(1.0, progress / until)


def gumbel_noise(like: Tensor, spare: int = 0) -> Tensor:
    """Standard Gumbel noise [K, T+1] from the default generator of the device. It then draws `spare` more such tensors,
    and discards them."""
    return _noise_of_each(like, [len(like)], spare)[0]


def _noise_of_each(like: Tensor, sizes: Sequence[int], samples: int) -> Tensor:
    """Standard Gumbel noise [1 + samples, K, T+1] for several layers of `sizes` kernels, K in all. Each layer gets the
    numbers that it would get if the layers drew one after the other."""
    noise = torch.empty((1 + samples, *like.shape), dtype=like.dtype, device=like.device)
    for part in noise.split(sizes, 1):
        part[0].exponential_()
        if samples:
            part[1:] = torch.empty_like(part[1:], memory_format=torch.contiguous_format).exponential_()
    return noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_().neg_()


def one_hot(assignment: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[K, groups] from int64 [K]."""
    return (assignment[:, None] == torch.arange(groups, device=assignment.device)).to(dtype)


@dataclass(frozen=True)
class DrawRule:
    """How a layer draws its groups. Layers of equal rules can be drawn in one go."""

    group_names: tuple[str, ...]
    estimator: Estimator
    noise_on: str
    explore: float
    every: int

    def log_p(self, logits: Tensor) -> Tensor:
        """log p [K, T+1], at least float32."""
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)

    def log_drawn(self, log_p: Tensor) -> Tensor:
        """log of the probabilities [K, T+1] that the groups are drawn with."""
        log_q = log_p if self.noise_on == "log_p" else log_p.exp().log_softmax(1)
        if self.explore:
            log_q = (log_q.exp() * (1 - self.explore) + self.explore / log_q.shape[1]).log()
        return log_q


def draw_one_hot(rule: DrawRule, log_q: Tensor, noise: Tensor | None, sample: Sample) -> FilterGroups:
    """The groups argmax(log_q + noise), log_q [K, T+1]; their gates [K, T+1] want no gradient."""
    assignment, by_group = sample(log_q, noise)
    gates = one_hot(assignment, len(rule.group_names), log_q.dtype)
    return FilterGroups.from_assignment(assignment, rule.group_names[1:], gates, by_group)


def draw_by_formula(
    rule: DrawRule, logits: Sequence[Tensor], temperatures: Sequence[Tensor], everywhere: bool, sample: Sample
) -> list[FilterGroups]:
    """Draws several layers of one rule. The estimator's formula makes their gates, which are relaxed or differentiable.

    logits: [K, T+1] of each layer; temperatures: 0-dim of each layer; everywhere: is this a step in which undrawn gates
    count, too (`GroupGates.every`)?
    """
    several, groups = len(logits) > 1, len(rule.group_names)
    sizes = [len(one) for one in logits]
    log_p = rule.log_drawn(rule.log_p(torch.cat(list(logits)) if several else logits[0]))
    temperature = temperatures[0]
    if several:
        of_layers = zip(temperatures, sizes, strict=True)
        temperature = torch.cat([one.to(log_p).expand(size, 1) for one, size in of_layers])
    noise = _noise_of_each(log_p, sizes, rule.estimator.samples)
    drawn_of = [sample(*both) for both in zip(log_p.split(sizes), noise[0].split(sizes), strict=True)]
    assignments = [assignment for assignment, _ in drawn_of]
    drawn = one_hot(torch.cat(assignments) if several else assignments[0], groups, log_p.dtype)
    formula = rule.estimator.gates if everywhere or not rule.estimator.relaxed else straight_through
    assert formula is not None
    gates = formula(drawn, log_p, noise, temperature)
    all_gates = rule.estimator.all_gates and everywhere
    if not all_gates or rule.every > 1:  # drawn gates count once; undrawn ones `every` times in such a step, or never
        counts = rule.every - (rule.every - 1) * drawn if all_gates else drawn
        gates = gates.detach() + (gates - gates.detach()) * counts
    of_each = gates.split(sizes) if several else (gates,)
    tasks = rule.group_names[1:]
    if rule.estimator.relaxed and everywhere:
        return [FilterGroups.relaxed(one, tasks) for one in of_each]
    return [
        FilterGroups.from_assignment(assignment, tasks, one, by_group, all_gates)
        for (assignment, by_group), one in zip(drawn_of, of_each, strict=True)
    ]
