"""Networks by name, and what is asked of any of them."""

import pytest
import torch

from sfg_fast import SFGVGG, SFGHighResNet
from sfg_fast.networks.build import NETWORKS, build, head_biases, least_size
from sfg_fast.networks.controls import sfg_layers
from sfg_fast.networks.cross_stitch import CrossStitch

OUTPUTS = {"a": 1, "b": 3}
SMALL = {
    "highresnet": {"width": [3, 4, 5], "blocks": 1},
    "vgg": {"width": 2},
    "unet": {"width": 2, "stages": 3, "blocks": 1},
}
MIXED = [name for name in NETWORKS if hasattr(NETWORKS[name], "column")]  # by cross-stitch units


def same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def seeded(make, *arguments, **options):
    torch.manual_seed(0)
    return make(*arguments, **options)


def test_it_is_the_class_with_these_options():
    options = {"init": [0.5, 0.3, 0.2], "estimator": "reinmax", "noise_on": "p", "explore": 0.2}
    for residual in ("separate", "routed"):
        sizes = {"width": [3, 4, 5], "blocks": 1, "residual": residual}
        found = seeded(build, "highresnet", 2, OUTPUTS, norm=None, **sizes, **options)
        wanted = seeded(SFGHighResNet, 2, OUTPUTS, norm=None, **sizes, **options)
        assert type(found) is SFGHighResNet
        assert same_state(found, wanted)
        layer = next(iter(sfg_layers(found).values()))
        assert (layer.estimator, layer.noise_on, layer.explore, layer.norm) == ("reinmax", "p", 0.2, None)
    found = seeded(build, "vgg", 2, OUTPUTS, "even_split", width=3)
    assert same_state(found, seeded(SFGVGG, 2, OUTPUTS, 3, method="even_split"))
    assert found.method == "even_split"


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_none_is_left_to_the_network(name):
    nothing = dict.fromkeys(("width", "blocks", "residual", "init", "estimator", "noise_on"))
    assert same_state(seeded(build, name, 1, {"a": 1}, **nothing), seeded(NETWORKS[name], 1, {"a": 1}))


@pytest.mark.parametrize("name", MIXED)
def test_cross_stitch_is_built_by_the_same_call(name):
    given = {"init": "uniform", "estimator": "selected", "noise_on": "p", "blocks": None}
    found = seeded(build, name, 1, OUTPUTS, "cross_stitch", norm=None, **(given | SMALL[name]))
    assert type(found) is CrossStitch
    assert same_state(found, seeded(CrossStitch, NETWORKS[name], 1, OUTPUTS, norm=None, **SMALL[name]))
    assert (found.method, found.in_channels, found.outputs) == ("cross_stitch", 1, OUTPUTS)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("resnet", 1, OUTPUTS), {}, "network 'resnet' is unknown, expected one of highresnet, vgg, unet"),
        (("unet", 1, OUTPUTS, "cross_stitch"), {}, "SFGUNet has no stages for cross-stitch units"),
        (("highresnet", 1, OUTPUTS), {"norm": "instance"}, "norm='instance': separate residual blocks have 'batch' or"),
        (("vgg", 1, OUTPUTS), {"blocks": 2}, "blocks=2: vgg has no such option, expected width, init, estimator"),
        (("vgg", 1, OUTPUTS, "cross_stitch"), {"residual": "routed"}, "residual='routed': vgg has no such option"),
        (("highresnet", 1, OUTPUTS), {"depth": 2}, "depth=2: highresnet has no such option, expected width, blocks"),
        (("vgg", 1, OUTPUTS), {"width": [8]}, r"width=\[8\]: expected a number"),
        (("vgg", 1, OUTPUTS, "cross_stitch"), {"width": [8]}, r"width=\[8\]: expected a number"),
        (("highresnet", 1, OUTPUTS, "cross_stitch"), {"width": [8]}, r"width=\[8\]: expected a number or three"),
        (("vgg", 1, OUTPUTS, "soft"), {}, "method='soft' is unknown, expected one of one_task"),
        (("vgg", 1, {"type": 1, "b": 1}, "cross_stitch"), {}, "can't be called 'type'"),
    ],
)
def test_what_can_t_be_is_refused_in_a_sentence(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments, **options)


@pytest.mark.parametrize(("name", "method"), [*((n, "sfg") for n in NETWORKS), *((n, "cross_stitch") for n in MIXED)])
def test_head_biases_are_those_of_the_outputs(name, method):
    model = build(name, 1, OUTPUTS, method, init="mostly_shared", **SMALL[name]).eval()
    x = torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        before = model(x)
        added = {task: torch.arange(1.0, size + 1) for task, size in OUTPUTS.items()}
        for task, size in OUTPUTS.items():
            (bias,) = head_biases(model, task)
            assert bias.shape == (size,)
            bias.add_(added[task])
        for task, y in model(x).items():
            change = (y - before[task]).transpose(0, 1).flatten(1)
            torch.testing.assert_close(change, added[task][:, None].expand_as(change))


@pytest.mark.parametrize(("name", "method"), [*((n, "sfg") for n in NETWORKS), *((n, "cross_stitch") for n in MIXED)])
def test_smallest_images_and_what_comes_out(name, method):
    model = build(name, 1, OUTPUTS, method, init="mostly_shared", **SMALL[name]).eval()
    size = least_size(model)
    assert size == {"highresnet": 1, "vgg": 32, "unet": 1}[name]
    y = model(torch.zeros(2, 1, size, size))["b"]
    assert model.per_image == NETWORKS[name].per_image == (y.dim() == 2)
    assert y.shape[:2] == (2, 3)
