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
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

from convneur.data.errors import InputError
from convneur.data.files import fsync
from convneur.launch.processes import is_alive, is_stopped, start_time

LOCK_FILE = ".lock"
BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0
TRIES = 100
"""How often the lock may change hands while it is asked for."""

Identity = dict[str, Any]


class Lock:
    """A lock that is held.

    Attributes:
        path: its file.
        token: tells it from all others.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path, self.token = path, str(identity["token"])
        self._identity = identity

    def share(self, writers: Sequence[int]) -> None:
        """Has the lock say that these processes write the run, too: their life is the lock's."""
        self._identity = self._identity | {"writers": [[pid, start_time(pid)] for pid in writers]}
        with suppress(OSError):
            self._restore()

    def beat(self) -> None:
        """Touches the lock; ends this process, and those it is shared with, where it is in other hands."""
        try:
            found = _read(self.path)
            if found and found.holder and found.holder["token"] != self.token:
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
            if found and found.holder and found.holder["token"] == self.token:
                self.path.unlink(missing_ok=True)

    def _restore(self) -> None:
        temporary = self.path.with_name(f"{LOCK_FILE}.{self.token}.tmp")
        try:
            _write(temporary, self._identity)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _give_up(self, holder: Identity) -> None:
        for pid, _ in self._identity.get("writers", []):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        taker = f"process {holder['pid']} on {holder['host']}"
        with suppress(OSError):
            print(f"convneur: error: {self.path.parent} was taken over by {taker}", file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Holds a run's folder against other processes.

    Raises:
        InputError: a living one holds it, or no lock can be read or made there.
    """
    path, mine = folder / LOCK_FILE, _identity()
    temporary = path.with_name(f"{LOCK_FILE}.{mine['token']}.tmp")
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
    if not found or not found.holder or found.holder["pid"] != os.getppid():
        return None
    return Lock(folder / LOCK_FILE, found.holder)


def _identity() -> Identity:
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "processes": str(Path("/proc/self/ns/pid").readlink()),  # process numbers mean something within it only
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "writers": [],
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _write(path: Path, identity: Identity) -> None:
    with path.open("w") as file:
        file.write(json.dumps(identity))
        file.flush()
        os.fsync(file.fileno())


class _Found(NamedTuple):
    """A lock: its bytes' hash, and who holds it, if it says so."""

    digest: str
    holder: Identity | None


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
    holder: Identity | None = None
    with suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict) and _is_identity(found):
            holder = {"job": None} | found
    return _Found(hashlib.sha256(content).hexdigest()[:16], holder)


def _is_identity(found: Identity) -> bool:
    token, writers = found.get("token"), found.get("writers", [])
    return (
        isinstance(token, str)
        and bool(re.fullmatch(r"\w{1,64}", token))
        and isinstance(found.get("host"), str)
        and isinstance(found.get("pid"), int)
        and isinstance(writers, list)
        and all(isinstance(w, list) and len(w) == 2 and isinstance(w[0], int) for w in writers)
    )


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
    alive = _is_alive(found.holder) if found.holder else None
    if found.holder and alive:
        raise InputError(_in_use(path, found.holder))
    if alive is None:
        _watch(path, found.holder)
    # Of all that come to this only one may replace this very holder's lock.
    claim = path.with_name(f"{LOCK_FILE}.{found.holder['token'] if found.holder else found.digest}.claimed")
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


def _watch(path: Path, holder: Identity | None) -> None:
    """Returns when a lock hasn't been touched for long enough; InputError as soon as it is."""
    print(f"convneur: {path.parent} is in use; waiting to see whether its user lives", file=sys.stderr, flush=True)
    first, deadline = _touched(path), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 5)
        if (now := _touched(path)) is None:
            return
        if now != first:
            raise InputError(_in_use(path, holder))


def _in_use(path: Path, holder: Identity | None) -> str:
    if holder is None:
        user = "a process that its lock doesn't name"
    else:
        ranks = ", ".join(str(pid) for pid, _ in holder.get("writers", []))
        job = f" of job {holder['job']}" if holder["job"] else ""
        user = f"process {holder['pid']}{f' and its ranks {ranks}' if ranks else ''}{job} on {holder['host']}"
        if _is_here(holder) and is_stopped(holder["pid"]):
            user += f", which is stopped (kill -CONT {holder['pid']} lets it go on)"
    return f"{path.parent} is in use by {user}: wait for its end, or name another run (--run.name)"


def _is_here(holder: Identity) -> bool:
    """Whether this process can see those that hold a lock."""
    mine = _identity()
    return (holder.get("boot"), holder.get("processes")) == (mine["boot"], mine["processes"])


def _is_alive(holder: Identity) -> bool | None:
    """Whether any process that holds a lock lives; None where that can't be seen from here."""
    if not _is_here(holder):
        return None
    processes = [(holder["pid"], holder.get("start")), *holder.get("writers", [])]
    return any(is_alive(pid, start) for pid, start in processes)


def _touched(path: Path) -> int | None:
    try:
        with path.open() as file:  # opening makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(lock: Lock, ended: Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        lock.beat()
