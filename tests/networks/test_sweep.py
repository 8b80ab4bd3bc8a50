"""Networks of MONAI (and of nnU-Net, torchvision and timm, where these are installed), as their users build them: what
is accepted is the same network in every respect.

The networks and the checks are those of benchmarks/networks_converted.py. Here stands what is expected of each: how
many of its convolutions become SFG layers or heads (a change is seen here), or the words of the refusal.
"""

import importlib
import warnings

import pytest
from torch import nn

from benchmarks.networks_converted import CHECKS, MODULES, MORE, NETWORKS, check, converted_of

# name: (SFG layers and heads, convolutions), or what the refusal says
EXPECTED = {
    "MONAI AHNet": "ConvTranspose2d",
    "MONAI AHNet (interpolated)": (83, 83),
    "MONAI AttentionUnet": "ConvTranspose2d",
    "MONAI AutoEncoder": "things stand in the way",
    "MONAI BasicUNet": "22 things stand in the way",
    "MONAI BasicUNet (batch norm, interpolated)": (22, 22),
    "MONAI BasicUNetPlusPlus": "returns list",
    "MONAI BasicUNetPlusPlus (batch norm, interpolated)": "returns list",
    "MONAI DenseNet": (10, 10),
    "MONAI DenseNet121": (120, 120),
    "MONAI DynUNet": "things stand in the way",
    "MONAI EfficientNetBN": "draws random numbers",
    "MONAI FlexibleUNet": "draws random numbers",
    "MONAI FlexibleUNet (resnet18)": "concatenated with something else",
    "MONAI HighResNet": (21, 21),
    "MONAI HoVerNet": "returns dict",
    "MONAI MedNeXt": "things stand in the way",
    "MONAI PatchDiscriminator": "returns list",
    "MONAI Quicknat": "returns tuple",
    "MONAI RegUNet": (10, 10),
    "MONAI ResNet": (12, 12),
    "MONAI resnet18": (20, 20),
    "MONAI resnet50": (53, 53),
    "MONAI SegResNet": "things stand in the way",
    "MONAI SegResNet (batch norm)": (32, 32),
    "MONAI SegResNetDS": "ConvTranspose2d",
    "MONAI SegResNetDS (batch norm)": "ConvTranspose2d",
    "MONAI SEResNet50": (5, 53),
    "MONAI UNet": "things stand in the way",
    "MONAI UNet (batch norm)": "ConvTranspose2d",
    "MONAI VNet": "something else",
    "nnU-Net PlainConvUNet": "things stand in the way",
    "nnU-Net PlainConvUNet (deep supervision)": "returns list",
    "nnU-Net ResidualEncoderUNet": "things stand in the way",
    "nnU-Net ResidualEncoderUNet (deep supervision)": "returns list",
    "torchvision vgg11_bn": (8, 8),
    "torchvision resnet18": (20, 20),
    "torchvision densenet121": (120, 120),
    "torchvision squeezenet1_1": (26, 26),
    "torchvision mobilenet_v2": "is a convolution of 32 groups",
    "torchvision efficientnet_b0": "'features.2.1.stochastic_depth' draws random numbers",
    "timm resnet10t": (14, 14),
    "timm dla34": (38, 38),
    "timm hrnet_w18_small": (91, 91),
    "timm resnetv2_50": (54, 54),
    "timm selecsls42": (41, 41),
    "timm inception_v3": (94, 94),
    "timm seresnet18": (3, 36),
}
LISTED = {network.name: network for network in NETWORKS + MORE}


def convolutions(net):
    return sum(isinstance(module, nn.modules.conv._ConvNd) for module in net.modules())


@pytest.fixture(scope="module", params=EXPECTED)
def network(request):
    """(network, images, converted) of one that is accepted; what is refused is looked at here."""
    which, expected = LISTED[request.param], EXPECTED[request.param]
    if importlib.util.find_spec(MODULES[which.library].partition(".")[0]) is None:
        pytest.skip(f"{which.library} is not installed")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net, x = which.made()
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                converted_of(net, x)
            pytest.skip("it is refused, in words")
        converted, report = converted_of(net, x)
    assert report.coverage == expected
    assert len(report) == convolutions(net)
    copied = [row for row in report if row.becomes == "copied for each task"]
    warned = [str(one.message) for one in told if "no SFG layers" in str(one.message)]
    assert len(warned) == bool(copied)
    assert all(row.why.startswith("behind ") for row in copied)
    return net, x, converted


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_it_is_the_same_network(network, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what users are told when they train: a ReLU behind a sum
        check(name, *network)
