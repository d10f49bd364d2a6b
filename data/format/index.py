"""The index of a split: a row for each sample, shard by shard."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.data.format.manifest import MANIFEST, RESTORE, Shard, Split, file_crc32c
from convneur.data.format.selection import Tally
from convneur.data.format.tar import read_samples

COUNTED_AT_ONCE = 1 << 20
INDEX_FIELDS = [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4"), ("crc32c", "<u4")]


def index_path(folder: Path, split: str) -> Path:
    """Where the index of `split` lies."""
    return folder / f"{split}.index.npy"


class Scan(NamedTuple):
    """A shard, (samples,) rows of its index, whose "shard" is still 0, and what of its files is in them."""

    shard: Shard
    rows: np.ndarray
    tally: Tally


def scan_shard(path: Path, name: str) -> Scan:
    """Reads a shard at `path` from end to end.

    Args:
        path: the tar file.
        name: what the manifest calls it.

    Raises:
        InputError: it can't be read to its end, or a sample in it lacks its image or its label.
    """
    if not path.is_file():  # opening a pipe would wait for whoever fills it
        raise InputError(f"{name} is no file: name WebDataset shards")
    found, tally = read_samples(path, name)
    rows = np.array(
        [(0, *row) for row in found], dtype=[*INDEX_FIELDS, ("key", f"S{max(len(row[-1]) for row in found)}")]
    )
    return Scan(Shard(name, path.stat().st_size, file_crc32c(path), len(rows)), rows, tally)


def index_split(folder: Path, split: str, paths: Sequence[Path]) -> Split:
    """Writes the index of `split` from the shards themselves, which lie at `paths` in `folder`.

    Returns:
        The split's entry in the manifest.

    Raises:
        InputError: a shard can't be read to its end, or a sample in it lacks its image or its label.
    """
    return write_index(folder, split, [scan_shard(path, path.name) for path in paths])


def write_index(folder: Path, split: str, scans: Sequence[Scan]) -> Split:
    """Writes the index of `split` from its shards' rows.

    Returns:
        The split's entry in the manifest.
    """
    index = joined(scans)
    with atomic_write(index_path(folder, split)) as file:
        np.save(file, index)
    return Split(tuple(scan.shard for scan in scans), file_crc32c(index_path(folder, split)), content_hash(index))


def joined(scans: Sequence[Scan]) -> np.ndarray:
    """The index of the shards that were scanned, (samples,) of `INDEX_FIELDS` and "key"."""
    key_type = max((scan.rows.dtype["key"] for scan in scans), key=lambda dtype: dtype.itemsize)
    index = np.concatenate([scan.rows.astype([*INDEX_FIELDS, ("key", key_type)]) for scan in scans])
    index["shard"] = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans])
    return index


def read_index(folder: Path, name: str, split: Split) -> np.ndarray:
    """Maps the index of `split`, called `name`, into memory, which ranks of a node then share.

    Returns:
        (samples,) structured array, read-only, of `INDEX_FIELDS` and "key" (UTF-8).

    Raises:
        InputError: the file is missing, or isn't the one that the manifest vouches for.
    """
    path = index_path(folder, name)
    if not path.is_file():
        raise InputError(f"{path} is missing: remove {folder} and prepare it again")
    if file_crc32c(path) != split.index_crc32c:
        raise InputError(f"{path} does not match {MANIFEST}: remove {folder} and prepare it again")
    index: np.ndarray = np.load(path, mmap_mode="r")
    samples = count(index["shard"], len(split.shards)).tolist()
    rows = [denied.row for denied in split.denied]
    fault = ""
    if samples != [shard.samples for shard in split.shards]:
        fault = "lists other shards than its index"
    elif rows != sorted(set(rows)) or not all(0 <= row < len(index) for row in rows):
        fault = "denies samples that there are not, or twice"
    elif index["key"][np.array(rows, np.int64)].tolist() != [denied.key.encode() for denied in split.denied]:
        fault = "denies samples of other names than its index has"
    if fault:
        raise InputError(f"{folder / MANIFEST} is damaged (split '{name}' {fault}): {RESTORE.format(folder)}")
    return index


def count(numbers: np.ndarray, values: int) -> np.ndarray:
    """How often each of 0..values-1, or more, stands in a field of the index, which is never copied as a whole."""
    largest = int(numbers.max(initial=0))
    counts = np.zeros(max(values, largest + 1), dtype=np.int64)
    for first in range(0, len(numbers), COUNTED_AT_ONCE):
        counts += np.bincount(numbers[first : first + COUNTED_AT_ONCE], minlength=len(counts))
    return counts


def content_hash(index: np.ndarray, originals: np.ndarray | None = None) -> str:
    """Hash of what a stream of samples depends on: shards, keys, labels, images, but not their places in the files.

    Args:
        index: rows of a split, (samples,) of `INDEX_FIELDS` and "key".
        originals: what its images were rewritten from without loss, (samples,) of `ORIGINAL_FIELDS`. They count in
            place of the rewritten ones, whose pixels are the same, and thus the stream.
    """
    digest = blake2b(digest_size=16)
    for name in ("shard", "label", "crc32c", "key"):
        rows = originals if originals is not None and name == "crc32c" else index
        digest.update(np.ascontiguousarray(rows[name]).tobytes())
    return digest.hexdigest()
