"""The one exception for bad input; it lives in the lowest room so that every room can raise it."""


class InputError(Exception):
    """What the user gave can't be used.

    The message is one line that names the file, the key or the value, what was expected and what to do. The command
    line prints it without a traceback and exits with status 2.
    """


class SampleError(InputError):
    """One sample's bytes are damaged or not an image; the rest of the dataset may well be usable."""
