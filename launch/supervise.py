"""Looking after the ranks of a Slurm job: starts them, and starts them again where that can help.

slurm/common.sh runs this file by itself, outside of any container, so it uses the standard library alone:

    python3 -I launch/supervise.py --folder RUN --notice FILE -- srun ... convneur train ...

What becomes of a job is decided here:

- The run is finished, or the ranks say that the input is bad (exit status 2): that is the end.
- A notice (FILE appears: Slurm is about to take the nodes away): the ranks are told, save and stop; the job is queued
  again, unless Slurm has ended or requeued it already.
- Slurm makes no job step within `START_SECONDS`, as it takes the nodes for busy: the job is queued again, for only
  another allocation gets it out of that.
- A rank fails: srun ends the others, and is started again, up to `RESTARTS` times in an allocation of the job; then the
  job is queued again. After `FRUITLESS` failures in a row without a new checkpoint it ends. A node on which a rank
  failed first in two attempts in a row is excluded when the job is queued again.

`attempts.jsonl` in the run's folder gets a line when an attempt starts and one when it ends; `faults/` says how ranks
ended that failed.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

RESTARTS = 3
FRUITLESS = 3
START_SECONDS = 120.0
BAD_INPUT = 2
HANG = 75  # convneur.watchdog
ATTEMPTS_FILE = "attempts.jsonl"
SUMMARY_FILE = "summary.json"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
POLL_SECONDS = 0.5
TELL_SECONDS = 2.0

Record = dict[str, Any]


class Fault(NamedTuple):
    """How the rank ended that failed first: its node and why, and its exit status."""

    rank: int
    node: str
    status: int
    reason: str


class Job:
    """The Slurm job that this process is part of."""

    def __init__(self) -> None:
        env = os.environ
        self.id = env["SLURM_JOB_ID"]
        self.restart = int(env.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = env["SLURM_JOB_NODELIST"]
        array = env.get("SLURM_ARRAY_JOB_ID")
        # The number of an array's last task is the array's too, and says all of its tasks.
        self.name = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else self.id

    def is_running(self) -> bool:
        """Whether Slurm counts the job as running: not cancelled, not being requeued."""
        shown = subprocess.run(["scontrol", "show", "job", "-o", self.name], capture_output=True, text=True)
        return "JobState=RUNNING " in shown.stdout

    def has_step(self) -> bool:
        """Whether Slurm has made a step of the job besides the batch script's, as far as it can be asked."""
        command = ["squeue", "--noheader", "--steps", f"--jobs={self.name}", "--format=%i"]
        shown = subprocess.run(command, capture_output=True, text=True)
        return shown.returncode != 0 or bool(re.search(r"\.\d+$", shown.stdout, re.MULTILINE))

    def requeue(self, exclude: str | None) -> bool:
        """Queues the job again, without a node where one is named; the rest of this process is then borrowed time."""
        say("queueing the job again, to go on from its checkpoint" + (f", without node {exclude}" if exclude else ""))
        if subprocess.run(["scontrol", "requeue", self.name]).returncode:
            say("that failed; submit the job again to go on")
            return False
        # Slurm lets the nodes of a job be chosen only while it is pending, which takes it a moment.
        for _ in range(20 if exclude else 0):
            command = ["scontrol", "update", f"JobId={self.name}", f"ExcNodeList={exclude}"]
            if not subprocess.run(command, capture_output=True).returncode:
                break
            time.sleep(0.2)
        return True


def say(line: str) -> None:
    """Writes to the job's log."""
    print(f"slurm: {line}", flush=True)


def free_port(address: str, start: int) -> int:
    """A port at which nothing listens; the search begins elsewhere for every start of every job.

    All of them are below those that the kernel gives to outgoing connections.
    """
    for port in range(20000 + start % 12000, 32768):
        with socket.socket() as s:
            if s.connect_ex((address, port)):
                return port
    raise OSError(f"no free port at {address}")


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest committed checkpoint; 0 where there is none."""
    found = (folder / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)


def read_attempts(folder: Path) -> list[Record]:
    """The history of a run; a line that a full disk has cut short, or anything else has damaged, is left out."""
    try:
        lines = (folder / ATTEMPTS_FILE).read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and {"event", "job"} <= record.keys():
                found.append(record)
    return found


def first_fault(faults: Path) -> Fault | None:
    """How the first of the failed ranks ended; None where none could leave word."""
    found = []
    for path in faults.glob("rank-*.ended"):
        with suppress(OSError, ValueError):  # it was written on a full disk
            seconds, number, name = path.read_text().split()
            found.append((float(seconds), int(path.stem[len("rank-") :]), int(number), name))
    if not found:
        return None
    _, rank, status, node = min(found)
    reason = f"exit status {status}; its traceback is above"
    if status > 128:
        reason = f"killed by {signal.Signals(status - 128).name}"
    elif status == HANG:
        reason = "no step for too long; the ranks' stacks are in the folder stacks"
    with suppress(OSError, ValueError, KeyError, TypeError):  # torch's error handler: "InputError: what is wrong"
        reason = json.loads((faults / f"rank-{rank}.json").read_text())["message"]["message"].partition(": ")[2]
    return Fault(rank, node, status, reason)


class Supervisor:
    """One job's care for one run.

    Args:
        folder: the run's.
        notice: a file that appears when the nodes are about to be lost.
        command: what starts the ranks.
        requeues: whether the job is queued again here after a notice; else somebody else sees to it.
    """

    def __init__(self, folder: Path, notice: Path, command: list[str], requeues: bool) -> None:
        self.folder, self.notice, self.command, self.requeues = folder, notice, command, requeues
        self.job = Job()

    def run(self) -> int:
        """Runs the ranks until there is nothing left to do here; the job's exit status."""
        for attempt in range(1, RESTARTS + 2):
            before = newest_checkpoint(self.folder)
            self.record("start", attempt=attempt, checkpoint=before)
            finished = self.finish_mark()
            faults = self.folder / "faults" / f"{self.job.id}-{self.job.restart}-{attempt}"
            status, stuck = self.run_ranks(attempt, faults)
            if self.finish_mark() != finished or (status == 0 and not self.stopped_early()):
                self.end(attempt, "finished", status)
                return 0
            noticed = self.notice.exists()
            if status == 0:
                if not self.job.is_running() or (noticed and not self.requeues):
                    self.end(attempt, "stopped", status, action="left to Slurm")
                    return 0
                self.end(attempt, "stopped", status, action="requeue")
                self.job.requeue(None)
                return 0
            fault = first_fault(faults)
            words = f"rank {fault.rank} on {fault.node} failed first: {fault.reason}" if fault else f"srun: {status}"
            say(f"attempt {attempt} of start {self.job.restart + 1} failed; {words}")
            if fault and fault.status == BAD_INPUT:
                self.end(attempt, "failed", status, fault, action="stop: bad input")
                return BAD_INPUT
            if not self.job.is_running():
                self.end(attempt, "failed", status, fault, action="left to Slurm")
                return 1
            if self.fruitless() + 1 >= FRUITLESS and newest_checkpoint(self.folder) == before:
                say(f"{FRUITLESS} failures in a row without a new checkpoint: the job ends; see {self.folder}/faults")
                self.end(attempt, "failed", status, fault, action="stop: no progress")
                return 1
            bad = self.bad_node(fault)
            if noticed and not self.requeues:
                self.end(attempt, "failed", status, fault, action="left to Slurm")
                return 1
            if attempt > RESTARTS or noticed or bad or stuck:
                self.end(attempt, "failed", status, fault, action="requeue", excluded=bad)
                self.job.requeue(bad)
                return 0
            self.end(attempt, "failed", status, fault, action="restart")
        return 1

    def run_ranks(self, attempt: int, faults: Path) -> tuple[int, bool]:
        """Starts the ranks and waits for their end; passes a notice on to them.

        Returns:
            The exit status of srun, and whether it was ended because it got no job step.
        """
        faults.mkdir(parents=True, exist_ok=True)
        start = 7 * int(self.job.id) + 5 * self.job.restart + attempt
        port = free_port(os.environ["MASTER_ADDR"], start)
        say(f"attempt {attempt}, MASTER_PORT={port}: {' '.join(self.command)}")
        env = os.environ | {"MASTER_PORT": str(port), "CONVNEUR_FAULTS": str(faults.absolute())}
        process = subprocess.Popen(self.command, env=env)
        told, deadline, stuck = 0.0, time.monotonic() + START_SECONDS, False
        while (status := process.poll()) is None:
            # Again and again, because a rank that is still starting doesn't hear it; by USR2, because srun kills
            # the ranks when it gets TERM.
            if self.notice.exists() and time.monotonic() - told > TELL_SECONDS:
                process.send_signal(signal.SIGUSR2)
                told = time.monotonic()
            if time.monotonic() > deadline:
                deadline, stuck = float("inf"), not self.job.has_step()
                if stuck:
                    say(f"Slurm has made no job step in {START_SECONDS:.0f} s; srun is ended")
                    process.kill()
            time.sleep(POLL_SECONDS)
        return status, stuck

    def finish_mark(self) -> int | None:
        """Changes when the run ends: rank 0 writes the summary last."""
        try:
            return (self.folder / SUMMARY_FILE).stat().st_mtime_ns
        except OSError:
            return None

    def stopped_early(self) -> bool:
        """Whether ranks that ended well have left something to do. A finished run that is started again has not."""
        return self.notice.exists() or self.finish_mark() is None

    def records(self) -> list[Record]:
        """The lines about this job."""
        return [record for record in read_attempts(self.folder) if record["job"] == self.job.id]

    def fruitless(self) -> int:
        """How many of this job's last attempts have failed in a row without a new checkpoint."""
        count = 0
        step = newest_checkpoint(self.folder)
        for record in reversed([r for r in self.records() if r["event"] == "end"]):
            if record["outcome"] != "failed" or record["checkpoint"] != step:
                break
            count += 1
        return count

    def bad_node(self, fault: Fault | None) -> str | None:
        """The node of a fault, if it was to blame the last time, too, and the partition has enough others."""
        ends = [r for r in self.records() if r["event"] == "end"]
        if not fault or not ends or ends[-1].get("node") != fault.node or ends[-1]["outcome"] != "failed":
            return None
        partition = os.environ.get("SLURM_JOB_PARTITION", "")
        listed = subprocess.run(["sinfo", "-h", "-N", "-p", partition, "-o", "%N %T"], capture_output=True, text=True)
        usable = re.findall(r"^(\S+) (?:idle|mixed|allocated|completing)", listed.stdout, re.MULTILINE)
        others = set(usable) - {fault.node}
        return fault.node if len(others) >= int(os.environ["SLURM_NNODES"]) else None

    def end(self, attempt: int, outcome: str, status: int, fault: Fault | None = None, **more: Any) -> None:
        """Records how an attempt ended: what failed first, and what is done about it."""
        about = (fault._asdict() if fault else {}) | {"srun_status": status}
        checkpoint = newest_checkpoint(self.folder)
        self.record("end", attempt=attempt, outcome=outcome, checkpoint=checkpoint, **about, **more)

    def record(self, event: str, **values: Any) -> None:
        """Adds a line to the history; a full disk must not stop the run that may outlast it."""
        now = time.strftime(TIME_FORMAT, time.gmtime())
        line = {"time": now, "event": event, "job": self.job.id, "start": self.job.restart + 1}
        line |= {"nodes": self.job.nodes} | values
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ATTEMPTS_FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            say(f"{ATTEMPTS_FILE} can't be written ({error})")


def main() -> int:
    """Reads the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--notice", type=Path, required=True)
    parser.add_argument("--no-requeue", action="store_true")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    return Supervisor(args.folder, args.notice, args.command, not args.no_requeue).run()


if __name__ == "__main__":
    sys.exit(main())
