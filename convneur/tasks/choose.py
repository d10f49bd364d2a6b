"""The tasks that a run can be trained for."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from convneur.config import Config
from convneur.data.errors import InputError
from convneur.tasks.classification import Classification
from convneur.tasks.task import Metric, Task


class TaskKind(Protocol):
    """What builds a task; its metrics are known before."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """Those of the tasks that it builds."""

    def __call__(self, config: Config, device: torch.device) -> Task:
        """Builds the task of a run on a device."""


TASKS: Mapping[str, TaskKind] = {"classification": Classification}
"""By the values of `task.name`."""


def build_task(config: Config, device: torch.device) -> Task:
    """The task of a run, with its data prepared on a device."""
    return _kind(config)(config, device)


def primary_metric(config: Config) -> Metric:
    """The metric that decides which checkpoint of a run is the best, and stands for it in tables."""
    return _kind(config).metrics[0]


def check_task(config: Config) -> None:
    """Raises InputError where there is no such task."""
    _kind(config)


def _kind(config: Config) -> TaskKind:
    kind = TASKS.get(config.task.name)
    if kind is None:
        raise InputError(f"task.name is {config.task.name!r}, expected one of {', '.join(map(repr, TASKS))}")
    return kind
