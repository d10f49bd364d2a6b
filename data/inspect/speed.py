"""How fast this machine reads, decodes and augments training images."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil

from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.stores.choose import open_store
from convneur.data.stream.choose import build_train_loader

BATCH = 64


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        images: how many came.
        seconds: how long they took.
        processor_seconds: of all processes, while they did.
    """

    images: int
    seconds: float
    processor_seconds: float

    @property
    def per_core(self) -> float:
        """Images a second and core."""
        return self.images / self.processor_seconds


def measure_speed(config: DataConfig, images: int, seed: int, advance: Callable[[int], None]) -> Speed:
    """Reads batches as training does, by `config.workers` processes, after some to warm up.

    Args:
        config: of a dataset that is there; its batches are made small, which changes nothing for an image.
        images: how many to measure, rounded up to whole batches.
        seed: of the order and the augmentation.
        advance: is told as more have come.

    Raises:
        InputError: the dataset has too few images, or can't be read.
    """
    store = open_store(config, config.train_split)
    batch = min(BATCH, len(store)) // config.repeats * config.repeats
    if not batch:
        raise InputError(f"{config.root} has {len(store)} images in split '{config.train_split}', too few to measure")
    config = replace(config, global_batch_size=batch, lanes=1)
    loader = build_train_loader(config, store, seed=seed, rank=0, world_size=1, accumulation=1)
    batches = loader.iterate(0, 1 << 40)
    try:
        for _ in range(max(4 * config.workers, 2)):  # what was made ahead meanwhile is as much at the end
            next(batches)
        began, used, steps = time.monotonic(), _processor_seconds(), -(-images // batch)
        for _ in range(steps):
            next(batches)
            advance(batch)
        return Speed(steps * batch, time.monotonic() - began, _processor_seconds() - used)
    finally:
        del batches  # ends the workers


def _processor_seconds() -> float:
    """Of this process and those it has started."""
    process = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))
