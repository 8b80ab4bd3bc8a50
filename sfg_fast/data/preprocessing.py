"""Takes a cohort of files to memory maps: `preprocess` checks, normalises and writes every case, in parallel.

A case, or a block of images (blocks.py), is written to a folder of its own, which appears when it is complete. So a run
that was killed goes on where it was. A second run writes only what has changed, because each case is known by a hash of
its files' contents and of everything else that its arrays depend on. cache.py describes the layout of the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..files import check_vacant, locked, make_folder, read_json, sha256_of, sweep, write_json
from .blocks import blocks_of, pixels_of, process_block
from .cache import DTYPES, ENTRY, VERSION, Cache
from .cases import Case, Cohort, LoadedCase
from .cohort import USUAL, files, load_case, unnamed_labels
from .images import CHANNEL_NAMES, MAX_PIXELS
from .notes import Note
from .targets import CLIP_HU, HU, Target
from .volumes import volume_files, volume_shape, volume_stem
from .written import complete, write

MARKER = "preprocess.json"  # says whose cache a folder is, also before the manifest is written
# Bytes per voxel and MR channel that a case takes while it is written: 13 to 18 were measured, and a file whose header
# scales its values takes more.
BYTES_AT_WORK = 34
DECODED_BYTES = 2**28  # bytes that an image which is resized takes; its own size is not known before it is read
FEW = 1e-3  # the share of the voxels, the brightest, that must not decide alone how the others are scaled
TOLD_SQUASH, REFUSED_SQUASH = 3.0, 100.0  # how far these few may move the scale, in SDs of the others
# The share of voxels at each end, and how far these may move the scale. So many voxels may be all that there is to see:
# only a scale that is more than the 16 bits of a scanner hold is refused.
SOME, REFUSED_SQUASH_OF_SOME = 2e-2, 1e5
# How far a voxel may lie from the foreground's mean in SDs: the brightest vessels reach 20, padding is beyond 50.
TOLD_Z, REFUSED_Z = 30.0, 1000.0
INT16 = 2.0**15  # a brightness beyond this turns negative in a program that stores 16 bits
SAMPLE = 2**18  # how many voxels, at most, percentiles are taken from
WHOLE = 0.995  # a body that fills more than this share of the volume is not plausible
# Median and mean of the body in HU: lungs, knees, heads and metal all stay inside these intervals; values 0..4095 that
# nobody rescaled don't.
PLAUSIBLE_MEDIAN, PLAUSIBLE_MEAN = (-500.0, 300.0), (-500.0, 500.0)


Done = tuple[dict[str, Any] | None, dict[str, str]]
"""The entry in the manifest of a case or block (None: it can't be used), and why cases, or images, are refused, by
name."""


class _Work(NamedTuple):
    """What there is to write.

    jobs: cases or blocks, each with a name and a split. do: the function that does one job. disk: the bytes that each
    takes on the disk. memory: the most bytes that one takes in memory. unit: what a job is called. images,
    channel_names: what the manifest says of them.
    """

    jobs: Sequence[Any]
    do: Callable[[Any], Done]
    disk: list[int]
    memory: int
    unit: str
    images: dict[str, bool] | None
    channel_names: tuple[str, ...]


def preprocess(
    cohort: Cohort,
    out: Path | str,
    progress: bool = True,
    *,
    processes: int = 1,
    on_bad_case: str = "stop",
    size: Sequence[int] | None = None,
) -> Cache:
    """Reads, checks and normalises every case of the cohort, writes the cache to the folder `out`, and opens it.

    out: a folder that is new or empty, or one of an earlier run for the same cohort, whose unchanged cases are kept.
    processes: how many cases (or blocks of images) are done at once, each in a process of its own (fewer if memory is
    short). on_bad_case: "stop" at the first case or image that can't be used, or "skip" it; the manifest then has the
    reasons, {"rejected": {case: reason}}. size: height and width in pixels that images are resized to; without it all
    images must have one size.

    The body mask is the case's own file, else `body_mask` of its first target in HU, else the whole volume. Labels that
    nobody named become "label_1", "label_2", .. Targets in HU are clipped to `CLIP_HU`. What a person should know of a
    case that is used all the same is in its "notes" in the manifest.

    Raises InputError, naming the case, for whatever `load_case` or `load_image` refuses, an MR without contrast, or
    whose contrast a few voxels take (`foreground_statistics`), a CT that can't be in HU (`check_hounsfield`), labels
    that are background in every case, label values with gaps that nobody named, no case that can be used, a disk that
    is too full for the cache, and a folder that holds anything else. Complete cases then stay for the next run; if
    there is none, nothing of the output remains. Raises ChildProcessError if a process dies.
    """
    from tqdm import tqdm

    out, bad = Path(out), {"stop": True, "skip": False}.get(on_bad_case)
    if bad is None:
        raise InputError(f"on_bad_case={on_bad_case!r}: expected stop or skip")
    if processes < 1:
        raise InputError(f"processes={processes}: expected at least one")
    _check_size(cohort, size)
    entries: dict[str, dict[str, Any]] = {}
    rejected: dict[str, str] = {}
    with _output(cohort, out):
        work = _blocks(cohort, out, bad, size) if cohort.images else _volumes(cohort, out, progress)
        processes = min(processes, len(work.jobs), _that_fit_in_memory(work.memory))
        _check_space(work, out, processes, progress)
        with _pool(processes) as each:
            bar = tqdm(each(work.do, work.jobs), "preprocess", len(work.jobs), unit=work.unit, disable=not progress)
            for job, (entry, refused) in zip(work.jobs, bar, strict=True):
                if refused and bad:
                    raise InputError(next(iter(refused.values())))
                rejected |= refused
                if entry is not None:
                    entries[job.name] = {"split": job.split, **entry}
        if not entries:
            raise InputError(f"{cohort.root}: no case can be used; the first: {next(iter(rejected.values()))}")
        targets = _named(cohort, entries)
        for name in _case_folders(out) - entries.keys():  # cases that the cohort no longer has
            (out / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(out / name)
        manifest = {
            "version": VERSION,
            "targets": {name: target.to_json() for name, target in targets.items()},
            "channel_names": list(work.channel_names),
            "images": work.images,
            "cases": entries,
            "rejected": rejected,
        }
        write_json(out / "manifest.json", manifest)
    return Cache(out)


def _check_size(cohort: Cohort, size: Sequence[int] | None) -> None:
    if size is None:
        return
    if not cohort.images:
        raise InputError(f"size={list(size)}: {cohort.source or cohort.root} has volumes, expected images to resize")
    if len(size) != 2 or not 1 <= min(size) <= math.prod(size) <= MAX_PIXELS:
        raise InputError(f"size={list(size)}: expected height and width in pixels, {MAX_PIXELS} pixels at most")


def _volumes(cohort: Cohort, out: Path, progress: bool) -> _Work:
    from tqdm import tqdm

    bar = tqdm(cohort.cases, "headers", unit="case", disable=not progress)
    voxels = [_voxels(case) for case in bar]
    channels = len(cohort.channel_names)
    disk = [
        n * (4 * channels + 1 + sum(DTYPES[cohort.targets[name].kind].itemsize for name in case.targets))
        for case, n in zip(cohort.cases, voxels, strict=True)
    ]
    memory = max(voxels) * (channels * BYTES_AT_WORK + 4 * len(cohort.targets.keys() - USUAL.keys()))
    do = functools.partial(_process, cohort.targets, out)
    return _Work(cohort.cases, do, disk, memory, "case", None, cohort.channel_names)


def _blocks(cohort: Cohort, out: Path, stop: bool, size: Sequence[int] | None) -> _Work:
    pixels = pixels_of(cohort, None if size is None else (size[0], size[1]), skip=not stop)
    blocks = blocks_of(cohort, pixels)
    each = pixels.bytes + sum(DTYPES[target.kind].itemsize for target in cohort.targets.values())
    disk = [len(block.cases) * each for block in blocks]
    memory = 2 * max(disk) + (DECODED_BYTES if pixels.resized else 4 * pixels.bytes)
    do = functools.partial(process_block, cohort.targets, pixels, not stop, out)
    return _Work(blocks, do, disk, memory, "block", {"resized": pixels.resized}, CHANNEL_NAMES[pixels.channels])


# --- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _output(cohort: Cohort, out: Path) -> Iterator[None]:
    """Holds the folder to write to, which must be new, empty or of this cohort, so that nobody else writes to it. If
    the body of the `with` fails before a case is complete, the folder is as it was before."""
    there, marker = out.is_dir(), out / MARKER
    whose = {"version": VERSION, "cohort": str((cohort.source or cohort.root).resolve())}
    if not marker.exists():
        check_vacant(out)
    elif (found := read_json(marker)) != whose:
        raise InputError(f"{out}: already there, with {MARKER} saying {found}, expected {whose}; name a new folder")
    make_folder(out)
    if not marker.exists():
        write_json(marker, whose)
    with locked(marker):
        try:
            sweep(out)
            yield
        except BaseException:  # Ctrl-C, too
            sweep(out)
            if not _case_folders(out):
                with suppress(OSError):
                    marker.unlink()
                    if not there:
                        out.rmdir()
            raise


def _case_folders(out: Path) -> set[str]:
    return {file.parent.name for file in out.glob("[!.]*/case.json")}


def _check_space(work: _Work, out: Path, processes: int, progress: bool) -> None:
    """Prints what the cases that are not there yet will take on the disk. Raises InputError if the disk has less."""
    there = _case_folders(out)
    new = [needed for job, needed in zip(work.jobs, work.disk, strict=True) if job.name not in there]
    needed, free, unit = sum(new), shutil.disk_usage(out).free, f"{work.unit}s"
    if progress:
        print(
            f"{len(new)} of {len(work.jobs)} {unit} to write, {_size(needed)}; {_size(free)} free; "
            f"{processes} at a time",
            file=sys.stderr,
        )
    if needed > free:
        raise InputError(f"{out}: {_size(needed)} are needed for {len(new)} {unit}, but only {_size(free)} are free")


def _size(number: float) -> str:
    power = min(int(math.log(max(number, 1), 1024)), 4)
    return f"{number / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# --- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def _pool(processes: int) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]]:
    """Gives a `map` that keeps the order and works in so many processes (one: in this very process)."""
    if processes == 1:
        yield map
        return
    # Processes are spawned, not forked: the parent may have threads, which a fork would stop in the middle of anything.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process died, perhaps for want of memory; the same command goes on, with fewer --processes"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    """Makes a worker leave Ctrl-C to its parent, and end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _that_fit_in_memory(needed: int) -> int:
    """How many jobs of so many bytes fit into the free memory, at least one."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize  # this system doesn't tell
    return max(1, free // max(1, needed))


# --- one case ---------------------------------------------------------------------------------------------------------


def _voxels(case: Case) -> int:
    """The voxels of a case, from its header alone; 0 for a header that can't be read, which `_process` will reject."""
    try:
        return math.prod(volume_shape(case.inputs[0]))
    except InputError:
        return 0


def _process(targets: Mapping[str, Target], out: Path, case: Case) -> Done:
    """Writes the case, unless its folder is already complete and up to date."""
    try:
        source = _content_hash(case, targets)
        arrays = {"inputs", "mask", *case.targets}
        if (entry := complete(out / case.name, source, ENTRY - {"split"}, arrays)) is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # all that there is to tell is in the notes
                loaded = load_case(case, targets)
            entry = _write_case(case, loaded, targets, source, out)
        return entry, {}
    except InputError as error:
        return None, {case.name: str(error)}


def _content_hash(case: Case, targets: Mapping[str, Target]) -> str:
    """The hash of the contents of all files, of what they are, and of all else that the arrays depend on."""
    about = [[name, targets[name].kind, targets[name].unit, targets[name].names] for name in case.targets]
    found: list[Any] = [VERSION, about]
    for role, paths in files(case).items():
        for path in paths:
            kind = path.name[len(volume_stem(path.name) or path.name) :].lower()  # the ending decides who reads a file
            found.append([role, kind, [sha256_of(file) for file in volume_files(path)]])
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _write_case(
    case: Case, loaded: LoadedCase, targets: Mapping[str, Target], source: str, out: Path
) -> dict[str, Any]:
    """Writes the arrays of one case and returns its entry in the manifest. Raises InputError, naming case and file, for
    an MR without contrast and a CT that can't be in HU."""
    notes = list(loaded.notes)
    found = dict(loaded.targets)
    in_hu = [name for name in found if targets[name].unit == HU]
    file = case.inputs[0].parent
    try:
        statistics = foreground_statistics(loaded.inputs)
        for name in in_hu:
            file = case.targets[name]
            check_hounsfield(found[name])
            found[name] = found[name].clip(*CLIP_HU)
        if loaded.mask is not None:
            mask, mask_from = loaded.mask, "file"
        elif in_hu:
            file = case.targets[in_hu[0]]
            mask, mask_from = body_mask(found[in_hu[0]]), in_hu[0]
        else:
            mask, mask_from = np.ones(loaded.inputs.shape[1:], bool), "volume"
    except InputError as error:
        raise InputError(f"case {case.name} ({file}): {error}") from error
    notes += [
        Note("mr", f"case {case.name} ({path}): {said}") for path, said in _strange(case, loaded.inputs, statistics)
    ]
    for name in in_hu:
        if said := _implausible(found[name][mask]) or _whole(mask, loaded.mask is None and name == in_hu[0]):
            notes.append(Note("ct", f"case {case.name} ({case.targets[name]}): {said}"))
    labels = [array for name, array in found.items() if targets[name].kind == "labels"]
    entry = {
        "shape": list(mask.shape),
        "spacing": list(loaded.grid.spacing),
        "grid": loaded.grid.to_json(),
        "targets": {name: _counted(targets[name], array, mask) for name, array in found.items()},
        "mask_from": mask_from,
        "mr_foreground": [{"mean": mean, "sd": deviation} for mean, deviation in statistics],
        "foreground_slices": _runs(np.any([np.any(one, axis=(1, 2)) for one in labels], axis=0)) if labels else None,
        "notes": [note.to_json() for note in notes],
    }
    inputs = np.ascontiguousarray(normalise(loaded.inputs).swapaxes(0, 1))
    arrays = {"inputs": inputs, "mask": mask, **found}
    return write(out / case.name, arrays, entry, source, out / "manifest.json")


def _counted(target: Target, array: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """What the manifest says of a target of a case: mean and SD in the mask, or the voxels of each label."""
    if target.kind == "labels":
        return {"counts": np.bincount(array.ravel()).tolist()}
    inside = array[mask]
    return {"mean": float(inside.mean(dtype=np.float64)), "sd": float(inside.std(dtype=np.float64))}


def _runs(where: np.ndarray) -> list[list[int]]:
    """The runs of True in a vector: [[first, end], ..], where the run stops before `end`."""
    edges = np.flatnonzero(np.diff(where, prepend=False, append=False))
    return edges.reshape(-1, 2).tolist()


def _named(cohort: Cohort, entries: dict[str, dict[str, Any]]) -> dict[str, Target]:
    """The cohort's targets that any case has. Labels that nobody named get names, and in `entries` every label gets a
    count in each case."""
    found = {}
    for name, target in cohort.targets.items():
        counted = [one["targets"][name] for one in entries.values() if name in one["targets"]]
        if not counted:
            continue
        if target.kind == "labels":
            names = _label_names(cohort, target, [one["counts"] for one in counted])
            target = dataclasses.replace(target, names=names)
            for one in counted:
                one["counts"] = one["counts"] + [0] * (len(names) - len(one["counts"]))
        found[name] = target
    return found


def _label_names(cohort: Cohort, target: Target, counts: list[list[int]]) -> dict[str, int]:
    """The names of labels as the cohort says, or else label_1, label_2, .. for the values that are found."""
    values = sorted({value for one in counts for value, count in enumerate(one) if count})
    if values == [0]:
        raise InputError(
            f"{cohort.root}: the {target.name} of every case are all background, expected at least one organ"
        )
    if target.names:
        return target.names
    if values[-1] != len(set(values) | {0}) - 1:
        several = sum(one.kind == "labels" for one in cohort.targets.values()) > 1
        which = f"the label files of {target.name!r}" if several else "the label files"
        raise InputError(f"{cohort.root}: {which} hold the values {values}, expected 0, 1, 2, .. without gaps")
    return unnamed_labels(values[-1])


# --- arrays -----------------------------------------------------------------------------------------------------------


def foreground_statistics(inputs: np.ndarray) -> list[tuple[float, float]]:
    """(mean, SD) of each channel of inputs [C, ...] over its foreground: the voxels above the channel's own mean.

    Raises InputError if a channel or its foreground is constant, or all but constant next to a few voxels
    (`REFUSED_SQUASH`, `REFUSED_Z`).
    """
    statistics = []
    for index, channel in enumerate(inputs):
        mean, deviation, count = _foreground(channel)
        low, high = float(channel.min()), float(channel.max())
        if deviation == 0:
            brighter = f"{count} of {channel.size} voxels are {high:g}, the lowest is {low:g}"
            raise InputError(
                f"MR channel {index} is constant in its foreground ({brighter if count else f'all are {high:g}'}), "
                "expected an image with contrast"
            )
        by, by_some = _squash(channel, mean, deviation, count), _squash_of_some(channel, mean, deviation)
        if by >= REFUSED_SQUASH or by_some >= REFUSED_SQUASH_OF_SOME:
            raise InputError(
                f"MR channel {index} has a few voxels so bright (up to {high:g}, {max(by, by_some):.3g} SDs of the "
                "others) that all others are one value next to them, expected an image with contrast"
            )
        if (far := _farthest(channel, mean, deviation)) >= REFUSED_Z:
            raise InputError(
                f"MR channel {index} has voxels {far:.3g} SDs from the mean of its foreground ({low:g} to {high:g}), "
                f"expected fewer than {REFUSED_Z:g}"
            )
        statistics.append((mean, deviation))
    return statistics


def _foreground(channel: np.ndarray) -> tuple[float, float, int]:
    """Mean, SD and number of the voxels above the channel's mean; all are 0 if there are none."""
    foreground = channel[channel > channel.mean(dtype=np.float64)]
    if not foreground.size:
        return 0.0, 0.0, 0
    return float(foreground.mean(dtype=np.float64)), float(foreground.std(dtype=np.float64)), foreground.size


def _squash(channel: np.ndarray, mean: float, deviation: float, count: int) -> float:
    """How far the brightest voxels (a share FEW of all) move the foreground's mean or stretch its SD, in SDs of the
    foreground without them; about 1 in images where they decide nothing.

    mean, deviation, count: mean, SD and number of voxels of the foreground with them.
    """
    few = int(FEW * channel.size)
    # To raise a variance to TOLD_SQUASH^2 = 9 times itself the brightest voxels must make up 8/9 of it, so that one of
    # them lies at least as far out as this. In most images none does, and nothing has to be sorted.
    if few == 0 or (float(channel.max()) - mean) / deviation < math.sqrt(0.8 * count / few):
        return 1.0
    rest = channel[channel < np.partition(channel.ravel(), -few)[-few]]
    mean_without, without, _ = _foreground(rest) if rest.size else (0.0, 0.0, 0)
    return max(deviation, abs(mean - mean_without)) / without if without else math.inf


def _squash_of_some(channel: np.ndarray, mean: float, deviation: float) -> float:
    """How far the brightest and the darkest voxels (a share SOME each) move the foreground's mean or stretch its SD, in
    SDs of the foreground when these voxels are clipped to the others; at most 2 in images where they decide nothing.

    It is 0 where the others all have one value: then these voxels are what there is to see.
    """
    sample = channel.ravel()[:: channel.size // SAMPLE + 1].astype(np.float64)
    mean_clipped, clipped, _ = _foreground(sample.clip(*np.quantile(sample, (SOME, 1 - SOME))))
    return max(deviation, abs(mean - mean_clipped)) / clipped if clipped else 0.0


def _farthest(channel: np.ndarray, mean: float, deviation: float) -> float:
    """How many SDs the voxel that is farthest from the foreground's mean lies from that mean."""
    return max(float(channel.max()) - mean, mean - float(channel.min())) / deviation


def _strange(case: Case, inputs: np.ndarray, statistics: list[tuple[float, float]]) -> Iterator[tuple[Path, str]]:
    """Gives (file, what is strange) for each MR channel whose scale a few voxels decide, that has voxels very far from
    the others, or that reaches both ends of 16 bits."""
    for path, channel, (mean, deviation) in zip(case.inputs, inputs, statistics, strict=True):
        count = int(np.count_nonzero(channel > channel.mean(dtype=np.float64)))
        low, high = float(channel.min()), float(channel.max())
        by = max(_squash(channel, mean, deviation, count), _squash_of_some(channel, mean, deviation))
        if by >= TOLD_SQUASH:
            yield path, f"a few voxels, up to {high:g}, decide how the MR is scaled ({by:.3g} SDs of the others)"
        elif (far := _farthest(channel, mean, deviation)) >= TOLD_Z:
            yield path, f"the MR has voxels {far:.3g} SDs from the mean of its foreground ({low:g} to {high:g})"
        elif 0.9 * INT16 <= high < INT16 and -INT16 <= low <= -0.9 * INT16:
            yield (
                path,
                f"the MR reaches both ends of 16 bits ({low:g} to {high:g}); did what is brighter turn negative?",
            )


def _implausible(body: np.ndarray) -> str:
    """What is strange about the CT's values in the body; "" if they may well be HU."""
    for what, value, (low, high) in (
        ("median", float(np.median(body)), PLAUSIBLE_MEDIAN),
        ("mean", float(body.mean(dtype=np.float64)), PLAUSIBLE_MEAN),
    ):
        if not low <= value <= high:
            return f"the CT's {what} in the body is {value:.0f}, expected {low:g} to {high:g} of HU; is it rescaled?"
    return ""


def _whole(mask: np.ndarray, found: bool) -> str:
    """What is strange about a body mask that was found in a CT; "" if there is air around it, or if it comes from
    elsewhere (`found` is False)."""
    share = float(mask.mean())
    if not found or share <= WHOLE:
        return ""
    return f"the body fills the whole volume ({share:.0%}), expected air around it, at -1000 HU; is the CT rescaled?"


def normalise(inputs: np.ndarray) -> np.ndarray:
    """Normalises an MR [C, Z, Y, X] to float32 z-scores: each channel minus the mean of its foreground, divided by its
    SD (see `foreground_statistics`, which says what is refused).

    This needs nothing but the MR, so that training and prediction see the same values.
    """
    normalised = np.empty(inputs.shape, np.float32)
    for channel, (mean, deviation), out in zip(inputs, foreground_statistics(inputs), normalised, strict=True):
        np.subtract(channel, mean, out=out)
        out /= deviation
    return normalised


def check_hounsfield(ct: np.ndarray) -> None:
    """Raises InputError for values that can't be HU of a patient: there must be air or fat, below 0, and bone, above
    100. Values below -1024 are padding outside the field of view and say nothing."""
    there = ct[ct >= CLIP_HU[0]]
    low, high = (float(there.min()), float(there.max())) if there.size else (math.nan, math.nan)
    if not low < 0 or not high > 100:
        padding = f" (but for padding below {CLIP_HU[0]:g})" if there.size < ct.size else ""
        raise InputError(
            f"the CT's values are {low:g} to {high:g}{padding}, expected HU (air or fat below 0, bone above 100)"
        )


def body_mask(ct: np.ndarray, threshold_hu: float = -500.0) -> np.ndarray:
    """The patient in a CT [Z, Y, X] in HU, as a mask bool [Z, Y, X]: the largest connected part above the threshold
    (which leaves out the table), whose holes (gas) are filled slice by slice. Raises InputError if nothing lies above
    the threshold."""
    from scipy import ndimage

    parts, count = ndimage.label(ct > threshold_hu)
    if count == 0:
        raise InputError(f"the CT has no voxel above {threshold_hu:g} HU (its maximum is {ct.max():g})")
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    body = parts == sizes.argmax()
    return np.stack([ndimage.binary_fill_holes(one) for one in body])
