"""What is in a dataset."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.format.index import read_index
from convneur.data.format.manifest import Manifest
from convneur.data.stores.choose import open_store
from convneur.data.stream.shuffle import ShuffleQuality, shuffle_quality


@dataclass(frozen=True)
class SplitSummary:
    """A split in numbers.

    Attributes:
        split: its name.
        shards: tar files, or what they were in FFCV's format.
        samples: images, those denied left out.
        denied: images that can't be read.
        bytes: of all files that hold images.
        image_bytes: smallest, median and largest image file.
        class_samples: fewest, median and most images of a class.
        empty_classes: classes without an image.
    """

    split: str
    shards: int
    samples: int
    denied: int
    bytes: int
    image_bytes: tuple[int, int, int]
    class_samples: tuple[int, int, int]
    empty_classes: int


def summarize(folder: Path, damaged: list[str] | None = None) -> tuple[Manifest, list[SplitSummary]]:
    """Describes a dataset from its manifest and index.

    Args:
        folder: the dataset's.
        damaged: takes a line for each split whose index is damaged, and which is left out; None to raise instead.

    Raises:
        InputError: there is none, or its index is damaged.
    """
    manifest = Manifest.read(folder)
    summaries = []
    for name, split in manifest.splits.items():
        try:
            index = read_index(folder, name, split)
        except InputError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            continue
        if split.denied:
            index = np.delete(index, [denied.row for denied in split.denied])
        counts = np.bincount(index["label"], minlength=len(manifest.classes))
        summaries.append(
            SplitSummary(
                split=name,
                shards=len(split.shards),
                samples=len(index),
                denied=len(split.denied),
                bytes=sum(shard.size for shard in split.shards if manifest.has_shards)
                + (split.beton.size if split.beton else 0),
                image_bytes=_spread(index["size"]),
                class_samples=_spread(counts),
                empty_classes=int((counts == 0).sum()),
            )
        )
    return manifest, summaries


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else (0, 0, 0)


def measure_shuffle(config: DataConfig, seed: int) -> ShuffleQuality:
    """Measures the shuffle of the training split, with smaller batches where it can't fill one."""
    store = open_store(config, config.train_split)
    lanes = min(config.lanes, max(len(store), 1))
    batch_size = max(min(config.global_batch_size, len(store)) // lanes, 1) * lanes
    return shuffle_quality(replace(config, lanes=lanes, global_batch_size=batch_size), store, seed)
