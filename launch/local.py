"""Starting the ranks of one machine, passing on what the launcher is told, and saying why they failed.

They are the launcher's children, in its process group: what a terminal sends reaches all of them. They meet on
127.0.0.1 at a store that the launcher keeps, so no name is looked up. `convneur.launch.leash` is the other end.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NamedTuple, Self

import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from convneur.data.errors import InputError
from convneur.launch.leash import LAUNCHER
from convneur.launch.lock import Lock
from convneur.launch.signals import STOPPING, handling, name_of

ADDRESS = "127.0.0.1"
LOOPBACK = "lo"
POLL_SECONDS = 0.1
WAKE_SECONDS = 5.0
"""For how long ranks are woken after the launcher was: one may be about to stop itself on the launcher's account."""


def rank_count(nproc: int | None) -> int:
    """Processes to start: as many as asked for, else one a GPU, else one. InputError where they can't be."""
    gpus = torch.cuda.device_count()
    if nproc is None:
        return max(1, gpus)
    if nproc < 1 or (gpus and nproc > gpus):
        raise InputError(f"--nproc is {nproc}, expected {f'1 to {gpus}, at most one a GPU' if gpus else 'at least 1'}")
    return nproc


def set_thread_count(nproc: int) -> None:
    """Divides the processors among `nproc` ranks, unless OMP_NUM_THREADS says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))


def run_ranks(words: list[str], nproc: int, lock: Lock | None = None) -> int:
    """Runs `convneur WORDS` in `nproc` processes that know of each other, and returns the exit status.

    It is that of the first rank to fail, or 128 and the number of the signal that stopped them. What a rank hands to
    `report_failure` is printed here, once. None of them is left behind.

    Args:
        words: the command line.
        nproc: how many ranks.
        lock: what keeps others from the run's folder; the ranks keep it, too.
    """
    set_thread_count(nproc)
    _check_loopback()
    store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory(prefix="convneur-ranks-") as reports, _Ranks(Path(reports)) as ranks:
        ranks.start(words, nproc, store.port)
        if lock:
            lock.share(ranks.pids)
        return ranks.wait()


def report_failure(error: Exception) -> bool:
    """Leaves an error where the launcher of this rank finds it; False if there is no such place, or no room."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    try:
        get_error_handler().record_exception(error)
    except OSError:
        return False
    return True


class _Failure(NamedTuple):
    """A rank that has ended before its time, and its exit status as `subprocess` has it."""

    rank: int
    status: int


class _Ranks:
    """The ranks, from their start to the end of the last of them."""

    def __init__(self, reports: Path) -> None:
        self._reports = reports
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped_by = 0
        self._interrupts = 0
        self._wake_until = 0.0

    @property
    def pids(self) -> list[int]:
        """Their process numbers."""
        return [process.pid for process in self._processes]

    def __enter__(self) -> Self:
        """Starts to listen for signals."""
        handlers = dict.fromkeys(STOPPING, self._stop) | {signal.SIGTSTP: self._suspend, signal.SIGCONT: self._wake}
        self._signals = handling(handlers)
        self._signals.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves no rank behind."""
        self._kill()
        self._signals.__exit__(None, None, None)

    def start(self, words: list[str], nproc: int, port: int) -> None:
        """Starts the ranks."""
        # -P: modules are not looked for in the working folder, which may be a checkout.
        command = [sys.executable, "-P", "-m", "convneur.launch", *words]
        for rank in range(nproc):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
            meeting = {"MASTER_ADDR": ADDRESS, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
            settings = {**numbers, **meeting, LAUNCHER: os.getpid(), "TORCHELASTIC_ERROR_FILE": self._report(rank)}
            if any(name == LOOPBACK for _, name in socket.if_nameindex()):
                settings["GLOO_SOCKET_IFNAME"] = LOOPBACK  # it would look for the one of the host's name
            env = os.environ | {name: str(value) for name, value in settings.items()}
            self._processes.append(subprocess.Popen(command, env=env))

    def wait(self) -> int:
        """Waits for their end; passes signals on meanwhile. Ends them all when one fails."""
        if self._stopped_by:  # while they were being started
            self._send(self._stopped_by)
        while not (failure := self._failure()) and any(process.poll() is None for process in self._processes):
            if time.monotonic() < self._wake_until:
                self._send(signal.SIGCONT)
            time.sleep(POLL_SECONDS)
        self._kill()
        if self._stopped_by:
            return self._explain_stop(failure)
        return self._explain(failure) if failure else 0

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._send(signal.SIGKILL)
            if self._interrupts == 2:
                self._say("ended at once; what was made since the last checkpoint is lost")
            return
        if not self._stopped_by and number == signal.SIGINT:
            self._say("stopping; a run saves a checkpoint first (Ctrl-C again ends it at once)")
        self._stopped_by = self._stopped_by or number
        self._send(signal.SIGCONT, number)  # one that is stopped hears nothing

    def _suspend(self, *_: object) -> None:
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _wake(self, *_: object) -> None:
        self._send(signal.SIGCONT)
        self._wake_until = time.monotonic() + WAKE_SECONDS

    def _send(self, *numbers: int) -> None:
        for process in self._processes:
            for number in numbers:
                process.send_signal(number)

    def _kill(self) -> None:
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _failure(self) -> _Failure | None:
        """The first rank to fail; of several, one that says why or was killed, for that ends others, too."""
        ended = [_Failure(rank, process.poll() or 0) for rank, process in enumerate(self._processes)]
        failed = [one for one in ended if one.status]
        return min(failed, key=lambda one: (not self._report(one.rank).exists(), one.status > 0), default=None)

    def _report(self, rank: int) -> Path:
        return self._reports / f"rank-{rank}.json"

    def _explain(self, failure: _Failure) -> int:
        """Says in one line why the ranks stopped; the exit status of the one that failed first."""
        rank, status = failure
        reason = f"rank {rank} failed with exit status {status}; its traceback is above"
        if status < 0:
            reason = f"rank {rank} was killed by {name_of(-status)}"
        with suppress(OSError, ValueError, KeyError, TypeError):  # from report_failure: "InputError: what is wrong"
            reason = json.loads(self._report(rank).read_text())["message"]["message"].partition(": ")[2]
        self._say(f"error: {reason}")
        return status if status > 0 else 128 - status

    def _explain_stop(self, failure: _Failure | None) -> int:
        """The exit status of ranks that were told to stop. A run that was in progress has said what it saved."""
        name = name_of(self._stopped_by)
        if failure and failure.status > 0 and self._report(failure.rank).exists():
            return self._explain(failure)
        if failure and failure.status == -self._stopped_by:
            self._say(f"stopped by {name} while there was nothing to save")
        elif failure and self._interrupts < 2:
            self._explain(failure)
        return 128 + self._stopped_by

    def _say(self, line: str) -> None:
        with suppress(OSError):  # the terminal may be closed
            print(f"convneur: {line}", file=sys.stderr, flush=True)


def _check_loopback() -> None:
    """Raises InputError where processes of this machine can't meet."""
    try:
        with socket.create_server((ADDRESS, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise InputError(
            f"the processes of a run meet on {ADDRESS}, which can't be reached here ({error.strerror or error}): bring"
            " the loopback interface up (ip link set lo up)"
        ) from error
