"""What is written by one process at a time, and read back of the shape that it was written in."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
from typing import Any, TypedDict

import pytest

from sfg_fast.errors import InputError
from sfg_fast.files import alone_in, check_shape, check_vacant, locked, read_json, read_text

from ..processes import launch


class Part(TypedDict):
    name: str
    values: list[float | None]


@dataclasses.dataclass
class Options:
    size: int = 1
    part: dict[str, bool] | None = None


@pytest.mark.parametrize(
    ("content", "shape"),
    [
        ({"name": "a", "values": [1, 2.5, None], "more": 3}, Part),
        ({"a": {"name": "", "values": []}}, dict[str, Part]),
        ({"size": 3, "part": {"x": True}}, Options),
        ({"part": None}, Options),
        ((1, 2), list[int]),
        ([object], Any),
    ],
)
def test_what_has_the_shape(content, shape):
    check_shape(content, shape, "f")


@pytest.mark.parametrize(
    ("content", "shape", "said"),
    [
        ([], Part, "f: it is [], expected an object"),
        ({"name": "a"}, Part, "f: there is no 'values', expected a list"),
        ({"name": 3, "values": []}, Part, "f: name is 3, expected text"),
        ({"name": "a", "values": [0, "x"]}, Part, "f: values[1] is 'x', expected a number or null"),
        ([{"name": "a", "values": {}}], list[Part], "f: [0].values is {}, expected a list"),
        ({"size": True}, Options, "f: size is True, expected a whole number"),
        ({"size": 1.5}, Options, "f: size is 1.5, expected a whole number"),
        ({"part": {"x": 1}}, Options, "f: part.x is 1, expected true or false"),
        ({"colour": 1}, Options, "f: unknown 'colour', expected one of size, part"),
        ({1: 2}, dict[str, int], "f: a key is 1, expected text"),
        ("x" * 100, int, f"f: it is '{'x' * 59}.., expected a whole number"),
        (None, list[int], "f: it is None, expected a list"),
    ],
)
def test_what_has_another_shape(content, shape, said):
    with pytest.raises(InputError) as error:
        check_shape(content, shape, "f")
    assert str(error.value) == said


def test_a_file_is_named_with_what_is_wrong_in_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [{"b": 1, "c": 2, "b": 3}]}')
    with pytest.raises(InputError, match=r"a\.json: the key 'b' is there twice, expected once"):
        read_json(path)
    path.write_text(json.dumps({"name": 1}))
    with pytest.raises(InputError, match=r"a\.json: name is 1, expected text"):
        read_json(path, Part)
    path.write_bytes(b"\xfc")
    with pytest.raises(InputError, match=r"a\.json: not text in UTF-8"):
        read_text(path)
    with pytest.raises(InputError, match="b: no such file"):
        read_text(tmp_path / "b")


# --- one process at a time --------------------------------------------------------------------------------------------


def try_to_lock(folder):
    with alone_in(folder):
        (folder / "taken").touch()


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    with alone_in(tmp_path / "new"):
        check_vacant(tmp_path / "new")
        assert launch(try_to_lock, tmp_path / "new") == [1]
        with pytest.raises(InputError, match="new: another process is writing to it"), alone_in(tmp_path / "new"):
            pass  # nor for another thread of this one
        assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    assert not (tmp_path / "new").exists()  # nothing is in it
    assert launch(try_to_lock, tmp_path / "new") == [0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["taken"]


def killed_with_a_child(folder, pipe):
    """The child, as one that reads slices, outlives its parent until the pipe is opened."""
    with alone_in(folder):
        if os.fork() == 0:
            pipe.read_text()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lock_goes_with_the_process_whatever_its_children_do(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert launch(killed_with_a_child, tmp_path / "run", tmp_path / "pipe") == [-signal.SIGKILL]
    try:
        assert (tmp_path / "run" / ".lock").exists()
        try_to_lock(tmp_path / "run")
    finally:
        (tmp_path / "pipe").write_text("the child may go")


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unknown)
    with pytest.warns(UserWarning, match=r"can't be locked .*No locks available"), alone_in(tmp_path):
        pass


def test_a_lock_file_that_somebody_removed_is_no_lock(tmp_path, monkeypatch):
    """Between opening it and locking it: who had it before is just done."""
    path, lock = tmp_path / "file", fcntl.lockf
    path.touch()

    def late(file, how):
        path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with pytest.raises(InputError, match="another process is writing to it"), locked(path):
        pass
