"""From samples of any kind to a dataset: shards written in parallel, by one machine or by the jobs of an array.

Shards appear whole or not at all and always hold the same samples. So work that was interrupted is continued by doing
what is missing, and jobs share it by taking every Nth shard. Who comes last reads all shards back for the index.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from convneur.data.errors import InputError
from convneur.data.format.index import Scan, scan_shard, write_index
from convneur.data.format.manifest import Manifest, Split
from convneur.data.format.shards import Sample, shard_path, write_shard
from convneur.data.prepare.betons import Format, Pixels, add_betons
from convneur.data.prepare.claim import claimed
from convneur.data.prepare.parallel import in_parallel
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


class Part(NamedTuple):
    """Share `number` of `of`, counted from 1, as the jobs of a Slurm array are."""

    number: int
    of: int


def prepare(
    out: Path,
    source: str,
    plan: str,
    classes: tuple[str, ...],
    splits: Mapping[str, Samples],
    *,
    processes: int,
    part: Part | None = None,
    shard_samples: int = SHARD_SAMPLES,
    format: Format = "tar",
    pixels: Pixels = "jpg",
) -> bool:
    """Writes a dataset of JPEGs, or what is missing of it.

    Args:
        out: the dataset's folder.
        source: what it is prepared from, a subcommand of `convneur prepare`.
        plan: hash of all that decides on the content of the shards.
        classes: class names; a label is a position among them.
        splits: samples by name of split, in the order they are written in.
        processes: how many write at a time.
        part: write this share of the shards only; without, write what is missing, then index and manifest.
        shard_samples: samples a shard.
        format: "tar" for shards, "ffcv" for betons, or "both". Betons are written from shards, which are removed then
            unless they were asked for, or were there before.
        pixels: what betons hold; see `convneur.data.prepare.betons.add_betons`.

    Returns:
        False if the dataset was there, complete.

    Raises:
        InputError: `out` holds something else, or can't be written to; or what was there has lost a file.
    """
    with claimed(out, source, plan, shared=part is not None) as fresh:
        if not fresh:
            if (there := Manifest.read(out, unfinished=True).splits.keys()) != splits.keys():
                raise InputError(
                    f"{out} holds split {' and '.join(sorted(there))}, not {' and '.join(sorted(splits))}: give --out "
                    "another folder"
                )
            check_files(out, format)
            return part is None and add_betons(out, format, pixels, processes)
        entries = _write_splits(out, splits, processes, part, shard_samples)
        if part is None:
            Manifest(source, classes, entries, has_shards=format != "ffcv").write(out)
            add_betons(out, format, pixels, processes)
    return True


def _write_splits(
    out: Path, splits: Mapping[str, Samples], processes: int, part: Part | None, shard_samples: int
) -> dict[str, Split]:
    """Writes a part of the shards; or what is missing of all, and their indices, whose entries are returned then."""
    entries = {}
    for split, samples in splits.items():
        firsts = range(0, len(samples), shard_samples)
        paths = [shard_path(out, split, number) for number in range(len(firsts))]
        sizes = [min(shard_samples, len(samples) - first) for first in firsts]
        mine = range(len(paths)) if part is None else range(part.number - 1, len(paths), part.of)
        missing = [number for number in mine if not paths[number].exists()]
        in_parallel(
            partial(_write, paths, samples, shard_samples),
            missing,
            processes,
            what=f"writing {split}",
            unit="images",
            sizes=[sizes[number] for number in missing],
        )
        if part is None:
            scans = in_parallel(_scan, paths, processes, what=f"indexing {split}", unit="images", sizes=sizes)
            entries[split] = write_index(out, split, scans)
    return entries


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


def _write(paths: list[Path], samples: Samples, shard_samples: int, number: int) -> None:
    chunk = range(number * shard_samples, min((number + 1) * shard_samples, len(samples)))
    write_shard(paths[number], (samples[sample] for sample in chunk), EXTENSION)


def _scan(path: Path) -> Scan:
    return scan_shard(path, path.name)
