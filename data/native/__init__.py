"""The input path in C++: from a JPEG's bytes to what the model sees, to the bits of the libraries that it replaces."""

import ctypes
import warnings
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
    compiled = SOURCES.load()
    return bind(compiled) if compiled else None


def bind(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """Tells a library's functions what they take."""
    number, pointer, file, size, stride = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_ssize_t,
    )
    compiled.convneur_jpeg_decode.argtypes = [file, size, *[number] * 5, pointer, stride]
    compiled.convneur_resize_part.argtypes = [pointer, stride, number * 4, *[number] * 11, pointer]
    compiled.convneur_resize_support.argtypes = [*[number] * 9, number * 4]
    compiled.convneur_resize_support.restype = None
    compiled.convneur_operate.argtypes = [pointer, number, number, pointer, number]
    compiled.convneur_show_jpeg.argtypes = [file, size, number, pointer, pointer, number, pointer]
    compiled.convneur_show_pixels.argtypes = [pointer, stride, pointer, pointer, number, pointer]
    compiled.tile_jpeg.argtypes = [file, ctypes.c_int64, number, pointer, ctypes.c_int64]
    compiled.tile_jpeg.restype = ctypes.c_int64
    return compiled


def lack() -> str:
    """Why there is no library, in a line; empty where there is one."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if library() is not None:
            return ""
    return str(said[0].message).partition(": ")[2] if said else "it could not be compiled before"
