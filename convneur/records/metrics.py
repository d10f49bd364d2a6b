"""The records in a run's metrics.jsonl, read back: the one way to them, for all that list, fit, draw or resume runs."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from convneur.data.errors import DamagedError
from convneur.records.folder import METRICS_FILE
from convneur.records.json_files import contents

Metrics = dict[str, Any]


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
