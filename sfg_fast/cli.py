"""The command line: sfg-fast phantom | preprocess | train | predict | evaluate | report | freeze | experiment | demo |
gpu-check.

The exit code is 0 if the work is done, 1 if the work itself failed (training diverged, the disk is full), 2 for bad
input or a place that can't be read or written, which one line explains, 130 if the command was interrupted, and 143 if
SIGTERM asked it to stop and what was complete is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import itertools
import os
import re
import signal
import sys
import threading
import typing
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from .errors import InputError, Preempted
from .files import alone_in, check_file, check_vacant, one_line, read_text, write_json

# Heavier modules are imported in the functions: Ctrl-C is answered in one line only once `main` runs.

MAX_YAML_NODES = 10_000
PATHS = {"cohort", "data", "out", "run", "predictions", "metrics"}
FLAGS = {
    "allow_outside": "let a CSV/JSON list name files outside its own folder",
    "again": "also where there is a result already",
    "resume": "go on with the predictions in OUT, made by the same run with the same options",
}
GOES_ON = {
    "preprocess": "; the same command goes on",
    "train": "; --resume goes on",
    "predict": "; --resume goes on",
    "experiment": "; the same command goes on",
}
# What the system says of a place that the user named, and what was expected of it. (A full disk is none of these.)
PLACES = {
    errno.EACCES: "a place that this user may use",
    errno.EPERM: "a place that this user may use",
    errno.EROFS: "a place that can be written to",
    errno.ENOENT: "something that is there",
    errno.ENOTDIR: "a folder",
    errno.EISDIR: "a file",
    errno.ENAMETOOLONG: "a shorter name",
    errno.ELOOP: "links that lead somewhere",
}


def phantom(
    out: str, cases: int = 15, test: int = 5, size: int = 96, slices: int = 24, seed: int = 0, difficulty: float = 0.0
) -> None:
    """Make a synthetic pelvis cohort: MR, CT, labels and body mask as NIfTI, with a train/test split.

    Args:
        out: folder to be made.
        cases: number of cases.
        test: how many of them are test cases.
        size: voxels along each in-plane axis, over 400 mm.
        slices: axial slices, over 144 mm.
        seed: seed of the shapes and the noise.
        difficulty: 0 to 1: more varied anatomy, less contrast, more noise; tissues that only their place tells apart;
            borders that only the MR shows, and densities that only the CT shows.
    """
    from .data.phantom import write_phantom

    write_phantom(Path(out), cases, test, size, slices, seed, difficulty=difficulty)
    print(f"{cases} cases in {out}")


def preprocess(
    cohort: str,
    out: str,
    processes: int = 0,
    on_bad_case: Literal["stop", "skip"] = "stop",
    size: list[int] | None = None,
    allow_outside: bool = False,
) -> None:
    """Check a cohort and write it as memory maps for training; a second run writes only what is new or has changed.

    Args:
        cohort: folder of cases (mr/ct/labels.nii.gz), nnU-Net folder (+ targetsTr), or CSV/JSON list of files.
        out: folder to be made, or made by an earlier run for this cohort.
        processes: cases (or blocks of images) at a time; 0 for one per core.
        on_bad_case: stop at the first case that can't be used (exit code 2), or skip it and tell at the end (code 0).
        size: height and width in pixels that images are resized to, such as [64, 64]; null: all have one size.
        allow_outside: let a CSV/JSON list name files outside its own folder.
    """
    from .data.cohort import SPLITS, USUAL, read_cohort
    from .data.notes import told
    from .data.preprocessing import preprocess as write_cache

    found = read_cohort(Path(cohort), allow_outside=allow_outside)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache = write_cache(found, Path(out), processes=processes or cores, on_bad_case=on_bad_case, size=size)
    for reason in cache.rejected.values():
        print(f"rejected: {reason}", file=sys.stderr)
    for line in told(cache.cases):
        print(line, file=sys.stderr)
    targets = cache.targets if found.images else {**USUAL, **cache.targets}
    counts = [f"{cache.count(target=target)} with {target}" for target in targets]
    counts += [f"{cache.count(split)} {split}" for split in SPLITS]
    counts += [f"{len(cache.rejected)} rejected"] if cache.rejected else []
    print(f"{cache.count()} {'images' if found.images else 'cases'} in {out}: {', '.join(counts)}")
    for target in cache.targets.values():
        if target.kind == "class":
            print(f"classes of {target.name}: {', '.join(target.names)}")


def train(config: Any, resume: bool = False) -> None:
    """Train a network on a preprocessed cohort; the run folder holds everything that the other commands need.

    For several processes: torchrun --nproc-per-node=N -m sfg_fast.cli train ..; a run that torchrun restarts goes on.
    """
    from .training.folds import summarise
    from .training.parallel import clear_word_of_lost_processes, launched, leave
    from .training.state import check_finished

    rank, restarts = launched()
    resume = resume or restarts > 0
    alone = config.folds is None or config.fold is not None
    runs = [config] if alone else [_fold(config, fold) for fold in range(config.folds)]
    with contextlib.ExitStack() as ends:
        if rank == 0:
            ends.enter_context(alone_in(Path(config.out)))
            if not resume:
                check_vacant(Path(config.out))
        finished = {run.out for run in runs if not alone and (Path(run.out) / "checkpoints" / "final.pt").exists()}
        for run in runs:
            if run.out in finished:
                check_finished(run)
        stopped = None
        for run in runs:
            if run.out not in finished:
                if rank == 0 and not alone:
                    ends.enter_context(alone_in(Path(run.out)))
                try:
                    with clear_word_of_lost_processes():
                        steps = _trained(run, resume)
                except Preempted as error:
                    stopped = str(error)
                    break
                if rank == 0:
                    print(f"trained {steps} steps, run in {run.out}")
        leave()  # here, where no trainer is left, not even in an exception
        if stopped is not None:
            raise Preempted(stopped)
        if rank == 0 and not alone:
            print(f"{config.folds} folds: {summarise(Path(config.out), config.folds)['summary']}")


def _trained(run: Any, resume: bool) -> int:
    """Trains, and returns for how many steps in all."""
    from .training.trainer import Trainer

    trainer = Trainer(run, resume, _draw_progress)
    trainer.run()
    return trainer.step


def _fold(config: Any, fold: int) -> Any:
    return dataclasses.replace(config, fold=fold, out=str(Path(config.out) / f"fold_{fold}"))


def _draw_progress(history: dict[str, Any], folder: Path) -> None:
    from .evaluation.figures import curves, save

    if history["curves"]["step"]:
        save(curves(history), folder / "progress.png")


def predict(
    run: str,
    cohort: str,
    out: str,
    split: str = "test",
    draws: int = 8,
    by: str = "map",
    statistics: str = "running",
    checkpoint: Literal["final", "best"] = "final",
    device: str = "auto",
    allow_outside: bool = False,
    resume: bool = False,
) -> None:
    """Predict what a run has learnt, and how sure it is, for the cases of a cohort: volumes as NIfTI, images as CSV.

    Args:
        run: folder of a trained run.
        cohort: as for preprocess; only the MR, or the image, is read.
        out: folder to be made, OUT/CASE/{ct,labels,uncertainty, ..}.nii.gz, or OUT/predictions.csv of images.
        split: which cases: train, val, test, or all. Train and val of a fold are its own parts.
        draws: drawn architectures behind the uncertainty; 0 for none.
        by: predictions of the most probable architecture (map), the mean over the drawn ones (draws), or the mean of
            numbers and the most frequent class over them (mode).
        statistics: normalise by the running statistics of training (running), or by those of each batch that is
            predicted, as the authors' public code (batch).
        checkpoint: the final network, or the best one on the validation split.
        device: auto, cpu or cuda.
        allow_outside: let a CSV/JSON list name files outside its own folder.
        resume: go on with the predictions in OUT, made by the same run with the same options.
    """
    from tqdm import tqdm

    from .data.cohort import read_cohort
    from .evaluation.predict import Predictor

    found = read_cohort(Path(cohort), allow_outside=allow_outside)
    predictor = Predictor(Path(run), device, checkpoint)
    cases = predictor.of_split(found, split)
    if not cases:
        raise InputError(f"{cohort}: there is no case of split {split!r}, expected at least one (or --split all)")
    predicted = predictor.cases(found, cases, Path(out), draws, by, resume, statistics)
    unit = "image" if found.images else "case"
    for _ in tqdm(predicted, total=len(cases), desc="predict", unit=unit):
        pass
    print(f"{len(cases)} {unit}s in {out}")


def evaluate(
    predictions: str, cohort: str, out: str | None = None, metrics: str = "paper", allow_outside: bool = False
) -> None:
    """Compare predictions with a cohort's targets, such as CT and labels, case by case, and give mean and SD.

    Args:
        predictions: folder made by predict.
        cohort: the cohort with its targets; cases without a prediction are left out.
        out: JSON file to write (by default metrics.json beside the predictions).
        metrics: what is measured, and how: as in the paper (paper), or as in the SynthRAD2025 challenge (synthrad2025;
            CTs and labels).
        allow_outside: let a CSV/JSON list name files outside its own folder.
    """
    from .data.cohort import read_cohort
    from .evaluation.evaluate import evaluate as compare
    from .evaluation.metrics import table

    target = Path(predictions).parent / "metrics.json" if out is None else Path(out)
    check_file(target)  # a bad name is refused before the work
    found = read_cohort(Path(cohort), allow_outside=allow_outside)
    document = compare(Path(predictions), found, metrics)
    write_json(target, document)
    print(table(document))
    unit = "images" if found.images else "cases"
    print(f"{len(document['cases'])} of the cohort's {len(found.cases)} {unit}, metrics in {target}")


def report(
    run: str, cohort: str, predictions: str, metrics: str, out: str | None = None, allow_outside: bool = False
) -> None:
    """Write report.html: figures, tables and the configuration of a run.

    Args:
        run: folder of a trained run.
        cohort: the cohort that was predicted.
        predictions: folder made by predict.
        metrics: JSON file made by evaluate.
        out: HTML file to write (by default report.html in the run folder).
        allow_outside: let a CSV/JSON list name files outside its own folder.
    """
    from .data.cohort import read_cohort
    from .evaluation.report import report_on

    target = Path(run) / "report.html" if out is None else Path(out)
    check_file(target)  # a bad name is refused before figures lie beside it
    found = read_cohort(Path(cohort), allow_outside=allow_outside)
    report_on(Path(run), found, Path(predictions), Path(metrics), target)
    print(f"report in {target}")


def freeze(run: str, out: str, tasks: list[str] | None = None) -> None:
    """Write the learnt architecture of a run as plain convolutions: OUT.onnx, or OUT.pt2 for torch.export.load.

    Args:
        run: folder of a trained run.
        out: file to be made. It maps a normalised MR [N, channels, H, W] (patches [N, channels, D, H, W] of a run with
            3-D patches), or an image of 0 .. 255, to numbers in their unit, such as a CT in HU, and probabilities of
            labels or classes.
        tasks: which outputs, by default all of the run.
    """
    from .evaluation.export import export_run

    deployed = export_run(Path(run), Path(out), tasks)
    count = sum(parameter.numel() for parameter in deployed.parameters())
    print(f"{count} weights in {out}")


def experiment(config: Any) -> None:
    """Do the paper's experiment: train and test every method with every seed, and write Table 1, tests and a report."""
    from .experiment.run import run_experiment

    run_experiment(config)
    out = Path(config.out)
    print(f"table in {out / 'table.md'}, report in {out / 'report.html'}, numbers in {out / 'metrics.json'}")


def demo(out: str = "runs/demo", seed: int = 0, steps: int = 2000) -> None:
    """Do the whole job on a synthetic cohort: phantom, preprocess, train, predict, evaluate, report (minutes on a CPU).

    Args:
        out: folder to be made.
        seed: seed of the cohort and of the training.
        steps: training steps.
    """
    from .demo import run_demo

    run_demo(Path(out), seed, steps)


def gpu_check(device: str = "cuda", again: bool = False) -> None:
    """Check the Triton kernels on this GPU, and time them, in a minute: training then uses them where they are faster.

    Args:
        device: cuda, or cuda:1 for the second GPU.
        again: check again, also where there is a result already.
    """
    import torch

    from . import kernel_choice
    from .gpu.gpu_check import checked

    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise InputError(f"device={device!r}: expected cuda, or cuda:1 for the second GPU")
    if torch.cuda.device_count() <= (torch.device(device).index or 0):
        found = torch.cuda.device_count()
        raise InputError(f"device={device!r}: there are {found} CUDA devices here, expected this one")
    try:
        result = checked(torch.device("cuda", torch.device(device).index or 0), again)
    except Exception as error:
        raise OSError(f"gpu-check: {one_line(error)}; CUDA tensors take `masked`") from error
    print("\n".join(kernel_choice.table(result)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    os.environ["MPLBACKEND"] = "agg"  # figures are only written; the backend of a notebook may not even be there
    goes_on = GOES_ON.get(given[0] if given else "", "")
    # Called as a command, the process ends right after this: no late signal may change what the command says it did.
    with _stoppable(goes_on, for_good=arguments is None) as signals, _patient_streams(), _one_line_warnings():
        try:
            try:
                _check_backend()
                return _run(given)
            finally:
                signals.heard = False
        except BaseException as error:
            signals.heard = False
            if isinstance(error, Exception) and signals.came:  # a library made another exception of the signal's
                error = KeyboardInterrupt() if signals.came[0] == signal.SIGINT else Preempted("stopped by SIGTERM")
            code, line = _ending(error)
        print(f"sfg-fast: {line}", file=sys.stderr)
        return code


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Prints warnings without the line of source that they come from, each on a line of its own, not behind a progress
    bar."""
    before, shown_before = warnings.formatwarning, warnings.showwarning

    def show(*arguments: Any, **options: Any) -> None:
        with _bars_aside():
            shown_before(*arguments, **options)

    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.formatwarning, warnings.showwarning = before, shown_before


def _bars_aside() -> contextlib.AbstractContextManager[Any]:
    """Clears progress bars on stderr during the body of the `with`, and draws them again."""
    if "tqdm" not in sys.modules:
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm.external_write_mode(file=sys.stderr, nolock=True)


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the line that an exception means to the user. An exception that means nothing to the user is
    raised again."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, Preempted):
        return 143, str(error)
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, OSError) and error.errno in PLACES and error.filename is not None:
        return 2, f"{os.fsdecode(error.filename)}: {os.strerror(error.errno).lower()}, expected {PLACES[error.errno]}"
    if isinstance(error, FloatingPointError | OSError):
        return 1, one_line(error)
    out_of_memory = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    if isinstance(error, MemoryError) or out_of_memory:
        return 1, f"not enough memory ({one_line(error)})"
    raise error


class _Signals:
    """Which signals came, and whether they still end the command."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.heard = True


@contextlib.contextmanager
def _stoppable(goes_on: str, for_good: bool) -> Iterator[_Signals]:
    """Makes Ctrl-C raise KeyboardInterrupt, and SIGTERM Preempted, as long as `heard` is true. goes_on: what Preempted
    says of how the command goes on. for_good: both signals are also ignored afterwards."""
    signals = _Signals()

    def stop(number: int, frame: Any) -> None:
        if not signals.heard:
            return
        signals.came.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Preempted(f"stopped by SIGTERM{goes_on}")

    # A signal that a background job ignores stays ignored. Processes of torchrun wait for each other inside calls in
    # which no handler runs, so that SIGTERM has to end them at once.
    listens: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if os.environ.get("WORLD_SIZE", "1") == "1":
        listens[signal.SIGTERM] = signal.SIG_DFL
    taken = {}
    if threading.current_thread() is threading.main_thread():  # no other thread can listen
        taken = {number: usual for number, usual in listens.items() if signal.getsignal(number) is usual}
    try:
        for number in taken:
            signal.signal(number, stop)
        yield signals
    finally:
        signals.heard = False
        for number, usual in taken.items():
            signal.signal(number, signal.SIG_IGN if for_good else usual)


class _Patient:
    """Stands for stdout or stderr. Once the stream can't be written to (a pipe that nobody reads any more, a terminal
    that is gone), what is printed is lost and the work goes on, because all results are in files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._tried(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, call: Any) -> Any:
        try:
            return call()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                number = os.open(os.devnull, os.O_WRONLY)  # Python flushes the stream once more at its own end
                os.dup2(number, self._stream.fileno())
                os.close(number)
            return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _patient_streams() -> Iterator[None]:
    """Makes stdout and stderr such that printing can't end a command, not even a name that the terminal has no letters
    for."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        for stream in before:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        out, err = (_Patient(nowhere if stream is None else stream) for stream in before)
        sys.stdout, sys.stderr = typing.cast(Any, out), typing.cast(Any, err)
        try:
            yield
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before


def _run(arguments: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser

    from .experiment.config import ExperimentConfig, add_arguments, from_options, instantiated
    from .training.config import TrainConfig

    if arguments[:1] == ["experiment"] and not (arguments[1:] or ["-"])[0].startswith("-"):
        arguments.insert(1, "--config")  # jsonargparse takes a configuration file as an option only
    plain = (phantom, preprocess, predict, evaluate, report, freeze, demo, gpu_check)
    commands = {function.__name__.replace("_", "-"): function for function in plain}
    parser = ArgumentParser(
        prog="sfg-fast",
        description="Multi-task CNNs with stochastic filter groups: from MR to synthetic CT and organ labels.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(required=True)
    configured = {"train": train, "experiment": experiment}
    names = ("phantom", "preprocess", "train", "predict", "evaluate", "report", "freeze", "experiment", "demo")
    for name in (*names, "gpu-check"):
        function = configured.get(name) or commands[name]
        summary = (function.__doc__ or "").split("\n\n")[0]
        sub = ArgumentParser(description=summary, exit_on_error=False)
        if name == "train":
            sub.add_argument("--config", action="config", help="YAML file with any of the options below")
            sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in `out`")
            sub.add_class_arguments(TrainConfig)
        elif name == "experiment":
            text = "YAML file with any of the options below; it may also stand alone: sfg-fast experiment CONFIG"
            sub.add_argument("--config", action="config", help=text)
            add_arguments(sub)
        else:
            sub.add_function_arguments(function, as_positional=True, skip=set(FLAGS))
            for flag, text in FLAGS.items():
                if flag in inspect.signature(function).parameters:
                    sub.add_argument(f"--{flag}", action="store_true", help=text)
        subcommands.add_subcommand(name, sub, help=summary)
    for name, following in itertools.pairwise([*arguments, ""]):
        if name.partition("=")[0] == "--config":
            shape = ExperimentConfig if arguments[0] == "experiment" else TrainConfig
            _check_yaml(Path(name.partition("=")[2] or following).expanduser(), shape)
    try:
        parsed = parser.parse_args([_underscored(argument) for argument in arguments])
    except ArgumentError as error:
        raise InputError(one_line(error)) from error
    for name, value in list(parsed.items()):
        parsed[name] = _at_home(name, value)
    name = parsed.subcommand
    options = instantiated(parser, parsed)[name].as_dict()
    if name == "train":
        options.pop("config", None)
        train(TrainConfig(**{k: v for k, v in options.items() if k != "resume"}), options["resume"])
    elif name == "experiment":
        options.pop("config", None)
        experiment(from_options(options))
    else:
        commands[name](**options)
    return 0


def _at_home(name: str, value: Any) -> Any:
    """The value of an option; in a path, a `~` at the start becomes the home folder."""
    if isinstance(value, dict):
        return {key: _at_home(str(key), one) for key, one in value.items()}
    if isinstance(value, str) and name.rpartition(".")[2] in PATHS:
        return os.path.expanduser(value)
    return value


def _check_yaml(path: Path, shape: Any) -> None:
    """Raises InputError for a configuration that isn't UTF-8, that is no mapping or has a section that is none, whose
    aliases stand for far more than is written there ("billion laughs"), or that has a key twice, of which YAML would
    take the last."""
    import yaml

    if not path.exists():
        return  # the parser says so
    text = read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (ValueError, RecursionError, yaml.YAMLError):
        return  # the parser says what is wrong
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if isinstance(node, tuple):
            return size(node[0]) + size(node[1])
        if id(node) not in sizes:
            sizes[id(node)] = MAX_YAML_NODES  # the size that a node inside itself finds
            keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                raise InputError(f"{path}: the key {twice[0]!r} is there twice, expected once")
            sizes[id(node)] = 1 + sum(map(size, node.value)) if isinstance(node, yaml.CollectionNode) else 1
        return sizes[id(node)]

    def check_sections(node: Any, shape: Any, name: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            found = "empty" if node is None or node.tag.endswith(":null") else "a list or a value"
            raise InputError(f"{path}: {name} is {found}, expected options such as `{next(iter(shape))}: ..`")
        for key, value in node.value:
            if dataclasses.is_dataclass(section := shape.get(str(key.value))):
                check_sections(value, typing.get_type_hints(section), f"the section {key.value!r}")

    if root is not None and size(root) >= MAX_YAML_NODES:
        raise InputError(f"{path}: its aliases stand for more than {MAX_YAML_NODES} values, expected a configuration")
    check_sections(root, typing.get_type_hints(shape), "the configuration")


def _check_backend() -> None:
    """Raises InputError if SFG_FAST_BACKEND names a backend that is not there."""
    from . import backends

    try:
        if (name := backends.current()) not in ("auto", "reference"):
            backends.load(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    except backends.BackendError as error:
        raise InputError(f"{backends.ENVIRONMENT}: {error}") from error


def _underscored(argument: str) -> str:
    """An option with underscores in its name: --log-every=5 becomes --log_every=5. Other arguments stay."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


if __name__ == "__main__":
    sys.exit(main())
