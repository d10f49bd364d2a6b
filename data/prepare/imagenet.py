"""ImageNet (ILSVRC2012) to WebDataset shards that hold the original files."""

import io
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from convneur.data.format.shards import Sample
from convneur.data.keys import permutation
from convneur.data.prepare.betons import Format, Pixels
from convneur.data.prepare.layouts import File, find_images
from convneur.data.prepare.writing import SHARD_SAMPLES, Chunks, Part, Task, prepare
from convneur.data.views.decode import decode

SOURCE = "imagenet"
REENCODED_QUALITY = 90


class _Images:
    """Images of a split, read from where they are."""

    def __init__(self, files: Sequence[File], max_side: int | None):
        self._files, self._max_side = files, max_side

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Sample:
        path, offset, size, key, label, _ = self._files[number]
        with path.open("rb") as file:
            file.seek(offset)
            image = file.read(size)
        if len(image) != size:
            raise OSError(f"{path} ends within {key}")
        return Sample(key, image if self._max_side is None else shrink(image, self._max_side), label)


def prepare_imagenet(
    source: Path,
    out: Path,
    *,
    processes: int,
    max_side: int | None = None,
    part: Part | None = None,
    shard_samples: int = SHARD_SAMPLES,
    format: Format = "tar",
    pixels: Pixels = "jpg",
    tiles: int = 0,
    say: Callable[[str], object] = print,
) -> bool:
    """Writes ImageNet to `out`: splits "train", in an order mixed once and for all, and "val", or that one alone.

    Args:
        source: folder with either layout.
        out: the dataset's folder.
        processes: how many work at a time.
        max_side: images with a longer side than this are scaled down to it and encoded anew; None keeps all bytes.
        part: share of the shards to write; see `convneur.data.prepare.writing.Task`.
        shard_samples: images a shard.
        format: formats to write; see `convneur.data.prepare.writing.Task`.
        pixels: what betons hold.
        tiles: coding units between restart markers that JPEGs are rewritten with; 0 keeps them as they are.
        say: takes a line for what is left out of a split, and for what is odd, and about tiling.

    Returns:
        False if the dataset was there, complete.

    Raises:
        InputError: `source` isn't ImageNet, or is damaged; or `out` holds something else.
    """
    classes, files = find_images(source, processes, say)
    digest = blake2b(f"{max_side} {shard_samples} {classes}".encode(), digest_size=16)
    for found in files.values():
        for file in found:
            digest.update(f"{file.key} {file.size} {file.label}\n".encode())
    if train := files.get("train"):
        files["train"] = [train[number] for number in permutation(len(train), 0, SOURCE)]
    return prepare(
        Task(out, processes, part, format, pixels, tiles, say),
        SOURCE,
        digest.hexdigest(),
        classes,
        {split: Chunks(_Images(found, max_side), shard_samples) for split, found in files.items()},
    )


def shrink(image: bytes, max_side: int) -> bytes:
    """Scales an image down to a longer side of `max_side`; one that isn't longer, or is no image, stays as it is."""
    try:
        picture = Image.fromarray(decode(image))
    except ValueError:
        return image
    if max(picture.size) <= max_side:
        return image
    width, height = (max(1, round(side * max_side / max(picture.size))) for side in picture.size)
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "jpeg", quality=REENCODED_QUALITY)
    return buffer.getvalue()
