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
from sfg_fast.networks.conversion_report import UNREACHED

# name: (SFG layers and heads, convolutions that the forward pass reaches), or what the refusal says. (HoVerNet takes
# ten minutes, and VNet drops whole images: they are in the sweep alone.)
EXPECTED = {
    "MONAI AHNet": (88, 88),
    "MONAI AHNet (interpolated)": (83, 83),
    "MONAI AttentionUnet": (17, 17),
    "MONAI AutoEncoder": (4, 4),
    "MONAI BasicUNet": (23, 23),
    "MONAI BasicUNet (batch norm, interpolated)": (22, 22),
    "MONAI BasicUNetPlusPlus": (41, 41),
    "MONAI BasicUNetPlusPlus (batch norm, interpolated)": (37, 37),
    "MONAI DenseNet": (10, 10),
    "MONAI DenseNet121": (120, 120),
    "MONAI DynUNet": (13, 13),
    "MONAI EfficientNetBN": "draws random numbers",
    "MONAI FlexibleUNet": "draws random numbers",
    "MONAI FlexibleUNet (resnet18)": "joined of others or taken out of others",
    "MONAI HighResNet": (21, 21),
    "MONAI MedNeXt": (80, 80),
    "MONAI PatchDiscriminator": (4, 4),
    "MONAI Quicknat": "works with the indices of a max-pooling",
    "MONAI RegUNet": (10, 10),
    "MONAI ResNet": (12, 12),
    "MONAI resnet18": (20, 20),
    "MONAI resnet50": (53, 53),
    "MONAI SegResNet": (32, 32),
    "MONAI SegResNet (batch norm)": (32, 32),
    "MONAI SegResNetDS": (32, 32),
    "MONAI SegResNetDS (batch norm)": (32, 32),
    "MONAI SEResNet50": (53, 53),
    "MONAI UNet": (12, 12),
    "MONAI UNet (batch norm)": (12, 12),
    "nnU-Net PlainConvUNet": (18, 18),
    "nnU-Net PlainConvUNet (deep supervision)": (20, 20),
    "nnU-Net ResidualEncoderUNet": (27, 27),
    "nnU-Net ResidualEncoderUNet (deep supervision)": (29, 29),
    "torchvision vgg11_bn": (8, 8),
    "torchvision resnet18": (20, 20),
    "torchvision densenet121": (120, 120),
    "torchvision squeezenet1_1": (26, 26),
    "torchvision mobilenet_v2": (52, 52),
    "torchvision efficientnet_b0": (81, 81),
    "timm resnet10t": (14, 14),
    "timm dla34": (38, 38),
    "timm hrnet_w18_small": (91, 91),
    "timm resnetv2_50": (54, 54),
    "timm selecsls42": (41, 41),
    "timm inception_v3": (94, 94),
    "timm seresnet18": (36, 36),
}
LISTED = {network.name: network for network in NETWORKS + MORE}


def convolutions(net):
    return sum(isinstance(module, nn.modules.conv._ConvNd) for module in net.modules())


@pytest.fixture(scope="module", params=EXPECTED)
def network(request):
    """(network, images, converted) of one that is accepted; what is refused is looked at here."""
    which, expected = LISTED[request.param], EXPECTED[request.param]
    if importlib.util.find_spec(MODULES[which.package].partition(".")[0]) is None:
        pytest.skip(f"{which.package} is not installed")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net, x = which.made()
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                converted_of(net, x)
            pytest.skip("it is refused, in words")
        converted, report = converted_of(net, x)
    assert (report.coverage[0], sum(row.becomes != UNREACHED for row in report)) == expected
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
