"""This process as one of several ranks: whether it is one, its place among them, and their launcher's lock."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from convneur.data.errors import InputError
from convneur.launch import leash
from convneur.launch.lock import held_lock

if TYPE_CHECKING:
    from convneur.system.world import World

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank(args: argparse.Namespace) -> bool:
    """Whether this process is one of several that a launcher has started.

    Raises InputError where it should be, or might be, and the environment doesn't say which one.
    """
    if args.launch == "local" or (args.launch == "auto" and "RANK" not in os.environ):
        os.environ.pop("RANK", None)  # left over
        return False
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing and args.launch == "env":
        raise InputError(f"--launch env needs {', '.join(missing)} in the environment; torchrun sets them")
    if missing:
        raise InputError(
            f"RANK is set in the environment, as for one of several processes, but not {', '.join(missing)}: unset it,"
            " or pass --launch local"
        )
    for name in RANK_VARIABLES:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise InputError(f"{name} in the environment is {os.environ[name]!r}, expected a number; torchrun sets it")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {size} in the environment, expected RANK below WORLD_SIZE")
    return True


def words_of_rank(args: argparse.Namespace) -> list[str]:
    """The command line of this process as its ranks get it, who are to be ranks whatever it says of --launch."""
    end = args.words.index("--") if "--" in args.words else len(args.words)  # flags come before it
    return [*args.words[:end], "--launch", "env", *args.words[end:]]


@contextmanager
def joined_world() -> Iterator["World"]:
    """This process among the ranks. Left in good order only: after a failure the others may never say goodbye."""
    from convneur.system.world import World

    world = World.join()
    yield world
    world.leave()


def keep_lock(folder: Path) -> None:
    """Has this rank, if it is a launcher's, keep the launcher's lock alive for as long as it writes."""
    leash.keep(held_lock(folder))
