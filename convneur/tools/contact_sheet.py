"""What a model sees of a dataset, as one picture."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.data.stores.choose import open_store
from convneur.data.stream.choose import build_train_loader
from convneur.tasks.mixing import DeviceTransform

CAPTION = 12  # pixels below each image


def contact_sheet(config: DataConfig, path: Path, *, columns: int = 8, rows: int = 6, seed: int = 0) -> list[str]:
    """Draws the first images of epoch 0 as training shows them: augmented, erased, mixed, with their labels' names.

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
