"""One job's care for one run. What becomes of the job is decided here:

- The run is finished, or a rank says that the input is bad (exit status 2): that is the end.
- A notice (FILE appears, a rank leaves word of a signal, or the time limit is near): the ranks are told, save and
  stop; the job is queued again, unless Slurm has ended or requeued it already. After `VAIN_STOPS` such stops in a row
  without a new checkpoint it ends, as its time limit is too short.
- Slurm makes no job step within `START_SECONDS`, as it takes the nodes for busy: the job is queued again, for only
  another allocation gets it out of that.
- Storage or servers don't answer (exit status 74), or Slurm itself doesn't: the ranks are started again, after a pause
  that grows, for as long as the job has its nodes, `OUTAGE_SECONDS` at most.
- A rank fails: srun ends the others, and is started again, up to `RESTARTS` times in an allocation of the job; then the
  job is queued again. After `FRUITLESS` failures in a row without a new checkpoint it ends. A node on which a rank
  failed first in two attempts in a row is excluded when the job is queued again.

What can't be told, because Slurm or the storage doesn't answer, is asked again; no answer is never a no.

`attempts.jsonl` in the run's folder gets a line when an attempt starts and one when it ends; `faults/` says how ranks
ended that failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .job import PATIENCE, Job, ask, say
from .run_files import (
    ATTEMPTS_FILE,
    BAD_INPUT,
    STORAGE,
    SUMMARY_FILE,
    TIME_FORMAT,
    Fault,
    Record,
    faults_of,
    newest_checkpoint,
    read_attempts,
)

RESTARTS = 3
FRUITLESS = 3
VAIN_STOPS = 10
START_SECONDS = 120.0
RANK_NOTICE = "notice"  # slurm/rank.sh
POLL_SECONDS = 0.5
TELL_SECONDS = 2.0
LAST_SECONDS = 60.0
"""How long before its time limit a job that has had no notice is treated as if one had come."""
OUTAGE_PAUSES = (15, 30, 60, 120, 300, 600)
"""Seconds before ranks are started again that an outage has ended; the last goes on."""
OUTAGE_SECONDS = 12 * 3600.0
DOUBT_SECONDS = 3600.0
"""How long after an outage began a dataset or folder that isn't there is taken for part of it."""

UNKNOWN = (0, 0)


class Supervisor:
    """One job's care for one run.

    Args:
        folder: the run's.
        notice: a file that appears when the nodes are about to be lost.
        command: what starts the ranks.
        requeues: whether the job is queued again here after that notice; else somebody else sees to it.
    """

    def __init__(self, folder: Path, notice: Path, command: list[str], requeues: bool) -> None:
        self.folder, self.notice, self.command, self.requeues = folder, notice, command, requeues
        self.job = Job()
        self.failures = 0
        self.had_checkpoints = False
        self.time_is_up = False
        self.outages = 0  # in a row
        self.outage_began = 0.0

    def run(self) -> int:
        """Runs the ranks until there is nothing left to do here; the job's exit status."""
        attempt, status = 0, None
        while status is None:
            attempt += 1
            while self.is_gone(before := newest_checkpoint(self.folder)):
                say(f"{self.folder} can't be read, or its checkpoints are gone: its storage, perhaps, is")
                if (status := self.wait_out(attempt)) is not None:
                    return status
            self.had_checkpoints = self.had_checkpoints or bool(before)
            status = self.make(attempt, before)
        return status

    def make(self, attempt: int, before: int | None) -> int | None:
        """Runs the ranks once; the job's exit status, or None where they are to be started again."""
        finished = self.finish_mark()
        self.record("start", attempt=attempt, checkpoint=before)
        faults = self.folder / "faults" / f"{self.job.id}-{self.job.restart}-{attempt}"
        status, stuck = self.run_ranks(attempt, faults)
        noticed, mark, after = self.is_noticed(faults), self.finish_mark(), newest_checkpoint(self.folder)
        # A summary that was there before may be that of a shorter run, which is now made longer.
        is_new = finished != UNKNOWN and mark != finished
        if mark not in (None, UNKNOWN) and (is_new or (status == 0 and not noticed)):
            self.end(attempt, "finished", status)
            return 0
        if status == 0 and (noticed or after != before):
            return self.stop(attempt, status)
        found = faults_of(faults)
        if noticed and not found:  # told while it still waits for a job step, srun gives it up
            return self.stop(attempt, status)
        fault = found[0] if found else None
        why = f"rank {fault.rank} on {fault.node} failed first: {fault.reason}" if fault else f"srun: {status}"
        say(f"attempt {attempt} of start {self.job.restart + 1} failed; {why}")
        running = self.job.is_running()
        if running is False:
            self.end(attempt, "failed", status, fault, action="left to Slurm")
            return 1
        if self.is_outage(found, running, after):
            self.end(attempt, "outage", status, fault, action="restart after a pause")
            return self.wait_out(attempt)
        self.outages, self.failures = 0, self.failures + 1
        return self.fail(attempt, status, fault, noticed=noticed, stuck=stuck, progress=after != before)

    def fail(
        self, attempt: int, status: int, fault: Fault | None, *, noticed: bool, stuck: bool, progress: bool
    ) -> int | None:
        """Decides what becomes of a job whose ranks have failed; its exit status, or None to start them again."""
        if fault and fault.is_bad_input:
            self.end(attempt, "failed", status, fault, action="stop: bad input")
            return BAD_INPUT
        if self.in_vain("failed") + 1 >= FRUITLESS and not progress:
            say(f"{FRUITLESS} failures in a row without a new checkpoint: the job ends; see {self.folder}/faults")
            self.end(attempt, "failed", status, fault, action="stop: no progress")
            return 1
        if self.is_left_to_others():
            self.end(attempt, "failed", status, fault, action="left to Slurm")
            return 1
        bad = self.bad_node(fault)
        if self.failures > RESTARTS or noticed or bad or stuck:
            self.end(attempt, "failed", status, fault, action="requeue", excluded=bad)
            return 0 if self.job.requeue(bad) else 1
        self.end(attempt, "failed", status, fault, action="restart")
        return None

    def stop(self, attempt: int, status: int) -> int:
        """Ends an attempt that was to stop: the job is queued again, by whoever does that; its exit status."""
        if self.is_left_to_others() or self.job.is_running() is False:
            self.end(attempt, "stopped", status, action="left to Slurm")
            return 0
        if self.in_vain("stopped", "failed") + 1 >= VAIN_STOPS:
            say(f"stopped {VAIN_STOPS} times in a row before a new checkpoint: the job ends; ask for more --time")
            self.end(attempt, "stopped", status, action="stop: no progress")
            return 1
        self.end(attempt, "stopped", status, action="requeue")
        return 0 if self.job.requeue(None) else 1

    def is_gone(self, step: int | None) -> bool:
        """Whether the storage doesn't say which checkpoints there are, or denies those that there were."""
        return step is None or (step == 0 and self.had_checkpoints)

    def is_outage(self, faults: list[Fault], running: bool | None, step: int | None) -> bool:
        """Whether ranks have ended because storage, servers or Slurm don't answer, which needs but time."""
        if any(fault.status == STORAGE for fault in faults) or self.is_gone(step) or (running is None and not faults):
            return True
        # The input was good when the job began: what isn't there now has gone with the rest.
        in_doubt = self.outages > 0 and time.monotonic() - self.outage_began < DOUBT_SECONDS
        return in_doubt and any(fault.is_bad_input for fault in faults)

    def wait_out(self, attempt: int) -> int | None:
        """Waits before ranks are started again after an outage; the job's exit status where a notice ends that."""
        if not self.outages:
            self.outage_began = time.monotonic()
        pause = OUTAGE_PAUSES[min(self.outages, len(OUTAGE_PAUSES) - 1)]
        self.outages += 1
        lasted = time.monotonic() - self.outage_began
        if lasted > OUTAGE_SECONDS:
            say(f"nothing has changed in {lasted / 3600:.0f} hours: the job ends; submit it again to go on")
            return STORAGE
        say(f"storage, a server or Slurm doesn't answer; the ranks are started again in {pause} s")
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if self.is_noticed(None):
                return self.stop(attempt, STORAGE)
            time.sleep(POLL_SECONDS)
        return None

    def run_ranks(self, attempt: int, faults: Path) -> tuple[int, bool]:
        """Starts the ranks and waits for their end; passes a notice on to them.

        Returns:
            The exit status of srun, and whether it was ended because it got no job step.
        """
        start = 7 * int(self.job.id) + 5 * self.job.restart + attempt
        try:
            faults.mkdir(parents=True, exist_ok=True)
            port = free_port(os.environ["MASTER_ADDR"], start)
            say(f"attempt {attempt}, MASTER_PORT={port}: {shlex.join(self.command)}")
            env = {**os.environ, "MASTER_PORT": str(port), "CONVNEUR_FAULTS": str(faults.absolute())}
            process = subprocess.Popen(self.command, env=env)
        except OSError as error:
            say(f"the ranks can't be started: {error}")
            return 1, False
        told, deadline, stuck = 0.0, time.monotonic() + START_SECONDS, False
        limit = self.job.seconds_left()
        # Who asks for so little time gets it.
        last = time.monotonic() + limit - LAST_SECONDS if limit and limit > 3 * LAST_SECONDS else float("inf")
        while (status := process.poll()) is None:
            # Again and again, because a rank that is still starting doesn't hear it; by USR2, because srun kills
            # the ranks when it gets TERM.
            if time.monotonic() - told > TELL_SECONDS and self.is_noticed(faults):
                process.send_signal(signal.SIGUSR2)
                told = time.monotonic()
            if time.monotonic() > deadline:
                deadline, stuck = float("inf"), not self.job.has_step()
                if stuck:
                    say(f"Slurm has made no job step in {START_SECONDS:.0f} s; srun is ended")
                    process.kill()
            if time.monotonic() > last:
                last = self.near_the_end()
            time.sleep(POLL_SECONDS)
        return status, stuck

    def near_the_end(self) -> float:
        """Sees to it that a job near its time limit stops, also without a notice; when to look again."""
        limit = self.job.seconds_left()  # it may have been raised
        if limit is not None and limit > LAST_SECONDS:
            return time.monotonic() + limit - LAST_SECONDS
        if not self.is_noticed(None):
            say(f"the time limit is {LAST_SECONDS:.0f} s away, and no notice has come: --signal=B:USR2@300 gives one")
        self.time_is_up = True
        return float("inf")

    def is_noticed(self, faults: Path | None) -> bool:
        """Whether the nodes are about to be lost: by the batch script's word, that of a rank, or the time limit."""
        return self.time_is_up or is_ours(self.notice) or (faults is not None and (faults / RANK_NOTICE).exists())

    def is_left_to_others(self) -> bool:
        """Whether somebody else queues the job again."""
        return not self.requeues and is_ours(self.notice)

    def finish_mark(self) -> tuple[int, int] | None:
        """Changes when the run ends: rank 0 writes the summary last. None without one."""
        for pause in (*PATIENCE, 0):
            try:
                found = (self.folder / SUMMARY_FILE).stat()
                return found.st_mtime_ns, found.st_ino
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError:
                time.sleep(pause)
        return UNKNOWN

    def records(self) -> list[Record]:
        """The lines about this job."""
        return [record for record in read_attempts(self.folder) if record["job"] == self.job.id]

    def in_vain(self, *outcomes: str) -> int:
        """How many of this job's last attempts have ended so in a row without a new checkpoint."""
        count = 0
        step = newest_checkpoint(self.folder)
        for record in reversed([r for r in self.records() if r["event"] == "end"]):
            if record.get("outcome") not in outcomes or record.get("checkpoint") != step:
                break
            count += 1
        return count

    def bad_node(self, fault: Fault | None) -> str | None:
        """The node of a fault, if it was to blame the last time, too, and the partition has enough others."""
        ends = [r for r in self.records() if r["event"] == "end"]
        if not fault or not ends or ends[-1].get("node") != fault.node or ends[-1].get("outcome") != "failed":
            return None
        partition = os.environ.get("SLURM_JOB_PARTITION", "")
        listed = ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N %T")
        usable = re.findall(r"^(\S+) (?:idle|mixed|allocated|completing)", listed.stdout, re.MULTILINE)
        others = set(usable) - {fault.node}
        return fault.node if len(others) >= int(os.environ["SLURM_NNODES"]) else None

    def end(self, attempt: int, outcome: str, status: int, fault: Fault | None = None, **more: Any) -> None:
        """Records how an attempt ended: what failed first, and what is done about it."""
        about = {**(fault._asdict() if fault else {}), "srun_status": status}
        checkpoint = newest_checkpoint(self.folder)
        self.record("end", attempt=attempt, outcome=outcome, checkpoint=checkpoint, **about, **more)

    def record(self, event: str, **values: Any) -> None:
        """Adds a line to the history; a full disk must not stop the run that may outlast it."""
        now = time.strftime(TIME_FORMAT, time.gmtime())
        line = {"time": now, "event": event, "job": self.job.id, "start": self.job.restart + 1}
        line.update(nodes=self.job.nodes, **values)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ATTEMPTS_FILE).open("a+b") as file:
                cut = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write((b"\n" if cut else b"") + json.dumps(line).encode() + b"\n")
        except OSError as error:
            say(f"{ATTEMPTS_FILE} can't be written ({error})")


def free_port(address: str, start: int) -> int:
    """A port at which nothing listens; the search begins elsewhere for every start of every job.

    All of them are below those that the kernel gives to outgoing connections.
    """
    for port in range(20000 + start % 12000, 32768):
        try:
            socket.create_connection((address, port), timeout=5).close()  # of any address family
        except OSError:
            return port
    raise OSError(f"no free port at {address}")


def is_ours(path: Path) -> bool:
    """Whether a file is there that this user has made, and no other, nor a link."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()


def main() -> int:
    """Reads the command line of __main__.py; the exit status of the job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--notice", type=Path, required=True)
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    return Supervisor(args.folder, args.notice, args.command, not args.no_requeue).run()


if __name__ == "__main__":
    sys.exit(main())
