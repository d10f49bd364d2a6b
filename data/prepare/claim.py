"""Folders that datasets are prepared in: what may be written there, and by one process at a time.

A lock of the kernel's holds the folder, which ends with its holder: a killed process leaves at most an empty file. File
systems without such locks are written to all the same.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convneur.data.errors import InputError
from convneur.data.files import TEMPORARY, atomic_write
from convneur.data.format.manifest import MANIFEST, UNFINISHED, Manifest, read_source

LOCK = ".lock"
PATIENCE_SECONDS = 10.0
"""How long the end of another holder is waited for: a killed one's processes end within seconds."""

_NO_LOCKS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def claimed(folder: Path, source: str, plan: str = "", *, shared: bool = False) -> Iterator[bool]:
    """Holds `folder` for a dataset prepared from `source`; `Manifest.write` ends what this begins.

    A claim that fails leaves no folder behind that it has made.

    Args:
        folder: where the dataset goes.
        source: what it is prepared from, a subcommand of `convneur prepare`.
        plan: identifies what exactly will be written, so that a later call goes on with nothing else.
        shared: whether other processes may be writing to the folder; what an interrupted one left then stays.

    Yields:
        False if the folder holds a complete dataset of `source`; True if it is to be written, or to be continued:
        shards that have their final names are whole.

    Raises:
        InputError: the folder holds something else, or another process is preparing a dataset there.
    """
    if folder.exists() and not folder.is_dir():
        raise _other(folder, source)
    with discarded_on_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with folder_locked(folder, shared=shared):
            yield _claim(folder, source, plan, shared)


@contextmanager
def folder_locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock of an existing `folder`, alone or together with other `shared` holders.

    Raises:
        InputError: another process holds it, and goes on so.
    """
    patience = time.monotonic() + PATIENCE_SECONDS
    while (descriptor := _try_lock(folder / LOCK, shared)) is None:
        if time.monotonic() > patience:
            raise InputError(f"another process is preparing {folder}: wait until it has ended, and run this again")
        time.sleep(0.05)
    try:
        yield
    finally:
        if descriptor >= 0:
            with suppress(OSError):  # other shared holders remain: the last one removes the file
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (folder / LOCK).unlink()
            os.close(descriptor)


def _try_lock(path: Path, shared: bool) -> int | None:
    """Descriptor of the locked file; None where it is held; -1 where no file can be locked."""
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:  # else its holder has just removed it
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        if descriptor >= 0:
            os.close(descriptor)
        return -1
    if descriptor >= 0:
        os.close(descriptor)
    return None


@contextmanager
def discarded_on_failure(folder: Path) -> Iterator[None]:
    """Removes, if the block fails, the folders that it has made, and what `claimed` puts there, but nothing else."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    begun = bool(missing) or not any(folder.iterdir())
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if begun and {path.name for path in folder.iterdir()} == {UNFINISHED}:
                (folder / UNFINISHED).unlink()
            for path in missing:
                path.rmdir()
        raise


def _other(folder: Path, source: str) -> InputError:
    return InputError(f"{folder} holds something else than a dataset of {source}: give --out a new or an empty folder")


def _claim(folder: Path, source: str, plan: str, shared: bool) -> bool:
    if (folder / MANIFEST).exists():
        if read_source(folder) != source:
            raise _other(folder, source)
        Manifest.read(folder, unfinished=True)
        return False
    mark = f"{source} {plan}".strip()
    marker = folder / UNFINISHED
    names = [path for path in folder.iterdir() if path.name != LOCK and not path.match(TEMPORARY)]
    if marker in names:
        found = marker.read_bytes().decode(errors="replace") if marker.is_file() else ""
        if found.partition(" ")[0] != source:
            raise _other(folder, source)
        if found != mark:
            raise InputError(
                f"{folder} holds the beginnings of a dataset of {source} from other images or with other options: "
                "repeat the command that began it, or give --out another folder"
            )
    elif names:
        raise _other(folder, source)
    if not shared:
        for leftover in folder.glob(TEMPORARY):
            leftover.unlink()
    if marker not in names:
        with atomic_write(marker) as file:
            file.write(mark.encode())
    return True
