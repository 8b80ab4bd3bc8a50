"""Onlookers of a training: the progress bar, the tensorboard, a figure. An onlooker that fails does not end the
training."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..files import one_line


class Onlooker:
    """A thing that `make` makes and that is shown the training. If it fails (a full disk, a broken package, a terminal
    that is gone), one line on stderr says so, and it is not called again."""

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        self._it: Any = None
        self._it = self._tried(make)

    def __call__(self, show: Callable[[Any], Any]) -> None:
        """Call `show` with the thing that `make` made, unless the thing has failed before."""
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
    """Print a text to stderr. Nothing happens if stderr is closed or nobody reads it."""
    with suppress(OSError, ValueError):  # OSError: nobody reads the pipe; ValueError: the stream is closed
        print(text, file=sys.stderr)


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Inside the `with` a thread of the tensorboard that can't write prints no traceback. The next call of the
    tensorboard raises the same error, and its `Onlooker` tells it."""
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard"):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
