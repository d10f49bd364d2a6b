"""Where a run began that is started again and again by the same words, as Slurm does: there first, then it goes on."""

from pathlib import Path

from torch.distributed import broadcast_object_list

from convneur.data.errors import InputError
from convneur.data.files import atomic_write
from convneur.records.checkpoint import find_checkpoint, list_checkpoints
from convneur.records.folder import BEGINNING_FILE, CHECKPOINTS
from convneur.system.agreement import led
from convneur.system.world import World

NEVER = "never"


def check_beginning(folder: Path, begin: str) -> None:
    """Raises InputError where a run's folder has checkpoints that did not begin as asked, or there is no such start.

    Args:
        folder: the run's, which may not exist.
        begin: a checkpoint, another run, or "never" for initial weights.
    """
    if list_checkpoints(folder / CHECKPOINTS):
        if _read(folder) != _name(begin):
            raise InputError(
                f"{folder} has checkpoints already, of a run that did not begin with --resume {begin}: give another"
                " --run.name, or leave --resume out to go on with that run"
            )
    elif begin != NEVER:
        find_checkpoint(Path(begin))


def agreed_start(folder: Path, begin: str, world: World) -> str:
    """What to resume from now: "auto" once the run has checkpoints of its own, until then where it begins. Collective.

    Raises InputError as `check_beginning` does.
    """
    agreed = [""]
    with led(world):
        if world.is_main:
            check_beginning(folder, begin)
            own = bool(list_checkpoints(folder / CHECKPOINTS))
            if not own:
                with atomic_write(folder / BEGINNING_FILE) as file:
                    file.write(_name(begin).encode(errors="surrogateescape"))
            agreed = ["auto" if own else begin]
    broadcast_object_list(agreed, group=world.control)
    return agreed[0]


def _name(begin: str) -> str:
    return begin if begin == NEVER else str(Path(begin).resolve())


def _read(folder: Path) -> str | None:
    try:
        return (folder / BEGINNING_FILE).read_bytes().decode(errors="surrogateescape")
    except FileNotFoundError:
        return None
