"""How a run ended."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.records.folder import METRICS_FILE, SUMMARY_FILE
from convneur.records.saved import Metrics, read_metrics, read_object

REMEDY = "restore it, or delete it and train with --resume auto: the end of the run is made again"


@dataclass(frozen=True)
class Summary:
    """How a run ended; `summary.json` in its folder.

    Attributes:
        top1: fraction of held-out images classified rightly by the raw weights.
        top1_ema: the same by the averaged weights; None where no average was kept.
        epochs: length of the run.
        images: training images seen, repetitions counted.
        seconds: time spent, evaluation and checkpoints included, over all starts of the run.
        checkpoint: folder of the last checkpoint.
    """

    top1: float
    top1_ema: float | None
    epochs: int
    images: int
    seconds: float
    checkpoint: str

    @property
    def final_top1(self) -> float:
        """Of the averaged weights where an average was kept, else of the raw ones: those that one takes of a run."""
        return self.top1 if self.top1_ema is None else self.top1_ema


def write_summary(summary: Summary, folder: Path) -> None:
    """Writes a run's summary; its presence says that the run has ended."""
    with atomic_write(folder / SUMMARY_FILE) as file:
        file.write(json.dumps(asdict(summary), indent=2).encode())


def read_summary(folder: Path) -> Summary | None:
    """The summary of a finished run; None where the run has not ended. DamagedError where there is no telling."""
    path = folder / SUMMARY_FILE
    found = read_object(path)
    if found is None:
        return None
    absent = [f.name for f in fields(Summary) if f.default is MISSING and f.name not in found]
    if absent:
        raise DamagedError(f"{path}: has no {', '.join(absent)}; {REMEDY}")
    hints = get_type_hints(Summary)
    for name, hint in hints.items():
        value = found.get(name)
        if name in found and not isinstance(float(value) if type(value) is int and hint is not int else value, hint):
            raise DamagedError(f"{path}: {name} is {value!r}; {REMEDY}")
    return Summary(**{name: value for name, value in found.items() if name in hints})


def read_result(folder: Path) -> tuple[Summary, Metrics] | None:
    """The summary of a finished run, and the record of its last evaluation; None where the run has not ended.

    Raises DamagedError where its metrics don't reach the end that the summary tells of: what they hold is older.
    """
    summary = read_summary(folder)
    if summary is None:
        return None
    last = next((record for record in reversed(read_metrics(folder)) if "eval/loss" in record), None)
    if last is None or not ends_as_told(summary, last["epoch"]):
        reached = "hold no evaluation" if last is None else f"end at epoch {last['epoch']:g}"
        raise DamagedError(f"{folder / METRICS_FILE}: {reached}, but {SUMMARY_FILE} tells of {summary.epochs} epochs")
    return summary, last


def ends_as_told(summary: Summary, epoch: float) -> bool:
    """Whether metrics up to an epoch are those of the whole run."""
    return abs(epoch - summary.epochs) < 1e-6
