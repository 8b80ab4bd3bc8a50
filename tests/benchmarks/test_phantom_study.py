"""The study's other rule of normalisation, and its report."""

import json

import torch

from benchmarks.phantom_study import DRAW_UNTIL, DRAWS, RESIDUAL, RULES, report, rule
from sfg_fast import SFGConv2d, reference


def test_every_row_is_normalised_by_its_own_statistics():
    layer = SFGConv2d(2, 3, 3, norm="batch", activation=None, estimator="gumbel_softmax")
    x = [torch.randn(4, 2, 6, 6) for _ in range(3)]
    with rule("every row"):
        y = layer(x)
        gates = y.groups.gates
    for group, f in enumerate(y):
        h = f / gates[:, group, None, None]
        torch.testing.assert_close(h.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(h.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)
    assert (layer.norm.draws == 1).all()
    u = torch.nn.functional.conv2d(x[1] + x[0], layer.weight, layer.bias)
    torch.testing.assert_close(layer.norm.running_mean[1], u.mean((0, 2, 3)))
    assert reference.normalise.__module__ == "sfg_fast.reference"


def test_report(tmp_path):
    """From made-up runs: the mean of the last ten of 1, 1/2, .., 1/20 is .067."""
    scores = {str(s): {"gain": 1.0 + s, "psnr": 2.0, "dice": 0.5} for s in (0, *DRAWS)}
    for residual in RESIDUAL:
        for kind, values in (("rule", RULES), ("draw_until", DRAW_UNTIL)):
            for value in values:
                study = "normalisation" if kind == "rule" else "draws"
                run = {"study": study, "residual": residual, kind: value, "seed": 0, "steps": 200, "scores": scores}
                run["nll"] = {task: [1.0 / (step + 1) for step in range(20)] for task in ("ct", "organs")}
                (tmp_path / f"{study} {residual} {value}.json").write_text(json.dumps(run))
    report(tmp_path, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert "| routed | every row | 0.067 (0.000) | 0.067 (0.000) | 1.00 (0.00) | 0.500 (0.000) |" in text
    assert "+1.00 / +0.000 | +2.00 / +0.000" in text
    assert (tmp_path / "out_draws.png").stat().st_size > 1000
