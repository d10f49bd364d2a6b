"""What a study will cost: the plans of all its runs, added up, and kept beside the study for its report."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from convneur.config import Config
from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.planning.forecast import Cluster, Plan, Range, make_plan
from convneur.records.json_files import read_object
from convneur.studies.grid import Place

STUDY_PLAN_FILE = "plan.json"


def plan_study(
    runs: Mapping[Place, Config], cluster: Cluster, advance: Callable[[int], None] = lambda _: None
) -> dict[Place, Plan]:
    """The plan of every run on the cluster; `advance` is called with 1 after each. InputError where one can't run.

    Runs that differ in nothing that a plan depends on share one.
    """
    plans, made = {}, {}
    for place, config in runs.items():
        run, optimizer = replace(config.run, name="", root="", seed=0), replace(config.optimizer, lr=1.0)
        key = repr(replace(config, run=run, optimizer=optimizer))  # a configuration has mappings and can't be hashed
        if key not in made:
            made[key] = make_plan(config, cluster)
        plans[place] = made[key]
        advance(1)
    return plans


def said_once(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Lines, each with what it is about: of those that differ in their numbers alone, the first, and what else has it.

    Such as "n1: 8 workers, but 103 are needed (likewise n2, n3)".
    """
    alike: dict[str, list[tuple[str, str]]] = {}
    for about, line in dict.fromkeys(lines):
        alike.setdefault(re.sub(r"\d[\d.,]*", "0", line), []).append((about, line))
    for (about, line), *others in alike.values():
        names = ", ".join(dict.fromkeys(other for other, _ in others if other != about))
        more = f" (likewise {names or f'{len(others)} others'})" if others else ""
        yield f"{f'{about}: ' if about else ''}{line}{more}"


def save_study_plan(plans: Mapping[Place, Plan], folder: Path) -> Path:
    """Writes the GPU hours of every run, by its name."""
    path = folder / STUDY_PLAN_FILE
    hours = {place.name: asdict(plan.gpu_hours) for place, plan in plans.items()}
    with atomic_write(path) as file:
        file.write(json.dumps({"gpu": next(iter(plans.values())).gpu, "gpu_hours": hours}, indent=2).encode())
    return path


def read_study_plan(folder: Path) -> dict[str, Range]:
    """What `save_study_plan` wrote; nothing where it hasn't. DamagedError where it can't be read."""
    path = folder / STUDY_PLAN_FILE
    found = read_object(path)
    if found is None:
        return {}
    try:
        return {name: Range(float(hours["low"]), float(hours["high"])) for name, hours in found["gpu_hours"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{path}: holds no GPU hours; `convneur study run --plan` writes it anew") from error
