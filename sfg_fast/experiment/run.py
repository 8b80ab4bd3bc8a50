"""The trainings of an experiment and their scores. Each row with each seed is a job; jobs may run in parallel.

    OUT/experiment.yaml                        the configuration
    OUT/cache/                                 the preprocessed cohort
    OUT/runs/ROW/seed_S[/TASK]                 a run as `sfg-fast train` leaves it (TASK: one-task networks)
    OUT/runs/ROW/seed_S/metrics.json           the test cases' metrics; written last: this job is done
    OUT/metrics.json, table.md, report.html, figures/

An experiment that was killed goes on when it is started again. A job that is done is not done again.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from .. import backends
from ..data.cache import Cache
from ..data.cohort import Case, load_case, read_cohort
from ..data.preprocessing import preprocess
from ..data.targets import Target
from ..data.volumes import volume_shape
from ..errors import InputError, Preempted
from ..evaluation.evaluate import scene_of
from ..evaluation.metrics import Metrics, case_metrics, metrics_document, read_metrics, tasks_of
from ..evaluation.predict import Predictor
from ..files import alone_in, check_vacant, make_folder, read_json, replacing, write_json
from ..gpu.gpu_check import gpu_check
from ..networks.cost import flops, parameters
from ..tasks import Task, measured_by, profile_of, read_tasks
from ..training.config import TrainConfig, difference, read_config
from ..training.parallel import choose_device
from ..training.run import AboutData, build_network, check_size, load_run
from ..training.trainer import Trainer
from .config import ALL, ExperimentConfig, Job, check, jobs, waves
from .report import write_results


def run_experiment(config: ExperimentConfig) -> None:
    """Train, predict, score and report. A job that is done already is not done again.

    Raises InputError for a configuration or cohort that can't be used or differs from that of the runs in `out`;
    Preempted after SIGTERM, when everything is saved; FloatingPointError and OSError as `Trainer.run` does.
    """
    check(config)
    out, cohort = Path(config.out), read_cohort(Path(config.cohort))
    test = cohort.split(config.split)
    if not test:
        raise InputError(f"cohort={config.cohort!r}: it has no {config.split} cases, expected at least one")
    tasks = measured_by(read_tasks(config.train.tasks, cohort.targets), config.metrics)
    targets = [task.target for task in tasks.values()]
    for case in test:
        if not any(target in case.targets or target in case.values for target in targets):
            what = f"has none of {', '.join(targets)} to compare with"
            raise InputError(f"cohort={config.cohort!r}: {config.split} case {case.name} {what}")
    for name, count in config.subsets.items():
        if count > len(test):
            raise InputError(
                f"subsets={ {name: count} }: the cohort has {len(test)} {config.split} cases, expected at most that"
            )
    settings = out / "experiment.yaml"
    with alone_in(out):
        if not settings.exists():
            check_vacant(out)
        size = None if config.size is None else (config.size[0], config.size[1])
        cache = preprocess(cohort, out / "cache", processes=config.processes, size=size)
        if config.checkpoint == "best" and not cache.names("val"):
            raise InputError(f"checkpoint='best': {config.cohort} has no case of split val, expected one")
        every = jobs(config)
        _check_networks(every, cache)
        names = [case.name for case in test]
        _check_unchanged(every, cache, config, names)
        with replacing(settings) as partial:
            partial.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")
        work = functools.partial(_complete, test=test, targets=cache.targets, config=config)
        try:
            left, places = [job for job in every if not _scores(job).exists()], _places(config)
            if left and places[0] is not None and config.train.gpu_check == "on" and backends.current() == "auto":
                gpu_check(torch.device("cuda", places[0]))  # once; else all runs would do it at the same time
            _do(waves(left), work, len(every), places)
        except Preempted as error:
            raise Preempted(f"{out}: stopped by SIGTERM, everything is saved; the same command goes on") from error
        documents: dict[str, dict[int, Any]] = {name: {} for name in config.methods}
        for job in every:
            documents[job.row][job.seed] = read_metrics(_scores(job), Scored)
        subsets = {name: names[:count] for name, count in config.subsets.items()}
        shown = None if cohort.images else test[0]
        described = {**cache.targets, **cache.described("train")}
        write_results(config, every, documents, {**subsets, ALL: names}, shown, described)


# --- one job ----------------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """How a job predicts: by how many drawn architectures (`draws`, 0 for argmax p), and by which `by`, `statistics`
    and `checkpoint` (`ExperimentConfig`)."""

    draws: int
    by: str
    statistics: str
    checkpoint: str


def _how(job: Job, config: ExperimentConfig) -> How:
    """How the networks of a job predict. A constant p has no most probable architecture, so it always predicts by
    draws. A fixed grouping has nothing to draw, unless it explores or drops channels, so it predicts by "map"."""
    network, by = job.trainings[0].network, job.by
    if network.method == "constant_p":
        by = "draws" if by == "map" else by
    elif network.method != "sfg" and network.dropout == network.explore == 0:
        by = "map"
    return How(0 if by == "map" else config.draws, by, config.statistics, config.checkpoint)


class Scored(Metrics):
    """metrics.json of a job: the `metrics_document` of the test cases; how they were predicted (`How`), and the digests
    of the networks; the cost of all its networks: trained weights, and FLOPs of a prediction of one image."""

    how: dict[str, Any]
    digests: list[str]
    parameters: int
    flops: float


def _scores(job: Job) -> Path:
    return job.folder / "metrics.json"


def _final(training: TrainConfig) -> Path:
    return Path(training.out) / "checkpoints" / "final.pt"


def _complete(job: Job, test: Sequence[Case], targets: Mapping[str, Target], config: ExperimentConfig) -> None:
    """Run the trainings of a job that are not finished, then score the test cases, and write metrics.json."""
    for training in job.trainings:
        if not _final(training).exists():
            with alone_in(Path(training.out)):
                Trainer(training, resume=True).run()
    how = _how(job, config)
    predictors = [Predictor(Path(training.out), training.device, how.checkpoint) for training in job.trainings]
    predicted = {name: task for predictor in predictors for name, task in predictor.tasks.items()}
    tasks = measured_by(predicted, config.metrics)
    if predictors[0].images is None:
        cases = {case.name: _score(case, predictors, how, tasks, targets) for case in test}
    else:
        cases = _score_images(test, predictors, how, tasks)
    cost = {
        "parameters": sum(parameters(predictor.model) for predictor in predictors),
        "flops": sum(flops(predictor.model, _example(predictor, test[0])) for predictor in predictors),
    }
    digests = [predictor.digest for predictor in predictors]
    make_folder(job.folder)
    write_json(_scores(job), {"how": how._asdict(), "digests": digests, **cost, **metrics_document(cases, tasks)})


def _score(
    case: Case,
    predictors: Sequence[Predictor],
    how: How,
    tasks: Mapping[str, Task],
    targets: Mapping[str, Target],
) -> dict[str, Any]:
    """The metrics of a case of volumes; each task is predicted by the network that has it."""
    truth = load_case(case, targets)
    predicted: dict[str, np.ndarray] = {}
    for predictor in predictors:
        volumes = predictor.volume(truth.inputs, how.draws, how.by, how.statistics)
        predicted |= {task: parts[""] for task, parts in volumes.items()}
    try:
        return case_metrics(tasks, truth.targets, predicted, scene_of(truth, targets))
    except InputError as error:
        raise InputError(f"case {case.name}: {error}") from error


def _score_images(
    test: Sequence[Case], predictors: Sequence[Predictor], how: How, tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """The metrics of each image; each task is predicted by the network that has it."""
    predicted: dict[str, np.ndarray] = {}
    for predictor in predictors:
        values = predictor.of_images(test, how.draws, how.by, how.statistics)
        predicted |= {task: parts[""] for task, parts in values.items()}
    return {
        case.name: case_metrics(tasks, case.values, {name: values[i] for name, values in predicted.items()}, None)
        for i, case in enumerate(test)
    }


def _example(predictor: Predictor, case: Case) -> Tensor:
    """An image of zeros [1, C, H, W], or a 3-D patch [1, C, D, H, W], of the size that the network is run on."""
    if predictor.images is not None:
        shape = (predictor.images.channels, *predictor.images.size)
    else:
        shape = (len(case.inputs), *(predictor.config.patch or volume_shape(case.inputs[0])[1:]))
    return torch.zeros(1, *shape, device=predictor.device)


# --- before anything is trained ---------------------------------------------------------------------------------------


def _check_networks(every: Sequence[Job], cache: Cache) -> None:
    """Raise InputError for a row whose network can't be made."""
    for job in every:
        for training in job.trainings:
            try:
                network = build_network(training, cache.in_channels, read_tasks(training.tasks, cache.targets))
                check_size(network, training, cache)
            except InputError as error:
                raise InputError(f"methods[{job.row!r}]: {error}") from error


def _check_unchanged(every: Sequence[Job], cache: Cache, config: ExperimentConfig, test: list[str]) -> None:
    """Raise InputError, which names the first difference, if `out` holds runs of another configuration or cohort, or a
    file of a run that can't be read."""
    for job in every:
        by_folder = {Path(training.out): training for training in job.trainings}
        for path in sorted([*job.folder.glob("config.yaml"), *job.folder.glob("*/config.yaml")]):
            # A folder of another method than now (one-task or not) differs from any training of the job in its method.
            now = dataclasses.asdict(by_folder.get(path.parent, job.trainings[0]))
            if found := difference(now, dataclasses.asdict(read_config(path))):
                key, mine, saved = found
                there = f"{path.parent} has {saved!r}, expected the same or another out"
                raise InputError(f"methods[{job.row!r}]: {key}={mine!r}, but {there}")
            about = path.with_name("data.json")
            if about.exists() and read_json(about, AboutData)["fingerprint"] != cache.fingerprint():
                raise InputError(f"{path.parent}: the cohort has changed since this training, expected the same")
        finished = [Path(training.out) for training in job.trainings if _final(training).exists()]
        digests = [load_run(folder, config.checkpoint).digest for folder in finished]
        if not _scores(job).exists():
            continue
        done = read_metrics(_scores(job), Scored)
        for folder, digest in zip(finished, digests, strict=True):
            if digest not in done["digests"]:
                raise InputError(f"{_scores(job)}: not the scores of {folder} as it is now; remove one of them")
        for key, now in _how(job, config)._asdict().items():
            if (before := done["how"].get(key)) != now:
                there = f"{job.folder} was predicted with {before!r}, expected the same or another out"
                raise InputError(f"{key}={now!r}: {there}")
        if (before := profile_of(tasks_of(done))) != config.metrics:
            there = f"{_scores(job)} has {before!r}, expected the same (what has no metrics.json is measured again)"
            raise InputError(f"metrics={config.metrics!r}: {there}")
        if different := set(test) ^ done["cases"].keys():
            where = f"{_scores(job)}: its cases are not the cohort's {config.split} cases"
            raise InputError(f"{where} ({min(different)} is in one of them), expected the same")


# --- in one process or several ----------------------------------------------------------------------------------------


def _places(config: ExperimentConfig) -> list[int | None]:
    """The places where jobs run at the same time: the number of each GPU, if there are several; else a None for each
    process."""
    device = choose_device(config.train.device)
    if device.type == "cuda":
        gpus = torch.cuda.device_count() if device.index is None else 1
        return list(range(gpus)) if gpus > 1 else [None]
    return [None] * config.processes


def _do(left: Sequence[Sequence[Job]], work: Callable[[Job], None], total: int, places: list[int | None]) -> None:
    """Do the waves of jobs in `left`, one after the other: each needs what earlier ones have learnt."""
    from tqdm import tqdm

    with tqdm(total=total, initial=total - sum(map(len, left)), desc="experiment", unit="run") as bar:
        for wave in left:
            if len(places) > 1:
                with _sigterm_raises():
                    _in_processes(wave, work, places, bar.update)
                continue
            for job in wave:
                bar.set_postfix_str(f"{job.row}, seed {job.seed}")
                work(job)
                bar.update()


def _in_processes(
    left: Sequence[Job], work: Callable[[Job], None], places: list[int | None], done: Callable[[], Any]
) -> None:
    """Do every job in a process of its own, one at a time for each place. If a job raises an error, or this process is
    interrupted, the other jobs save their state and stop."""
    context = multiprocessing.get_context("spawn")
    waiting, free = list(left), list(places)
    threads = max(1, torch.get_num_threads() // len(places))
    running: dict[Any, tuple[Job, int | None, Any, Any]] = {}
    try:
        while waiting or running:
            while waiting and free:
                job, place = waiting.pop(0), free.pop(0)
                answer, its_end = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(its_end, place, threads, work, job))
                with _no_bars():
                    process.start()
                its_end.close()
                running[process.sentinel] = (job, place, process, answer)
            for sentinel in multiprocessing.connection.wait(list(running)):
                job, place, process, answer = running.pop(sentinel)
                process.join()
                try:
                    error = answer.recv()
                except EOFError:
                    error = ChildProcessError(f"{job.folder}: its process ended with code {process.exitcode}")
                if error is not None:
                    raise error
                free.append(place)
                done()
    except BaseException:  # also Ctrl-C
        for _, _, process, _ in running.values():
            process.terminate()
        for _, _, process, _ in running.values():
            process.join()
        raise


@contextmanager
def _no_bars() -> Iterator[None]:
    """Processes that start inside the `with` show no progress bars; that of the experiment is enough. tqdm reads the
    environment variable when it is imported."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _child(answer: Any, gpu: int | None, threads: int, work: Callable[[Job], None], job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if gpu is None:
        torch.set_num_threads(threads)
    else:
        torch.cuda.set_device(gpu)
    try:
        work(job)
        answer.send(None)
    except (InputError, Preempted, FloatingPointError, OSError) as error:
        answer.send(error)


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside the `with` SIGTERM raises Preempted. (The trainings run in other processes, which handle it
    themselves.)"""

    def stop(number: int, frame: Any) -> None:
        raise Preempted("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
