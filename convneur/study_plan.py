"""What a study will cost: the plans of all its runs, added up, and kept beside the study for its report."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from convneur.config import Config
from convneur.data.files import atomic_write
from convneur.plan import Cluster, Plan, Range, make_plan
from convneur.study import Place

STUDY_PLAN_FILE = "plan.json"


def plan_study(
    runs: Mapping[Place, Config], cluster: Cluster, advance: Callable[[int], None] = lambda _: None
) -> dict[Place, Plan]:
    """The plan of every run on the cluster; `advance` is called with 1 after each. InputError where one can't run."""
    plans = {}
    for place, config in runs.items():
        plans[place] = make_plan(config, cluster)
        advance(1)
    return plans


def total(spans: list[Range]) -> Range:
    """Their sum."""
    return Range(sum(span.low for span in spans), sum(span.high for span in spans))


def save_study_plan(plans: Mapping[Place, Plan], folder: Path) -> Path:
    """Writes the GPU hours of every run, by its name."""
    path = folder / STUDY_PLAN_FILE
    hours = {place.name: asdict(plan.gpu_hours) for place, plan in plans.items()}
    with atomic_write(path) as file:
        file.write(json.dumps({"gpu": next(iter(plans.values())).gpu, "gpu_hours": hours}, indent=2).encode())
    return path


def read_study_plan(folder: Path) -> dict[str, Range]:
    """What `save_study_plan` wrote; nothing where it hasn't."""
    path = folder / STUDY_PLAN_FILE
    if not path.is_file():
        return {}
    return {name: Range(**hours) for name, hours in json.loads(path.read_bytes())["gpu_hours"].items()}
