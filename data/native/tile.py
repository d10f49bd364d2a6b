"""JPEGs rewritten without loss, with restart markers, so that parts of them can be decoded alone."""

import numpy as np

from convneur.data import native


def tile_jpeg(image: bytes, mcus: int) -> bytes | None:
    """Rewrites a baseline JPEG: the same coefficients with restart markers, and the best Huffman codes for them.

    All other segments stay as they are, byte by byte, and so does what follows the image. A rewritten file is rewritten
    to itself.

    Args:
        image: any bytes.
        mcus: coding units of 16x16 pixels from one marker to the next, 1 to 64. It is the next smaller divisor of a
            row's, so that markers form columns, or another number near it where a row has no such divisor. Where units
            have fewer blocks than the six of 4:2:0, there are as many more of them.

    Returns:
        The new file; None where it isn't taken: progressive, CMYK, damaged, no JPEG at all.
    """
    compiled = native.library()
    if compiled is None:
        return None
    most = len(image) + len(image) // 4 + 4096
    while True:
        room = np.empty(most, np.uint8)
        size: int = compiled.tile_jpeg(image, len(image), mcus, room.ctypes.data, most)
        if size <= most:
            return None if size < 0 else room[:size].tobytes()
        most = size
