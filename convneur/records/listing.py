"""Which checkpoints a folder holds, by their names."""

import re
from pathlib import Path

from convneur.data.errors import InputError
from convneur.records.folder import (
    CHECKPOINTS,
    MANIFEST,
    MODEL_FILE,
    STATE_FILE,
)

STEP = r"step-(?:[0-9]{8}|[1-9][0-9]{8,})"
_NAME = re.compile(STEP)


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint of a step."""
    return f"step-{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, newest first; unfinished ones and other names are not among them.

    Neither is a folder that holds nothing of a checkpoint. A folder with such a name was whole when it got it. What it
    has lost since, `newest_intact` finds. InputError where the folder is there but can't be read.
    """
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and holds_one(path)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} can't be read ({error.strerror}), expected a run's checkpoints") from error
    return sorted(found, key=checkpoint_step, reverse=True)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint given as its own folder or as a run's, whose newest is taken; InputError where there is none."""
    if (path / MANIFEST).is_file():
        return path
    found = list_checkpoints(path / CHECKPOINTS)
    if not found:
        raise InputError(
            f"no checkpoint in {path}: expected a folder step-<number> with a {MANIFEST}, or a run's folder"
        )
    return found[0]


def holds_one(path: Path) -> bool:
    """Whether a folder holds anything of a checkpoint."""
    return any((path / name).is_file() for name in (MANIFEST, STATE_FILE, MODEL_FILE))
