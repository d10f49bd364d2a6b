"""The folder of a run's checkpoints after a save: LATEST, BEST, what need not stay, and what is left over."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from convneur.data.errors import InputError
from convneur.data.files import atomic_write, fsync
from convneur.records.folder import (
    BEST,
    LATEST,
    MANIFEST,
)
from convneur.records.listing import STEP, checkpoint_step, list_checkpoints
from convneur.records.retention import Best, Retention

TEMPORARY = "tmp-"
_LEFTOVER = re.compile(rf"{TEMPORARY}(?P<removed>removed-)?(?P<name>{STEP})(?:-[0-9]+)?")


def follow_up(final: Path, retention: Retention, best: Best | None, warn: Callable[[str], None]) -> None:
    """What follows a commit: it stands, whatever becomes of this, which is made up for after the next one."""
    try:
        fsync(final.parent)
    except OSError as error:
        warn(f"{final} is saved, but may not outlast a failure of this machine ({error})")
    try:
        with atomic_write(final.parent / LATEST) as file:
            file.write(f"{final.name}\n".encode())
    except OSError as error:
        warn(f"{final} is saved, but {LATEST} can't say so ({error})")
    try:
        remove_obsolete(final.parent, checkpoint_step(final), retention, best, warn)
        remove_leftovers(final.parent)
        for left_over in _leftovers(final.parent):
            warn(f"{left_over} can't be removed; it is of no use to the run")
    except (OSError, InputError) as error:
        warn(f"{final} is saved, but what is no longer needed beside it can't be found ({error})")


def remove_obsolete(
    folder: Path, current: int, retention: Retention, best: Best | None, warn: Callable[[str], None]
) -> None:
    """Removes the checkpoints that need not stay beside that of step `current`, which is intact. One rank does it.

    `BEST` names a checkpoint that is there, or there is none. What can't be written or removed goes to `warn`.
    """
    by_step = {checkpoint_step(path): path for path in list_checkpoints(folder)}
    if current not in by_step:
        return
    try:
        if retention.best and best and best.step in by_step:
            best.write(folder)
        else:
            (folder / BEST).unlink(missing_ok=True)
    except OSError as error:
        warn(f"{folder / BEST} can't be written ({error})")
        return  # what it names stays
    own = [step for step, path in by_step.items() if not path.is_symlink()]  # a link is somebody's
    for step in retention.obsolete(own, current, best.step if best else None):
        try:
            _remove(by_step[step])
        except OSError as error:
            warn(f"{by_step[step]} is no longer needed, but can't be removed wholly ({error})")


def restore_replaced(folder: Path) -> None:
    """Gives a run's only checkpoint its name back, if a kill came as another was to replace it. One rank does it."""
    for left_over in _leftovers(folder):
        match = _LEFTOVER.fullmatch(left_over.name)
        if match and match["removed"] and (left_over / MANIFEST).is_file():
            original = folder / match["name"]
            if not os.path.lexists(original) and not list_checkpoints(folder):
                with suppress(OSError):
                    left_over.rename(original)


def _leftovers(folder: Path) -> list[Path]:
    """Folders that interrupted saves and removals have left; what else has a similar name is somebody's."""
    named = (path for path in folder.glob(f"{TEMPORARY}*") if _LEFTOVER.fullmatch(path.name))
    return [path for path in named if path.is_dir() and not path.is_symlink()]


def remove_leftovers(folder: Path) -> None:
    """Removes what interrupted saves have left. What can't be, such as an open file on NFS, is tried the next time."""
    for left_over in _leftovers(folder):
        with suppress(OSError):
            shutil.rmtree(left_over, ignore_errors=True)


def free_name(path: Path) -> Path:
    """The first of PATH, PATH-2, PATH-3, ... at which there is nothing."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(name for name in names if not os.path.lexists(name))


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; killed in the middle, it leaves nothing that looks like one."""
    unnamed = free_name(checkpoint.with_name(f"{TEMPORARY}removed-{checkpoint.name}"))
    checkpoint.rename(unnamed)
    shutil.rmtree(unnamed)
