"""ImageNet (ILSVRC2012) as people have it, to WebDataset shards that hold the original files.

Two layouts, of which each split may have its own:

    archives   ILSVRC2012_img_train.tar: one tar a class, nXXXXXXXX.tar, of nXXXXXXXX_N.JPEG
               ILSVRC2012_img_val.tar: ILSVRC2012_val_NNNNNNNN.JPEG, flat
               ILSVRC2012_devkit_t12.tar.gz: their classes; or the folder ILSVRC2012_devkit_t12 it unpacks to
    folders    train/nXXXXXXXX/*.JPEG, val/nXXXXXXXX/*.JPEG

Class names are WordNet ids; labels are positions among them in sorted order, as torchvision, timm and the published
models count. The archives are read where they are; nothing is unpacked.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image
from scipy.io import loadmat

from convneur.data.beton import Format, Pixels
from convneur.data.errors import InputError
from convneur.data.keys import permutation
from convneur.data.parallel import in_parallel
from convneur.data.prepare import SHARD_SAMPLES, Part, prepare
from convneur.data.shards import Sample, check_tar_end
from convneur.data.transforms import decode

SOURCE = "imagenet"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")
IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})
REENCODED_QUALITY = 90


class _File(NamedTuple):
    """An image's bytes within a file, and what they show."""

    path: Path
    offset: int
    size: int
    key: str
    label: int


class _Images:
    """Images of a split, read from where they are."""

    def __init__(self, files: Sequence[_File], max_side: int | None):
        self._files, self._max_side = files, max_side

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Sample:
        path, offset, size, key, label = self._files[number]
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
) -> bool:
    """Write ImageNet to `out`: splits "train", in an order mixed once and for all, and "val".

    Args:
        source: folder with either layout.
        out: the dataset's folder.
        processes: how many work at a time.
        max_side: images with a longer side than this are scaled down to it and encoded anew; None keeps all bytes.
        part: share of the shards to write; see `convneur.data.prepare.prepare`.
        shard_samples: images a shard.
        format: formats to write; see `convneur.data.prepare.prepare`.
        pixels: what betons hold.

    Returns:
        False if the dataset was there, complete.

    Raises:
        InputError: `source` isn't ImageNet, or is damaged; or `out` holds something else.
    """
    if not source.is_dir():
        raise InputError(f"{source} is no folder: --source takes the one with {TRAIN_ARCHIVE} or train/ in it")
    classes, train = _train_files(source, processes)
    val = _val_files(source, classes, processes)
    digest = blake2b(f"{max_side} {shard_samples} {classes}".encode(), digest_size=16)
    for file in [*train, *val]:
        digest.update(f"{file.key} {file.size} {file.label}\n".encode())
    for files, split in ((train, "train"), (val, "val")):
        _require_unique(files, split)
    mixed = [train[number] for number in permutation(len(train), 0, SOURCE)]
    return prepare(
        out,
        SOURCE,
        digest.hexdigest(),
        classes,
        {"train": _Images(mixed, max_side), "val": _Images(val, max_side)},
        processes=processes,
        part=part,
        shard_samples=shard_samples,
        format=format,
        pixels=pixels,
    )


def shrink(image: bytes, max_side: int) -> bytes:
    """Scale an image down so that its longer side is `max_side`; one that isn't longer, or is no image, stays as is."""
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


def _train_files(source: Path, processes: int) -> tuple[tuple[str, ...], list[_File]]:
    """Classes, and their images in sorted order."""
    archive = source / TRAIN_ARCHIVE
    if archive.is_file():
        members = sorted(_tar_members(archive))
        if odd := [name for name, _, _ in members if not WNID.fullmatch(PurePosixPath(name).stem)]:
            raise InputError(f"{archive} holds {odd[0]}, expected one tar a class, such as n01440764.tar")
        classes = tuple(PurePosixPath(name).stem for name, _, _ in members)
        work: Callable[[Any], list[_File]] = partial(_class_in_archive, archive)
        tasks: Sequence[Any] = [(label, offset, size) for label, (_, offset, size) in enumerate(members)]
    elif (source / "train").is_dir():
        classes = tuple(sorted(path.name for path in (source / "train").iterdir() if path.is_dir()))
        work = partial(_class_in_folder, source / "train")
        tasks = list(enumerate(classes))
    else:
        raise InputError(f"{source} holds neither {TRAIN_ARCHIVE} nor a folder train: name ImageNet's with --source")
    if not classes:
        raise InputError(f"{source} holds no classes to train on: expected n01440764 and others")
    per_class = in_parallel(work, tasks, processes, what="listing train", unit="classes", sizes=[1] * len(tasks))
    for name, found in zip(classes, per_class, strict=True):
        if not found:
            raise InputError(f"class {name} of {source} has no images: get the whole of ImageNet, or remove the class")
    return classes, [file for found in per_class for file in found]


def _val_files(source: Path, classes: tuple[str, ...], processes: int) -> list[_File]:
    archive = source / VAL_ARCHIVE
    labels = {name: label for label, name in enumerate(classes)}
    if archive.is_file():
        members = sorted(_tar_members(archive), key=lambda member: PurePosixPath(member[0]).name)
        truth = _ground_truth(source)
        if len(truth) != len(members):
            raise InputError(f"{archive} holds {len(members)} images, but {DEVKIT} has classes of {len(truth)}")
        if unknown := set(truth) - set(classes):
            raise InputError(f"{DEVKIT} has images of class {min(unknown)}, which {source} has no training images of")
        return [
            _File(archive, offset, size, _key(name), labels[wnid])
            for (name, offset, size), wnid in zip(members, truth, strict=True)
        ]
    if not (source / "val").is_dir():
        raise InputError(f"{source} holds neither {VAL_ARCHIVE} nor a folder val: name ImageNet's with --source")
    present = sorted(path.name for path in (source / "val").iterdir() if path.is_dir())
    if unknown := set(present) - set(classes):
        raise InputError(f"{source / 'val'} has class {min(unknown)}, which {source} has no training images of")
    work = partial(_class_in_folder, source / "val")
    tasks = [(labels[name], name) for name in present]
    per_class = in_parallel(work, tasks, processes, what="listing val", unit="classes", sizes=[1] * len(tasks))
    files = sorted((file for found in per_class for file in found), key=lambda file: file.key)
    if not files:
        raise InputError(f"{source / 'val'} holds no images: expected val/n01440764/*.JPEG and others")
    return files


def _class_in_folder(folder: Path, task: tuple[int, str]) -> list[_File]:
    label, name = task
    paths = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return [_File(path, 0, path.stat().st_size, _key(path.name), label) for path in paths]


def _class_in_archive(archive: Path, task: tuple[int, int, int]) -> list[_File]:
    label, first, size = task
    return [
        _File(archive, offset, length, _key(name), label)
        for name, offset, length in sorted(_tar_members(archive, first, size))
    ]


def _key(name: str) -> str:
    """WebDataset takes what follows the first dot for the extension, so a key has none."""
    return PurePosixPath(name).stem.replace(".", "_")


def _require_unique(files: Sequence[_File], split: str) -> None:
    seen: dict[str, _File] = {}
    for file in files:
        if (other := seen.setdefault(file.key, file)) is not file:
            raise InputError(f"{split} has two images called {file.key}, in {other.path} and {file.path}: rename one")


def _tar_members(path: Path, first: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Name, offset in the file and size of each file in a tar, which may itself lie within another.

    Raises:
        InputError: the tar is damaged or cut off.
    """
    end = path.stat().st_size if size is None else first + size
    try:
        with path.open("rb") as file:
            file.seek(first)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        if member.offset_data + member.size > end:
                            raise tarfile.ReadError(f"cut off within {member.name}")
                        yield member.name, member.offset_data, member.size
                check_tar_end(path, tar.offset, end)
    except tarfile.TarError as error:
        raise InputError(f"{path} is not a whole tar file ({error}): download it again") from None


def _ground_truth(source: Path) -> list[str]:
    """WordNet ids of the validation images, in the order of their numbers.

    The devkit counts classes in an order of its own; meta.mat says which WordNet id each number is. Rows with children
    are groups of classes.
    """
    numbers = [int(line) for line in _devkit_file(source, "ILSVRC2012_validation_ground_truth.txt").split()]
    synsets = loadmat(io.BytesIO(_devkit_file(source, "meta.mat")), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    if unknown := set(numbers) - set(wnids):
        raise InputError(f"{DEVKIT} names class {min(unknown)}, which its meta.mat lacks: download it again")
    return [wnids[number] for number in numbers]


def _devkit_file(source: Path, name: str) -> bytes:
    inside = f"{DEVKIT}/data/{name}"
    if (source / inside).is_file():
        return (source / inside).read_bytes()
    archive = source / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        raise InputError(f"{source} has no {archive.name}, which says what the images of {VAL_ARCHIVE} show")
    try:
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(inside)
            assert stream is not None
            return stream.read()
    except (tarfile.TarError, KeyError, OSError, EOFError, AssertionError) as error:
        raise InputError(f"{archive} can't be read ({error}): download it again") from None
