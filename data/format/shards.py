"""WebDataset shards with an index beside them.

A dataset is a folder:

    train-000000.tar ...   shards in WebDataset's naming: KEY.png (jpg, ...) and KEY.cls for each sample
    train.index.npy        one `INDEX_FIELDS` row a sample, shard by shard
    manifest.json          classes, splits, shards, sizes and checksums; written last, so it vouches for the rest

`convneur.data.stores.beton` describes the files in FFCV's format that may lie beside the shards, or instead of them.
Shards that somebody else wrote stay where they are: their names are absolute paths or URLs then. While a dataset is
being written, the file `preparing` stands there instead of the manifest.
Offsets are positions in the tar files, so that any sample is one `pread` away.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_origin

import google_crc32c
import numpy as np
import webdataset

from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync
from convneur.data.format.selection import Tally
from convneur.data.format.tar import LABEL_EXTENSION, read_samples

MANIFEST = "manifest.json"
UNFINISHED = "preparing"
FORMAT = 1
CHECKSUM = "crc32c"
COUNTED_AT_ONCE = 1 << 20
INDEX_FIELDS = [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4"), ("crc32c", "<u4")]

T = TypeVar("T")

_RESTORE = "restore it, or remove {} and prepare it again"


class Sample(NamedTuple):
    """An encoded image, its class, and the name it goes by within its split."""

    key: str
    image: bytes
    label: int


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        name: in the dataset's folder.
        size: in bytes.
        crc32c: checksum of the file.
        samples: how many it holds.
    """

    name: str
    size: int
    crc32c: int
    samples: int


@dataclass(frozen=True)
class Denied:
    """A sample that no stream shows, because it can't be read.

    Attributes:
        row: its number in the index.
        key: its name.
        reason: what is wrong with it, in one line.
    """

    row: int
    key: str
    reason: str


@dataclass(frozen=True)
class Beton:
    """A file in FFCV's format with the samples of a split, in the order of the index.

    Attributes:
        size: in bytes.
        pixels: "jpg" if it holds original JPEGs, "raw" if it holds pixels.
        head: where its table of samples ends.
        table: where its table of allocations begins, which goes on to the end.
        tables_crc32c: checksum of what is before `head` and after `table`.
        checksums_crc32c: checksum of the file with the samples' checksums.
    """

    size: int
    pixels: str
    head: int
    table: int
    tables_crc32c: int
    checksums_crc32c: int


@dataclass(frozen=True)
class Split:
    """A part of a dataset.

    Attributes:
        shards: in the order of the index; they say what lies together even where the dataset is in FFCV's format alone.
        index_crc32c: checksum of the index file.
        index_hash: what a stream of samples depends on, 32 hexadecimal digits; see `content_hash`.
        denied: samples that `convneur data verify` found bad, by row. They count as absent.
        beton: the split in FFCV's format; None if it isn't there.
    """

    shards: tuple[Shard, ...]
    index_crc32c: int
    index_hash: str
    denied: tuple[Denied, ...] = ()
    beton: Beton | None = None

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Split":
        """Undo `asdict`."""
        parts = {
            "shards": tuple(_typed(Shard, shard) for shard in values["shards"]),
            "denied": tuple(_typed(Denied, denied) for denied in values.get("denied", ())),
            "beton": _typed(Beton, values["beton"]) if values.get("beton") else None,
        }
        return _typed(Split, {**values, **parts})


def _typed(kind: Callable[..., T], values: dict[str, Any]) -> T:
    """A dataclass whose fields have the types they are declared with, containers without their contents."""
    for field in fields(kind):  # type: ignore[arg-type]  # it is a dataclass
        origin, value = get_origin(field.type), values[field.name]
        declared: Any = origin if origin in (tuple, dict) else field.type
        if not isinstance(value, declared) or (isinstance(value, bool) and declared is int):
            raise TypeError(f"{field.name} is {value!r}")
    return kind(**values)


@dataclass(frozen=True)
class Manifest:
    """What a dataset's folder holds.

    Attributes:
        source: what it was prepared from, a subcommand of `convneur prepare`.
        classes: class names; a label is a position among them.
        splits: the parts by name.
        has_shards: whether the shards are there; False where the dataset is in FFCV's format alone.
    """

    source: str
    classes: tuple[str, ...]
    splits: dict[str, Split]
    has_shards: bool = True

    @property
    def is_complete(self) -> bool:
        """Whether all splits can be read; False while the betons that shall replace the shards are being written."""
        return self.has_shards or all(split.beton for split in self.splits.values())

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, which makes the dataset complete."""
        content = {"format": FORMAT, **asdict(self)}
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps({**content, CHECKSUM: _json_crc32c(content)}, indent=1).encode())
        (folder / UNFINISHED).unlink(missing_ok=True)
        fsync(folder)

    @classmethod
    def read(cls, folder: Path, *, unfinished: bool = False) -> "Manifest":
        """Read the manifest of the dataset in `folder`.

        Args:
            folder: the dataset's.
            unfinished: whether to take one that isn't `is_complete`.

        Raises:
            InputError: there is no folder, no manifest in it, or one of another format.
        """
        path = folder / MANIFEST
        content = _read_manifest(folder)
        try:
            if content["format"] != FORMAT:
                raise InputError(f"{path} has format {content['format']}, not {FORMAT}: prepare the dataset again")
            checksum = content.pop(CHECKSUM, None)  # older ones have none
            if checksum not in (None, _json_crc32c(content)):
                raise ValueError("it is not as it was written")
            if unknown := content.keys() - {"format", *(field.name for field in fields(cls))}:
                raise ValueError(f"unknown key {min(unknown)!r}")
            if not (isinstance(content["classes"], list) and all(isinstance(name, str) for name in content["classes"])):
                raise TypeError("the classes are no list of names")
            parts = {
                "classes": tuple(content["classes"]),
                "splits": {name: Split.from_json(split) for name, split in content["splits"].items()},
                "has_shards": content.get("has_shards", True),
            }
            manifest = _typed(cls, {"source": content["source"], **parts})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error!r}): {_RESTORE.format(folder)}") from None
        if not (manifest.is_complete or unfinished):
            raise InputError(f"{folder} holds no complete dataset yet: repeat the `convneur prepare` that began it")
        return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What `folder`'s manifest holds, whatever that means.

    Raises:
        InputError: there is no folder, no manifest in it, or it is not an object in JSON.
    """
    path = folder / MANIFEST
    try:
        if not path.exists():
            what = f"holds no complete dataset (no {MANIFEST})" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {what}: write one with `convneur prepare SOURCE --out {folder}`")
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): {_RESTORE.format(folder)}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): see to the disk or the access rights") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (it is no JSON object): {_RESTORE.format(folder)}")
    return content


def read_source(folder: Path) -> str:
    """What the manifest in `folder` says that its dataset was prepared from, whatever else it says.

    Raises:
        InputError: there is no folder, no manifest in it, or it is not an object in JSON.
    """
    return str(_read_manifest(folder).get("source"))


def _json_crc32c(content: dict[str, Any]) -> int:
    """CRC-32C of what a manifest says, however it is laid out."""
    return int(google_crc32c.value(json.dumps(content, sort_keys=True).encode()))


def index_path(folder: Path, split: str) -> Path:
    """Where the index of `split` lies."""
    return folder / f"{split}.index.npy"


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where a shard lies, in WebDataset's naming."""
    return folder / f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample], extension: str) -> None:
    """Write a WebDataset shard, whole or not at all. The same samples give the same bytes.

    Args:
        path: where to; `shard_path` names it.
        samples: in the order they shall have.
        extension: file extension of the images, one of `convneur.data.format.selection.IMAGE_EXTENSIONS`.
    """
    with (
        atomic_write(path) as file,
        webdataset.TarWriter(file, user="root", group="root", mtime=0, compress=False, encoder=False) as writer,
    ):
        for sample in samples:
            label = str(sample.label).encode()
            writer.write({"__key__": sample.key, extension: sample.image, LABEL_EXTENSION: label})


def write_split(folder: Path, split: str, samples: Iterable[Sample], *, extension: str, shard_samples: int) -> Split:
    """Write `samples` as shards of `shard_samples` each, and their index.

    Args:
        folder: the dataset's folder, which exists.
        split: name of the split, the first part of the shards' names.
        samples: in the order they shall have; at least one.
        extension: file extension of the images, one of `convneur.data.format.selection.IMAGE_EXTENSIONS`.
        shard_samples: samples a shard; the last has the rest.

    Returns:
        The split's entry in the manifest.
    """
    iterator = iter(samples)
    paths: list[Path] = []
    while chunk := list(islice(iterator, shard_samples)):
        paths.append(shard_path(folder, split, len(paths)))
        write_shard(paths[-1], chunk, extension)
    return index_split(folder, split, paths)


def index_split(folder: Path, split: str, paths: Sequence[Path]) -> Split:
    """Write the index of `split` from the shards themselves, which lie at `paths` in `folder`.

    Returns:
        The split's entry in the manifest.

    Raises:
        InputError: a shard can't be read to its end, or a sample in it lacks its image or its label.
    """
    return write_index(folder, split, [scan_shard(path, path.name) for path in paths])


class Scan(NamedTuple):
    """A shard, (samples,) rows of its index, whose "shard" is still 0, and what of its files is in them."""

    shard: Shard
    rows: np.ndarray
    tally: Tally


def scan_shard(path: Path, name: str) -> Scan:
    """Read a shard at `path` from end to end.

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


def write_index(folder: Path, split: str, scans: Sequence[Scan]) -> Split:
    """Write the index of `split` from its shards' rows.

    Returns:
        The split's entry in the manifest.
    """
    key_type = max((scan.rows.dtype["key"] for scan in scans), key=lambda dtype: dtype.itemsize)
    index = np.concatenate([scan.rows.astype([*INDEX_FIELDS, ("key", key_type)]) for scan in scans])
    index["shard"] = np.repeat(np.arange(len(scans)), [len(scan.rows) for scan in scans])
    with atomic_write(index_path(folder, split)) as file:
        np.save(file, index)
    return Split(tuple(scan.shard for scan in scans), file_crc32c(index_path(folder, split)), content_hash(index))


def read_index(folder: Path, name: str, split: Split) -> np.ndarray:
    """Map the index of `split`, called `name`, into memory, which ranks of a node then share.

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
        raise InputError(f"{folder / MANIFEST} is damaged (split '{name}' {fault}): {_RESTORE.format(folder)}")
    return index


def count(numbers: np.ndarray, values: int) -> np.ndarray:
    """How often each of 0..values-1, or more, stands in a field of the index, which is never copied as a whole."""
    largest = int(numbers.max(initial=0))
    counts = np.zeros(max(values, largest + 1), dtype=np.int64)
    for first in range(0, len(numbers), COUNTED_AT_ONCE):
        counts += np.bincount(numbers[first : first + COUNTED_AT_ONCE], minlength=len(counts))
    return counts


def content_hash(index: np.ndarray) -> str:
    """Hash what a stream of samples depends on: shards, keys, labels and images, but not their places in the files."""
    digest = blake2b(digest_size=16)
    for name in ("shard", "label", "crc32c", "key"):
        digest.update(np.ascontiguousarray(index[name]).tobytes())
    return digest.hexdigest()


def file_crc32c(path: Path) -> int:
    """CRC-32C of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = google_crc32c.extend(checksum, block)
    return checksum
