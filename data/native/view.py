"""Views of images in one call of C++: decoded, resized, flipped."""

import ctypes
from collections.abc import Sequence

import numpy as np

from convneur.data import native
from convneur.data.native.operations import Operation
from convneur.data.native.pixels import FILTERS, Filter, resizes_as_opencv, resizes_as_pillow

NUMBERS = ctypes.c_int * 12


def can_show(how: str) -> bool:
    """Whether there is a library that resizes so to the bits of the library whose filter it is."""
    if how not in FILTERS:
        return False
    return resizes_as_opencv() if how == "area" else resizes_as_pillow()


def show_jpeg(
    image: bytes, proven: bool, view: Sequence[int], how: Filter, size: int, operations: Sequence[Operation], seen: int
) -> bool:
    """Shows a view of a JPEG file.

    Args:
        image: the file.
        proven: whether it was decoded whole before, and has been found unchanged: then only what the view needs is
            looked at.
        view: top, left, height, width, resized height and width, the window's top and left, flips.
        how: the filter.
        size: side of the square that the view shows.
        operations: what then becomes of it, see `encode_operation`.
        seen: address of size x size x 3 bytes, which take it.

    Returns:
        Whether it is done; else the file is odd, or no baseline JPEG, and the libraries may judge it.
    """
    compiled = native.library()
    assert compiled, "needs the compiled library"
    numbers = NUMBERS(*view, FILTERS[how], size)
    flat, count = _flat(operations), len(operations)
    done: int = compiled.convneur_show_jpeg(image, len(image), proven, numbers, flat, count, seen)
    return done == 0


def show_pixels(
    pixels: np.ndarray, view: Sequence[int], how: Filter, size: int, operations: Sequence[Operation], seen: int
) -> bool:
    """Shows a view of an image that is decoded already, (height, width, 3) uint8; see `show_jpeg`."""
    compiled = native.library()
    assert compiled, "needs the compiled library"
    top, left, height, width = view[:4]
    inside = 0 <= top < top + height <= pixels.shape[0] and 0 <= left < left + width <= pixels.shape[1]
    if not inside or pixels.strides[1:] != (3, 1):
        return False
    first, stride = pixels[top:, left:].ctypes.data, pixels.strides[0]
    numbers, flat, count = NUMBERS(*view, FILTERS[how], size), _flat(operations), len(operations)
    done: int = compiled.convneur_show_pixels(first, stride, numbers, flat, count, seen)
    return done == 0


def _flat(operations: Sequence[Operation]) -> ctypes.Array[ctypes.c_double]:
    values = [value for operation in operations for value in operation]
    return (ctypes.c_double * len(values))(*values)
