"""Runs that belong together: each an ordinary run, in a folder of its own below the series' folder."""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Generic, TypeVar

from convneur.config import Config, TaskConfig, saved_config
from convneur.data.errors import DamagedError, InputError
from convneur.models.convneur.config import ModelConfig
from convneur.records.folder import CONFIG_FILE
from convneur.records.summary import Summary, read_summary

Key = TypeVar("Key", bound=Hashable)


def check_task(config: Config) -> None:
    """Raises ValueError where the runs of a series wouldn't classify: what it compares them by is theirs alone."""
    if config.task.name != TaskConfig.name:
        raise ValueError(
            f"task.name is {config.task.name!r}, expected {TaskConfig.name!r}, which series compare runs by"
        )


def series_folder(config: Config) -> Path:
    """Where the runs of a series go, and what is made of them."""
    return Path(config.run.root) / config.run.name


def member(config: Config, name: str, seed: int, model: ModelConfig) -> Config:
    """The configuration of one run: the series' recipe, without what only the series needs."""
    recipe = {f.name: getattr(config, f.name) for f in fields(Config)}
    run = replace(config.run, root=str(series_folder(config)), name=name, seed=seed)
    return Config(**{**recipe, "run": run, "model": model})


def member_folder(run: Config) -> Path:
    """The folder of one of the runs."""
    return Path(run.run.root) / run.run.name


@dataclass(frozen=True)
class Standing(Generic[Key]):
    """How far the runs of a series are, by what is in their folders.

    Attributes:
        finished: how those have ended that have.
        missing: the others, begun or not.
        damaged: of those that nobody can tell it of, what is wrong. They are neither trained again nor counted.
    """

    finished: dict[Key, Summary]
    missing: dict[Key, Config]
    damaged: dict[Key, str]

    def damaged_lines(self) -> list[str]:
        """What there is to say of the damaged ones."""
        return [f"warning: left out, for it is damaged: {fault}" for fault in self.damaged.values()]


def standing(runs: Mapping[Key, Config], what: str) -> Standing[Key]:
    """Looks at all runs of a series; `what` calls it.

    Raises InputError where a run that is there already was made by another recipe.
    """
    finished, missing, damaged = {}, {}, {}
    for key, run in runs.items():
        saved = member_folder(run) / CONFIG_FILE
        try:
            made = saved_config(saved) if os.path.lexists(saved) else run
            summary = read_summary(saved.parent)
        except DamagedError as error:
            damaged[key] = str(error)
            continue
        if made != run:
            raise InputError(
                f"{saved} is not what this {what} would train there; give the {what} another --run.name, or delete"
                f" {saved.parent}"
            )
        if summary:
            finished[key] = summary
        else:
            missing[key] = run
    return Standing(finished, missing, damaged)
