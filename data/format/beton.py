"""Datasets in FFCV's format: names, and what the files hold.

    train.beton                FFCV's fields "image" (RGBImageField) and "label" (IntField), in the order of the index
    train.beton.crc32c.npy     (samples,) uint32: checksum of what the beton holds of each image

JPEGs are stored as they are. What FFCV's decoder doesn't take (other formats, CMYK) is stored as the pixels that
`decode` makes of it, with `pixels="raw"` all is. So a beton gives the pixels of the shards it was written from, to the
bit. What can't be decoded is stored as it is too, for whoever reads it to find.
"""

from pathlib import Path

JPG, RAW = 0, 1
"""FFCV's numbers for how an image is stored."""


def beton_path(folder: Path, split: str) -> Path:
    """Where a split in FFCV's format lies."""
    return folder / f"{split}.beton"


def checksums_path(folder: Path, split: str) -> Path:
    """Where the checksums of a beton's images lie."""
    return folder / f"{split}.beton.crc32c.npy"
