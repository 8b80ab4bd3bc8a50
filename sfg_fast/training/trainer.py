"""The training loop: draws, objective, annealing, and a run folder that survives being killed."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ..data.cache import Cache, SliceSampler
from ..errors import InputError
from ..files import make_folder, write_json
from ..gates import temperature_at
from ..networks.controls import (
    assign,
    draws_from_constant_p,
    entropy,
    map_assignment,
    norm_buffers,
    recalibrate,
    set_temperature,
    sfg_layers,
)
from ..networks.highresnet import SFGHighResNet
from ..networks.transfer import transfer
from . import checkpoint
from .config import ScheduleConfig, TrainConfig, TransferConfig, check
from .objective import Objective
from .run import build_network, load_run

RECALIBRATION_BATCHES = 16


def choose_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda"."""
    if name not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"device={name!r}: expected auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device={name!r}: there is no CUDA device, expected auto or cpu")
    return torch.device(name)


def learning_rate_at(schedule: ScheduleConfig, step: int) -> float:
    """Weights' rate: linear warm-up, constant, then a cosine down to 5 %."""
    share = step / schedule.steps
    rate = schedule.learning_rate * min(1.0, (step + 1) / max(schedule.warmup, 1))
    if share > schedule.decay_from:
        fall = 0.5 * (1 + math.cos(math.pi * (share - schedule.decay_from) / (1 - schedule.decay_from)))
        rate *= 0.05 + 0.95 * fall
    return rate


class Trainer:
    """One run: `Trainer(config).run()`; with `resume=True` it goes on from the last checkpoint in `config.out`.

    Raises InputError for a cache without the tasks' targets, an `out` that holds a run already, or, to resume, a run
    that is not there or has another configuration.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        check(config)
        self.config, self.out = config, Path(config.out)
        self.device = choose_device(config.device)
        cache = Cache(Path(config.data))
        for task in config.tasks:
            target = {"ct": "ct", "organs": "labels"}[task]
            if not cache.has(target):
                raise InputError(f"{config.data}: task {task!r} needs {target}, and no training case has any")
        patch = None if config.patch is None else (config.patch[0], config.patch[1])
        self.sampler = SliceSampler(cache, "train", config.schedule.batch, patch, config.seed, config.bias)
        self.monitored = _held_out_slice(cache)

        torch.manual_seed(config.seed)
        organs = max(cache.label_names.values(), default=0) + 1
        self.model = build_network(config, cache.in_channels, organs)
        _start_from_the_mean(self.model, cache, config)
        if config.transfer.run is not None:
            _transfer(self.model, config.transfer)
        self.model.to(self.device)
        self.objective = Objective(tuple(config.tasks), config.objective).to(self.device)
        self.optimiser = self._optimiser()
        self.step = 0
        self.history = _empty_history(self.model, config.tasks)
        if resume:
            self._resume()
        else:
            self._claim()
            (self.out / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
            write_json(self.out / "data.json", {"in_channels": cache.in_channels, "labels": cache.label_names})
            self._save()  # a run that is killed before its first checkpoint can be resumed, too

    def _claim(self) -> None:
        if (self.out / "config.yaml").exists() or self.last_checkpoint.exists():
            raise InputError(f"{self.out}: holds a run already, expected a new folder (or --resume)")
        make_folder(self.out)

    @property
    def last_checkpoint(self) -> Path:
        return self.out / "checkpoints" / "last.pt"

    def _optimiser(self) -> torch.optim.Optimizer:
        """Adam; the logits have a rate of their own, and nothing decays them."""
        layers = sfg_layers(self.model).values()
        logits = [layer.logits for layer in layers if layer.logits.requires_grad]
        known = {id(parameter) for parameter in logits}
        weights = [
            p
            for p in (*self.model.parameters(), *self.objective.parameters())
            if p.requires_grad and id(p) not in known
        ]
        self.weights = weights
        groups: list[dict[str, Any]] = [{"params": weights, "name": "weights"}]
        if logits:
            groups.append({"params": logits, "name": "logits"})
        return torch.optim.Adam(groups, lr=self.config.schedule.learning_rate)

    def run(self) -> None:
        """Train to the end; leaves a checkpoint with re-estimated running statistics."""
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        schedule = self.config.schedule
        bar = tqdm(total=schedule.steps, initial=self.step, desc="train", unit="step", mininterval=0.5)
        with SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step) as board, bar:
            while self.step < schedule.steps:
                terms = self._train_step()
                self.step += 1
                bar.update()
                bar.set_postfix(self._postfix(terms, bar.format_dict), refresh=False)
                if self.step % self.config.log_every == 0 or self.step == schedule.steps:
                    self._log(terms, board)
                if self.step % self.config.checkpoint_every == 0 and self.step < schedule.steps:
                    self._save()
        self._finish()

    def _train_step(self) -> dict[str, float]:
        schedule, share = self.config.schedule, self.step / self.config.schedule.steps
        drawing = share < schedule.draw_until
        if not drawing and not all(layer.assigned or layer.estimator == "none" for layer in self._layers()):
            assign(self.model, map_assignment(self.model))
        set_temperature(
            self.model,
            temperature_at(share, schedule.temperature_start, schedule.temperature_end, schedule.temperature_until),
        )
        rate = learning_rate_at(schedule, self.step)
        warm = min(1.0, (self.step + 1) / max(schedule.warmup, 1))
        for group in self.optimiser.param_groups:
            logits_rate = schedule.learning_rate * schedule.logits_factor * warm if drawing else 0.0
            group["lr"] = rate if group["name"] == "weights" else logits_rate

        batch = self.sampler.batch(self.step)
        names = {task: {"ct": "ct", "organs": "labels"}[task] for task in self.config.tasks}
        targets = {task: batch[name].to(self.device) for task, name in names.items()}
        present = {task: batch[f"has_{name}"].to(self.device) for task, name in names.items()}
        self.model.train()
        outputs = self.model(batch["inputs"].to(self.device))
        value, nll = self.objective(self.model, outputs, targets, len(self.sampler), present)
        loss = value / len(self.sampler)  # so that the learning rate does not depend on the cohort's size
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, schedule.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient is not finite (cases {', '.join(batch['case'])}); "
                "lower schedule.learning_rate"
            )
        self.optimiser.step()
        return {"objective": float(loss.detach()), **{f"nll/{task}": float(value) for task, value in nll.items()}}

    def _layers(self) -> list[Any]:
        return list(sfg_layers(self.model).values())

    def _postfix(self, terms: dict[str, float], timing: dict[str, Any]) -> dict[str, str]:
        curves = self.history["curves"]
        text = {name[4:]: f"{value:.3f}" for name, value in terms.items() if name.startswith("nll/")}
        for name, unit in (("psnr", "dB"), ("dice", "")):
            if curves[name] and curves[name][-1] is not None:
                text[name] = f"{curves[name][-1]:.2f}{unit}"
        text["temp"] = f"{self._layers()[0].temperature.item():.2f}" if self._layers() else "-"
        rate = timing.get("rate") or 0.0
        text["slices/s"] = f"{rate * self.config.schedule.batch:.0f}"
        return text

    # --- looking at the run -------------------------------------------------------------------------------------------

    def _log(self, terms: dict[str, float], board: Any) -> None:
        """One row of the history: the terms, a held-out slice, and p of every layer."""
        curves, allocation = self.history["curves"], self.history["allocation"]
        looked = self._look()
        temperature = self._layers()[0].temperature.item() if self._layers() else None
        row = {
            "step": self.step,
            "objective": terms["objective"],
            **looked,
            "temperature": temperature,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        for name, value in row.items():
            curves[name].append(value)
        for task in self.config.tasks:
            value = terms[f"nll/{task}"]  # NaN, if no example of the batch has a target
            curves["nll"][task].append(None if math.isnan(value) else value)
        allocation["step"].append(self.step)
        for name, layer in sfg_layers(self.model).items():
            # The learnt p, also while its argmax is fixed; the assignment itself where nothing is learnt.
            learnt = layer.estimator != "none" or not layer.assigned
            p = layer.log_p().detach().exp() if learnt else layer.probabilities()
            allocation["p"][name].append(p.mean(0).tolist())
            allocation["entropy"][name].append(entropy(layer).mean().item() if learnt else 0.0)
        for name, value in {**row, **terms}.items():
            if name != "step" and value is not None and not math.isnan(value):
                board.add_scalar(name, value, self.step)
        for name in allocation["p"]:
            for group, share in zip(self.history["groups"], allocation["p"][name][-1], strict=True):
                board.add_scalar(f"allocation/{name}/{group}", share, self.step)

    @torch.no_grad()
    def _look(self) -> dict[str, float | None]:
        """PSNR in the mask (dB) and mean Dice on one held-out slice: something to watch, not a result."""
        slice_ = {name: tensor.to(self.device) for name, tensor in self.monitored.items()}
        self.model.eval()
        with torch.random.fork_rng():  # a network with constant p draws here; the run's own draws must not move
            outputs = self.model(slice_["inputs"])
        found: dict[str, float | None] = {"psnr": None, "dice": None}
        if "ct" in outputs and "ct" in slice_:
            error = (outputs["ct"][:, :1] * self.config.objective.ct_scale_hu - slice_["ct"])[slice_["mask"]]
            found["psnr"] = 10 * math.log10(4024.0**2 / max(error.square().mean().item(), 1e-12))
        if "organs" in outputs and "labels" in slice_:
            predicted, true = outputs["organs"].argmax(1), slice_["labels"]
            organs = [organ for organ in true.unique().tolist() if organ]
            overlap = [
                2 * ((predicted == o) & (true == o)).sum().item() / ((predicted == o).sum() + (true == o).sum()).item()
                for o in organs
            ]
            found["dice"] = sum(overlap) / len(overlap) if overlap else None
        return found

    # --- saving, resuming, finishing ----------------------------------------------------------------------------------

    def _save(self, drawn_statistics: dict[str, Tensor] | None = None) -> None:
        """Write the checkpoint. A finished run has `drawn_statistics`, running statistics for predictions by draws."""
        state = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "finished": drawn_statistics is not None,
            "drawn_statistics": drawn_statistics,
            "rng": _rng_state(self.device),
            "history": self.history,
            "config": dataclasses.asdict(self.config),
        }
        checkpoint.save(self.last_checkpoint, state)
        write_json(self.out / "history.json", self.history)

    def _resume(self) -> None:
        state = checkpoint.load(self.last_checkpoint)
        mine, saved = _flat(dataclasses.asdict(self.config)), _flat(state["config"])
        for key in sorted(mine.keys() | saved.keys()):
            if mine.get(key) != saved.get(key) and key not in ("out", "data"):
                raise InputError(
                    f"{key}={mine.get(key)!r}: the run to resume has {saved.get(key)!r}, expected the same"
                )
        checkpoint.load_weights(self.model, state["model"], self.last_checkpoint)
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.history = state["step"], state["history"]
        if state["finished"]:
            raise InputError(f"{self.out}: this run is finished ({self.step} steps), there is nothing to resume")
        _set_rng_state(state["rng"], self.device)

    def _finish(self) -> None:
        """Re-estimate running statistics: for draws, and for the most probable assignment, which the model keeps."""
        if self.config.network.method == "sfg":
            assign(self.model, None)
        steps = range(self.step, self.step + RECALIBRATION_BATCHES)
        batches = [self.sampler.batch(step)["inputs"].to(self.device) for step in steps]
        recalibrate(self.model, batches, drawn=True)
        drawn_statistics = norm_buffers(self.model)
        if not draws_from_constant_p(self.model):
            recalibrate(self.model, batches)
        self._save(drawn_statistics)


def _head_bias(model: SFGHighResNet, task: str) -> Tensor:
    bias = model.heads.conv.bias
    assert bias is not None
    return bias.data[model.heads.rows(task)]


def _start_from_the_mean(model: SFGHighResNet, cache: Cache, config: TrainConfig) -> None:
    """Head biases: the mean CT, and the classes' frequencies."""
    if "ct" in config.tasks:
        _head_bias(model, "ct")[0] = cache.mean_ct("train") / config.objective.ct_scale_hu
    if "organs" in config.tasks:
        frequencies = torch.as_tensor(cache.class_frequencies("train"), dtype=torch.float32)
        _head_bias(model, "organs").copy_(frequencies.clamp_min(1e-6).log())


def _transfer(model: SFGHighResNet, config: TransferConfig) -> None:
    """Start from another run's filters. (A resumed run does so, too, and then loads its own; the frozen stay.)"""
    assert config.run is not None
    try:
        transfer(load_run(Path(config.run)).model, model, config.tasks, config.freeze)
    except ValueError as error:
        raise InputError(f"transfer.run={config.run!r}: {str(error).removeprefix('transfer: ')}") from error


def _held_out_slice(cache: Cache) -> dict[str, Tensor]:
    """The slice with most labelled voxels (else the middle one) of the first case that is not trained on."""
    names = cache.names("val") or cache.names("test") or cache.names("train")
    case = cache.case(names[0])
    middle = len(case.inputs) // 2
    z = int((case.labels > 0).sum((1, 2)).argmax()) if case.labels is not None else middle
    arrays = {"inputs": case.inputs[z], "labels": None, "ct": None, "mask": case.mask[z][None]}
    if case.labels is not None:
        arrays["labels"] = case.labels[z]
    if case.ct is not None:
        arrays["ct"] = case.ct[z][None]
    found = {name: torch.from_numpy(array.copy())[None] for name, array in arrays.items() if array is not None}
    if "labels" in found:
        found["labels"] = found["labels"].long()
    return found


def _empty_history(model: nn.Module, tasks: list[str]) -> dict[str, Any]:
    names = list(sfg_layers(model))
    curves: dict[str, Any] = {
        name: [] for name in ("step", "objective", "psnr", "dice", "temperature", "learning_rate")
    }
    return {
        "groups": ["shared", *tasks],
        "curves": {**curves, "nll": {task: [] for task in tasks}},
        "allocation": {"step": [], "p": {name: [] for name in names}, "entropy": {name: [] for name in names}},
    }


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
