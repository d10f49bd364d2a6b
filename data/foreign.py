"""Shards that somebody else wrote: an index for them, wherever they lie."""

import glob
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import numpy as np
from braceexpand import braceexpand

from convneur.data.errors import InputError
from convneur.data.parallel import in_parallel
from convneur.data.remote import download, is_remote, list_bucket
from convneur.data.retry import retrying
from convneur.data.shards import Manifest, Scan, claim_folder, scan_shard, write_index

SOURCE = "index"


def prepare_index(pattern: str, out: Path, *, split: str, processes: int) -> int:
    """Write a dataset to `out` that consists of an index only: the shards stay where they are.

    Call it once for each split. Labels become class names as they are: "0", "1", ...

    Args:
        pattern: path or URL (http, https, s3) of WebDataset shards with an image and a .cls file for each sample.
            {000000..000099} stands for numbers; * and ? for what lies in a folder or a bucket.
        out: the dataset's folder.
        split: the split to add, or to replace.
        processes: how many shards are read at a time.

    Returns:
        Samples in the split.

    Raises:
        InputError: there is no such shard, or one is damaged; or `out` holds something else.
    """
    names = expand(pattern)
    fresh = claim_folder(out, SOURCE)
    manifest = Manifest(SOURCE, (), {}) if fresh else Manifest.read(out)
    scans = in_parallel(_scan, names, processes, what=f"indexing {split}", unit="shards", sizes=[1] * len(names))
    entry = write_index(out, split, scans)
    classes = max(len(manifest.classes), 1 + max(int(np.max(scan.rows["label"])) for scan in scans))
    replace(manifest, classes=tuple(map(str, range(classes))), splits=manifest.splits | {split: entry}).write(out)
    return sum(len(scan.rows) for scan in scans)


def expand(pattern: str) -> list[str]:
    """Absolute paths and URLs that a pattern stands for, in its order.

    Raises:
        InputError: there is none, or the server can't list what it has.
    """
    names = []
    for part in braceexpand(pattern):
        if not is_remote(part):
            found = sorted(str(Path(name).absolute()) for name in glob.glob(part))  # noqa: PTH207  # a Path has no anchorless glob
        elif "*" not in part and "?" not in part:
            found = [part]
        elif urlsplit(part).scheme == "s3":
            prefix = part[: min(part.find(sign) for sign in "*?" if sign in part)]
            found = [url for url in list_bucket(prefix) if fnmatchcase(url, part)]
        else:
            raise InputError(f"{part}: no server lists its files over HTTP: write numbers as {{000000..000099}}")
        if not found:
            raise InputError(f"{part}: there is no such shard")
        names += found
    return names


def _scan(name: str) -> Scan:
    if not is_remote(name):
        return scan_shard(Path(name), name)
    with TemporaryDirectory(prefix="convneur-index-") as folder:
        path = Path(folder) / "shard.tar"

        def fetch() -> Scan:
            with path.open("wb") as file:
                download(name, file)
            try:
                return scan_shard(path, name)
            except InputError as error:  # perhaps only part of it arrived
                raise OSError(str(error)) from None

        return retrying(fetch, name, OSError)
