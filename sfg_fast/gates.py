"""How a kernel's group is drawn (paper, section 2.2). How its probabilities p are learnt: estimators.py.

The gate of kernel k is z = one_hot(Cat(p)), p = softmax(logits), drawn as argmax(log p + Gumbel noise). The authors'
public code adds the noise to p itself, which draws from Cat(softmax(p)): `noise_on="p"`.
"""

from __future__ import annotations

import importlib.metadata
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from . import backends
from .estimators import ESTIMATORS, Estimator, straight_through
from .groups import FilterGroups, group_names
from .tracing import in_graph

# --- the start: initial p ---------------------------------------------------------------------------------------------

INITIAL = ("uniform", "dirichlet", "mostly_shared", "mostly_specific", "vertex")
NOISE_ON = ("log_p", "p")


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


# --- one draw ---------------------------------------------------------------------------------------------------------


def gumbel_noise(like: Tensor, spare: int = 0) -> Tensor:
    """Standard Gumbel noise [K, groups]. `spare`: so many more are drawn, and left."""
    return _noise_of_each(like, [len(like)], spare)[0]


def _noise_of_each(like: Tensor, sizes: Sequence[int], samples: int) -> Tensor:
    """Standard Gumbel noise [1 + samples, K, groups] from the device's default generator for several layers of `sizes`
    kernels, K in all: the numbers that each would get, one after the other."""
    noise = torch.empty((1 + samples, *like.shape), dtype=like.dtype, device=like.device)
    for part in noise.split(sizes, 1):
        part[0].exponential_()
        if samples:
            part[1:] = torch.empty_like(part[1:], memory_format=torch.contiguous_format).exponential_()
    return noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_().neg_()


def one_hot(assignment: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[K, groups] from int64 [K]."""
    return (assignment[:, None] == torch.arange(groups, device=assignment.device)).to(dtype)


def temperature_at(progress: float, start: float = 1.0, end: float = 0.1, until: float = 0.8) -> float:
    """The annealed temperature: exponential from `start` to `end`, reached at `until` of the run (progress in 0..1),
    constant after that ("we start at a high temperature and anneal to a small but non-zero value", section 2.2)."""
    return start * (end / start) ** min(1.0, progress / until)


# --- the gates of one layer -------------------------------------------------------------------------------------------


class GroupGates(nn.Module):
    """The K gates of a layer: the variational parameters of q(z), their draw, and a fixed assignment if there is one.

    Attributes:
        logits: float [K, T+1], log-probabilities up to a constant, shared first. No optimiser may decay them
            (`sfg_fast.parameter_groups`); of one that does a warning tells.
        fixed_gates: float [K, T+1], the gates of a fixed assignment: 1 in the group of each kernel, else 0; all 0 where
            the groups are drawn. Averages of models (EMA, SWA) average these numbers, too; the group of a kernel is
            then that of its largest number.
        estimator: a name of `estimators.ESTIMATORS`, or an `Estimator`; `none` freezes the logits.
        every: n > 1: only every n-th step looks at the groups that a kernel was not drawn into, and what it finds
            counts n times. The steps between are as cheap as `selected`, the mean over n steps is the same.
        sampling: draw also in `eval()`, which otherwise uses argmax p. (Constant p, estimator `none`, always draws:
            argmax of [1/3, 1/3, 1/3] would make every kernel shared.)
        noise_on: "log_p", groups are drawn with probability p (the paper's); or "p", with probability softmax(p), as
            the authors' public code has it: p = [0, 1, 0] then still draws the first group one time in five. What p is
            (its entropy, argmax p, `probabilities`) is the same in both.
        explore: share of the draws that ignore p: groups are drawn with probability (1 - explore) p + explore / (T+1),
            in training and while `sampling`; p is one-hot under a fixed assignment. So drawing stays a dropout, which
            helps small cohorts, while p is free to become certain. 0: none do.
    """

    _version = 2  # of the state_dict; 1 had `fixed_assignment` [K], -1: sampled
    _temperature: Tensor
    fixed_gates: Tensor
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
        super().__init__()
        self.group_names, self.init = group_names(tasks), init
        groups = len(self.group_names)
        self.logits = nn.Parameter(torch.empty(kernels, groups, device=device, dtype=dtype))
        self.register_buffer("_temperature", torch.empty((), device=device))
        # A buffer, so that a checkpoint of a constant mask is one.
        self.register_buffer("fixed_gates", torch.empty(kernels, groups, device=device))
        # How many draws could be learnt from: a resumed run goes on with the right step of every n.
        self.register_buffer("learning_steps", torch.empty((), dtype=torch.int64, device=device))
        self._foreseen = False  # was the next step looked at already (`_looks_everywhere`)?
        self.sampling = False
        self._every = 1
        self._noise_on = "log_p"
        self._explore = 0.0
        self.shares_grouping = False
        self._sharing: list[GroupGates] = []  # the layers that share this one's grouping (a list: no submodules)
        self.reset_grouping()
        self.estimator = estimator
        _made.add(self)

    @torch.no_grad()
    def reset_grouping(self) -> None:
        """As it is made: p as `init` says (drawn anew, where that is random), nothing fixed, temperature 1."""
        if not self.shares_grouping and not self.logits.is_meta:
            # p = 0 would be log 0; a thousandth of a percent can never be told from it in training.
            p = initial_probabilities(self.init, *self.logits.shape).clamp_min(1e-5)
            self.logits.copy_(p.log())
        self._temperature.fill_(1)
        self.fixed_gates.zero_()
        self.learning_steps.zero_()
        self._phase = 0  # learning_steps % every, known to the host
        self._now_assigned(False)

    @property
    def estimator(self) -> str | Estimator:
        return self._estimator

    @estimator.setter
    def estimator(self, estimator: str | Estimator) -> None:
        if isinstance(estimator, str) and estimator not in ESTIMATORS:
            raise ValueError(f"estimator={estimator!r} is unknown, expected one of {', '.join(ESTIMATORS)}")
        self._estimator = estimator
        self._rule = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
        self.logits.requires_grad_(self._rule.gates is not None)

    @property
    def every(self) -> int:
        return self._every

    @every.setter
    def every(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"every={steps!r}: expected a number of steps, at least 1")
        self._every = steps
        self._phase = 0 if self.learning_steps.is_meta else int(self.learning_steps) % steps

    @property
    def noise_on(self) -> str:
        return self._noise_on

    @noise_on.setter
    def noise_on(self, noise_on: str) -> None:
        if noise_on not in NOISE_ON:
            raise ValueError(f"noise_on={noise_on!r} is unknown, expected one of {', '.join(NOISE_ON)}")
        self._noise_on = noise_on

    @property
    def explore(self) -> float:
        return self._explore

    @explore.setter
    def explore(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"explore={share!r}: expected a share of the draws, 0 to 1")
        self._explore = float(share)

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
        return self._rule.gates is not None and not self.assigned and not self.shares_grouping

    @property
    def gates_dtype(self) -> torch.dtype:
        """At least float32."""
        return torch.promote_types(self.logits.dtype, torch.float32)

    def log_p(self) -> Tensor:
        """log p [K, T+1], at least float32."""
        return self._log_p_of(self.logits)

    def _log_p_of(self, logits: Tensor) -> Tensor:
        """Of logits that may be those of several layers like this one."""
        return logits.to(self.gates_dtype).log_softmax(1)

    def _log_drawn(self, log_p: Tensor) -> Tensor:
        """log of the probabilities with which the groups are drawn."""
        log_q = log_p if self._noise_on == "log_p" else log_p.exp().log_softmax(1)
        if self._explore:
            log_q = (log_q.exp() * (1 - self._explore) + self._explore / log_q.shape[1]).log()
        return log_q

    def probabilities(self) -> Tensor:
        """p [K, T+1] without gradient; one-hot under a fixed assignment."""
        log_p = self.log_p().detach()
        return one_hot(self.fixed_assignment, log_p.shape[1], log_p.dtype) if self.assigned else log_p.exp()

    @property
    def assigned(self) -> bool:
        """Is there a fixed assignment? `fixed_gates` says so, also where somebody else has written to it (an average of
        models, a checkpoint, another process). A device is asked only if it has been written to since."""
        fixed = self.fixed_gates
        # A graph keeps what it was compiled for. Under DistributedDataParallel buffers are written to in every step.
        if in_graph() or fixed.is_meta or (self.training and not fixed.is_cpu):
            return self._assigned
        if _content(fixed) != self._seen:
            self._now_assigned(bool((fixed.amax(1) > 0).all()))
        return self._assigned

    def _now_assigned(self, assigned: bool) -> None:
        self._assigned, self._seen = assigned, _content(self.fixed_gates)

    @property
    def fixed_assignment(self) -> Tensor:
        """int64 [K], the fixed group of each kernel; -1: sampled."""
        most, group = self.fixed_gates.max(1)
        return group.where(most > 0, -1)

    def assign(self, assignment: Tensor | Sequence[int] | None) -> None:
        """Fix the assignment, int [K] of group numbers; None: sample again. The logits then get no gradient (zeros)."""
        if self.shares_grouping:
            raise ValueError("this layer shares another layer's grouping: assign that one")
        if assignment is None:
            self.fixed_gates.zero_()
            self._now_assigned(False)
            return
        wanted = torch.as_tensor(assignment)
        kernels, groups = self.logits.shape
        if wanted.shape != (kernels,) or wanted.is_floating_point() or wanted.dtype == torch.bool:
            raise ValueError(
                f"assignment has shape {tuple(wanted.shape)} and dtype {wanted.dtype}, expected integers [{kernels}]"
            )
        if ((wanted < 0) | (wanted >= groups)).any():
            raise ValueError(f"assignment holds {wanted.tolist()}, expected groups 0 (shared) to {groups - 1}")
        fixed = self.fixed_gates
        fixed.copy_(one_hot(wanted.to(fixed.device, torch.int64), groups, fixed.dtype))
        self._now_assigned(True)

    def share_grouping(self, owner: GroupGates) -> None:
        """From now on this layer has no grouping of its own: it uses the owner's logits, and its input must bring the
        owner's draw (`conv(x, groups=...)`). All convolutions that write to one residual stream do so."""
        if owner.logits.shape != self.logits.shape or owner.group_names != self.group_names:
            raise ValueError(
                f"a layer of {tuple(self.logits.shape)} (kernels, groups) can't share the grouping of one of "
                f"{tuple(owner.logits.shape)}"
            )
        self.logits = owner.logits
        self.shares_grouping = True
        self._owner = (owner,)  # in a tuple: not a submodule
        owner._sharing.append(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module; but a move (`to_empty`, from the meta device) makes a new parameter in every module, and
        the logits are one for all that share them."""
        found = super()._apply(fn, recurse)
        for layer in (self._owner[0] if self.shares_grouping else self)._sharing:
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
            raise ValueError("this layer shares another layer's grouping: call it with groups=<the owner's draw>")
        tasks, groups = self.group_names[1:], len(self.group_names)
        draws = self.training or self.sampling
        if self.assigned:
            assignment = self.fixed_gates.argmax(1)
            gates = one_hot(assignment, groups, self.gates_dtype)
            if not draws or not self._explore:
                return FilterGroups.from_assignment(assignment, tasks, gates)
            log_p = gates.log()
        elif self._draws_by_formula():
            return _draw_by_formula([self])[0]
        else:
            log_p = self.log_p()
            draws = draws or self._rule.gates is None
        log_p = self._log_drawn(log_p) if draws else log_p
        samples = 0
        if self.training:  # as many numbers as a step that learns takes: with one seed both draw the same
            samples = self._rule.samples
            self._looks_everywhere(learns=False)
        return self._one_row_per_kernel(log_p, gumbel_noise(log_p, samples) if draws else None)

    def _draws_by_formula(self) -> bool:
        """Are the gates of a draw differentiable, or relaxed: made by the estimator's formula?"""
        if not self.training or self._rule.gates is None:
            return False
        learns = self._rule.relaxed or (self.logits.requires_grad and torch.is_grad_enabled())
        return learns and not self.assigned

    def _kind(self) -> tuple[Any, ...]:
        """Layers of the same kind can be drawn in one go."""
        logits = self.logits
        what = self.group_names, self._rule, self._noise_on, self._explore, self.every, self._phase
        return *what, logits.dtype, logits.device, logits.requires_grad

    def _looks_everywhere(self, learns: bool) -> bool:
        """Is this a step that looks at the groups that were not drawn? Every draw that `learns` is a step.

        Activation checkpointing runs a step twice, which must come to the same: reentrant, first without gradient, when
        the step to come is foreseen; or else again inside the backward pass, when it is the step that was."""
        if self.every == 1 or not self.logits.requires_grad:
            return True
        again = learns and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if again and not self._foreseen:
            return self._phase == 0
        phase = (self._phase + 1) % self.every
        self._foreseen = not learns
        if learns:
            self._phase = phase
            self.learning_steps += 1
        return phase == 0

    def _one_row_per_kernel(self, log_p: Tensor, noise: Tensor | None) -> FilterGroups:
        assignment, by_group = backends.sample(log_p, noise)
        gates = one_hot(assignment, len(self.group_names), log_p.dtype)
        return FilterGroups.from_assignment(assignment, self.group_names[1:], gates, by_group)

    def weight_of(self, groups: FilterGroups) -> Tensor:
        """The layer's `weight` for a step with these groups. If their gates don't want a gradient, the logits get zeros
        through it: data-parallel training counts on every parameter that requires a gradient to get one."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        if groups.learns or not self.logits.requires_grad or not torch.is_grad_enabled():
            return weight
        return _WithZeroGradient.apply(weight, self.logits)

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
        self._phase = 0 if self.learning_steps.is_meta else int(self.learning_steps) % self.every
        if self.shares_grouping:  # load_state_dict(assign=True) brings new parameters
            self.logits = self._owner[0].logits


# All gates there are, for what an optimiser may not do to their logits.
_made: weakref.WeakSet[GroupGates] = weakref.WeakSet()


def _tell_decay(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Before an optimiser's first step with these groups of parameters: a warning, if it would decay logits. (Decay
    draws p towards uniform, whatever is learnt, also under a fixed assignment.)"""
    groups = len(optimiser.param_groups)
    if torch.compiler.is_compiling() or _looked_at.get(optimiser) == groups:
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
    """What `draw` of one after the other gives, from the same random numbers. In training layers with the same
    estimator are drawn in one go, because a draw is many small operations; their logits get their gradients together,
    when those of all gates are there (zeros if a layer's gates have none)."""
    alike = all(layer._draws_by_formula() and not layer.shares_grouping for layer in layers)
    if layers and alike and all(layer._kind() == layers[0]._kind() for layer in layers):
        return _draw_by_formula(layers)
    return [layer.draw() for layer in layers]


def _draw_by_formula(layers: Sequence[GroupGates]) -> list[FilterGroups]:
    """Of different layers of one kind, all of which `_draws_by_formula` and have a grouping of their own."""
    first, several = layers[0], len(layers) > 1
    rule, every, tasks, groups = first._rule, first.every, first.group_names[1:], len(first.group_names)
    sizes = [layer.logits.shape[0] for layer in layers]
    logits: Tensor = torch.cat([layer.logits for layer in layers]) if several else first.logits
    log_p, temperature = first._log_drawn(first._log_p_of(logits)), first.temperature
    if several:
        of_layers = zip(layers, sizes, strict=True)
        temperature = torch.cat([layer.temperature.to(log_p).expand(size, 1) for layer, size in of_layers])
    noise = _noise_of_each(log_p, sizes, rule.samples)
    drawn_of = [backends.sample(*both) for both in zip(log_p.split(sizes), noise[0].split(sizes), strict=True)]
    assignments = [assignment for assignment, _ in drawn_of]
    drawn = one_hot(torch.cat(assignments) if several else assignments[0], groups, log_p.dtype)
    looks = [layer._looks_everywhere(log_p.requires_grad) for layer in layers]  # each counts its steps
    everywhere = all(looks)
    formula = rule.gates if everywhere or not rule.relaxed else straight_through
    assert formula is not None
    gates = formula(drawn, log_p, noise, temperature)
    all_gates = rule.all_gates and everywhere
    if not all_gates or every > 1:  # how often the gradient counts
        counts = every - (every - 1) * drawn if all_gates else drawn
        gates = gates.detach() + (gates - gates.detach()) * counts
    of_each = gates.split(sizes) if several else (gates,)
    if rule.relaxed and everywhere:
        return [FilterGroups.relaxed(one, tasks) for one in of_each]
    return [
        FilterGroups.from_assignment(assignment, tasks, one, by_group, all_gates)
        for (assignment, by_group), one in zip(drawn_of, of_each, strict=True)
    ]


def _content(fixed: Tensor) -> Any:
    """Something that changes whenever anybody writes to the tensor `fixed`. Of a tensor in memory it is the bytes,
    because writing through `.data` does not raise torch's version counter. Of a tensor on a device, whose values one
    would have to wait for, it is the tensor's identity and its version counter."""
    if fixed.is_cpu and not in_graph():
        return (fixed.float() if fixed.dtype is torch.bfloat16 else fixed).numpy().tobytes()
    return id(fixed), 0 if fixed.is_inference() else fixed._version


class _WithZeroGradient(torch.autograd.Function):
    """The weight, and zeros as gradient for the logits."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        ctx.like = (logits.shape, logits.dtype, logits.device)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> Any:
        shape, dtype, device = ctx.like
        return dw, torch.zeros(shape, dtype=dtype, device=device)
