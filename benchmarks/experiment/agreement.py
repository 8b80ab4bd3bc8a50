"""Do the tasks' gradients agree on the kernels that they share? Tasks that disagree should have kernels of their own.

    python -m benchmarks.experiment.agreement RUN OUT [--steps 600]

It trains in OUT with the configuration of RUN, whose kernels are all shared, for so many steps from the start. At every
tenth step of the second half it takes each task's gradient g of every layer's weight on two batches, a and b. The
product <g_a, g_b> of a kernel estimates without bias the squared mean of one task's gradient, or, of two tasks, the
product of their means. For each layer it prints the cosine of the tasks' mean gradients, and each task's |g|^2 over its
squared mean: how many times as large the gradient of one batch is as what all batches have in common.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfg_fast.networks.controls import sfg_layers
from sfg_fast.tables import Table, markdown
from sfg_fast.training.config import read_config
from sfg_fast.training.step import on_device
from sfg_fast.training.trainer import Trainer

EVERY = 10


def gradients(trainer: Trainer, batch: dict[str, Any]) -> list[list[Tensor]]:
    """Each task's gradients of the weights on one batch, as [tasks][layers]; each is [K, ..], flattened by kernel."""
    weights = [layer.weight for layer in sfg_layers(trainer.model).values()]
    outputs = trainer.model(batch["inputs"])
    found = []
    for name, task in trainer.tasks.items():
        there = batch[f"has_{task.target}"]
        loss = -trainer.objective.likelihoods[name](outputs[name].float(), batch[task.target], there).mean()
        found.append([g.flatten(1) for g in torch.autograd.grad(loss, weights, retain_graph=True)])
    return found


def products(a: list[list[Tensor]], b: list[list[Tensor]], layer: int) -> dict[str, float]:
    """Means over the kernels of a layer: <g_a, g_b> and |g|^2 of each task; and of each two tasks the product of g_a of
    one and g_b of the other."""

    def dot(x: Tensor, y: Tensor) -> float:
        return float((x * y).sum(1).mean())

    found = {}
    for task, (x, y) in enumerate(zip(a, b, strict=True)):
        found[f"mean {task}"] = dot(x[layer], y[layer])
        found[f"whole {task}"] = (dot(x[layer], x[layer]) + dot(y[layer], y[layer])) / 2
    for one, other in itertools.combinations(range(len(a)), 2):
        found[f"{one} {other}"] = (dot(a[one][layer], b[other][layer]) + dot(a[other][layer], b[one][layer])) / 2
    return found


def measure(run: Path, out: Path, steps: int) -> Table:
    """The table of the first so many steps of a training."""
    trainer = Trainer(dataclasses.replace(read_config(run / "config.yaml"), out=str(out)))
    trainer.begin()
    layers, tasks = list(sfg_layers(trainer.model)), list(trainer.tasks)
    sums: list[dict[str, float]] = [{} for _ in layers]
    for step in range(steps):
        if step >= steps // 2 and step % EVERY == 0:
            a, b = (gradients(trainer, on_device(trainer.sampler[step + steps * n], trainer.device)) for n in (1, 2))
            for layer, so_far in enumerate(sums):
                for name, value in products(a, b, layer).items():
                    so_far[name] = so_far.get(name, 0.0) + value
        trainer._train_step()
        trainer.step += 1
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    header = ["layer", *(f"cosine of {tasks[i]} and {tasks[j]}" for i, j in pairs), *(f"noise of {t}" for t in tasks)]
    rows = []
    for name, one in zip(layers, sums, strict=True):
        cosines = [one[f"{i} {j}"] / (one[f"mean {i}"] * one[f"mean {j}"]) ** 0.5 for i, j in pairs]
        noise = [one[f"whole {t}"] / one[f"mean {t}"] for t in range(len(tasks))]
        rows.append([name, *(f"{value:.2f}" for value in cosines), *(f"{value:.1f}" for value in noise)])
    return Table(f"{run.parent.name}, {steps} steps", header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    if options.steps > (most := read_config(options.run / "config.yaml").schedule.steps):
        parser.error(f"--steps {options.steps}: {options.run} has {most} steps, expected at most that")
    table = measure(options.run, options.out, options.steps)
    print(f"# {table.caption}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
