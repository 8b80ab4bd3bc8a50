"""Measures bias and variance of the gradient estimators on a layer for which every draw can be enumerated.

    python -m benchmarks.estimators [--draws N] [--out FILE.md]

The SFG layer has K = 3 kernels for T = 2 tasks, so there are 27 assignments. Each task has a fixed nonlinear readout
and squared error as loss, in float64. The exact gradient of E[L(z)] with respect to the logits is the sum over all
assignments. An estimator is judged over many draws: by the cosine between its mean and the exact gradient, its relative
bias |mean - exact| / |exact| (with the standard error of that), and the standard deviation of one draw over |exact|.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sfg_fast.gates import GroupGates

KERNELS, TASKS = 3, 2
GROUPS = TASKS + 1


class Problem(NamedTuple):
    """A loss L(z) for gates z [draws, K, T+1], and the logits at which its expected gradient is wanted."""

    image: Tensor
    weight: Tensor
    readout: Tensor  # [T, 4, K, 3, 3]
    target: Tensor
    logits: Tensor

    @staticmethod
    def random(seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        readout = normal(TASKS, 4, KERNELS, 3, 3) / 3
        return Problem(normal(2, 2, 8, 8), normal(KERNELS, 2, 3, 3) / 2, readout, normal(TASKS, 2, 8, 8),
                       normal(KERNELS, GROUPS) / 2)  # fmt: skip

    def loss(self, z: Tensor) -> Tensor:
        """The loss of each draw, [draws]. The network is dense masking, [F_t | F_s] by summation, a convolution, tanh,
        and the sum of the channels."""
        h = F.relu(F.conv2d(self.image, self.weight, padding=1))
        losses = []
        for task in range(TASKS):
            merged = (z[:, :, task + 1] + z[:, :, 0])[:, None, :, None, None] * h
            y = F.conv2d(merged.flatten(0, 1), self.readout[task], padding=1).tanh().sum(1)
            losses.append((y.unflatten(0, (-1, len(h))) - self.target[task]).square().mean((1, 2, 3)))
        return torch.stack(losses).sum(0)

    def assignments(self) -> Tensor:
        """All one-hot z, [27, K, T+1]."""
        groups = torch.tensor(list(itertools.product(range(GROUPS), repeat=KERNELS)))
        return F.one_hot(groups, GROUPS).to(torch.float64)

    def exact(self) -> Tensor:
        """d/dlogits of the sum over all assignments of q(z) L(z), [K, T+1]."""
        logits, z = self.logits.clone().requires_grad_(), self.assignments()
        q = (z * logits.log_softmax(1)).sum((1, 2)).exp()
        return torch.autograd.grad((q * self.loss(z)).sum(), logits)[0]

    def gradients_of_gates(self) -> Tensor:
        """dL/dz at every one-hot z, [27, K, T+1]."""
        z = self.assignments().requires_grad_()
        return torch.autograd.grad(self.loss(z).sum(), z)[0]


class Estimate(NamedTuple):
    cosine: float
    bias: float  # relative
    error: float  # its standard error
    deviation: float  # of one draw, relative


def estimate(problem: Problem, name: str, temperature: float, every: int, draws: int, seed: int = 0) -> Estimate:
    """Judge an estimator by so many single draws; with every = n by so many runs of n steps, each the mean of its
    steps."""
    torch.manual_seed(seed)
    of_gates, exact = problem.gradients_of_gates(), problem.exact()
    # All draws are done at once, as the kernels of one large layer.
    layer = GroupGates(draws * KERNELS, TASKS, "uniform", name, dtype=torch.float64)
    layer.logits.data = problem.logits.repeat(draws, 1)
    layer.temperature, layer.every = temperature, every
    steps = []
    for _ in range(every):
        groups = layer.draw()
        assert groups.gates is not None
        assert groups.assignment is not None
        z = groups.gates.view(draws, KERNELS, GROUPS)
        if groups.full:
            value = z.detach().requires_grad_()
            dz = torch.autograd.grad(problem.loss(value).sum(), value)[0]
        else:
            place = groups.assignment.view(draws, KERNELS) * GROUPS ** torch.arange(KERNELS - 1, -1, -1)
            dz = of_gates[place.sum(1)]
        steps.append(torch.autograd.grad(z, layer.logits, dz)[0].view(draws, KERNELS, GROUPS))
    each = torch.stack(steps).mean(0)
    mean, scale = each.mean(0), exact.norm()
    deviation = (each - mean).square().sum((1, 2)).mean().sqrt() / scale
    cosine = F.cosine_similarity(mean.flatten(), exact.flatten(), 0)
    return Estimate(
        cosine.item(), ((mean - exact).norm() / scale).item(), (deviation / draws**0.5).item(), deviation.item()
    )


def configurations() -> list[tuple[str, float, int]]:
    """The configurations: (estimator, temperature, every)."""
    found = []
    for name in ("gumbel_softmax", "straight_through", "gumbel_rao", "selected"):
        found += [(name, temperature, 1) for temperature in (1.0, 0.5, 0.1)]
    found.append(("reinmax", 1.0, 1))
    return found + [(name, 0.5, 4) for name in ("straight_through", "gumbel_rao", "reinmax", "gumbel_softmax")]


def table(draws: int, problems: int) -> str:
    """The table of means over several problems."""
    lines = ["| estimator | temperature | every | cosine | relative bias | its error | SD of one draw |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, temperature, every in tqdm(configurations(), desc="estimators"):
        runs = [estimate(Problem.random(seed), name, temperature, every, draws) for seed in range(problems)]
        values = [sum(column) / problems for column in zip(*runs, strict=True)]
        shown = "1 (always)" if name == "reinmax" else f"{temperature:g}"
        lines.append(f"| `{name}` | {shown} | {every} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=20000)
    parser.add_argument("--problems", type=int, default=5, help="random problems to average over")
    parser.add_argument("--out", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    text = (
        f"# Bias and variance of the estimators\n\n`python -m benchmarks.estimators --draws {arguments.draws}`. "
        f"K = {KERNELS}, T = {TASKS}, all {GROUPS**KERNELS} assignments; means over {arguments.problems} random "
        'problems. With every = n a "draw" is the mean of n steps.\n\n'
        + table(arguments.draws, arguments.problems)
        + "\n"
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
