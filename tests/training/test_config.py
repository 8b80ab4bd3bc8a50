"""The configuration refuses what no network can be trained with."""

import pytest
import torch

from sfg_fast.errors import InputError
from sfg_fast.networks.build import NETWORKS, build, default_norm
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig, check


def of_one_voxel(network, patch=(1, 1)):
    return TrainConfig(data="cache", out="run", patch=patch, network=network, schedule=ScheduleConfig(batch=4))


@pytest.mark.parametrize("patch", [(1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("norm", ["auto", "instance"])
def test_an_instance_norm_needs_more_than_one_voxel_in_a_patch(norm, patch):
    message = (
        r"^patch=.1, 1.*: expected more than one voxel: an instance norm can't normalise one alone \(network.norm\)$"
    )
    with pytest.raises(InputError, match=message):
        check(of_one_voxel(NetworkConfig(name="unet", norm=norm), patch))
    check(of_one_voxel(NetworkConfig(name="unet", norm=norm), (*patch[1:], 2)))


def test_a_batch_norm_needs_more_than_one_voxel_in_a_batch():
    """What the configuration takes and refuses is what the network takes and refuses in training."""
    x, options = torch.randn(4, 1, 1, 1), {"width": 2, "blocks": 1, "residual": "routed"}
    for norm in ("auto", "batch", None):
        check(of_one_voxel(NetworkConfig(norm=norm, residual="routed")))
        build("highresnet", 1, {"ct": 1}, norm=norm, **options)(x)
    with pytest.raises(InputError, match=r"^patch=\(1, 1\): expected more than one voxel: an instance norm"):
        check(of_one_voxel(NetworkConfig(norm="instance", residual="routed")))
    with pytest.raises(ValueError, match="instance normalisation needs more than one position"):
        build("highresnet", 1, {"ct": 1}, norm="instance", **options)(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_norm_that_a_network_has_by_default(name):
    def norms(**options):
        network = build(name, 1, {"a": 1}, width=2, **options)
        return [repr(module) for module in network.modules() if "Norm" in type(module).__name__]

    assert norms() == norms(norm=default_norm(name)) != norms(norm=None)
