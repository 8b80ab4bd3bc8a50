"""The static report: it runs, and it would see a broken guarantee."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfg_fast.backends import available
from sfg_fast.groups import FilterGroups, Routing

if not available("triton"):
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from sfg_fast.kernels.spec import RoutedConv
from sfg_fast.kernels.triton import config
from sfg_fast.kernels.triton.convolve import ranges_read

from benchmarks import counted, static_report

SCRIPT = Path(static_report.__file__)


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[1]
    )


@pytest.mark.parametrize(
    ("options", "kernels"),
    [(["--channels", "64"], 30), pytest.param([], 84, marks=pytest.mark.slow)],
    ids=["64 channels", "64 and 128 channels"],
)
def test_guarantees_hold_on_hopper(options, kernels):
    done = run("--quick", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"All guarantees hold for {kernels} compiled kernels." in done.stdout


@triton.jit
def _ranges(out_offsets, in_offsets, table, P: tl.constexpr):
    tile = tl.program_id(0)
    prefix, start, chunks = ranges_read(out_offsets, in_offsets, tile * P.block_n, P)
    tl.store(table + 3 * tile, prefix)
    tl.store(table + 3 * tile + 1, start)
    tl.store(table + 3 * tile + 2, chunks)


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("sizes", [((5, 6, 5), (5, 6, 5)), ((43, 42, 43), (70, 0, 60)), ((0, 0, 130), (17, 40, 3))])
def test_ranges_of_the_report_are_those_of_the_kernels(routing, sizes):
    """So executed products are counted from what the device really does."""
    groups = [
        FilterGroups.from_assignment(torch.repeat_interleave(torch.arange(3), torch.tensor(side))) for side in sizes
    ]
    spec = RoutedConv(*groups, routing, counted.GEOMETRY)
    for p, out, read in zip(
        config.passes(spec, (3, 3), torch.float16, config.Device(132, 90, 227 << 10))[:2],
        groups,
        groups[::-1],
        strict=True,
    ):
        if p.flat:
            continue
        tiles = p.columns // p.block_n
        table = torch.full((tiles, 3), -1, dtype=torch.int32)
        _ranges[(tiles,)](out.offsets, read.offsets, table, p)
        expected = counted.tile_ranges(p, out, read)
        for found, wanted in zip(table.tolist(), expected, strict=True):
            assert found[2] == wanted[2]
            if wanted[2]:  # a tile that reads nothing may say anything of where
                assert found[0] == wanted[0]
                assert found[2] == found[0] or found[1] == wanted[1]


GOOD = static_report.Code(128, 0, 32768, 4, 16, 100, 16, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 232449}, "232449 bytes of shared memory, there are 232448"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"load": 8}, "accesses of 8 bytes"),
        ({"store": 2}, "accesses of 2 bytes"),
        ({"warnings": ("C7514",)}, "ptxas says C7514, which KNOWN does not explain"),
    ],
)
def test_a_broken_guarantee_is_found(change, message):
    one = next(counted.layer_configurations(128, 128, "fp16", static_report.ARCHITECTURES[1], (1, 64, 64)))
    found = static_report.problems(one, GOOD._replace(**change), counted.work(one))
    assert found == [] if message is None else len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("architecture", "pixels", "found"),
    [("sm_90", 128, True), ("sm_100", 64, True), ("sm_90", 32, False), ("sm_80", 128, False)],
)
def test_hmma_where_factors_could_come_from_shared_memory_is_found(monkeypatch, architecture, pixels, found):
    """And it is no problem where KNOWN says why."""
    here = next(one for one in static_report.ARCHITECTURES if one.name == architecture)
    one = next(counted.layer_configurations(64, 64, "bf16", here, (1, 64, 64)))
    tiles = dataclasses.replace(one.launch.tiles, pixels_h=1, pixels_w=pixels)
    one = one._replace(launch=one.launch._replace(tiles=tiles), kernel="another")
    code = GOOD._replace(hmma=8)
    problems = static_report.problems(one, code, None)
    assert len(problems) == found
    assert all(f"HMMA in a tile of {pixels} rows" in problem for problem in problems)
    assert static_report.problems(one, GOOD, None) == []
    monkeypatch.setitem(static_report.KNOWN, ("another", "HMMA"), "because")
    assert static_report.problems(one, code, None) == []


def test_a_warning_that_is_explained_is_no_problem(monkeypatch):
    one = next(counted.layer_configurations(128, 128, "fp16", static_report.ARCHITECTURES[1], (1, 64, 64)))
    monkeypatch.setitem(static_report.KNOWN, (one.kernel, "C7514"), "because")
    assert static_report.problems(one, GOOD._replace(warnings=("C7514",)), counted.work(one)) == []


SERIALISED = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 p) {
    .reg .b64 %d<3>;
    .reg .f32 %f<5>;
    ld.param.u64 %d1, [p];
    wgmma.fence.sync.aligned;
    { .reg .pred q; setp.ne.b32 q, 0, 0;
      wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}, %d1, %d1, q, 1, 1, 0, 0; }
    add.f32 %f1, %f1, %f2;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.f32 [%d1], %f1;
    ret;
}
"""


def test_what_ptxas_remarks_is_read():
    """Sums that are looked at while a matrix instruction may still write them: it has to wait for each."""
    (code,) = static_report.warnings(SERIALISED, 90)
    assert code.startswith("C75")
    assert static_report.warnings(SERIALISED.replace("add.f32 %f1, %f1, %f2;", ""), 90) == ()


def test_tiles_that_skip_nothing_are_found():
    """Where tiles are chosen by count."""
    one = next(counted.layer_configurations(128, 128, "fp16", static_report.ARCHITECTURES[0], (1, 64, 64)))
    large = dataclasses.replace(one.what, block_n=128, block_k=128, columns=128)
    done = counted.work(one._replace(what=large))
    assert done.executed / done.necessary == pytest.approx(1.8, abs=0.01)
    assert "1.797 times the necessary products" in static_report.problems(one, GOOD, done)[0]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0020*/                   LDGDEPBAR ;
        /*0030*/              @!P0 LDG.E.U16 R7, desc[UR4][R2.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*0070*/                   BRA 0x70 ;
"""


def test_machine_code_is_read():
    code = static_report.nvidia_instructions(SASS)
    loop = static_report.main_loop(code, static_report.re.compile("HMMA"))
    assert [op.split(".")[0] for op in loop] == ["LDGSTS", "LDGDEPBAR", "LDG", "HMMA", "BRA"]
    assert [static_report.width(op) for op in loop if static_report.re.match(static_report.LOADS, op)] == [16, 2]
    assert static_report.width("global_load_dwordx4") == 16
    assert static_report.width("global_load_ushort") == 2
