"""The exceptions that end a command: bad input (exit code 2), and a request to stop (exit code 143)."""


class InputError(ValueError):
    """Something the user gave (a file, a folder, a value) can't be used.

    The message is one sentence that names the file or argument, the value found and what was expected. It stays on one
    line, whatever the value is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\r", "\\r").replace("\n", "\\n"))


class Preempted(BaseException):
    """SIGTERM came, as a cluster sends it, and everything is saved. Like KeyboardInterrupt it may be raised at any
    moment. So it is no Exception: code that catches exceptions of its own must not catch it, too."""
