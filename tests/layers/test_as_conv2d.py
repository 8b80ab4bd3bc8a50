"""What users rely on in `nn.Conv2d`, with all kernels shared: the same numbers from nn.Conv2d, SFGConv2d and its
reference."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import sfg_fast
from sfg_fast import SFGConv2d, reference

MAKERS = {"nn.Conv2d": nn.Conv2d, "SFGConv2d": SFGConv2d, "reference": reference.SFGConv2d}


class Kind:
    """One of the three layers, made and read alike."""

    def __init__(self, name):
        self.layer, self.sfg = MAKERS[name], name != "nn.Conv2d"

    def make(self, *args, **options):
        torch.manual_seed(3)
        layer = self.layer(*args, **options)
        if self.sfg:
            layer.assign(torch.zeros(layer.out_channels, dtype=torch.int64))
        return layer

    def read(self, y):
        """The output as nn.Conv2d has it: what the shared group holds."""
        return y.dense("shared") if self.sfg else y

    def __call__(self, layer, x):
        return self.read(layer(x))

    def own(self, layer):
        """Its parameters, those of the gates aside."""
        return {name: p for name, p in layer.named_parameters() if "logits" not in name}


def image(*shape, **options):
    torch.manual_seed(4)
    return torch.randn(*(shape or (2, 3, 9, 8)), **options)


def forward(*args, size=(2, 3, 9, 8), **options):
    """A behaviour: construct with these arguments, and convolve."""
    return lambda kind: [kind(kind.make(*args, **options), image(*size))]


def gradients(kind, layer, x):
    kind(layer, x).sin().sum().backward()
    return [p.grad for p in kind.own(layer).values()]


def backward(kind):
    x = image(requires_grad=True)
    return [*gradients(kind, kind.make(3, 6, 3, padding=1), x), x.grad]


def twice(kind):
    layer = kind.make(3, 3, 3, padding=1)
    y = kind(layer, kind(layer, image()))
    y.square().sum().backward()
    return [y, layer.weight.grad]


def accumulated(kind):
    layer = kind.make(3, 6, 3)
    gradients(kind, layer, image())
    return gradients(kind, layer, image(1, 3, 5, 5))


def frozen(kind):
    layer = kind.make(3, 6, 3).requires_grad_(False)
    x = image(requires_grad=True)
    y = kind(layer, x)
    y.sum().backward()
    return [y.requires_grad, x.grad, layer.weight.grad is None]


def only_the_bias(kind):
    layer = kind.make(3, 6, 3)
    layer.weight.requires_grad_(False)
    kind(layer, image()).sum().backward()
    return [layer.bias.grad, layer.weight.grad is None]


def without_gradient(kind):
    with torch.no_grad():
        y = kind(kind.make(3, 6, 3), image())
    return [y, y.requires_grad]


def inference(kind):
    with torch.inference_mode():
        y = kind(kind.make(3, 6, 3), image())
        return [y.clone(), y.is_inference()]


def deepcopied(kind):
    layer = kind.make(3, 6, 3)
    again = copy.deepcopy(layer)
    nn.init.ones_(layer.weight)
    return [kind(again, image())]


def pickled(kind):
    return [kind(pickle.loads(pickle.dumps(kind.make(3, 6, 3))), image())]


def saved(kind):
    file = io.BytesIO()
    torch.save(kind.make(3, 6, 3).state_dict(), file)
    file.seek(0)
    layer = kind.layer(3, 6, 3)
    layer.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return [kind(layer, image())]


def missing_key(kind):
    layer = kind.make(3, 6, 3)
    state = layer.state_dict()
    del state["bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict(state)
    return []


def wrong_size_in_state(kind):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        kind.make(3, 6, 3).load_state_dict(kind.make(3, 6, 5).state_dict())
    return []


def from_plain_weights(kind):
    """Pretrained weights of nn.Conv2d: the names are the same."""
    torch.manual_seed(8)
    state = nn.Conv2d(3, 6, 3).state_dict()
    layer = kind.make(3, 6, 3)
    found = layer.load_state_dict(state, strict=False)
    return [kind(layer, image()), found.unexpected_keys]


def on_meta(kind):
    layer = kind.make(3, 6, (3, 2), device="meta")
    return [layer.weight.is_meta, list(layer.weight.shape), layer.bias.device.type]


def materialised(kind):
    with torch.device("meta"):
        layer = kind.layer(3, 6, 3)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(kind.make(3, 6, 3).state_dict())
    return [kind(layer, image())]


def as_dtype(dtype, change):
    def behaviour(kind):
        y = kind(change(kind.make(3, 6, 3)), image().to(dtype))
        return [y.dtype, y.float()]

    return behaviour


def autocast(kind):
    layer = kind.make(3, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = kind(layer, image())
    y.float().sum().backward()
    return [y.float(), layer.weight.grad.dtype]


def channels_last(kind):
    layer = kind.make(3, 6, 3).to(memory_format=torch.channels_last)
    x = image().to(memory_format=torch.channels_last).requires_grad_()
    return [kind(layer, x), *gradients(kind, layer, x), x.grad]


def strided_input(kind):
    return [kind(kind.make(3, 6, 3), image(8, 9, 3, 2).permute(3, 2, 1, 0)[:, :, ::2, 1:])]


def expanded_input(kind):
    return [kind(kind.make(3, 6, 3), image(1, 1, 9, 8).expand(2, 3, 9, 8))]


def checkpointed(kind):
    layer, x = kind.make(3, 6, 3), image(requires_grad=True)
    y = checkpoint(lambda x: kind(layer, x), x, use_reentrant=False)
    y.sin().sum().backward()
    return [y, layer.weight.grad, x.grad]


def functional(kind):
    layer = kind.make(3, 6, 3)
    weights = {"weight": torch.ones_like(layer.weight), "bias": torch.zeros(6)}
    return [kind.read(torch.func.functional_call(layer, weights, (image(),)))]


def parametrised(how):
    def behaviour(kind):
        torch.manual_seed(5)
        layer = how(kind.make(3, 6, 3))
        y = kind(layer, image())
        y.sin().sum().backward()
        return [y, *(p.grad for p in kind.own(layer).values())]

    return behaviour


def pruned(kind):
    layer = prune.l1_unstructured(kind.make(3, 6, 3), "weight", amount=0.5)
    return [kind(layer, image()), (layer.weight == 0).sum()]


def averaged(kind):
    layer = kind.make(3, 6, 3)
    ema = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for value in (1.0, 2.0):
        with torch.no_grad():
            layer.weight.fill_(value)
        ema.update_parameters(layer)
    return [kind(ema, image())]


def hooked(kind):
    layer, seen = kind.make(3, 6, 3), []
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, y: seen.append(kind.read(y)))
    layer.weight.register_hook(lambda gradient: gradient * 0)
    y = kind(layer, image())
    y.sum().backward()
    return [y, *seen, layer.weight.grad, layer.bias.grad]


def optimised(kind):
    layer = kind.make(3, 6, 3)
    optimiser = torch.optim.AdamW(kind.own(layer).values(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        gradients(kind, layer, image())
        nn.utils.clip_grad_norm_(list(kind.own(layer).values()), 0.1)
        optimiser.step()
    return list(kind.own(layer).values())


def in_a_network(kind):
    net = nn.Sequential(kind.make(3, 6, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2), kind.make(6, 4, 3))
    return [kind(net, image()), [name for name, _ in net.named_parameters() if "logits" not in name]]


def applied(kind):
    def start(module):
        if hasattr(module, "weight"):
            nn.init.constant_(module.weight, 0.5)

    return [kind(kind.make(3, 6, 3).apply(start), image())]


def attributes(kind):
    layer = kind.make(3, 6, (3, 2), 2, (1, 0), 3, bias=False, padding_mode="circular")
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert layer.bias is None
    return [getattr(layer, name) for name in names]


def shown(kind):
    return ["3, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)" in repr(kind.make(3, 6, 3, 2, 1))]


def modes(kind):
    layer = kind.make(3, 6, 3)
    return [layer.training, layer.eval().training, kind(layer, image()), layer.train().training]


def refused(error, said, *args, size=(2, 3, 9, 8), **options):
    def behaviour(kind):
        with pytest.raises(error, match=said if kind.sfg else None):
            kind(kind.make(*args, **options), image(*size))
        return []

    return behaviour


def moved(kind):
    layer = kind.make(3, 6, 3).cpu().to("cpu", torch.float64).float()
    return [kind(layer, image())]


def shared_memory(kind):
    layer = kind.make(3, 6, 3).share_memory()
    return [layer.weight.is_shared(), kind(layer, image())]


def vector(kind):
    return [nn.utils.parameters_to_vector(kind.own(kind.make(3, 6, 3)).values())]


BEHAVIOURS = {
    "arguments by position": forward(3, 6, 3, 2, 1, 2, 1, False),
    "arguments by name": forward(in_channels=3, out_channels=6, kernel_size=3, stride=2, padding=1),
    "kernel of two sizes": forward(3, 6, (3, 2)),
    "1x1": forward(3, 6, 1),
    "kernel as large as the image": forward(3, 6, (9, 8)),
    "stride of two sizes": forward(3, 6, 3, (2, 1)),
    "padding of two sizes": forward(3, 6, 3, padding=(2, 0)),
    "padding wider than the kernel": forward(3, 6, 3, padding=5),
    "padding same": forward(3, 6, 3, padding="same"),
    "padding same, uneven": forward(3, 6, (4, 2), padding="same"),
    "padding same, dilated": forward(3, 6, 3, padding="same", dilation=2),
    "padding valid": forward(3, 6, 3, padding="valid"),
    "padding reflect": forward(3, 6, 3, padding=2, padding_mode="reflect"),
    "padding replicate": forward(3, 6, 3, padding=(1, 2), padding_mode="replicate"),
    "padding circular, strided": forward(3, 6, 3, 2, 1, padding_mode="circular"),
    "dilation of two sizes": forward(3, 6, 3, dilation=(2, 3)),
    "without bias": forward(3, 6, 3, bias=False),
    "one channel, one kernel": forward(1, 1, 3, size=(1, 1, 4, 4)),
    "no images in the batch": forward(3, 6, 3, size=(0, 3, 9, 8)),
    "dtype argument": lambda kind: [kind(kind.make(3, 6, 3, dtype=torch.float64), image(dtype=torch.float64))],
    "device argument": on_meta,
    "made on meta, loaded": materialised,
    "gradients": backward,
    "used twice": twice,
    "gradients add up": accumulated,
    "frozen": frozen,
    "only the bias learns": only_the_bias,
    "no_grad": without_gradient,
    "inference_mode": inference,
    "deepcopy": deepcopied,
    "pickle": pickled,
    "state_dict, weights_only, strict": saved,
    "missing key": missing_key,
    "wrong size in a state_dict": wrong_size_in_state,
    "weights of nn.Conv2d": from_plain_weights,
    "double": as_dtype(torch.float64, lambda layer: layer.double()),
    "half": as_dtype(torch.float16, lambda layer: layer.half()),
    "bfloat16": as_dtype(torch.bfloat16, lambda layer: layer.bfloat16()),
    "to another dtype and back": moved,
    "autocast": autocast,
    "channels_last": channels_last,
    "input with strides": strided_input,
    "expanded input": expanded_input,
    "checkpointing": checkpointed,
    "functional_call": functional,
    "weight_norm": parametrised(parametrizations.weight_norm),
    "spectral_norm": parametrised(parametrizations.spectral_norm),
    "pruning": pruned,
    "EMA": averaged,
    "hooks": hooked,
    "AdamW and clipping": optimised,
    "Sequential": in_a_network,
    "apply": applied,
    "attributes": attributes,
    "repr": shown,
    "train and eval": modes,
    "share_memory": shared_memory,
    "parameters_to_vector": vector,
    "wrong number of channels": refused((ValueError, RuntimeError), "channels", 4, 6, 3),
    "image smaller than the kernel": refused((ValueError, RuntimeError), r"size.*2", 3, 6, 3, size=(2, 3, 2, 2)),
    "kernel of no size": refused((ValueError, RuntimeError), "kernel_size=.0, 0.: expected", 3, 6, 0),
    "no stride": refused((ValueError, RuntimeError), "stride=.1, 0.: expected at least 1", 3, 6, 3, (1, 0)),
    "negative padding": refused((ValueError, RuntimeError), "padding=.-1, -1.: expected at least 0", 3, 6, 3, 1, -1),
    "unknown padding": refused(ValueError, "Invalid padding string", 3, 6, 3, padding="full"),
    "unknown padding_mode": refused(ValueError, "padding_mode must be one of", 3, 6, 3, padding_mode="mirror"),
    "same padding with a stride": refused(ValueError, "not supported for strided", 3, 6, 3, 2, "same"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")  # torch's, of a kernel of no size
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # and of its own convolution
@pytest.mark.parametrize("name", ["SFGConv2d", "reference"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_as_conv2d(name, behaviour):
    expected, found = (BEHAVIOURS[behaviour](Kind(kind)) for kind in ("nn.Conv2d", name))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, torch.Tensor):
            low = behaviour in ("half", "bfloat16", "autocast")  # the sum is rounded once or more often
            torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-4, atol=2e-2 if low else 1e-5)
        else:
            assert a == b


def test_a_state_of_a_later_version_is_refused():
    layer = SFGConv2d(3, 6, 3)
    state = layer.state_dict()
    assert state._metadata[""]["version"] == layer._version == 2
    state._metadata[""]["version"] = 99
    with pytest.raises(RuntimeError, match=r"version 99 of SFGConv2d, this is sfg_fast .* expected at most 2"):
        layer.load_state_dict(state)


def test_unbatched_images_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 9, 8\).* expected \[N, 3, H, W\]"):
        SFGConv2d(3, 6, 3)(torch.zeros(3, 9, 8))


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="divisible by groups"):
        SFGConv2d(3, 6, 3, groups=2)


def test_repr_says_what_the_layer_is():
    text = repr(sfg_fast.SFGConv2d(3, 6, 3, tasks=["ct", "organs"], norm="batch", activation="relu"))
    for part in ("3, 6", "kernel_size=(3, 3)", "('ct', 'organs')", "activation=relu", "estimator=straight_through"):
        assert part in text
