"""What methods fix: constant masks with any share of shared kernels; and dropout between layers."""

import pytest
import torch

from sfg_fast import SFGVGG, freeze, predict, recalibrate
from sfg_fast.networks.build import build
from sfg_fast.networks.controls import sampling, sfg_layers

TASKS = {"a": 1, "b": 2, "c": 1}
NETWORKS = {"vgg": {"width": 6}, "highresnet": {"width": [4, 6, 8], "blocks": 1}}


def small(name, **options):
    return build(name, 1, TASKS, options.pop("method", "constant_mask"), **NETWORKS[name], **options)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, [0, 2, 2, 2]), (0.5, [3, 1, 1, 1]), (0.3, [2, 2, 1, 1]), (1.0, [6, 0, 0, 0])]
)
def test_a_mask_shares_as_much_as_it_is_told(share, expected):
    first = small("vgg", shared=share).features[0]
    assert torch.bincount(first.fixed_assignment, minlength=4).tolist() == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mask_may_differ_from_layer_to_layer(name):
    layers = sfg_layers(small(name))
    shares = [1 - index / len(layers) for index in range(len(layers))]
    masked = small(name, shared=shares)
    for layer, share in zip(sfg_layers(masked).values(), shares, strict=True):
        counts = torch.bincount(layer.fixed_assignment, minlength=4).tolist()
        assert abs(counts[0] - share * layer.out_channels) <= 0.5
        assert max(counts[1:]) - min(counts[1:]) <= 1
    all_shared, none = (small(name, shared=share).state_dict() for share in (1.0, 0.0))
    for same, method in ((all_shared, "hard_sharing"), (none, "even_split")):
        other = small(name, method=method).state_dict()
        assert all(torch.equal(same[key], other[key]) for key in same if key.endswith("fixed_gates"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shared": 1.2}, r"shared=1\.2: expected a share from 0 to 1, or one for each of the 8 layers"),
        ({"shared": [0.5] * 7}, "one for each of the 8 layers"),
        ({"shared": 0.5, "method": "hard_sharing"}, "method constant_mask alone, got hard_sharing"),
        ({"dropout": 1.5}, "between 0 and 1"),
    ],
)
def test_what_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        small("vgg", **options)


@pytest.mark.filterwarnings("ignore:the most probable group is a tie")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["constant_mask", "cross_stitch", "sfg"])
def test_dropout_drops_in_training_and_in_predictions_by_draws(name, method):
    torch.manual_seed(0)
    network, x = small(name, method=method, dropout=0.5), torch.randn(2, 1, 32, 32)
    recalibrate(network, [x])
    network.eval()
    assert torch.equal(network(x)["b"], network(x)["b"])
    drawn = predict(network, x, draws=4)["b"]
    assert (drawn.variance > 0).any()
    if method != "sfg":  # whose groupings are drawn as well
        plain = small(name, method=method)
        plain.load_state_dict(network.state_dict())
        assert torch.equal(plain.eval()(x)["b"], network(x)["b"])
        assert not predict(plain, x, draws=4)["b"].variance.any()
    assert torch.equal(network(x)["b"], network(x)["b"])  # and not afterwards
    network.train()
    assert not torch.equal(network(x)["b"], network(x)["b"])


@pytest.mark.filterwarnings("ignore:the most probable group is a tie")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["hard_sharing", "cross_stitch"])
def test_a_frozen_network_has_no_dropout(name, method):
    torch.manual_seed(0)
    network, x = small(name, method=method, dropout=0.5), torch.randn(2, 1, 32, 32)
    recalibrate(network, [x])
    frozen = freeze(network.eval(), example=x)
    assert not any(isinstance(module, torch.nn.Dropout2d) for module in frozen.modules())
    torch.testing.assert_close(frozen(x)["b"], network(x)["b"], rtol=1e-4, atol=1e-5)


def test_dropout_takes_whole_channels_and_keeps_the_mean():
    """The second layer's input: channels of the first are zero, or what they were over 1 - rate."""
    torch.manual_seed(0)
    network, seen = SFGVGG(1, TASKS, width=40, method="hard_sharing", dropout=0.25), []
    x = torch.rand(3, 1, 32, 32)
    recalibrate(network, [x])
    network.features[1].register_forward_pre_hook(lambda _module, args: seen.append(args[0].merged("a")))
    with torch.no_grad():
        network.eval()(x)
        with sampling(network):
            network(x)
    whole, dropped = (features.flatten(2) for features in seen)
    kept = (dropped != 0).any(2)
    assert 0.6 < kept.float().mean() < 0.9
    assert torch.allclose(dropped, whole / 0.75 * kept[..., None])
    assert kept[0].ne(kept[1]).any()  # every image drops its own


def test_hard_sharing_can_compute_whatever_another_grouping_computes():
    """It has the same kernels, with weight zero where the grouping doesn't read. So no grouping adds a function; it can
    only make the network generalise better, be learnt better, or cost less."""
    torch.manual_seed(0)
    grouped, shared = small("vgg", shared=0.4).double(), small("vgg", method="hard_sharing").double()
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    shared.load_state_dict(grouped.state_dict() | {k: v for k, v in shared.state_dict().items() if "gates" in k})
    channels = None
    with torch.no_grad():
        for layer, wide in zip(grouped.features, shared.features, strict=True):
            if channels is not None:
                reads = (channels == 0) | (channels == layer.fixed_assignment[:, None])  # [K, C]
                assert not reads.all()
                wide.weight.mul_(reads[:, :, None, None])
            channels = layer.fixed_assignment
        for group, head in enumerate(shared.heads.values(), start=1):
            head.weight.mul_((channels == 0) | (channels == group))
    expected = grouped(x)
    for task, y in shared(x).items():
        torch.testing.assert_close(y, expected[task], rtol=1e-9, atol=1e-9)
