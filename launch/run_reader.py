"""A run's files, for who looks at them again and again: each is read once, and then only where it has changed."""

import json
import math
import time
from calendar import timegm
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from convneur.config import Config, saved_config
from convneur.data.errors import DamagedError
from convneur.launch.supervisor.run_files import TIME_FORMAT
from convneur.records.folder import ATTEMPTS_FILE, CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from convneur.records.json_files import contents
from convneur.records.metrics import Metrics, parse_metrics
from convneur.records.summary import Summary, read_summary

Value = TypeVar("Value")
Stamp = tuple[int, int, int]


class RunReader:
    """Reads one run. Its methods raise DamagedError where a file doesn't hold what it should."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._config = _Unchanged(folder / CONFIG_FILE, saved_config)
        self._summary = _Unchanged(folder / SUMMARY_FILE, lambda path: read_summary(path.parent))
        self._attempts = _Unchanged(folder / ATTEMPTS_FILE, _read_attempts)
        self.metrics = MetricsReader(folder / METRICS_FILE)

    def config(self) -> Config:
        """What it is trained by."""
        return self._config.read()

    def summary(self) -> Summary | None:
        """How it has ended, if it has."""
        return self._summary.read()

    def attempts(self) -> list[dict[str, Any]]:
        """What the supervisor of its jobs has written; nothing outside of Slurm."""
        return self._attempts.read()


class MetricsReader:
    """Adds up a run's metrics as they grow.

    Attributes:
        step: of the last record; 0 before the first.
        epoch: of the last record.
        scores: of the last evaluation, by the names in metrics.jsonl; none before the first.
        rate: images a second, last reported; None before it is.
        step_seconds: time in the steps that the metrics have, for a batch of one image.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._clear()

    def _clear(self) -> None:
        self._size = self._lines = self.step = 0
        self._bad: list[str] = []
        self._timed = 0
        self.epoch = self.step_seconds = 0.0
        self.scores: dict[str, float] = {}
        self.rate: float | None = None

    def read(self) -> None:
        """Takes in what is new; all of a file that another one has replaced. DamagedError where a line is no record."""
        stamp = _stamp(self._path)
        if stamp is None or stamp != self._stamp:
            grown = stamp and self._stamp and stamp[0] == self._stamp[0] and stamp[1] > self._stamp[1]
            if not grown:
                self._clear()
            self._stamp = stamp
            parsed = parse_metrics(self._new(), self._lines)
            for record in parsed.records:
                self._add(record)
            self._lines += parsed.lines
            self._size += parsed.size
            self._bad += parsed.bad_lines
            self._bad_end = parsed.bad_end
        faults = [*self._bad, *([self._bad_end] if self._bad_end else [])]
        if faults:
            more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise DamagedError(f"{self._path}: {faults[0]}{more}")

    def _new(self) -> bytes:
        if not self._size:
            return contents(self._path) or b""
        try:
            with self._path.open("rb") as file:
                file.seek(self._size)
                return file.read()
        except OSError as error:
            raise DamagedError(f"{self._path}: can't be read ({error.strerror})") from error

    def _add(self, record: Metrics) -> None:
        self.step, self.epoch = record["step"], float(record["epoch"])
        rate = record.get("train/images_per_second")
        if rate is not None and 0 < rate < math.inf:
            self.rate = rate
            self.step_seconds += (self.step - self._timed) / rate
            self._timed = self.step
        scores = {name: value for name, value in record.items() if name.startswith("eval/") and value is not None}
        self.scores = scores or self.scores


class _Unchanged(Generic[Value]):
    """What a file holds, or what is wrong with it, read again only when it has changed."""

    def __init__(self, path: Path, read: Callable[[Path], Value]) -> None:
        self._path, self._read = path, read
        self._seen: tuple[Stamp | None, Value | DamagedError] | None = None

    def read(self) -> Value:
        stamp = _stamp(self._path)
        if self._seen is None or self._seen[0] != stamp:
            try:
                self._seen = stamp, self._read(self._path)
            except DamagedError as error:
                self._seen = stamp, error
        if isinstance(self._seen[1], DamagedError):
            raise self._seen[1]
        return self._seen[1]


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_attempts(path: Path) -> list[dict[str, Any]]:
    attempts = []
    for number, line in enumerate((contents(path) or b"").splitlines(), 1):
        try:
            record = json.loads(line)
            record["seconds"] = timegm(time.strptime(record["time"], TIME_FORMAT))
            record["job"], record["event"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(f"{path}: line {number} is no record of an attempt") from error
        attempts.append(record)
    return attempts
