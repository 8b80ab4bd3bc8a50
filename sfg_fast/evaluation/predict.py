"""From a trained run and MR volumes to synthetic CT, organ labels and an uncertainty map, as NIfTI."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.cohort import Case, Cohort, check_same_channels, load_case
from ..data.preprocessing import normalise
from ..data.volumes import write_volume
from ..errors import InputError
from ..files import alone_in, check_vacant, read_json, sha256_of, sweep, write_json
from ..networks.controls import draws_from_constant_p, norm_buffers, predict, sfg_layers
from ..training.parallel import choose_device
from ..training.run import load_run
from .evaluate import ABOUT, About, file_that_differs, hashes_of_mr

SLICES_AT_ONCE = 16
PATCH_OVERLAP = 0.5
# Patches are weighted by a Gaussian around their centre, where a network has seen most context.
PATCH_WEIGHTING = "gaussian"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One volume, axes [Z, Y, X]: ct float32 in HU and labels uint8 (None if the run has no such task), and uncertainty
    float32: the SD over drawn architectures of the CT in HU, or without a CT task the root of the summed variances of
    the class probabilities. Zero where nothing is drawn. noise float32: the CT's SD in HU as the network predicts it,
    None unless the run has `objective.ct_noise` heteroscedastic."""

    ct: np.ndarray | None
    labels: np.ndarray | None
    uncertainty: np.ndarray
    noise: np.ndarray | None = None


class Predictor:
    """A trained run, ready to predict, with its `final` network or the `best` on the validation split.

    Raises InputError for a folder that is no run or a checkpoint of another one.
    """

    def __init__(self, run: Path, device: str = "auto", checkpoint: str = "final") -> None:
        trained = load_run(run, checkpoint)
        self.config, self.label_names, self.channel_names = trained.config, trained.label_names, trained.channel_names
        self.splits, self.checkpoint, self.digest = trained.cases, checkpoint, trained.digest
        self.history = trained.history
        self.device, self.model = choose_device(device), trained.model
        self.model.to(self.device).eval()
        self._statistics = {0: norm_buffers(self.model), 1: trained.drawn_statistics}
        self.constant_p = draws_from_constant_p(self.model)
        self.draws_anything = not all(layer.assigned for layer in sfg_layers(self.model).values())

    def volume(self, inputs: np.ndarray, draws: int, by: str = "map") -> Prediction:
        """Predict one volume slice by slice; in-plane patches are aggregated.

        inputs: raw MR [C, Z, Y, X]. The uncertainty comes from `draws` drawn architectures, the same for all slices;
        the CT and the labels from the most probable architecture (`by` = "map"), or from the mean over the drawn ones
        ("draws"; always, if p is constant).
        """
        slices = torch.from_numpy(np.ascontiguousarray(normalise(inputs).swapaxes(0, 1)))
        averaged = self.constant_p or (by == "draws" and self.draws_anything)
        mean, variance = self._slices(slices, draws if averaged else 0)
        if draws and self.draws_anything and not averaged:
            variance = self._slices(slices, draws)[1]
        ct = labels = noise = None
        start, unit = 0, self.config.objective.ct_scale_hu
        if "ct" in self.config.tasks:
            ct, start = mean[:, 0].numpy() * unit, 1
            if self.config.objective.ct_noise == "heteroscedastic":
                noise, start = mean[:, 1].numpy() * unit, 2
        if "organs" in self.config.tasks:
            labels = mean[:, start:].argmax(1).to(torch.uint8).numpy()
        spread = variance[:, 0].sqrt() * unit if start else variance.sum(1).sqrt()
        return Prediction(ct, labels, spread.numpy(), noise)

    def _slices(self, slices: Tensor, draws: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of all outputs side by side (CT and its predicted SD in units, class probabilities), [Z,
        outputs, Y, X]."""
        means, variances = [], []
        self.model.load_state_dict(self._statistics[min(draws, 1)], strict=False)
        # Whole volumes see the same drawn architectures: every batch of slices and every window starts from one seed.
        for batch in slices.split(SLICES_AT_ONCE):
            with torch.random.fork_rng():
                y = self._patches(batch.to(self.device), draws).cpu()
            mean, variance = y.chunk(2, 1)
            means.append(mean)
            variances.append(variance)
        return torch.cat(means), torch.cat(variances)

    def _patches(self, batch: Tensor, draws: int) -> Tensor:
        if self.config.patch is None:
            return self._predict(batch, draws)
        from monai.inferers import sliding_window_inference

        height, width = self.config.patch
        # Smaller slices are padded as in training (the sliding window itself would pad with zero, which is tissue).
        missing = [max(0, wanted - size) for wanted, size in zip((height, width), batch.shape[2:], strict=True)]
        top, left = missing[0] // 2, missing[1] // 2
        padded = batch.amin((2, 3), keepdim=True).repeat(1, 1, batch.shape[2] + missing[0], batch.shape[3] + missing[1])
        padded[:, :, top : top + batch.shape[2], left : left + batch.shape[3]] = batch
        y = sliding_window_inference(
            padded,
            (height, width),
            SLICES_AT_ONCE,
            lambda patches: self._predict(patches, draws),
            overlap=PATCH_OVERLAP,
            mode=PATCH_WEIGHTING,
        )
        assert isinstance(y, Tensor)
        return y[:, :, top : top + batch.shape[2], left : left + batch.shape[3]]

    def _predict(self, x: Tensor, draws: int) -> Tensor:
        torch.manual_seed(self.config.seed)
        found = predict(self.model, x, draws, {"organs": lambda y: y.softmax(1), "ct": _with_sd})
        means = [found[task][0] for task in ("ct", "organs") if task in found]
        variances = [found[task][1] for task in ("ct", "organs") if task in found]
        return torch.cat([*means, *variances], 1)

    def of_split(self, cohort: Cohort, split: str) -> tuple[Case, ...]:
        """The cohort's cases of split train, val or test, or all. Of a fold its own parts, whatever the cohort says."""
        if split == "all":
            return cohort.cases
        if self.config.fold is None or split not in ("train", "val"):
            return cohort.split(split)
        names = set(self.splits.get(split, []))
        return tuple(case for case in cohort.cases if case.name in names)

    def cases(
        self,
        cohort: Cohort,
        cases: Sequence[Case],
        out: Path,
        draws: int,
        by: str = "map",
        resume: bool = False,
    ) -> Iterator[tuple[str, Path]]:
        """Predict cases of a cohort one by one into OUT/CASE/{ct,labels,uncertainty,noise}.nii.gz, same affine and
        shape as the MR; a case's folder appears when it is complete. OUT/predictions.json says what they are (`About`).

        OUT must be new or empty; with `resume` it may hold predictions of this very run, made in the same way: those of
        the same MR files are kept, where all their files are as they were written. `draws` and `by` as for `volume`.
        Yields (case, folder) as each is done. Whatever ends it, complete cases stay; if there is none, nothing of the
        output remains.

        Raises InputError, before anything is done, for `draws` or `by` that can't be, or other MR channels than the
        run's; and for an OUT that holds anything else, or that another process is writing to.
        """
        check_same_channels(self.channel_names, cohort, str(cohort.root))
        if by not in ("map", "draws"):
            raise InputError(f"by={by!r}: expected map (argmax p) or draws (the mean over drawn architectures)")
        least = int(self.constant_p or by == "draws")
        if draws < least:
            raise InputError(f"draws={draws}: expected at least {least} drawn architectures")
        return self._one_by_one(cases, out, draws, by, resume)

    def _one_by_one(
        self, cases: Sequence[Case], out: Path, draws: int, by: str, resume: bool
    ) -> Iterator[tuple[str, Path]]:
        how: About = {
            "labels": self.label_names,
            "channels": list(self.channel_names),
            "checkpoint": self.checkpoint,
            "digest": self.digest,
            "draws": draws,
            "by": by,
            "patch": self.config.patch,
        }
        with _filling(out, how, resume) as (known, written):
            for case in cases:
                folder, content = out / case.name, hashes_of_mr(case)
                kept = known.get(case.name) == content and folder.is_dir()
                if not kept or file_that_differs(folder, written.get(case.name, {})):
                    partial = out / f".partial-{os.getpid()}-{case.name}"
                    self._write(case, partial, draws, by)
                    if folder.exists():  # of other MR files, or damaged
                        shutil.rmtree(folder)
                    known[case.name] = content
                    written[case.name] = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
                    write_json(out / ABOUT, {**how, "cases": known, "files": written, "finished": False})
                    os.replace(partial, folder)
                yield case.name, folder
            write_json(out / ABOUT, {**how, "cases": known, "files": written, "finished": True})

    def _write(self, case: Case, folder: Path, draws: int, by: str) -> None:
        """Predict one case into a new folder."""
        mr_only = dataclasses.replace(case, ct=None, labels=None, mask=None)
        loaded = load_case(mr_only, {})
        try:
            result = self.volume(loaded.inputs, draws, by)
        except InputError as error:
            raise InputError(f"case {case.name} ({case.inputs[0]}): {error}") from error
        folder.mkdir()
        files: dict[str, tuple[np.ndarray | None, Any]] = {
            "ct": (result.ct, np.float32),
            "labels": (result.labels, np.uint8),
            "uncertainty": (result.uncertainty, np.float32),
            "noise": (result.noise, np.float32),
        }
        for name, (array, dtype) in files.items():
            if array is not None:
                write_volume(folder / f"{name}.nii.gz", array, loaded.grid, dtype)


@contextmanager
def _filling(out: Path, how: About, resume: bool) -> Iterator[tuple[dict[str, list[str]], dict[str, dict[str, str]]]]:
    """OUT, for this process alone, to be filled with predictions made in this way; gives the cases that are there, with
    the hashes of their MR files, and of the files written. InputError if OUT holds anything else."""
    about = out / ABOUT
    with alone_in(out):
        known: dict[str, list[str]] = {}
        written: dict[str, dict[str, str]] = {}
        if about.exists() and resume:
            saved = read_json(about, About)
            for key, value in how.items():
                if saved.get(key) != value:
                    what = "the digest of the checkpoint" if key == "digest" else key
                    found = f"the predictions there have {saved.get(key)!r}, expected the same or another folder"
                    raise InputError(f"{about}: {what} is {value!r} now, {found}")
            known, written = saved.get("cases", {}), saved.get("files", {})
        else:
            check_vacant(out, "name a new one" + (", or --resume goes on" if about.exists() else ""))
        try:
            sweep(out)
            write_json(about, {**how, "cases": known, "files": written, "finished": False})
            yield known, written
        except BaseException:  # Ctrl-C too
            sweep(out)
            if not any((out / name).is_dir() for name in known):
                about.unlink(missing_ok=True)
            raise


def _with_sd(y: Tensor) -> Tensor:
    """A CT output: of two channels, the second is the log of the SD."""
    return y if y.shape[1] == 1 else torch.cat([y[:, :1], y[:, 1:].exp()], 1)
