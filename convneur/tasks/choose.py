"""The tasks that a run can be trained for."""

from collections.abc import Callable, Mapping

import torch

from convneur.config import Config
from convneur.tasks.classification import Classification
from convneur.tasks.metrics import metrics_of
from convneur.tasks.task import Task

TASKS: Mapping[str, Callable[[Config, torch.device], Task]] = {"classification": Classification}
"""By the values of `task.name`, as in `METRICS`."""


def build_task(config: Config, device: torch.device) -> Task:
    """The task of a run, with its targets prepared on a device. InputError where there is no such task."""
    metrics_of(config)
    return TASKS[config.task.name](config, device)
