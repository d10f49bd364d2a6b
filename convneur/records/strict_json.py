"""JSON that every program reads: it has no NaN and no infinity."""

import json
import math


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
