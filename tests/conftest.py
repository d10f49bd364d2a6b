import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, dev_cluster, missing_programs

from convneur.data.digits import prepare_digits
from convneur.world import World


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared digits; tests that change files copy them."""
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    prepare_digits(folder)
    return folder


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This test process as a world of one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(names)
    world = World.join()
    yield world
    world.leave()
    for name in names:
        del os.environ[name]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Slurm cluster of two nodes, n1 and n2, of its own."""
    if missing := missing_programs():
        untested = f"NO SLURM HERE ({', '.join(missing)}), SO BATCH SCRIPTS GO UNTESTED: apt-get install slurm-wlm"
        if os.environ.get("CI") == "true":
            pytest.fail(untested)
        pytest.skip(untested)
    folder = Path(tempfile.gettempdir()) / f"convneur-slurm-test-{os.getpid()}"  # short: sockets lie in it
    up = dev_cluster("up", "2", folder)
    assert up.returncode == 0, up.stdout + up.stderr
    yield Cluster(folder)
    down = dev_cluster("down", folder)
    assert down.returncode == 0, down.stdout + down.stderr
