"""How a run ended."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from convneur.data.files import atomic_write

SUMMARY_FILE = "summary.json"


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


def write_summary(summary: Summary, folder: Path) -> None:
    """Writes a run's summary; its presence says that the run has ended."""
    with atomic_write(folder / SUMMARY_FILE) as file:
        file.write(json.dumps(asdict(summary), indent=2).encode())


def read_summary(folder: Path) -> Summary | None:
    """The summary of a finished run; None where the run has not ended."""
    path = folder / SUMMARY_FILE
    return Summary(**json.loads(path.read_text())) if path.is_file() else None
