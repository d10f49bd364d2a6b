"""A process that trains, and is killed or hindered in the middle of a save. `test_kills` starts it."""

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from forked import free_port

from convneur.config import Config
from convneur.records import checkpoint, upkeep
from convneur.records.folder import MANIFEST
from convneur.run import keeper

PHASES = (
    "_write_weights: before",
    "_write_weights: in the middle",
    "_write_weights: after",
    "digest: before",
    "manifest: before",
    "_publish: before",
    "_publish: after",
    "_remove: in the middle",
)
"""Where in a save to kill. The checkpoint counts once `_publish` is over."""


def train_and_die(config: Config, folder: Path, phase: str) -> None:
    """Resumes a run and dies in the named phase of its first save."""
    where, _, when = phase.partition(": ")
    name = "_write_json" if where == "manifest" else where
    module = upkeep if name == "_remove" else checkpoint
    real = getattr(module, name)

    def deadly(*words: Any) -> Any:
        if where == "manifest" and words[-1].name != MANIFEST:
            return real(*words)
        if when == "in the middle" and where == "_remove":
            upkeep.shutil.rmtree = lambda path: remove_one_file(path) or die()
            real(*words)
        if when != "before":
            real(*words)
        if when == "in the middle":
            os.truncate(words[-1], words[-1].stat().st_size // 2)
        die()

    if phase:
        setattr(module, name, deadly)
    train_alone(config, folder)


def train_with_small_files(config: Config, folder: Path, limit: int) -> None:
    """Resumes a run in which no file may grow above a number of bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    keeper.TRY_SECONDS = 0.0
    train_alone(config, folder)


def fill(disk: Path) -> None:
    """Leaves no room on a disk, until its file `ballast` is removed."""
    with suppress(OSError), (disk / "ballast").open("ab", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def train_on_a_full_disk(config: Config, folder: Path) -> None:
    """Resumes a run whose disk is full from its first save on."""
    gather = checkpoint.gather_scalars

    def filling(engine: Any) -> Any:
        fill(folder.parent)
        return gather(engine)

    checkpoint.gather_scalars = filling
    keeper.TRY_SECONDS = 0.0
    train_alone(config, folder)


def train_alone(config: Config, folder: Path) -> None:
    """Resumes a run in a world of one."""
    train_rank(config, folder, 0, 1, free_port())


def train_rank(config: Config, folder: Path, rank: int, size: int, port: int, resume: str = "auto") -> None:
    """Resumes a run as one of its ranks."""
    from convneur.system.world import World
    from convneur.train import train

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    world = World.join()
    log = os.open(config.run.root, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    train(config, world, folder, resume)
    world.leave()


def remove_one_file(folder: Path) -> None:
    next(path for path in folder.iterdir() if path.is_file()).unlink()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
