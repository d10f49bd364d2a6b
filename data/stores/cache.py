"""Whole shards of remote datasets on a node's own disk, shared by all its processes.

Files in the cache's folder, for a shard whose address, size and checksum have the hash NAME:

    NAME.tar   the shard, checked; its modification time is when it was last read
    NAME.part  a fetch in progress, at its full size, so that sizes add up to what is or will be taken
    NAME.lock  locked (flock, which ends with its process) by who fetches NAME
    lock       locked by who makes room

Another user may have made the folder, or put files into it, before us: `_check` says which folders are used, and no
link in one is followed.
"""

import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from convneur.data.errors import InputError
from convneur.data.files import fsync
from convneur.data.format.manifest import Shard
from convneur.data.stores.addresses import public
from convneur.data.stores.remote import download, read_range
from convneur.data.stores.retry import retrying

WAIT_SECONDS = 0.05
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OWN_ONLY = os.O_CLOEXEC | os.O_NOFOLLOW


class _DiskFullError(Exception):
    """No `OSError`: trying again would not help."""


@dataclass(frozen=True)
class ShardCache:
    """A folder that holds at most `budget` bytes of shards, the ones read last; fewer where the disk is smaller.

    Attributes:
        folder: where; made when it is first needed.
        budget: bytes.
        private: whether the folder is for this user alone. One that isn't may be shared by a group: it is used with the
            access rights that it has.
    """

    folder: Path
    budget: int
    private: bool = False

    def read(self, shard: Shard, size: int, offset: int) -> bytes:
        """Reads bytes of a shard, which is fetched if need be; on a full disk, only they are.

        Raises:
            InputError: it can't be fetched, or the folder is another user's.
            OSError: the cache's disk fails, or a server that is asked for these bytes alone.
        """
        path = self._path(shard)
        self._check()
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | _OWN_ONLY)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                if not self.fetch(shard):
                    return read_range(shard.name, size, offset)
                continue  # and look again: it may have been evicted meanwhile
            try:
                with suppress(PermissionError):  # a file of another one of the group
                    os.utime(descriptor)
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def touch(self, shard: Shard) -> None:
        """Makes sure that a shard is in the cache, as one that was just read; see `fetch`."""
        self._check()
        try:
            os.utime(self._path(shard), follow_symlinks=False)
        except PermissionError:
            return
        except FileNotFoundError:
            if not self.fetch(shard):
                _say_full(self.folder)

    def fetch(self, shard: Shard) -> bool:
        """Makes sure that a shard is in the cache. Of several processes that want it, one fetches and the others wait.

        Returns:
            False if the disk has no room for it, although all shards were evicted that could be.

        Raises:
            InputError: it can't be fetched, is not the shard that was indexed, or doesn't fit the budget; or the folder
                is another user's.
        """
        if shard.size > self.budget:
            raise InputError(
                f"data.cache_gb is {self.budget / 1e9:g}, but {public(shard.name)} alone has {shard.size / 1e9:g} GB: "
                "raise it"
            )
        path = self._path(shard)
        try:
            self._make_folder()
            with _locked(path.with_suffix(".lock")):
                while not _is_file(path):
                    try:
                        retrying(lambda: self._fetch_once(shard, path), shard.name, OSError)
                    except _DiskFullError:
                        if not self._evict():
                            return False
        except _DiskFullError:
            return False
        return True

    def _make_folder(self) -> None:
        try:
            with _disk_full_apart():
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    self.folder.mkdir(mode=0o700 if self.private else 0o777)
        except OSError as error:
            raise InputError(f"data.cache_dir {self.folder} can't be made ({error}): choose another folder") from None
        self._check()

    def _check(self) -> None:
        """Raises InputError where others than its users could put files into the folder. It may still be absent."""
        try:
            status = self.folder.lstat() if self.private else self.folder.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"data.cache_dir {self.folder} can't be used ({error}): choose another folder") from None
        ours, shared = status.st_uid == os.geteuid(), not self.private
        fault = ""
        if not stat.S_ISDIR(status.st_mode):
            fault = "is no folder"
        elif not ours and not (shared and (status.st_uid == 0 or status.st_mode & stat.S_IWGRP)):
            fault = "belongs to another user"
        elif not ours and status.st_mode & stat.S_IWOTH:
            fault = "may be written to by every user"
        if fault:
            raise InputError(f"data.cache_dir {self.folder} {fault}: choose a folder of your own, or of your group")
        if self.private and status.st_mode & 0o077:  # as older versions made it
            self.folder.chmod(0o700)

    def drop(self, shard: Shard) -> None:
        """Forgets a shard, so that it is fetched anew."""
        self._path(shard).unlink(missing_ok=True)

    def _fetch_once(self, shard: Shard, path: Path) -> None:
        """The caller holds the shard's lock."""
        part = path.with_suffix(".part")
        try:
            with _disk_full_apart(), os.fdopen(self._reserve(part, shard.size), "wb") as file:
                size, checksum = download(shard.name, file, shard.size)
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

    def _reserve(self, part: Path, size: int) -> int:
        """Creates `part` with `size` bytes once there is room, made by evicting what was read longest ago.

        Returns:
            A descriptor to write to it.
        """
        while True:
            with _locked(self.folder / "lock"):
                if self._make_room(size):
                    part.unlink(missing_ok=True)
                    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OWN_ONLY, 0o666)
                    try:
                        os.posix_fallocate(descriptor, 0, size)
                    except OSError:
                        os.close(descriptor)
                        raise
                    return descriptor
            time.sleep(WAIT_SECONDS)  # other fetches take all of the budget; they end in bounded time

    def _evict(self) -> bool:
        """Removes the shard that was read longest ago; False where there is none."""
        with _locked(self.folder / "lock"):
            shards = sorted(self._shards())
            for _, path, _ in shards[:1]:
                path.unlink(missing_ok=True)
        return bool(shards)

    def _make_room(self, size: int) -> bool:
        shards = list(self._shards())
        taken = sum(size for _, _, size in shards)
        for part in self.folder.glob("*.part"):
            if _abandoned(part):
                part.unlink()
            else:
                with suppress(FileNotFoundError):
                    taken += part.lstat().st_size
        for _, path, freed in sorted(shards):
            if taken + size <= self.budget:
                break
            path.unlink(missing_ok=True)
            taken -= freed
        return taken + size <= self.budget

    def _shards(self) -> Iterator[tuple[int, Path, int]]:
        """When each was last read, its path, its bytes."""
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                status = path.lstat()
                yield status.st_mtime_ns, path, status.st_size

    def _path(self, shard: Shard) -> Path:
        """A name of its own for each content of each address."""
        content = f"{shard.name} {shard.size} {shard.crc32c}".encode(errors="surrogateescape")
        return self.folder / f"{blake2b(content, digest_size=12).hexdigest()}.tar"


def _abandoned(part: Path) -> bool:
    """Whether the process that fetched it is gone."""
    with suppress(BlockingIOError), _locked(part.with_suffix(".lock"), fcntl.LOCK_NB):
        return True
    return False


def _is_file(path: Path) -> bool:
    """Whether a file is there; what else has its name is removed, links too."""
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            return True
        path.unlink()
    except FileNotFoundError:
        pass
    return False


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    with _disk_full_apart():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _OWN_ONLY, 0o666)
        except PermissionError:  # made by another one of the group; NFS locks only what may be written
            descriptor = os.open(path, os.O_RDONLY | _OWN_ONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk_full_apart() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _DiskFullError from None
        raise


@lru_cache(maxsize=1)
def _say_full(folder: Path) -> None:
    print(f"warning: the disk of {folder} is full: shards are read without being kept, image by image", file=sys.stderr)
