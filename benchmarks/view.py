"""Where the time of a view goes: microseconds of processor time an image, in one process.

    python benchmarks/view.py [--images 300] [--rounds 5] [--data datasets/benchmark] [--of photographs] ...

Of the images that benchmarks/data.py makes, as they are and tiled, with crop and flip and with DeiT's augmentation. The
median of some rounds; the parts take turns. "libraries" is the same by simplejpeg, Pillow and timm.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import command_line
from photographs import KINDS, SUBSAMPLING
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from convneur.data.config import AugmentConfig, DataConfig
from convneur.data.keys import libraries_restored, seed_libraries, view_key
from convneur.data.native.jpeg import decode_jpeg
from convneur.data.native.operations import operate
from convneur.data.native.pixels import Box, resize
from convneur.data.stores.tar import TarStore
from convneur.data.views import transforms
from convneur.data.views.decode import decode, plain_jpeg_size
from convneur.data.views.transforms import TrainTransform
from data import CROP_AND_FLIP, make_folders


def microseconds(parts: dict[str, Callable[[int], object]], images: int, rounds: int) -> dict[str, float]:
    """The median over rounds of each part's time an image."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.thread_time()
            for number in range(images):
                part(number)
            taken[name].append((time.thread_time() - start) / images * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def by_libraries(config: DataConfig) -> TrainTransform:
    """A transform that does without C++."""
    native, transforms.native_filter = transforms.native_filter, lambda _: None  # type: ignore[assignment]
    try:
        return TrainTransform(config)
    finally:
        transforms.native_filter = native


def parts_of(root: Path, augment: AugmentConfig, images: int) -> dict[str, Callable[[int], object]]:
    """What is timed, by name."""
    config = DataConfig(augment=augment)
    size, store, transform, libraries = config.image_size, TarStore(root, "train"), TrainTransform(config), None
    libraries = by_libraries(config)
    samples = [store.read(number) for number in range(images)]
    sizes = [plain_jpeg_size(sample.image) or (0, 0) for sample in samples]

    def seed(number: int) -> None:
        seed_libraries(view_key(0, "augment", 0, number, 0))

    views = []
    with libraries_restored():
        for number in range(images):
            seed(number)
            views.append(transform.choose(*sizes[number]))
    boxes = [Box(*view[:4]) for view in views]
    crops = [np.empty((box.height, box.width, 3), np.uint8) for box in boxes]
    codes = [[operation.code for operation in view.operations if operation.code] for view in views]
    seen = torch.empty(size, size, 3, dtype=torch.uint8).permute(2, 0, 1)
    shown = seen.permute(1, 2, 0).numpy()
    parts: dict[str, Callable[[int], object]] = {
        "read, check": lambda i: store.read(i),
        "header": lambda i: plain_jpeg_size(samples[i].image),
        "seed": seed,
        "draw": lambda i: transform.choose(*sizes[i]),
        "decode": lambda i: decode_jpeg(samples[i].image, samples[i].proven, boxes[i], crops[i]),
        "resize": lambda i: resize(crops[i], size, size, "bicubic", None, views[i].flips, shown),
        "operations": lambda i: operate(shown, codes[i]),
        "the call": lambda i: transform.show(samples[i].image, seen, views[i], samples[i].proven),
        "libraries": lambda i: libraries.show(samples[i].image, seen, views[i]),
        "simplejpeg": lambda i: decode(samples[i].image),
    }
    return parts


def main() -> None:
    """Measure, and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("datasets/benchmark"))
    parser.add_argument("--of", choices=KINDS, default="generated")
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--subsampling", choices=SUBSAMPLING, default="420")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folders = make_folders(args.data, max(args.images, 1000), args.of, args.quality, args.subsampling)
    columns = {
        f"{recipe}, {kind}": microseconds(parts_of(root, augment, args.images), args.images, args.rounds)
        for recipe, augment in (("crop and flip", CROP_AND_FLIP), ("DeiT", AugmentConfig()))
        for kind, root in (("as they are", folders.root), ("tiled", folders.tiled))
    }
    table = Table("microseconds an image", box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right")
    for part in next(iter(columns.values())):
        table.add_row(part, *(f"{column[part]:.0f}" for column in columns.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
