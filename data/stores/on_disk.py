"""Whole shards as files, wherever they lie: for work that reads all of one, once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from convneur.data.errors import InputError
from convneur.data.format.manifest import Shard, file_crc32c
from convneur.data.stores.addresses import is_remote, public
from convneur.data.stores.remote import download
from convneur.data.stores.retry import retrying


@contextmanager
def shard_on_disk(folder: Path, shard: Shard) -> Iterator[Path]:
    """Yields where a shard of the dataset in `folder` lies; one on a server is fetched, for as long as the block lasts.

    Raises:
        InputError: it is missing or has another size, or the server doesn't give it. Its bytes aren't looked at.
    """
    with TemporaryDirectory(prefix="convneur-shard-") as temporary:
        path = folder / shard.name
        if is_remote(shard.name):
            path = Path(temporary) / "shard.tar"
            retrying(lambda: _fetch(shard, path), shard.name, OSError)
            if file_crc32c(path) != shard.crc32c:  # perhaps garbled on its way: no reason yet to deny an image
                retrying(lambda: _fetch(shard, path), shard.name, OSError)
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            what = "is missing" if size is None else f"has {size} bytes, not {shard.size}"
            where = public(shard.name) if is_remote(shard.name) else path
            raise InputError(f"{where} {what}: restore it, or prepare the dataset again")
        yield path


def _fetch(shard: Shard, path: Path) -> None:
    with path.open("wb") as file:
        size, _ = download(shard.name, file, shard.size)
    if size < shard.size:
        raise OSError(f"it ends after {size} of {shard.size} bytes")
