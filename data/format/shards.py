"""WebDataset shards, written: tar files with KEY.png (jpg, ...) and KEY.cls for each sample."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import webdataset

from convneur.data.files import atomic_write
from convneur.data.format.index import index_split
from convneur.data.format.manifest import Split
from convneur.data.format.tar import LABEL_EXTENSION


class Sample(NamedTuple):
    """An encoded image, its class, and the name it goes by within its split.

    `proven` says of a JPEG that libjpeg-turbo decoded all of it without complaint before these very bytes were stored:
    decoding a part of it then leaves no damage unseen.
    """

    key: str
    image: bytes
    label: int
    proven: bool = False


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where a shard lies, in WebDataset's naming."""
    return folder / f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample], extension: str) -> None:
    """Writes a WebDataset shard, whole or not at all. The same samples give the same bytes.

    Args:
        path: where to; `shard_path` names it.
        samples: in the order they shall have.
        extension: file extension of the images, one of `convneur.data.format.selection.IMAGE_EXTENSIONS`.
    """
    with (
        atomic_write(path) as file,
        webdataset.TarWriter(file, user="root", group="root", mtime=0, compress=False, encoder=False) as writer,
    ):
        for sample in samples:
            label = str(sample.label).encode()
            writer.write({"__key__": sample.key, extension: sample.image, LABEL_EXTENSION: label})


def write_split(folder: Path, split: str, samples: Iterable[Sample], *, extension: str, shard_samples: int) -> Split:
    """Writes `samples` as shards of `shard_samples` each, and their index.

    Args:
        folder: the dataset's folder, which exists.
        split: name of the split, the first part of the shards' names.
        samples: in the order they shall have; at least one.
        extension: file extension of the images, one of `convneur.data.format.selection.IMAGE_EXTENSIONS`.
        shard_samples: samples a shard; the last has the rest.

    Returns:
        The split's entry in the manifest.
    """
    iterator = iter(samples)
    paths: list[Path] = []
    while chunk := list(islice(iterator, shard_samples)):
        paths.append(shard_path(folder, split, len(paths)))
        write_shard(paths[-1], chunk, extension)
    return index_split(folder, split, paths)
