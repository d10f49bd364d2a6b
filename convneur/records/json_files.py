"""JSON files of runs: written so that every program reads them, without NaN and infinity, and read back.

A file is whole, absent, or damaged: cut by a full disk, zeroed by a power failure, changed by hand, unreadable.
What is damaged is said, as DamagedError, and never passes for something else.
"""

import json
import math
from pathlib import Path
from typing import Any

from convneur.data.errors import DamagedError
from convneur.data.files import check_kind


def json_text(value: object, indent: int | None = None) -> str:
    """Like `json.dumps`, but a number that isn't finite is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def contents(path: Path) -> bytes | None:
    """A file's bytes; None where there is no such file. DamagedError where it can't be read."""
    try:
        check_kind(path)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedError(f"{path}: can't be read ({error.strerror})") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is no such file. DamagedError where it holds none."""
    data = contents(path)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is no valid JSON ({error}); restore it") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path}: holds no JSON object; restore it")
    return found
