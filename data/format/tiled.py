"""Tiled shards: JPEGs rewritten without loss, with restart markers, so that parts of them can be decoded alone.

    train.originals.npy           (samples,) ORIGINAL_FIELDS in the order of the index: what became of each original
    train-000000.originals.npy    that of one shard, written before it, while there is no manifest yet

The index describes the shards as they are. The split's hash counts the originals' checksums instead, as the stream of
samples is theirs.
"""

from pathlib import Path

import numpy as np

from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.data.format.manifest import MANIFEST, Split, Tiles, file_crc32c

ORIGINAL_FIELDS = [("crc32c", "<u4"), ("size", "<u4"), ("outcome", "u1"), ("proven", "?")]
"""Checksum and bytes of the original, what became of it, and whether the JPEG that is stored was decoded whole, and
equal to it."""

OUTCOMES = ("tiled", "no JPEG", "a JPEG of another kind", "damaged", "other pixels", "denied before")
"""What becomes of an image: it is tiled, or kept for one of the other reasons. The first of them, tiled, is 0."""

TILED, NO_JPEG, OTHER_KIND, DAMAGED, OTHER_PIXELS, DENIED = range(len(OUTCOMES))


def originals_path(folder: Path, split: str) -> Path:
    """Where it is said what became of a split's originals; or of a shard's, whose name less .tar takes its place."""
    return folder / f"{split}.originals.npy"


def write_originals(folder: Path, split: str, mcus: int, originals: np.ndarray) -> Tiles:
    """Writes what became of a split's originals, (samples,) of `ORIGINAL_FIELDS`.

    Returns:
        What the split's entry in the manifest says of it.
    """
    with atomic_write(originals_path(folder, split)) as file:
        np.save(file, originals)
    counts = np.bincount(originals["outcome"], minlength=len(OUTCOMES)).tolist()
    outcomes = {what: count for what, count in zip(OUTCOMES, counts, strict=True) if count or what == OUTCOMES[TILED]}
    size = int(originals["size"].sum(dtype=np.uint64))
    return Tiles(mcus, outcomes, size, file_crc32c(originals_path(folder, split)))


def read_originals(folder: Path, name: str, split: Split) -> np.ndarray | None:
    """Maps what became of the originals of `split`, called `name`, into memory.

    Returns:
        (samples,) of `ORIGINAL_FIELDS`, read-only; None where the split isn't tiled.

    Raises:
        InputError: the file is missing, or isn't the one that the manifest vouches for.
    """
    if split.tiles is None:
        return None
    path = originals_path(folder, name)
    if not path.is_file() or file_crc32c(path) != split.tiles.crc32c:
        what = f"does not match {MANIFEST}" if path.is_file() else "is missing"
        raise InputError(f"{path} {what}: restore it, or remove {folder} and tile the dataset again")
    originals: np.ndarray = np.load(path, mmap_mode="r")
    if len(originals) != sum(shard.samples for shard in split.shards):
        raise InputError(f"{path} has {len(originals)} rows, other than its index: remove {folder} and tile it again")
    return originals
