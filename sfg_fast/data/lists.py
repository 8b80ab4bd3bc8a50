"""The rows of a list of cases, .csv or .json, and what the list may say beside its rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json, shown
from .targets import check_target_name

Row = tuple[str, dict[str, Any]]
"""The place where a row stands, for messages, and the row's values by column."""
ENTRIES = ("labels", "channel_names", "targets", "cases")  # the entries that a JSON list may have if it is an object


def csv_rows(path: Path) -> tuple[Iterator[Row], dict[str, Any]]:
    """The rows of a .csv, which are read as they are asked for, and an empty dict, because a .csv says nothing besides.
    The rows raise InputError for a file that isn't readable as CSV."""
    return _csv_rows(path), {}


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            columns = [column.strip() for column in next(reader, [])]
            if len(set(columns)) != len(columns):
                raise InputError(f"{path}: a column is there twice in {', '.join(columns)}")
            for values in reader:
                if not values:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(values) != len(columns):
                    raise InputError(f"{where}: {len(values)} values for {len(columns)} columns")
                yield where, dict(zip(columns, map(str.strip, values), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV ({error})") from error


def json_rows(path: Path) -> tuple[Iterator[Row], dict[str, Any]]:
    """The rows of a .json, and the whole object that they stand in, if it is one. Raises InputError for any other
    content, and for unknown entries of the object."""
    content = read_json(path)
    meta = content if isinstance(content, dict) else {"cases": content}
    rows = meta.get("cases")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f'{path}: expected a list of rows {{"case": .., "mr": ..}} or {{"labels": .., "cases": [..]}}')
    unknown = sorted(meta.keys() - set(ENTRIES))
    if unknown:
        raise InputError(f"{path}: unknown entry {unknown[0]!r}, expected {', '.join(ENTRIES)}")
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1)), meta


def check_each_has_a_split(rows: Sequence[Row]) -> None:
    """Raises InputError if some rows say their split and others don't: these might belong to any split."""
    without = [where for where, row in rows if row.get("split") in ("", None)]
    if without and len(without) < len(rows):
        raise no_split(without[0])


def no_split(where: str) -> InputError:
    """The error for a row without a split, at the place `where`, among rows that have one."""
    return InputError(f"{where}: no split, but other rows have one; expected one in every row, or in none")


def outside(where: str, column: str, value: str) -> InputError:
    """The error for a row, at the place `where`, that names a file outside the list's folder."""
    return InputError(f"{where}: {column} {value} is outside the list's folder; allow_outside=True permits it")


def check_text(value: Any, where: str, column: str) -> str:
    """Returns the text of a cell. Raises InputError if it is no text, has spaces around it, or holds a zero byte, which
    no path can."""
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"{where}: {column} is {value!r}, expected text")
    if value != value.strip():
        raise InputError(f"{where}: {column} is {value!r}, expected no spaces around it")
    return value


def declared(content: Any, path: Path, names: str) -> dict[str, dict[str, Any]]:
    """Checks the "targets" that the file `path` declares, and returns them: {name: {"unit": .., names: ..}}.

    names: the key beside "unit" that a target may have, "labels" or "classes". The caller has to check the value of
    that key. Raises InputError for anything else.
    """
    if not isinstance(content, dict):
        raise InputError(f"{path}: targets are {shown(content)}, expected an object, {{name: {{..}}}}")
    for name, about in content.items():
        check_target_name(name, f"{path}: targets")
        where, expected = f"{path}: target {name!r}", f'{{}} or {{"unit": ".."}} or {{"{names}": ..}}'
        if not isinstance(about, dict) or about.keys() - {"unit", names}:
            raise InputError(f"{where} is {shown(about)}, expected {expected}")
        unit = about.get("unit", "")
        if not isinstance(unit, str) or not unit.isprintable() or unit != unit.strip() or len(unit) > 32:
            raise InputError(f"{where}: unit {shown(unit)}, expected a short text, such as HU or years")
    return content
