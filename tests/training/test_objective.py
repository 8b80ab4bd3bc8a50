"""The objective against a literal transcription of eq. 2."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from sfg_fast import SFGHighResNet, penalties
from sfg_fast.data.targets import Target
from sfg_fast.tasks import read_tasks
from sfg_fast.tasks.classes import CategoricalLikelihood
from sfg_fast.tasks.numbers import GaussianLikelihood
from sfg_fast.training.config import ObjectiveConfig
from sfg_fast.training.objective import Objective

CT = Target("ct", "intensities", "HU")
LABELS = Target("labels", "labels", names={"background": 0, "a": 1, "b": 2})
ALL = {"ct": torch.ones(4).bool(), "organs": torch.ones(4).bool()}


def both():
    return read_tasks(["ct", "organs"], {"ct": CT, "labels": LABELS})


def there(count):
    return torch.ones(count).bool()


def test_equation_2(float64):
    model = SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(3, 3, 3), blocks=1, residual="routed", init="dirichlet")
    objective = Objective(both(), ObjectiveConfig(lambda1=0.3, lambda2=0.7))
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
    norms, entropies = (value.item() for value in penalties(model))
    expected = -n / m * log_likelihood + 0.3 * norms - 0.7 * entropies
    value, nll = objective(model, outputs, targets, n, ALL)
    assert math.isclose(value.item(), expected, rel_tol=1e-10)
    assert math.isclose(float(nll["ct"] + nll["organs"]), -log_likelihood / m, rel_tol=1e-10)


def test_deep_supervision_weighs_coarser_outputs_by_halves(float64):
    """Voxel by voxel: those of a coarser output are every second, or fourth, of the target."""
    model = SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(3, 3, 3), blocks=1, residual="routed")
    objective = Objective(both(), ObjectiveConfig(lambda1=0.0, lambda2=0.0))
    m, n, size, coarse = 2, 10, (7, 5), [(7, 5), (4, 3), (2, 2)]
    outputs = {task: [torch.randn(m, k, *one) for one in coarse] for task, k in (("ct", 1), ("organs", 3))}
    targets = {"ct": torch.randn(m, 1, *size) * 500, "organs": torch.randint(3, (m, *size))}
    expected = {"ct": 0.0, "organs": 0.0}
    for level, (weight, (height, width)) in enumerate(zip((4 / 7, 2 / 7, 1 / 7), coarse, strict=True)):
        for i in range(m):
            for y in range(height):
                for x in range(width):
                    at = i, 0, y * 2**level, x * 2**level
                    ct = Normal(outputs["ct"][level][i, 0, y, x], 1.0).log_prob(targets["ct"][at] / 400)
                    logits = outputs["organs"][level][i, :, y, x]
                    organ = Categorical(logits=logits).log_prob(targets["organs"][at[0], at[2], at[3]])
                    for task, one in (("ct", ct), ("organs", organ)):
                        expected[task] -= weight * float(one) / (height * width * m)
    present = {task: there(m) for task in expected}
    value, nll = objective(model, outputs, targets, n, present)
    assert {task: one.item() for task, one in nll.items()} == pytest.approx(expected, rel=1e-10)
    assert value.item() == pytest.approx(n * sum(expected.values()), rel=1e-10)
    one_level = {task: every[:1] for task, every in outputs.items()}
    plain = {task: every[0] for task, every in outputs.items()}
    assert torch.equal(*(objective(model, found, targets, n, present)[0] for found in (one_level, plain)))


def test_deep_supervision_of_volumes(float64):
    model = SFGHighResNet(1, {"organs": 3}, width=(3, 3, 3), blocks=1, residual="routed")
    objective = Objective(read_tasks(["organs"], {"labels": LABELS}), ObjectiveConfig(lambda1=0.0, lambda2=0.0))
    outputs, target = [torch.zeros(1, 3, 3, 4, 5), torch.zeros(1, 3, 2, 2, 3)], torch.ones(1, 3, 4, 5).long()
    target[:, ::2, ::2, ::2] = 2  # all that the coarser output is compared with
    outputs[1][:, 2] = 1.0
    second = -Categorical(logits=torch.tensor([0.0, 0.0, 1.0])).log_prob(torch.tensor(2)).item()
    nll = objective(model, {"organs": outputs}, {"organs": target}, 1, {"organs": there(1)})[1]["organs"]
    assert nll.item() == pytest.approx(2 / 3 * math.log(3) + 1 / 3 * second)


def test_one_task_leaves_the_other_out():
    model = SFGHighResNet(1, {"organs": 3}, width=(3, 3, 3), blocks=1, residual="routed")
    objective = Objective(read_tasks(["organs"], {"labels": LABELS}), ObjectiveConfig())
    outputs, targets = {"organs": torch.randn(2, 3, 4, 4)}, {"organs": torch.zeros(2, 4, 4).long()}
    value, nll = objective(model, outputs, targets, 10, {"organs": there(2)})
    assert set(nll) == {"organs"}
    assert torch.isfinite(value)


def test_learned_noise_finds_the_standard_deviation():
    likelihood = GaussianLikelihood(400.0, "learned")
    optimiser = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    error = torch.randn(8, 1, 32, 32) * 120  # HU
    for _ in range(300):
        optimiser.zero_grad()
        (-likelihood(torch.zeros_like(error), error, there(8))).mean().backward()
        optimiser.step()
    assert likelihood.log_sigma.exp().item() * 400 == pytest.approx(error.std().item(), rel=0.01)


def test_fixed_noise_is_no_parameter():
    assert not any(p.requires_grad for p in GaussianLikelihood(400.0, "fixed").parameters())
    assert not any(p.requires_grad for p in CategoricalLikelihood("fixed").parameters())


def test_heteroscedastic_noise_is_predicted_for_every_voxel(float64):
    likelihood = GaussianLikelihood(400.0, "heteroscedastic")
    output, target = torch.randn(3, 2, 4, 5), torch.randn(3, 1, 4, 5) * 400
    exact = Normal(output[:, :1], output[:, 1:].exp()).log_prob(target / 400).mean((1, 2, 3))
    torch.testing.assert_close(likelihood(output, target, there(3)), exact)


def test_homoscedastic_weighting_is_kendalls(float64):
    likelihood = CategoricalLikelihood("learned")
    likelihood.log_sigma.data.fill_(0.3)
    output, target = torch.randn(3, 4, 5, 5), torch.randint(4, (3, 5, 5))
    log_p = Categorical(logits=output.movedim(1, -1)).log_prob(target).mean((1, 2))
    torch.testing.assert_close(likelihood(output, target, there(3)), log_p / math.exp(0.6) - 0.3)


def test_missing_targets_are_left_out_and_the_rest_is_unbiased(float64):
    """The mean over all batches of the data term is that of all examples, whoever has which target."""
    model = SFGHighResNet(1, {"ct": 1, "organs": 3}, width=(3, 3, 3), blocks=1, residual="routed")
    objective = Objective(both(), ObjectiveConfig(lambda1=0.0, lambda2=0.0))
    total, size = 6, 3
    outputs = {"ct": torch.randn(total, 1, size, size), "organs": torch.randn(total, 3, size, size)}
    targets = {"ct": torch.randn(total, 1, size, size), "organs": torch.randint(3, (total, size, size))}
    present = {"ct": torch.tensor([1, 1, 0, 0, 1, 0]).bool(), "organs": torch.tensor([0, 1, 1, 0, 1, 1]).bool()}
    targets["ct"][~present["ct"]] = float("nan")  # whatever it holds

    def value(index):
        pick = lambda tensors: {task: tensor[index] for task, tensor in tensors.items()}  # noqa: E731
        return objective(model, pick(outputs), pick(targets), total, pick(present))

    everything, nll = value(list(range(total)))
    pairs = [value([i, j])[0] for i in range(total) for j in range(total)]
    torch.testing.assert_close(torch.stack(pairs).mean(), everything)
    exact = -sum(Normal(outputs["ct"][i], 1.0).log_prob(targets["ct"][i] / 400).mean() for i in (0, 1, 4)) / 3
    torch.testing.assert_close(nll["ct"], exact.detach())
    assert value([2, 3])[1]["ct"].isnan()


def test_a_missing_target_has_no_gradient():
    objective = Objective(read_tasks(["ct"], {"ct": CT}), ObjectiveConfig())
    model = SFGHighResNet(1, {"ct": 1}, width=(3, 3, 3), blocks=1, residual="routed")
    output = torch.randn(2, 1, 3, 3, requires_grad=True)
    target = torch.full((2, 1, 3, 3), float("nan"))
    target[0] = 0
    objective(model, {"ct": output}, {"ct": target}, 2, {"ct": torch.tensor([True, False])})[0].backward()
    assert output.grad[0].any()
    assert torch.equal(output.grad[1], torch.zeros(1, 3, 3))
