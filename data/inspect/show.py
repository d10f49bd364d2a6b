"""What is in a dataset, and what the model sees of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.data.format.shards import Manifest, read_index
from convneur.data.stores.store import open_store
from convneur.data.stream.choose import build_train_loader
from convneur.data.stream.on_device import DeviceTransform
from convneur.data.stream.shuffle import ShuffleQuality, shuffle_quality

CAPTION = 12


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
    """Describe a dataset from its manifest and index.

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
    """Measure the shuffle of the training split, with smaller batches where it can't fill one."""
    store = open_store(config, config.train_split)
    lanes = min(config.lanes, max(len(store), 1))
    batch_size = max(min(config.global_batch_size, len(store)) // lanes, 1) * lanes
    return shuffle_quality(replace(config, lanes=lanes, global_batch_size=batch_size), store, seed)


def contact_sheet(config: DataConfig, path: Path, *, columns: int = 8, rows: int = 6, seed: int = 0) -> list[str]:
    """Draw the first images of epoch 0 as training shows them: augmented, erased, mixed, with their labels' names.

    Args:
        config: dataset and augmentation; batch size and lanes don't matter.
        path: PNG file to write.
        columns: images side by side; even, so that mixing finds pairs.
        rows: images on top of each other.
        seed: the run's seed.

    Returns:
        A line for each image that can't be read, and that another one stands in for.

    Raises:
        InputError: the dataset can't be read, or has no two images to train on.
    """
    count = columns * rows
    store = open_store(config, config.train_split)
    count = min(count, len(store) // 2 * 2)
    if not count:
        raise InputError(f"{config.root} has {len(store)} samples in split '{config.train_split}': too few to show")
    config = replace(config, global_batch_size=count, lanes=count // 2, workers=0)
    loader = build_train_loader(config, store, seed=seed, rank=0, world_size=1, accumulation=1)
    ((batch,),) = loader.iterate(0, 1)
    transform = DeviceTransform(config, len(store.classes), label_smoothing=0, seed=seed, device=torch.device("cpu"))
    inputs, targets = transform(batch)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    tile = config.image_size
    sheet = Image.new("RGB", (columns * tile, -(-count // columns) * (tile + CAPTION)), "white")
    for number, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        x, y = number % columns * tile, number // columns * (tile + CAPTION)
        sheet.paste(Image.fromarray(image), (x, y))
        caption = Image.new("RGB", (tile, CAPTION), "white")
        ImageDraw.Draw(caption).text((2, 0), _caption(target, store.classes), "black")
        sheet.paste(caption, (x, y + tile))
    with atomic_write(path) as file:
        sheet.save(file, "png")
    return list(loader.bad_samples.values())


def _caption(target: torch.Tensor, classes: Sequence[str]) -> str:
    """Such as "cat", or "cat 70% dog 30%"."""
    shares = [(float(target[label]), classes[label]) for label in target.nonzero().flatten().tolist()]
    if len(shares) == 1:
        return shares[0][1]
    return " ".join(f"{name} {share:.0%}" for share, name in sorted(shares, reverse=True))
