"""The model of a kernel's time: what it counts is what a walk over the tiles counts, and what it reads of machine code
is what the code says. No GPU."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfg_fast.backends import available

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks import counted, gpu_model, roofline, static_report
from benchmarks.roofline import Demand, Gpu, estimate

HOPPER = static_report.ARCHITECTURES[1]
ROUND = Gpu("a GPU of round numbers", memory=1e12, cache=4e12, half=2 * 2048 * 1e9, clock=1e9, multiprocessors=1)


def configuration(direction, width=64, image=(1, 4, 128)):
    some = counted.layer_configurations(width, width, "bf16", HOPPER, image)
    return next(one for one in some if one.direction == direction)


# --- what is counted --------------------------------------------------------------------------------------------------


def test_a_pass_counts_what_a_walk_over_its_tiles_counts():
    """64 channels, 4 x 128 pixels: every program loads a tile of pixels and a tile of the weight for each tap."""
    one = configuration("forward")
    p, tiles = one.what, one.launch.tiles
    batch, height, width = one.image
    loaded = multiplied = stored = programs = 0
    for _, i, j, n in itertools.product(
        range(batch), range(0, height, tiles.pixels_h), range(0, width, tiles.pixels_w), range(0, 64, p.block_n)
    ):
        programs += 1
        pixels = [(i + a, j + b) for a in range(tiles.pixels_h) for b in range(tiles.pixels_w)]
        kernels = range(n, n + p.block_n)
        for _tap, c in itertools.product(range(9), range(0, 64, p.block_k)):
            channels = range(c, c + p.block_k)
            loaded += 2 * (len(pixels) * len(channels) + len(channels) * len(kernels))
            multiplied += len(pixels) * len(channels) * len(kernels)
        stored += 2 * len(pixels) * len(kernels)
    group = torch.arange(64) * 3 // 64
    reads = (group[None, :] == 0) | (group[None, :] == group[:, None])  # [kernels, channels]
    demand = roofline.convolution(one)
    assert demand.programs == programs
    assert demand.requested == loaded + stored
    assert demand.products == multiplied
    assert demand.necessary == 2 * (64 + 64) * height * width
    assert demand.necessary_products == pytest.approx(9 * int(reads.sum()) * height * width, rel=0.01)


TURNS = {  # of the source
    (64, "forward"): 9,  # nine taps of one chunk
    (16, "forward, undrawn"): 18,
    (64, "forward, undrawn"): 9,  # rows of taps: of one chunk of shared channels, and of two that a tile's kernels read
    (16, "forward"): 18,  # 16 rows and the two around them
    (16, "reduce"): 2 * 512 / 64,  # all splits, 64 at a time, of the weight and of the bias
}
PREDICTED = """
import json
from benchmarks import counted, roofline, static_report
found = {}
for width in (16, 64):
    for one in counted.layer_configurations(width, width, "bf16", static_report.ARCHITECTURES[1], (16, 256, 256)):
        if one.direction in ("forward", "forward, undrawn", "reduce"):
            made = roofline.predict(one, roofline.H200)
            found[f"{width} {one.direction}"] = [made.turns, made.floor, made.seconds, made.times[made.bound]]
print(json.dumps(found))
"""


def test_the_machine_code_takes_as_many_turns_as_the_source():
    """In a process of its own, whose Triton compiles: here it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(gpu_model.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PREDICTED], capture_output=True, text=True, env=environment, cwd=root, check=True
    )
    found = json.loads(done.stdout)
    for (width, direction), expected in TURNS.items():
        turns, floor, seconds, longest = found[f"{width} {direction}"]
        assert turns == pytest.approx(expected), (width, direction)
        assert floor <= seconds == longest


def test_a_reduction_goes_through_all_splits():
    one = configuration("reduce", 16, (16, 256, 256))
    splits = 16 * 4 * 8  # images, strips, and walks: not more than four programs for each of 132 multiprocessors
    demand = roofline.DEMANDS["reduce"](one)
    assert demand.programs == 9 * 16 * 16 // 32
    assert demand.loaded == 2 * splits * 9 * 16 * 16 * 4  # of the weight and, as often, of the bias


def test_a_normalisation_reads_its_image_once_in_a_loop():
    some = gpu_model.layer_launches(64, "bf16", HOPPER, (16, 256, 256))
    size = 2 * 64 * 16 * 256 * 256
    assert roofline.DEMANDS["moments"](some["moments"])[1:3] == (size, size)
    assert roofline.DEMANDS["affine"](some["affine"])[1:3] == (2 * size, 2 * size)
    assert roofline.DEMANDS["affine_gradient"](some["affine_gradient"])[1:3] == (3 * size, 3 * size)
    for name in ("moments", "affine", "affine_gradient", "gradient_sums"):  # and so does one of each image
        of_batch, of_each = (roofline.DEMANDS[name](some[name + suffix]) for suffix in counted.NORMS)
        assert of_batch[1:3] == of_each[1:3]
    images = [roofline.DEMANDS["slopes"](some["slopes" + suffix]) for suffix in counted.NORMS]
    assert [demand.necessary for demand in images] == [2 * 64 * 4, 16 * 2 * 64 * 4]
    assert [demand.programs for demand in images] == [4, 16 * 4]
    shortcut = counted.norm_constants(64, HOPPER, (16, 256, 256))["affine"]
    assert roofline.DEMANDS["affine"](some["affine"]._replace(constants=shortcut))[1:3] == (3 * size, 3 * size)


# --- what the machine code says ---------------------------------------------------------------------------------------

SASS = """
        /*0000*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8].tnspB, R24 ;
        /*0060*/                   HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0070*/               @P1 BRA 0x20 ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
        /*00b0*/                   NOP;
"""


def code():
    return static_report.nvidia_instructions(SASS)


def test_instructions_are_told_apart():
    parts = roofline.parts(code())
    assert [here.op for here in parts.once] == ["MOV", "STG.E.128", "EXIT", "BRA"]  # the first load is the loop's
    assert [here.op.split(".")[0] for here in parts.turns[0]] == ["LDGSTS", "LDG", "NOP", "HGMMA", "HGMMA", "BRA"]
    assert parts.per_turn(roofline.multiplied) == 2 * 64 * 32 * 16 / 4  # of one of the four warps
    assert parts.per_turn(roofline.loaded) == 2 * 512
    assert parts.cached == 0.5
    factors = [2 * (64 * 16 + 16 * 32), 2 * 16 * 32]  # from shared memory; the second one has its first in registers
    assert parts.per_turn(roofline.path_bytes) == 2 * (512 + 512) + sum(factors) / 4


@pytest.mark.parametrize(
    ("op", "products", "path"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16, 0), ("LDSM.16.M88.4", 0, 512), ("LDS", 0, 128), ("STS.128", 0, 512),
        ("SHFL.BFLY", 0, 128), ("STG.E.64", 0, 512), ("FADD", 0, 0),
    ],
)  # fmt: skip
def test_what_one_instruction_multiplies_and_moves(op, products, path):
    here = static_report.Instruction(0, op, None, "")
    assert (roofline.multiplied(here), roofline.path_bytes(here)) == (products, path)


def test_each_limit_is_plain_arithmetic():
    """A program of four warps that takes ten turns, three of them on one multiprocessor that holds two."""
    made = static_report.Binary(4, 3, 64, 0, 1 << 10, 2, code(), "")
    per_turn = 2 * 64 * 32 * 16
    demand = Demand(3, necessary=5e6, requested=8e6, products=3 * 10 * per_turn, necessary_products=2048e3)
    found = estimate(made, demand, ROUND)
    instructions = 4 + 10 * 6
    shared = 1024 + 10 * (2048 + 2 * (64 * 16 + 2 * 16 * 32) / 4)  # bytes of one warp: STG once, and the turns
    assert found.turns == 10
    assert found.instructions == 3 * 4 * instructions
    assert found.matrix == "HGMMA"
    assert found.times["memory"] == pytest.approx(5e-6)
    assert found.times["L2"] == pytest.approx(2e-6)
    assert found.times["shared"] == pytest.approx(3 * 4 * shared / 128 / 1e9)
    assert found.times["issue"] == pytest.approx(3 * instructions / 1e9)
    products = 10 * per_turn / 2048  # clocks, at the peak: the GPU's half precision reaches it
    assert found.times["tensor"] == pytest.approx(3 * products / 1e9)
    assert found.times["latency"] == pytest.approx(2 * (4 * instructions + 479 + 10 * 263 / 2 + products) / 1e9)
    assert found.floor == pytest.approx(5e-6)
    assert found.seconds == max(found.times.values())
    assert found.times[found.bound] == found.seconds
    only_products = demand._replace(necessary=0, necessary_products=2048e5)
    assert estimate(made, only_products, ROUND).floor == pytest.approx(1e-4)


# --- what was measured ------------------------------------------------------------------------------------------------


def test_a_measured_time_belongs_to_its_launch():
    recorded = "convolve, 4 warps, 9 x 1 programs, 912 instructions; reduce, BLOCK 256, 80 instructions"
    longer, fewer = recorded.replace("912", "913"), recorded.replace("4 warps", "2 warps")
    here = gpu_model.triton.__version__
    assert gpu_model.still_chosen(recorded, recorded, here)
    assert not gpu_model.still_chosen(longer, recorded, here)
    assert gpu_model.still_chosen(longer, recorded, "another version")
    assert not gpu_model.still_chosen(fewer, recorded, "another version")


NOT_MEASURED = (
    "instance norm + leaky ReLU", "instance norm + leaky ReLU, gradient", "gates' gradient of each image",
)  # fmt: skip


def test_every_measured_pass_has_its_launch_recorded():
    recorded = json.loads((gpu_model.RESULTS / "h200_confirmed_launches.json").read_text())
    names = {f"{k}, {variant}, {name}" for k, variant, name, _ in gpu_model.measured()}
    assert names == set(recorded) - {"triton"}
    assert {(k, name) for k, variant, name, _ in gpu_model.measured() if variant == "as chosen"} == set(
        itertools.product((16, 32, 64, 128), (name for name in gpu_model.PASSES if name not in NOT_MEASURED))
    )


def test_the_fit_is_of_measured_over_predicted():
    some = [gpu_model.Fit(64, str(n), "forward + ReLU", time, 1e-6) for n, time in enumerate((1e-6, 2e-6, 3e-6))]
    assert "median 2.00" in gpu_model.spread(some)
    assert "1.00 and 3.00 (3 times)" in gpu_model.spread(some)
    pair = "Of 1 pairs of choices for a pass that differ by a tenth, the model orders "
    for predicted, right, wrong, none in ((0.5e-6, 0, 1, 0), (2e-6, 1, 0, 0), (1.01e-6, 0, 0, 1)):
        other = gpu_model.Fit(64, "another", "forward + ReLU", 5e-6, predicted)
        found = gpu_model.ordered([some[0], other])
        assert found == f"{pair}{right} rightly and {wrong} wrongly, and sees no difference (less than .03) in {none}."
    assert gpu_model.ordered([some[0], other._replace(width=32)]).startswith("Of 0 pairs")


def test_what_another_triton_compiled_otherwise_is_told():
    one = {
        "registers": 100,
        "stack": 0,
        "CTAs": 3,
        "instructions": 900,
        "matrix": "HGMMA",
        "remarks": [],
        "predicted": 50.0,
    }
    other = one | {"registers": 120, "stack": 8, "remarks": ["C7514"], "predicted": 60.0}
    here = {"triton": "2", "launches": {"64 forward": one}, "fit": []}
    there = {"triton": "1", "launches": {"64 forward": other}, "fit": ["- a line"]}
    lines = gpu_model.differences(here, there)
    assert "registers differ by 20 to +20, predicted times are 1.20 to 1.20" in lines[0]
    assert lines[2:] == ["- a line", "- 64 forward: remarks ['C7514'], here none", "- 64 forward: stack 8, here none"]
