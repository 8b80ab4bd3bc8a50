"""Is a converted network the module that it was made of? On which images that is looked at, and how."""

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
from .record import AnotherWay
from .rewrite import DROPOUTS

FIRST = "the example"


class Images(NamedTuple):
    """example: [N, C, H, W]; noise: of the same shape; batch: two or three, but not N; sizes: of other heights and
    widths, of which those that the network takes are compared, at most three."""

    example: Tensor
    noise: Tensor
    batch: Tensor
    sizes: tuple[Tensor, ...]

    @classmethod
    def like(cls, example: Tensor) -> Images:
        second = 1 + 2 * noise(example, 1)  # of another mean and spread, too
        n, c, height, width = example.shape
        wide, tall, odd = (height // 2, width + width // 2), (height + height // 2, width // 2), (height + 1, width + 1)
        square = (2 * height, 2 * width), (height + 32, width + 32)  # for who wants squares, or multiples
        more = (height + 32, width + 64), (2 * height, 3 * width), (3 * height, 2 * width)
        sizes = (wide, tall, odd, *square, *more)
        others = (noise(example.new_empty(n, c, h, w), 2) for h, w in sizes if min(h, w))
        batch = torch.cat([example[:1], second[:1], second[:1].flip(-1)])[: 2 if n == 3 else 3]
        return cls(example, second, batch, tuple(others))


def noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


class _WithoutDropout(TorchFunctionMode):
    """Nothing drops: what is drawn would differ."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        if function in DROPOUTS and all(isinstance(one, Tensor) for one in values[:1]):
            return values[0]
        if function in (F.dropout, F.dropout2d):  # of features: others can't be
            return values[0]
        return function(*args, **(kwargs or {}))


def check_equal(module: nn.Module, converted: fx.GraphModule, images: Images) -> None:
    """With all kernels shared every task's output is what the module gives, in `eval()` and `train()`."""
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
        except Exception:  # whatever the module may say of a size that it doesn't take
            continue
        with suppress(AnotherWay):  # which whoever runs it will be told as well
            _compare(module, converted, f"an image of {image.shape[2]} x {image.shape[3]}", image, False)
            compared += 1
        if compared == 3:
            break


def _compare(module: nn.Module, converted: fx.GraphModule, name: str, image: Tensor, training: bool) -> None:
    twin = copy.deepcopy(converted)
    for layer in sfg_layers(twin).values():
        layer.assign(torch.zeros(layer.out_channels, dtype=torch.int64))
    expected = outputs(module, image, training)
    # Of the largest output: sums are made in another order, and in half precision in another dtype. Batch statistics of
    # few values magnify that, which a change of the last bits of the image shows.
    scale = expected.nan_to_num().abs().max().item()
    rounding = torch.finfo(expected.dtype).eps
    changed = outputs(module, image * (1 + 4 * torch.finfo(image.dtype).eps), training)
    allowed = max(1e-3, 8 * rounding) * scale + 8 * (changed - expected).nan_to_num().abs().max().item()
    try:
        # Its code as anybody runs it, but for the first time, when what can't be done is named.
        run = _Naming(twin) if name == FIRST else twin
        found: dict[str, Tensor] = outputs(run, image, training)
    except ValueError:
        raise
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"convert: on {name} the converted network fails: {error}") from error
    # In train() of the first task alone: what a module of its own draws is drawn for each.
    for y in list(found.values())[: 1 if training else None]:
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
    """Of a copy, which is left as it was."""
    twin = copy.deepcopy(network) if isinstance(network, nn.Module) else network
    twin.train(training)
    with torch.no_grad(), torch.random.fork_rng([]), _WithoutDropout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ReLU behind a sum: whoever trains it is told
        torch.manual_seed(0)  # an activation may draw (RReLU)
        return twin(image.clone())


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
            text = str(error).removesuffix(f": {INSTEAD}")
            what = getattr(n.target, "__name__", n.target)
            raise ValueError(f"convert: {what!r}: {text}; expected something else there in the module") from error
