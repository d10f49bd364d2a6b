"""Noticing a run that hangs: a rank that makes no step for too long shows where it is, and ends."""

import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Self

from convneur.monitoring.config import WatchdogConfig
from convneur.monitoring.deaf import END

EXIT_STATUS = 75
"""Of a rank that its watchdog has ended: try again."""

OTHERS_SECONDS = 3.0  # the others' watchdogs bark at about the same time, and the first to end takes them along
DEAF_SECONDS = 15.0
TICK_SECONDS = 0.5


class Watchdog:
    """Ends this process when its time is up, after writing all threads' Python stacks to stderr, and to a file of the
    folder `stacks` if it is told one.

    A thread does it. Should the main thread hang in a call that lets no other Python code run, a process beside this
    one (deaf.py) does it a little later, to stderr alone. Only time in which this process could run counts: one
    that was stopped, with the whole run or a laptop's lid, goes on.
    """

    def __init__(self, config: WatchdogConfig, stacks: Path | None, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._path = stacks / f"rank-{rank}.txt" if stacks else None
        self._ended = Event()
        self._left = 0.0

    def __enter__(self) -> Self:
        """Starts to watch."""
        if self._config.seconds:
            self._allow(self._config.long_seconds)
            self._was_enabled = faulthandler.is_enabled()
            faulthandler.enable()  # shows the stacks at ABRT
            command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("deaf.py")), str(os.getpid())]
            reader, self._beside = os.pipe()
            subprocess.run([*command, str(DEAF_SECONDS)], stdin=reader, check=True)  # it goes on by itself
            os.close(reader)
            self._thread = Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends watching."""
        if self._config.seconds:
            self._ended.set()
            self._thread.join()
            self._tell(END)
            os.close(self._beside)
            if not self._was_enabled:
                faulthandler.disable()

    def step(self) -> None:
        """Says that a step was made."""
        self._allow(self._config.seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Allows a block the long time."""
        self._allow(self._config.long_seconds)
        yield
        self._allow(self._config.seconds)

    def _allow(self, seconds: float) -> None:
        self._left = seconds

    def _watch(self) -> None:
        last = time.monotonic()
        while self._left > 0:
            self._tell(f"{self._left:.1f}")
            if self._ended.wait(min(TICK_SECONDS, self._left)):
                return
            now = time.monotonic()
            self._left -= min(now - last, 2 * TICK_SECONDS)  # more than that was no time to run in
            last = now
        self._bark()

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # somebody may have killed it
            os.write(self._beside, f"{line}\n".encode())

    def _bark(self) -> None:
        try:
            print(f"convneur: error: rank {self._rank}: no step for too long; its stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)
            if self._path is None:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), file=file, flush=True)
                faulthandler.dump_traceback(file)
        finally:
            time.sleep(OTHERS_SECONDS)
            os._exit(EXIT_STATUS)
