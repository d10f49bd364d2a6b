"""The scanned handwritten digits that ship with scikit-learn, as WebDataset shards: real data without a download.

1,797 images of 8x8 pixels from 43 writers: the test set of the UCI "Optical Recognition of Handwritten Digits".
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from convneur.data.format.manifest import Manifest
from convneur.data.format.shards import Sample, write_split
from convneur.data.prepare.betons import Format, Pixels, add_betons
from convneur.data.prepare.claim import claimed
from convneur.data.prepare.writing import check_files
from convneur.data.stores.beton import BetonStore
from convneur.data.stores.tar import TarStore

SOURCE = "digits"
VAL_SAMPLES = 360
SHARD_SAMPLES = 240
WHITE = 16  # the scans have grey levels 0..16


def prepare_digits(out: Path, format: Format = "tar", pixels: Pixels = "jpg") -> bool:
    """Writes the digits to `out`: splits "train" (1,437 samples) and "val" (360), stratified, always the same.

    Args:
        out: the dataset's folder.
        format: formats to write; see `convneur.data.prepare.writing.Task`.
        pixels: what betons hold. As the digits are no JPEGs, it is pixels with either.

    Returns:
        True if they were written; False if `out` held them already, every byte checked.

    Raises:
        InputError: `out` holds something else, or damaged digits.
    """
    with claimed(out, SOURCE) as fresh:
        return _write(out, format, pixels) if fresh else _check(out, format, pixels)


def _check(out: Path, format: Format, pixels: Pixels) -> bool:
    check_files(out, format)
    manifest = Manifest.read(out, unfinished=True)
    for split in manifest.splits:
        if manifest.has_shards:
            TarStore(out, split).verify()
        elif manifest.is_complete:
            beton = BetonStore(out, split)
            for sample in range(len(beton)):
                beton.read(sample)
    return add_betons(out, format, pixels, processes=1)


def _write(out: Path, format: Format, pixels: Pixels) -> bool:
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=VAL_SAMPLES, stratify=digits.target, random_state=0)
    splits = {
        name: write_split(
            out, name, _samples(digits.images, digits.target, chosen), extension="png", shard_samples=SHARD_SAMPLES
        )
        for name, chosen in (("train", train), ("val", val))
    }
    classes = tuple(str(name) for name in digits.target_names)
    Manifest(SOURCE, classes, splits, has_shards=format != "ffcv").write(out)
    add_betons(out, format, pixels, processes=1)
    return True


def _samples(scans: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> Iterator[Sample]:
    """Encodes the `chosen` of `scans` (N, 8, 8) losslessly; a key is a number in scikit-learn's order."""
    for number in chosen:
        buffer = io.BytesIO()
        Image.fromarray(np.rint(scans[number] * (255 / WHITE)).astype(np.uint8)).save(buffer, "png")
        yield Sample(f"{number:04d}", buffer.getvalue(), int(labels[number]))
