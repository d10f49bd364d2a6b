"""ImageNet (ILSVRC2012) as people have it: which images there are, where their bytes lie, and what they show.

Two layouts, of which each split may have its own:

    archives   ILSVRC2012_img_train.tar: one tar a class, nXXXXXXXX.tar, of nXXXXXXXX_N.JPEG
               ILSVRC2012_img_val.tar: ILSVRC2012_val_NNNNNNNN.JPEG, flat
               ILSVRC2012_devkit_t12.tar.gz: their classes; or the folder ILSVRC2012_devkit_t12 it unpacks to
    folders    train/nXXXXXXXX/*.JPEG, val/nXXXXXXXX/*.JPEG, images in folders within those, too

Class names are WordNet ids; labels are positions among them in sorted order, as torchvision, timm and the published
models count. Other names of folders do as well; see `sorted_classes` for their order. There may be validation images
only. The archives are read where they are; nothing is unpacked.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scipy.io import loadmat

from convneur.data.errors import InputError
from convneur.data.format.classes import sorted_classes
from convneur.data.format.selection import HIDDEN, IMAGE_EXTENSIONS, OTHER, Tally, extension, is_litter, readable
from convneur.data.format.tar import Member, tar_members
from convneur.data.prepare.parallel import in_parallel

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n\d{8}")


class File(NamedTuple):
    """An image's bytes within a file, and what they show; `longer_keys` are for where several have a key."""

    path: Path
    offset: int
    size: int
    key: str
    label: int
    longer_keys: tuple[str, str] | None = None


_Found = tuple[list[File], Tally]
"""Images, and what was taken and left out."""


def find_images(
    source: Path, processes: int, say: Callable[[str], object]
) -> tuple[tuple[str, ...], dict[str, list[File]]]:
    """Finds the images of ImageNet, or of validation alone.

    Args:
        source: folder with either layout.
        processes: how many work at a time.
        say: takes a line for what is left out of a split, and for what is odd.

    Returns:
        Classes in the order of their labels, and the images of each split in sorted order.

    Raises:
        InputError: `source` isn't ImageNet, or is damaged.
    """
    if not source.is_dir():
        raise InputError(f"{source} is no folder: --source takes the one with {TRAIN_ARCHIVE} or train/ in it")
    files: dict[str, list[File]] = {}
    tallies: dict[str, Tally] = {}
    classes = None
    if (source / TRAIN_ARCHIVE).is_file() or (source / "train").is_dir():
        classes, files["train"], tallies["train"] = _train_files(source, processes)
    elif (source / VAL_ARCHIVE).is_file() or not (source / "val").is_dir():
        raise InputError(
            f"{source} holds neither {TRAIN_ARCHIVE} nor a folder train: name ImageNet's with --source; of images "
            "for evaluation only, put the classes' folders into a folder val"
        )
    else:
        say(f"{source} has no training images: the dataset will have split val alone")
    classes, files["val"], tallies["val"] = _val_files(source, classes, processes)
    for split, found in files.items():
        _require_unique(found, split)
        for line in tallies[split].lines(split):
            say(line)
    return classes, files


def _train_files(source: Path, processes: int) -> tuple[tuple[str, ...], list[File], Tally]:
    """Classes, their images in sorted order, and what was taken."""
    archive = source / TRAIN_ARCHIVE
    tally = Tally()
    if archive.is_file():
        members = sorted(_tar_members(archive, tally))
        if odd := [name for name, _, _ in members if not WNID.fullmatch(PurePosixPath(name).stem)]:
            raise InputError(f"{archive} holds {readable(odd[0])}, expected one tar a class, such as n01440764.tar")
        classes = tuple(PurePosixPath(name).stem for name, _, _ in members)
        work: Callable[[Any], _Found] = partial(_class_in_archive, archive)
        tasks: Sequence[Any] = [(label, offset, size) for label, (_, offset, size) in enumerate(members)]
    else:
        folders = _class_folders(source / "train", tally)
        classes = tuple(folders)
        work = partial(_class_in_folder, source / "train")
        tasks = list(enumerate(folders.values()))
    if not classes:
        raise InputError(f"{source} holds no classes to train on: expected n01440764 and others")
    found = in_parallel(work, tasks, processes, what="listing train", unit="classes", sizes=[1] * len(tasks))
    for name, (files, _) in zip(classes, found, strict=True):
        if not files:
            raise InputError(f"class {name} of {source} has no images: get the whole of ImageNet, or remove the class")
    return classes, *_joined(found, tally)


def _val_files(
    source: Path, classes: tuple[str, ...] | None, processes: int
) -> tuple[tuple[str, ...], list[File], Tally]:
    """Classes, those of the validation images where None are given, their images by name, and what was taken."""
    archive, tally = source / VAL_ARCHIVE, Tally()
    if archive.is_file() and classes:
        members = [member for member in _tar_members(archive, tally) if _is_image(member.name, tally)]
        members.sort(key=lambda member: PurePosixPath(member.name).name)
        truth = _ground_truth(source)
        if len(truth) != len(members):
            raise InputError(f"{archive} holds {len(members)} images, but {DEVKIT} has classes of {len(truth)}")
        if unknown := set(truth) - set(classes):
            raise InputError(f"{DEVKIT} has images of class {min(unknown)}, which {source} has no training images of")
        labels = {name: label for label, name in enumerate(classes)}
        files = [
            File(archive, offset, size, _key(name), labels[wnid])
            for (name, offset, size), wnid in zip(members, truth, strict=True)
        ]
        return classes, *_joined([(files, Tally())], tally)
    if not (source / "val").is_dir():
        raise InputError(f"{source} holds neither {VAL_ARCHIVE} nor a folder val: name ImageNet's with --source")
    folders = _class_folders(source / "val", tally)
    classes = classes or tuple(folders)
    labels = {name: label for label, name in enumerate(classes)}
    if unknown := folders.keys() - labels.keys():
        raise InputError(f"{source / 'val'} has class {min(unknown)}, which {source} has no training images of")
    work = partial(_class_in_folder, source / "val")
    tasks = [(labels[name], folder) for name, folder in folders.items()]
    found = in_parallel(work, tasks, processes, what="listing val", unit="classes", sizes=[1] * len(tasks))
    files, tally = _joined(found, tally)
    if not files:
        raise InputError(f"{source / 'val'} holds no images: expected val/n01440764/*.JPEG and others")
    return classes, sorted(files, key=lambda file: file.key), tally


def _joined(found: Sequence[_Found], tally: Tally) -> tuple[list[File], Tally]:
    """Images of a split in their order, by longer keys where several have the same one, and all that was met."""
    files = [file for part, _ in found for file in part]
    tally.add(part for _, part in found).taken = len(files)
    for file in files:
        if not file.size:
            name = f"{file.path.parent.name}/{file.path.name}" if file.longer_keys else file.key
            tally.note("empty, which nothing can show", readable(name))
    for longer in (0, 1):
        if len({file.key for file in files}) < len(files):
            files = [file._replace(key=file.longer_keys[longer]) if file.longer_keys else file for file in files]
    return files, tally


def _class_folders(folder: Path, tally: Tally) -> dict[str, Path]:
    """Folders of classes by the classes' names, in the order of their labels.

    Raises:
        InputError: there are images, but no such folders.
    """
    if not folder.is_dir():
        return {}
    paths = sorted(folder.iterdir())
    folders = [path for path in paths if path.is_dir() and not is_litter(path.name)]
    found = {readable(path.name): path for path in folders}
    if len(found) < len(folders):
        raise InputError(f"{folder} has folders whose names differ only in how bytes that are no UTF-8 are written")
    others = [path.name for path in paths if not path.is_dir() or is_litter(path.name)]
    flat = [name for name in others if extension(name) in IMAGE_EXTENSIONS and not is_litter(name)]
    if flat and not found:
        raise InputError(
            f"{folder} holds {len(flat):,} images, such as {readable(flat[0])}, but no folders of classes: move each "
            f"into its class's, as {folder.name}/n01440764/{readable(flat[0])} (Kaggle's LOC_val_solution.csv says "
            f"which), or use {VAL_ARCHIVE}"
        )
    for name in others:
        tally.leave_out(HIDDEN if is_litter(name) else "in no class's folder", f"{folder.name}/{readable(name)}")
    return {name: found[name] for name in sorted_classes(found)}


def _class_in_folder(split: Path, task: tuple[int, Path]) -> _Found:
    label, folder = task
    tally, files = Tally(), []
    for path in _walk(folder, tally, (folder.resolve(),)):
        if _is_image(f"{folder.name}/{path.name}", tally):
            key, within = _key(path.name), readable(str(path.relative_to(split).parent))
            longer = f"{within}/{key}", f"{within}/{readable(path.name).replace('.', '_')}"
            files.append(File(path, 0, path.stat().st_size, key, label, longer))
    return files, tally


def _walk(folder: Path, tally: Tally, above: tuple[Path, ...]) -> Iterator[Path]:
    """Files in a folder and those below it, sorted; what is hidden is left out.

    Raises:
        InputError: a link leads to a folder above.
        OSError: a folder can't be read.
    """
    for path in sorted(folder.iterdir()):
        if is_litter(path.name):
            tally.leave_out(HIDDEN, readable(f"{folder.name}/{path.name}"))
        elif path.is_dir():
            if (real := path.resolve()) in above:
                raise InputError(f"{path} is a link to a folder above it: remove it")
            yield from _walk(path, tally, (*above, real))
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise InputError(f"{path} is a link to nothing: restore what it leads to, or remove it")
        else:
            tally.leave_out("of devices and pipes", readable(f"{folder.name}/{path.name}"))


def _is_image(name: str, tally: Tally) -> bool:
    """Whether a file is taken for an image, by the ending of its name; else it is counted as left out."""
    if extension(name) in IMAGE_EXTENSIONS:
        return True
    tally.leave_out(OTHER, readable(name))
    return False


def _class_in_archive(archive: Path, task: tuple[int, int, int]) -> _Found:
    label, first, size = task
    tally = Tally()
    members = sorted(_tar_members(archive, tally, first, size))
    files = [
        File(archive, offset, length, _key(name), label) for name, offset, length in members if _is_image(name, tally)
    ]
    return files, tally


def _key(name: str) -> str:
    """WebDataset takes what follows the first dot for the extension, so a key has none."""
    return readable(PurePosixPath(name).stem.replace(".", "_"))


def _require_unique(files: Sequence[File], split: str) -> None:
    """Refuses two images of one key."""
    seen: dict[str, File] = {}
    for file in files:
        if (other := seen.setdefault(file.key, file)) is not file:
            raise InputError(f"{split} has two images called {file.key}, in {other.path} and {file.path}: rename one")


def _tar_members(path: Path, tally: Tally, first: int = 0, size: int | None = None) -> list[Member]:
    """Files in a tar, which may itself lie within another; raises InputError where it is damaged or cut off."""
    try:
        return tar_members(path, tally, first, size)
    except tarfile.TarError as error:
        raise InputError(f"{path} is not a whole tar file ({error}): download it again") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


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
