"""Checkpoints. They are written whole or not at all, checked when they are read, and never a pickle that could run
code.

RUN/checkpoints/step_00000500.pt   to resume from; the last few are kept
RUN/checkpoints/best.pt            the best on the validation split, if there is one
RUN/checkpoints/final.pt           the finished run
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..files import one_line

VERSION = 4
KEYS = {
    "model",
    "objective",
    "optimiser",
    "step",
    "finished",
    "drawn_statistics",
    "processes",
    "best",
    "stale",
    "history",
    "config",
    "data",
}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to `path`, whole or not at all. `state` holds tensors, numbers, strings, lists and dicts.

    Raises OSError if it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": VERSION, **state}
    content["digest"] = _digest(content)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        raise OSError(f"{path}: can't be written ({_first_line(error)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises InputError if the file is missing, damaged, no checkpoint of a run, or of another version.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path}: checkpoint version {found!r}, expected {VERSION}")
    if missing := sorted(KEYS - state.keys()):
        raise InputError(f"{path}: a checkpoint without {missing[0]!r}, expected one of a run")
    if state.get("digest") != _digest(state):
        raise InputError(f"{path}: not a readable checkpoint (its content has another digest than when it was written)")
    return state


def step_path(folder: Path, step: int) -> Path:
    """The file of the checkpoint of this step, in the folder of checkpoints."""
    return folder / f"step_{step:08d}.pt"


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder that a run can be resumed from, newest first."""
    found = [path for path in folder.glob("step_*.pt") if re.fullmatch(r"step_\d{8,}\.pt", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")), reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The path of the newest checkpoint that can be read, and its content. A warning names each damaged one that it
    skips.

    Raises InputError if there is none, which says what is wrong with the newest.
    """
    refused: list[InputError] = []
    for path in steps(folder):
        try:
            state = load(path)
        except InputError as error:
            refused.append(error)
            continue
        for reason in refused:
            warnings.warn(f"{reason}; going on from {path.name}", stacklevel=2)
        return path, state
    if refused:
        raise refused[0]
    raise InputError(f"{folder}: no such checkpoint")


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints to resume from except the newest `keep`, and files that a killed process left
    half-written."""
    for path in (*steps(folder)[keep:], *folder.glob("*.part")):
        with suppress(OSError):
            path.unlink()


def load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load saved weights, `state`, into the model. `path` is their file, for messages.

    Raises InputError, which names the first difference, if they are of another architecture.
    """
    own, saved = model.state_dict(), state
    if not isinstance(saved, dict) or not all(torch.is_tensor(value) for value in saved.values()):
        raise InputError(f"{path}: its weights are {type(saved).__name__}, expected tensors by name")
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            where = "the checkpoint lacks" if name in own else "the model has no"
            raise InputError(f"{path}: checkpoint of another architecture ({where} {name!r})")
        if own[name].shape != saved[name].shape:
            raise InputError(
                f"{path}: checkpoint of another architecture ({name!r} has shape {tuple(saved[name].shape)}, "
                f"expected {tuple(own[name].shape)})"
            )
    model.load_state_dict(saved)


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to more bytes than it has. torch.save doesn't compress, so such a
    file was made to fill the memory."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise ValueError(f"it unpacks to more than its {size} bytes")


def _digest(content: dict[str, Any]) -> str:
    """The SHA-256 of all content except the digest itself. (The checksums of a zip archive don't cover its headers, and
    torch ignores them.)"""
    found = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            found.update(f"{type(value).__name__} {len(value)} ".encode())
            for one in value.items() if isinstance(value, dict) else value:
                feed(one)
        else:
            found.update(f"{value!r} ".encode())

    feed({name: value for name, value in content.items() if name != "digest"})
    return found.hexdigest()


def _first_line(error: Exception) -> str:
    return one_line(error)[:200]
