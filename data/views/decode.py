"""From an image file's bytes to pixels."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError


def decode(image: bytes) -> np.ndarray:
    """Decodes an image file to RGB, to the pixels that Pillow makes of it and torchvision's reader thus shows.

    Orientation in EXIF is left as it is. Intact JPEGs go through simplejpeg, which is faster and gives the same bits.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: it is no image, or a damaged one; says why in one line.
        MemoryError: it has more pixels than there is room for, which may be the machine's fault.
    """
    pixels = decode_plain_jpeg(image)
    if pixels is not None:
        return pixels
    try:
        return np.array(Image.open(io.BytesIO(image)).convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("no known image format") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make Pillow raise anything, from OSError to struct.error
        raise ValueError(in_one_line(error)) from None


def decoding_fault(image: bytes) -> str:
    """Why training would replace an image file; empty if it can be decoded."""
    try:
        decode(image)
    except (ValueError, MemoryError) as error:
        return in_one_line(error)
    return ""


def in_one_line(error: Exception) -> str:
    """What an exception says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or repr(error)


def plain_jpeg_size(image: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that simplejpeg decodes as Pillow does, if it is intact; None for anything else."""
    if not image.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    return height, width


def decode_plain_jpeg(image: bytes) -> np.ndarray | None:
    """Decodes a JPEG that libjpeg-turbo has nothing to complain of.

    Returns:
        (height, width, 3) uint8; None for whatever Pillow is to judge: other formats and colours, damage, huge sizes.
    """
    if plain_jpeg_size(image) is None:
        return None
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(image)
    except ValueError:
        return None
    return pixels
