"""The training loop. It runs on one device or many, and a killed run goes on from its folder."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, Preempted
from ..files import write_json
from ..networks.controls import assign, draws_from_constant_p, norm_buffers, recalibrate, sfg_layers
from . import checkpoint
from .config import TrainConfig
from .graphs import CapturedSteps, CudaCapture
from .history import record
from .onlookers import Onlooker, quiet_writers, tell
from .parallel import own_random_numbers
from .schedule import apply_schedule, learning_rate_at, temperature_of
from .state import TrainingState, seed_of
from .step import Batch, Loss, Step, Unread, on_device
from .validation import scores, tally, validate

RECALIBRATION_BATCHES = 16


class Trainer(TrainingState):
    """One training run: `Trainer(config).run()`. Making a Trainer reads the cohort and the checkpoint, but writes
    nothing.

    Under torchrun a Trainer is one of several processes; the main process writes the files.

    Args:
        config: the configuration of the run.
        resume: whether the run goes on from the newest checkpoint in `config.out`. It starts if there is none yet.
        observe: the main process calls `observe(history, folder)` after every checkpoint, to draw the history.

    Raises:
        InputError: for a configuration or a cohort that can't be used, an `out` that holds a run already, or, with
            `resume`, a run that is finished or has another configuration or cohort.
    """

    def __init__(
        self,
        config: TrainConfig,
        resume: bool = False,
        observe: Callable[[dict[str, Any], Path], None] = lambda history, folder: None,
    ) -> None:
        super().__init__(config, resume, observe)
        loss = Loss(self.model, self.objective, self.tasks, len(self.sampler), self.config.precision).to(self.device)
        self.loss = self.processes.averaged(loss)
        targets = [task.target for task in self.tasks.values()]
        self._waits = not self.processes.one_gpu
        self._step = Step(self.loss, self.model, self.optimiser, config.schedule, targets, self._waits)
        self._graphs: CapturedSteps | None = None
        if self.processes.one_gpu and config.graph != "off":
            capture = CudaCapture(self.device)
            self._graphs = CapturedSteps(self._step, capture, self.device, required=config.graph == "on")
        self._unread: Unread | None = None
        self._terms: dict[str, float] = {}  # of the newest step whose outcome was read
        self._batches: Iterator[Batch] | None = None
        self._waited, self._worked = 0.0, 0.0

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end. The last checkpoint, final.pt, holds the network with re-estimated running statistics.

        Raises InputError if `out` holds another run by now, FloatingPointError if too many gradients were not finite,
        Preempted after SIGTERM, when everything is saved, OSError if the disk is full, and ChildProcessError if a
        worker died.
        """
        schedule, config = self.config.schedule, self.config
        self.begin()
        with quiet_writers(), contextlib.ExitStack() as ends, _asked_to_stop() as asked:
            bar, board = Onlooker("the progress bar", self._bar), Onlooker("the tensorboard", self._board)
            for onlooker in (bar, board):
                ends.callback(onlooker, lambda it: it.close())
            while self.step < schedule.steps and not self._stopped_early():
                terms = self._train_step()
                self.step += 1
                bar(lambda it: it.update())
                bar(lambda it: it.set_postfix(self._postfix(terms, it.format_dict), refresh=False))  # noqa: B023
                if self.step % config.log_every == 0 or self.step == schedule.steps:
                    self._log(self._read(), board)
                stop = self.processes.any(bool(asked))
                look = self.step % config.checkpoint_every == 0 and self.step < schedule.steps
                if look or stop:
                    self._read()  # a checkpoint names all bad steps before it
                    if look:
                        self._validate()
                    self._save()
                if stop:
                    raise Preempted(f"{self.out}: stopped by SIGTERM, saved at step {self.step}; --resume goes on")
        if len(self.history["bad_steps"]) == self.step > 0:
            raise FloatingPointError(f"{self.out}: no step had a finite gradient; lower schedule.learning_rate")
        self._finish()

    def _bar(self) -> Any:
        from tqdm import tqdm

        steps = self.config.schedule.steps
        silent = {} if self.processes.main else {"disable": True}  # the main process does as TQDM_DISABLE says
        return tqdm(total=steps, initial=self.step, desc="train", unit="step", mininterval=0.5, **silent)

    def _board(self) -> Any:
        """A SummaryWriter; None in all processes but the main one."""
        if not self.processes.main:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step)

    def _next_batch(self) -> Batch:
        """The next mini-batch, in memory. The time that the loop waits for it is added to `_waited`."""
        if self._batches is None:
            accumulate = self.config.schedule.accumulate
            positions = range(self.step * accumulate, self.config.schedule.steps * accumulate)
            loader: Any = torch.utils.data.DataLoader(
                self.sampler,  # type: ignore[arg-type]
                batch_size=None,
                sampler=positions,
                num_workers=self.config.workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # the default one draws the assignments
            )
            self._batches = iter(loader)
        before = time.perf_counter()
        try:
            batch = next(self._batches)
        except InputError as error:
            if not self.config.workers:
                raise
            traceback = str(error).replace("\\n", "\n").strip()  # a worker's traceback ends with the message
            raise InputError(traceback.splitlines()[-1].removeprefix("sfg_fast.errors.InputError: ")) from error
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise ChildProcessError(f"a worker that reads ahead died ({error}); --resume goes on") from error
            raise
        self._waited += time.perf_counter() - before
        return batch

    def _train_step(self) -> dict[str, float]:
        """Do a step. Returns the terms of eq. 2 of the newest step that the host knows of: on one GPU it reads those of
        the step before, while the device does this one, and has none after the first step."""
        started, schedule = time.perf_counter(), self.config.schedule
        apply_schedule(schedule, self.step, self.model, self.optimiser)
        self.model.train()
        cases: list[list[str]] = []
        batches = self._batches_of_step(cases)
        if self._graphs is not None:
            outcome = self._graphs(batches)
        else:
            outcome = self._step(on_device(batch, self.device) for batch in batches)
        unread = Unread(self.step, cases, outcome)
        self._read()
        self._unread = unread
        if self._waits:
            self._read()
        self._worked += time.perf_counter() - started
        return self._terms

    def _batches_of_step(self, cases: list[list[str]]) -> Iterator[Batch]:
        """The mini-batches of the next step. The names of their cases are appended to `cases`."""
        for _ in range(self.config.schedule.accumulate):
            batch = self._next_batch()
            cases.append(batch["case"])
            yield batch

    def _read(self) -> dict[str, float]:
        """Read the outcome of the last step, if that was not done yet. Returns the terms of eq. 2 in the newest step
        that was read, each the mean over its mini-batches. Raises what `_bad_step` raises."""
        if self._unread is not None:
            unread, self._unread = self._unread, None
            outcome = unread.read()
            rows = [[losses[0] * len(self.sampler), *losses[1:]] for losses in outcome.losses.tolist()]
            names = ["objective", *(f"nll/{task}" for task in self.tasks)]
            self._terms = {name: _mean(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
            if not outcome.good:
                self._bad_step(unread)
        return self._terms

    def _bad_step(self, unread: Unread) -> None:
        """Record and report a step that was left out because its gradient isn't finite. The gradient is the mean over
        processes, so all of them leave the step out. Without a case to blame, all cases of the step are named.

        Raises FloatingPointError if there were too many such steps, or if the weights aren't finite any more.
        """
        every = self.processes.gathered((unread.suspects(), [name for names in unread.cases for name in names]))
        cases = sorted({name for one, _ in every for name in one} or {name for _, all_ in every for name in all_})
        bad = self.history["bad_steps"]
        bad.append({"step": unread.step, "cases": cases})
        what = f"step {unread.step}: the gradient is not finite (cases {', '.join(cases)})"
        lost = not all(torch.isfinite(p).all() for p in self.model.parameters())
        if lost or len(bad) > self.config.max_bad_steps:
            raise FloatingPointError(f"{what}, {len(bad)} such steps; lower schedule.learning_rate")
        if self.processes.main:
            tell(f"\n{what}; left out, {len(bad)} of at most {self.config.max_bad_steps}")

    def _layers(self) -> list[Any]:
        return list(sfg_layers(self.model).values())

    def _stopped_early(self) -> bool:
        patience = self.config.schedule.patience
        return patience is not None and self.stale >= patience

    def _postfix(self, terms: dict[str, float], timing: dict[str, Any]) -> dict[str, str]:
        curves = self.history["curves"]
        text = {name[4:]: f"{value:.3f}" for name, value in terms.items() if name.startswith("nll/")}
        for name, task in self.tasks.items():
            for score in task.scores:
                values = curves["scores"][f"{name}/{score.name}"]
                if values and values[-1] is not None:
                    text[f"{name} {score.name}"] = f"{values[-1]:.{score.digits}f}{score.unit}"
        rate, schedule = timing.get("rate") or 0.0, self.config.schedule
        # (The layers' own temperature is on the device, which the host would have to wait for.)
        text["temp"] = f"{temperature_of(schedule, self.step - 1):.2f}" if self._layers() else "-"
        text[f"{self.sampler.examples}/s"] = f"{rate * schedule.batch * schedule.accumulate * self.processes.count:.0f}"
        text["waited"] = f"{self._waited_share():.0%}"
        return text

    def _waited_share(self) -> float:
        """The share of the steps' time in which the loop waited for examples, 0 to 1."""
        return self._waited / self._worked if self._worked else 0.0

    # --- looking at the run -------------------------------------------------------------------------------------------

    def _log(self, terms: dict[str, float], board: Onlooker) -> None:
        """Add a row to the history: the terms of eq. 2, the scores of held-out examples, and p of every layer."""
        terms = self.processes.mean(terms)
        if not self.processes.main:
            return
        row = {
            "step": self.step,
            "objective": terms["objective"],
            "scores": self._look(),
            "temperature": self._layers()[0].temperature.item() if self._layers() else None,
            "learning_rate": learning_rate_at(self.config.schedule, self.step - 1),  # that of the weights, in this step
        }
        nll = {task: terms[f"nll/{task}"] for task in self.tasks}
        for name, value in record(self.history, self.model, row, nll).items():
            board(lambda it: it.add_scalar(name, value, self.step))  # noqa: B023

    @torch.no_grad()
    def _look(self) -> dict[str, float | None]:
        """The scores of the held-out batch `monitored`."""
        batch = on_device(self.monitored, self.device)
        self.model.eval()
        with own_random_numbers(self.device):  # a network with constant p draws in this pass
            outputs = self.model(batch["inputs"])
        return scores(self.tasks, tally(self.tasks, outputs, batch))

    def _validate(self) -> None:
        """Score the validation split, if there is one: add a row to the history, and keep it in `best` if it is the
        best so far."""
        if self.validation is None:
            return
        config, schedule = self.config, self.config.schedule
        together = schedule.batch * self.processes.count
        wanted = min(config.validation_slices, len(self.validation))
        batches = (on_device(self.validation[i], self.device) for i in range(math.ceil(wanted / together)))
        with own_random_numbers(self.device, seed_of(config.seed, self.step)):
            here = validate(self.model, self.objective, self.tasks, self._calibration(), batches)
        every = self.processes.gathered({name: value.cpu() for name, value in here.items()})
        sums = {name: torch.stack([one[name] for one in every]).sum(0) for name in here}
        nll = [(sums[f"nll of {task}"] / sums[f"examples of {task}"]).item() for task in self.tasks]
        known = [value for value in nll if math.isfinite(value)]
        row: dict[str, Any] = {"step": self.step, "nll": sum(known) if known else None}
        row["scores"] = scores(self.tasks, sums)
        looks = self.history["validation"]
        looks["step"].append(self.step)
        looks["nll"].append(row["nll"])
        for name, value in row["scores"].items():
            looks["scores"][name].append(value)
        if row["nll"] is not None and (self.best is None or row["nll"] < self.best["nll"]):
            self.best, self.stale = row, 0
        elif self.step / schedule.steps >= schedule.draw_until:
            self.stale += 1

    def _calibration(self) -> Iterator[Tensor]:
        """Batches of images to re-estimate running statistics from, the same in all processes. Batches that hold a
        value which isn't finite are left out."""
        batches = ({"inputs": self.calibration[i]["inputs"]} for i in range(RECALIBRATION_BATCHES))
        finite = (batch for batch in batches if torch.isfinite(batch["inputs"]).all())
        return (on_device(batch, self.device)["inputs"] for batch in finite)

    # --- finishing ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Validate and save; then write summary.json, and best.pt and final.pt as networks to predict with.

        A run that is killed in between comes here again when it is resumed, with the same results. final.pt is written
        last: it tells that the run is finished.
        """
        if self._graphs is not None:
            self._graphs.forget()  # no step comes any more, and `_restore` brings other tensors
        if self.history["validation"]["step"][-1:] != [self.step]:
            self._validate()
        self._save()
        last = checkpoint.step_path(self.checkpoints, self.step)
        self.processes.main_does(self._summarise)
        files = {"best.pt": self.checkpoints / "best.pt", "final.pt": last}
        for name, source in files.items():
            if name == "final.pt" or self.best is not None:
                self._restore(source, checkpoint.load(source))
                state = self._finished_state()
                self.processes.main_does(lambda: checkpoint.save(self.checkpoints / name, state))  # noqa: B023

    def _finished_state(self) -> dict[str, Any]:
        """The state of the finished run. Its running statistics are re-estimated, for predictions by draws and for the
        most probable assignment; the model keeps the latter."""
        with own_random_numbers(self.device, seed_of(self.config.seed, self.step)):
            if self.config.network.method == "sfg":
                assign(self.model, None)
            recalibrate(self.model, self._calibration(), drawn=True)
            drawn_statistics = norm_buffers(self.model)
            if not draws_from_constant_p(self.model):
                recalibrate(self.model, self._calibration())
        return self._state(drawn_statistics)

    def _summarise(self) -> None:
        """Write RUN/summary.json, which describes the run in a few numbers."""
        validation = self.history["validation"]
        last = None
        if validation["step"]:
            ends = {name: values[-1] for name, values in validation["scores"].items()}
            last = {"step": validation["step"][-1], "nll": validation["nll"][-1], "scores": ends}
        p = self.history["allocation"]["p"]
        summary = {
            "steps": self.step,
            "stopped_early": self._stopped_early(),
            "processes": self.processes.count,
            "cases": self.counts,
            "validation": {"best": self.best, "last": last},
            "bad_steps": len(self.history["bad_steps"]),
            "waited_for_examples": self._waited_share(),
            "groups": self.history["groups"],
            "mean_p": {name: rows[-1] for name, rows in p.items() if rows},
        }
        write_json(self.out / "summary.json", summary)
        self._tell()


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Inside the `with` SIGTERM does not end the process: its number is appended to the list that this gives. (Python
    lets only the main thread handle signals; in other threads nothing changes.)"""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _mean(values: Sequence[float]) -> float:
    """The mean of the values that aren't NaN (a value is NaN where no example had the target); NaN if all are."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
