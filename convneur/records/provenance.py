"""What a run was made with, `reproduce.json` in its folder, and in what this machine and this checkout differ from it.

With all of it the same, and `run.determinism` strict, a run repeats itself to the bit.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from convneur.config import Config, config_text, load_config
from convneur.data.compiled import compiler_version
from convneur.data.config import DataConfig
from convneur.data.errors import DamagedError, InputError
from convneur.data.files import atomic_write
from convneur.records.folder import CONFIG_FILE, REPRODUCE_FILE
from convneur.records.json_files import read_object

LONGEST_VALUE = 60  # characters of a value that a line of differences shows
PACKAGE = Path(__file__).parents[1]
CODE = (".py", ".cpp", ".h")
BULK = (".tar", ".beton")  # what the index has a checksum of for each sample

Record = dict[str, Any]


def record(config: Config, world_size: int) -> Record:
    """Everything that a run's bits depend on. Reads the data's index and all of the code; asks git."""
    return {
        "config": config_text(config),
        "code": _code(),
        "packages": _packages(),
        "python": platform.python_version(),
        "compiler": compiler_version(),
        "data": {"index": index_hash(config.data)},
        "hardware": _hardware(world_size),
    }


def write_record(folder: Path, made_with: Record) -> None:
    """Writes reproduce.json."""
    with atomic_write(folder / REPRODUCE_FILE) as file:
        file.write(json.dumps(made_with, indent=2, sort_keys=True).encode())


def read_record(folder: Path) -> Record:
    """Reads a run's reproduce.json; InputError where there is none, or it is damaged."""
    path = folder / REPRODUCE_FILE
    made_with = read_object(path)
    if made_with is None:
        raise InputError(f"{path}: can't be read (No such file or directory), expected the folder of a run")
    try:
        whole = "run:" in made_with["config"] and isinstance(made_with["code"], dict)
        whole = whole and isinstance(made_with["hardware"]["world_size"], int)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedError(f"{path}: is no record of what a run was made with; restore it")
    return made_with


def recorded_config(made_with: Record, overrides: Iterable[str] = ()) -> Config:
    """The configuration that a run was started with; the overrides win."""
    with TemporaryDirectory(prefix="convneur-config-") as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(made_with["config"])
        return load_config([path], overrides)


def differences(then: Record, now: Record) -> list[str]:
    """In what two records differ, one line each. A run's name and place may differ."""
    return list(_compare(_without_name(then), _without_name(now), ""))


def _without_name(made_with: Record) -> Record:
    try:
        config = yaml.safe_load(made_with["config"])
        run = config["run"].items()
    except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise DamagedError(f"{REPRODUCE_FILE}: holds no configuration; restore it") from error
    config["run"] = {key: value for key, value in run if key not in ("name", "root")}
    return made_with | {"config": config}


def _compare(then: Any, now: Any, where: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _compare(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif then != now:
        yield f"{where}: {_short(then)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = "nothing" if value in (None, "") else " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text)} characters)"


def index_hash(config: DataConfig) -> str:
    """SHA-256 over the names and bytes of a dataset's files but the samples themselves."""
    digest = hashlib.sha256()
    for path in sorted(Path(config.root).iterdir()):
        if path.is_file() and path.suffix not in BULK:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _code() -> Record:
    """The commit that the code is of, what was changed since, and a hash of the code that runs."""
    digest = hashlib.sha256()
    for name, path in sorted(_sources().items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD"), "sha256": digest.hexdigest()}


def _sources() -> dict[str, Path]:
    """Every file of code of the project, however deep, by the name that it is installed under."""
    files: dict[str, Path] = {}
    for package in ("convneur", "convneur.data", "convneur.launch"):
        spec = find_spec(package)
        for folder in map(Path, (spec.submodule_search_locations if spec else None) or ()):
            found = (path for path in folder.rglob("*") if path.suffix in CODE)
            files |= {f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}": path for path in found}
    return files


def _packages() -> dict[str, str]:
    """Versions of what is installed, in places that this environment takes over from another, too.

    Not all of sys.path, to which setuptools adds what it carries along. Of two versions the first is imported.
    """
    places = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    found = (package.metadata for package in reversed([*metadata.distributions(path=places)]))
    return {about["Name"]: about["Version"] for about in found}  # a package's own `version` would read it once more


def _git(*words: str) -> str | None:
    """What git says of the checkout that the code is in; None where it is in none."""
    command = ["git", "-C", str(PACKAGE), *words]
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(world_size: int) -> Record:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": model[1] if model else platform.machine(),
        "gpus": ", ".join(sorted({f"{gpus.count(name)} x {name}" for name in gpus})),
        "cuda": torch.version.cuda,
        "world_size": world_size,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
