"""Checkpoints: atomic, self-describing, and never a pickle that could run code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint (tensors, numbers, strings, lists, dicts) so that either all of it or the old one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. InputError if it is missing, damaged, or of another version."""
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not a readable checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path}: checkpoint version {found!r}, expected {VERSION}")
    return state


def load_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Put the saved weights into the model. InputError, naming the first difference, if it is another architecture."""
    own, saved = model.state_dict(), state
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
