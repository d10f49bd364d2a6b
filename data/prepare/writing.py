"""From samples of any kind to a dataset: shards written in parallel, by one machine or by the jobs of an array.

Shards appear whole or not at all and always hold the same samples. So work that was interrupted is continued by doing
what is missing, and jobs share it by taking every Nth shard. Who comes last reads all shards back for the index.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from convneur.data.errors import InputError
from convneur.data.format.index import Scan, content_hash, read_index, scan_shard, write_index
from convneur.data.format.manifest import Manifest, Split
from convneur.data.format.shards import Sample, shard_path, write_shard
from convneur.data.format.tiled import write_originals
from convneur.data.prepare.betons import Format, Pixels, add_betons
from convneur.data.prepare.claim import claimed
from convneur.data.prepare.parallel import in_parallel
from convneur.data.prepare.tiling import (
    FORECAST_IMAGES,
    forecast,
    forget_parts,
    require_tiling,
    scan_tiled_shard,
    summary,
    write_tiled_shard,
)
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.tar import TarStore

EXTENSION = "jpg"
SHARD_SAMPLES = 1000


class Samples(Protocol):
    """N samples that any process can make or read by number."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, number: int) -> Sample:
        """Sample 0..N-1."""


class Shards(Protocol):
    """The shards of a split, which any process can make by number."""

    @property
    def sizes(self) -> Sequence[int]:
        """Samples in each."""

    @property
    def copied(self) -> Split | None:
        """What they are a copy of, whose denylist and stream they share; None where they are no copy."""

    def samples(self, number: int) -> Iterator[Sample]:
        """Samples of a shard, in their order."""

    def originals(self, number: int) -> np.ndarray | None:
        """What a shard's samples were before, see `write_tiled_shard`; None where they are the originals."""


class Part(NamedTuple):
    """Share `number` of `of`, counted from 1, as the jobs of a Slurm array are."""

    number: int
    of: int


class Chunks:
    """Shards of `shard_samples` each; the last has the rest."""

    copied = None

    def __init__(self, samples: Samples, shard_samples: int):
        self._samples, self._shard_samples = samples, shard_samples
        firsts = range(0, len(samples), shard_samples)
        self.sizes = [min(shard_samples, len(samples) - first) for first in firsts]

    def samples(self, number: int) -> Iterator[Sample]:
        """Samples of a shard, in their order."""
        first = number * self._shard_samples
        return (self._samples[sample] for sample in range(first, first + self.sizes[number]))

    def originals(self, _: int) -> None:
        """None: they are the originals."""


class Task(NamedTuple):
    """How a dataset is to be written.

    Attributes:
        out: the dataset's folder.
        processes: how many work at a time.
        part: write this share of the shards only; without, write what is missing, then index and manifest.
        format: "tar" for shards, "ffcv" for betons, or "both". Betons are written from shards, which are removed then
            unless they were asked for, or were there before.
        pixels: what betons hold; see `convneur.data.prepare.betons.add_betons`.
        tiles: coding units between restart markers that JPEGs are rewritten with; 0 leaves them as they are.
        say: takes a line about tiling.
    """

    out: Path
    processes: int
    part: Part | None = None
    format: Format = "tar"
    pixels: Pixels = "jpg"
    tiles: int = 0
    say: Callable[[str], object] = print


def prepare(task: Task, source: str, plan: str, classes: tuple[str, ...], splits: Mapping[str, Shards]) -> bool:
    """Writes a dataset of JPEGs, or what is missing of it.

    Args:
        task: where and how.
        source: what it is prepared from, a subcommand of `convneur prepare`.
        plan: hash of all that decides on the content of the shards, but for `task.tiles`.
        classes: class names; a label is a position among them.
        splits: shards by name of split, in the order they are written in.

    Returns:
        False if the dataset was there, complete.

    Raises:
        InputError: `task.out` holds something else, or can't be written to; or what was there has lost a file; or tiles
            are asked for and can't be made here.
    """
    out, part = task.out, task.part
    if task.tiles:
        require_tiling(task.tiles)
        plan = f"{plan} tiles {task.tiles}"
    with claimed(out, source, plan, shared=part is not None) as fresh:
        if not fresh:
            _check_same(task, splits)
            check_files(out, task.format)
            forget_parts(out)
            return part is None and add_betons(out, task.format, task.pixels, task.processes)
        entries = {split: write_shards(task, split, shards) for split, shards in splits.items()}
        if part is None:
            complete = {split: entry for split, entry in entries.items() if entry}
            Manifest(source, classes, complete, has_shards=task.format != "ffcv").write(out)
            forget_parts(out)
            add_betons(out, task.format, task.pixels, task.processes)
    return True


def _check_same(task: Task, splits: Mapping[str, Shards]) -> None:
    """Refuses a complete dataset with other splits, or with JPEGs in another form, than those to be written."""
    there = Manifest.read(task.out, unfinished=True).splits
    if there.keys() != splits.keys():
        raise InputError(
            f"{task.out} holds split {' and '.join(sorted(there))}, not {' and '.join(sorted(splits))}: give --out "
            "another folder"
        )
    for split, entry in there.items():
        found, wanted = (
            f"with --tiles {n}" if n else "without --tiles"
            for n in (entry.tiles.mcus if entry.tiles else 0, task.tiles)
        )
        if found != wanted:
            raise InputError(f"{task.out}, split {split}, was written {found}, not {wanted}: give --out another folder")


def write_shards(task: Task, split: str, shards: Shards) -> Split | None:
    """Writes a split's shards into a folder that is claimed.

    Args:
        task: where and how; of the formats, shards alone are written.
        split: its name.
        shards: what they hold.

    Returns:
        Its entry in the manifest, where there are all shards and an index; None for a part.

    Raises:
        InputError: a sample can't be read; the disk is full; what is there belongs to something else.
    """
    paths = [shard_path(task.out, split, number) for number in range(len(shards.sizes))]
    mine = range(len(paths)) if task.part is None else range(task.part.number - 1, len(paths), task.part.of)
    missing = [number for number in mine if not paths[number].exists()]
    sizes = [shards.sizes[number] for number in missing]
    if task.tiles and missing:
        first = [sample.image for sample in islice(shards.samples(missing[0]), FORECAST_IMAGES)]
        task.say(f"{split}: {forecast(first, task.tiles, sum(sizes))}")
    began = time.monotonic()
    seconds = in_parallel(
        partial(_write, paths, shards, task.tiles),
        missing,
        task.processes,
        what=f"writing {split}",
        unit="images",
        sizes=sizes,
    )
    if task.tiles and missing:
        rate = sum(sizes) / max(sum(seconds), 1e-9)
        task.say(f"{split}: {sum(sizes):,} images in {time.monotonic() - began:.0f} s, {rate:,.0f} a CPU-second")
    return None if task.part else _index(task, split, shards, paths)


def _index(task: Task, split: str, shards: Shards, paths: list[Path]) -> Split:
    """Writes the index of a split, and what became of its originals; returns its entry in the manifest."""
    scan = partial(in_parallel, tasks=paths, processes=task.processes, unit="images", sizes=shards.sizes)
    what = f"indexing {split}"
    if not task.tiles:
        return write_index(task.out, split, scan(_scan, what=what))
    found = scan(scan_tiled_shard, what=what)
    originals = np.concatenate([rows for _, rows in found])
    entry = write_index(task.out, split, [scanned for scanned, _ in found])
    entry = replace(entry, tiles=write_originals(task.out, split, task.tiles, originals))
    index = read_index(task.out, split, entry)
    denied = shards.copied.denied if shards.copied else ()
    rows = [sample.row for sample in denied]
    entry = replace(entry, denied=denied, index_hash=content_hash(np.delete(index, rows), np.delete(originals, rows)))
    if shards.copied and entry.index_hash != shards.copied.index_hash:
        raise InputError(
            f"{task.out}, split {split}, has other samples than what it was copied from: remove it and tile again"
        )
    task.say(f"{split}: {summary(entry, index)}")
    return entry


def check_files(folder: Path, format: Format) -> None:
    """Checks a dataset that is there already, but for its images: files, their sizes, index and tables.

    Args:
        folder: the dataset's.
        format: with "tar", betons aren't looked at.

    Raises:
        InputError: the first file that is missing or isn't as it was written.
    """
    manifest = Manifest.read(folder, unfinished=True)
    if not manifest.is_complete:
        return
    for name, split in manifest.splits.items():
        if manifest.has_shards:
            TarStore(folder, name)
        if split.beton and format != "tar":
            BetonStore(folder, name)


def _write(paths: list[Path], shards: Shards, tiles: int, number: int) -> float:
    """Writes a shard; returns the seconds of processor time that it took."""
    began = time.process_time()
    if tiles:
        write_tiled_shard(paths[number], shards.samples(number), EXTENSION, tiles, shards.originals(number))
    else:
        write_shard(paths[number], shards.samples(number), EXTENSION)
    return time.process_time() - began


def _scan(path: Path) -> Scan:
    return scan_shard(path, path.name)
