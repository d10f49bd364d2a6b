"""Resizing of pixels in C++, to the bits of the libraries that it replaces, where those are the ones it was made after.

Pixels are RGB, (height, width, 3) uint8; rows may lie apart, a row's pixels may not.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from convneur.data import native

Filter = Literal["bilinear", "bicubic", "area"]
"""How is resized: as Pillow does, antialiased, or as OpenCV does with INTER_AREA."""

FILTERS: dict[Filter, int] = {"bilinear": 0, "bicubic": 1, "area": 2}
RESAMPLINGS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize(
    pixels: np.ndarray,
    height: int,
    width: int,
    how: Filter,
    window: Box | None = None,
    flips: tuple[bool, bool] = (False, False),
    out: np.ndarray | None = None,
    *,
    part: tuple[Box, tuple[int, int]] | None = None,
) -> np.ndarray:
    """Resizes an image, or makes a window of the resized image.

    Args:
        pixels: the image.
        height: that it shall have.
        width: that it shall have.
        how: the filter.
        window: the part of the resized image that is made; None for the whole.
        flips: of what is made: left to right, top to bottom.
        out: takes it, (window's height, window's width, 3), contiguous; None for an array of its own.
        part: where `pixels` are only a part of the image, with at least `resize_support`: which, and the image's
            height and width.

    Returns:
        `out`.

    Raises:
        MemoryError: there isn't room for what is made on the way.
        ValueError: a side is shorter than a pixel or longer than 65536, the window doesn't lie within the resized
            image, or the part doesn't have what it is made of.
    """
    compiled = native.library()
    assert compiled, "needs the compiled library"
    held, (rows, columns) = part or (Box(0, 0, *pixels.shape[:2]), pixels.shape[:2])
    window = window or Box(0, 0, height, width)
    if out is None:
        out = np.empty((max(window.height, 0), max(window.width, 0), 3), np.uint8)
    if pixels.shape != (held.height, held.width, 3) or pixels.dtype != np.uint8 or pixels.strides[1:] != (3, 1):
        raise ValueError(
            f"pixels of shape {pixels.shape}, {pixels.dtype}: expected uint8 of {held.height, held.width, 3}"
        )
    if out.shape != (window.height, window.width, 3) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out of shape {out.shape}, {out.dtype}: expected uint8 of {window.height, window.width, 3}")
    sizes = (rows, columns, FILTERS[how], height, width, *window)
    at = (ctypes.c_int * 4)(*held)
    outcome = compiled.convneur_resize_part(pixels.ctypes.data, pixels.strides[0], at, *sizes, *flips, out.ctypes.data)
    if outcome == 2:
        raise MemoryError(f"no room to resize {rows} x {columns} pixels to {height} x {width}")
    if outcome:
        raise ValueError(f"a window {window} of {rows} x {columns} pixels resized to {height} x {width}, of {held}")
    return out


def resize_support(rows: int, columns: int, height: int, width: int, how: Filter, window: Box) -> Box:
    """The part of an image of `rows` x `columns` pixels that a window of it, resized to `height` x `width`, is made of.

    Raises:
        ValueError: as `resize`.
    """
    compiled = native.library()
    assert compiled, "needs the compiled library"
    box = (ctypes.c_int * 4)()
    compiled.convneur_resize_support(rows, columns, FILTERS[how], height, width, *window, box)
    if not box[2]:
        raise ValueError(f"a window {window} of {rows} x {columns} pixels resized to {height} x {width}")
    return Box(*box)


@cache
def resizes_as_pillow() -> bool:
    """Whether there is a library, and Pillow resizes to its bits."""
    return _agrees(("bilinear", "bicubic"), _resized_by_pillow)


@cache
def resizes_as_opencv() -> bool:
    """Whether there is a library, and OpenCV's INTER_AREA resizes to its bits."""
    return _agrees(
        ("area",), lambda pixels, height, width, _: cv2.resize(pixels, (width, height), None, 0, 0, cv2.INTER_AREA)
    )


SHAPES = [(61, 40, 24, 24), (40, 97, 24, 24), (90, 25, 24, 24), (20, 33, 24, 24), (24, 60, 24, 24), (48, 48, 24, 24)]
"""Heights and widths before and after, where Pillow's versions and OpenCV's cases differ."""


def _agrees(filters: tuple[Filter, ...], reference: Callable[[np.ndarray, int, int, Filter], np.ndarray]) -> bool:
    if not native.library():
        return False
    noise = np.random.default_rng(0).integers(0, 256, (97, 97, 3), dtype=np.uint8)
    for rows, columns, height, width in SHAPES:
        for how in filters:
            image = noise[:rows, :columns]
            if not np.array_equal(resize(image, height, width, how), reference(image, height, width, how)):
                return False
    return True


def _resized_by_pillow(pixels: np.ndarray, height: int, width: int, how: Filter) -> np.ndarray:
    return np.array(Image.fromarray(pixels).resize((width, height), RESAMPLINGS[how]))
