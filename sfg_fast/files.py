"""Files that are written whole or not at all, and read with a clear word when they can't be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError

MAX_JSON_BYTES = 2**29  # a manifest of 10^5 cases has about 10^8


def read_json(path: Path) -> Any:
    """The content of a JSON file. InputError: missing, not text, not JSON, more than MAX_JSON_BYTES."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error


def write_json(path: Path, content: Any) -> None:
    """Writes content as JSON, complete or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of path to write to; it becomes path at the end, and vanishes if the block fails.

    Raises InputError if it can't be written there, OSError if the disk is full.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        message = f"{path}: can't be written ({one_line(error)})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # not the user's input, but a full disk
            raise OSError(message) from error
        raise InputError(message) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_vacant(path: Path) -> None:
    """InputError: path is already there and not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already there and not an empty folder; name a new one")


def claim_folder(path: Path) -> None:
    """Makes a folder. InputError: it is already there and not empty, or can't be made."""
    check_vacant(path)
    make_folder(path)


def make_folder(path: Path) -> None:
    """Makes a folder where there is none. InputError: it can't be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be created ({one_line(error)})") from error


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """A folder to fill, new or empty before (otherwise InputError). If the block fails or is interrupted, what was
    put into it is removed, and so is the folder unless it was there before."""
    there = path.is_dir()
    claim_folder(path)
    try:
        yield
    except BaseException:  # Ctrl-C too
        for child in path.iterdir():
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink()
        if not there:
            path.rmdir()
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else holds this file's lock inside the block (it goes with the process). InputError if somebody does."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{path.parent}: another process is writing to it, expected to be the only one") from error
        yield


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
