"""How a run ended."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.records.folder import METRICS_FILE, SUMMARY_FILE
from convneur.records.json_files import read_object
from convneur.records.metrics import Metrics, read_metrics

REMEDY = "restore it, or delete it and train with --resume auto: the end of the run is made again"


@dataclass(frozen=True)
class Summary:
    """How a run ended; `summary.json` in its folder.

    Attributes:
        score: of the raw weights on the held-out images, by the task's first metric.
        score_ema: the same of the averaged weights; None where no average was kept.
        epochs: length of the run.
        images: training images seen, repetitions counted.
        seconds: time spent, evaluation and checkpoints included, over all starts of the run.
        checkpoint: folder of the last checkpoint.
        metric: name of the score.
    """

    score: float
    score_ema: float | None
    epochs: int
    images: int
    seconds: float
    checkpoint: str
    metric: str = "top1"

    @property
    def chosen(self) -> float:
        """The score that stands for the run: of the averaged weights where there are such."""
        return self.score if self.score_ema is None else self.score_ema


def write_summary(summary: Summary, folder: Path) -> None:
    """Writes a run's summary; its presence says that the run has ended."""
    names = _names(summary.metric)
    record = {names.get(name, name): value for name, value in asdict(summary).items()}
    if summary.metric == Summary.metric:  # as it was before there were other tasks
        del record["metric"]
    with atomic_write(folder / SUMMARY_FILE) as file:
        file.write(json.dumps(record, indent=2).encode())


def read_summary(folder: Path) -> Summary | None:
    """The summary of a finished run; None where the run has not ended. DamagedError where there is no telling."""
    path = folder / SUMMARY_FILE
    found = read_object(path)
    if found is None:
        return None
    names = _names(found.get("metric", Summary.metric))
    absent = [key for f in fields(Summary) if f.default is MISSING and (key := names.get(f.name, f.name)) not in found]
    if absent:
        raise DamagedError(f"{path}: has no {', '.join(absent)}; {REMEDY}")
    values = {}
    for name, hint in get_type_hints(Summary).items():
        key = names.get(name, name)
        if key not in found:
            continue
        values[name] = value = found[key]
        if not isinstance(float(value) if type(value) is int and hint is not int else value, hint):
            raise DamagedError(f"{path}: {key} is {value!r}; {REMEDY}")
    return Summary(**values)


def _names(metric: Any) -> dict[str, str]:
    """What the scores are called in the file."""
    return {"score": f"{metric}", "score_ema": f"{metric}_ema"}


def read_result(folder: Path) -> tuple[Summary, Metrics] | None:
    """The summary of a finished run, and the record of its last evaluation; None where the run has not ended.

    Raises DamagedError where its metrics don't reach the end that the summary tells of: what they hold is older.
    """
    summary = read_summary(folder)
    if summary is None:
        return None
    last = next(
        (record for record in reversed(read_metrics(folder)) if any(name.startswith("eval/") for name in record)), None
    )
    if last is None or not ends_as_told(summary, last["epoch"]):
        reached = "hold no evaluation" if last is None else f"end at epoch {last['epoch']:g}"
        raise DamagedError(f"{folder / METRICS_FILE}: {reached}, but {SUMMARY_FILE} tells of {summary.epochs} epochs")
    return summary, last


def ends_as_told(summary: Summary, epoch: float) -> bool:
    """Whether metrics up to an epoch are those of the whole run."""
    return abs(epoch - summary.epochs) < 1e-6
