"""Controls of a whole network: they act on every SFG layer of any module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..estimators import Estimator
from ..gates import GroupGates, draw_together
from ..layers.streams import RoutedBlock
from ..norm import KernelNorm
from ..reference import SFGConv2d
from .parts import ChannelDropout


def sfg_layers(model: nn.Module) -> dict[str, SFGConv2d]:
    """The SFG layers that have a grouping of their own, by name, in network order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SFGConv2d) and not module.shares_grouping
    }


def assign(model: nn.Module, assignments: Mapping[str, Tensor | Sequence[int]] | None) -> None:
    """Fix the assignment of the named layers ({layer name: int [K]}); None: all layers sample again.

    Raises KeyError for a name that is no SFG layer with a grouping of its own.
    """
    layers = sfg_layers(model)
    if assignments is None:
        for layer in layers.values():
            layer.assign(None)
        return
    for name in assignments:
        if name not in layers:
            raise KeyError(f"{name!r} is no SFG layer with a grouping of its own, expected one of {', '.join(layers)}")
    for name, assignment in assignments.items():
        layers[name].assign(assignment)


def map_assignment(model: nn.Module) -> dict[str, Tensor]:
    """The most probable assignment, argmax p, of each layer; a fixed one where there is one.

    Warns (UserWarning) where more than a tenth of the kernels tie: argmax then means nothing.
    """
    p = {name: layer.probabilities() for name, layer in sfg_layers(model).items()}
    top = {name: values.topk(2, 1).values for name, values in p.items()}
    ties = {name: (t[:, 0] - t[:, 1] < 1e-6).float().mean().item() for name, t in top.items()}
    tied = [f"{name!r} ({share:.0%})" for name, share in ties.items() if share > 0.1]
    if tied:
        warnings.warn(
            f"the most probable group is a tie for many kernels of {', '.join(tied)}; "
            "evaluate by draws instead: predict(model, x, draws=16)",
            stacklevel=3,
        )
    return {name: values.argmax(1) for name, values in p.items()}


def draws_from_constant_p(model: nn.Module) -> bool:
    """Is any grouping drawn from a p that is not learnt? Then argmax p means nothing, only draws do."""
    return any(layer.estimator == "none" and not layer.assigned for layer in sfg_layers(model).values())


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of the relaxation of all layers."""
    for layer in sfg_layers(model).values():
        layer.temperature = temperature


def set_estimator(model: nn.Module, name: str | Estimator, every: int = 1) -> None:
    """Choose the gradient estimator of all layers: a name of `estimators.ESTIMATORS`, or an `Estimator` (another number
    of samples: `dataclasses.replace(ESTIMATORS["gumbel_rao"], samples=64)`).

    `every` = n > 1: only every n-th step looks at the groups that kernels were not drawn into (and what it finds counts
    n times); the steps between are as cheap as `selected`, the mean over n steps is the same.
    Raises ValueError for an unknown name, or `every` less than 1.
    """
    for layer in sfg_layers(model).values():
        layer.estimator, layer.every = name, every


@torch.no_grad()
def pool_gradients(model: nn.Module, weight: float = 1.0) -> None:
    """Before an optimiser's step: add to the gradient of every kernel's logits `weight` sqrt(K) times the mean gradient
    of the K kernels of its layer.

    The kernels of a layer are alike when training starts, so what the gates say of a group is of interest to all of
    them. One kernel's gradient is mostly the noise of draws; of the mean there is sqrt(K) times less, and Adam, which
    divides by the noise, moves p sooner where the whole layer is to become shared or specific. With `weight` 1 the
    noise of both parts is alike, so that kernels can still part.
    """
    for layer in sfg_layers(model).values():
        gradient = layer.logits.grad
        if gradient is not None and layer.learns_grouping:
            gradient += weight * len(gradient) ** 0.5 * gradient.mean(0)


def set_noise_on(model: nn.Module, noise_on: str) -> None:
    """Choose what the noise of all layers' draws is added to: "log_p" (the default, the paper's: groups are drawn with
    probability p), or "p", as the authors' public code has it: with probability softmax(p). See `GroupGates`.

    Raises ValueError for another word.
    """
    for layer in sfg_layers(model).values():
        layer.noise_on = noise_on


def set_explore(model: nn.Module, share: float) -> None:
    """Choose which share of all layers' draws ignores p, or the fixed assignment: groups are drawn with probability
    (1 - share) p + share / (T+1), in training and while `sampling`. See `GroupGates`.

    Raises ValueError unless it is 0 to 1.
    """
    for layer in sfg_layers(model).values():
        layer.explore = share


@contextlib.contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """Draw assignments inside the `with`, also in `eval()` (fixed ones stay); and channels to drop, if the network has
    a dropout (`ChannelDropout`)."""
    layers: list[Any] = [*sfg_layers(model).values()]
    layers += [m for m in model.modules() if isinstance(m, ChannelDropout)]
    before = [layer.sampling for layer in layers]
    for layer in layers:
        layer.sampling = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.sampling = value


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`eval()` inside the `with`; after it every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, which is in `eval()`, normalisations use the statistics of each batch. After it the running
    ones are what they were."""
    norms = [m for m in model.modules() if isinstance(m, KernelNorm | nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, *, lr: float | None = None, logits_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Groups of parameters for any optimiser of torch: `AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-3)`.

    Nothing decays the logits of the groupings: decay would draw p towards uniform, whatever is learnt. Nor biases and
    scales of normalisations, as is usual, nor what a module calls `not_decayed`; `weight_decay` is for the rest.
    `lr`: a learning rate for all groups; the logits' is `logits_factor` times as large (p learns slowly; the training
    command takes 10).

    Returns groups named "weights", with a decay "not_decayed", and "logits", of the parameters that require a gradient;
    none is empty. Raises ValueError for a `logits_factor` without `lr`.
    """
    if lr is None and logits_factor != 1:
        raise ValueError(f"logits_factor={logits_factor}: expected lr, too, which it multiplies")
    logits = {id(layer.logits): layer.logits for layer in sfg_layers(model).values()}
    spared = {id(getattr(one, name)) for one in model.modules() for name in getattr(one, "not_decayed", ())}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "not_decayed": [], "logits": []}
    for parameter in model.parameters():
        decays = not weight_decay or (parameter.dim() > 1 and id(parameter) not in spared)
        kind = "logits" if id(parameter) in logits else "weights" if decays else "not_decayed"
        if parameter.requires_grad:
            groups[kind].append(parameter)
    rates = {} if lr is None else dict.fromkeys(groups, lr) | {"logits": lr * logits_factor}
    return [
        {
            "params": parameters,
            "name": name,
            "weight_decay": weight_decay if name == "weights" else 0.0,
            **({"lr": rates[name]} if rates else {}),
        }
        for name, parameters in groups.items()
        if parameters
    ]


def penalties(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The two sums of eq. 2 over SFG kernels: (sum of ||w||^2, sum of entropies H(p) in nats).

    Biases, norms, stacks, merges and heads are not SFG kernels. Entropies count where the logits are learnt; a grouping
    that several layers share is one variable and counts once.
    """
    layers = [module for module in model.modules() if isinstance(module, SFGConv2d)]
    zero = next((layer.weight for layer in layers), torch.zeros(1)).new_zeros(())
    norms = [layer.weight.square().sum() for layer in layers]
    entropies = [entropy(layer).sum() for layer in layers if layer.learns_grouping]
    return torch.stack([zero, *norms]).sum(), torch.stack([zero, *(e.to(zero.dtype) for e in entropies)]).sum()


def entropy(layer: SFGConv2d) -> Tensor:
    """H(p) = -sum p log p of each kernel in nats, [K]."""
    log_p = layer.log_p()
    return -(log_p.exp() * log_p).sum(1)


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Any], drawn: bool = False, *, image: int | str | None = None
) -> None:
    """Re-estimate all running statistics from images [N, C, H, W], all batches alike.

    batches: a loader of images, or of tuples, lists or dicts that hold them: `image` says where (an index or a key; by
    default the first of a tuple or list). Images are moved to the model's device
    and dtype.

    For argmax p (or the fixed assignment): running statistics of training are a mixture over draws, and the `map`
    evaluation and a freeze need those of the very assignment. With `drawn` for predictions by draws instead: every
    batch is one draw. A network with separate stacks holds one of the two: a stream that argmax p leaves without a
    kernel has no spread at all, and its statistics would blow up any draw that uses it.
    If anything fails the statistics are as before. Raises ValueError if there is no batch, no image in one, or
    one that is not finite.
    """
    layers = sfg_layers(model)
    like = next(model.parameters())
    free = [layer for layer in layers.values() if not layer.assigned]
    norms = [m for m in model.modules() if isinstance(m, KernelNorm | nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    before = norm_buffers(model)
    best = None if drawn else map_assignment(model)
    by_logits = {} if best is None else {layer.logits: best[name] for name, layer in layers.items()}
    best_of = {
        module.norm: by_logits.get(module.logits)
        for module in model.modules()
        if isinstance(module, SFGConv2d) and module.norm is not None
    }
    try:
        with evaluating(model):
            if best is not None:
                assign(model, best)
            for norm in norms:
                norm.train()
                if isinstance(norm, KernelNorm):
                    norm.forget(None if best is None else best_of.get(norm))
                    norm.momentum = 0.0  # the rate is max(1/n, momentum)
                else:
                    norm.reset_running_stats()
                    norm.momentum = None
            count = 0
            with sampling(model) if drawn else contextlib.nullcontext():
                for count, batch in enumerate(batches, 1):  # noqa: B007
                    model(_image_in(batch, image, like))
        if not count:
            raise ValueError("recalibrate got no batch, expected at least one")
    except BaseException:
        model.load_state_dict(before, strict=False)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for layer in free:
            layer.assign(None)


def _image_in(batch: Any, where: int | str | None, like: Tensor) -> Tensor:
    """The image of a batch, whatever a loader gives, on the device and in the dtype of a parameter."""
    found = batch
    if isinstance(batch, Mapping) and where is None:
        keys = ", ".join(map(repr, batch))
        raise ValueError(f"recalibrate got a batch that is a dict of {keys}: expected image=<the key of the images>")
    if isinstance(batch, Mapping | tuple | list):
        try:
            found = batch[0 if where is None else where]  # type: ignore[index]
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"recalibrate: image={where!r} is not in a batch that is a {type(batch).__name__}"
            ) from error
    if not isinstance(found, Tensor) or found.dim() != 4:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise ValueError(f"recalibrate got a batch whose images have {what}, expected a tensor [N, C, H, W]")
    if not torch.isfinite(found).all():
        raise ValueError("recalibrate got a batch with values that are NaN or infinite, expected images without")
    return found.to(like)


def norm_buffers(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all running statistics, by their names in the state_dict."""
    return {
        f"{prefix}.{name}": buffer.clone()
        for prefix, module in model.named_modules()
        if isinstance(module, KernelNorm | nn.modules.batchnorm._BatchNorm)
        for name, buffer in module.named_buffers()
    }


class Prediction(NamedTuple):
    """Of one task, over drawn architectures."""

    mean: Tensor
    variance: Tensor

    @property
    def entropy(self) -> Tensor:
        """Of a task whose link gives probabilities (of classes, dimension 1): H(mean p) in nats, without that
        dimension. It is large where each architecture is unsure, and where they contradict one another."""
        return -torch.xlogy(self.mean, self.mean).sum(1)


@torch.no_grad()
def predict(
    model: nn.Module,
    x: Tensor,
    draws: int = 0,
    links: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    *,
    statistics: str = "running",
) -> dict[str, Prediction]:
    """Prediction of a multi-task model, {task: (mean, variance)}, each as the model's own output.

    draws = 0: argmax p (`map`), variance zero. draws = S > 0: mean and variance (divided by S) over S drawn
    architectures. Constant p (estimator `none`) has no meaningful argmax and needs draws.
    `links` are applied to a task's output before averaging, e.g. {"organs": lambda y: y.softmax(1)}.
    `statistics`: what normalisations use, the "running" ones of training; or those of this "batch", as the authors'
    public code does (of each draw its own): a prediction then depends on what else is in the batch.
    Raises ValueError for negative `draws`, draws = 0 with constant p, or another word for `statistics`.
    """
    if statistics not in ("running", "batch"):
        raise ValueError(f"statistics={statistics!r} is unknown, expected 'running' or 'batch'")
    if draws < 0:
        raise ValueError(f"draws={draws}: expected 0 (argmax p) or a number of draws")
    if draws == 0:
        if draws_from_constant_p(model):
            raise ValueError("draws=0: the grouping is drawn from a constant p, choose draws > 0")
        map_assignment(model)  # for its warning
    links = links or {}
    mean: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}  # sums of squared deviations (Welford: no cancellation for HU offsets)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if draws:
            stack.enter_context(sampling(model))
        if statistics == "batch":
            stack.enter_context(_batch_statistics(model))
        for draw in range(max(draws, 1)):
            for task, y in model(x).items():
                y = links[task](y) if task in links else y
                if draw == 0:
                    mean[task], squares[task] = y, torch.zeros_like(y)
                else:
                    delta = y - mean[task]
                    mean[task] = mean[task] + delta / (draw + 1)
                    squares[task] = squares[task] + delta * (y - mean[task])
    return {task: Prediction(mean[task], squares[task] / max(draws, 1)) for task in mean}


def drawn_first(parts: Iterable[nn.Module], x: Any) -> Any:
    """x through one after the other, when all groupings are drawn (`draw_together`): between large operations, which
    leave the caches cold, the small ones of a draw take twice as long; backward, too."""
    parts = list(parts)
    layers = [part.conv1 if isinstance(part, RoutedBlock) else part for part in parts]
    groups = iter(draw_together([layer for layer in layers if isinstance(layer, GroupGates)]))
    for part, layer in zip(parts, layers, strict=True):
        x = part(x, next(groups)) if isinstance(layer, GroupGates) else part(x)
    return x
