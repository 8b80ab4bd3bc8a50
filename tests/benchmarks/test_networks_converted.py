"""The sweep of networks: its list, its checks, the processes, and the table."""

import json

import pytest
import torch
from torch import nn

from benchmarks import networks_converted as sweep
from sfg_fast.networks.controls import sfg_layers


def small():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    x = torch.randn(2, 1, 16, 16)
    return net, x, sweep.converted_of(net, x)[0]


def test_thirty_medical_networks_and_sixty_others():
    names = [network.name for network in sweep.NETWORKS + sweep.MORE]
    assert len(set(names)) == len(names)
    medical = [network for network in sweep.NETWORKS if network.package in sweep.MEDICAL]
    assert (len(medical), len(sweep.NETWORKS)) == (30, 90)


@pytest.mark.parametrize("name", sweep.CHECKS)
def test_a_check_passes(name):
    sweep.check(name, *small())


@pytest.mark.parametrize("name", ["eval", "train", "other images"])
def test_checks_see_another_network(name):
    net, x, converted = small()
    with torch.no_grad():
        net[3].weight[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError):
        sweep.check(name, net, x, converted)


def test_checks_see_tasks_that_are_alike():
    net, x, converted = small()

    class Alike(type(converted)):
        def forward(self, x):
            return dict.fromkeys(sweep.TASKS, super().forward(x)["a"])

    converted.__class__ = Alike
    with pytest.raises(AssertionError, match="same for both tasks"):
        sweep.dense_masking(net, x, converted)


def test_checks_see_gradients_that_are_missing_or_not_finite():
    net, x, converted = small()
    with pytest.raises(AssertionError, match="is not finite"):
        sweep.check("trains", net, x * float("inf"), converted)
    next(iter(sfg_layers(converted).values())).logits.requires_grad_(False)
    with pytest.raises(AssertionError, match="logits of '0' did not move"):
        sweep.check("trains", net, x, converted)


@pytest.mark.parametrize("name", ["frozen", "exported"])
def test_checks_see_another_frozen_network(name, monkeypatch):
    net, x, converted = small()
    freeze = sweep.freeze

    class Noisy(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.frozen = frozen

        def forward(self, x):
            by = 1.001 if name == "frozen" or torch.compiler.is_exporting() else 1
            return {task: by * y for task, y in self.frozen(x).items()}

    monkeypatch.setattr(sweep, "freeze", lambda *args, **options: Noisy(freeze(*args, **options)))
    with pytest.raises(AssertionError, match="not close"):
        sweep.check(name, net, x, converted)


def test_paths_of_stochastic_depth_are_kept_and_dropout_drops_nothing():
    x = torch.ones(64)
    with sweep.NothingDropped():
        assert torch.equal(torch.empty(64).bernoulli_(0.5), x)
        assert torch.equal((torch.rand(64) + 0.8).floor(), x)  # MONAI keeps a path in this way
        assert torch.equal(nn.Dropout(0.5)(x), x)
        assert torch.equal(nn.functional.dropout(x, 0.5), x)
    assert not torch.equal(nn.functional.dropout(x, 0.5), x)


FULL = {"convolutions": 2, "coverage": [2, 2], "becomes": {"SFG layer": 1, "head": 1}, "copied": [], "seconds": 1.0}
PASSED = dict.fromkeys(sweep.CHECKS, "")
REFUSED = "convert: 2 things stand in the way:\n- 'a' is odd, expected even\n- 'b' is odd, expected even"
ROWS = [
    ("MONAI HighResNet", {**FULL, "checks": PASSED}, True, "| HighResNet | 2 | SFG layer: 1, head: 1 | all pass |"),
    ("timm vit_tiny_patch16_224", {**FULL, "coverage": [1, 1], "checks": PASSED}, False, "vit_tiny_patch16_224"),
    ("MONAI RegUNet", {**FULL, "checks": {**PASSED, "train": "AssertionError: a | b"}}, False, "train: AssertionError"),
    ("MONAI VNet", {**FULL, "checks": {"eval": ""}, "ended": "stopped after 600 s"}, False, "not done: train, other"),
    ("timm dla34", {**FULL, "coverage": [1, 2], "copied": ["behind 'x'"], "checks": PASSED}, False, "(behind 'x')"),
    ("timm dpn48b", {"refused": REFUSED}, False, "refused: 'a' is odd, expected even (the first of 2) |"),
    ("smp PAN", {"ended": "the process ended with exit code -11"}, False, "exit code -11"),
]


@pytest.mark.parametrize(("name", "row", "full", "words"), ROWS)
def test_a_row_says_what_became_of_a_network(name, row, full, words):
    assert sweep.is_full(row) == full
    network = next(one for one in sweep.NETWORKS if one.name == name)
    line = sweep.line(network, row)
    assert words in line
    assert line.count("|") == 6


def test_results_are_kept_and_counted(tmp_path, monkeypatch, capsys):
    """What is there is not measured again, and a line that was cut off is."""
    out, asked = tmp_path / "found.md", []
    kept = {"name": "MONAI HighResNet", **FULL, "checks": PASSED}
    out.with_suffix(".jsonl").write_text(json.dumps(kept) + '\n{"name": "MONAI VN')

    def measured(network):
        asked.append(network.name)
        return rows[network.name]

    monkeypatch.setattr(sweep, "measured", measured)
    monkeypatch.setattr(sweep, "installed", lambda module: not module.startswith("timm"))
    rows = {name: {"name": name, **row} for name, row, _, _ in ROWS}
    sweep.main(["--only", *rows, "--out", str(out)])
    assert asked == ["MONAI RegUNet", "MONAI VNet", "smp PAN"]
    assert sweep.stored(out.with_suffix(".jsonl")).keys() == {"MONAI HighResNet", *asked}
    text, printed = out.read_text(), capsys.readouterr().out
    assert "- medical: 1 of 3 fully converted with every check passed; 3 accepted, 0 refused, 0 crashed." in text
    assert "- general: 0 of 1 fully converted with every check passed; 0 accepted, 0 refused, 1 crashed." in text
    assert "Not measured and not counted: MONAI AHNet," in text
    assert "timm is not installed, so the networks of timm are left out." in printed
    assert "has the results of 1 networks." in printed


def test_a_process_that_crashes_or_takes_too_long_is_told(monkeypatch):
    row = sweep.measured(sweep.Network("nnU-Net", "NoSuchNetwork"))
    assert row["ended"] == "the process ended with exit code 1"
    monkeypatch.setattr(sweep, "LIMIT", 0.1)
    assert sweep.measured(sweep.NETWORKS[0])["ended"] == "stopped after 0.1 s"


@pytest.mark.slow
def test_a_network_is_measured():
    network = next(one for one in sweep.NETWORKS if one.name == "MONAI RegUNet")
    row = sweep.measured(network)
    assert sweep.is_full(row)
    assert row["convolutions"] == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--only", "resnet"], "--only 'resnet' is no network of the list"), (["--jobs", "0"], "--jobs 0, expected")],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
