"""Which checkpoints of a run are kept: the newest, some for good, and the one with the best score."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convneur.data.files import atomic_write
from convneur.records.folder import BEST


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        newest: how many of the newest.
        periods: those whose step one of these numbers divides are kept for good.
        best: whether the one with the best score is kept.
    """

    newest: int
    periods: tuple[int, ...] = ()
    best: bool = False

    def for_good(self, step: int) -> bool:
        """Whether the checkpoint of a step is never removed."""
        return any(step % period == 0 for period in self.periods)

    def obsolete(self, steps: Sequence[int], current: int, best: int | None) -> list[int]:
        """Which of the checkpoints to remove once that of step `current` has been written.

        That one is never among them, for it alone is known to be intact. Those of later steps are: the run was resumed
        from before them, so they are damaged, or of a course that it has left.
        """
        newest = sorted((step for step in steps if step <= current), reverse=True)[: self.newest]
        kept = {current, *newest, best if self.best else None}
        return [step for step in steps if step > current or (step not in kept and not self.for_good(step))]


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far; checkpoints remember it, and `BEST` in their folder says it to people.

    Attributes:
        step: optimizer steps made by then.
        score: on the held-out images.
        weights: whose score it was.
        metric: name of the score.
    """

    step: int
    score: float
    weights: Literal["raw", "averaged"]
    metric: str = "top1"

    def record(self) -> dict[str, Any]:
        """What is written of it, such as {"step": 6, "top1": 0.7, "weights": "raw"}."""
        return {"step": self.step, self.metric: self.score, "weights": self.weights}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Best":
        """What `record` has made. ValueError or KeyError where it is none."""
        (metric,) = record.keys() - {"step", "weights"}
        return cls(record["step"], record[metric], record["weights"], metric)

    def write(self, folder: Path) -> None:
        """Writes it into a folder of checkpoints."""
        with atomic_write(folder / BEST) as file:
            file.write(json.dumps(self.record()).encode())
