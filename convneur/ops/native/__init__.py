"""This folder's C++; where it can't be compiled, PyTorch's operations compute the same, but for rounding."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from convneur.data.compiled import Sources

FOLDER = Path(__file__).parent
SOURCES = Sources(
    name="native",
    files=[FOLDER / name for name in ("memory.cpp", "block.cpp")],
    headers=[FOLDER / name for name in ("vectors.h", "depthwise.h")],
    flags=("-O3", "-fno-math-errno", "-march=native", "-fopenmp"),
    loss="models will be slower on this CPU, the neural memory up to three times",
)

_unused: ContextVar[bool] = ContextVar("unused", default=False)


@contextmanager
def unused() -> Iterator[None]:
    """A block that does without, so that nothing is compiled, as on a login node for a single pass."""
    token = _unused.set(True)
    try:
        yield
    finally:
        _unused.reset(token)


def library() -> ctypes.CDLL | None:
    """The compiled sources; None, after a warning, where they can't be had."""
    return None if _unused.get() else _library()


@cache
def _library() -> ctypes.CDLL | None:
    return SOURCES.load()
