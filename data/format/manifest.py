"""What a dataset's folder holds, as its manifest says.

A dataset is a folder:

    train-000000.tar ...   shards in WebDataset's naming: KEY.png (jpg, ...) and KEY.cls for each sample
    train.index.npy        one `INDEX_FIELDS` row a sample, shard by shard
    manifest.json          classes, splits, shards, sizes and checksums; written last, so it vouches for the rest

`convneur.data.format.beton` describes the files in FFCV's format that may lie beside the shards, or instead of them,
`convneur.data.format.tiled` what tiled shards have besides.
Shards that somebody else wrote stay where they are: their names are absolute paths or URLs then. While a dataset is
being written, the file `preparing` stands there instead of the manifest.
Offsets are positions in the tar files, so that any sample is one `pread` away.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin

import google_crc32c

from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync

MANIFEST = "manifest.json"
UNFINISHED = "preparing"
FORMAT = 1
CHECKSUM = "crc32c"
RESTORE = "restore it, or remove {} and prepare it again"

T = TypeVar("T")


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
class Tiles:
    """How the JPEGs of a split were rewritten; see `convneur.data.format.tiled`.

    Attributes:
        mcus: coding units between restart markers, as they were asked for.
        outcomes: how many samples were tiled, and how many were kept as they were, by why.
        original_bytes: of the images before that.
        crc32c: checksum of the file that says what became of each.
    """

    mcus: int
    outcomes: dict[str, int]
    original_bytes: int
    crc32c: int


@dataclass(frozen=True)
class Split:
    """A part of a dataset.

    Attributes:
        shards: in the order of the index; they say what lies together even where the dataset is in FFCV's format alone.
        index_crc32c: checksum of the index file.
        index_hash: what a stream of samples depends on, 32 hexadecimal digits; see `content_hash`.
        denied: samples that `convneur data verify` found bad, by row. They count as absent.
        beton: the split in FFCV's format; None if it isn't there.
        tiles: how its JPEGs were rewritten; None where they are the originals.
    """

    shards: tuple[Shard, ...]
    index_crc32c: int
    index_hash: str
    denied: tuple[Denied, ...] = ()
    beton: Beton | None = None
    tiles: Tiles | None = None

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Split":
        """Undoes `asdict`."""
        parts = {
            "shards": tuple(_typed(Shard, shard) for shard in values["shards"]),
            "denied": tuple(_typed(Denied, denied) for denied in values.get("denied", ())),
            "beton": _typed(Beton, values["beton"]) if values.get("beton") else None,
            "tiles": _typed(Tiles, values["tiles"]) if values.get("tiles") else None,
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
        """Writes the manifest into `folder`, which makes the dataset complete."""
        content = {"format": FORMAT, **asdict(self)}
        with atomic_write(folder / MANIFEST) as file:
            file.write(json.dumps({**content, CHECKSUM: _json_crc32c(content)}, indent=1).encode())
        (folder / UNFINISHED).unlink(missing_ok=True)
        fsync(folder)

    @classmethod
    def read(cls, folder: Path, *, unfinished: bool = False) -> "Manifest":
        """Reads the manifest of the dataset in `folder`.

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
            raise InputError(f"{path} is damaged ({error!r}): {RESTORE.format(folder)}") from None
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
        raise InputError(f"{path} is damaged ({error}): {RESTORE.format(folder)}") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): see to the disk or the access rights") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (it is no JSON object): {RESTORE.format(folder)}")
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


def file_crc32c(path: Path) -> int:
    """CRC-32C of a file's bytes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = google_crc32c.extend(checksum, block)
    return checksum
