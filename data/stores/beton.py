"""A split in FFCV's format, read sample by sample."""

import os
from importlib import import_module
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from convneur.data.errors import InputError, SampleError
from convneur.data.format.beton import JPG, RAW, beton_path, checksums_path
from convneur.data.format.manifest import Beton, file_crc32c
from convneur.data.format.shards import Sample
from convneur.data.stores.retry import retrying
from convneur.data.stores.store import IndexedStore, Subset

BLOCK = 1 << 20


def require_ffcv() -> None:
    """Imports FFCV, which takes seconds.

    Raises:
        InputError: it isn't installed, or doesn't load.
    """
    threads = torch.get_num_threads()
    try:
        numba = import_module("numba")
        if numba.config.NUMBA_NUM_THREADS == 1:
            # With a single thread TBB waits at the end of the process, for ever, for a worker that it doesn't have.
            numba.config.THREADING_LAYER = "workqueue"
        import_module("ffcv.loader")
    except (ImportError, OSError) as error:
        raise InputError(
            f"FFCV is not installed here, or doesn't load ({error}): install OpenCV and libturbojpeg (apt-get install "
            "g++ pkg-config libopencv-dev libturbojpeg0-dev) and run `make setup`, or do without FFCV"
        ) from None
    finally:
        torch.set_num_threads(threads)  # FFCV sets it to 1


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
        """Reads a sample.

        Raises:
            SampleError: its bytes aren't those that were written.
            InputError: the file can't be opened or read, or ends before the sample does, and goes on so.
        """
        row = self.row(sample)
        image, entry = self.intact_content(row), self.images[row]
        if image is None:
            raise SampleError(f"{self.where(sample)}: checksum mismatch, the file is damaged: {self._remedy}")
        if entry["mode"] == RAW:
            image = b"P6 %d %d 255\n" % (entry["width"], entry["height"]) + image
        proven = entry["mode"] == JPG and self.is_proven(row)
        return Sample(self._index[row]["key"].decode(), image, int(self._index[row]["label"]), bool(proven))

    def is_intact(self, sample: int) -> bool:
        """Whether the beton holds of a sample what was written; raises `InputError` where `read` does."""
        return self.intact_content(self.row(sample)) is not None

    def intact_content(self, row: int) -> bytes | None:
        """What is stored of a row of the index, denied or not: an image file, or pixels; None if it is damaged.

        Raises:
            InputError: the file can't be opened or read, or ends before the sample does, and goes on so.
        """
        content = self._pread(row)
        return content if google_crc32c.value(content) == self._checksums[row] else None

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
        """Names the split, file and key of a sample."""
        return f"{self.path}, split {self._split}, key {self._index[self.row(sample)]['key'].decode()}"

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
