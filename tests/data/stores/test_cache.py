"""The cache's folder: whose it may be, and what becomes of a disk that is smaller than the budget."""

import functools
import http.server
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import google_crc32c
import pytest

from convneur.data.errors import InputError
from convneur.data.format.manifest import Shard
from convneur.data.stores.cache import ShardCache

SIZE = 100_000


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Shard, bytes]]]:
    folder = tmp_path_factory.mktemp("origin")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    made = []
    for number in range(8):
        content = os.urandom(SIZE)
        (folder / f"{number}.tar").write_bytes(content)
        url = f"http://127.0.0.1:{server.server_port}/{number}.tar"
        made.append((Shard(url, SIZE, google_crc32c.value(content), 1), content))
    yield made
    server.shutdown()
    server.server_close()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine doesn't let root mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_private_folder_is_for_nobody_else(shards: list[tuple[Shard, bytes]], tmp_path: Path) -> None:
    (shard, content), *_ = shards
    for folder, made_before in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if made_before:
            folder.mkdir(mode=0o755)
        assert ShardCache(folder, 10**9, private=True).read(shard, 10, 5) == content[5:15]
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_could_have_filled_is_not_used(shards: list[tuple[Shard, bytes]], tmp_path: Path) -> None:
    (shard, _), *_ = shards
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "file").touch()
    planted = [(tmp_path / "link", True, "is no folder"), (tmp_path / "file", False, "is no folder")]
    if os.geteuid() == 0:
        for name, owner, mode, private, fault in (
            ("theirs", 12345, 0o755, True, "belongs to another user"),
            ("theirs too", 12345, 0o755, False, "belongs to another user"),
            ("of a group", 12345, 0o770, True, "belongs to another user"),
            ("open", 12345, 0o777, False, "may be written to by every user"),
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name).chmod(mode)
            os.chown(tmp_path / name, owner, -1)
            planted.append((tmp_path / name, private, fault))
    for folder, private, fault in planted:
        for use in (lambda cache: cache.read(shard, 10, 0), lambda cache: cache.touch(shard)):
            with pytest.raises(InputError, match=rf"^data.cache_dir {folder} {fault}: choose"):
                use(ShardCache(folder, 10**9, private=private))
        assert not mine.exists() or not list(mine.iterdir())


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can get to; pytest's are its own user's alone."""
    with TemporaryDirectory(prefix="convneur-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_group_may_share_a_folder(shards: list[tuple[Shard, bytes]], open_folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("being two users takes root")
    folder = open_folder / "shared"
    folder.mkdir()
    folder.chmod(0o2770)
    os.chown(folder, 12345, 4321)
    (shard, content), *_ = shards

    def read(user: int) -> None:
        os.setgroups([4321])
        os.setgid(user)
        os.setuid(user)
        os.umask(0o022)
        assert ShardCache(folder, 10**9).read(shard, SIZE, 0) == content

    for user in (12345, 12346):
        process = get_context("fork").Process(target=read, args=(user,))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert [path.stat().st_uid for path in folder.glob("*.tar")] == [12345]


@pytest.mark.parametrize("suffix", [".tar", ".part"])
def test_no_link_in_the_folder_is_followed(shards: list[tuple[Shard, bytes]], tmp_path: Path, suffix: str) -> None:
    (shard, content), *_ = shards
    victim = tmp_path / "weights"
    victim.write_bytes(b"weights")
    cache = ShardCache(tmp_path / "cache", 10**9)
    cache.folder.mkdir()
    cache._path(shard).with_suffix(suffix).symlink_to(victim)
    assert cache.read(shard, SIZE, 0) == content
    assert victim.read_bytes() == b"weights"
    assert cache._path(shard).is_file()
    assert not cache._path(shard).is_symlink()


def test_a_full_disk_holds_the_shards_read_last(shards: list[tuple[Shard, bytes]], tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 * SIZE) as disk:
        cache = ShardCache(disk / "cache", 10**9)
        for shard, content in shards:
            assert cache.read(shard, SIZE, 0) == content
        kept = {path.stem for path in cache.folder.glob("*.tar")}
        assert kept == {cache._path(shard).stem for shard, _ in shards[-3:]}
        assert not list(cache.folder.glob("*.part"))


def test_a_disk_that_others_filled_is_done_without(
    shards: list[tuple[Shard, bytes]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 4 * SIZE) as disk:
        (disk / "others").write_bytes(bytes(3 * SIZE + SIZE // 2))
        cache = ShardCache(disk / "cache", 10**9)
        for _ in range(2):
            for shard, content in shards:
                cache.touch(shard)
                assert cache.read(shard, 500, 1000) == content[1000:1500]
        assert not list(cache.folder.glob("*.part"))
    assert capfd.readouterr().err.count("is full: shards are read without being kept") == 1
