"""A variant is what its name says, and leaves the formulas as they were."""

import ast

import pytest
import torch

from sfg_fast.backends import available

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from sfg_fast.kernels.triton import config

from benchmarks import counted, variants
from benchmarks.static_report import ARCHITECTURES

FORMULAS = ("by_cudnn", "plan", "plan_gradient", "gradient_walks", "walks", "_blocks", "_large_blocks")


def launches(k):
    image = (16, variants.SIDE, variants.SIDE)
    found = counted.layer_configurations(k, k, "bf16", ARCHITECTURES[1], image)
    return {one.direction: one for one in found if one.launch is not None and not one.direction.endswith("soft")}


@pytest.mark.parametrize("table", [variants.CONVOLUTIONS, variants.GRADIENTS], ids=["convolutions", "gradients"])
@pytest.mark.parametrize("k", [16, 32, 64, 128])
def test_variants(table, k):
    before = {name: getattr(config, name) for name in FORMULAS}, vars(config.Gradient)["of"]
    usual = launches(k)
    for name, replaced in table[k].items():
        kind, numbers = name.split(" ", 1)
        numbers = ast.literal_eval(numbers)
        with variants.forced(replaced):
            found = launches(k)
        if kind == "gradient":
            one = found["weight gradient"]
            tiles = one.what.block_c, one.what.block_k, one.launch.tiles.pixels_h * one.launch.tiles.pixels_w
            assert tiles == numbers[:3]
            assert tuple(one.launch.options.values()) == numbers[3:5]
            assert one.launch.kernel == "weight_gradient"
            assert one.launch.second * one.launch.steps * tiles[2] >= 16 * variants.SIDE**2  # all of the images
            assert found["forward"].launch.options == usual["forward"].launch.options
        elif kind == "gradient_walk":
            one, old = found["weight gradient"].launch, usual["weight gradient"].launch
            assert one.kernel == "rowwalk_weights"
            assert (one.tiles.pixels_w, *one.options.values()) == numbers[:3]
            assert one.second == old.second * (numbers[3] if len(numbers) > 3 else 1)
        elif kind == "no_cudnn":
            p = config.passes(counted.layer(k, k), (3, 3), torch.bfloat16, ARCHITECTURES[1].device)[0]
            arguments = p, 16, 16, (256, 256), ARCHITECTURES[1].device
            assert config.plan(*arguments, cudnn=True).kernel == "cudnn"
            with variants.forced(replaced):
                assert config.plan(*arguments, cudnn=True).kernel == "convolve"
        elif kind == "taps":
            undrawn = [name for name, one in usual.items() if one.launch.tiles.together != numbers[0]]
            assert undrawn == [name for name in usual if name.endswith("undrawn")]
            assert {found[name].launch.tiles.together for name in undrawn} == set(numbers)
        elif kind == "walk":
            for name in ("forward", "input gradient, undrawn", "gates' gradient, undrawn"):
                one = found[name].launch
                assert one.kernel == ("rowwalk_gates" if "gates" in name else "rowwalk")
                assert (*one.options.values(), one.tiles.pixels_w) == numbers[:3]
                rows = one.steps if len(numbers) == 3 else numbers[3]
                assert one.programs == 16 * -(-variants.SIDE // numbers[2]) * -(-variants.SIDE // rows)
        else:
            one = found["forward"]
            assert (one.what.block_n, one.what.block_k) == (min(numbers[0], k), min(numbers[1], k))
            assert one.launch.tiles.pixels_h * one.launch.tiles.pixels_w == numbers[2]
            assert tuple(one.launch.options.values()) == numbers[3:]
            assert one.launch.programs == 16 * variants.SIDE**2 // numbers[2] * -(-k // numbers[0])
    assert ({name: getattr(config, name) for name in FORMULAS}, vars(config.Gradient)["of"]) == before
    again, old = (one["forward"].launch._replace(tiles=None) for one in (launches(k), usual))
    assert again == old
