"""What a core decodes and augments in a second: measured here by `convneur bench data`, or else elsewhere."""

import json
import os
import platform
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from convneur.data.config import DataConfig
from convneur.data.errors import DamagedError
from convneur.data.files import atomic_write
from convneur.records.json_files import read_object

# Images a second that a core decodes and augments: docs/data.md, with RandAugment and without.
PER_CORE = {True: 500, False: 600}


@dataclass(frozen=True)
class Rate:
    """A measurement.

    Attributes:
        per_core: images a second and core.
        cpu: what the processor calls itself.
        made: the day.
        root: of the dataset.
        recipe: the settings that it depends on.
    """

    per_core: float
    cpu: str
    made: str
    root: str
    recipe: dict[str, Any]


def rates_file() -> Path:
    """Where measurements lie: of one user, for all datasets and machines that share the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convneur" / "input-rates.json"


def record_rate(data: DataConfig, per_core: float) -> Rate:
    """Writes down what was measured, in the place of an older measurement of the same on such a processor."""
    rate = Rate(round(per_core, 1), cpu_name(), date.today().isoformat(), data.root, _recipe(data))
    others = [one for one in _recorded() if (one.cpu, one.recipe) != (rate.cpu, rate.recipe)]
    rates_file().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(rates_file()) as file:
        file.write(json.dumps({"rates": [asdict(one) for one in (*others, rate)]}, indent=2).encode())
    return rate


def images_per_core(data: DataConfig) -> tuple[float, str]:
    """What a core decodes and augments in a second with these settings, and how that is known, in a line.

    Of several measurements, one on a processor as this machine's counts first, then the newest.
    """
    made = [rate for rate in _recorded() if rate.recipe == _recipe(data)]
    if made:
        best = max(made, key=lambda rate: (rate.cpu == cpu_name(), rate.made))
        measured = f"as measured on {best.cpu}, {best.made}, of {best.root}"
        return best.per_core, f"a core decodes {best.per_core:.0f} images a second, {measured}"
    rate = PER_CORE[bool(data.augment.randaugment)]
    return rate, (
        f"a core decodes {rate} images a second, as one of docs/data.md does; convneur bench data {data.root}, with"
        " this configuration, measures one of yours"
    )


def cpu_name() -> str:
    """What the processor of this machine calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _recipe(data: DataConfig) -> dict[str, Any]:
    return {
        "engine": data.engine,
        "image_size": data.image_size,
        "interpolation": data.interpolation,
        "randaugment": data.augment.randaugment,
        "color_jitter": data.augment.color_jitter,
        "scale": list(data.augment.scale),
        "repeats": data.repeats,
    }


def _recorded() -> list[Rate]:
    """What was measured; nothing where that can't be read, as it is only measured again."""
    try:
        rates = (read_object(rates_file()) or {}).get("rates")
    except DamagedError:
        return []
    names = {field.name for field in fields(Rate)}
    return [Rate(**one) for one in rates if isinstance(one, dict) and one.keys() == names] if rates else []
