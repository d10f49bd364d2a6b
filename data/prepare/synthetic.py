"""Natural-looking JPEGs of any size and number, made on the spot: for benchmarks and tests without a download."""

import colorsys
import io
import math
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from convneur.data.format.shards import Sample
from convneur.data.keys import key
from convneur.data.prepare.betons import Format, Pixels
from convneur.data.prepare.writing import SHARD_SAMPLES, Chunks, Task, prepare

SOURCE = "synthetic"
QUALITY = 90
VAL_SHARE = 10
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


class SyntheticImages:
    """Clouds whose detail falls off with frequency as that of photographs does, with ellipses in the class's colour.

    At 500 x 375 pixels a file has 58 kB.

    Args:
        split: images of different splits differ.
        count: N.
        classes: K; image i shows class i mod K.
        height: in pixels.
        width: in pixels.
    """

    def __init__(self, split: str, count: int, classes: int, height: int, width: int):
        self._split, self._count, self._classes = split, count, classes
        self._size = (width, height)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Sample:
        label = number % self._classes
        random = np.random.Generator(np.random.Philox(key=key(SOURCE, self._split, number)))
        picture = self._clouds(random)
        hue = label / GOLDEN_RATIO % 1
        for _ in range(4):
            self._ellipse(picture, hue, random)
        grain = random.normal(0, 6, (self._size[1], self._size[0], 1))
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=QUALITY)
        return Sample(f"{self._split}{number:08d}", buffer.getvalue(), label)

    def _clouds(self, random: np.random.Generator) -> Image.Image:
        """Noise that doubles in frequency and halves in strength from one octave to the next."""
        octaves = math.ceil(math.log2(max(self._size)))
        pixels = random.uniform(60, 200, (1, 1, 3))
        for octave in range(1, octaves + 1):
            size = [max(1, side >> (octaves - octave)) for side in self._size]
            grown = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
            strength = 80 * 0.62**octave
            noise = random.normal(0, strength, (size[1], size[0], 1)) + random.normal(0, strength / 4, (1, 1, 3))
            pixels = np.asarray(grown) + noise
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def _ellipse(self, picture: Image.Image, hue: float, random: np.random.Generator) -> None:
        (width, height), (x, y, a, b) = self._size, random.uniform(0, 1, 4)
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, random.uniform(0.5, 1))
        box = (x * width, y * height, (x + 0.1 + a / 3) * width, (y + 0.1 + b / 3) * height)
        layer = Image.new("L", self._size)
        ImageDraw.Draw(layer).ellipse(box, fill=150)
        picture.paste((round(red * 255), round(green * 255), round(blue * 255)), mask=layer)


def prepare_synthetic(
    out: Path,
    *,
    classes: int,
    images: int,
    height: int,
    width: int,
    processes: int,
    shard_samples: int = SHARD_SAMPLES,
    format: Format = "tar",
    pixels: Pixels = "jpg",
    tiles: int = 0,
) -> bool:
    """Writes `images` images to split "train" of `out` and a tenth as many to "val".

    Args:
        out: the dataset's folder.
        classes: K.
        images: training images.
        height: in pixels.
        width: in pixels.
        processes: how many work at a time.
        shard_samples: images a shard.
        format: formats to write; see `convneur.data.prepare.writing.Task`.
        pixels: what betons hold.
        tiles: coding units between restart markers that JPEGs are rewritten with; 0 keeps them as they are.

    Returns:
        False if the dataset was there, complete.

    Raises:
        InputError: `out` holds something else, or can't be written to.
    """
    counts = {"train": images, "val": max(images // VAL_SHARE, 1)}
    plan = f"{counts} {classes} {height} {width} {shard_samples}"
    images_of = {split: SyntheticImages(split, count, classes, height, width) for split, count in counts.items()}
    return prepare(
        Task(out, processes, format=format, pixels=pixels, tiles=tiles),
        SOURCE,
        blake2b(plan.encode(), digest_size=16).hexdigest(),
        tuple(f"c{label:04d}" for label in range(classes)),
        {split: Chunks(found, shard_samples) for split, found in images_of.items()},
    )
