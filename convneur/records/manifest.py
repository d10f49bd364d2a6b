"""Whether a checkpoint is as it was written: sizes and SHA-256 of its files, against its manifest."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from convneur.data.errors import InputError
from convneur.records.folder import (
    CONFIG_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
)
from convneur.system.agreement import together
from convneur.system.world import World

T = TypeVar("T")
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What says that there is no such file; other errors say nothing about it."""
_NEEDED = {CONFIG_FILE, STATE_FILE, MODEL_FILE, OPTIMIZER_FILE}


def newest_intact(checkpoints: list[Path], world: World) -> tuple[Path | None, list[str]]:
    """The first of `checkpoints` whose every byte is as written, and what is wrong with those before it. Collective.

    Rank 0's list counts; every rank hashes its share of the files, and all come to the same answer.

    Raises:
        StorageError: the storage of one before it doesn't answer. It may be intact, so the next isn't taken for it.
        InputError: a file of one before it is there, but may not be read.
    """
    faults: list[str] = []
    agreed: list[list[Path]] = [checkpoints]
    dist.broadcast_object_list(agreed, group=world.control)
    for checkpoint in agreed[0]:
        found: list[list[str]] = [[] for _ in range(world.size)]
        mine: list[str] = []
        with together(world, InputError, "reading a checkpoint"):
            mine += _damage(checkpoint, lambda names: names[world.rank :: world.size])
        dist.all_gather_object(found, mine, world.control)
        damage = [fault for part in found for fault in part]
        if not damage:
            return checkpoint, faults
        faults.append(f"{checkpoint}: {'; '.join(damage)}")
    return None, faults


def check_files(checkpoint: Path, *names: str) -> None:
    """Raises InputError where one of these files of a checkpoint is not as it was written, or is missing."""
    faults = _damage(checkpoint, lambda written: [name for name in names if name in written])
    if fault := next(faults, None):
        raise InputError(f"{checkpoint} is damaged: {fault}; restore it, or name another checkpoint")


def _damage(checkpoint: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[str]:
    """What is wrong with a checkpoint's manifest, and with those of its files, in order of name, that are chosen.

    Raises InputError where one of them can't be read, which says nothing about what is in it.
    """
    try:
        manifest = json.loads(_read(checkpoint, MANIFEST, Path.read_bytes))
    except (*ABSENT, ValueError, RecursionError) as error:
        yield f"{MANIFEST} can't be read ({error})"
        return
    if not isinstance(manifest, dict) or not manifest.keys() >= _NEEDED:
        yield f"{MANIFEST} doesn't name the files of a checkpoint"
        return
    for name in choose(sorted(manifest)):
        try:
            if _read(checkpoint, name, digest) != manifest[name]:
                yield f"{name} is not as it was written"
        except (*ABSENT, ValueError) as error:
            yield f"{name} can't be read ({error})"


def _read(checkpoint: Path, name: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file of a checkpoint; InputError where it can't be read, one of `ABSENT` without one."""
    try:
        return read(checkpoint / name)
    except ABSENT:
        raise
    except OSError as error:
        raise InputError(
            f"{checkpoint / name} can't be read ({error.strerror or error}), though nothing need be wrong with it: see"
            f" to that, then resume; if it is lost, remove {checkpoint}"
        ) from error


def digest(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
