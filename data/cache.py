"""Whole shards of remote datasets on a node's own disk, shared by all its processes.

Files in the cache's folder, for a shard whose address, size and checksum have the hash NAME:

    NAME.tar   the shard, checked; its modification time is when it was last read
    NAME.part  a fetch in progress, at its full size, so that sizes add up to what is or will be taken
    NAME.lock  locked (flock, which ends with its process) by who fetches NAME
    lock       locked by who makes room
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from convneur.data.errors import InputError
from convneur.data.files import fsync
from convneur.data.remote import download
from convneur.data.retry import retrying
from convneur.data.shards import Shard

WAIT_SECONDS = 0.05


@dataclass(frozen=True)
class ShardCache:
    """A folder that holds at most `budget` bytes of shards, the ones read last.

    Attributes:
        folder: where; made when it is first needed.
        budget: bytes.
    """

    folder: Path
    budget: int

    def read(self, shard: Shard, size: int, offset: int) -> bytes:
        """Read bytes of a shard, which is fetched if need be.

        Raises:
            InputError: it can't be fetched.
            OSError: the cache's disk fails.
        """
        path = self._path(shard)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(shard)
                continue  # and look again: it may have been evicted meanwhile
            try:
                os.utime(descriptor)
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def touch(self, shard: Shard) -> None:
        """Have a shard in the cache, as one that was just read; see `fetch`."""
        try:
            os.utime(self._path(shard))
        except FileNotFoundError:
            self.fetch(shard)

    def fetch(self, shard: Shard) -> None:
        """Have a shard in the cache. Of several processes that want it, one fetches and the others wait.

        Raises:
            InputError: it can't be fetched, is not the shard that was indexed, or doesn't fit the budget.
        """
        if shard.size > self.budget:
            raise InputError(
                f"data.cache_gb is {self.budget / 1e9:g}, but {shard.name} alone has {shard.size / 1e9:g} GB: raise it"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"data.cache_dir {self.folder} can't be made ({error}): choose another folder") from None
        path = self._path(shard)
        with _locked(path.with_suffix(".lock")):
            if not path.exists():
                retrying(lambda: self._fetch_once(shard, path), shard.name, OSError)

    def drop(self, shard: Shard) -> None:
        """Forget a shard, so that it is fetched anew."""
        self._path(shard).unlink(missing_ok=True)

    def _fetch_once(self, shard: Shard, path: Path) -> None:
        """The caller holds the shard's lock."""
        part = path.with_suffix(".part")
        self._reserve(part, shard.size)
        try:
            with part.open("r+b") as file:
                size, checksum = download(shard.name, file)
                if size < shard.size:
                    raise OSError(f"it ends after {size} of {shard.size} bytes")
                if (size, checksum) != (shard.size, shard.crc32c):
                    raise OSError("it is not the shard that was indexed: size or checksum differ")
                file.flush()
                os.fsync(file.fileno())
            with _locked(self.folder / "lock"):  # who makes room would miss a file that changes its name meanwhile
                part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        fsync(self.folder)

    def _reserve(self, part: Path, size: int) -> None:
        """Create `part` with `size` bytes once there is room, made by evicting what was read longest ago."""
        while True:
            with _locked(self.folder / "lock"):
                if self._make_room(size):
                    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                    try:
                        os.posix_fallocate(descriptor, 0, size)
                    except OSError:
                        part.unlink()
                        raise
                    finally:
                        os.close(descriptor)
                    return
            time.sleep(WAIT_SECONDS)  # other fetches take all of the budget; they end in bounded time

    def _make_room(self, size: int) -> bool:
        shards, taken = [], 0
        for path in self.folder.iterdir():
            if path.suffix == ".part" and _abandoned(path):
                path.unlink()
            elif path.suffix in (".part", ".tar"):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    taken += status.st_size
                    if path.suffix == ".tar":
                        shards.append((status.st_mtime_ns, path, status.st_size))
        for _, path, freed in sorted(shards):
            if taken + size <= self.budget:
                break
            path.unlink(missing_ok=True)
            taken -= freed
        return taken + size <= self.budget

    def _path(self, shard: Shard) -> Path:
        """A name of its own for each content of each address."""
        digest = blake2b(f"{shard.name} {shard.size} {shard.crc32c}".encode(), digest_size=12).hexdigest()
        return self.folder / f"{digest}.tar"


def _abandoned(part: Path) -> bool:
    """Whether the process that fetched it is gone."""
    with suppress(BlockingIOError), _locked(part.with_suffix(".lock"), fcntl.LOCK_NB):
        return True
    return False


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
