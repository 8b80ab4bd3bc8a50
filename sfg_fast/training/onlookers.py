"""What only looks on at a training: the progress bar, the tensorboard, a figure. None of them can end it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..files import one_line


class Onlooker:
    """Something that `make` makes, to be shown things. The first time that it fails (a full disk, a broken package, a
    terminal that is gone) is told in one line; from then on it is left alone."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self._it: Any = None
        self._it = self._tried(make)

    def __call__(self, show: Callable[[Any], Any]) -> None:
        """show(what `make` made), unless it has failed before."""
        if self._it is not None:
            self._tried(lambda: show(self._it))

    def _tried(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MemoryError:
            raise
        except Exception as error:
            self._it = None
            tell(f"{self.name} failed ({type(error).__name__}: {one_line(error)[:200]}); training goes on without it")
            return None


def tell(text: str) -> None:
    """Print to stderr, if somebody is there to read it."""
    with suppress(OSError, ValueError):  # a pipe that nobody reads; a stream that is closed
        print(text, file=sys.stderr)


@contextmanager
def quiet_writers() -> Iterator[None]:
    """A thread of the tensorboard that can't write prints no traceback: the next call raises the same, and is told."""
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
