"""Noticing a run that hangs: a rank that makes no step for too long shows where it is, and ends."""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Self

EXIT_STATUS = 75
"""Of a rank that its watchdog has ended: try again."""

STACKS = "stacks"
OTHERS_SECONDS = 3.0  # the others' watchdogs bark at about the same time, and the first to end takes them along
DEAF_SECONDS = 15.0


@dataclass(frozen=True)
class WatchdogConfig:
    """When a run counts as hanging.

    Attributes:
        seconds: most seconds from one step to the next; 0 for no watchdog.
        long_seconds: the same for what takes its time: start and first step with their compilers, evaluation,
            checkpoints.
    """

    seconds: float = 180.0
    long_seconds: float = 1800.0


class Watchdog:
    """Ends this process when its time is up, after writing all threads' Python stacks to a file and to stderr.

    A thread does it. Should the main thread hang in a call that lets no other Python code run, the C thread of
    `faulthandler` does it a little later, to stderr alone.
    """

    def __init__(self, config: WatchdogConfig, folder: Path, rank: int) -> None:
        self._config = config
        self._rank = rank
        self._path = folder / STACKS / f"rank-{rank}.txt"
        self._ended = Event()

    def __enter__(self) -> Self:
        """Starts to watch."""
        if self._config.seconds:
            self._allow(self._config.long_seconds)
            self._thread = Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends watching."""
        if self._config.seconds:
            faulthandler.cancel_dump_traceback_later()
            self._ended.set()
            self._thread.join()

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
        if self._config.seconds:
            self._deadline = time.monotonic() + seconds
            faulthandler.dump_traceback_later(seconds + DEAF_SECONDS, exit=True)

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        print(f"convneur: error: rank {self._rank}: no step for too long; its stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), file=file, flush=True)
                faulthandler.dump_traceback(file)
        finally:
            time.sleep(OTHERS_SECONDS)
            os._exit(EXIT_STATUS)
