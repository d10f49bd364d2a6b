"""What every room can raise: the exception for bad input, its kinds, and another for a process that is gone."""

import errno

OUTAGE_STATUS = 74  # EX_IOERR of sysexits.h
"""Exit status where storage or a server doesn't answer: the same command may well do, later."""

# Of file systems. Servers' errors are many more, and `convneur.data.stores.retry` knows that it has asked one.
_OUTAGES = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EREMOTEIO, errno.ENOLINK,
    errno.ECOMM, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENXIO, errno.ENODEV,
}  # fmt: skip


class InputError(Exception):
    """What the user gave can't be used.

    The message is one line that names the file, the key or the value, what was expected and what to do. The command
    line prints it without a traceback and exits with status 2.
    """


class SampleError(InputError):
    """One sample's bytes are damaged or not an image; the rest of the dataset may well be usable."""


class DamagedError(InputError):
    """A saved file is there, but doesn't hold what it should."""


class WorkerError(Exception):
    """A process that decodes images has ended before its time. Nobody's input is to blame."""


class StorageError(InputError):
    """What holds the input doesn't answer, though nothing need be wrong with what the user gave.

    The command line exits with status `OUTAGE_STATUS`; on Slurm the ranks are started again until it does answer.
    """


def is_outage(error: BaseException) -> bool:
    """Whether an exception, or what it was raised for, says that storage or a server doesn't answer."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StorageError) or (isinstance(cause, OSError) and cause.errno in _OUTAGES):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
