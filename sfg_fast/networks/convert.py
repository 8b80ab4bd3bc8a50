"""An existing network with SFG layers in place of its convolutions, pretrained weights kept."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..groups import group_names
from .controls import sfg_layers
from .record import WITH_GRADIENT, differences, record
from .rewrite import COPIED, DROPOUTS, REMOVE_HOOKS, Report, Rewriting, hook_of


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
    """The same network for several tasks: every convolution an SFG layer, up to a head of its own for each task.

    `module` is run on `example` in `eval()` and in `train()`, and what it does is recorded as a graph: each `nn.Conv2d`
    becomes an `SFGConv2d` with the batch normalisation, the activation and, behind a ReLU, the 2x2 max-pooling that
    follow it, because these belong before the gate; what is added up shares one grouping (shortcuts); concatenations,
    other pooling, interpolation, casts, scaling stay; a batch normalisation that follows a sum becomes a `FeatureNorm`.
    Subclasses count as what they compute. The last convolution, or all that follows the last feature map (pooling,
    flattening, linear layers), becomes a head for each task. Weights are those of `module`: with all kernels shared
    each task's output is `module`'s, but for heads of another size. That is checked in `eval()` and `train()`, on other
    images, another batch size, and another image size if `module` takes one.

    Args:
        module: a network of one image [N, C, H, W] and one output. It is left alone.
        tasks: {name: number of outputs}, or names: as many outputs as `module` has. A head of another size starts anew.
        skip: names of modules to be left plain. They must stand before the SFG layers: a plain convolution in between
            would mix what belongs to different tasks.
        example: an image that `module` can run on, by default noise [1, C, 64, 64].
        strict: raise ValueError, instead of a warning, where convolutions other than the heads are copied for each task
            because something that is not known to act on each channel alone stands before them.
        report: return a `Report`, too: what became of every convolution, and why.
        options: of all SFG layers: `init`, `estimator`.

    Returns:
        A module that returns {task: output}; with `report` also the report. Modules have the names that they had in
        `module`.

    Raises:
        ValueError: for what can't be converted, all of it at once, by name: another norm than batch normalisation, a
            transposed or grouped convolution, a sum with something that is no feature of an SFG layer, hooks, a
            function that does something else on another image or in `train()`, ..
    """
    tasks = dict(tasks) if isinstance(tasks, Mapping) else dict.fromkeys(group_names(tasks)[1:])
    image = _example(module, example)
    images = _Images.like(image)
    network, training = _copied(module).eval(), _copied(module).train()
    modes = {child: before.training for child, before in zip(network.modules(), module.modules(), strict=True)}
    graph, _ = _recorded(network, image, example is None)
    in_training, _ = _recorded(training, images.batch, example is None)
    told = set(differences(graph, in_training))
    for node, other in zip(graph.nodes, in_training.nodes, strict=True):
        node.meta[WITH_GRADIENT] = other.meta.get(WITH_GRADIENT, True)  # in eval() it may do without

    rewriting = Rewriting(network, graph, told, tuple(tasks), set(skip), options, modes)
    rewriting.run()
    if rewriting.obstacles:
        raise ValueError(_together(rewriting.obstacles))
    converted = fx.GraphModule(network, graph)
    converted.graph.eliminate_dead_code()
    converted.graph.lint()
    converted.recompile()
    _check_equal(module, converted, images)
    _tell_copied(rewriting.report, strict)
    for task, size in tasks.items():
        for name in (f"{one}.{task}" for one in rewriting.sized):
            if size is not None:
                converted.set_submodule(name, _resized(converted.get_submodule(name), size))
    converted.train(module.training)
    for child, mode in modes.items():
        child.training = mode
    return (converted, rewriting.report) if report else converted


# --- images to record and to compare with -----------------------------------------------------------------------------


class _Images(NamedTuple):
    """example: [N, C, H, W]; noise: of the same shape; batch: more of them, at least two; sizes: of other heights and
    widths, the first that the network takes is compared."""

    example: Tensor
    noise: Tensor
    batch: Tensor
    sizes: tuple[Tensor, ...]

    @classmethod
    def like(cls, example: Tensor) -> _Images:
        noise = 1 + 2 * _noise(example, 1)  # of another mean and spread, too
        n, c, height, width = example.shape
        sizes = ((height // 2, width + width // 2), (height + 32, width + 64), (2 * height, 3 * width))
        others = (_noise(example.new_empty(n, c, h, w), 2) for h, w in sizes if h)
        return cls(example, noise, torch.cat([example, noise, noise.flip(-1)]), tuple(others))


def _example(module: nn.Module, example: Tensor | None) -> Tensor:
    first = next((child for child in module.modules() if isinstance(child, nn.Conv2d)), None)
    if first is None:
        others = {type(child).__name__ for child in module.modules() if isinstance(child, nn.modules.conv._ConvNd)}
        found = f", but {', '.join(sorted(others))}" if others else ""
        raise ValueError(f"convert: the module has no nn.Conv2d{found}")
    if example is None:
        return _noise(first.weight.new_empty(1, first.in_channels, 64, 64), 0)
    if example.dim() != 4:
        raise ValueError(f"convert: example has shape {tuple(example.shape)}, expected an image [N, C, H, W]")
    return example.detach()


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:  # a weight that a hook computes is no parameter
        hooked = [f"{name!r} has a hook ({hook})" for name, child in module.named_modules() if (hook := hook_of(child))]
        raise ValueError(
            f"convert: the module can't be copied ({'; '.join(hooked) or error}): {REMOVE_HOOKS}"
        ) from error


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _recorded(network: nn.Module, image: Tensor, by_default: bool) -> tuple[fx.Graph, Tensor]:
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
        f"convert: the module can't run on an image of shape {tuple(image.shape)}{stands_in}: "
        f"{type(failure).__name__}: {text}. Expected a network of one image; give one that it can run on: "
        "convert(.., example=image)"
    ) from failure


# --- is it the same network? ------------------------------------------------------------------------------------------


class _WithoutDropout(TorchFunctionMode):
    """Nothing drops: what is drawn would differ."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in DROPOUTS:
            return args[0] if args else kwargs["input"]
        return function(*args, **(kwargs or {}))


def _check_equal(module: nn.Module, converted: fx.GraphModule, images: _Images) -> None:
    """With all kernels shared every task's output is what the module gives, in `eval()` and `train()`."""
    for name, image, training in (
        ("the example", images.example, False),
        ("noise", images.noise, False),
        ("another batch size", images.batch, False),
        ("a batch, in train()", images.batch, True),
    ):
        _compare(module, converted, name, image, training)
    for image in images.sizes:
        try:
            _outputs(module, image, False)
        except Exception:  # whatever the module may say of a size that it doesn't take
            continue
        _compare(module, converted, f"an image of {image.shape[2]} x {image.shape[3]}", image, False)
        break


def _compare(module: nn.Module, converted: fx.GraphModule, name: str, image: Tensor, training: bool) -> None:
    twin = copy.deepcopy(converted)
    for layer in sfg_layers(twin).values():
        layer.assign(torch.zeros(layer.out_channels, dtype=torch.int64))
    expected = _outputs(module, image, training)
    # Of the largest output: sums are made in another order, and in half precision in another dtype. Batch statistics of
    # few values magnify that, which a change of the last bits of the image shows.
    scale = expected.nan_to_num().abs().max().item()
    rounding = torch.finfo(expected.dtype).eps
    changed = _outputs(module, image * (1 + 4 * torch.finfo(image.dtype).eps), training)
    allowed = max(1e-3, 8 * rounding) * scale + 8 * (changed - expected).nan_to_num().abs().max().item()
    try:
        found: dict[str, Tensor] = _outputs(_Naming(twin), image, training)
    except ValueError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"convert: on {name} the converted network fails: {error}") from error
    for y in found.values():
        if y.shape != expected.shape or not torch.allclose(y, expected, rtol=0, atol=allowed, equal_nan=True):
            how = f"shapes {tuple(y.shape)} and {tuple(expected.shape)}"
            if y.shape == expected.shape:
                how = f"largest difference {(y - expected).abs().max():.3g}"
            raise ValueError(
                f"convert: with all kernels shared the outputs differ from the module's on {name} ({how}), so it does "
                "something that was not seen"
            )


def _outputs(network: Any, image: Tensor, training: bool) -> Any:
    """Of a copy, which is left as it was."""
    twin = copy.deepcopy(network) if isinstance(network, nn.Module) else network
    twin.train(training)
    with torch.no_grad(), _WithoutDropout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ReLU behind a sum: whoever trains it is told
        return twin(image)


class _Naming(fx.Interpreter):
    """Runs a graph, and says where it can't."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def train(self, mode: bool) -> None:
        assert isinstance(self.module, nn.Module)
        self.module.train(mode)

    def __call__(self, image: Tensor) -> Any:
        return self.run(image)

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except TypeError as error:  # of features, on what can't be done to them
            raise ValueError(f"convert: {getattr(n.target, '__name__', n.target)!r}: {error}") from error


# --- what is told -----------------------------------------------------------------------------------------------------


def _together(obstacles: Iterable[str]) -> str:
    every = list(dict.fromkeys(obstacles))
    if len(every) == 1:
        return f"convert: {every[0]}"
    return f"convert: {len(every)} things stand in the way:\n" + "\n".join(f"- {one}" for one in every)


def _tell_copied(report: Report, strict: bool) -> None:
    """A warning (`strict`: ValueError) if convolutions in front of the heads are no SFG layers."""
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


def _resized(module: nn.Module, size: int) -> nn.Module:
    """A layer, or a normalisation behind it, for so many outputs; a new one, if it had another number."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        if module.num_features == size:
            return module
        affine, tracks = module.affine, module.track_running_stats
        like = next(itertools.chain(module.parameters(), module.buffers()), torch.zeros(()))
        return type(module)(size, module.eps, module.momentum, affine, tracks).to(like)
    if isinstance(module, nn.Linear):
        if module.out_features == size:
            return module
        return nn.Linear(module.in_features, size, module.bias is not None).to(module.weight)
    assert isinstance(module, nn.modules.conv._ConvNd)
    if module.out_channels == size:
        return module
    names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    options = {name: getattr(module, name) for name in names if name in inspect.signature(type(module)).parameters}
    return type(module)(module.in_channels, size, bias=module.bias is not None, **options).to(module.weight)
