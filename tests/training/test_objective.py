"""The objective against a literal transcription of eq. 2."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from sfg_fast import SFGHighResNet, penalties
from sfg_fast.training.config import ObjectiveConfig
from sfg_fast.training.objective import CategoricalLikelihood, GaussianLikelihood, Objective


def test_equation_2(float64):
    model = SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(3, 3, 3), blocks=1, residual="routed", init="dirichlet")
    objective = Objective(("ct", "organs"), ObjectiveConfig(lambda1=0.3, lambda2=0.7, ct_scale_hu=400.0))
    m, n, size = 4, 60, 5
    outputs = {"ct": torch.randn(m, 1, size, size), "organs": torch.randn(m, 3, size, size)}
    targets = {"ct": torch.randn(m, 1, size, size) * 500, "organs": torch.randint(3, (m, size, size))}

    log_likelihood = 0.0
    for i in range(m):
        for y in range(size):
            for x in range(size):
                ct = Normal(outputs["ct"][i, 0, y, x], 1.0).log_prob(targets["ct"][i, 0, y, x] / 400)
                organ = Categorical(logits=outputs["organs"][i, :, y, x]).log_prob(targets["organs"][i, y, x])
                log_likelihood += float(ct + organ) / size**2
    norms, entropies = (float(value) for value in penalties(model))
    expected = -n / m * log_likelihood + 0.3 * norms - 0.7 * entropies
    value, nll = objective(model, outputs, targets, n)
    assert math.isclose(float(value), expected, rel_tol=1e-10)
    assert math.isclose(float(nll["ct"] + nll["organs"]), -log_likelihood / m, rel_tol=1e-10)


def test_one_task_leaves_the_other_out():
    model = SFGHighResNet(1, {"organs": 3}, width=(3, 3, 3), blocks=1, residual="routed")
    objective = Objective(("organs",), ObjectiveConfig())
    value, nll = objective(model, {"organs": torch.randn(2, 3, 4, 4)}, {"organs": torch.zeros(2, 4, 4).long()}, 10)
    assert set(nll) == {"organs"}
    assert torch.isfinite(value)


def test_learned_noise_finds_the_standard_deviation():
    likelihood = GaussianLikelihood(400.0, learned=True)
    optimiser = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    error = torch.randn(8, 1, 32, 32) * 120  # HU
    for _ in range(300):
        optimiser.zero_grad()
        (-likelihood(torch.zeros_like(error), error)).mean().backward()
        optimiser.step()
    assert likelihood.log_sigma.exp().item() * 400 == pytest.approx(error.std().item(), rel=0.01)


def test_fixed_noise_is_no_parameter():
    assert not any(p.requires_grad for p in GaussianLikelihood(400.0, learned=False).parameters())
    assert not list(CategoricalLikelihood().parameters())
