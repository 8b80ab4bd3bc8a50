"""Measures cohorts of growing size, and one process against two: does anything grow that should not?

python -m benchmarks.bench_scale                      prints the tables (a quarter of an hour)
python -m benchmarks.bench_scale FILE.md              also writes them
    --sizes 10 100 1000     cases
    --work FOLDER           where the cohorts are made, once (default: a temporary folder)

Memory and start-up are measured in a process of their own for each size. Things that are compared take turns in several
rounds; the tables have medians, and (lowest-highest).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import machine, resident
from sfg_fast import SFGHighResNet
from sfg_fast.data import Cache, SliceSampler, make_case, preprocess, read_cohort, write_volume
from sfg_fast.data.phantom import LABELS, phantom_grid
from sfg_fast.training.config import NetworkConfig, ScheduleConfig, TrainConfig
from sfg_fast.training.trainer import Trainer

SIZE, SLICES, DISTINCT = 64, 16, 20
NETWORKS = {
    "small, routed": NetworkConfig(width=[8, 16, 16], blocks=1, residual="routed"),
    "paper, separate": NetworkConfig(width=[16, 32, 64], blocks=3, residual="separate"),
}
ROUNDS = 3


def make_cohort(work: Path, cases: int) -> None:
    """Write the files of so many cases, which are noise on a few phantoms, and a list for each number of cases."""
    from tqdm import tqdm

    grid = phantom_grid(SIZE, SLICES)
    phantoms = [make_case((0, index), SIZE, SLICES) for index in range(min(DISTINCT, cases))]
    for number in tqdm(range(cases), desc="cohort", unit="case"):
        folder = work / "cohort" / f"case_{number:06d}"
        if (folder / "labels.nii.gz").exists():  # written last
            continue
        folder.mkdir(parents=True, exist_ok=True)
        phantom, rng = phantoms[number % DISTINCT], np.random.default_rng(number)
        mr = phantom.mr * rng.uniform(0.8, 1.2) + rng.normal(size=phantom.mr.shape)
        write_volume(folder / "mr.nii.gz", mr.astype(np.float32), grid, np.float32)
        write_volume(folder / "ct.nii.gz", phantom.ct, grid, np.int16)
        write_volume(folder / "labels.nii.gz", phantom.labels, grid, np.uint8)


def cohort_list(work: Path, cases: int) -> Path:
    rows = []
    for number in range(cases):
        name = f"case_{number:06d}"
        files = {
            "mr": f"cohort/{name}/mr.nii.gz",
            "ct": f"cohort/{name}/ct.nii.gz",
            "labels": f"cohort/{name}/labels.nii.gz",
        }
        rows.append({"case": name, **files, "split": "train" if number % 10 else "val"})
    path = work / f"list_{cases}.json"
    path.write_text(json.dumps({"labels": LABELS, "cases": rows}))
    return path


# --- what runs in a process of its own --------------------------------------------------------------------------------


class Peak:
    """Measures inside the `with` the peak memory of this process, and of the largest of its children."""

    def __enter__(self) -> "Peak":
        self.children, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.02):
            pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.children = max([self.children, *(resident("VmHWM", pid) for pid in pids)])

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def found(self) -> dict[str, float]:
        return {"own": resident("VmHWM"), "children": self.children}


def part_preprocess(listed: str, out: str, processes: str) -> dict[str, float]:
    with Peak() as peak:
        start = time.perf_counter()
        cache = preprocess(read_cohort(listed), out, progress=False, processes=int(processes))
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        preprocess(read_cohort(listed), out, progress=False, processes=int(processes))
        again = time.perf_counter() - start
    return {"rate": len(cache.cases) / seconds, "again": len(cache.cases) / again, **peak.found()}


def configured(cache: str, out: str, network: str, steps: int, batch: int, **options: object) -> TrainConfig:
    schedule = ScheduleConfig(steps=steps, batch=batch)
    return TrainConfig(cache, out, network=NETWORKS[network], schedule=schedule, checkpoint_every=10**6, **options)


def part_start(cache: str, out: str) -> dict[str, float]:
    """The seconds until there is a first batch; and the peak memory of a short training in MiB."""
    start = time.perf_counter()
    SliceSampler(Cache(cache), "train", 4, None, 0, 0.1, 0.33)[0]
    seconds = time.perf_counter() - start
    Trainer(configured(cache, out, "small, routed", 60, 4)).run()
    return {"seconds": seconds, "own": resident("VmHWM")}


def part_train(cache: str, out: str, network: str, steps: str, batch: str, workers: str, same: str) -> dict[str, float]:
    """The slices/s of all processes together, and the share of the time in which they wait for slices. Both leave out
    the first quarter of the steps, in which workers start."""
    config = configured(
        cache, out, network, int(steps), int(batch), workers=int(workers), same_assignment=same == "same"
    )
    trainer, stamps, waited = Trainer(config), [], []
    trainer.begin()
    for trainer.step in range(int(steps)):
        trainer._train_step()
        stamps.append(time.perf_counter())
        waited.append(trainer._waited)
    skip = len(stamps) // 4
    rate = (len(stamps) - skip - 1) / (stamps[-1] - stamps[skip]) * int(batch) * trainer.processes.count
    share = (waited[-1] - waited[skip]) / (stamps[-1] - stamps[skip])
    return {"rate": rate, "waited": share, "rank": trainer.processes.rank}


def part_loader(cache: str, patch: str, workers: str) -> dict[str, float]:
    """The slices/s of the sampler alone."""
    window = (int(patch), int(patch)) if int(patch) else None
    sampler = SliceSampler(Cache(cache), "train", 8, window, 0, 0.1, 0.33)
    loader = torch.utils.data.DataLoader(sampler, None, sampler=range(260), num_workers=int(workers))
    for number, _ in enumerate(loader):
        if number == 9:
            start = time.perf_counter()
    return {"rate": 250 * 8 / (time.perf_counter() - start)}


def run_part(name: str, *arguments: object, ranks: int = 1, threads: int = 2) -> dict[str, float]:
    """Run a part in a fresh process, or in several under torchrun, each with so many threads."""
    command = [sys.executable, "-m"]
    command += ["benchmarks.bench_scale"] if ranks == 1 else ["torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += (
        [] if ranks == 1 else ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "benchmarks.bench_scale"]
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command += ["--part", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return min(answers, key=lambda answer: answer.get("rank", 0))


# --- the tables -------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def flat(values: list[float]) -> str:
    grown = max(values) / min(values) - 1
    return f"{grown:.0%} from the least to the most: {'holds' if grown <= 0.1 else 'MISSED'} (10 %)"


def preprocess_table(work: Path, sizes: list[int]) -> list[str]:
    lines = [
        "| cases | cases/s, 1 process | 2 processes | ratio | again, unchanged | MiB, main | MiB, largest worker |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    main, workers = [], []
    for cases in sizes:
        listed, answers = cohort_list(work, cases), {1: [], 2: []}
        for _ in range(ROUNDS if cases < 1000 else 1):
            for processes, found in answers.items():
                shutil.rmtree(work / f"cache_{cases}", ignore_errors=True)
                found.append(run_part("preprocess", listed, work / f"cache_{cases}", processes))
        rates = {processes: [one["rate"] for one in found] for processes, found in answers.items()}
        ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        main.append(statistics.median(one["own"] for one in answers[2]))
        workers.append(statistics.median(one["children"] for one in answers[2]))
        again = statistics.median(one["again"] for one in answers[2])
        cells = [
            spread(rates[1]),
            spread(rates[2]),
            spread(ratios),
            f"{again:.3g}",
            f"{main[-1]:.0f}",
            f"{workers[-1]:.0f}",
        ]
        lines.append(f"| {cases} | {' | '.join(cells)} |")
    return [*lines, "", f"Memory of the main process, {flat(main)}; of a worker, {flat(workers)}."]


def start_table(work: Path, sizes: list[int]) -> list[str]:
    lines = ["| cases | seconds from opening the cache to the first batch | manifest, bytes/case | MiB of a training |"]
    lines.append("|---|---|---|---|")
    memory = []
    for cases in sizes:
        found = [run_part("start", work / f"cache_{cases}", work / f"run_{cases}_{turn}") for turn in range(ROUNDS)]
        memory.append(statistics.median(one["own"] for one in found))
        entry = (work / f"cache_{cases}" / "manifest.json").stat().st_size / cases
        lines.append(f"| {cases} | {spread([one['seconds'] for one in found])} | {entry:.0f} | {memory[-1]:.0f} |")
    return [*lines, "", f"Memory, {flat(memory)}."]


def loader_table(work: Path, sizes: list[int]) -> list[str]:
    lines = ["| cases | slices/s: whole | patches of 48 | whole, 1 worker |", "|---|---|---|---|"]
    for cases in sizes:
        cells = []
        for patch, workers in ((0, 0), (48, 0), (0, 1)):
            found = [run_part("loader", work / f"cache_{cases}", patch, workers)["rate"] for _ in range(ROUNDS)]
            cells.append(spread(found))
        lines.append(f"| {cases} | {' | '.join(cells)} |")
    lines += ["", f"Training on {sizes[-1]} cases, 2 threads, batches of 4:", ""]
    lines += ["| network | workers | slices/s | time waited for slices |", "|---|---|---|---|"]
    for network in NETWORKS:
        for workers in (0, 1):
            steps = 200 if network.startswith("small") else 16
            found = [
                run_part(
                    "train",
                    work / f"cache_{sizes[-1]}",
                    work / f"w_{workers}_{turn}_{steps}",
                    network,
                    steps,
                    4,
                    workers,
                    "",
                )
                for turn in range(ROUNDS)
            ]
            share = statistics.median(one["waited"] for one in found)
            verdict = "" if share < 0.05 else " (5 % MISSED)"
            lines.append(f"| {network} | {workers} | {spread([one['rate'] for one in found])} | {share:.1%}{verdict} |")
    return lines


def ranks_table(work: Path, sizes: list[int]) -> list[str]:
    """The table that compares two processes of one thread with one process of one or two threads. All have the same
    whole batch."""
    lines = ["| network | one process, 1 thread | one, 2 threads | two, 1 thread each | two, one draw for both |"]
    lines.append("|---|---|---|---|---|")
    contestants = {"1": (1, 1, 8, ""), "2 threads": (1, 2, 8, ""), "2": (2, 1, 4, ""), "2 same": (2, 1, 4, "same")}
    for network in NETWORKS:
        steps = 80 if network.startswith("small") else 10
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(ROUNDS):
            for name, (ranks, threads, batch, same) in contestants.items():
                out = work / f"r_{steps}_{turn}_{name.replace(' ', '_')}"
                answer = run_part(
                    "train",
                    work / f"cache_{sizes[0]}",
                    out,
                    network,
                    steps,
                    batch,
                    0,
                    same,
                    ranks=ranks,
                    threads=threads,
                )
                found[name].append(answer["rate"])
        cells = []
        for rates in found.values():
            ratios = [rate / one for rate, one in zip(rates, found["1"], strict=True)]
            cells.append(f"{statistics.median(rates):.3g} slices/s, {spread(ratios)} x")
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return lines


def arithmetic() -> list[str]:
    lines = [
        "| network | parameters | all-reduce, MB sent by each of 64 GPUs a step | checkpoint, MB |",
        "|---|---|---|---|",
    ]
    for name, network in NETWORKS.items():
        model = SFGHighResNet(1, {"ct": 1, "organs": 6}, network.width, network.blocks, network.residual)
        count = sum(p.numel() for p in model.parameters())
        sent = 2 * 63 / 64 * 4 * count / 1e6
        statistic = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        lines.append(f"| {name} | {count} | {sent:.2f} | {(3 * 4 * count + 65 * statistic) / 1e6:.1f} |")
    return lines


def open_time(work: Path, sizes: list[int]) -> list[str]:
    """The table of how long it takes to open a manifest of many cases, which are copies of a real one."""
    manifest = json.loads((work / f"cache_{sizes[0]}" / "manifest.json").read_text())
    entry = next(iter(manifest["cases"].values()))
    lines = ["| cases | manifest, MB | seconds to open |", "|---|---|---|"]
    for cases in (10_000, 100_000):
        manifest["cases"] = {f"case_{number:06d}": entry for number in range(cases)}
        folder = work / f"manifest_{cases}"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        start = time.perf_counter()
        Cache(folder)
        seconds = time.perf_counter() - start
        lines.append(f"| {cases} | {(folder / 'manifest.json').stat().st_size / 1e6:.0f} | {seconds:.1f} |")
    return lines


def report(work: Path, sizes: list[int]) -> str:
    work.mkdir(parents=True, exist_ok=True)
    make_cohort(work, max(sizes))
    for left in (*work.glob("run_*"), *work.glob("w_*"), *work.glob("r_*")):
        shutil.rmtree(left)
    sections = {
        "Preprocessing": preprocess_table(work, sizes),
        "Start and memory of training": start_table(work, sizes),
        "Opening a large cache": open_time(work, sizes),
        "The loader against training": loader_table(work, sizes),
        "One process against two, on two cores": ranks_table(work, sizes),
        "Counted": arithmetic(),
    }
    lines = [
        "# Cohorts of growing size",
        "",
        f"`python -m benchmarks.bench_scale`. {machine()}.",
        f"Cases of {SIZE} x {SIZE} x {SLICES} voxels, MR, CT and labels.",
        f"Medians of {ROUNDS} rounds (lowest-highest); {max(sizes)} cases are preprocessed once.",
    ]
    for title, table in sections.items():
        lines += ["", f"## {title}", "", *table]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--part", nargs="+")
    options = parser.parse_args()
    if options.part:
        print("\n" + json.dumps(globals()[f"part_{options.part[0]}"](*options.part[1:])), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        text = report(options.work or Path(temporary), options.sizes)
    print(text)
    if options.file:
        Path(options.file).write_text(text)


if __name__ == "__main__":
    main()
