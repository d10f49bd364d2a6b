"""Runs that belong together: each an ordinary run, in a folder of its own below the series' folder."""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from convneur.config import Config, load_config
from convneur.data.errors import InputError
from convneur.model import ModelConfig


def series_folder(config: Config) -> Path:
    """Where the runs of a series go, and what is made of them."""
    return Path(config.run.root) / config.run.name


def member(config: Config, name: str, seed: int, model: ModelConfig) -> Config:
    """The configuration of one run: the series' recipe, without what only the series needs."""
    recipe = {f.name: getattr(config, f.name) for f in fields(Config)}
    run = replace(config.run, root=str(series_folder(config)), name=name, seed=seed)
    return Config(**{**recipe, "run": run, "model": model})


def run_folder(run: Config) -> Path:
    """The folder of one of the runs."""
    return Path(run.run.root) / run.run.name


def check_saved_runs(runs: Iterable[Config], what: str) -> None:
    """Raises InputError where a run that is there already was made by another recipe. `what` calls the series."""
    for run in runs:
        folder = run_folder(run)
        saved = folder / "config.yaml"
        if saved.is_file() and load_config([saved]) != run:
            raise InputError(
                f"{saved} is not what this {what} would train there; give the {what} another --run.name, or delete"
                f" {folder}"
            )
