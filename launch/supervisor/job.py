"""The Slurm job that this process is part of, and what Slurm says of it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import suppress

PATIENCE = (1, 2, 5, 10, 20, 30)
"""Pauses, in seconds, before Slurm or the storage is asked again that has not answered."""
REQUEUE_PATIENCE = (*PATIENCE, *[30] * 8)

Answer = subprocess.CompletedProcess


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

    def is_running(self, patience: tuple[int, ...] = PATIENCE) -> bool | None:
        """Whether Slurm counts the job as running: not cancelled, not being requeued; None where it doesn't answer."""
        for pause in (0, *patience):
            time.sleep(pause)
            state = re.search(r"\bJobState=(\w+)", ask("scontrol", "show", "job", "-o", self.name).stdout)
            if state:
                return state[1] == "RUNNING"
        return None

    def has_step(self) -> bool:
        """Whether Slurm has made a step of the job besides the batch script's, as far as it can be asked."""
        shown = ask("squeue", "--noheader", "--steps", f"--jobs={self.name}", "--format=%i")
        return shown.returncode != 0 or bool(re.search(r"\.\d+$", shown.stdout, re.MULTILINE))

    def seconds_left(self) -> float | None:
        """Until the job's time limit; None without one, or where Slurm doesn't answer."""
        shown = ask("squeue", "--noheader", f"--jobs={self.name}", "--format=%e").stdout.strip()
        try:
            return time.mktime(time.strptime(shown, "%Y-%m-%dT%H:%M:%S")) - time.time()
        except ValueError:
            return None

    def requeue(self, exclude: str | None) -> bool:
        """Queues the job again, without a node where one is named; the rest of this process is then borrowed time."""
        say("queueing the job again, to go on from its checkpoint" + (f", without node {exclude}" if exclude else ""))
        for pause in REQUEUE_PATIENCE:
            answer = ask("scontrol", "requeue", self.name)
            if not answer.returncode:
                break
            say(f"that failed ({one_line(answer.stderr)})")
            # These are answers, and no others would follow. The third: the answer to an earlier request was lost.
            if re.search(r"disabled|denied|Invalid job", answer.stderr) or self.is_running(()) is False:
                return False
            time.sleep(pause)
        else:
            say("submit the job again to go on")
            return False
        # Slurm lets the nodes of a job be chosen only while it is pending, which takes it a moment.
        for _ in range(20 if exclude else 0):
            if not ask("scontrol", "update", f"JobId={self.name}", f"ExcNodeList={exclude}").returncode:
                break
            time.sleep(0.2)
        return True


def ask(*command: str) -> Answer[str]:
    """What one of Slurm's commands answers; a status that isn't 0 where it doesn't, or can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(command, 1, "", str(error))


def say(line: str) -> None:
    """Writes to the job's log; one that can't be written ends nothing."""
    with suppress(OSError):
        os.write(1, f"slurm: {line}\n".encode(errors="replace"))


def one_line(text: str) -> str:
    """Its words, with a blank between one and the next."""
    return " ".join(text.split())
