"""Where encoded samples come from: random access by number, whatever the files look like."""

from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from convneur.data.errors import InputError
from convneur.data.format.index import count, read_index
from convneur.data.format.manifest import MANIFEST, Manifest
from convneur.data.format.shards import Sample
from convneur.data.format.tiled import read_originals
from convneur.data.keys import permutation, raw_bits


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
        """Brings `samples`, of any shape, to the node's own disk, or raises an `InputError`."""

    def __len__(self) -> int:
        """N."""

    def read(self, sample: int) -> Sample:
        """Reads a sample, 0..N-1.

        Raises:
            SampleError: this one is damaged.
            InputError: the storage fails, time and again.
        """

    def where(self, sample: int) -> str:
        """Names the split, shard and key of a sample, for messages."""


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
        self._originals = read_originals(self._root, split, self._entry)
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

    def is_proven(self, row: int) -> bool:
        """Whether the JPEG of a row of the index was decoded whole before it was stored; see `Sample`."""
        return self._originals is not None and bool(self._originals["proven"][row])

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
