"""Controls of a whole network. Each acts on every SFG layer of any module."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # torch has no public one; torch.export's documentation names this

from ..estimators import Estimator
from ..gates import GroupGates, draw_together
from ..groups import FilterGroups
from ..layer import SFGLayer
from ..norm import KernelNorm
from .parts import ChannelDropout


def sfg_layers(model: nn.Module) -> dict[str, SFGLayer]:
    """The SFG layers that have a grouping of their own, by name, in network order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SFGLayer) and not module.shares_grouping
    }


def assign(model: nn.Module, assignments: Mapping[str, Tensor | Sequence[int]] | None) -> None:
    """Fix the assignment of the named layers, {layer name: int [K]}. With None all layers draw again.

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
    """The most probable assignment of each layer, argmax p, int64 [K]; the fixed assignment where there is one.

    Warns (UserWarning) of layers in which more than a tenth of the kernels tie: there argmax means nothing.
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
    """Is any grouping drawn from a p that is not learnt? For such a network argmax p means nothing; it needs draws."""
    return any(layer.estimator == "none" and not layer.assigned for layer in sfg_layers(model).values())


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of the relaxation of all layers."""
    for layer in sfg_layers(model).values():
        layer.temperature = temperature


def set_estimator(model: nn.Module, name: str | Estimator, every: int = 1) -> None:
    """Choose the gradient estimator of all layers.

    Args:
        model: a network with SFG layers.
        name: a name of `estimators.ESTIMATORS`, or an `Estimator`, for example with another number of samples:
            `dataclasses.replace(ESTIMATORS["gumbel_rao"], samples=64)`.
        every: n. Only every n-th step looks at the groups that kernels were not drawn into, and the gradient from there
            counts n times. The other steps are as cheap as `selected`; the mean gradient over n steps is the same.

    Raises ValueError for an unknown name, or `every` less than 1.
    """
    for layer in sfg_layers(model).values():
        layer.estimator, layer.every = name, every


@torch.no_grad()
def pool_gradients(model: nn.Module, weight: float = 1.0) -> None:
    """Add to the gradient of every kernel's logits `weight` sqrt(K) times the mean gradient of the K kernels of its
    layer. Call it before the optimiser's step.

    The kernels of a layer are alike when training starts, so what the gates of one kernel say of a group holds for all
    of them. The gradient of one kernel is mostly noise of the draws; the mean gradient has sqrt(K) times less noise.
    Adam divides by the noise, so it moves p sooner where the whole layer is to become shared or specific. With `weight`
    1 both parts of the gradient have the same noise, so that kernels can still go to different groups.
    """
    for layer in sfg_layers(model).values():
        gradient = layer.logits.grad
        if gradient is not None and layer.learns_grouping:
            gradient += weight * len(gradient) ** 0.5 * gradient.mean(0)


def set_noise_on(model: nn.Module, noise_on: str) -> None:
    """Choose what the noise of all layers' draws is added to. With "log_p", the default and the paper's choice, groups
    are drawn with probability p; with "p", as in the authors' public code, with probability softmax(p). See
    `GroupGates`.

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
    """Inside the `with` layers draw assignments, also in `eval()`; fixed ones stay. A `ChannelDropout` of the network
    draws the channels that it drops."""
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
    """Inside the `with` the model is in `eval()`. At the end every module gets back the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the `with` normalisations use the statistics of each batch; the rest of the model stays in `eval()`. At
    the end the running statistics are what they were."""
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

    Nothing decays the logits of the groupings: decay would draw p towards uniform, whatever is learnt. As is usual,
    nothing decays biases and scales of normalisations, nor the parameters that a module names in `not_decayed`.

    Args:
        model: a network with SFG layers.
        weight_decay: the decay of all other parameters.
        lr: the learning rate of all groups but the logits; None: that of the optimiser.
        logits_factor: the logits' learning rate is `lr` times this factor. (p learns slowly; the training command has
            30.)

    Returns groups named "weights", "not_decayed" (with a decay) and "logits". They hold the parameters that require a
    gradient; a group without parameters is left out. Raises ValueError for a `logits_factor` without `lr`.
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
    """The two penalties of eq. 2: the sum of ||w||^2 over all SFG kernels, and the sum of the entropies H(p) in nats.

    Biases, norms, residual stacks, merges and heads are not SFG kernels. An entropy counts if its logits are learnt; a
    grouping that several layers share counts once.
    """
    layers = [module for module in model.modules() if isinstance(module, SFGLayer)]
    zero = next((layer.weight for layer in layers), torch.zeros(1)).new_zeros(())
    norms = [layer.weight.square().sum() for layer in layers]
    entropies = [entropy(layer).sum() for layer in layers if layer.learns_grouping]
    return torch.stack([zero, *norms]).sum(), torch.stack([zero, *(e.to(zero.dtype) for e in entropies)]).sum()


def entropy(layer: SFGLayer) -> Tensor:
    """The entropy H(p) = -sum p log p (eq. 1) of each kernel in nats, [K]."""
    log_p = layer.log_p()
    return -(log_p.exp() * log_p).sum(1)


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Any], drawn: bool = False, *, image: int | str | None = None
) -> None:
    """Re-estimate all running statistics from batches of images [N, C, H, W], or volumes [N, C, D, H, W]; all batches
    have the same weight.

    The running statistics of training are a mixture over draws, but a prediction by argmax p, and `freeze`, need those
    of this one assignment. So the statistics are estimated for argmax p, or the fixed assignment; with `drawn` for
    predictions by draws, where every batch is one draw. A network with separate stacks can't hold both: a stream
    without any kernel in argmax p has no variance, and its statistics would make the values of any draw that uses it
    huge.

    Args:
        model: a network with SFG layers.
        batches: a loader of images, or of tuples, lists or dicts that hold images. Images are moved to the model's
            device and dtype.
        drawn: whether the statistics are for predictions by draws.
        image: the index or key of the images in a batch; None: the first of a tuple or list.

    Raises ValueError if there is no batch, or a batch has no image or a value that is not finite. After any error the
    statistics are as before.
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
        if isinstance(module, SFGLayer) and module.norm is not None
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
    """The images of a batch of any form, on the device and in the dtype of the parameter `like`."""
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
    if not isinstance(found, Tensor) or found.dim() not in (4, 5):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise ValueError(
            f"recalibrate got a batch whose images have {what}, expected a tensor [N, C, H, W] or [N, C, D, H, W]"
        )
    if not torch.isfinite(found).all():
        raise ValueError("recalibrate got a batch with values that are NaN or infinite, expected images without")
    return found.to(like)


def norm_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all running statistics, by their names in the state_dict."""
    return {
        f"{prefix}.{name}": buffer.clone()
        for prefix, module in model.named_modules()
        if isinstance(module, KernelNorm | nn.modules.batchnorm._BatchNorm)
        for name, buffer in module.named_buffers()
    }


class Prediction(NamedTuple):
    """The prediction of one task: mean and variance over drawn architectures, each of the shape of the task's
    output."""

    mean: Tensor
    variance: Tensor

    @property
    def entropy(self) -> Tensor:
        """The entropy of the mean in nats, without dimension 1, for a task whose link gives probabilities of classes in
        dimension 1. It is large where each architecture is unsure, and where architectures contradict each other."""
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
    """The prediction of a multi-task model for images x [N, C, H, W], or volumes x [N, C, D, H, W]: {task: (mean,
    variance)}. If a task's output is several tensors in dicts, lists and tuples, mean and variance have the same form.

    Args:
        model: a network that returns {task: output}.
        x: the images, or volumes.
        draws: 0: the prediction of argmax p, with variance zero. S > 0: mean and variance (divided by S) over S drawn
            architectures. A constant p (estimator `none`) needs draws, because its argmax means nothing.
        links: functions that are applied to a task's output before averaging, e.g. {"organs": lambda y: y.softmax(1)}.
        statistics: normalisations use the "running" statistics of training; or those of this "batch", anew for each
            draw, as the authors' public code does. A prediction then depends on the other images of the batch.

    Raises ValueError for negative `draws`, draws = 0 with constant p, or another word for `statistics`.
    """
    if statistics not in ("running", "batch"):
        raise ValueError(f"statistics={statistics!r} is unknown, expected 'running' or 'batch'")
    if draws < 0:
        raise ValueError(f"draws={draws}: expected 0 (argmax p) or a number of draws")
    if draws == 0:
        if draws_from_constant_p(model):
            raise ValueError("draws=0: the grouping is drawn from a constant p, choose draws > 0")
        map_assignment(model)  # it warns of ties
    links = links or {}
    mean: dict[str, Any] = {}
    squares: dict[str, Any] = {}  # sums of squared deviations (Welford: large HU cancel nothing)
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
                    mean[task], squares[task] = y, _of_each(torch.zeros_like, y)
                else:
                    delta = _of_each(torch.sub, y, mean[task])
                    mean[task] = _of_each(lambda m, d, n=draw + 1: m + d / n, mean[task], delta)
                    squares[task] = _of_each(lambda s, d, y, m: s + d * (y - m), squares[task], delta, y, mean[task])
    return {task: Prediction(mean[task], _of_each(lambda s: s / max(draws, 1), squares[task])) for task in mean}


def _of_each(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """`function` of the corresponding tensors of several outputs of one form: tensors, or dicts, lists and tuples of
    tensors. What is no tensor (None) stays as it is."""

    def of_tensors(first: Any, *others: Any) -> Any:
        return function(first, *others) if isinstance(first, Tensor) else first

    return pytree.tree_map(of_tensors, *outputs)


def drawn_first(parts: Iterable[nn.Module], x: Any) -> Any:
    """Draw the groupings of all parts (`draw_together`), then pass x through one part after the other.

    A draw is many small operations. Between large operations, which leave the caches cold, they take twice as long,
    also in the backward pass.
    """
    parts = list(parts)
    return pass_through(parts, x, draws_of(parts))


def draws_of(parts: Iterable[nn.Module]) -> Iterator[FilterGroups]:
    """A draw for every layer of the parts that needs one (`draw_together`), in order, for `pass_through`."""
    return iter(draw_together([layer for part in parts for layer in _drawn(part)]))


def pass_through(parts: Iterable[nn.Module], x: Any, draws: Iterator[FilterGroups]) -> Any:
    """x behind one part after the other; `draws` has the next draws for their layers."""
    for part in parts:
        x = part(x, *(next(draws) for _ in _drawn(part)))
    return x


def _drawn(part: nn.Module) -> list[GroupGates]:
    """The layers of a part that need a draw: the part itself, or those that it names (`drawn`). A frozen layer needs
    none."""
    return [layer for layer in getattr(part, "drawn", [part]) if isinstance(layer, GroupGates)]
