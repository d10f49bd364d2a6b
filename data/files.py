"""Files that are either whole or absent."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from convneur.data.errors import DamagedError

TEMPORARY = ".*.tmp"
"""Pattern of the names that unfinished files go by."""


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that takes its place, on disk, once the block ends without an exception.

    With an exception, or if the machine stops, `path` stays as it was.

    Yields:
        The file, open for writing bytes.

    Raises:
        OSError: the folder doesn't exist, can't be written to, or is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Makes a file's bytes durable, or the names in a folder: what was created, renamed or removed there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_kind(path: Path) -> None:
    """Raises DamagedError where reading would wait, as of a pipe, or never end, as of a device; OSError without one."""
    kind = path.stat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a folder is an error anyhow
        raise DamagedError(f"{path}: is no ordinary file")
