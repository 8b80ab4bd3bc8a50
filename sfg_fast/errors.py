"""The one exception for bad input: the command line prints it as a single line and exits with 2."""


class InputError(ValueError):
    """Something the user gave (a file, a folder, a value) can't be used.

    The message is one sentence that names the file or argument, the value found and what was expected.
    """
