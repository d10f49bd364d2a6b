"""Preparing a dataset on a disk that is too small."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from convneur.data.errors import InputError
from convneur.data.files import TEMPORARY
from convneur.data.prepare.synthetic import prepare_synthetic
from convneur.data.stores.tar import TarStore


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; all the shards below take 90."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        pytest.skip("this machine doesn't let us mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode


def prepare(folder: Path) -> None:
    prepare_synthetic(folder, classes=4, images=64, height=40, width=50, processes=2, shard_samples=8)


def test_a_full_disk_is_one_line_and_with_more_room_it_goes_on(small_disk: Path, tmp_path: Path) -> None:
    out = small_disk / "data"
    with pytest.raises(
        InputError, match=r"^writing train: .*No space left on device.*run the command again.*$"
    ) as caught:
        prepare(out)
    assert "\n" not in str(caught.value)
    assert not list(out.glob(TEMPORARY))
    assert not (out / "manifest.json").exists()
    with pytest.raises(InputError):
        TarStore(out, "train")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert before
    assert mount("-o", "remount,size=10m", str(small_disk)) == 0
    prepare(out)
    prepare(tmp_path / "roomy")
    for path in (tmp_path / "roomy").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert all((out / name).stat().st_mtime_ns == written for name, written in before.items())
