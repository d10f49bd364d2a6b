"""Samples of WebDataset shards, on a disk or on a server."""

import errno
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from convneur.data.errors import InputError, SampleError
from convneur.data.format.manifest import file_crc32c
from convneur.data.format.shards import Sample
from convneur.data.stores.addresses import is_remote, public
from convneur.data.stores.cache import ShardCache
from convneur.data.stores.retry import retrying
from convneur.data.stores.store import IndexedStore, Subset

OPEN_SHARDS = 64
FETCHES = 4


class TarStore(IndexedStore):
    """A split of WebDataset shards with their index, as `convneur prepare` writes them.

    Reads are one `pread` and a checksum. File descriptors carry no position, so forked workers may share them; a
    pickled store opens its files anew.

    Shards that the manifest names by URL are read through a cache, whole.

    Args:
        root: folder of the dataset.
        split: "train", "val" or whatever was prepared.
        cache: where shards from servers go; none are accepted without.
        subset: what of the split is used; None for all.

    Raises:
        InputError: the folder, the split, the index or a shard is missing, or has another size or checksum than the
            manifest says.
    """

    def __init__(self, root: str | Path, split: str, cache: ShardCache | None = None, subset: Subset | None = None):
        super().__init__(root, split, subset)
        self._cache = cache
        self._shards = self._entry.shards
        if not self._manifest.has_shards:
            raise InputError(f"{root} holds the dataset in FFCV's format alone: set data.format to ffcv")
        self.is_remote = any(is_remote(shard.name) for shard in self._shards)
        if self.is_remote and cache is None:
            raise InputError(f"{root} has shards on servers: they are read through a cache only")
        for shard in self._shards:
            if is_remote(shard.name):
                continue
            path = self._root / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size:
                what = "is missing" if size is None else f"has {size} bytes, not {shard.size}"
                raise InputError(f"{path} {what}: {self._remedy}")
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type["TarStore"], tuple[Path, str, ShardCache | None, Subset | None]]:
        return TarStore, (self._root, self._split, self._cache, self._subset)

    def read(self, sample: int) -> Sample:
        """Reads a sample.

        Raises:
            SampleError: its bytes aren't those that were indexed.
            InputError: the shard can't be opened or read, or ends before the sample does, and goes on so.
        """
        number = self.row(sample)
        row = self._index[number]
        shard, size, offset = int(row["shard"]), int(row["size"]), int(row["offset"])

        def read() -> tuple[bytes, bool]:
            image = retrying(lambda: self._pread(shard, size, offset), self._place(shard), OSError)
            return image, google_crc32c.value(image) == row["crc32c"]

        image, intact = read()
        if not intact and self._cache and is_remote(self._shards[shard].name):
            self._cache.drop(self._shards[shard])  # it was right when it was fetched
            image, intact = read()
        if not intact:
            raise SampleError(f"{self.where(sample)}: checksum mismatch, the file is damaged: {self._remedy}")
        return Sample(row["key"].decode(), image, int(row["label"]), self.is_proven(number))

    def prefetch(self, samples: np.ndarray) -> None:
        """Brings the shards of `samples`, of any shape, into the cache.

        Raises:
            InputError: one can't be fetched.
        """
        shards = [self._shards[number] for number in np.unique(self._index["shard"][self.rows(samples)])]
        with ThreadPoolExecutor(FETCHES) as pool:
            assert self._cache is not None
            list(pool.map(self._cache.touch, [shard for shard in shards if is_remote(shard.name)]))

    def verify(self) -> None:
        """Checks every byte of every shard, all of which must lie in the dataset's folder.

        Raises:
            InputError: a shard isn't the one that was indexed.
        """
        for shard in self._shards:
            if file_crc32c(self._root / shard.name) != shard.crc32c:
                raise InputError(f"{self._root / shard.name}: checksum mismatch, the file is damaged: {self._remedy}")

    def where(self, sample: int) -> str:
        """Names the split, shard and key of a sample."""
        row = self._index[self.row(sample)]
        return f"{self._place(row['shard'])}, split {self._split}, key {row['key'].decode()}"

    def _place(self, shard: int) -> str:
        name = self._shards[shard].name
        return public(name) if is_remote(name) else str(self._root / name)

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        if self._cache and is_remote(self._shards[shard].name):
            return self._cache.read(self._shards[shard], size, offset)
        try:
            content = os.pread(self._descriptor(shard), size, offset)
        except OSError:
            if shard in self._descriptors:
                os.close(self._descriptors.pop(shard))
            raise
        if len(content) < size:
            raise OSError(errno.EIO, f"it ends within the sample at byte {offset}")
        return content

    def _descriptor(self, shard: int) -> int:
        """Descriptor of an open shard; the least recently read one is closed for it."""
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
        else:
            if len(self._descriptors) == OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[shard] = os.open(self._root / self._shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)
