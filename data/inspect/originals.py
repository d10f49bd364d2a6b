"""Tiled images beside the originals, pixel by pixel."""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from convneur.data.errors import InputError
from convneur.data.format.index import content_hash, read_index
from convneur.data.format.manifest import Manifest, Split
from convneur.data.format.tiled import TILED, read_originals
from convneur.data.prepare.parallel import in_parallel
from convneur.data.stores.addresses import public
from convneur.data.stores.on_disk import shard_on_disk
from convneur.data.views.decode import decode


class _Images(NamedTuple):
    """A split of the dataset in `folder`, its index, and what became of its originals if it is tiled."""

    folder: Path
    split: Split
    rows: np.ndarray
    originals: np.ndarray | None

    @classmethod
    def of(cls, folder: Path, name: str) -> "_Images":
        split = Manifest.read(folder).splits[name]
        return cls(folder, split, read_index(folder, name, split), read_originals(folder, name, split))


def compare_with_originals(folder: Path, name: str, against: Path, processes: int) -> tuple[str, ...]:
    """Decodes every tiled image of a split, and its original.

    Args:
        folder: the tiled dataset's.
        name: of the split.
        against: the folder of the dataset that it was tiled from.
        processes: how many shards are compared at a time.

    Returns:
        A line for each image whose pixels aren't the original's, or whose original can't be read.

    Raises:
        InputError: the split isn't tiled, or isn't of the samples that `against` has; or a shard is missing.
    """
    tiled = _Images.of(folder, name)
    if tiled.originals is None or not Manifest.read(folder).has_shards:
        raise InputError(f"{folder} has no tiled shards of split {name}: there is nothing to hold --against {against}")
    manifest = Manifest.read(against)
    if name not in manifest.splits or not manifest.has_shards:
        raise InputError(f"--against {against} has no shards of split {name}: name what {folder} was tiled from")
    source = _Images.of(against, name)
    if content_hash(tiled.rows, tiled.originals) != content_hash(source.rows, source.originals):
        raise InputError(
            f"--against {against}, split {name}, has other samples than {folder} was tiled from: name the originals"
        )
    found = in_parallel(
        partial(_compare_shard, tiled, source),
        range(len(tiled.split.shards)),
        processes,
        what=f"comparing {name}",
        unit="images",
        sizes=[shard.samples for shard in tiled.split.shards],
    )
    return tuple(line for lines in found for line in lines)


def _compare_shard(tiled: _Images, source: _Images, number: int) -> list[str]:
    assert tiled.originals is not None
    lines, shard = [], tiled.split.shards[number]
    first, end = np.searchsorted(tiled.rows["shard"], [number, number + 1])
    with (
        shard_on_disk(tiled.folder, shard) as path,
        shard_on_disk(source.folder, source.split.shards[number]) as other,
        path.open("rb") as ours,
        other.open("rb") as theirs,
    ):
        for row in range(first, end):
            if tiled.originals["outcome"][row] != TILED:
                continue
            image, original = (
                os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
                for file, entry in ((ours, tiled.rows[row]), (theirs, source.rows[row]))
            )
            if fault := _difference(image, original, int(source.rows["crc32c"][row])):
                lines.append(f"{public(shard.name)}, key {tiled.rows['key'][row].decode()}: {fault}")
    return lines


def _difference(image: bytes, original: bytes, checksum: int) -> str:
    if google_crc32c.value(original) != checksum:
        return "the original is damaged"
    try:
        equal = np.array_equal(decode(image), decode(original))
    except ValueError as error:
        return f"can't be compared: {error}"
    return "" if equal else "other pixels than the original"
