"""Shards that somebody else wrote: an index for them, wherever they lie."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from braceexpand import braceexpand

from convneur.data.errors import InputError
from convneur.data.files import TEMPORARY, atomic_write
from convneur.data.format.index import Scan, content_hash, joined, scan_shard, write_index
from convneur.data.format.manifest import Manifest, Split
from convneur.data.format.selection import Tally
from convneur.data.prepare.claim import claimed, discarded_on_failure
from convneur.data.prepare.parallel import in_parallel
from convneur.data.prepare.tile import Copies
from convneur.data.prepare.tiling import forget_parts, require_tiling
from convneur.data.prepare.writing import Task, write_shards
from convneur.data.stores.addresses import is_remote, public
from convneur.data.stores.remote import download, list_bucket
from convneur.data.stores.retry import retrying

SOURCE = "index"
SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def prepare_index(
    pattern: str, out: Path, *, split: str, processes: int, tiles: int = 0, say: Callable[[str], object] = print
) -> int:
    """Writes a dataset to `out` that consists of an index only: the shards stay where they are. Or of tiled copies.

    Call it once for each split. Labels become class names as they are: "0", "1", ...

    Args:
        pattern: path or URL (http, https, s3) of WebDataset shards with an image and a .cls file for each sample.
            {000000..000099} stands for numbers; * and ? for what lies in a folder or a bucket. The index has the public
            form of a URL, see `convneur.data.stores.addresses`.
        out: the dataset's folder.
        split: the split to add, or to replace.
        processes: how many shards are read at a time.
        tiles: coding units between the restart markers of the copies' JPEGs; 0 for no copies.
        say: takes a line for what is left out, and for what is odd, and about tiling.

    Returns:
        Samples in the split.

    Raises:
        InputError: there is no such shard, or one is damaged; or `out` holds something else; or copies are asked for,
            and `out` has the split already, or there is no compiler.
    """
    if tiles:
        require_tiling(tiles)
    if not SPLIT.fullmatch(split):
        raise InputError(f"--split is {split!r}, expected a name of letters, digits, - and _, such as val")
    names = expand(pattern)
    if alike := [name for name, count in Counter(map(public, set(names))).items() if count > 1]:
        raise InputError(
            f"{alike[0]} stands for several shards: what grants access, such as a query with a signature, isn't kept, "
            "so their addresses must differ in the rest"
        )
    with discarded_on_failure(out):
        with claimed(out, SOURCE):
            pass  # a folder that holds something else is refused before the work
        scans = in_parallel(_scan, names, processes, what=f"indexing {split}", unit="shards", sizes=[1] * len(names))
        _require_different(scans)
        with claimed(out, SOURCE) as fresh:  # another process may have added another split meanwhile
            manifest = Manifest(SOURCE, (), {}) if fresh else Manifest.read(out)
            if tiles:
                entry = _write_tiled(Task(out, processes, tiles=tiles, say=say), split, scans, manifest)
            else:
                entry = write_index(out, split, scans)
            classes = max(len(manifest.classes), 1 + max(int(np.max(scan.rows["label"])) for scan in scans))
            labels = tuple(map(str, range(classes)))
            replace(manifest, classes=labels, splits=manifest.splits | {split: entry}).write(out)
            forget_parts(out)
            _begun(out, split).unlink(missing_ok=True)
    for line in (*Tally().add(scan.tally for scan in scans).lines(split), *_twice(scans, split, manifest)):
        say(line)
    return sum(len(scan.rows) for scan in scans)


def _write_tiled(task: Task, split: str, scans: Sequence[Scan], manifest: Manifest) -> Split:
    """Writes tiled copies of the shards that were scanned into a folder that is claimed, or what is missing of them."""
    index, marker = joined(scans), _begun(task.out, split)
    source = Split(tuple(scan.shard for scan in scans), 0, content_hash(index))
    plan = f"{source.index_hash} tiles {task.tiles}"
    if split in manifest.splits:
        raise InputError(f"{task.out} holds split {split} already: give --out another folder")
    if marker.exists() or any(task.out.glob(f"{split}-*.tar")):
        if not marker.exists() or marker.read_bytes() != plan.encode():
            raise InputError(
                f"{task.out} holds the beginnings of split {split} from other shards or with other --tiles: repeat the "
                "command that began it, or give --out another folder"
            )
    else:
        with atomic_write(marker) as file:
            file.write(plan.encode())
    for leftover in task.out.glob(TEMPORARY):
        leftover.unlink()
    entry = write_shards(task, split, Copies(task.out, source, index, None))
    assert entry is not None  # as they aren't a part
    return entry


def _begun(out: Path, split: str) -> Path:
    """Says, while tiled copies of a split are being written, what of."""
    return out / f"{split}.preparing"


def _require_different(scans: Sequence[Scan]) -> None:
    """Refuses the same shard under two names."""
    seen: dict[tuple[int, int], str] = {}
    for shard, *_ in scans:
        if (other := seen.setdefault((shard.size, shard.crc32c), shard.name)) != shard.name:
            raise InputError(f"{shard.name} is the same as {other}, byte for byte: name one of them")


def _twice(scans: Sequence[Scan], split: str, manifest: Manifest) -> list[str]:
    """A line if images occur twice in the split, and one if a shard is in another split, too."""
    lines = []
    checksums, counts = np.unique(np.concatenate([scan.rows["crc32c"] for scan in scans]), return_counts=True)
    alike = [scan.rows[np.isin(scan.rows["crc32c"], checksums[counts > 1])] for scan in scans]
    samples = Counter((row["key"], int(row["crc32c"])) for rows in alike for row in rows)
    if twice := [key.decode() for (key, _), count in samples.items() if count > 1]:
        lines.append(f"warning: {split}: {len(twice):,} images occur more than once, key and bytes, such as {twice[0]}")
    others = {shard: name for name, entry in manifest.splits.items() if name != split for shard in entry.shards}
    if common := [shard for shard, *_ in scans if shard in others]:
        other = others[common[0]]
        lines.append(f"warning: {split}: {len(common):,} shards are in split {other}, too, such as {common[0].name}")
    return lines


def expand(pattern: str) -> list[str]:
    """Absolute paths and URLs that a pattern stands for, in its order.

    A path or an object that exists is taken as it is, whatever its characters would mean; so is the part of a path that
    is a folder. Brackets are a set of characters only where nothing has such a name.

    Raises:
        InputError: there is none, or the server can't list what it has.
    """
    if not is_remote(pattern):
        folder, rest = _existing(pattern)
        parts = [folder + part for part in _braces(rest)] if rest else [folder]
        found = [_local(folder, part) for part in parts]
    else:
        parts = _braces(pattern)
        found = [_in_bucket(part) if part.lower().startswith("s3://") else [_over_http(part)] for part in parts]
    for part, names in zip(parts, found, strict=True):
        if not names:
            raise InputError(f"{public(part)}: there is no such shard")
    every = [name for names in found for name in names]
    if twice := next((name for name, count in Counter(every).items() if count > 1), ""):
        raise InputError(f"{public(pattern)} names {public(twice)} twice: name every shard once")
    return every


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise InputError(f"{public(pattern)} has a brace that isn't closed, or isn't opened: close every one") from None


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
