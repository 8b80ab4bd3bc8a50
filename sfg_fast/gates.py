"""The gates of an SFG layer: the parameters of q(z), the distribution that its kernels' groups are drawn from (paper,
section 2.2). `draws.py` draws, `estimators.py` says how the probabilities are learnt.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
import weakref
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import backends
from .draws import NOISE_ON, DrawRule, draw_by_formula, draw_one_hot, gumbel_noise, initial_probabilities, one_hot
from .estimators import ESTIMATORS, Estimator
from .fixed_assignment import FixedAssignment
from .groups import FilterGroups, group_names
from .tracing import in_backward, in_graph


class GroupGates(FixedAssignment):
    """The K gates of a layer: the parameters of q(z), and their draw.

    Attributes:
        logits: float [K, T+1], log-probabilities up to a constant, shared first. No optimiser may decay them
            (`sfg_fast.parameter_groups`); of one that does a warning tells.
        fixed_gates: float [K, T+1], see `FixedAssignment`.
        estimator: a name of `estimators.ESTIMATORS`, or an `Estimator`; `none` freezes the logits.
        every: n > 1: only in every n-th step the undrawn gates get a gradient. It is multiplied by n, so its mean over
            n steps is that of `every=1`. The other steps cost as little as `selected`.
        sampling: draw also in `eval()`, which otherwise uses argmax p. (With estimator `none` p is constant,
            and eval() draws, too: argmax of equal p would make every kernel shared.)
        noise_on: "log_p", groups are drawn with probability p (the paper's); or "p", with probability softmax(p), as
            the authors' public code has it: p = [0, 1, 0] then still draws the first group one time in five. What p is
            (its entropy, argmax p, `probabilities`) is the same in both.
        explore: share of the draws that ignore p: groups are drawn with probability (1 - explore) p + explore / (T+1),
            in training and while `sampling`. Even when p has become certain, drawing then still acts as a dropout,
            which helps small cohorts. Under a fixed assignment the p in this formula is one-hot. 0: no draw ignores p.
        phase: `learning_steps` modulo `every`, which the host knows without waiting for a device. A draw counts both.
            A replayed CUDA graph counts `learning_steps` alone, so who replays it counts `phase`.
    """

    _version = 2  # of the state_dict; 1 had `fixed_assignment` [K], -1: sampled
    # How the groups are drawn from logits; the oracle has a way of its own.
    _sample = staticmethod(backends.sample)

    _temperature: Tensor
    learning_steps: Tensor

    def __init__(
        self,
        kernels: int,
        tasks: int | Iterable[str],
        init: str | Sequence[Any] | Tensor,
        estimator: str,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        names = group_names(tasks)
        groups = len(names)
        super().__init__(kernels, groups, device)
        self.group_names, self.init = names, init
        self.logits = nn.Parameter(torch.empty(kernels, groups, device=device, dtype=dtype))
        self.register_buffer("_temperature", torch.empty((), device=device))
        # The number of draws that could be learnt from: a resumed run goes on with the right step of every n.
        self.register_buffer("learning_steps", torch.empty((), dtype=torch.int64, device=device))
        self._foreseen = False  # was the next step looked at already (`_looks_everywhere`)?
        self.sampling = False
        self.rule = DrawRule(names, ESTIMATORS["none"], noise_on="log_p", explore=0.0, every=1)
        self.shares_grouping = self.takes_draws = False  # the second: with nobody that owns it
        self._sharing: list[GroupGates] = []  # the layers that share this one's grouping (a list: no submodules)
        self.reset_grouping()
        self.estimator = estimator
        _made.add(self)

    @torch.no_grad()
    def reset_grouping(self) -> None:
        """Sets all to what a new layer has: p as `init` says (drawn anew, where that is random), no fixed assignment,
        temperature 1."""
        if not self.shares_grouping and not self.logits.is_meta:
            # log 0 is infinite, so p is at least 1e-5, which in training is as good as 0.
            p = initial_probabilities(self.init, *self.logits.shape).clamp_min(1e-5)
            self.logits.copy_(p.log())
        self._temperature.fill_(1)
        self.forget_assignment()
        self.learning_steps.zero_()
        self.phase = 0

    @property
    def estimator(self) -> str | Estimator:
        """How the gradient reaches the logits: a name of `ESTIMATORS`, or an `Estimator`."""
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: str | Estimator) -> None:
        if isinstance(estimator, str) and estimator not in ESTIMATORS:
            raise ValueError(f"estimator={estimator!r} is unknown, expected one of {', '.join(ESTIMATORS)}")
        self._estimator = estimator
        found = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
        self.rule = dataclasses.replace(self.rule, estimator=found)
        self.logits.requires_grad_(found.gates is not None and not self.takes_draws)

    @property
    def every(self) -> int:
        """In every how many-th step undrawn gates get a gradient."""
        return self.rule.every

    @every.setter
    def every(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"every={steps!r}: expected a number of steps, at least 1")
        self.rule = dataclasses.replace(self.rule, every=steps)
        self.phase = 0 if self.learning_steps.is_meta else int(self.learning_steps) % steps

    @property
    def noise_on(self) -> str:
        """ "log_p", or "p" as in the authors' public code."""
        return self.rule.noise_on

    @noise_on.setter
    def noise_on(self, noise_on: str) -> None:
        if noise_on not in NOISE_ON:
            raise ValueError(f"noise_on={noise_on!r} is unknown, expected one of {', '.join(NOISE_ON)}")
        self.rule = dataclasses.replace(self.rule, noise_on=noise_on)

    @property
    def explore(self) -> float:
        """The share of the draws that ignore p."""
        return self.rule.explore

    @explore.setter
    def explore(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"explore={share!r}: expected a share of the draws, 0 to 1")
        self.rule = dataclasses.replace(self.rule, explore=float(share))

    @property
    def temperature(self) -> Tensor:
        """Temperature of the relaxation, a 0-dim tensor: set it in place, and a captured graph sees the change."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        held = torch.tensor(float(value), dtype=self._temperature.dtype, device="cpu")  # no waiting for a device
        if not held > 0 or not held.isfinite():
            raise ValueError(f"temperature={float(value)}: expected a positive number")
        self._temperature.fill_(float(value))

    @property
    def learns_grouping(self) -> bool:
        """Do the logits of this layer get a gradient of their own?"""
        return self.rule.estimator.gates is not None and not self.assigned and not self.shares_grouping

    def log_p(self) -> Tensor:
        """log p [K, T+1], at least float32."""
        return self.rule.log_p(self.logits)

    def probabilities(self) -> Tensor:
        """p [K, T+1] without gradient; one-hot under a fixed assignment."""
        log_p = self.log_p().detach()
        return one_hot(self.fixed_assignment, log_p.shape[1], log_p.dtype) if self.assigned else log_p.exp()

    def assign(self, assignment: Tensor | Sequence[int] | None) -> None:
        """As `FixedAssignment.assign`. Raises ValueError for a layer that shares another layer's grouping, too."""
        if self.shares_grouping:
            whose = "takes the draw that it is given" if self.takes_draws else "shares another layer's grouping"
            raise ValueError(f"this layer {whose}: assign the layer that draws")
        super().assign(assignment)

    def share_grouping(self, owner: GroupGates) -> None:
        """From now on this layer has no grouping of its own: it uses the owner's logits, and the caller must give it
        the owner's draw (`conv(x, groups=...)`). All convolutions that write to one residual stream do so. Raises
        ValueError for an owner with other numbers of kernels or other groups."""
        if self.takes_draws or owner.takes_draws:
            raise ValueError("a layer that takes the draw that it is given has no grouping to share")
        if owner.logits.shape != self.logits.shape or owner.group_names != self.group_names:
            raise ValueError(
                f"a layer of {tuple(self.logits.shape)} (kernels, groups) can't share the grouping of one of "
                f"{tuple(owner.logits.shape)}"
            )
        self.logits = owner.logits
        self.shares_grouping = True
        self._owner = (owner,)  # in a tuple: not a submodule
        owner._sharing.append(self)

    def take_draws(self) -> None:
        """From now on this layer never draws: the caller must give it a draw of another layer, or of several, such as
        that of concatenated features (`conv(x, groups=x.groups)`). Its logits are not learnt."""
        if self.shares_grouping:
            raise ValueError("this layer shares another layer's grouping, it can't take other draws")
        self.shares_grouping = self.takes_draws = True
        self.logits.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module. But a move (`to_empty`, from the meta device) makes a new parameter in every module, and
        all layers that share a grouping have one tensor of logits."""
        found = super()._apply(fn, recurse)
        owns = not self.shares_grouping or self.takes_draws
        for layer in (self if owns else self._owner[0])._sharing:
            layer.logits = layer._owner[0].logits
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _made.add(self)

    def draw(self) -> FilterGroups:
        """One draw for a mini-batch (the paper's objective draws per example; a convolution has one weight per batch).

        The noise comes from torch's default generator before any backend is chosen: same seed, same assignment.
        """
        if self.shares_grouping:
            whose = "takes the draw that it is given" if self.takes_draws else "shares another layer's grouping"
            raise ValueError(f"this layer {whose}: call it with groups=<the draw of the layer that owns it>")
        if self._draws_by_formula():
            return self._draw_by_formula([self])[0]
        draws = self.training or self.sampling
        if self.assigned:
            assignment = self.fixed_gates.argmax(1)
            gates = one_hot(assignment, len(self.group_names), torch.promote_types(self.logits.dtype, torch.float32))
            if not draws or not self.explore:
                return FilterGroups.from_assignment(assignment, self.group_names[1:], gates)
            log_p = gates.log()
        else:
            log_p = self.log_p()
            draws = draws or self.rule.estimator.gates is None
        log_p = self.rule.log_drawn(log_p) if draws else log_p
        samples = 0
        if self.training:  # the spare noise is drawn, too, so that the generator stands where a learning step leaves it
            samples = self.rule.estimator.samples
            self._looks_everywhere(learns=False)
        return draw_one_hot(self.rule, log_p, gumbel_noise(log_p, samples) if draws else None, self._sample)

    def _draws_by_formula(self) -> bool:
        """Are the gates of a draw differentiable, or relaxed, so that the estimator's formula makes them?"""
        estimator = self.rule.estimator
        if not self.training or estimator.gates is None:
            return False
        learns = estimator.relaxed or (self.logits.requires_grad and torch.is_grad_enabled())
        return learns and not self.assigned

    def draws_like(self, other: GroupGates) -> bool:
        """Can this layer and the other one be drawn in one go?"""
        mine, its = self.logits, other.logits
        return (
            (self.rule, self.phase, mine.dtype, mine.device, mine.requires_grad)
            == (other.rule, other.phase, its.dtype, its.device, its.requires_grad)
            and self._draws_by_formula()
            and not self.shares_grouping
        )

    @staticmethod
    def _draw_by_formula(layers: Sequence[GroupGates]) -> list[FilterGroups]:
        """The draws of different layers, all of which `draws_like` the first."""
        first = layers[0]
        learns = first.logits.requires_grad and torch.is_grad_enabled()
        looks = [layer._looks_everywhere(learns) for layer in layers]  # each layer counts its step
        logits, temperatures = [layer.logits for layer in layers], [layer.temperature for layer in layers]
        return draw_by_formula(first.rule, logits, temperatures, all(looks), first._sample)

    def _looks_everywhere(self, learns: bool) -> bool:
        """Is this a step in which undrawn gates get a gradient (`every`)? Every draw that `learns` is a step.

        Activation checkpointing runs a step twice, and both runs must get the same answer. Reentrant checkpointing runs
        first without gradient; that run does not count, and is answered for the next step. Other checkpointing repeats
        the forward pass during backward; that repetition is answered for the step which was counted already."""
        if self.every == 1 or not self.logits.requires_grad:
            return True
        if learns and in_backward() and not self._foreseen:
            return self.phase == 0
        phase = (self.phase + 1) % self.every
        self._foreseen = not learns
        if learns:
            self.phase = phase
            self.learning_steps += 1
        return phase == 0

    def host_decides(self, draws: int) -> Hashable:
        """What the host decides for this layer in the next `draws` draws of a training. Where it is the same, the draws
        are the same operations on a device, so that one CUDA graph does them."""
        looks = tuple((self.phase + draw) % self.every == 0 for draw in range(1, draws + 1))
        return self.rule, self.assigned, self.logits.requires_grad, self.sampling, looks

    def weight_of(self, groups: FilterGroups) -> Tensor:
        """The layer's `weight` for a step with these groups. If their gates don't want a gradient, the logits get zeros
        through this tensor: data-parallel training expects that every parameter that requires a gradient gets one."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        if groups.learns or not self.logits.requires_grad or not torch.is_grad_enabled():
            return weight
        return with_zero_gradient(weight, self.logits)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        errors = args[-1]
        if (version := metadata.get("version") or 1) > self._version:
            errors.append(
                f"{prefix or 'the state'}: version {version} of {type(self).__name__}, this is sfg_fast "
                f"{importlib.metadata.version('sfg_fast')}, expected at most {self._version}: install a later sfg_fast"
            )
        if version < 2 and f"{prefix}fixed_assignment" in state:
            old = state.pop(f"{prefix}fixed_assignment")
            state[f"{prefix}fixed_gates"] = one_hot(old, len(self.group_names), torch.float32)
        super()._load_from_state_dict(state, prefix, metadata, *args)
        self.phase = 0 if self.learning_steps.is_meta else int(self.learning_steps) % self.every
        if self.shares_grouping and not self.takes_draws:  # load_state_dict(assign=True) brings new parameters
            self.logits = self._owner[0].logits


# All gates there are: no optimiser may decay their logits, and `_tell_decay` has to find them.
_made: weakref.WeakSet[GroupGates] = weakref.WeakSet()


def _tell_decay(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Warns before an optimiser's first step with these groups of parameters, if it would decay logits. (Decay draws p
    towards uniform, whatever is learnt, also under a fixed assignment.)"""
    groups = len(optimiser.param_groups)
    if in_graph() or _looked_at.get(optimiser) == groups:
        return
    _looked_at[optimiser] = groups
    logits = {id(layer.logits) for layer in _made if layer.logits.requires_grad}
    for group in optimiser.param_groups:
        decayed = [p for p in group["params"] if id(p) in logits] if group.get("weight_decay") else []
        if decayed:
            warnings.warn(
                f"weight_decay={group['weight_decay']} is applied to the logits of {len(decayed)} SFG layers, and "
                "draws their p towards uniform; expected none for them: pass the optimiser "
                "sfg_fast.parameter_groups(model, weight_decay=..)",
                stacklevel=3,
            )


_looked_at: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
register_optimizer_step_pre_hook(_tell_decay)


def draw_together(layers: Sequence[GroupGates]) -> list[FilterGroups]:
    """What `draw` of one layer after the other gives, from the same random numbers.

    In training, layers with the same rule are drawn in one go, because a draw is many small operations. No logits get a
    gradient before the gates of all these layers have theirs (zeros where a layer's gates have none)."""
    if layers and all(layer.draws_like(layers[0]) for layer in layers):
        return GroupGates._draw_by_formula(layers)
    return [layer.draw() for layer in layers]


def with_zero_gradient(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor as it is. In the backward pass `other`, on which nothing depends, gets zeros."""
    return _WithZeroGradient.apply(tensor, other)


class _WithZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        ctx.like = (other.shape, other.dtype, other.device)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> Any:
        shape, dtype, device = ctx.like
        return dw, torch.zeros(shape, dtype=dtype, device=device)
