"""What every room can raise: the exception for bad input, and another for a process that is gone."""


class InputError(Exception):
    """What the user gave can't be used.

    The message is one line that names the file, the key or the value, what was expected and what to do. The command
    line prints it without a traceback and exits with status 2.
    """


class SampleError(InputError):
    """One sample's bytes are damaged or not an image; the rest of the dataset may well be usable."""


class WorkerError(Exception):
    """A process that decodes images has ended before its time. Nobody's input is to blame."""
