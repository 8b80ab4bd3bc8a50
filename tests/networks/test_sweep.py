"""Networks of MONAI (and of torchvision and timm, where these are installed), as their users build them: what is
accepted is the same network in every respect.

For each: how many of its convolutions become SFG layers (a change is seen here); with everything shared the module's
own outputs in eval and train; a mixed assignment as by dense masking; another batch and image size; three steps of
training; frozen. What is refused is refused in words.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from sfg_fast import SFGConv2d, assign, backend, convert, freeze, parameter_groups, recalibrate
from sfg_fast.networks.controls import sfg_layers

TASKS = ("a", "b")
BATCH = ("batch", {"affine": True})
PLANE = {"spatial_dims": 2, "in_channels": 1}
CLASSES = {**PLANE, "num_classes": 3}
RESNET = {"spatial_dims": 2, "n_input_channels": 1, "num_classes": 3}
WIDTHS = {"features": (4, 4, 6, 6, 8, 4)}
INTERPOLATED = {**WIDTHS, "norm": BATCH, "upsample": "nontrainable"}
DECODER = {"decoder_channels": (16, 8, 8, 4, 4), "spatial_dims": 2}
PYRAMID = {**PLANE, "out_channels": 2, "psp_block_num": 0, "upsample_mode": "nearest"}

# name, arguments, height and width: (SFG layers and heads, convolutions), or what the refusal says
MONAI = [
    ("AHNet", (), {"layers": (1, 1, 1, 1), **PYRAMID}, 64, (83, 83)),
    ("AttentionUnet", (2, 1, 2, (4, 8, 8), (2, 2)), {}, 32, "ConvTranspose2d"),
    ("AutoEncoder", (2, 1, 2, (4, 8), (2, 2)), {}, 32, "things stand in the way"),
    ("BasicUNet", (2, 1, 2), WIDTHS, 64, "22 things stand in the way"),
    ("BasicUNet", (2, 1, 2), INTERPOLATED, 64, (22, 22)),
    ("BasicUNetPlusPlus", (2, 1, 2), INTERPOLATED, 64, (37, 40)),
    ("DenseNet", (2, 1, 3), {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}, 32, (10, 10)),
    ("DenseNet121", (2, 1, 3), {}, 64, (120, 120)),
    ("DynUNet", (2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), (4, 8, 8)), {}, 32, "things stand in the way"),
    ("EfficientNetBN", ("efficientnet-b0", False), CLASSES, 64, "draws random numbers"),
    ("FlexibleUNet", (1, 2, "efficientnet-b0"), DECODER, 64, "draws random numbers"),
    ("FlexibleUNet", (1, 2, "resnet18"), DECODER, 64, "joined of others or taken out of others"),
    ("HighResNet", (2, 1, 3), {}, 32, (21, 21)),
    ("HoVerNet", ("fast", 3, 2), {}, 256, "24 things stand in the way"),
    ("MedNeXt", (2, 4, 1, 2), {}, 64, "things stand in the way"),
    ("PatchDiscriminator", (2, 4, 1, 1), {"num_layers_d": 2}, 64, (4, 4)),
    ("Quicknat", (2, 1, 8), {}, 64, "works with the indices of a max-pooling"),
    ("RegUNet", (2, 1, 4, 2), {"out_channels": 2}, 32, (10, 10)),
    ("ResNet", ("basic", [1, 1, 1, 1], [8, 8, 8, 8]), RESNET, 64, (12, 12)),
    ("resnet18", (), RESNET, 64, (20, 20)),
    ("resnet50", (), RESNET, 64, (53, 53)),
    ("SegResNet", (2, 8, 1, 2), {}, 64, "things stand in the way"),
    ("SegResNet", (2, 8, 1, 2), {"norm": BATCH}, 64, (32, 32)),
    ("SegResNetDS", (2, 8, 1, 2), {"norm": "batch"}, 64, "ConvTranspose2d"),
    ("SEResNet50", (), CLASSES, 64, (53, 53)),
    ("UNet", (2, 1, 2, (4, 8, 8), (2, 2)), {"num_res_units": 2}, 32, "things stand in the way"),
    ("UNet", (2, 1, 2, (4, 8, 8), (2, 2)), {"num_res_units": 2, "norm": BATCH}, 32, "ConvTranspose2d"),
    ("VNet", (2, 1, 2), {}, 64, (8, 25)),  # its Dropout3d drops whole images
]
NAMED = [  # of three channels, 96x96
    ("torchvision", "vgg11_bn", (8, 8)),
    ("torchvision", "resnet18", (20, 20)),
    ("torchvision", "densenet121", (120, 120)),
    ("torchvision", "squeezenet1_1", (26, 26)),
    ("torchvision", "mobilenet_v2", "is a convolution of 32 groups"),
    ("torchvision", "efficientnet_b0", "'features.2.1.stochastic_depth' draws random numbers"),
    ("timm", "resnet10t", (14, 14)),
    ("timm", "dla34", (38, 38)),
    ("timm", "hrnet_w18_small", (91, 91)),
    ("timm", "resnetv2_50", (54, 54)),
    ("timm", "selecsls42", (41, 41)),
    ("timm", "inception_v3", (94, 94)),
    ("timm", "seresnet18", (36, 36)),
]


def made(which):
    """A network, with weights from seed 0, and an image."""
    torch.manual_seed(0)
    if which in NAMED:
        library, name, _ = which
        if library == "timm":
            net = pytest.importorskip("timm").create_model(name, pretrained=False)
        else:
            net = pytest.importorskip("torchvision").models.get_model(name, weights=None)
        return net, torch.randn(2, 3, 96, 96)
    from monai.networks import nets

    name, arguments, options, size, _ = which
    net = getattr(nets, name)(*arguments, **options)
    channels = next(module for module in net.modules() if isinstance(module, nn.Conv2d)).in_channels
    return net, torch.randn(2, channels, size, size)


def convolutions(net):
    return sum(isinstance(module, nn.modules.conv._ConvNd) for module in net.modules())


@pytest.fixture(scope="module", params=MONAI + NAMED, ids=lambda which: f"{which[0]}-{which[1]}")
def network(request):
    """(network, image, converted) of one that is accepted; what is refused is looked at here."""
    expected = request.param[-1]
    net, x = made(request.param)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                convert(net, TASKS, example=x)
            pytest.skip("it is refused, in words")
        converted, report = convert(net, TASKS, example=x, report=True, init=[0.5, 0.3, 0.2])
    assert report.coverage == expected
    assert len(report) == convolutions(net)
    copied = [row for row in report if row.becomes == "copied for each task"]
    warned = [str(one.message) for one in told if "no SFG layers" in str(one.message)]
    assert len(warned) == bool(copied)
    assert all(row.why.startswith("behind ") for row in copied)
    return net, x, converted


def all_shared(converted):
    assign(converted, {name: [0] * layer.out_channels for name, layer in sfg_layers(converted).items()})


def without_dropout(*networks):
    for module in (module for net in networks for module in net.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def tensors(y):
    """All tensors of an output, which may lie in lists and dicts."""
    return pytree.tree_leaves(y)


def close(found, expected, relative):
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        close_tensors(one, other, relative)


def close_tensors(found, expected, relative):
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_all_shared_it_is_the_module(network, train):
    """In float64, so that batch statistics of few values don't hide a difference: 1e-6 of the largest output."""
    net, x, converted = (copy.deepcopy(one) for one in network)
    net, converted, x = net.double(), converted.double(), x.double()
    without_dropout(net, converted)
    all_shared(converted)
    expected = net.train(train)(x)
    for y in converted.train(train)(x).values():
        close(y, expected, 1e-6)


@pytest.mark.slow
def test_another_batch_and_another_image(network):
    net, x, converted = (copy.deepcopy(one) for one in network)
    all_shared(converted)
    n, channels, height, width = x.shape
    net.eval(), converted.eval()
    images = [torch.randn(n + 1, channels, height, width)]
    other = torch.randn(1, channels, height + 32, width + 64)
    try:
        net(other)
        images.append(other)
    except Exception:
        pass
    for image in images:
        expected = net(image)
        for y in converted(image).values():
            close(y, expected, 1e-3)


@pytest.mark.slow
def test_a_mixed_assignment_is_as_by_dense_masking(network):
    _, x, converted = (copy.deepcopy(one) for one in network)
    torch.manual_seed(1)
    assign(converted, {name: torch.randint(3, (m.out_channels,)) for name, m in sfg_layers(converted).items()})
    converted.eval().double()
    x = x.double()
    with torch.no_grad():
        found = converted(x)
        with backend("reference"):
            expected = converted(x)
    for task in TASKS:
        close(found[task], expected[task], 1e-6)
    assert not any(torch.equal(*pair) for pair in zip(tensors(found["a"]), tensors(found["b"]), strict=True))


@pytest.mark.slow
def test_it_trains_and_freezes(network):
    """Three steps move weights and logits; frozen with the learnt grouping it is the same network."""
    _, x, converted = (copy.deepcopy(one) for one in network)
    converted.train()
    layers = sfg_layers(converted)
    before = {name: layer.logits.detach().clone() for name, layer in layers.items()}
    optimiser = torch.optim.Adam(parameter_groups(converted, lr=1e-3, logits_factor=10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ReLU behind a sum
        for _ in range(3):
            optimiser.zero_grad()
            sum(y.square().mean() for y in tensors(converted(x))).backward()
            assert all(torch.isfinite(p.grad).all() for p in converted.parameters() if p.grad is not None)
            optimiser.step()
    assert all(not torch.equal(layer.logits, before[name]) for name, layer in layers.items())
    recalibrate(converted, [x])
    converted.eval()
    with torch.no_grad():
        frozen, expected = freeze(converted, example=x)(x), converted(x)
    for task in TASKS:
        close(frozen[task], expected[task], 1e-3)
    assert not any(isinstance(module, SFGConv2d) for module in freeze(converted, example=x).modules())
