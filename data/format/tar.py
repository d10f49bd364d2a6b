"""Tar files read where they lie: what each member is, and the samples of a WebDataset shard."""

import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c
from webdataset.tariterators import base_plus_ext

from convneur.data.errors import InputError
from convneur.data.format.selection import HIDDEN, IMAGE_EXTENSIONS, OTHER, Tally, extension, is_litter, readable

LABEL_EXTENSION = "cls"
MAX_CLASSES = 1 << 20
LONGEST_LABEL = 32
LARGEST_IMAGE = (1 << 32) - 1
MOST_LINKS = 40

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\3\4": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
"""How compressed files begin."""

Row = tuple[int, int, int, int, bytes]
"""Offset, size, label, CRC-32C and key of a sample."""


class Member(NamedTuple):
    """A file within a tar: its name, and where its bytes lie in the file that holds the tar."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, tally: Tally, first: int = 0, size: int | None = None) -> list[Member]:
    """Finds the files in a tar, which may itself lie within another. Links stand for the files that they lead to.

    Args:
        path: file that holds the tar.
        tally: takes what is left out: what is hidden, and what is no file.
        first: where the tar begins in the file.
        size: of the tar; it goes on to the file's end if None.

    Raises:
        tarfile.TarError: the tar is compressed, damaged or cut off.
        ValueError: the bytes of a member don't lie in the tar as they are.
    """
    end = path.stat().st_size if size is None else first + size
    files: dict[str, tarfile.TarInfo] = {}
    links: dict[str, str] = {}
    listed: list[str] = []
    with path.open("rb") as file:
        file.seek(first)
        with _opened(file) as tar:
            for member in tar:
                place = posixpath.normpath(member.name)
                if member.isdir():
                    continue
                if member.islnk() or member.issym():
                    above = posixpath.dirname(place) if member.issym() else ""
                    links[place] = posixpath.normpath(posixpath.join(above, member.linkname))
                elif member.isreg():
                    _require_whole(member, end)
                    files[place] = member
                else:
                    tally.leave_out("of devices and pipes", readable(member.name))
                    continue
                if is_litter(member.name):
                    tally.leave_out(HIDDEN, readable(member.name))
                else:
                    listed.append(member.name)
            check_tar_end(path, tar.offset, end)
    return list(_resolved(listed, files, links))


def _resolved(listed: list[str], files: dict[str, tarfile.TarInfo], links: dict[str, str]) -> Iterator[Member]:
    for name in listed:
        place = posixpath.normpath(name)
        for _ in range(MOST_LINKS):
            if place in files or place not in links:
                break
            place = links[place]
        member = files.get(place)
        if member is None:
            raise ValueError(
                f"{readable(name)} is a link to {readable(links[posixpath.normpath(name)])}, which isn't in it: "
                "write the tar with --dereference"
            )
        if member.issparse():
            raise ValueError(f"{readable(name)} is stored with holes, not as it is: write the tar without --sparse")
        yield Member(name, member.offset_data, member.size)


def _opened(file: BinaryIO) -> tarfile.TarFile:
    first = file.tell()
    try:
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError:
        file.seek(first)
        begins = file.read(8)
        for magic, kind in COMPRESSED.items():
            if begins.startswith(magic):
                raise tarfile.ReadError(
                    f"it is compressed with {kind}, so images can't be read in place: unpack it first"
                ) from None
        raise


def _require_whole(member: tarfile.TarInfo, end: int) -> None:
    if not member.issparse() and member.offset_data + member.size > end:
        raise tarfile.ReadError(f"cut off within {readable(member.name)}")


def read_samples(path: Path, name: str) -> tuple[list[Row], Tally]:
    """Reads a WebDataset shard from end to end: an image and a .cls file with the same key for each sample.

    A key ends at the first dot of a file's name, as WebDataset has it. Where that leaves an image or a label alone, and
    both names are the same but for what follows the last dot, it ends there.

    Args:
        path: the tar file.
        name: what messages call it.

    Returns:
        The samples in the order of their images, and what else there is.

    Raises:
        InputError: it can't be read to its end, or a sample in it lacks its image or its label, or has two.
    """
    tally = Tally()
    try:
        members = tar_members(path, tally)
        images, labels = _by_key(members, tally)
        lone = [(images.get(key) or labels[key]).name for key in images.keys() ^ labels.keys()]
        if lone or not images:
            what = f"see {readable(min(lone))}" if lone else "there is no sample at all"
            raise InputError(f"{name} needs an image and a .{LABEL_EXTENSION} file for each sample, but {what}")
        with path.open("rb") as file:
            rows = [
                (
                    image.offset,
                    image.size,
                    _label(file, labels[key]),
                    google_crc32c.value(_content(file, image)),
                    readable(key).encode(),
                )
                for key, image in images.items()
            ]
    except (tarfile.TarError, ValueError) as error:
        raise InputError(f"{name} is not a whole WebDataset shard ({error}): write it again") from None
    for image in images.values():
        if not image.size:
            tally.note("empty, which nothing can show", readable(image.name))
    tally.taken = len(rows)
    return rows, tally


def _by_key(members: list[Member], tally: Tally) -> tuple[dict[str, Member], dict[str, Member]]:
    """Images and labels by their samples' keys; raises ValueError where a sample has two of one."""
    kinds: dict[bool, list[Member]] = {True: [], False: []}
    for member in members:
        kind = extension(member.name)
        if kind in IMAGE_EXTENSIONS or kind == LABEL_EXTENSION:
            kinds[kind != LABEL_EXTENSION].append(member)
        else:
            tally.leave_out(OTHER, readable(member.name))
    stems = {is_image: {posixpath.splitext(member.name)[0] for member in kinds[is_image]} for is_image in kinds}
    pairs = stems[True] & stems[False]
    found: dict[bool, dict[str, Member]] = {True: {}, False: {}}
    for is_image, files in kinds.items():
        for member in files:
            stem, key = posixpath.splitext(member.name)[0], _first_dot(member.name)
            if stem != key and stem not in pairs and key in pairs:
                tally.leave_out("more of a sample that has its own", readable(member.name))
            elif (other := found[is_image].setdefault(stem, member)) is not member:
                what = "images" if is_image else "labels"
                raise ValueError(
                    f"{readable(stem)} has several {what}: {readable(other.name)}, {readable(member.name)}"
                )
    return found[True], found[False]


def _first_dot(name: str) -> str:
    key, _ = base_plus_ext(name)
    return str(key)


def _label(file: BinaryIO, member: Member) -> int:
    content = _content(file, member._replace(size=min(member.size, LONGEST_LABEL + 1)))
    text = content.strip()
    if len(content) > LONGEST_LABEL or not re.fullmatch(rb"\+?[0-9]+", text):
        shown = readable(text[:LONGEST_LABEL].decode("utf-8", "surrogateescape"))
        raise ValueError(f"{readable(member.name)} holds {shown!r}, expected a class's number: 0, 1, ...")
    if int(text) >= MAX_CLASSES:
        raise ValueError(f"{readable(member.name)} holds {int(text)}, expected 0 to {MAX_CLASSES - 1}")
    return int(text)


def _content(file: BinaryIO, member: Member) -> bytes:
    if member.size > LARGEST_IMAGE:
        raise ValueError(f"{readable(member.name)} has {member.size} bytes, too many for an image")
    file.seek(member.offset)
    return file.read(member.size)


def check_tar_end(path: Path, offset: int, end: int | None = None) -> None:
    """Checks that a tar ends where its reader stopped, as the reader also stops, in silence, at a damaged header.

    Args:
        path: file that holds the tar.
        offset: where the reader stopped.
        end: where the tar ends in the file; at the file's end if None.

    Raises:
        tarfile.ReadError: it goes on, or it is cut off.
    """
    with path.open("rb") as file:
        end = path.stat().st_size if end is None else end
        file.seek(offset)
        rest = file.read(min(max(end - offset, 0), 2 * tarfile.RECORDSIZE))
    if len(rest) < 2 * tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError(f"damaged or cut off at byte {offset} of {end}")
