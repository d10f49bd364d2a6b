"""One writer a run: a lock on its folder that does not outlive its holder, on shared file systems, too.

File locks of the kernel don't hold on every cluster's file system, and clocks of nodes differ. So the lock is a file,
made by exactly one process, that names all who write the run. They touch it every `BEAT_SECONDS`.

Whether a holder lives can be seen where its processes can: it then keeps others out, also while it is stopped, and
once all of it has ended it needs no waiting. Elsewhere, and where the file says nothing, who finds it watches it by a
clock of its own: untouched for `DEAD_SECONDS`, it is taken over. A holder that comes back after all finds the lock in
other hands and ends at once.
"""

import errno
import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from convneur.data.errors import InputError
from convneur.data.files import fsync
from convneur.launch.holder import Holder
from convneur.records.folder import LOCK_FILE

BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0
TRIES = 100
"""How often the lock may change hands while it is asked for."""


class Lock:
    """A lock that is held.

    Attributes:
        path: its file.
        holder: what the file says.
    """

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder

    def share(self, writers: Sequence[int]) -> None:
        """Has the lock say that these processes write the run, too: their life is the lock's."""
        self.holder = self.holder.with_writers(writers)
        with suppress(OSError):
            self._restore()

    def beat(self) -> None:
        """Touches the lock; ends this process, and those it is shared with, where it is in other hands."""
        try:
            found = _read(self.path)
            if found and found.holder and found.holder.token != self.holder.token:
                self._give_up(found.holder)
            if found is None or found.holder is None:  # somebody has removed or emptied it
                self._restore()
            os.utime(self.path)
        except (OSError, InputError):
            return  # the storage is away for now

    def release(self) -> None:
        """Removes it."""
        with suppress(OSError, InputError):
            found = _read(self.path)
            if found and found.holder and found.holder.token == self.holder.token:
                self.path.unlink(missing_ok=True)

    def _restore(self) -> None:
        temporary = self.path.with_name(f"{LOCK_FILE}.{self.holder.token}.tmp")
        try:
            _write(temporary, self.holder)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _give_up(self, taker: Holder) -> None:
        for pid, _ in self.holder.writers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        by = f"process {taker.pid} on {taker.host}"
        with suppress(OSError):
            print(f"convneur: error: {self.path.parent} was taken over by {by}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Holds a run's folder against other processes.

    Raises:
        InputError: a living one holds it, or no lock can be read or made there.
    """
    path, mine = folder / LOCK_FILE, Holder.this_process()
    temporary = path.with_name(f"{LOCK_FILE}.{mine.token}.tmp")
    try:
        _write(temporary, mine)
        _take(path, temporary)
        fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(
            f"{folder} can't be written to ({error.strerror}): run as the user it belongs to, or name another run"
            " (--run.name)"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    lock, ended = Lock(path, mine), Event()
    beating = Thread(target=_beat, args=(lock, ended), daemon=True)
    beating.start()
    try:
        yield lock
    finally:
        ended.set()
        beating.join()
        lock.release()


def held_lock(folder: Path) -> Lock | None:
    """The lock that this process's launcher holds on a folder, for the ranks to keep alive beside it."""
    found = _read(folder / LOCK_FILE)
    if not found or not found.holder or found.holder.pid != os.getppid():
        return None
    return Lock(folder / LOCK_FILE, found.holder)


def _write(path: Path, holder: Holder) -> None:
    with path.open("w") as file:
        file.write(holder.as_json())
        file.flush()
        os.fsync(file.fileno())


class _Found(NamedTuple):
    """A lock: its bytes' hash, and who holds it, if it says so."""

    digest: str
    holder: Holder | None


def _read(path: Path) -> _Found | None:
    """The lock in a folder, None where there is none; InputError where there is something that can't be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise InputError(f"{path} is a link to nowhere, expected a file; remove it") from None
    except (PermissionError, IsADirectoryError) as error:
        raise InputError(
            f"{path} can't be read ({error.strerror}), so it can't be told whether {path.parent} is in use; remove it"
            " if nobody uses it, or name another run (--run.name)"
        ) from error
    return _Found(hashlib.sha256(content).hexdigest()[:16], Holder.parse(content))


def _take(path: Path, temporary: Path) -> None:
    """Makes the lock, whole from the first moment on, or takes it from the dead; InputError where that can't be."""
    for _ in range(TRIES):
        try:
            os.link(temporary, path)  # fails if it exists, on NFS as well
            return
        except FileExistsError:
            pass
        if _take_over(path, temporary):
            return
        time.sleep(BEAT_SECONDS / 100)
    raise InputError(f"{path} changes hands again and again; remove it if nobody uses {path.parent}")


def _take_over(path: Path, temporary: Path) -> bool:
    """Replaces the lock of a holder that is dead; InputError for one that lives; False where it is no longer his."""
    found = _read(path)
    if found is None:
        return False
    alive = found.holder.is_alive() if found.holder else None
    if found.holder and alive:
        raise InputError(_in_use(path, found.holder))
    if alive is None:
        _watch(path, found.holder)
    # Of all that come to this only one may replace this very holder's lock.
    claim = path.with_name(f"{LOCK_FILE}.{found.holder.token if found.holder else found.digest}.claimed")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(DEAD_SECONDS / 10)
        if _read(path) == found:  # who has claimed it died in the middle
            claim.unlink(missing_ok=True)
        return False
    try:
        if _read(path) != found:
            return False
        temporary.replace(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _watch(path: Path, holder: Holder | None) -> None:
    """Returns when a lock hasn't been touched for long enough; InputError as soon as it is."""
    print(f"convneur: {path.parent} is in use; waiting to see whether its user lives", file=sys.stderr, flush=True)
    first, deadline = _touched(path), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 5)
        if (now := _touched(path)) is None:
            return
        if now != first:
            raise InputError(_in_use(path, holder))


def _in_use(path: Path, holder: Holder | None) -> str:
    user = holder or "a process that its lock doesn't name"
    return f"{path.parent} is in use by {user}: wait for its end, or name another run (--run.name)"


def _touched(path: Path) -> int | None:
    try:
        with path.open() as file:  # opening makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(lock: Lock, ended: Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        lock.beat()
