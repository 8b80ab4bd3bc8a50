"""Predicts a cohort with a trained run: volumes become NIfTI files, images rows of a table, all with uncertainty."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.cases import Case, Cohort
from ..data.cohort import check_same_channels, load_case
from ..data.images import load_images
from ..data.preprocessing import normalise
from ..data.volumes import write_volume
from ..errors import InputError
from ..files import alone_in, check_vacant, read_json, replacing, sha256_of, sweep, write_json
from ..networks.controls import draws_from_constant_p, norm_buffers, predict, sfg_layers
from ..tasks import file_stems, to_json
from ..training.parallel import choose_device
from ..training.run import load_run
from .evaluate import ABOUT, TABLE, About, file_name, file_that_differs, hashes_of_inputs

SLICES_AT_ONCE = 16
IMAGES_AT_ONCE = 64
PATCH_OVERLAP = 0.5
# A Gaussian weights the voxels of a patch most at its centre, where the network has seen most context. Its SD is an
# eighth of the patch.
PATCH_WEIGHTING = "gaussian"
BY = {
    "map": "the most probable architecture",
    "draws": "the mean over drawn architectures",
    "mode": "drawn architectures, of numbers their mean, of classes the most frequent one",
}
STATISTICS = {"running": "those of training", "batch": "those of each batch that is predicted"}

Predicted = dict[str, dict[str, np.ndarray]]
"""For each task what `Task.predicted` gives: under "" the prediction itself, under "uncertainty" its SD over drawn
architectures, and so on. Arrays are [Z, Y, X] for a volume, [N] for images."""


class Predictor:
    """A trained run, ready to predict with its `final` network or with the `best` one on the validation split.

    Attributes:
        tasks: the run's tasks by name.
        images: how the run's images are prepared; None: it was trained on volumes.
        draws_anything: whether there is anything to draw, so that draws differ and give an uncertainty.
        constant_p: whether the grouping is drawn from a constant p, so that there is no most probable one.

    Raises InputError for a folder that is no run, and for a checkpoint of another run.
    """

    def __init__(self, run: Path, device: str = "auto", checkpoint: str = "final") -> None:
        trained = load_run(run, checkpoint)
        self.config, self.tasks, self.channel_names = trained.config, trained.tasks, trained.channel_names
        self.images, self.splits, self.checkpoint = trained.images, trained.cases, checkpoint
        self.digest, self.history = trained.digest, trained.history
        self.device, self.model = choose_device(device), trained.model
        self.model.to(self.device).eval()
        self._statistics = {0: norm_buffers(self.model), 1: trained.drawn_statistics}
        self.constant_p = draws_from_constant_p(self.model)
        layers = sfg_layers(self.model).values()
        drawn = any(not layer.assigned or layer.explore for layer in layers)
        self.draws_anything = drawn or self.config.network.dropout > 0

    def volume(self, inputs: np.ndarray, draws: int, by: str = "map", statistics: str = "running") -> Predicted:
        """Predict one volume slice by slice. A run that was trained on patches predicts overlapping patches of each
        slice, or of the volume if its patches are 3-D, which are averaged.

        inputs: the MR as scanned, [C, Z, Y, X]. draws: how many drawn architectures the uncertainty comes from, the
        same for all slices; with 0 the uncertainty is 0. by: what the prediction itself comes from: "map", the most
        probable architecture; "draws", the mean over the drawn architectures (where p is constant "map" means this,
        too); or "mode", for numbers that mean, for classes the one that most drawn architectures choose (the
        uncertainty of classes is then that of these choices). statistics: features are normalised by the "running"
        statistics of training, or by those of each "batch" of slices, as the authors' public code does.
        """
        normalised = normalise(inputs)
        if self.config.spatial_dims == 3:
            found = self._predicted(torch.from_numpy(normalised)[None], draws, by, statistics)
            return {name: {key: array[0] for key, array in parts.items()} for name, parts in found.items()}
        slices = torch.from_numpy(np.ascontiguousarray(normalised.swapaxes(0, 1)))
        return self._predicted(slices, draws, by, statistics)

    def of_images(
        self, images: Sequence[Case] | np.ndarray, draws: int, by: str = "map", statistics: str = "running"
    ) -> Predicted:
        """Predict images: cases, or an array [N, C, H, W] as `load_images` gives it. The other arguments are those of
        `volume`."""
        parts, batches = [], _batches(len(images), IMAGES_AT_ONCE, statistics)
        for chosen in batches:  # so that never all images are in memory
            if isinstance(images, np.ndarray):
                batch = images[chosen]
            else:
                assert self.images is not None, "the run was trained on volumes"
                batch = load_images([images[index] for index in chosen], self.images)
            parts.append(self._predicted(torch.from_numpy(batch), draws, by, statistics))
        order = np.argsort(np.concatenate(batches))
        return {
            name: {key: np.concatenate([part[name][key] for part in parts])[order] for key in found}
            for name, found in parts[0].items()
        }

    def _predicted(self, x: Tensor, draws: int, by: str, statistics: str) -> Predicted:
        """Predicts x [N, C, H, W] or [N, C, D, H, W], which is normalised as the network reads it."""
        averaged = self.constant_p or (by != "map" and self.draws_anything)
        votes = averaged and by == "mode"
        mean, variance = self._moments(x, draws if averaged else 0, votes, statistics)
        if draws and self.draws_anything and not averaged:
            variance = self._moments(x, draws, votes, statistics)[1]
        sizes = [task.outputs for task in self.tasks.values()]
        parts = zip(self.tasks.items(), mean.split(sizes, 1), variance.split(sizes, 1), strict=True)
        return {name: task.predicted(its_mean, its_variance) for (name, task), its_mean, its_variance in parts}

    def _moments(self, x: Tensor, draws: int, votes: bool, statistics: str) -> tuple[Tensor, Tensor]:
        """Mean and variance of the linked outputs of all tasks side by side, [N, outputs, ..]."""
        means, variances = [], []
        self.model.load_state_dict(self._statistics[min(draws, 1)], strict=False)
        # All slices see the same drawn architectures, because every batch and every window starts from one seed.
        batches = _batches(len(x), IMAGES_AT_ONCE if self.images is not None else SLICES_AT_ONCE, statistics)
        for chosen in batches:
            with torch.random.fork_rng():
                y = self._patches(x[torch.from_numpy(chosen)], draws, votes, statistics).cpu()
            mean, variance = y.chunk(2, 1)
            means.append(mean)
            variances.append(variance)
        order = torch.from_numpy(np.argsort(np.concatenate(batches)))
        return torch.cat(means)[order], torch.cat(variances)[order]

    def _patches(self, batch: Tensor, draws: int, votes: bool, statistics: str) -> Tensor:
        """Mean and variance of images [N, C, ..], in patches if the run was trained on them."""
        if self.config.patch is None:
            return self._predict(batch.to(self.device), draws, votes, statistics)
        from monai.inferers import sliding_window_inference
        from tqdm import tqdm

        patch, volume = tuple(self.config.patch), self.config.spatial_dims == 3
        padded, inside = padded_to(batch, patch)
        count = count_patches(padded.shape[2:], patch)
        quiet = {} if volume else {"disable": True}  # a slice takes no time; of volumes a bar does as TQDM_DISABLE says
        # The outputs of a whole volume are put together on the CPU, so that a GPU holds no more than some patches.
        with tqdm(total=count, desc="patches", unit="patch", leave=False, **quiet) as bar:

            def predicted(patches: Tensor) -> Tensor:
                y = self._predict(patches, draws, votes, statistics)
                bar.update(len(patches))
                return y

            y = sliding_window_inference(
                padded if volume else padded.to(self.device),
                patch,
                self.config.schedule.batch if volume else SLICES_AT_ONCE,
                predicted,
                overlap=PATCH_OVERLAP,
                mode=PATCH_WEIGHTING,
                sw_device=self.device,
            )
        assert isinstance(y, Tensor)
        return y[(slice(None), slice(None), *inside)]

    def _predict(self, x: Tensor, draws: int, votes: bool, statistics: str) -> Tensor:
        torch.manual_seed(self.config.seed)
        links = {name: lambda y, task=task: task.link(y, votes) for name, task in self.tasks.items()}
        found = predict(self.model, x, draws, links, statistics=statistics)
        return torch.cat([found[name][moment] for moment in (0, 1) for name in self.tasks], 1)

    def of_split(self, cohort: Cohort, split: str) -> tuple[Case, ...]:
        """The cohort's cases of the split train, val or test, or "all". For the run of a fold, train and val are the
        fold's own parts, whatever the cohort says."""
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
        statistics: str = "running",
    ) -> Iterator[tuple[str, Path]]:
        """Predict cases of a cohort one by one into OUT, and say in OUT/predictions.json what they are (`About`).

        For volumes OUT/CASE/ holds a file for each task, called as its target, and uncertainty.nii.gz, with the affine
        and shape of the MR (`file_name`); a case's folder appears when it is complete. For images OUT/predictions.csv
        holds a row for each; it appears when all are complete, and until then the rows are in predictions.csv.part.

        OUT must be new or empty. With `resume` it may hold predictions of this very run that were made in the same way;
        those of unchanged input files are kept, if they are still as they were written. `draws`, `by` and `statistics`
        are those of `volume`. Yields (case, its folder or the table) as each case is done. Whatever ends the work, what
        is complete stays; if that is nothing, nothing of the output remains.

        Raises InputError, before anything is done, for values of `draws`, `by` or `statistics` that can't be, and for a
        cohort of another kind than the run's or with other channels; and then for an OUT that holds anything else, or
        that another process is writing to.
        """
        if cohort.images != (self.images is not None):
            kinds = ["images" if images else "volumes" for images in (cohort.images, not cohort.images)]
            raise InputError(f"{cohort.root}: a cohort of {kinds[0]}, the run was trained on {kinds[1]}")
        check_same_channels(self.channel_names, cohort, str(cohort.root))
        for option, value, known in (("by", by, BY), ("statistics", statistics, STATISTICS)):
            if value not in known:
                expected = ", or ".join(f"{word} ({meaning})" for word, meaning in known.items())
                raise InputError(f"{option}={value!r}: expected {expected}")
        least = int(self.constant_p or by != "map")
        if draws < least:
            raise InputError(f"draws={draws}: expected at least {least} drawn architectures")
        how: About = {
            "channels": list(self.channel_names),
            "checkpoint": self.checkpoint,
            "digest": self.digest,
            "draws": draws,
            "by": by,
            "statistics": statistics,
            "patch": self.config.patch,
            "tasks": to_json(self.tasks),
        }
        return (self._table if cohort.images else self._one_by_one)(cases, out, how, resume)

    # --- volumes ------------------------------------------------------------------------------------------------------

    def _one_by_one(self, cases: Sequence[Case], out: Path, how: About, resume: bool) -> Iterator[tuple[str, Path]]:
        def anything(saved: About) -> bool:
            return any((out / name).is_dir() for name in saved["cases"])

        with _filling(out, how, resume, anything) as saved:
            known, written = saved["cases"], saved.setdefault("files", {})
            write_json(out / ABOUT, {**how, "cases": known, "files": written, "finished": False})
            for case in cases:
                folder, content = out / case.name, hashes_of_inputs(case)
                kept = known.get(case.name) == content and folder.is_dir()
                if not kept or file_that_differs(folder, written.get(case.name, {})):
                    partial = out / f".partial-{os.getpid()}-{case.name}"
                    self._write(case, partial, how)
                    if folder.exists():  # the folder there was predicted from other MR files, or is damaged
                        shutil.rmtree(folder)
                    known[case.name] = content
                    written[case.name] = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
                    write_json(out / ABOUT, {**how, "cases": known, "files": written, "finished": False})
                    os.replace(partial, folder)
                yield case.name, folder
            write_json(out / ABOUT, {**how, "cases": known, "files": written, "finished": True})

    def _write(self, case: Case, folder: Path, how: About) -> None:
        """Predict one case into a new folder."""
        loaded = load_case(dataclasses.replace(case, targets={}, mask=None), {})
        try:
            result = self.volume(loaded.inputs, how["draws"], how["by"], how["statistics"])
        except InputError as error:
            raise InputError(f"case {case.name} ({case.inputs[0]}): {error}") from error
        folder.mkdir()
        for name, found in result.items():
            for key, array in found.items():
                dtype = np.float32 if key else self.tasks[name].dtype
                write_volume(folder / file_name(self.tasks, name, key), array, loaded.grid, dtype)

    # --- images -------------------------------------------------------------------------------------------------------

    def _table(self, cases: Sequence[Case], out: Path, how: About, resume: bool) -> Iterator[tuple[str, Path]]:
        table, part = out / TABLE, out / f"{TABLE}.part"
        with _filling(out, how, resume, lambda saved: table.exists() or part.exists()) as saved:
            hashes = {case.name: hashes_of_inputs(case) for case in cases}
            batches = _batches(len(cases), IMAGES_AT_ONCE, how["statistics"])
            names = [cases[index].name for batch in batches for index in batch]  # names in the order of the work
            if table.exists() and saved.get("table") == sha256_of(table):
                part.write_bytes(_in_order(table, names))
                table.unlink()
            unchanged = {name for name, found in hashes.items() if saved["cases"].get(name) == found}
            if how["statistics"] == "batch" and list(saved["cases"].items()) != list(hashes.items()):
                unchanged = set()  # an image changes the predictions of all others in its batch
            done, start = _cut_behind_whole_rows(part, self._columns(), names, unchanged), 0
            write_json(out / ABOUT, {**how, "cases": hashes, "finished": False})
            for chosen in batches:
                batch = [cases[index] for index in chosen]
                if start + len(batch) > done:  # a batch is predicted as a whole, so that its predictions stay the same
                    rows = self._rows(batch, how)[max(0, done - start) :]
                    text = _as_text(rows if part.exists() else [self._columns(), *rows])
                    with part.open("ab") as file:
                        file.write(text)
                start += len(batch)
                for case in batch:
                    yield case.name, table
            content = _in_order(part, list(hashes))
            about = {**how, "cases": hashes, "table": hashlib.sha256(content).hexdigest()}
            write_json(out / ABOUT, {**about, "finished": False})
            with replacing(table) as whole:
                whole.write_bytes(content)
            part.unlink()
            write_json(out / ABOUT, {**about, "finished": True})

    def _columns(self) -> list[str]:
        """The columns of the table: case, and for each task its prediction and what else it predicts."""
        columns = ["case"]
        for name, stem in file_stems(self.tasks).items():
            nothing = torch.zeros(1, self.tasks[name].outputs)
            columns += [f"{stem}_{key}" if key else stem for key in self.tasks[name].predicted(nothing, nothing)]
        return columns

    def _rows(self, cases: Sequence[Case], how: About) -> list[list[str]]:
        columns = [[case.name for case in cases]]
        for name, found in self.of_images(cases, how["draws"], how["by"], how["statistics"]).items():
            for key, values in found.items():
                columns.append([repr(float(value)) if key else self.tasks[name].cell(value) for value in values])
        return [list(row) for row in zip(*columns, strict=True)]


def padded_to(batch: Tensor, patch: Sequence[int]) -> tuple[Tensor, list[slice]]:
    """The images [N, C, ..], where they are smaller than the patch padded as in training: each is centred, and its
    minimum in each channel is around it. (The sliding window itself would pad with 0, which is tissue.) Also returns
    where the images are in there, a slice for each axis."""
    sizes = batch.shape[2:]
    missing = [max(0, wanted - size) for wanted, size in zip(patch, sizes, strict=True)]
    inside = [slice(more // 2, more // 2 + size) for more, size in zip(missing, sizes, strict=True)]
    if not any(missing):
        return batch, inside
    lowest = batch.flatten(2).amin(2).view(*batch.shape[:2], *[1] * len(sizes))
    padded = lowest.repeat(1, 1, *(more + size for more, size in zip(missing, sizes, strict=True)))
    padded[(slice(None), slice(None), *inside)] = batch
    return padded, inside


def count_patches(sizes: Sequence[int], patch: Sequence[int]) -> int:
    """How many patches the sliding window takes of an image of these sizes, which are none below the patch's."""
    steps = [max(1, int(wanted * (1 - PATCH_OVERLAP))) for wanted in patch]
    return math.prod(
        math.ceil((size - wanted) / step) + 1 for size, wanted, step in zip(sizes, patch, steps, strict=True)
    )


def _batches(count: int, at_once: int, statistics: str) -> list[np.ndarray]:
    """The indices 0 .. count - 1 of images or slices in batches, with at most `at_once` in each.

    With `statistics` of the batch all batches have about the same size, and each takes indices from all over. Otherwise
    the few that are left over at the end, or neighbours, which are often alike (a list sorted by age, the slices of a
    volume), would be normalised by themselves alone.
    """
    parts = max(1, math.ceil(count / at_once))
    if statistics == "batch":
        return [np.arange(first, count, parts) for first in range(parts)]
    return [np.arange(first, min(first + at_once, count)) for first in range(0, count, at_once)]


def _in_order(table: Path, names: Sequence[str]) -> bytes:
    """The text of a table with its header, and with the rows of the named images in the order of the names."""
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    by_name = {row[0]: row for row in rows}
    return _as_text([header, *(by_name[name] for name in names if name in by_name)])


def _as_text(rows: Sequence[Sequence[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _cut_behind_whole_rows(table: Path, columns: list[str], names: list[str], unchanged: set[str]) -> int:
    """Cuts a table, if there is one, behind its first rows that can be kept, and returns how many these are.

    A row can be kept if it is whole (a kill may have cut it), if it is that of the next name in `names`, and if that
    image is in `unchanged`.
    """
    if not table.exists():
        return 0
    size = count = 0
    for number, line in enumerate(table.read_bytes().split(b"\n")[:-1]):
        try:
            cells = next(csv.reader([line.decode()]), [])
        except (UnicodeDecodeError, csv.Error):
            break
        if number == 0:
            good = cells == columns
        else:
            good = len(cells) == len(columns) and [cells[0]] == names[number - 1 : number] and cells[0] in unchanged
        if not good:
            break
        size, count = size + len(line) + 1, number
    if count:
        os.truncate(table, size)
    else:
        table.unlink()
    return count


@contextmanager
def _filling(out: Path, how: About, resume: bool, anything: Callable[[About], bool]) -> Iterator[About]:
    """Keeps OUT for this process while predictions are written to it, and gives what predictions.json says of those
    that are there already.

    how: how the predictions are made; those that are there must have been made in the same way. anything: whether any
    prediction is there. If the body of the `with` fails and none is, predictions.json is removed. Raises InputError if
    OUT holds anything else, or if another process has it.
    """
    about = out / ABOUT
    with alone_in(out):
        saved: About = {}
        if about.exists() and resume:
            saved = read_json(about, About)
            for key, value in how.items():
                if saved.get(key) != value:
                    what = "the digest of the checkpoint" if key == "digest" else key
                    found = f"the predictions there have {saved.get(key)!r}, expected the same or another folder"
                    raise InputError(f"{about}: {what} is {value!r} now, {found}")
        else:
            check_vacant(out, "name a new one" + (", or --resume goes on" if about.exists() else ""))
        saved.setdefault("cases", {})
        try:
            sweep(out)
            yield saved
        except BaseException:  # Ctrl-C too
            sweep(out)
            if not anything(saved):
                about.unlink(missing_ok=True)
            raise
