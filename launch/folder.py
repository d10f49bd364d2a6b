"""Where a run goes: its own folder, and never into what another run has left."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from convneur.config import RunConfig
from convneur.data.errors import InputError
from convneur.launch.lock import Lock, locked


@contextmanager
def run_folder(run: RunConfig, resume: str) -> Iterator[tuple[Path, Lock]]:
    """The folder of a run and the lock on it. No other run takes it; still empty at the end, it is removed again.

    With resume "auto" it is root/name, whatever is in it. Otherwise it is the first of root/name, root/name-2, ...
    that is free or empty.

    It is locked meanwhile. Raises InputError where it can't be made, or is in use.
    """
    wanted = Path(run.root) / run.name
    names = (wanted if n == 1 else wanted.with_name(f"{run.name}-{n}") for n in count(1))
    folder = wanted if resume == "auto" else next(name for name in names if _is_free(name))
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run.root is {run.root!r}, where no folder can be made ({error}); choose another") from error
    if folder != wanted:
        print(f"convneur: {wanted} holds another run, so this one goes to {folder}", flush=True)
    try:
        with locked(folder) as lock:
            yield folder, lock
    finally:
        for path in absent:
            with suppress(OSError):  # it isn't empty
                path.rmdir()


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
