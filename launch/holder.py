"""Who holds a lock, as the lock's file has it: a launcher, and the ranks that write with it."""

import json
import os
import re
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from convneur.launch.processes import is_alive, is_stopped, start_time


@dataclass(frozen=True)
class Holder:
    """Whoever holds a lock.

    Attributes:
        token: tells this hold on a lock from all others.
        host: the machine's name.
        boot: tells this start of the machine from all others; None where it isn't known.
        processes: the name space of process numbers, which mean something within it only; None where it isn't known.
        pid: of the launcher.
        start: when that process began; None where it isn't known.
        writers: the same two numbers of each rank, in lists.
        job: Slurm's number, if any.
    """

    token: str
    host: str
    boot: str | None
    processes: str | None
    pid: int
    start: int | None
    writers: list[list[Any]]
    job: str | None

    @classmethod
    def this_process(cls) -> Self:
        """This process, with a new token."""
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            processes=str(Path("/proc/self/ns/pid").readlink()),
            pid=os.getpid(),
            start=start_time(os.getpid()),
            writers=[],
            job=os.environ.get("SLURM_JOB_ID"),
        )

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """The holder that a file names; None where it names none."""
        try:
            found = json.loads(content)
        except ValueError:
            return None
        if not isinstance(found, dict) or not _names_somebody(found):
            return None
        rest = {name: found.get(name) for name in ("boot", "processes", "start", "job")}
        return cls(found["token"], found["host"], pid=found["pid"], writers=found.get("writers", []), **rest)

    def as_json(self) -> str:
        """What `parse` reads."""
        return json.dumps(asdict(self))

    def with_writers(self, pids: Sequence[int]) -> Self:
        """The same, with these ranks."""
        return replace(self, writers=[[pid, start_time(pid)] for pid in pids])

    def is_here(self) -> bool:
        """Whether this process can see those that hold the lock."""
        mine = Holder.this_process()
        return (self.boot, self.processes) == (mine.boot, mine.processes)

    def is_alive(self) -> bool | None:
        """Whether any process that holds the lock lives; None where that can't be seen from here."""
        if not self.is_here():
            return None
        return any(is_alive(pid, start) for pid, start in [(self.pid, self.start), *self.writers])

    def __str__(self) -> str:
        ranks = ", ".join(str(pid) for pid, _ in self.writers)
        job = f" of job {self.job}" if self.job else ""
        words = f"process {self.pid}{f' and its ranks {ranks}' if ranks else ''}{job} on {self.host}"
        if self.is_here() and is_stopped(self.pid):
            words += f", which is stopped (kill -CONT {self.pid} lets it go on)"
        return words


def _names_somebody(found: dict[str, Any]) -> bool:
    token, writers = found.get("token"), found.get("writers", [])
    return (
        isinstance(token, str)
        and bool(re.fullmatch(r"\w{1,64}", token))
        and isinstance(found.get("host"), str)
        and isinstance(found.get("pid"), int)
        and isinstance(writers, list)
        and all(isinstance(w, list) and len(w) == 2 and isinstance(w[0], int) for w in writers)
    )
