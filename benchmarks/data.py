"""Images per second, and per second of processor time, of this data layer and of others on the same images.

    python benchmarks/data.py [--images 2000] [--rounds 3] [--epochs 1] [--workers 2] [--data datasets/benchmark]
                              [--only NAME,...] [--streaming-python VENV/bin/python]
                              [--of photographs --quality 95 --subsampling 444]

Every round runs every reader once, each in a process of its own, so that a busy spell of the machine hits all alike.
Several epochs, by one set of workers, show what is left when starting those no longer counts.
Processor time counts the reader's process and its workers or threads, and neither imports nor what FFCV compiles.
"per CPU-second" is thus images a second and core.

Readers that crop and flip, 224 pixels, from the same JPEGs:
    decode              simplejpeg alone, through a DataLoader: the bound
    ours-KIND           TrainLoader over shards with data.interpolation KIND
    tiled-KIND          the same over tiled shards
    ours-beton-jpg      TrainLoader over a .beton, bilinear
    ours-beton-raw      the same, of stored pixels
    ours-engine-ffcv    data.engine ffcv, area
    ffcv-jpg, ffcv-raw  FFCV's own loader, decoder, crop and flip on the same .beton; it resizes as "area" does
    wds-pil             WebDataset's own pipeline, decoding and resizing with Pillow, bilinear
    wds-simplejpeg      the same, decoding with simplejpeg
    streaming-pil       MosaicML Streaming, decoding and resizing with Pillow: in an environment of its own, as it
                        needs numpy < 2.2; make one with `pip install mosaicml-streaming torchvision`
Readers with DeiT's augmentation (RandAugment, erasing, mixup, cutmix, normalised), which is ConvNeXt's, bicubic:
    ours-deit           TrainLoader and DeviceTransform
    tiled-deit          the same over tiled shards
    timm-deit           timm's own loader over a folder of the same files
"""

import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import timm.data
import torch
import webdataset
from common import command_line, processor_seconds
from photographs import KINDS, SUBSAMPLING
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.format.beton import beton_path
from convneur.data.prepare.parallel import processors
from convneur.data.prepare.tile import prepare_tile
from convneur.data.prepare.writing import Chunks, Task, prepare
from convneur.data.stores.choose import open_store
from convneur.data.stores.tar import TarStore
from convneur.data.stream.choose import build_train_loader
from convneur.data.views.draws import mend_posterize
from convneur.data.views.transforms import RESIZES
from convneur.tasks.mixing import DeviceTransform

CLASSES, BATCH, SHARD_SAMPLES, TILES = 100, 64, 100, 4
STREAMING = "streaming-pil"
Reader = Callable[[], Iterable[torch.Tensor]]  # makes what has an epoch's batches
CROP_AND_FLIP = AugmentConfig(randaugment="", erase_prob=0, mixup=0, cutmix=0)


class Ours:
    """This data layer; an epoch of batches as they reach the model's process."""

    def __init__(
        self, root: Path, workers: int, epochs: int, augment: AugmentConfig, interpolation: Any, **settings: Any
    ):
        config = DataConfig(
            root=str(root),
            global_batch_size=BATCH,
            lanes=8,
            workers=workers,
            augment=augment,
            interpolation=interpolation,
            **settings,
        )
        self._loader = build_train_loader(
            config, open_store(config, "train"), seed=0, rank=0, world_size=1, accumulation=1
        )
        self._transform = DeviceTransform(config, CLASSES, label_smoothing=0.1, seed=0, device=torch.device("cpu"))
        self._on_device = augment.erase_prob > 0
        self._epochs = epochs

    def __iter__(self) -> Iterator[torch.Tensor]:
        for (batch,) in self._loader.iterate(0, self._epochs * self._loader.steps_per_epoch):
            yield self._transform(batch)[0] if self._on_device else batch.images


def stock_ffcv(root: Path, workers: int, epochs: int) -> Iterable[torch.Tensor]:
    """FFCV's loader as its documentation builds it, without the model's device and normalisation."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    loader = Loader(
        str(beton_path(root, "train")),
        batch_size=BATCH,
        num_workers=workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((224, 224)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    return _Images(loader, epochs)


class _Images:
    """The images of some epochs of a loader of images and labels."""

    def __init__(self, loader: Iterable[tuple[torch.Tensor, ...]], epochs: int):
        self._loader, self._epochs = loader, epochs

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (images for _ in range(self._epochs) for images, *_ in self._loader)


class _Decoded(Dataset[int]):
    def __init__(self, store: TarStore, epochs: int):
        self._store, self._epochs = store, epochs

    def __len__(self) -> int:
        return len(self._store) * self._epochs

    def __getitem__(self, number: int) -> int:
        return simplejpeg.decode_jpeg(self._store.read(number % len(self._store)).image).shape[0]


def decode(root: Path, workers: int, epochs: int) -> Iterable[torch.Tensor]:
    """Decode, and throw the pixels away."""
    return DataLoader(_Decoded(TarStore(root, "train"), epochs), batch_size=BATCH, num_workers=workers)


def wds(root: Path, workers: int, epochs: int, decoder: Callable[[bytes], Image.Image]) -> Iterable[torch.Tensor]:
    """WebDataset's pipeline as its documentation builds it."""
    crop_and_flip = Compose([RandomResizedCrop(224), RandomHorizontalFlip(), PILToTensor()])
    urls = sorted(map(str, root.glob("train-*.tar")))
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .repeat(epochs)
        .shuffle(1000)
        .to_tuple("jpg", "cls")
        .map_tuple(lambda image: crop_and_flip(decoder(image)), int)
        .batched(BATCH)
    )
    return (images for images, _ in webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers))


def timm_deit(folder: Path, workers: int, epochs: int) -> Iterator[torch.Tensor]:
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
        persistent_workers=True,
    )
    mend_posterize(loader.dataset.transform)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    for _ in range(epochs):
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


class Rate(NamedTuple):
    """Images a second, and a second of processor time."""

    wall: float
    processor: float


def measure(make: Reader, compiles: bool) -> Rate:
    """Read some epochs in a forked process, after as many others where the reader compiles itself."""
    results, result = os.pipe()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        batches = make()
        if compiles:
            for _ in batches:
                pass
        start, processor = time.perf_counter(), processor_seconds()
        seen = sum(len(batch) for batch in batches)
        os.write(result, f"{seen} {time.perf_counter() - start} {processor}".encode())
        os._exit(0)
    os.close(result)
    _, status, usage = os.wait4(child, 0)
    report = os.read(results, 200).split()
    os.close(results)
    if status or not report:
        raise SystemExit("a reader failed; its messages are above")
    seen, seconds, before = map(float, report)
    return Rate(seen / seconds, seen / (usage.ru_utime + usage.ru_stime - before))


def streaming(python: str, root: Path, workers: int) -> Rate:
    """The rates of MosaicML Streaming under another Python."""
    script = Path(__file__).with_name("streaming_reader.py")
    run = subprocess.run(
        [python, script, root, str(workers), str(BATCH)], stdout=subprocess.PIPE, check=True, text=True
    )
    wall, processor = map(float, run.stdout.split()[-2:])
    return Rate(wall, processor)


class Folders(NamedTuple):
    """The same images: shards with a .beton of JPEGs, tiled shards, a .beton of pixels, and files."""

    root: Path
    tiled: Path
    raw: Path
    files: Path


def make_folders(data: Path, images: int, kind: str, quality: int, subsampling: str) -> Folders:
    """Makes them, unless they are there."""
    name = f"{kind}-{quality}-{subsampling}-{images}"
    folders = Folders(*(data / f"{field}-{name}" for field in Folders._fields))
    counts = {"train": images, "val": SHARD_SAMPLES}
    splits = {
        split: Chunks(KINDS[kind](split, count, CLASSES, quality, subsampling), SHARD_SAMPLES)
        for split, count in counts.items()
    }
    classes = tuple(f"c{label:04d}" for label in range(CLASSES))
    prepare(Task(folders.root, processors(), format="both"), "benchmark", name, classes, splits)
    prepare(Task(folders.raw, processors(), format="ffcv", pixels="raw"), "benchmark", name, classes, splits)
    prepare_tile(folders.root, folders.tiled, tiles=TILES, processes=processors())
    unpack(folders.root, folders.files)
    return folders


def pil(image: bytes) -> Image.Image:
    """Decoded by Pillow."""
    return Image.open(io.BytesIO(image)).convert("RGB")


def turbo(image: bytes) -> Image.Image:
    """Decoded by simplejpeg."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(image)
    return Image.fromarray(pixels)


def readers(folders: Folders, workers: int, epochs: int) -> dict[str, Reader]:
    """All that run in this environment, by name."""
    root, tiled, raw, files = folders

    def cropped(where: Path, kind: str, **settings: Any) -> Reader:
        return lambda: Ours(where, workers, epochs, CROP_AND_FLIP, kind, **settings)

    def deit(where: Path) -> Reader:
        return lambda: Ours(where, workers, epochs, AugmentConfig(), "bicubic")

    return {
        "decode": lambda: decode(root, workers, epochs),
        **{f"ours-{kind}": cropped(root, kind) for kind in RESIZES},
        **{f"tiled-{kind}": cropped(tiled, kind) for kind in ("bicubic", "bilinear", "area")},
        "ours-beton-jpg": cropped(root, "bilinear", format="ffcv"),
        "ours-beton-raw": cropped(raw, "bilinear", format="ffcv"),
        "ours-engine-ffcv": cropped(root, "area", engine="ffcv"),
        "ffcv-jpg": lambda: stock_ffcv(root, workers, epochs),
        "ffcv-raw": lambda: stock_ffcv(raw, workers, epochs),
        "wds-pil": lambda: wds(root, workers, epochs, pil),
        "wds-simplejpeg": lambda: wds(root, workers, epochs, turbo),
        "ours-deit": deit(root),
        "tiled-deit": deit(tiled),
        "timm-deit": lambda: timm_deit(files, workers, epochs),
    }


def show(rates: dict[str, list[Rate]]) -> None:
    """Prints medians and ranges."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("reader", "images/s", "range", "per CPU-second", "range"):
        table.add_column(heading, justify="left" if heading == "reader" else "right")
    for name, measured in rates.items():
        cells = []
        for values in zip(*measured, strict=True):
            cells += [f"{statistics.median(values):.0f}", f"{min(values):.0f}-{max(values):.0f}"]
        table.add_row(name, *cells)
    Console().print(table)


def main() -> None:
    """Measure, and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=Path, default=Path("datasets/benchmark"))
    parser.add_argument("--of", choices=KINDS, default="generated", help="what the images show")
    parser.add_argument("--quality", type=int, default=90, help="of their encoder (default: 90)")
    parser.add_argument("--subsampling", choices=SUBSAMPLING, default="420", help="of their colours (default: 420)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="readers to run, with commas between")
    parser.add_argument("--streaming-python", help="Python that has mosaicml-streaming; it reads one epoch")
    args = parser.parse_args()

    folders = make_folders(args.data, args.images, args.of, args.quality, args.subsampling)
    here = readers(folders, args.workers, args.epochs)
    known = [*here, STREAMING]
    if unknown := sorted({*(args.only or ())} - {*known}):
        parser.error(f"--only names {', '.join(unknown)}, expected some of {', '.join(known)}")
    names = [name for name in known if not args.only or name in args.only]
    if not args.streaming_python and STREAMING in names:
        names.remove(STREAMING)
    rates: dict[str, list[Rate]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            print(f"round {number + 1}: {name}", file=sys.stderr)
            if name == STREAMING:
                rates[name].append(streaming(args.streaming_python, folders.root, args.workers))
            else:
                rates[name].append(measure(here[name], compiles="ffcv" in name))

    load = os.getloadavg()[0]
    what = f"{args.of}, quality {args.quality}, 4:{':'.join(args.subsampling[1:])}"
    print(f"{args.images} JPEGs of 500 x 375, {what}, {args.workers} workers, load average {load:.1f},", end=" ")
    print(f"{args.rounds} rounds of {args.epochs} epochs")
    show(rates)


if __name__ == "__main__":
    main()
