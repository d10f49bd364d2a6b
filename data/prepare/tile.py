"""A tiled copy of a dataset that is there: the same samples in the same shards, and the same stream."""

import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import google_crc32c
import numpy as np

from convneur.data.errors import InputError
from convneur.data.format.index import read_index
from convneur.data.format.manifest import Manifest, Split
from convneur.data.format.shards import Sample
from convneur.data.format.tiled import DENIED, ORIGINAL_FIELDS, read_originals
from convneur.data.prepare.betons import Format, Pixels
from convneur.data.prepare.writing import Part, Task, prepare
from convneur.data.stores.addresses import public
from convneur.data.stores.on_disk import shard_on_disk

SOURCE = "tile"


class Copies:
    """The shards of a split of the dataset in `folder`, read as they lie there.

    Args:
        folder: the dataset's.
        split: its entry in the manifest.
        index: its index.
        originals: what became of its own originals; None where it isn't tiled.
    """

    def __init__(self, folder: Path, split: Split, index: np.ndarray, originals: np.ndarray | None):
        self.copied = split
        self.sizes = [shard.samples for shard in split.shards]
        self._folder, self._index, self._originals = folder, index, originals
        self._edges = np.concatenate([[0], np.cumsum(self.sizes)])
        self._denied = np.array([denied.row for denied in split.denied], np.int64)

    def samples(self, number: int) -> Iterator[Sample]:
        """Samples of a shard, those that are denied as well.

        Raises:
            InputError: one is damaged that isn't denied, or the shard can't be read.
        """
        shard = self.copied.shards[number]
        with shard_on_disk(self._folder, shard) as path, path.open("rb") as file:
            for row in range(self._edges[number], self._edges[number + 1]):
                entry = self._index[row]
                image = os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
                if google_crc32c.value(image) != entry["crc32c"] and row not in self._denied:
                    raise InputError(
                        f"{public(shard.name)}, key {entry['key'].decode()}: checksum mismatch, the file is "
                        "damaged: restore it, or let `convneur data verify` deny the image"
                    )
                yield Sample(entry["key"].decode(), image, int(entry["label"]))

    def originals(self, number: int) -> np.ndarray:
        """What is known of a shard's originals: these samples, or what they were tiled from themselves."""
        rows = np.arange(self._edges[number], self._edges[number + 1])
        known = np.zeros(len(rows), ORIGINAL_FIELDS)
        source = self._index if self._originals is None else self._originals
        for field in ("crc32c", "size"):
            known[field] = source[field][rows]
        known["outcome"][np.isin(rows, self._denied)] = DENIED
        return known


def prepare_tile(
    source: Path,
    out: Path,
    *,
    tiles: int,
    processes: int,
    part: Part | None = None,
    format: Format = "tar",
    pixels: Pixels = "jpg",
    say: Callable[[str], object] = print,
) -> bool:
    """Writes a tiled copy of a dataset, whose splits have the same samples, shards, denylists, and hashes.

    Args:
        source: the dataset's folder; it stays as it is.
        out: the copy's.
        tiles: coding units between restart markers; see `convneur.data.native.tile.tile_jpeg`.
        processes: how many work at a time.
        part: share of the shards to write; see `convneur.data.prepare.writing.Task`.
        format: formats to write; see `convneur.data.prepare.writing.Task`.
        pixels: what betons hold.
        say: takes a line about tiling.

    Returns:
        False if the copy was there, complete.

    Raises:
        InputError: `source` holds no shards, or damaged ones; `out` holds something else; there is no compiler.
    """
    manifest = Manifest.read(source)
    if not manifest.has_shards:
        raise InputError(f"{source} holds the dataset in FFCV's format alone: tile the one that it was written from")
    if out.resolve() == source.resolve():
        raise InputError(f"--out is {out}, which holds the originals: name another folder")
    digest = blake2b(f"{manifest.classes}".encode(), digest_size=16)
    for name, split in manifest.splits.items():
        digest.update(f"{name} {split.index_crc32c} {split.index_hash} {split.denied}\n".encode())
    return prepare(
        Task(out, processes, part, format, pixels, tiles, say),
        SOURCE,
        digest.hexdigest(),
        manifest.classes,
        {
            name: Copies(source, split, read_index(source, name, split), read_originals(source, name, split))
            for name, split in manifest.splits.items()
        },
    )
