"""Images for benchmarks, of photographs that ship with packages, and generated ones, encoded as asked for."""

import io
from pathlib import Path

import matplotlib
import numpy as np
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from convneur.data.format.shards import Sample
from convneur.data.prepare.synthetic import SyntheticImages

HEIGHT, WIDTH = 375, 500
SUBSAMPLING = {"444": 0, "420": 2}


class Photographs:
    """Parts of three photographs of 640 x 427 to 512 x 600 pixels, each at a place, a scale and a flip of its own.

    Args:
        split: images of different splits differ.
        count: N.
        classes: K; image i has class i mod K.
        quality: of the encoder, 1 to 100.
        subsampling: "420" or "444".
    """

    def __init__(self, split: str, count: int, classes: int, quality: int, subsampling: str):
        self._split, self._count, self._classes = split, count, classes
        self._encoding = {"quality": quality, "subsampling": SUBSAMPLING[subsampling]}
        hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
        self._pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
        self._pictures.append(Image.open(hopper).convert("RGB"))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Sample:
        random = np.random.default_rng((number, len(self._split)))
        picture = self._pictures[number % len(self._pictures)]
        height = random.uniform(0.75, 1) * min(picture.height, picture.width * HEIGHT / WIDTH)
        width = height * WIDTH / HEIGHT
        top, left = random.uniform(0, picture.height - height), random.uniform(0, picture.width - width)
        part = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        if random.random() < 0.5:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        buffer = io.BytesIO()
        part.save(buffer, "jpeg", **self._encoding)
        return Sample(f"{self._split}{number:08d}", buffer.getvalue(), number % self._classes)


class Generated:
    """`SyntheticImages`, encoded anew; see `Photographs`."""

    def __init__(self, split: str, count: int, classes: int, quality: int, subsampling: str):
        self._images = SyntheticImages(split, count, classes, HEIGHT, WIDTH)
        self._encoding = {"quality": quality, "subsampling": SUBSAMPLING[subsampling]}

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> Sample:
        sample, buffer = self._images[number], io.BytesIO()
        Image.fromarray(simplejpeg.decode_jpeg(sample.image)).save(buffer, "jpeg", **self._encoding)
        return sample._replace(image=buffer.getvalue())


KINDS = {"generated": Generated, "photographs": Photographs}
