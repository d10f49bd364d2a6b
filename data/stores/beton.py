"""Datasets in FFCV's format: written from the shards, and read as a store.

    train.beton                FFCV's fields "image" (RGBImageField) and "label" (IntField), in the order of the index
    train.beton.crc32c.npy     (samples,) uint32: checksum of what the beton holds of each image

JPEGs are stored as they are. What FFCV's decoder doesn't take (other formats, CMYK) is stored as the pixels that
`decode` makes of it, with `pixels="raw"` all is. So a beton gives the pixels of the shards it was written from, to the
bit. What can't be decoded is stored as it is too, for whoever reads it to find.

FFCV's own writer re-encodes images, lays them out in another order each time and hangs where one can't be encoded;
this one shares its types only.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import google_crc32c
import numpy as np
import simplejpeg
import torch

from convneur.data.errors import InputError, SampleError
from convneur.data.files import atomic_write, fsync
from convneur.data.format.shards import Beton, Manifest, Sample, Shard, Split, file_crc32c, read_index
from convneur.data.prepare.parallel import in_parallel
from convneur.data.stores.addresses import is_remote
from convneur.data.stores.retry import retrying
from convneur.data.stores.store import IndexedStore, Subset
from convneur.data.views.transforms import decode, decoding_fault, plain_jpeg_size

Pixels = Literal["jpg", "raw"]
Format = Literal["tar", "ffcv", "both"]

JPG, RAW = 0, 1
"""FFCV's numbers for how an image is stored."""
SMALLEST_PAGE = 1 << 23
LARGEST_PAGE = 1 << 31
BLOCK = 1 << 20
LARGEST_SIDE = (1 << 16) - 1
STORED_FIELDS = [("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("size", "<u8")]


def beton_path(folder: Path, split: str) -> Path:
    """Where a split in FFCV's format lies."""
    return folder / f"{split}.beton"


def checksums_path(folder: Path, split: str) -> Path:
    """Where the checksums of a beton's images lie."""
    return folder / f"{split}.beton.crc32c.npy"


def require_ffcv() -> None:
    """Import FFCV, which takes seconds.

    Raises:
        InputError: it isn't installed, or doesn't load.
    """
    threads = torch.get_num_threads()
    try:
        import_module("ffcv.loader")
    except (ImportError, OSError) as error:
        raise InputError(
            f"FFCV is not installed here, or doesn't load ({error}): install OpenCV and libturbojpeg (apt-get install "
            "g++ pkg-config libopencv-dev libturbojpeg0-dev) and run `make setup`, or do without FFCV"
        ) from None
    finally:
        torch.set_num_threads(threads)  # FFCV sets it to 1


def add_betons(folder: Path, format: Format, pixels: Pixels, processes: int) -> bool:
    """Write the betons that the dataset in `folder` lacks, and remove its shards where they were but a means.

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
    """Write a split's beton and its checksums; the checksums last."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

    index = read_index(folder, name, split)
    if any(is_remote(shard.name) for shard in split.shards):
        raise InputError(f"{folder} has shards on servers: a beton is written from shards on disk only")
    source = _Source(folder, split.shards, index, frozenset(denied.row for denied in split.denied))
    shards = range(len(split.shards))
    sizes = [shard.samples for shard in split.shards]
    inspected = in_parallel(
        partial(_inspect, source, pixels), shards, processes, what=f"inspecting {name}", unit="images", sizes=sizes
    )
    stored = np.concatenate(inspected)

    fields = {"image": RGBImageField(), "label": IntField()}
    descriptors = np.zeros(len(fields), FieldDescType)
    for descriptor, field_name, type_id in zip(descriptors, fields, (2, 1), strict=True):  # see ffcv.types
        descriptor["type_id"] = type_id
        descriptor["name"][: len(field_name)] = list(field_name.encode())
    head = HeaderType.itemsize + descriptors.nbytes + len(index) * get_metadata_type(list(fields.values())).itemsize
    page = SMALLEST_PAGE
    while page < stored["size"].max():
        page *= 2
    if page > LARGEST_PAGE:
        raise InputError(f"{index['key'][stored['size'].argmax()].decode()} is too large an image for FFCV's format")
    places, table = _lay_out(stored["size"], -(-head // page) * page, page)

    header = np.zeros((), HeaderType)
    header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page
    header["num_samples"], header["alloc_table_ptr"] = len(index), table
    metadata = np.zeros(len(index), get_metadata_type(list(fields.values())))
    for field_name in ("mode", "width", "height"):
        metadata["f0"][field_name] = stored[field_name]
    metadata["f0"]["data_ptr"], metadata["f1"] = places, index["label"]
    allocations = np.zeros(len(index), ALLOC_TABLE_TYPE)
    allocations["sample_id"], allocations["ptr"], allocations["size"] = np.arange(len(index)), places, stored["size"]
    tables = header.tobytes() + descriptors.tobytes() + metadata.tobytes(), allocations.tobytes()

    with atomic_write(beton_path(folder, name)) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, table + allocations.nbytes)
        except OSError as error:
            raise InputError(f"{file.name} can't get its {table + allocations.nbytes} bytes ({error})") from None
        for content, place in zip(tables, (0, table), strict=True):
            file.seek(place)
            file.write(content)
        file.flush()
        checksums = in_parallel(
            partial(_copy, source, stored, places, file.name),
            shards,
            processes,
            what=f"writing {name}.beton",
            unit="images",
            sizes=sizes,
        )
    with atomic_write(checksums_path(folder, name)) as file:
        np.save(file, np.concatenate(checksums))
    return Beton(
        size=table + allocations.nbytes,
        pixels=pixels,
        head=head,
        table=table,
        tables_crc32c=google_crc32c.value(b"".join(tables)),
        checksums_crc32c=file_crc32c(checksums_path(folder, name)),
    )


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
    """Place images one after the other from byte `first` on, none of them across the edge of a page.

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
    """Write the images of a shard to their places; returns their checksums."""
    checksums = []
    with Path(path).open("r+b") as file:
        for row, image in zip(source.rows(shard), source.images(shard), strict=True):
            content = image if stored["mode"][row] == JPG else decode(image).tobytes()
            file.seek(int(places[row]))
            file.write(content)
            checksums.append(google_crc32c.value(content))
    return np.array(checksums, np.uint32)


class BetonStore(IndexedStore):
    """A split in FFCV's format, as `convneur prepare --format ffcv` writes it: the samples of its shards.

    Stored JPEGs are handed out as they are, stored pixels as PPM files. The shards are those that the beton was written
    from, so order and stream are theirs.

    Args:
        root: folder of the dataset.
        split: "train", "val" or whatever was prepared.
        subset: what of it is used; None for all.

    Raises:
        InputError: FFCV isn't installed; there is no such beton; one of its files is missing, or has another size or
            checksum than the manifest says.
    """

    def __init__(self, root: str | Path, split: str, subset: Subset | None = None):
        super().__init__(root, split, subset)
        beton = self._entry.beton
        if beton is None:
            raise InputError(f"{root} has no {split}.beton: repeat its `convneur prepare` with --format ffcv")
        require_ffcv()
        from ffcv.reader import Reader

        self.path = beton_path(self._root, split)
        checksums = checksums_path(self._root, split)
        for path, fault in ((self.path, _tables_fault(self.path, beton)), (checksums, _file_fault(checksums, beton))):
            if fault:
                raise InputError(f"{path} {fault}: {self._remedy} --format ffcv")
        self._checksums = np.load(checksums, mmap_mode="r")
        reader = Reader(str(self.path))
        self.images = reader.metadata["f0"]
        self._sizes = reader.alloc_table["size"]
        self._descriptor: int | None = None

    def __reduce__(self) -> tuple[type["BetonStore"], tuple[Path, str, Subset | None]]:
        return BetonStore, (self._root, self._split, self._subset)

    def read(self, sample: int) -> Sample:
        """Read a sample.

        Raises:
            SampleError: its bytes aren't those that were written.
            InputError: the file can't be opened or read, or ends before the sample does, and goes on so.
        """
        row = self.row(sample)
        image, entry = self._content(sample), self.images[row]
        if entry["mode"] == RAW:
            image = b"P6 %d %d 255\n" % (entry["width"], entry["height"]) + image
        return Sample(self._index[row]["key"].decode(), image, int(self._index[row]["label"]))

    def _content(self, sample: int) -> bytes:
        row = self.row(sample)
        content = self._pread(row)
        if not self._matches(row, content):
            raise SampleError(f"{self.where(sample)}: checksum mismatch, the file is damaged: {self._remedy}")
        return content

    def is_intact(self, sample: int) -> bool:
        """Whether the beton holds of a sample what was written; raises `InputError` where `read` does."""
        row = self.row(sample)
        return self._matches(row, self._pread(row))

    def fault(self, row: int) -> str:
        """Why the image of a row of the index, denied or not, can't be read; empty if it can."""
        content = self._pread(row)
        if not self._matches(row, content):
            return "checksum mismatch"
        if self.images[row]["mode"] == JPG:
            return decoding_fault(content)
        return ""

    def gaps_fault(self) -> str:
        """A line if there is something between tables and images, where nothing was written; empty if not."""
        assert self._entry.beton is not None
        places = self.images["data_ptr"].astype(np.int64)
        begins = np.concatenate([[self._entry.beton.head], places + self._sizes.astype(np.int64)])
        with self.path.open("rb", buffering=0) as file:
            for begin, end in zip(begins.tolist(), [*places.tolist(), self._entry.beton.table], strict=True):
                file.seek(begin)
                for block in range(begin, end, BLOCK):
                    if any(file.read(min(BLOCK, end - block))):
                        return f"{self.path.name}: not the bytes that were written, between two images"
        return ""

    def prefetch(self, samples: np.ndarray) -> None:
        """Nothing: the file is on a disk."""

    def where(self, sample: int) -> str:
        """Name the split, file and key of a sample."""
        return f"{self.path}, split {self._split}, key {self._index[self.row(sample)]['key'].decode()}"

    def _matches(self, row: int, content: bytes) -> bool:
        return bool(google_crc32c.value(content) == self._checksums[row])

    def _pread(self, row: int) -> bytes:
        size, place = int(self._sizes[row]), int(self.images[row]["data_ptr"])

        def pread() -> bytes:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                content = os.pread(self._descriptor, size, place)
            except OSError:
                os.close(self._descriptor)
                self._descriptor = None
                raise
            if len(content) < size:
                raise OSError(f"it ends within the sample at byte {place}")
            return content

        return retrying(pread, str(self.path), OSError)

    def __del__(self) -> None:
        descriptor: int | None = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def _tables_fault(path: Path, beton: Beton) -> str:
    """What is wrong with a beton's size or its tables; empty if nothing is. The images aren't looked at."""
    size = path.stat().st_size if path.is_file() else None
    if size != beton.size:
        return "is missing" if size is None else f"has {size} bytes, not {beton.size}"
    with path.open("rb") as file:
        checksum = google_crc32c.value(file.read(beton.head))
        file.seek(beton.table)
        checksum = google_crc32c.extend(checksum, file.read())
    return "" if checksum == beton.tables_crc32c else "has other tables than when it was written, it is damaged"


def _file_fault(path: Path, beton: Beton) -> str:
    if not path.is_file():
        return "is missing"
    return "" if file_crc32c(path) == beton.checksums_crc32c else "does not match the manifest"
