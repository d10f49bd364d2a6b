"""Images per second, and per second of processor time, of this data layer and of others on the same images.

    python benchmarks/data.py [--images 2000] [--rounds 3] [--workers 2] [--data datasets/benchmark]

Every round runs every reader once, each in a process of its own, so that a busy spell of the machine hits all alike.
Processor time counts the reader's process and its workers. "per CPU-second" is thus images a second and core.

Readers that crop and flip (224 pixels, bilinear), from the same shards:
    decode          simplejpeg alone, through our loader: the bound
    ours            TrainLoader
    wds-pil         WebDataset's own pipeline, decoding with Pillow
    wds-simplejpeg  the same, decoding with simplejpeg
Readers with DeiT's augmentation (RandAugment, erasing, mixup, cutmix, normalised):
    ours-deit       TrainLoader and DeviceTransform
    timm-deit       timm's own loader over a folder of the same files
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import timm.data
import torch
import webdataset
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.loader import TrainLoader
from convneur.data.mixing import DeviceTransform
from convneur.data.parallel import processors
from convneur.data.store import TarStore
from convneur.data.synthetic import prepare_synthetic
from convneur.data.transforms import mend_posterize

CLASSES, BATCH, SHARD_SAMPLES = 100, 64, 100
CROP_AND_FLIP = AugmentConfig(randaugment="", erase_prob=0, mixup=0, cutmix=0)


def ours(root: Path, workers: int, augment: AugmentConfig, interpolation: Any) -> Iterator[torch.Tensor]:
    """Batches of one epoch, as they reach the model's process."""
    config = DataConfig(
        root=str(root), global_batch_size=BATCH, lanes=8, workers=workers, augment=augment, interpolation=interpolation
    )
    loader = TrainLoader(config, TarStore(root, "train"), seed=0, rank=0, world_size=1, accumulation=1)
    transform = DeviceTransform(config, CLASSES, label_smoothing=0.1, seed=0, device=torch.device("cpu"))
    for (batch,) in loader.iterate(0, loader.steps_per_epoch):
        yield transform(batch)[0] if augment.erase_prob else batch.images


class _Decoded(Dataset[int]):
    def __init__(self, store: TarStore):
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, number: int) -> int:
        return simplejpeg.decode_jpeg(self._store.read(number).image).shape[0]


def decode(root: Path, workers: int) -> Iterable[torch.Tensor]:
    """Decode, and throw the pixels away."""
    return DataLoader(_Decoded(TarStore(root, "train")), batch_size=BATCH, num_workers=workers)


def wds(root: Path, workers: int, decoder: Callable[[bytes], Image.Image]) -> Iterable[torch.Tensor]:
    """WebDataset's pipeline as its documentation builds it."""
    crop_and_flip = Compose([RandomResizedCrop(224), RandomHorizontalFlip(), PILToTensor()])
    urls = sorted(map(str, root.glob("train-*.tar")))
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(lambda image: crop_and_flip(decoder(image)), int)
        .batched(BATCH)
    )
    return (images for images, _ in webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers))


def timm_deit(folder: Path, workers: int) -> Iterator[torch.Tensor]:
    """timm's loader without its CUDA prefetcher, and its mixup."""
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder)),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=False,
        re_prob=0.25,
        re_mode="pixel",
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        num_workers=workers,
        pin_memory=False,
        persistent_workers=False,
    )
    mend_posterize(loader.dataset.transform)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    for images, labels in loader:
        if len(images) % 2 == 0:  # mixup takes pairs
            yield mixup(images, labels)[0]


def unpack(root: Path, folder: Path) -> None:
    """The training images as files, a folder a class."""
    store = TarStore(root, "train")
    if folder.exists():
        return
    for number in range(len(store)):
        sample = store.read(number)
        path = folder / store.classes[sample.label] / f"{sample.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.image)


def measure(read: Callable[[], Iterable[torch.Tensor]]) -> tuple[float, float]:
    """Images a second, and a second of processor time, of one epoch in a forked process."""
    start = time.perf_counter()
    results, result = os.pipe()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        seen = sum(len(batch) for batch in read())
        os.write(result, str(seen).encode())
        os._exit(0)
    os.close(result)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    seen = int(os.read(results, 100) or 0)
    os.close(results)
    if status or not seen:
        raise SystemExit("a reader failed; its messages are above")
    return seen / seconds, seen / (usage.ru_utime + usage.ru_stime)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("datasets/benchmark"))
    args = parser.parse_args()

    root, folder = args.data / f"shards-{args.images}", args.data / f"files-{args.images}"
    prepare_synthetic(
        root,
        classes=CLASSES,
        images=args.images,
        height=375,
        width=500,
        processes=processors(),
        shard_samples=SHARD_SAMPLES,
    )
    unpack(root, folder)

    def pil(image: bytes) -> Image.Image:
        return Image.open(io.BytesIO(image)).convert("RGB")

    def turbo(image: bytes) -> Image.Image:
        pixels: np.ndarray = simplejpeg.decode_jpeg(image)
        return Image.fromarray(pixels)

    readers: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
        "decode": lambda: decode(root, args.workers),
        "ours": lambda: ours(root, args.workers, CROP_AND_FLIP, "bilinear"),
        "wds-pil": lambda: wds(root, args.workers, pil),
        "wds-simplejpeg": lambda: wds(root, args.workers, turbo),
        "ours-deit": lambda: ours(root, args.workers, AugmentConfig(), "bicubic"),
        "timm-deit": lambda: timm_deit(folder, args.workers),
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(args.rounds):
        for name, read in readers.items():
            rates[name].append(measure(read))

    load = os.getloadavg()[0]
    print(f"{args.images} JPEGs of 500 x 375, {args.workers} workers, {args.rounds} rounds; load average {load:.1f}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("reader", "images/s", "range", "per CPU-second", "range"):
        table.add_column(heading, justify="left" if heading == "reader" else "right")
    for name, measured in rates.items():
        cells = []
        for values in zip(*measured, strict=True):
            cells += [f"{statistics.median(values):.0f}", f"{min(values):.0f}-{max(values):.0f}"]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
