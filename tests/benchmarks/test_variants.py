"""A variant is what its name says, and leaves the formulas as they were."""

import ast

import pytest

from sfg_fast.backends import available

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from sfg_fast.kernels.triton import config

from benchmarks import counted, variants
from benchmarks.static_report import ARCHITECTURES

FORMULAS = ("plan", "plan_gradient", "walks", "_blocks", "_large_blocks")


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
            steps, old = one.launch.second * one.launch.steps, usual["weight gradient"].launch
            pixels = old.second * old.steps * old.tiles.pixels_h * old.tiles.pixels_w
            assert steps * tiles[2] >= pixels  # all of the image
            assert found["forward"].launch.options == usual["forward"].launch.options
        elif kind == "walk":
            assert found["forward"].launch.kernel == "rowwalk"
            assert tuple(found["forward"].launch.options.values()) == numbers[:2]
            assert found["forward"].launch.programs == usual["forward"].launch.programs or len(numbers) == 3
        else:
            one = found["forward"]
            assert (one.what.block_n, one.what.block_k) == (min(numbers[0], k), min(numbers[1], k))
            assert one.launch.tiles.pixels_h * one.launch.tiles.pixels_w == numbers[2]
            assert tuple(one.launch.options.values()) == numbers[3:]
            assert one.launch.programs == 16 * variants.SIDE**2 // numbers[2] * -(-k // numbers[0])
    assert ({name: getattr(config, name) for name in FORMULAS}, vars(config.Gradient)["of"]) == before
    again, old = (one["forward"].launch._replace(tiles=None) for one in (launches(k), usual))
    assert again == old
