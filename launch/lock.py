"""One writer a run: a lock on its folder that does not outlive its holder, on shared file systems, too.

File locks of the kernel don't hold on every cluster's file system, and clocks of nodes differ. So the lock is a file,
made by exactly one process, that its holder touches every `BEAT_SECONDS`. Who finds it watches it by a clock of its
own: untouched for `DEAD_SECONDS`, it is taken over. A holder of this machine that has ended, or one of the same Slurm
job, which starts its ranks only after the former ones, needs no waiting. A holder that comes back after all, such as
one that had been stopped, finds the lock in other hands and ends at once.
"""

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

from convneur.data.errors import InputError

LOCK_FILE = ".lock"
BEAT_SECONDS = 5.0
DEAD_SECONDS = 30.0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder against other processes. InputError where a living one holds it."""
    path, mine = folder / LOCK_FILE, _identity()
    temporary = path.with_name(f"{LOCK_FILE}.{mine['token']}.tmp")
    try:
        temporary.write_text(json.dumps(mine))
        while not _create(path, temporary) and not _take_over(path, temporary, mine):
            pass
    finally:
        temporary.unlink(missing_ok=True)
    ended = Event()
    beating = Thread(target=_beat, args=(path, mine, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _identity() -> dict[str, Any]:
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        "processes": str(Path("/proc/self/ns/pid").readlink()),  # process numbers mean something within it only
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _create(path: Path, temporary: Path) -> bool:
    """Makes the lock, whole from the first moment on; False where there is one."""
    try:
        os.link(temporary, path)  # fails if it exists, on NFS as well
    except FileExistsError:
        return False
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _take_over(path: Path, temporary: Path, mine: dict[str, Any]) -> bool:
    """Replaces the lock of a holder that is dead; InputError for one that lives; False where it is no longer his."""
    holder = _read(path)
    if holder is None:
        return False
    if not _is_known_dead(holder, mine):
        _watch(path, holder)
    # Of all that come to this only one may replace this very holder's lock.
    claim = path.with_name(f"{LOCK_FILE}.{holder['token']}.claimed")
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        time.sleep(DEAD_SECONDS / 10)
        if _read(path) == holder:  # who has claimed it died in the middle
            claim.unlink(missing_ok=True)
        return False
    try:
        if _read(path) != holder:
            return False
        temporary.replace(path)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _watch(path: Path, holder: dict[str, Any]) -> None:
    """Returns when a lock hasn't been touched for long enough; InputError as soon as it is."""
    print(f"convneur: {path.parent} is in use; waiting to see whether its user lives", file=sys.stderr, flush=True)
    first, deadline = _touched(path), time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 5)
        if (now := _touched(path)) is None:
            return
        if now != first:
            user = f"job {holder['job']}" if holder["job"] else f"process {holder['pid']}"
            raise InputError(
                f"{path.parent} is in use by {user} on {holder['host']}: wait for its end, or name another run"
                " (--run.name)"
            )


def _is_known_dead(holder: dict[str, Any], mine: dict[str, Any]) -> bool:
    if holder["job"] and holder["job"] == mine["job"]:
        return True
    if (holder["host"], holder["processes"]) != (mine["host"], mine["processes"]):
        return False
    return not Path(f"/proc/{holder['pid']}").exists()


def _touched(path: Path) -> int | None:
    try:
        with path.open() as file:  # opening makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(path: Path, mine: dict[str, Any], ended: Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        holder = _read(path)
        if holder and holder["token"] != mine["token"]:
            taker = f"process {holder['pid']} on {holder['host']}"
            print(f"convneur: error: {path.parent} was taken over by {taker}", file=sys.stderr, flush=True)
            os._exit(1)
        with suppress(OSError):
            os.utime(path)
