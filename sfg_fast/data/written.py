"""Folders of arrays: each appears when it is complete, and is known by a hash of all that its arrays depend on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import one_line, read_json, sha256_of, write_json


def complete(folder: Path, source: str, keys: set[str], arrays: set[str]) -> dict[str, Any] | None:
    """The entry of a folder if the folder is there, undamaged and of this very source; else None.

    source: the hash of all that the arrays depend on. keys: those that the entry must have. arrays: the names of the
    arrays that must be there.
    """
    try:
        entry = read_json(folder / "case.json")
        sums = entry["checksums"]
        known = entry["source"] == source and set(entry) == keys and set(sums) == {f"{name}.npy" for name in arrays}
        if known and all(sha256_of(folder / name) == found for name, found in sums.items()):
            return entry
    except (InputError, AttributeError, KeyError, TypeError):
        pass
    return None


def write(
    folder: Path, arrays: Mapping[str, np.ndarray], entry: dict[str, Any], source: str, manifest: Path
) -> dict[str, Any]:
    """Writes arrays and their entry to a folder; returns the entry, with `source` and checksums in it.

    A folder of that name, damaged or of an earlier version of the files, is removed, and before it the manifest, which
    would speak of it. Raises OSError if the folder can't be written.
    """
    partial = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    try:
        partial.mkdir()
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        sums = {f"{name}.npy": sha256_of(partial / f"{name}.npy") for name in arrays}
        entry = {**entry, "source": source, "checksums": sums}
        write_json(partial / "case.json", entry)
        if folder.exists():
            manifest.unlink(missing_ok=True)
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise OSError(f"{folder}: can't be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return entry
