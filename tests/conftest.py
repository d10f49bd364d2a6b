import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster, go_untested, held_cluster, missing_programs

from convneur.data.prepare.digits import prepare_digits
from convneur.system.world import World


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared digits; tests that change files copy them."""
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    prepare_digits(folder)
    return folder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that no result can depend on it unseen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


RANK_OF_ONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="session")
def joined() -> Iterator[World]:
    """A process group, made once: DeepSpeed keeps hold of the first it meets."""
    with socket.socket() as s, pytest.MonkeyPatch.context() as patch:
        s.bind(("127.0.0.1", 0))
        for name, value in {**RANK_OF_ONE, "MASTER_PORT": str(s.getsockname()[1])}.items():
            patch.setenv(name, value)
        s.close()
        world = World.join()
    yield world
    world.leave()


@pytest.fixture(scope="module")
def world(joined: World) -> Iterator[World]:
    """This test process as a world of one, and its environment as torchrun would make it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RANK_OF_ONE.items():
            patch.setenv(name, value)
        yield joined


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for some checkpoints; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster of two nodes, n1 and n2, of its own."""
    if missing := missing_programs():
        go_untested(f"NO SLURM HERE ({', '.join(missing)}), SO BATCH SCRIPTS GO UNTESTED: apt-get install slurm-wlm")
    folder = Path(tempfile.gettempdir()) / f"convneur-slurm-test-{os.getpid()}"  # short: sockets lie in it
    with held_cluster(2, folder) as cluster:
        yield cluster
