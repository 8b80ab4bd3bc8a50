"""`convert` puts SFG layers in place of the convolutions of an existing network, and keeps its pretrained weights."""

from __future__ import annotations

import copy
import inspect
import itertools
import keyword
import random
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import numpy
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..groups import group_names
from .compare import Images, check_equal, noise, outputs
from .controls import sfg_layers
from .conversion_report import COPIED, Report
from .record import EXAMPLE_SIZES, base_of, differences, is_leaf, record, remove_unused, results_of
from .replacements import SFG_LAYERS
from .rewrite import REMOVE_HOOKS, Rewriting, hook_of


@overload
def convert(
    module: nn.Module,
    tasks: Mapping[str, int] | Iterable[str],
    skip: Iterable[str] = (),
    example: Tensor | None = None,
    *,
    strict: bool = False,
    report: Literal[False] = False,
    **options: Any,
) -> fx.GraphModule: ...


@overload
def convert(
    module: nn.Module,
    tasks: Mapping[str, int] | Iterable[str],
    skip: Iterable[str] = (),
    example: Tensor | None = None,
    *,
    strict: bool = False,
    report: Literal[True],
    **options: Any,
) -> tuple[fx.GraphModule, Report]: ...


def convert(
    module: nn.Module,
    tasks: Mapping[str, int] | Iterable[str],
    skip: Iterable[str] = (),
    example: Tensor | None = None,
    *,
    strict: bool = False,
    report: bool = False,
    **options: Any,
) -> fx.GraphModule | tuple[fx.GraphModule, Report]:
    """The same network for several tasks, with SFG layers in place of its convolutions and a head for each task.

    `module` is run on `example` in `eval()` and in `train()`, and its operations are recorded as a graph. Then:

    - Each `nn.Conv2d`, `nn.Conv3d`, `nn.ConvTranspose2d` and `nn.ConvTranspose3d` becomes an `SFGConv2d`, `SFGConv3d`,
      `SFGConvTranspose2d` or `SFGConvTranspose3d`. It takes over the batch, instance or group normalisation, the
      activation and, behind a ReLU, the 2x2 max-pooling of images that follow it, because these stand before the gate.
    - Convolutions whose outputs are added up (shortcuts) share one grouping.
    - A depthwise convolution takes the draw of its input.
    - A normalisation behind a sum becomes a `FeatureNorm`.
    - Concatenations, other pooling, interpolation, casts and scaling stay.
    - The last convolution, or everything behind the last feature map (pooling, flattening, linear layers), becomes a
      head for each task.
    - A module may return several tensors in dicts, lists and tuples (deep supervision, auxiliary outputs). Each task
      then has the same dicts, lists and tuples. A tensor among them that other layers read, too, is no head's output
      but features; the task gets what it reads of them.

    A subclass of a layer is treated by what it computes. The weights are those of `module`: with all kernels shared
    each task's output is the output of `module`, unless its head has another size. This is checked in `eval()` and
    `train()`, on other images, another batch size, and other image sizes if `module` takes them. Where the forward pass
    of `module` decides by a size (an `if`, a minimum), the converted network raises ValueError for images for which the
    decision would differ.

    Args:
        module: a network that takes images [N, C, H, W] or volumes [N, C, D, H, W] and returns a tensor, or tensors in
            dicts, lists and tuples. It is not changed.
        tasks: {name: number of outputs}; or names, whose heads have as many outputs as `module`. A head of another size
            starts with new weights. Of several tensors that `module` returns, the number is that of the first, and of
            all others that have as many channels as the first; the rest keep their channels.
        skip: names of modules to be left plain. They must stand before the SFG layers, because a plain convolution
            between SFG layers would mix what belongs to different tasks.
        example: images or volumes that `module` can run on, by default noise [1, C, 64, 64] or, if the first
            convolution is one for volumes, [1, C, 32, 32, 32].
        strict: whether to raise ValueError instead of a warning where convolutions other than the heads are copied for
            each task. They are copied if something stands before them that is not known to act on each channel alone.
        report: whether to return a `Report`, too, of what became of every convolution, and why.
        options: `init` and `estimator` of all SFG layers.

    Returns:
        A module that returns {task: output}, where an output is all that `module` returns; with `report` also the
        report. Modules have the names that they had in `module`.

    Raises:
        ValueError: for tasks, options and examples that can't be, and for everything that can't be converted, in one
            message with names: a norm other than batch, instance and group normalisation, one with running statistics
            of instances, a convolution that is used more than once, a sum with something of another shape or of
            features whose groupings differ, a product of two features without a factor that a convolution computes,
            single channels of features, max-pooling with indices, hooks, parts under `no_grad`, a function that does
            something else on another image or in `train()`, and more.
    """
    sizes = _sizes(tasks)
    skip = _checked(module, skip, options)
    with torch.inference_mode(False), torch.enable_grad():
        image = _example(module, example)
        images = Images.like(image)
        network, training = _copied(module).eval(), _in_training(module)
        modes = {child: before.training for child, before in zip(network.modules(), module.modules(), strict=True)}
        graph = _recorded(network, images.batch, example is None)
        in_training = _recorded_in_training(training, 0.7 * images.batch.flip(0), example is None)  # with other values
        told = set(differences(graph, in_training))

        rewriting = Rewriting(network, graph, told, tuple(sizes), skip, options, modes)
        rewriting.run()
        if rewriting.obstacles:
            raise ValueError(_together(rewriting.obstacles))
        converted = fx.GraphModule(network, graph)
        remove_unused(converted.graph)
        converted.graph.lint()
        converted.recompile()
        converted.meta["image"] = tuple(image.shape[1:])  # `freeze` runs the network on such an image
        check_equal(module, converted, images)
        _tell_copied(rewriting.report, strict)
        _resize_heads(converted, rewriting.sized, rewriting.main, sizes, image)
    converted.train(module.training)
    for child, mode in modes.items():
        child.training = mode
    return (converted, rewriting.report) if report else converted


# --- what is asked for ------------------------------------------------------------------------------------------------


def _sizes(tasks: Mapping[str, int] | Iterable[str]) -> dict[str, int | None]:
    """The number of outputs of each task; None stands for as many as the module has. Raises ValueError for a task with
    a name that no module can have, and for a size that is no positive number."""
    sizes: dict[str, int | None] = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(group_names(tasks)[1:])
    for name, size in sizes.items():
        has = any(hasattr(kind, str(name)) for kind in (nn.ModuleDict, nn.ParameterDict))
        taken = isinstance(name, str) and (keyword.iskeyword(name) or has or "." in name)
        if not isinstance(name, str) or not name or taken or name in vars(nn.ModuleDict()):
            raise ValueError(f"convert: a task can't be called {name!r}, which is no name that a module can have")
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"convert: tasks[{name!r}]={size!r}, expected a number of outputs, at least 1")
    return sizes


def _checked(module: nn.Module, skip: Iterable[str], options: Mapping[str, Any]) -> set[str]:
    """`skip` as a set. Raises ValueError for a module or an option that can't be converted at all."""
    if isinstance(skip, str):
        raise ValueError(f"convert: skip={skip!r} is one text, expected a sequence of names")
    if unknown := options.keys() - {"init", "estimator"}:
        raise ValueError(f"convert: unknown option {sorted(unknown)[0]!r}, expected init or estimator")
    if hasattr(module, "_orig_mod"):
        raise ValueError("convert: the module is compiled, expected the network itself: module._orig_mod")
    if sfg_layers(module):
        raise ValueError("convert: the module has SFG layers already, expected a plain network")
    lazy = (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
    if any(isinstance(one, lazy) for one in (*module.parameters(), *module.buffers())):
        raise ValueError("convert: the module has lazy layers without weights, expected that it was run once")
    fixed = {*vars(fx.GraphModule(nn.Module(), fx.Graph())), "self"}
    for name, _ in module.named_children():
        if name in fixed or hasattr(fx.GraphModule, name):
            raise ValueError(f"convert: a module is called {name!r}, as a part of torch.fx.GraphModule: rename it")
    return set(skip)


# --- images to record and to compare with -----------------------------------------------------------------------------


def _example(module: nn.Module, example: Tensor | None) -> Tensor:
    first: Any = next((child for child in module.modules() if isinstance(child, tuple(SFG_LAYERS))), None)
    if first is None:
        others = {type(child).__name__ for child in module.modules() if isinstance(child, nn.modules.conv._ConvNd)}
        found = f", but {', '.join(sorted(others))}" if others else ""
        raise ValueError(f"convert: the module has no convolution that can be an SFG layer{found}")
    if example is None:
        size = EXAMPLE_SIZES[first.weight.dim() - 2]
        return noise(first.weight.new_empty(1, first.in_channels, *size), 0)
    if not isinstance(example, Tensor) or example.dim() != first.weight.dim() or not example.numel():
        expected = "[N, C, H, W]" if first.weight.dim() == 4 else "[N, C, D, H, W]"
        found = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else f"type {type(example).__name__}"
        raise ValueError(f"convert: example has {found}, expected an image {expected}")
    return example.detach().clone()


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:  # a weight that a hook computes can't be copied
        hooked = [f"{name!r} has a hook ({hook})" for name, child in module.named_modules() if (hook := hook_of(child))]
        raise ValueError(
            f"convert: the module can't be copied ({'; '.join(hooked) or error}): {REMOVE_HOOKS}"
        ) from error


def _in_training(module: nn.Module) -> nn.Module:
    """A copy of the module in `train()`. Raises ValueError if a part of it stays in `eval()`, because `train()` of the
    converted network makes no such exceptions."""
    training = _copied(module).train()
    stays = [name for name, child in training.named_modules() if not child.training]
    if stays:
        raise ValueError(
            f"convert: train() of the module keeps {stays[0]!r} in eval(), which that of the converted network would "
            "not: expected a module without a train() of its own (call eval() on those parts of the converted network)"
        )
    return training


def _recorded_in_training(training: nn.Module, batch: Tensor, by_default: bool) -> fx.Graph:
    """The graph of the forward pass in `train()`. Raises ValueError if the forward pass changes more than the
    statistics of torch's norms, or draws random numbers of Python or NumPy; warns of tensors that it stores."""
    leaves = {name for name, child in training.named_modules(remove_duplicate=False) if is_leaf(child)}
    before = {name: value.clone() for name, value in training.state_dict().items()}
    drawn = random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    kept = {id(value) for child in training.modules() for value in vars(child).values()}
    graph = _recorded(training, batch, by_default)
    if drawn != (random.getstate(), numpy.random.get_state()[1].tolist()):  # type: ignore[index]
        raise ValueError(
            "convert: the forward pass draws random numbers in train(), which one recording can't hold: use "
            "nn.Dropout, or switch it off (a drop path of rate 0)"
        )
    norms = [node for node in graph.nodes if node.target in (F.batch_norm, torch.batch_norm)]
    for read in (one for node in norms for one in node.all_input_nodes if one.op == "get_attr"):
        leaves.add(str(read.target).rpartition(".")[0])  # the module calls F.batch_norm itself
    for name, value in training.state_dict().items():
        inside = any(name.startswith(f"{leaf}.") for leaf in leaves)
        if not inside and not torch.equal(value, before[name]):
            raise ValueError(
                f"convert: the forward pass changes {name!r} in train(), which the converted network would not: make "
                "it a module of torch.nn, or leave it out"
            )
    stored = [
        f"{name}.{key}".lstrip(".")
        for name, child in training.named_modules()
        for key, value in vars(child).items()
        if isinstance(value, Tensor) and id(value) not in kept
    ]
    if stored:
        warnings.warn(
            f"convert: the forward pass stores {stored[0]!r}, which the converted network won't", stacklevel=3
        )
    return graph


def _recorded(network: nn.Module, image: Tensor, by_default: bool) -> fx.Graph:
    try:
        return record(network, image)
    except ValueError as error:
        if str(error).startswith("convert:"):
            raise
        failure: Exception = error
    except (RuntimeError, TypeError, IndexError, AssertionError) as error:
        failure = error
    text = " ".join(str(failure).split())[:300]
    stands_in = " (noise, for want of an example)" if by_default else ""
    raise ValueError(
        f"convert: the module can't run on images of shape {tuple(image.shape[1:])}{stands_in}: "
        f"{type(failure).__name__}: {text}. Expected a network of one image; give one that it can run on: "
        "convert(.., example=image)"
    ) from failure


# --- what is told -----------------------------------------------------------------------------------------------------


def _together(obstacles: Iterable[str]) -> str:
    every = list(dict.fromkeys(obstacles))
    if len(every) == 1:
        return f"convert: {every[0]}"
    return f"convert: {len(every)} things stand in the way:\n" + "\n".join(f"- {one}" for one in every)


def _tell_copied(report: Report, strict: bool) -> None:
    """Warn (with `strict` raise ValueError) if convolutions before the heads are no SFG layers."""
    copied = [row for row in report if row.becomes == COPIED]
    if not copied:
        return
    names = ", ".join(repr(row.name) for row in copied[:5]) + (", .." if len(copied) > 5 else "")
    text = (
        f"convert: {len(copied)} of {len(report)} convolutions are no SFG layers, but copied for each task: {names}, "
        f"{copied[0].why}; convert(.., report=True) tells of each"
    )
    if strict:
        raise ValueError(text)
    warnings.warn(text, stacklevel=3)


def _resize_heads(
    converted: fx.GraphModule,
    names: Iterable[str],
    main: Iterable[int],
    sizes: Mapping[str, int | None],
    image: Tensor,
) -> None:
    """Give each task's output its size: put new layers in place of the layers in `names` where the module has another
    size. `main` are the numbers of the results that get this size. Raises ValueError if that is not possible."""
    for task, size in sizes.items():
        for name in (f"{one}.{task}" for one in names):
            if size is not None:
                converted.set_submodule(name, _resized(name, converted.get_submodule(name), size))
    try:
        found = outputs(converted, image, False)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"convert: heads of {sizes} can't be made: {error}") from error
    for task, size in sizes.items():
        results = results_of(found[task])
        for y in (results[number] for number in main):
            if size is not None and (y.dim() < 2 or y.shape[1] != size):
                raise ValueError(
                    f"convert: a head of {task!r} gives outputs {tuple(y.shape)}, expected {size} channels: something "
                    "behind the last layer decides how many they are, or there is no head because the module returns "
                    "features"
                )


def _resized(name: str, module: nn.Module, size: int) -> nn.Module:
    """The layer, or normalisation, if it has so many outputs; else a new one of the same kind that has."""
    base = base_of(module)
    now = next(getattr(module, key) for key in ("out_channels", "out_features", "num_features") if hasattr(module, key))
    if now == size or base is None:
        return module
    if nn.utils.parametrize.is_parametrized(module) or hook_of(module):
        raise ValueError(f"convert: {name!r} is parametrised or has hooks, so no head of {size} outputs can be made")
    names = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "eps", "momentum", "affine",
             "track_running_stats")  # fmt: skip
    options = {key: getattr(module, key) for key in names if key in inspect.signature(base).parameters}
    like = next(itertools.chain(module.parameters(), module.buffers()), torch.zeros(()))
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return base(size, **options).to(like)
    options["bias"] = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return base(module.in_features, size, **options).to(like)
    assert isinstance(module, nn.modules.conv._ConvNd)
    return base(module.in_channels, size, module.kernel_size, **options).to(like)
