"""Shards that somebody else wrote: an index for them, wherever they lie."""

import glob
import os
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from braceexpand import braceexpand

from convneur.data.addresses import is_remote, public
from convneur.data.errors import InputError
from convneur.data.parallel import in_parallel
from convneur.data.remote import download, list_bucket
from convneur.data.retry import retrying
from convneur.data.shards import Manifest, Scan, claim_folder, scan_shard, write_index

SOURCE = "index"


def prepare_index(pattern: str, out: Path, *, split: str, processes: int) -> int:
    """Write a dataset to `out` that consists of an index only: the shards stay where they are.

    Call it once for each split. Labels become class names as they are: "0", "1", ...

    Args:
        pattern: path or URL (http, https, s3) of WebDataset shards with an image and a .cls file for each sample.
            {000000..000099} stands for numbers; * and ? for what lies in a folder or a bucket. The index has the public
            form of a URL, see `convneur.data.addresses`.
        out: the dataset's folder.
        split: the split to add, or to replace.
        processes: how many shards are read at a time.

    Returns:
        Samples in the split.

    Raises:
        InputError: there is no such shard, or one is damaged; or `out` holds something else.
    """
    names = expand(pattern)
    if alike := [name for name, count in Counter(map(public, set(names))).items() if count > 1]:
        raise InputError(
            f"{alike[0]} stands for several shards: what grants access, such as a query with a signature, isn't kept, "
            "so their addresses must differ in the rest"
        )
    fresh = claim_folder(out, SOURCE)
    manifest = Manifest(SOURCE, (), {}) if fresh else Manifest.read(out)
    scans = in_parallel(_scan, names, processes, what=f"indexing {split}", unit="shards", sizes=[1] * len(names))
    entry = write_index(out, split, scans)
    classes = max(len(manifest.classes), 1 + max(int(np.max(scan.rows["label"])) for scan in scans))
    replace(manifest, classes=tuple(map(str, range(classes))), splits=manifest.splits | {split: entry}).write(out)
    return sum(len(scan.rows) for scan in scans)


def expand(pattern: str) -> list[str]:
    """Absolute paths and URLs that a pattern stands for, in its order.

    A path or an object that exists is taken as it is, whatever its characters would mean; so is the part of a path that
    is a folder. Brackets are a set of characters only where nothing has such a name.

    Raises:
        InputError: there is none, or the server can't list what it has.
    """
    if not is_remote(pattern):
        folder, rest = _existing(pattern)
        parts = [folder + part for part in braceexpand(rest)] if rest else [folder]
        found = [_local(folder, part) for part in parts]
    else:
        parts = list(braceexpand(pattern))
        found = [_in_bucket(part) if part.lower().startswith("s3://") else [_over_http(part)] for part in parts]
    for part, names in zip(parts, found, strict=True):
        if not names:
            raise InputError(f"{public(part)}: there is no such shard")
    return [name for names in found for name in names]


def _existing(path: str) -> tuple[str, str]:
    """The longest beginning of a path, in whole components, that exists; and the rest."""
    end = len(path)
    while end > 0 and not os.path.lexists(path[:end]):
        end = path.rfind("/", 0, end - 1) + 1
    return path[:end], path[end:]


def _local(folder: str, path: str) -> list[str]:
    rest = path[len(folder) :]
    names: list[str] = []
    for wanted in (_literal_brackets(rest), rest):
        names = names or glob.glob(glob.escape(folder) + wanted)  # noqa: PTH207  # a Path has no anchorless glob
    return sorted(str(Path(name).absolute()) for name in names)


def _in_bucket(url: str) -> list[str]:
    if "*" not in url and "?" not in url:
        return [url]
    found = list_bucket(url[: min(url.find(sign) for sign in "*?[" if sign in url)])
    if url in found:
        return [url]
    names: list[str] = []
    for wanted in (_literal_brackets(url), url):
        names = names or [name for name in found if fnmatchcase(name, wanted)]
    return names


def _over_http(url: str) -> str:
    if "*" in url.partition("?")[0]:
        raise InputError(
            f"{public(url)}: no server lists its files over HTTP: write numbers as {{000000..000099}}, and a * that "
            "belongs to a name as %2A"
        )
    return url


def _literal_brackets(pattern: str) -> str:
    return pattern.replace("[", "[[]")


def _scan(name: str) -> Scan:
    if not is_remote(name):
        return scan_shard(Path(name), name)
    with TemporaryDirectory(prefix="convneur-index-") as folder:
        path = Path(folder) / "shard.tar"

        def fetch() -> Scan:
            with path.open("wb") as file:
                download(name, file)
            try:
                return scan_shard(path, public(name))
            except InputError as error:  # perhaps only part of it arrived
                raise OSError(str(error)) from None

        return retrying(fetch, name, OSError)
