"""Ends a process in which no Python code runs any more. watchdog.py starts this file beside each rank:

    python -I -S deaf.py PID SECONDS

It uses the standard library alone. From its input it reads for how many seconds the process may be silent; when that
and SECONDS have passed without a new line, the process gets ABRT, at which `faulthandler` shows all stacks. Time counts
only while both could run, so that processes that are stopped together go on together.
"""

import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path

TICK_SECONDS = 0.5
END = "end"
LAST_SECONDS = 10.0
"""After which a process that ABRT hasn't ended is killed."""


def main() -> None:
    """Reads the command line; see the head of this file."""
    pid, more = int(sys.argv[1]), float(sys.argv[2])
    started = _stat(pid)[19:20]
    if not started or os.fork():  # it is no child of the process, whose children are those that decode
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they are the process's, which ends this one by its end
    allowed, silent, told = float("inf"), 0.0, False
    while (fields := _stat(pid))[19:20] == started:
        if select.select([0], [], [], TICK_SECONDS)[0]:
            lines = os.read(0, 4096).decode().split()
            if not lines or lines[-1] == END:
                return
            allowed, silent = float(lines[-1]) + more, 0.0
        elif fields[0] != "T":
            silent += TICK_SECONDS
        if silent > allowed + LAST_SECONDS:
            os.kill(pid, signal.SIGKILL)
        elif silent > allowed and not told:
            os.kill(pid, signal.SIGABRT)
            told = True


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: the state first, the start as the twentieth."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return []


if __name__ == "__main__":
    with suppress(ProcessLookupError):
        main()
