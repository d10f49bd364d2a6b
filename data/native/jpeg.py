"""Baseline JPEGs decoded in C++ to the bits of libjpeg-turbo, and no more of them than a crop needs."""

import numpy as np

from convneur.data import native
from convneur.data.native.pixels import Box


def decode_jpeg(image: bytes, proven: bool, box: Box, out: np.ndarray) -> bool:
    """Decodes a rectangle of a JPEG to the RGB that simplejpeg makes of it.

    Args:
        image: the file.
        proven: it was decoded whole before, and a checksum has told that it is the same still: only what the rectangle
            needs is read. Else all of it is, and it is taken only if nothing is odd anywhere.
        box: the rectangle, in pixels of the image.
        out: takes the pixels, (height, width, 3) uint8; rows may lie apart, a row's pixels may not.

    Returns:
        Whether it was taken; if not, `out` holds anything. Other kinds of JPEG aren't, damaged ones, other files, and
        rectangles that don't lie in the image; nor is any where there is no library.

    Raises:
        ValueError: `out` is of another kind or size.
    """
    if out.shape != (box.height, box.width, 3) or out.dtype != np.uint8 or (out.size and out.strides[1:] != (3, 1)):
        raise ValueError(f"out of shape {out.shape}, {out.dtype}: expected uint8 of {box.height, box.width, 3}")
    compiled = native.library()
    if compiled is None:
        return False
    refused: int = compiled.convneur_jpeg_decode(image, len(image), proven, *box, out.ctypes.data, out.strides[0])
    return not refused
