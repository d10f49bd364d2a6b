"""Standard output and error that can say anything, and that a run doesn't end with."""

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

ESCAPED = "convneur.escaped"
"""How a character is written that the output's encoding hasn't: a name's odd bytes as they are, others in escapes."""


class LastingOutput(io.TextIOWrapper):
    """Standard output for training: what can't be written is lost, whether the disk is full or nobody reads any more.

    It is tried again every time: a full disk gets room.
    """

    def __init__(self, stream: TextIO) -> None:
        file = io.FileIO(stream.fileno(), "w", closefd=False)  # no buffer: it would keep what can't be written
        super().__init__(file, encoding=stream.encoding, errors=ESCAPED, write_through=True)

    def write(self, text: str) -> int:
        """Writes what can be written."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Does nothing that can fail."""
        with suppress(OSError):
            super().flush()


def escape_output() -> None:
    """Has what the standard streams can't encode written in escapes; opens those that were closed on nothing.

    Else the next file that is opened would get what libraries print.
    """
    codecs.register_error(ESCAPED, _escape)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for the process's whole life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


def outlast_output() -> None:
    """Has this process go on when its standard output or error can't be written to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not a test's
            with suppress(OSError):
                stream.flush()
            setattr(sys, name, LastingOutput(stream))


def close_output(quiet: bool = False) -> int:
    """Flushes what has been printed; if that fails, says so, unless nobody reads it, and returns 1, else 0."""
    try:
        sys.stdout.flush()
    except OSError as error:
        quiet = quiet or isinstance(error, BrokenPipeError)
        with suppress(OSError):  # what remains in its buffer must not fail again at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not quiet:
            with suppress(OSError):
                print(f"convneur: error: standard output can't be written to: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)
