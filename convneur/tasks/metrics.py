"""What the tasks are called, and by which scores they are measured. Loads no PyTorch: tables of runs need it, too."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from convneur.config import Config
from convneur.data.errors import InputError


class Metric(NamedTuple):
    """A score that has a name.

    Attributes:
        name: such as "top1"; `eval/top1` in metrics.jsonl, "top1" in summary.json and BEST.
        title: the name as people write it, such as "top-1".
        kind: what it measures, such as "accuracy".
        better: whether a higher or a lower value is the better one.
        form: how people read it, a format such as ".2%".
    """

    name: str
    title: str
    kind: str
    better: Literal["higher", "lower"]
    form: str

    def rank(self, score: float) -> float:
        """A number that is the higher the better the score is."""
        return score if self.better == "higher" else -score


CLASSIFICATION = "classification"

METRICS: Mapping[str, Sequence[Metric]] = {
    CLASSIFICATION: (
        Metric("top1", "top-1", "accuracy", "higher", ".2%"),
        Metric("top5", "top-5", "accuracy", "higher", ".2%"),
        Metric("loss", "loss", "cross-entropy", "lower", ".4f"),
    ),
}
"""By the values of `task.name`: what an evaluation finds; the first decides which checkpoint is the best."""


def metrics_of(config: Config) -> Sequence[Metric]:
    """Those of a run's task; InputError where there is no such task."""
    if config.task.name not in METRICS:
        known = ", ".join(map(repr, METRICS))
        raise InputError(f"task.name is {config.task.name!r}, expected one of {known}")
    return METRICS[config.task.name]


def primary_metric(config: Config) -> Metric:
    """The metric that decides which checkpoint of a run is the best, and stands for it in tables."""
    return metrics_of(config)[0]
