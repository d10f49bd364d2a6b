"""Datasets in FFCV's format, written from the shards.

FFCV's own writer re-encodes images, lays them out in another order each time and hangs where one can't be encoded;
this one shares its types only.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import google_crc32c
import numpy as np
import simplejpeg

from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync
from convneur.data.format.beton import JPG, RAW, beton_path, checksums_path
from convneur.data.format.index import read_index
from convneur.data.format.manifest import Beton, Manifest, Shard, Split, file_crc32c
from convneur.data.prepare.parallel import in_parallel
from convneur.data.stores.addresses import is_remote
from convneur.data.stores.beton import require_ffcv
from convneur.data.views.decode import decode, plain_jpeg_size

Pixels = Literal["jpg", "raw"]
Format = Literal["tar", "ffcv", "both"]
SMALLEST_PAGE = 1 << 23
LARGEST_PAGE = 1 << 31
LARGEST_SIDE = (1 << 16) - 1
STORED_FIELDS = [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("size", "<u8")]


def add_betons(folder: Path, format: Format, pixels: Pixels, processes: int) -> bool:
    """Writes the betons that the dataset in `folder` lacks, and removes its shards where they were but a means.

    Args:
        folder: the dataset's; its shards and index are complete.
        format: "tar" needs no betons; with the others, betons that are there already stay.
        pixels: "jpg" keeps the original JPEGs, "raw" stores pixels.
        processes: how many work at a time.

    Returns:
        False if nothing was missing.

    Raises:
        InputError: the dataset isn't in that format and can't be; a shard is damaged; the disk is full.
    """
    manifest = Manifest.read(folder, unfinished=True)
    if format != "ffcv" and not manifest.has_shards:
        raise InputError(f"{folder} holds the dataset in FFCV's format alone: give --out another folder, or remove it")
    if format == "tar":
        return False
    require_ffcv()
    written = False
    for name, split in manifest.splits.items():
        if split.beton is None:
            beton = _write_beton(folder, name, split, pixels, processes)
            manifest = replace(manifest, splits=manifest.splits | {name: replace(split, beton=beton)})
            manifest.write(folder)
            written = True
        elif split.beton.pixels != pixels:
            raise InputError(
                f"{beton_path(folder, name)} was written with --beton-pixels {split.beton.pixels}: give --out another "
                "folder, or remove it"
            )
    if not manifest.has_shards:
        for split in manifest.splits.values():
            for shard in split.shards:
                (folder / shard.name).unlink(missing_ok=True)
        fsync(folder)
    return written


def _write_beton(folder: Path, name: str, split: Split, pixels: Pixels, processes: int) -> Beton:
    """Writes a split's beton and its checksums; the checksums last."""
    index = read_index(folder, name, split)
    if any(is_remote(shard.name) for shard in split.shards):
        raise InputError(f"{folder} has shards on servers: a beton is written from shards on disk only")
    source = _Source(folder, split.shards, index, frozenset(denied.row for denied in split.denied))
    on_shards = partial(in_parallel, tasks=range(len(split.shards)), processes=processes, unit="images")
    sizes = [shard.samples for shard in split.shards]
    stored = np.concatenate(on_shards(partial(_inspect, source, pixels), what=f"inspecting {name}", sizes=sizes))
    layout = _Layout.of(index, stored)
    with atomic_write(beton_path(folder, name)) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, layout.size)
        except OSError as error:
            raise InputError(f"{file.name} can't get its {layout.size} bytes ({error})") from None
        for content, place in zip(layout.tables, (0, layout.table), strict=True):
            file.seek(place)
            file.write(content)
        file.flush()
        copy = partial(_copy, source, stored, layout.places, file.name)
        checksums = on_shards(copy, what=f"writing {name}.beton", sizes=sizes)
    with atomic_write(checksums_path(folder, name)) as file:
        np.save(file, np.concatenate(checksums))
    return Beton(
        size=layout.size,
        pixels=pixels,
        head=layout.head,
        table=layout.table,
        tables_crc32c=google_crc32c.value(b"".join(layout.tables)),
        checksums_crc32c=file_crc32c(checksums_path(folder, name)),
    )


class _Layout(NamedTuple):
    """What a beton holds besides images, and where everything lies, in bytes from its beginning.

    Attributes:
        head: where the table of samples ends.
        places: where the images begin, (samples,) uint64.
        table: where the table of allocations begins, which goes on to the end.
        tables: what is before `head`, and what is after `table`.
    """

    head: int
    places: np.ndarray
    table: int
    tables: tuple[bytes, bytes]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.table + len(self.tables[1])

    @classmethod
    def of(cls, index: np.ndarray, stored: np.ndarray) -> "_Layout":
        """Lays out the samples of an index, whose images are to be `stored`, (samples,) of `STORED_FIELDS`."""
        from ffcv.fields import IntField, RGBImageField
        from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

        fields = {"image": RGBImageField(), "label": IntField()}
        descriptors = np.zeros(len(fields), FieldDescType)
        for descriptor, field_name, type_id in zip(descriptors, fields, (2, 1), strict=True):  # see ffcv.types
            descriptor["type_id"] = type_id
            descriptor["name"][: len(field_name)] = list(field_name.encode())
        metadata = np.zeros(len(index), get_metadata_type(list(fields.values())))
        head = HeaderType.itemsize + descriptors.nbytes + metadata.nbytes
        page = _page_size(index, stored)
        places, table = _lay_out(stored["size"], -(-head // page) * page, page)

        header = np.zeros((), HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page
        header["num_samples"], header["alloc_table_ptr"] = len(index), table
        for field_name in ("mode", "width", "height"):
            metadata["f0"][field_name] = stored[field_name]
        metadata["f0"]["data_ptr"], metadata["f1"] = places, index["label"]
        allocations = np.zeros(len(index), ALLOC_TABLE_TYPE)
        allocations["sample_id"], allocations["ptr"] = np.arange(len(index)), places
        allocations["size"] = stored["size"]
        head_table = header.tobytes() + descriptors.tobytes() + metadata.tobytes()
        return cls(head, places, table, (head_table, allocations.tobytes()))


def _page_size(index: np.ndarray, stored: np.ndarray) -> int:
    """Bytes of a page: a power of 2 that the largest image fits into."""
    page = SMALLEST_PAGE
    while page < stored["size"].max():
        page *= 2
    if page > LARGEST_PAGE:
        raise InputError(f"{index['key'][stored['size'].argmax()].decode()} is too large an image for FFCV's format")
    return page


class _Source:
    """The shards that a beton is written from."""

    def __init__(self, folder: Path, shards: Sequence[Shard], index: np.ndarray, denied: frozenset[int]):
        self._paths = [folder / shard.name for shard in shards]
        self._index, self._denied = index, denied
        self._edges = np.searchsorted(index["shard"], np.arange(len(shards) + 1))

    def rows(self, shard: int) -> range:
        """Rows of the index that lie in a shard."""
        return range(self._edges[shard], self._edges[shard + 1])

    def images(self, shard: int) -> list[bytes]:
        """All images of a shard.

        Raises:
            InputError: one is damaged that isn't denied.
            OSError: the shard can't be read.
        """
        images = []
        with self._paths[shard].open("rb") as file:
            for row in self.rows(shard):
                entry = self._index[row]
                image = os.pread(file.fileno(), int(entry["size"]), int(entry["offset"]))
                if google_crc32c.value(image) != entry["crc32c"] and row not in self._denied:
                    raise InputError(
                        f"{self._paths[shard]}, key {entry['key'].decode()}: checksum mismatch, the file is damaged: "
                        "restore it, or let `convneur data verify` deny the image"
                    )
                images.append(image or b"\0")  # FFCV finds nothing that has no bytes
        return images


def _inspect(source: _Source, pixels: Pixels, shard: int) -> np.ndarray:
    """How the images of a shard are to be stored, (samples,) of `STORED_FIELDS`."""
    return np.array([_stored(image, pixels) for image in source.images(shard)], STORED_FIELDS)


def _stored(image: bytes, pixels: Pixels) -> tuple[int, int, int, int]:
    if pixels == "jpg" and (sides := _plain_jpeg(image)):
        return JPG, *sides, len(image)
    try:
        height, width, _ = decode(image).shape
    except ValueError:
        return JPG, 1, 1, len(image)
    if max(height, width) > LARGEST_SIDE:
        raise InputError(f"an image of {width} x {height} pixels is too large for FFCV's format")
    return RAW, width, height, 3 * height * width


def _plain_jpeg(image: bytes) -> tuple[int, int] | None:
    """Width and height of an intact JPEG in one of the colour spaces that FFCV's decoder takes; None for others."""
    try:
        if (sides := plain_jpeg_size(image)) is None:
            return None
        simplejpeg.decode_jpeg(image)
    except ValueError:
        return None
    return sides[1], sides[0]


def _lay_out(sizes: np.ndarray, first: int, page: int) -> tuple[np.ndarray, int]:
    """Places images one after the other from byte `first` on, none of them across the edge of a page.

    Returns:
        Their places, (samples,) uint64, and where the last page ends.
    """
    places, place = [], first
    for size in sizes.tolist():
        if place // page != (place + size - 1) // page:
            place = -(-place // page) * page
        places.append(place)
        place += size
    return np.array(places, np.uint64), -(-place // page) * page


def _copy(source: _Source, stored: np.ndarray, places: np.ndarray, path: str, shard: int) -> np.ndarray:
    """Writes the images of a shard to their places; returns their checksums."""
    checksums = []
    with Path(path).open("r+b") as file:
        for row, image in zip(source.rows(shard), source.images(shard), strict=True):
            content = image if stored["mode"][row] == JPG else decode(image).tobytes()
            file.seek(int(places[row]))
            file.write(content)
            checksums.append(google_crc32c.value(content))
    return np.array(checksums, np.uint32)
