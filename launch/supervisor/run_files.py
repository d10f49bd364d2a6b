"""What a run's folder says of its jobs: checkpoints, attempts, and how ranks ended that failed."""

from __future__ import annotations

import json
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

BAD_INPUT = 2
STORAGE = 74  # convneur.data.errors.StorageError
HANG = 75  # convneur.monitoring.watchdog
ATTEMPTS_FILE = "attempts.jsonl"
SUMMARY_FILE = "summary.json"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

Record = dict[str, Any]


class Fault(NamedTuple):
    """How the rank ended that failed first: its node and why, its exit status, and the exception if it left word."""

    rank: int
    node: str
    status: int
    reason: str
    exception: str | None

    @property
    def is_bad_input(self) -> bool:
        """Whether the rank itself says so. Interpreters and shells end with 2, too, where a file can't be read."""
        return self.status == BAD_INPUT and self.exception == "InputError"


def newest_checkpoint(folder: Path) -> int | None:
    """The step of the newest committed checkpoint; 0 where there is none, None where the storage doesn't say."""
    try:
        found = [path for path in (folder / "checkpoints").iterdir() if re.fullmatch(r"step-[0-9]{8}", path.name)]
        return max((int(path.name[len("step-") :]) for path in found if (path / "manifest.json").exists()), default=0)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError:
        return None


def read_attempts(folder: Path) -> list[Record]:
    """The history of a run; a line that a full disk has cut short, or anything else has damaged, is left out."""
    try:
        lines = (folder / ATTEMPTS_FILE).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"event", "job"} <= record.keys():
                found.append(record)
    return found


def faults_of(folder: Path) -> list[Fault]:
    """How ranks ended that failed and could leave word, the first to fail first."""
    found = []
    for path in folder.glob("rank-*.ended"):
        with suppress(OSError, ValueError):  # it was written on a full disk
            seconds, number, name = path.read_text().split()
            rank, status = int(path.stem[len("rank-") :]), int(number)
            found.append((float(seconds), Fault(rank, name, status, *_reason(folder, rank, status))))
    return [fault for _, fault in sorted(found)]


def _reason(folder: Path, rank: int, status: int) -> tuple[str, str | None]:
    """Why a rank ended: in words, and the exception's name where torch's error handler left word of one."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # "InputError: what is wrong"
        exception, _, reason = json.loads((folder / f"rank-{rank}.json").read_text())["message"]["message"].partition(
            ": "
        )
        return reason, exception
    if status == HANG:
        return "no step for too long; the ranks' stacks are in the folder stacks", None
    with suppress(ValueError):
        return f"killed by {signal.Signals(status - 128).name}", None
    return f"exit status {status}; its traceback is above", None
