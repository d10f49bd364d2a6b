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

from convneur.data.shards import Manifest, Sample, claim_folder, write_split
from convneur.data.store import TarStore

SOURCE = "digits"
VAL_SAMPLES = 360
SHARD_SAMPLES = 240
WHITE = 16  # the scans have grey levels 0..16


def prepare_digits(out: Path) -> bool:
    """Write the digits to `out`: splits "train" (1,437 samples) and "val" (360), stratified, always the same.

    Returns:
        True if they were written; False if `out` held them already, every byte checked.

    Raises:
        InputError: `out` holds something else, or damaged digits.
    """
    if not claim_folder(out, SOURCE):
        for split in Manifest.read(out).splits:
            TarStore(out, split).verify()
        return False
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, val = train_test_split(numbers, test_size=VAL_SAMPLES, stratify=digits.target, random_state=0)
    splits = {
        name: write_split(
            out, name, _samples(digits.images, digits.target, chosen), extension="png", shard_samples=SHARD_SAMPLES
        )
        for name, chosen in (("train", train), ("val", val))
    }
    Manifest(SOURCE, tuple(str(name) for name in digits.target_names), splits).write(out)
    return True


def _samples(scans: np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> Iterator[Sample]:
    """Encode the `chosen` of `scans` (N, 8, 8) losslessly; a key is a number in scikit-learn's order."""
    for number in chosen:
        buffer = io.BytesIO()
        Image.fromarray(np.rint(scans[number] * (255 / WHITE)).astype(np.uint8)).save(buffer, "png")
        yield Sample(f"{number:04d}", buffer.getvalue(), int(labels[number]))
