"""The input path in C++: from a JPEG's bytes to what the model sees, to the bits of the libraries that it replaces."""

import ctypes
from functools import cache
from pathlib import Path

from convneur.data.compiled import Sources

FOLDER = Path(__file__).parent
SOURCES = Sources(
    name="input",
    files=sorted(FOLDER.glob("*.cpp")),
    headers=sorted(FOLDER.glob("*.h")),
    # Pillow's and timm's arithmetic in doubles is compiled without fused multiply-adds.
    flags=("-O3", "-march=native", "-ffp-contract=off"),
    loss="images are decoded and augmented several times slower",
)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled sources; None, after a warning, where they can't be had."""
    return SOURCES.load()
