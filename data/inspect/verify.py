"""Every byte of a dataset checked; what no one can read goes on the denylist."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np

from convneur.data.errors import InputError
from convneur.data.format.beton import JPG
from convneur.data.format.index import content_hash, read_index
from convneur.data.format.manifest import Denied, Manifest, Shard, Split, file_crc32c
from convneur.data.format.tiled import OUTCOMES, TILED, read_originals
from convneur.data.inspect.originals import compare_with_originals
from convneur.data.prepare.claim import folder_locked
from convneur.data.prepare.parallel import in_parallel
from convneur.data.stores.addresses import public
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.on_disk import shard_on_disk
from convneur.data.views.decode import decoding_fault


@dataclass(frozen=True)
class Findings:
    """What is wrong with a split.

    Attributes:
        split: its name.
        samples: how many samples its index has.
        denied: those that can't be read.
        shards: a line for each shard whose bytes differ from those that were indexed, be it in an image or between, and
            for a beton with bytes between its images; and for each tiled image that isn't its original's equal.
        tiled: how many samples are tiled.
    """

    split: str
    samples: int
    denied: tuple[Denied, ...]
    shards: tuple[str, ...]
    tiled: int = 0


def verify_dataset(folder: Path, processes: int, against: Path | None = None) -> list[Findings]:
    """Checks shards, betons and index against the manifest, decodes every image, and writes the manifest's denylist.

    Denied samples count as absent from then on: in the order, in evaluation, and in the index's hash. What can't be
    read in one format is denied in both, so that their streams stay the same. Samples that are readable again leave
    the list.

    Args:
        folder: the dataset's.
        processes: how many shards are checked at a time.
        against: the dataset that this one was tiled from, whose images are to have the same pixels; None where nobody
            asks. Then every tiled image is decoded, as all others are, and was compared when it was written.

    Returns:
        What was found, for each split.

    Raises:
        InputError: there is no dataset, or its index is damaged, or a shard or a beton is missing or has another size.
    """
    manifest = Manifest.read(folder)
    findings, splits = [], {}
    for name in manifest.splits:
        found, splits[name] = _check_split(folder, manifest, name, processes, against)
        findings.append(found)
    if splits != manifest.splits:
        with folder_locked(folder):
            now = Manifest.read(folder)  # another process may have added a split meanwhile
            if any(now.splits.get(name) != split for name, split in manifest.splits.items()):
                raise InputError(f"{folder} was prepared anew while it was checked: check it again")
            replace(now, splits=now.splits | splits).write(folder)
    return findings


def _check_split(
    folder: Path, manifest: Manifest, name: str, processes: int, against: Path | None
) -> tuple[Findings, Split]:
    """What is wrong with a split, and its entry in the manifest, with the denylist that follows from it."""
    split = manifest.splits[name]
    index, originals = read_index(folder, name, split), read_originals(folder, name, split)
    unequal = compare_with_originals(folder, name, against, processes) if against else ()
    edges = np.searchsorted(index["shard"], np.arange(len(split.shards) + 1))
    check: list[tuple[str, Callable[[int], tuple[list[Denied], str]]]] = []
    if manifest.has_shards:
        check.append((name, partial(_check_shard, folder, split.shards, index, edges)))
    between = ""
    if split.beton:
        beton = BetonStore(folder, name)
        between = beton.gaps_fault()
        check.append((f"{name}.beton", partial(_check_block, beton, index, edges)))
    checked = [
        found
        for what, work in check
        for found in in_parallel(
            work,
            range(len(split.shards)),
            processes,
            what=f"checking {what}",
            unit="images",
            sizes=[shard.samples for shard in split.shards],
        )
    ]
    by_row = {sample.row: sample for found, _ in reversed(checked) for sample in found}
    rows = sorted(by_row)
    denied = tuple(by_row[row] for row in rows)
    damaged = tuple(line for line in (*(line for _, line in checked), between, *unequal) if line)
    index_hash = content_hash(np.delete(index, rows), None if originals is None else np.delete(originals, rows))
    tiled = split.tiles.outcomes[OUTCOMES[TILED]] if split.tiles else 0
    return Findings(name, len(index), denied, damaged, tiled), replace(split, denied=denied, index_hash=index_hash)


def _check_shard(
    folder: Path, shards: tuple[Shard, ...], index: np.ndarray, edges: np.ndarray, number: int
) -> tuple[list[Denied], str]:
    """Samples that can't be read, and a line if the file isn't the one that was indexed."""
    shard = shards[number]
    denied = []
    with shard_on_disk(folder, shard) as path:
        with path.open("rb") as file:
            for row in range(edges[number], edges[number + 1]):
                image = os.pread(file.fileno(), int(index[row]["size"]), int(index[row]["offset"]))
                if reason := _fault(image, int(index[row]["crc32c"])):
                    denied.append(Denied(row, index[row]["key"].decode(), reason))
        differs = file_crc32c(path) != shard.crc32c
    return denied, f"{public(shard.name)}: not the bytes that were indexed" if differs else ""


def _check_block(store: BetonStore, index: np.ndarray, edges: np.ndarray, number: int) -> tuple[list[Denied], str]:
    """Samples of a shard that can't be read in FFCV's format; `verify_dataset` looks at what is between them."""
    rows = range(edges[number], edges[number + 1])
    return [Denied(row, index[row]["key"].decode(), reason) for row in rows if (reason := _beton_fault(store, row))], ""


def _beton_fault(store: BetonStore, row: int) -> str:
    """Why what a beton holds of a row of the index can't be read; empty if it can."""
    content = store.intact_content(row)
    if content is None:
        return "checksum mismatch"
    return decoding_fault(content) if store.images[row]["mode"] == JPG else ""


def _fault(image: bytes, checksum: int) -> str:
    """Why an image can't be read; empty if it can."""
    if google_crc32c.value(image) != checksum:
        return "checksum mismatch"
    return decoding_fault(image)
