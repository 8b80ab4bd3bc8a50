"""Compares a converted network with the module that it was made of, on several images."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..plain_ops import INSTEAD
from .controls import sfg_layers
from .functional import DROPOUTS
from .parts import PathDropout
from .record import AnotherWay, drops_paths, results_of

FIRST = "the example"


class Images(NamedTuple):
    """The images that both networks are run on.

    Attributes:
        example: the images that the module was recorded on, [N, C, H, W].
        noise: other images of the same shape.
        batch: two or three images, but not N.
        sizes: images of other heights and widths. At most three of those that the module takes are compared.
    """

    example: Tensor
    noise: Tensor
    batch: Tensor
    sizes: tuple[Tensor, ...]

    @classmethod
    def like(cls, example: Tensor) -> Images:
        """The images to compare on, made from an example [N, C, H, W]."""
        second = 1 + 2 * noise(example, 1)  # its mean and spread differ from those of `noise`
        n, c, *depth, height, width = example.shape
        wide, tall, odd = (height // 2, width + width // 2), (height + height // 2, width // 2), (height + 1, width + 1)
        square = (2 * height, 2 * width), (height + 32, width + 32)  # some networks take squares, or multiples of 32
        more = (height + 32, width + 64), (2 * height, 3 * width), (3 * height, 2 * width)
        sizes = (wide, tall, odd, *square, *more)
        others = (noise(example.new_empty(n, c, *depth, h, w), 2) for h, w in sizes if min(h, w))
        batch = torch.cat([example[:1], second[:1], second[:1].flip(-1)])[: 2 if n == 3 else 3]
        return cls(example, second, batch, tuple(others))


def noise(like: Tensor, seed: int) -> Tensor:
    """Gaussian noise of the shape, dtype and device of a tensor. The same seed gives the same noise."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


class _WithoutDropout(TorchFunctionMode):
    """Inside the `with` no dropout drops anything: the two networks would draw different masks."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        if function in DROPOUTS and all(isinstance(one, Tensor) for one in values[:1]):
            return values[0]
        if function in (F.dropout, F.dropout2d, F.dropout3d):  # SFG features have only these dropouts
            return values[0]
        return function(*args, **(kwargs or {}))


def check_equal(module: nn.Module, converted: fx.GraphModule, images: Images) -> None:
    """Raise ValueError unless, with all kernels shared, every task's output is the module's output, in `eval()` and
    `train()`."""
    try:
        _compare(module, converted, FIRST, images.example, False)
    except AnotherWay as error:
        raise ValueError(
            "convert: the forward pass does something else with one image than with several, expected an example of "
            "several images"
        ) from error
    _compare(module, converted, "noise", images.noise, False)
    _compare(module, converted, "another batch size", images.batch, False)
    _compare(module, converted, "a batch, in train()", images.batch, True)
    compared = 0
    for image in images.sizes:
        try:
            outputs(module, image, False)
        except Exception:  # the module doesn't take this size
            continue
        with suppress(AnotherWay):  # the converted network refuses this size by itself
            _compare(module, converted, f"an image of {image.shape[-2]} x {image.shape[-1]}", image, False)
            compared += 1
        if compared == 3:
            break


def _compare(module: nn.Module, converted: fx.GraphModule, name: str, image: Tensor, training: bool) -> None:
    twin = copy.deepcopy(converted)
    for layer in sfg_layers(twin).values():
        layer.assign(torch.zeros(layer.out_channels, dtype=torch.int64))
    expected = outputs(module, image, training)
    changed = outputs(module, image * (1 + 4 * torch.finfo(image.dtype).eps), training)
    allowed = [_allowed(*pair) for pair in zip(results_of(expected), results_of(changed), strict=True)]
    try:
        # On the first images an interpreter runs the graph, because it names what can't be done. Later the compiled
        # code runs, as it does for users.
        run = _Naming(twin) if name == FIRST else twin
        found: dict[str, Any] = outputs(run, image, training)
    except ValueError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"convert: on {name} the converted network fails: {error}") from error
    # In train() only the first task is compared: a module that draws (RReLU) draws for each task anew.
    for of_task in list(found.values())[: 1 if training else None]:
        for y, wanted, most in zip(results_of(of_task), results_of(expected), allowed, strict=True):
            _check_result(name, y, wanted, most)


def _allowed(expected: Tensor, changed: Tensor) -> float:
    """How far a result may be from `expected`. It is a share of the largest value, because sums are made in another
    order, and in half precision in another dtype. Batch statistics of few values magnify such differences; `changed`,
    the result for an image whose last bits are changed, shows how much."""
    scale, rounding = expected.nan_to_num().abs().max().item(), torch.finfo(expected.dtype).eps
    return max(1e-3, 8 * rounding) * scale + 8 * (changed - expected).nan_to_num().abs().max().item()


def _check_result(name: str, y: Tensor, expected: Tensor, allowed: float) -> None:
    same = y.shape == expected.shape and y.dtype == expected.dtype
    if not same or not torch.allclose(y, expected, rtol=0, atol=allowed, equal_nan=True):
        how = f"{y.dtype} {tuple(y.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
        if same:
            how = f"largest difference {(y - expected).abs().max():.3g}"
        elif y.dtype == expected.dtype:
            how += "; was a size made a plain number, as int(..) and range(..) do?"
        raise ValueError(
            f"convert: with all kernels shared the outputs differ from the module's on {name} ({how}), so it does "
            "something that was not seen"
        )


def outputs(network: Any, image: Tensor, training: bool) -> Any:
    """The outputs of a copy of the network for an image, without gradients. The network itself stays as it is."""
    twin = copy.deepcopy(network) if isinstance(network, nn.Module) else network
    twin.train(training)
    for child in twin.modules() if isinstance(twin, nn.Module) else ():
        if drops_paths(child) or isinstance(child, PathDropout):  # the two networks would drop other paths
            child.eval()
    with torch.no_grad(), torch.random.fork_rng([]), _WithoutDropout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # users are told of a ReLU behind a sum when they train
        torch.manual_seed(0)  # an activation may draw (RReLU)
        return twin(image.clone())


class _Naming(fx.Interpreter):
    """Runs the graph of a module node by node. A ValueError names the node that fails."""

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
        except TypeError as error:  # features raise it for what can't be done to them
            text = str(error).removesuffix(f": {INSTEAD}")
            what = getattr(n.target, "__name__", n.target)
            raise ValueError(f"convert: {what!r}: {text}; expected something else there in the module") from error
