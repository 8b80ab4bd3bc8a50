"""Does learning find what the tasks can share?

    python -m benchmarks.learning teachers FOLDER     three SFG layers of 12 kernels learn from two teachers
    python -m benchmarks.learning exhaustive FOLDER   small problems where every grouping can be tried
    python -m benchmarks.learning report FOLDER FILE.md

Runs are added to FOLDER/*.jsonl one by one; a run that is there already is not run again. `report` also draws FILE.png.

`teachers`: both tasks regress a small network ("teacher") on a 2-channel image: the identical teacher, different ones
on the same channel, or different ones on disjoint channels. A network learns p. Then networks are trained anew with
fixed groupings: all shared, all split, the learnt grouping (argmax p), the learnt grouping with its kernels' groups
shuffled within each layer, and the learnt grouping with the groupings of its layers shuffled among the layers. Kernels
of a layer are exchangeable before training, so shuffling WITHIN a layer changes nothing but the luck of the seed: the
difference to the learnt grouping shows how large this luck is.

`exhaustive`: the first layer has K = 3 kernels for two tasks, so there are 10 groupings up to the kernels' order. Each
is trained with several seeds, and they are ranked by their mean validation loss. The regret of a learnt grouping is its
loss minus that of the best grouping, as a share of the spread (worst minus best). Only problems with a spread of more
than three SDs over seeds count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfg_fast import SFGConv2d, assign, penalties, set_estimator, set_temperature
from sfg_fast.draws import temperature_at
from sfg_fast.layers.streams import Heads
from sfg_fast.networks.controls import sfg_layers

TEACHERS = ("identical", "different", "disjoint")
ESTIMATORS = (("straight_through", 1), ("gumbel_softmax", 1), ("gumbel_rao", 1), ("reinmax", 1), ("selected", 1),
              ("straight_through", 4))  # fmt: skip
CONTROLS = ("learnt", "shuffled within layers", "shuffled among layers")
SIZE, BATCH, VALIDATION = 16, 8, 64
RATE, LOGITS_RATE, ENTROPY = 3e-3, 5e-2, 1e-4


class Problem(NamedTuple):
    """Two tasks, and the network that learns them."""

    teacher: str
    widths: tuple[int, ...] = (12, 12, 12)
    steps: int = 1500
    images: int = 0  # size of a fixed training set; 0: new images at every step
    noise: float = 0.0  # SD of the training targets' noise over that of the targets

    @property
    def name(self) -> str:
        data = f"{self.images} images, noise {self.noise:g}" if self.images else "unlimited data"
        return f"{self.teacher}, {data}"


def teacher(seed: int) -> nn.Module:
    """A fixed random network from 1 channel to 1 channel, with a receptive field of 7x7."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for channels, kernels in ((1, 8), (8, 8), (8, 1)):
        conv = nn.Conv2d(channels, kernels, 3, padding=1)
        conv.weight.data = torch.randn(conv.weight.shape, generator=generator) * (1.5 / (9 * channels)) ** 0.5
        conv.bias.data = torch.randn(kernels, generator=generator) * 0.1  # type: ignore[union-attr]
        layers += [conv, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Data:
    """Images and standardised targets [N, 2, H, W] of both tasks."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.generator = problem, torch.Generator().manual_seed(1000 + seed)
        self.teachers = teacher(1), teacher(1 if problem.teacher == "identical" else 2)
        self.second = int(problem.teacher == "disjoint")  # channel of the second teacher
        x, y = self._raw(VALIDATION, torch.Generator().manual_seed(999))
        self.mean, self.deviation = y.mean((0, 2, 3), keepdim=True), y.std((0, 2, 3), keepdim=True)
        self.validation = x, (y - self.mean) / self.deviation
        self.fixed = self._noisy(problem.images) if problem.images else None

    def _raw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 2, SIZE, SIZE, generator=generator)
        with torch.no_grad():
            first, second = self.teachers
            return x, torch.cat([first(x[:, :1]), second(x[:, self.second : self.second + 1])], 1)

    def _noisy(self, count: int) -> tuple[Tensor, Tensor]:
        x, y = self._raw(count, self.generator)
        y = (y - self.mean) / self.deviation
        return x, y + self.problem.noise * torch.randn(y.shape, generator=self.generator)

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.fixed is None:
            return self._noisy(BATCH)
        index = torch.randint(len(self.fixed[0]), (BATCH,), generator=self.generator)
        return self.fixed[0][index], self.fixed[1][index]


class Net(nn.Module):
    """SFG layers, merges by summation, and a head for each task. From layer number `learnt` on an even split is
    fixed."""

    def __init__(self, widths: tuple[int, ...], learnt: int) -> None:
        super().__init__()
        layers = [SFGConv2d(c, k, 3, padding=1, activation="relu") for c, k in itertools.pairwise((2, *widths))]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for layer in layers[learnt:]:
            layer.assign(torch.arange(layer.out_channels) * 3 // layer.out_channels)
        self.layers, self.heads = nn.Sequential(*layers), Heads(widths[-1], {"first": 1, "second": 1})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.heads(self.layers(x)).values()), 1)


Grouping = list[list[int]]


def train(
    problem: Problem,
    seed: int,
    estimator: str = "none",
    every: int = 1,
    grouping: Grouping | None = None,
    learnt: int = 99,
) -> dict[str, Any]:
    """The result of a run with a learnt or a fixed grouping of the first layers. Its validation loss is the mean
    squared error over the variance, averaged over both tasks."""
    torch.manual_seed(seed)
    data, net = Data(problem, seed), Net(problem.widths, learnt)
    layers = list(sfg_layers(net).items())[:learnt]
    if grouping is None:
        set_estimator(net, estimator, every)
    else:
        assign(net, {name: groups for (name, _), groups in zip(layers, grouping, strict=True)})
    logits = [layer.logits for _, layer in layers]
    weights = [p for name, p in net.named_parameters() if not name.endswith("logits")]
    optimiser = torch.optim.Adam([{"params": weights, "lr": RATE}, {"params": logits, "lr": LOGITS_RATE}])
    for step in range(problem.steps):
        set_temperature(net, temperature_at(step / problem.steps))
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / problem.steps))
        x, y = data.batch()
        loss = (net(x) - y).square().mean((0, 2, 3)).sum() - ENTROPY * penalties(net)[1]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()
    with torch.no_grad():
        x, y = data.validation
        loss = (net(x) - y).square().mean().item()
    p = [layer.probabilities() for _, layer in layers]
    return {"loss": loss, "p": [one.mean(0).tolist() for one in p], "grouping": [one.argmax(1).tolist() for one in p]}


def fixed(name: str, widths: tuple[int, ...], learnt: Grouping, seed: int) -> Grouping:
    """The grouping of this name, to train a network with."""
    if name == "all shared":
        return [[0] * width for width in widths]
    if name == "all split":
        return [[1 + kernel * 2 // width for kernel in range(width)] for width in widths]
    generator = torch.Generator().manual_seed(seed)
    if name == "shuffled within layers":
        return [[groups[i] for i in torch.randperm(len(groups), generator=generator)] for groups in learnt]
    if name == "shuffled among layers":
        order = torch.randperm(len(learnt) - 1, generator=generator).tolist()
        return [learnt[(1 + order[0] + i) % len(learnt)] for i in range(len(learnt))]  # no layer keeps its own
    return learnt


# --- runs -------------------------------------------------------------------------------------------------------------


class Runs:
    """The runs in a JSON-lines file, by their keys."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.found = {json.dumps(run["key"]): run["result"] for run in map(json.loads, lines)}

    def get(self, key: list[Any], work: Any) -> dict[str, Any]:
        name = json.dumps(key)
        if name not in self.found:
            self.found[name] = work()
            with self.file.open("a") as file:
                file.write(json.dumps({"key": key, "result": self.found[name]}) + "\n")
        return self.found[name]


def teachers(runs: Runs, seeds: int, steps: int) -> Iterator[None]:
    for name, seed in itertools.product(TEACHERS, range(seeds)):
        problem = Problem(name, steps=steps)
        for control in ("all shared", "all split"):
            grouping = fixed(control, problem.widths, [], seed)
            runs.get([name, seed, control], lambda p=problem, s=seed, g=grouping: train(p, s, grouping=g))
            yield
        for estimator, every in ESTIMATORS:
            key = [name, seed, estimator, every]
            learnt = runs.get(key, lambda p=problem, s=seed, e=estimator, n=every: train(p, s, e, n))["grouping"]
            yield
            for control in CONTROLS:
                grouping = fixed(control, problem.widths, learnt, seed)
                runs.get([*key, control], lambda p=problem, s=seed, g=grouping: train(p, s, grouping=g))
                yield


GROUPINGS = [list(groups) for groups in itertools.combinations_with_replacement(range(3), 3)]
PROBLEMS = [
    Problem(name, widths, 800, images, noise)
    for name in TEACHERS
    for widths, images, noise in (((3, 6), 0, 0.0), ((3, 6), 8, 0.5))
]


def exhaustive(runs: Runs, seeds: int, steps: int) -> Iterator[None]:
    for problem in (problem._replace(steps=steps) for problem in PROBLEMS):
        for groups, seed in itertools.product(GROUPINGS, range(3)):
            runs.get(
                [problem.name, seed, groups],
                lambda p=problem, s=seed, g=groups: train(p, 100 + s, grouping=[g], learnt=1),
            )
            yield
        for (estimator, every), seed in itertools.product(ESTIMATORS, range(seeds)):
            runs.get(
                [problem.name, seed, estimator, every],
                lambda p=problem, s=seed, e=estimator, n=every: train(p, s, e, n, learnt=1),
            )
            yield


# --- report -----------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    """The text "mean (SD)" of the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ({deviation:.{digits}f})"


def label(estimator: str, every: int) -> str:
    return estimator if every == 1 else f"{estimator}, every={every}"


def report_teachers(runs: Runs) -> list[str]:
    found = {tuple(json.loads(key)): result for key, result in runs.found.items()}
    seeds = sorted({key[1] for key in found})
    lines = [f"## Teachers\n\n{len(seeds)} seeds, mean (SD). p(shared) of the three layers, first to last, and "
             "validation loss of networks trained anew with the grouping.\n",
             "| teachers | estimator | p(shared), layer 1 | 2 | 3 | " + " | ".join(CONTROLS) + " |",
             "|---|---|---|---|---|" + "---|" * len(CONTROLS)]  # fmt: skip
    for name in TEACHERS:
        for control in ("all shared", "all split"):
            losses = [found[name, seed, control]["loss"] for seed in seeds]
            lines.append(f"| {name} | ({control}) | | | | {spread(losses, 3)} | | |")
        for estimator, every in ESTIMATORS:
            p = [[found[name, seed, estimator, every]["p"][layer][0] for seed in seeds] for layer in range(3)]
            losses_of = [[found[name, seed, estimator, every, c]["loss"] for seed in seeds] for c in CONTROLS]
            cells = [*map(spread, p), *(spread(losses, 3) for losses in losses_of)]
            lines.append(f"| {name} | {label(estimator, every)} | " + " | ".join(cells) + " |")
    return lines


def report_exhaustive(runs: Runs) -> list[str]:
    found = {json.dumps(json.loads(key)): result for key, result in runs.found.items()}
    lines = ["\n## Every grouping tried\n\nRegret (0: the best, 1: the worst grouping) of the learnt ones, mean (SD), "
             "and how many of them are among the best third of the 10 groupings (three).\n",
             "| problem | spread / seed SD | best | " + " | ".join(label(*e) for e in ESTIMATORS) + " |",
             "|---|---|---|" + "---|" * len(ESTIMATORS)]  # fmt: skip
    shares: dict[str, list[bool]] = {label(*e): [] for e in ESTIMATORS}
    for problem in PROBLEMS:
        losses = {
            tuple(groups): [found[json.dumps([problem.name, seed, groups])]["loss"] for seed in range(3)]
            for groups in GROUPINGS
        }
        means = {groups: statistics.mean(values) for groups, values in losses.items()}
        deviation = statistics.mean([statistics.variance(values) for values in losses.values()]) ** 0.5
        best, worst = min(means.values()), max(means.values())
        counts = worst - best > 3 * deviation
        third = sorted(means.values())[len(GROUPINGS) // 3 - 1]
        cells = []
        for estimator, every in ESTIMATORS:
            seeds = [key for key in map(json.loads, found) if key[0] == problem.name and key[2:] == [estimator, every]]
            chosen = [means[tuple(sorted(found[json.dumps(key)]["grouping"][0]))] for key in seeds]
            good = [loss <= third for loss in chosen]
            cells.append(f"{spread([(loss - best) / (worst - best) for loss in chosen])}, {sum(good)}/{len(good)}")
            if counts:
                shares[label(estimator, every)] += good
        winner = min(means, key=means.__getitem__)
        note = "" if counts else " (does not count)"
        lines.append(
            f"| {problem.name}{note} | {(worst - best) / deviation:.1f} | {winner} | " + " | ".join(cells) + " |"
        )
    total = " | ".join(f"{sum(good)}/{len(good)} = {sum(good) / max(len(good), 1):.0%}" for good in shares.values())
    return [*lines, f"| among the best third, of those that count | | | {total} |"]


def draw(runs: Runs, file: Path) -> None:
    """Draw p(shared) by layer, for each teacher and estimator."""
    import matplotlib.pyplot as plt

    found = {tuple(json.loads(key)): result for key, result in runs.found.items()}
    seeds = sorted({key[1] for key in found})
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for axes, name in zip(panels, TEACHERS, strict=True):
        for estimator, every in ESTIMATORS:
            p = torch.tensor([[layer[0] for layer in found[name, seed, estimator, every]["p"]] for seed in seeds])
            axes.errorbar(range(1, 4), p.mean(0), p.std(0), marker="o", capsize=2, label=label(estimator, every))
        axes.set(title=f"{name} teachers", xlabel="layer", ylim=(0, 1), xticks=(1, 2, 3))
        axes.axhline(1 / 3, color="0.7", linewidth=0.8)
    panels[0].set_ylabel("p(shared), mean over kernels")
    panels[-1].legend(fontsize=7)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("teachers", "exhaustive", "report"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path, nargs="?", help="of the report")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="1500 for teachers, 800 for exhaustive")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny layers
    arguments.folder.mkdir(parents=True, exist_ok=True)
    both = {name: Runs(arguments.folder / f"{name}.jsonl") for name in ("teachers", "exhaustive")}
    if arguments.what == "report":
        command = "`python -m benchmarks.learning teachers FOLDER`, `exhaustive FOLDER`, `report FOLDER FILE`."
        lines = ["# What is learnt\n", command + "\n", f"![p(shared)]({arguments.file.with_suffix('.png').name})\n"]
        lines += report_teachers(both["teachers"]) + report_exhaustive(both["exhaustive"])
        draw(both["teachers"], arguments.file.with_suffix(".png"))
        arguments.file.write_text("\n".join(lines) + "\n")
        return
    work, total = {
        "teachers": (teachers, len(TEACHERS) * arguments.seeds * (2 + len(ESTIMATORS) * (1 + len(CONTROLS)))),
        "exhaustive": (exhaustive, len(PROBLEMS) * (3 * len(GROUPINGS) + len(ESTIMATORS) * arguments.seeds)),
    }[arguments.what]
    steps = arguments.steps or {"teachers": 1500, "exhaustive": 800}[arguments.what]
    for _ in tqdm(work(both[arguments.what], arguments.seeds, steps), total=total, desc=arguments.what):
        pass


if __name__ == "__main__":
    main()
