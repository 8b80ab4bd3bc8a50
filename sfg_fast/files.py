"""Files and folders: files are written whole or not at all, one that can't be read is refused in clear words, and only
one process at a time works in a folder."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import types
import typing
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError

MAX_JSON_BYTES = 2**29  # a manifest of 10^5 cases has about 10^8
LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LOCKED: set[tuple[int, int]] = set()  # files that this process has locked; the kernel would let it lock them again


# --- reading ----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8. Raises InputError if the file is missing, can't be read or is no such
    text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 ({one_line(error)}), expected that") from error
    except OSError as error:
        raise InputError(f"{path}: can't be read ({one_line(error)})") from error


def read_json(path: Path, shape: Any = Any) -> Any:
    """The content of a JSON file, which must have the `shape` (see `check_shape`).

    Raises InputError if the file is missing, isn't text or isn't JSON, for a key that is there twice, for half a letter
    (a lone surrogate, which no file name or page can hold), for more than MAX_JSON_BYTES, and for another shape.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_once_each)
        if "\\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except _Twice as error:
        raise InputError(f"{path}: the key {error.args[0]!r} is there twice, expected once") from error
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from error
    check_shape(content, shape, str(path))
    return content


class _Twice(Exception):
    """A key stands in an object twice; Python's JSON would take the last."""


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))
    return found


def check_shape(content: Any, shape: Any, where: str, place: str = "") -> None:
    """Raises InputError, which starts with `where` and names the place, if content from JSON or YAML lacks the shape.

    shape: a type, `A | B`, list[..], dict[str, ..], a TypedDict (other keys may be there, too), a dataclass (every key
    must be a field of it, none has to be there), or Any. An int will do for a float, but a bool will not do for an int.
    A number has to be finite, also when it is turned into a float. place: where in the whole content this content is.
    """
    origin, inside = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any:
        return
    if origin in (typing.Union, types.UnionType):
        refused = []
        for one in inside:
            try:
                return check_shape(content, one, where, place)
            except InputError as error:
                refused.append(error)
        parts = [one for one in inside if one is not type(None)]
        inner = isinstance(content, dict | list) or (isinstance(content, int | float) and not finite(content))
        if len(parts) == 1 and inner:  # of an optional, what is wrong inside says more
            raise refused[inside.index(parts[0])]
    elif origin is list and isinstance(content, list | tuple):
        for index, value in enumerate(content):
            check_shape(value, inside[0], where, f"{place}[{index}]")
        return
    elif origin is dict and isinstance(content, dict):
        for key, value in content.items():
            check_shape(key, inside[0], where, f"a key of {place}" if place else "a key")
            check_shape(value, inside[1], where, _below(place, key))
        return
    elif typing.is_typeddict(shape) and isinstance(content, dict):
        for key, expected in typing.get_type_hints(shape).items():
            if key in content:
                check_shape(content[key], expected, where, _below(place, key))
            elif key in shape.__required_keys__:
                raise InputError(f"{where}: there is no {_below(place, key)!r}, expected {_name(expected)}")
        return
    elif dataclasses.is_dataclass(shape) and isinstance(content, dict):
        hints = typing.get_type_hints(shape)
        for key, value in content.items():
            if key not in hints:
                raise InputError(f"{where}: unknown {_below(place, key)!r}, expected one of {', '.join(hints)}")
            check_shape(value, hints[key], where, _below(place, key))
        return
    elif isinstance(shape, type) and origin is None and not typing.is_typeddict(shape):
        right = (int, float) if shape is float else shape
        if isinstance(content, right) and (shape is bool or not isinstance(content, bool)):
            if isinstance(content, int | float) and not finite(content):
                raise InputError(f"{where}: {place or 'it'} is {shown(content)}, expected a finite number")
            return
    raise InputError(f"{where}: {place or 'it'} is {shown(content)}, expected {_name(shape)}")


def finite(number: float) -> bool:
    """Whether a number is finite as a float; an int may be too large for one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def shown(content: Any) -> str:
    """Content as messages show it, in about 60 characters. (Python refuses to print an int of thousands of digits.)"""
    if isinstance(content, int) and not finite(content):
        return "a whole number of more than 300 digits"
    found = repr(content)
    return found if len(found) <= 60 else f"{found[:60]}.."


def _below(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _name(shape: Any) -> str:
    """The name of a shape in messages."""
    origin, inside = typing.get_origin(shape), typing.get_args(shape)
    if shape is type(None):
        return "null"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_name, inside))
    if origin is list:
        return "a list"
    if origin is dict or typing.is_typeddict(shape) or dataclasses.is_dataclass(shape):
        return "an object"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(shape, "a value")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits. Raises InputError if the file can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({one_line(error)})") from error


# --- writing ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Writes content as JSON; the file is complete or as it was before. Raises as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to. At the end that file becomes `path` (or what `path` leads to,
    if it is a link); if the body of the `with` fails, it is removed.

    Raises InputError if the file can't be written there, OSError if the disk is full.
    """
    target = check_file(path)
    partial = target.with_name(f".partial-{os.getpid()}-{target.name}")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        message = f"{path}: can't be written ({one_line(error)})"
        if error.errno in _FULL:  # a full disk is not the user's input
            raise OSError(message) from error
        raise InputError(message) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def check_file(path: Path) -> Path:
    """The path where a file of this name really lies, whatever links lead there. Raises InputError for a folder or a
    device."""
    target = Path(os.path.realpath(path))  # unlike Path.resolve it never raises
    if not path.name or (os.path.exists(target) and not os.path.isfile(target)):
        raise InputError(f"{str(path)!r}: a folder or a device, expected the name of a file")
    return target


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written in a folder (`.partial-*`)."""
    for child in folder.glob(".partial-*"):
        _remove(child)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- folders ----------------------------------------------------------------------------------------------------------


def check_vacant(path: Path, otherwise: str = "name a new one") -> None:
    """Raises InputError if `path` is already there and not an empty folder (a lock file doesn't count). otherwise: what
    the message says to do."""
    if path.exists() and (not path.is_dir() or any(child.name != LOCK for child in path.iterdir())):
        raise InputError(f"{path}: already there and not an empty folder; {otherwise}")


def claim_folder(path: Path) -> None:
    """Makes a folder. Raises InputError if the folder is already there and not empty, or if it can't be made."""
    check_vacant(path)
    make_folder(path)


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, where there is none. Raises InputError if the folder can't be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: can't be created ({one_line(error)})") from error


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder to fill in the body of the `with`. If the body fails or is interrupted, what was put into the
    folder is removed, and so is the folder unless it was there before. Raises InputError for a folder that isn't
    empty."""
    there = path.is_dir()
    claim_folder(path)
    try:
        yield
    except BaseException:  # Ctrl-C too
        for child in path.iterdir():
            _remove(child)
        if not there:
            path.rmdir()
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process during the body of the `with`: a lock file in it keeps out everybody else who
    calls this.

    The folder is made, if need be, and then removed again if the body leaves nothing in it. Raises InputError if
    another process has the folder, or if the folder can't be made.
    """
    there = folder.is_dir()
    make_folder(folder)
    lock = folder / LOCK
    try:
        with _told(folder):
            lock.touch()
        with locked(lock):
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()  # while it is still locked: whoever opened it before sees that it is gone, and stops
    finally:
        if not there:
            with suppress(OSError):
                folder.rmdir()  # this fails, as it should, if something is in the folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a file during the body of the `with`. Raises InputError if somebody else holds it.

    It is a lock of POSIX: it ends with the process that took it, however that ends; child processes don't inherit it;
    and it holds on NFS, too. The process must not open and close the file elsewhere in the body, because that lets go
    of the lock. Where a file system has no locks, a warning says so and the body runs.
    """
    busy = InputError(f"{path.parent}: another process is writing to it, expected to be the only one")
    with _told(path.parent):
        file = path.open("rb+")
    with file:
        status = os.fstat(file.fileno())
        identity = status.st_dev, status.st_ino
        if identity in _LOCKED:
            raise busy
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise busy from error
            message = f"{path.parent}: can't be locked ({one_line(error)}), see to it that one process works in it"
            warnings.warn(message, stacklevel=4)
        if not path.exists() or not os.path.samestat(status, path.stat()):
            raise busy  # somebody held the lock until a moment ago, and has removed the file
        _LOCKED.add(identity)
        try:
            yield
        finally:
            _LOCKED.discard(identity)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Raises InputError, which names the folder, for a lock file that can't be made; OSError if the disk is full."""
    try:
        yield
    except OSError as error:
        message = f"{folder}: can't be written to ({one_line(error)})"
        raise (OSError if error.errno in _FULL else InputError)(message) from error


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; its type's name if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
