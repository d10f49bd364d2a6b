"""Where encoded samples come from: random access by number, whatever the files look like."""

import errno
import os
import tempfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import google_crc32c
import numpy as np

from convneur.data.config import DataConfig
from convneur.data.errors import InputError, SampleError
from convneur.data.format.shards import MANIFEST, Manifest, Sample, count, file_crc32c, read_index
from convneur.data.keys import permutation, raw_bits
from convneur.data.stores.addresses import is_remote, public
from convneur.data.stores.cache import ShardCache
from convneur.data.stores.retry import retrying

OPEN_SHARDS = 64
FETCHES = 4


class Store(Protocol):
    """A split of N encoded images in shards, which only say what lies together on disk."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position among them."""

    @property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, (shards,) int64; the sum is N."""

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Labels of `samples`, of any shape, int64."""

    def class_samples(self) -> np.ndarray:
        """Samples of each class, (classes,) int64."""

    @property
    def index_hash(self) -> str:
        """Equal where the samples are the same, in the same order and shards."""

    @property
    def is_remote(self) -> bool:
        """Whether reading may have to wait for a server, so that `prefetch` is worth calling."""

    def prefetch(self, samples: np.ndarray) -> None:
        """Have `samples`, of any shape, on the node's own disk, or raise an `InputError`."""

    def __len__(self) -> int:
        """N."""

    def read(self, sample: int) -> Sample:
        """Read a sample, 0..N-1.

        Raises:
            SampleError: this one is damaged.
            InputError: the storage fails, time and again.
        """

    def where(self, sample: int) -> str:
        """Name the split, shard and key of a sample, for messages."""


def open_store(config: DataConfig, split: str) -> Store:
    """Open a split of the dataset at `config.root`, in the format that `config.format` and `config.engine` ask for.

    Raises:
        InputError: it can't be used; see `TarStore` and `BetonStore`.
    """
    subset = Subset(config.subset, config.subset_seed) if config.subset and split == config.train_split else None
    if reads_beton(config):
        from convneur.data.stores.beton import BetonStore  # FFCV is optional, and takes seconds to import

        return BetonStore(config.root, split, subset)
    default = Path(tempfile.gettempdir()) / f"convneur-cache-{os.getuid()}"
    budget = round(config.cache_gb * 1e9)
    cache = ShardCache(Path(config.cache_dir or default), budget, private=not config.cache_dir)
    return TarStore(config.root, split, cache, subset)


def reads_beton(config: DataConfig) -> bool:
    """Whether the dataset is read from files in FFCV's format.

    Raises:
        InputError: the format has to be looked up, and there is no dataset.
    """
    if config.format == "auto":
        return config.engine == "ffcv" or not Manifest.read(Path(config.root)).has_shards
    return config.format == "ffcv"


class Subset(NamedTuple):
    """Part of a split: `samples` of it, the same for a `seed` wherever they are drawn."""

    samples: int
    seed: int

    def rows(self, labels: np.ndarray) -> np.ndarray:
        """Which of the samples with these `labels` (N,) belong to it, (samples,) int64 in ascending order.

        Each class's samples are put in a random order; one of every class is taken, then a second of every class, and
        so on, in a round the classes in random order. So it is balanced, and smaller ones are parts of larger ones.
        """
        shuffled = permutation(len(labels), self.seed, "subset")
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        counts = np.bincount(labels)
        rounds = np.concatenate([np.arange(count) for count in counts])
        ranked = np.lexsort((raw_bits(len(labels), self.seed, "subset rounds"), rounds))
        return np.sort(by_class[ranked[: self.samples]])


class IndexedStore:
    """What the stores share: a split as its index describes it.

    Denied samples are left out, and what isn't in the subset: samples 0..N-1 are the others.

    Args:
        root: folder of the dataset.
        split: "train", "val" or whatever was prepared.
        subset: what of it is used; None for all.

    Raises:
        InputError: the folder, the split or the index is missing, or has another checksum than the manifest says.
    """

    is_remote = False

    def __init__(self, root: str | Path, split: str, subset: Subset | None = None):
        self._root, self._split, self._subset = Path(root), split, subset
        self._manifest = Manifest.read(self._root)
        if split not in self._manifest.splits:
            raise InputError(f"{root} has no split '{split}'; it has {', '.join(sorted(self._manifest.splits))}")
        self._entry = self._manifest.splits[split]
        self._remedy = f"remove {self._root} and run `convneur prepare {self._manifest.source} --out {self._root}`"
        self._index = read_index(self._root, split, self._entry)
        self._denied = np.array([denied.row for denied in self._entry.denied], dtype=np.int64)
        self._before_denied = self._denied - np.arange(len(self._denied))  # so many samples come before each
        self._kept: np.ndarray | None = None  # the subset's samples
        self.classes = self._manifest.classes
        if self._index["label"].max(initial=0) >= len(self.classes):
            raise InputError(
                f"{self._root / MANIFEST} has {len(self.classes)} classes, but split '{split}' more: {self._remedy}"
            )
        self.index_hash = self._entry.index_hash
        if subset:
            if subset.samples > len(self):
                raise InputError(
                    f"data.subset is {subset.samples}, but split '{split}' of {root} has {len(self)} samples"
                )
            self._kept = subset.rows(self.labels)
            self.index_hash = f"{self.index_hash}, {subset.samples} by seed {subset.seed}"

    def __len__(self) -> int:
        return len(self._index) - len(self._denied) if self._kept is None else len(self._kept)

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Rows of the index, int64, that `samples`, of any shape, have. No table of them: the index may be huge."""
        if self._kept is not None:
            samples = self._kept[samples]
        return samples + np.searchsorted(self._before_denied, samples, side="right")

    def row(self, sample: int) -> int:
        """The row of the index that a sample has."""
        return int(self.rows(np.array(sample)))

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Samples in each shard, (shards,) int64."""
        return self._counts("shard", len(self._entry.shards))

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, (N,) int64, gathered anew: nothing that a rank should keep."""
        return self.labels_of(np.arange(len(self)))

    def labels_of(self, samples: np.ndarray) -> np.ndarray:
        """Labels of `samples`, of any shape, int64."""
        labels: np.ndarray = self._index["label"][self.rows(samples)].astype(np.int64)
        return labels

    def class_samples(self) -> np.ndarray:
        """Samples of each class, (classes,) int64."""
        return self._counts("label", len(self.classes))

    def _counts(self, field: str, values: int) -> np.ndarray:
        """How many samples have each of the `values` that a field of the index may have."""
        if self._kept is not None:
            return np.bincount(self._index[field][self.rows(np.arange(len(self)))], minlength=values)
        return count(self._index[field], values) - np.bincount(self._index[field][self._denied], minlength=values)


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
        """Read a sample.

        Raises:
            SampleError: its bytes aren't those that were indexed.
            InputError: the shard can't be opened or read, or ends before the sample does, and goes on so.
        """
        row = self._index[self.row(sample)]
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
        return Sample(row["key"].decode(), image, int(row["label"]))

    def prefetch(self, samples: np.ndarray) -> None:
        """Have the shards of `samples`, of any shape, in the cache.

        Raises:
            InputError: one can't be fetched.
        """
        shards = [self._shards[number] for number in np.unique(self._index["shard"][self.rows(samples)])]
        with ThreadPoolExecutor(FETCHES) as pool:
            assert self._cache is not None
            list(pool.map(self._cache.touch, [shard for shard in shards if is_remote(shard.name)]))

    def verify(self) -> None:
        """Check every byte of every shard, all of which must lie in the dataset's folder.

        Raises:
            InputError: a shard isn't the one that was indexed.
        """
        for shard in self._shards:
            if file_crc32c(self._root / shard.name) != shard.crc32c:
                raise InputError(f"{self._root / shard.name}: checksum mismatch, the file is damaged: {self._remedy}")

    def where(self, sample: int) -> str:
        """Name the split, shard and key of a sample."""
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
