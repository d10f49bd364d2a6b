"""JPEGs rewritten with restart markers, without loss, and proved so one by one; and shards of them."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.data.format.index import Scan, scan_shard
from convneur.data.format.manifest import Manifest, Split
from convneur.data.format.shards import Sample, write_shard
from convneur.data.format.tiled import (
    DAMAGED,
    DENIED,
    NO_JPEG,
    ORIGINAL_FIELDS,
    OTHER_KIND,
    OTHER_PIXELS,
    OUTCOMES,
    TILED,
    originals_path,
)
from convneur.data.native import lack
from convneur.data.native.tile import tile_jpeg
from convneur.data.views.decode import decode_plain_jpeg, plain_jpeg_size

FORECAST_IMAGES = 32


class Stored(NamedTuple):
    """An image as it is to be stored, what became of the original, and whether it was decoded whole; see `Sample`."""

    image: bytes
    outcome: int
    proven: bool


def require_tiling(mcus: int) -> None:
    """Compiles what tiles JPEGs; raises InputError where that can't be done."""
    if reason := lack():
        raise InputError(f"--tiles {mcus} needs a C++ compiler: {reason}")


def tile(image: bytes, mcus: int) -> Stored:
    """Rewrites an image if it is a JPEG that can be, and if both then decode to equal pixels; else it is kept.

    Args:
        image: an image file, whatever it holds.
        mcus: coding units between restart markers; see `tile_jpeg`.
    """
    if not image.startswith(b"\xff\xd8"):
        return Stored(image, NO_JPEG, proven=False)
    pixels = decode_plain_jpeg(image)
    if pixels is None:
        return Stored(image, OTHER_KIND if plain_jpeg_size(image) is None else DAMAGED, proven=False)
    tiled = tile_jpeg(image, mcus)
    if tiled is None:
        return Stored(image, OTHER_KIND, proven=True)
    again = decode_plain_jpeg(tiled)
    if again is None or not np.array_equal(again, pixels):
        return Stored(image, OTHER_PIXELS, proven=True)
    return Stored(tiled, TILED, proven=True)


def write_tiled_shard(
    path: Path, samples: Iterable[Sample], extension: str, mcus: int, before: np.ndarray | None
) -> None:
    """Writes a WebDataset shard of tiled images, and what became of the originals; each whole or not at all.

    Args:
        path: where to.
        samples: in the order they shall have.
        extension: file extension of the images.
        mcus: coding units between restart markers.
        before: what is known of the originals, (samples,) of `ORIGINAL_FIELDS`, where `samples` may not be them. Those
            whose outcome is `DENIED` stay as they are.
    """

    def stored() -> Iterator[Sample]:
        rows = []
        for number, sample in enumerate(samples):
            crc32c, size = google_crc32c.value(sample.image), len(sample.image)
            if before is not None:
                crc32c, size = before["crc32c"][number], before["size"][number]
            if before is not None and before["outcome"][number] == DENIED:
                image, outcome, proven = Stored(sample.image, DENIED, proven=False)
            else:
                image, outcome, proven = tile(sample.image, mcus)
            rows.append((crc32c, size, outcome, proven))
            yield sample._replace(image=image)
        with atomic_write(originals_path(path.parent, path.stem)) as file:  # before the shard gets its name
            np.save(file, np.array(rows, ORIGINAL_FIELDS))

    write_shard(path, stored(), extension)


def scan_tiled_shard(path: Path) -> tuple[Scan, np.ndarray]:
    """Reads a shard that `write_tiled_shard` has written from end to end.

    Returns:
        Its index, and what became of its originals, (samples,) of `ORIGINAL_FIELDS`.

    Raises:
        InputError: it, or the file beside it, is missing or damaged.
    """
    scan, beside = scan_shard(path, path.name), originals_path(path.parent, path.stem)
    try:
        originals: np.ndarray = np.load(beside)
    except (OSError, ValueError) as error:
        raise InputError(f"{beside} can't be read ({error}): remove {path} and run the command again") from None
    if originals.dtype != np.dtype(ORIGINAL_FIELDS) or originals.shape != scan.rows.shape:
        raise InputError(f"{beside} is of another shard: remove {path} and run the command again")
    # What was damaged stays so for those who look at checksums: none of these images may be allowed again.
    scan.rows["crc32c"] = np.where(originals["outcome"] == DENIED, originals["crc32c"], scan.rows["crc32c"])
    return scan, originals


def forget_parts(folder: Path) -> None:
    """Removes what `write_tiled_shard` has put beside the shards of a complete dataset: its splits have it, too."""
    for split in Manifest.read(folder, unfinished=True).splits.values():
        for shard in split.shards if split.tiles else ():
            originals_path(folder, Path(shard.name).stem).unlink(missing_ok=True)


def forecast(images: Sequence[bytes], mcus: int, total: int) -> str:
    """What tiling will take, in words, judged by the first `images` of a `total`."""
    began = time.process_time()
    stored = [tile(image, mcus) for image in images]
    seconds = max((time.process_time() - began) / max(len(images), 1), 1e-9)
    tiled = sum(one.outcome == TILED for one in stored)
    change = _change(sum(map(len, images)), sum(len(one.image) for one in stored))
    return (
        f"of the first {len(images):,} images {tiled:,} can be tiled, which changes their size by {change}; at "
        f"{1 / seconds:,.0f} images a CPU-second, {total:,} take {total * seconds / 3600:,.2g} CPU-hours"
    )


def summary(split: Split, index: np.ndarray) -> str:
    """What became of a split's images, in words."""
    assert split.tiles is not None
    kept = ", ".join(f"{count:,} {what}" for what, count in split.tiles.outcomes.items() if what != OUTCOMES[TILED])
    kept = f" (kept as they are: {kept})" if kept else ""
    size = int(index["size"].sum(dtype=np.uint64))
    return (
        f"{split.tiles.outcomes[OUTCOMES[TILED]]:,} of {len(index):,} images tiled{kept}, "
        f"{split.tiles.original_bytes / 1e9:.3f} GB "
        f"became {size / 1e9:.3f} ({_change(split.tiles.original_bytes, size)})"
    )


def _change(before: int, after: int) -> str:
    return f"{100 * (after / max(before, 1) - 1):+.2f} %"
