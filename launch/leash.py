"""Ties a rank to its launcher: they stop, go on and end together, whatever ends or stops the launcher."""

import os
import signal
import time
from threading import Thread
from typing import TYPE_CHECKING

from convneur.launch.processes import is_stopped
from convneur.launch.signals import STOPPING

if TYPE_CHECKING:
    from convneur.launch.lock import Lock

LAUNCHER = "CONVNEUR_LAUNCHER"
"""The environment variable that names a rank's launcher."""

CHECK_SECONDS = 0.5


class Leash:
    """Watches the launcher from a thread of the rank.

    A launcher that is gone can't pass on what it is told, and its rank stops as it does at TERM: with a checkpoint.
    Until then the rank keeps the lock, which says that it writes.
    """

    def __init__(self, launcher: int) -> None:
        self._launcher = launcher
        self._lock: Lock | None = None
        Thread(target=self._watch, daemon=True).start()

    def keep(self, lock: "Lock | None") -> None:
        """Has the rank touch a lock as well, so that it is held as long as the rank writes."""
        self._lock = lock

    def _watch(self) -> None:
        from convneur.launch.lock import BEAT_SECONDS

        told, beaten = False, time.monotonic()
        while True:
            if os.getppid() != self._launcher:
                if self._lock:
                    self._lock.beat()  # ends this process if another has the run
                if not told:
                    os.kill(os.getpid(), signal.SIGTERM)
                told = True
            elif is_stopped(self._launcher):
                os.kill(os.getpid(), signal.SIGSTOP)  # until the launcher wakes it
            if self._lock and time.monotonic() - beaten >= BEAT_SECONDS:
                self._lock.beat()
                beaten = time.monotonic()
            time.sleep(CHECK_SECONDS)


_leash: Leash | None = None


def tie() -> None:
    """Ties this process to its launcher, if it was started by one."""
    global _leash
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        return
    _leash = Leash(int(launcher))
    for number in STOPPING:
        if number != signal.SIGHUP:  # nohup has it ignored
            signal.signal(number, signal.SIG_DFL)  # until it trains it has nothing to save, and ends at once


def keep(lock: "Lock | None") -> None:
    """Has the leash, if there is one, keep a lock alive."""
    if _leash:
        _leash.keep(lock)
