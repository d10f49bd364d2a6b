"""What a run has left in its folder, read back: the one way to it, for all that list, fit, draw or resume runs.

A file is whole, absent, or damaged: cut by a full disk, zeroed by a power failure, changed by hand, unreadable.
What is damaged is said, as DamagedError, and never passes for something else.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from convneur.data.errors import DamagedError
from convneur.data.files import check_kind
from convneur.records.folder import METRICS_FILE

Metrics = dict[str, Any]


def contents(path: Path) -> bytes | None:
    """A file's bytes; None where there is no such file. DamagedError where it can't be read."""
    try:
        check_kind(path)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedError(f"{path}: can't be read ({error.strerror})") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no such file. DamagedError where it holds none."""
    data = contents(path)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is no valid JSON ({error}); restore it") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path}: holds no JSON object; restore it")
    return found


def read_metrics(folder: Path) -> list[Metrics]:
    """The records of a run in order of step; none where it has no metrics.jsonl yet.

    A last line without its end is what a run is just writing, or a kill has cut short, and is left out. Raises
    DamagedError where anything else is no record.
    """
    records, faults = salvage_metrics(folder)
    if faults:
        raise DamagedError(faults[0] + (f", and {len(faults) - 1} more" if len(faults) > 1 else ""))
    return records


def salvage_metrics(folder: Path) -> tuple[list[Metrics], list[str]]:
    """The records that are intact, and a line for each that is not. DamagedError where the file can't be read."""
    path = folder / METRICS_FILE
    parsed = parse_metrics(contents(path) or b"")
    return parsed.records, [f"{path}: {fault}" for fault in parsed.faults]


class Parsed(NamedTuple):
    """What lines of a metrics.jsonl hold.

    Attributes:
        records: those that are intact.
        lines: how many lines are whole.
        size: bytes of those.
        bad_lines: what is wrong with the others of them.
        bad_end: what is wrong with what follows them, if it isn't the beginning of a record.
    """

    records: list[Metrics]
    lines: int
    size: int
    bad_lines: list[str]
    bad_end: str | None

    @property
    def faults(self) -> list[str]:
        """All that is wrong."""
        return [*self.bad_lines, *([self.bad_end] if self.bad_end else [])]


def or_nan(value: float | None) -> float:
    """What was measured; NaN where it was no finite number, which is null in a record."""
    return math.nan if value is None else value


def parse_metrics(data: bytes, before: int = 0) -> Parsed:
    """Reads the lines that follow the first `before` ones of a metrics.jsonl."""
    *lines, rest = data.split(b"\n")
    records, faults, bad_end = [], [], None
    for number, line in enumerate(lines, before + 1):
        try:
            records.append(_record(line))
        except (ValueError, RecursionError) as error:
            faults.append(f"line {number} is no record of metrics ({error})")
    if rest and not (rest.startswith(b"{") and rest.isascii() and rest.decode().isprintable()):
        bad_end = f"line {before + len(lines) + 1} is no record of metrics, nor the beginning of one"
    return Parsed(records, len(lines), len(data) - len(rest), faults, bad_end)


def _record(line: bytes) -> Metrics:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    step, epoch = record.get("step"), record.get("epoch")
    if type(step) is not int or step < 0 or not isinstance(epoch, int | float) or not 0 <= epoch < math.inf:
        raise ValueError("no step and epoch")
    for name, value in record.items():
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is no number")
    return record
