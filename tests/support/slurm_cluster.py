"""A Slurm cluster on this machine, made by slurm/dev_cluster.sh, and jobs on it."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from places import SLURM

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def missing_programs() -> list[str]:
    """What of Slurm this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def go_untested(reason: str) -> NoReturn:
    """Skips a test for want of a program; fails it where continuous integration would not notice."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def dev_cluster(*words: str | Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs slurm/dev_cluster.sh."""
    script = [str(SLURM / "dev_cluster.sh"), *map(str, words)]
    return subprocess.run(script, capture_output=True, text=True, timeout=timeout)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up in a folder."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of a shell that uses this cluster, and nothing of another job that it may be in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        return subprocess.run(
            [*map(str, words)], env=self.env, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True, timeout=1200
        ).stdout.strip()

    def submit(self, *words: str | Path, cwd: Path) -> str:
        """`sbatch WORDS` from a folder; the number of the job."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts, StartTime, EndTime, ..."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def hurry(self, number: str) -> None:
        """Spares a job that has been queued again the two minutes that Slurm would let it wait; takes a moment.

        For about a second after a job was killed on a node, the node refuses to start it ("Job credential revoked"),
        and Slurm 22.05 then counts it as failed. That is what the two minutes are good for.
        """
        time.sleep(3)
        with suppress(subprocess.CalledProcessError):  # it has started meanwhile, or isn't pending yet
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, number: str, *states: str, timeout: float = 1200) -> dict[str, str]:
        """Waits until a job is in one of some states, by default those of a job that has ended."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in (states or ENDED):
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job


@contextmanager
def held_cluster(nodes: int, folder: Path) -> Iterator[Cluster]:
    """A cluster that ends with this process, however that ends, by the script's `hold`."""
    words = [str(SLURM / "dev_cluster.sh"), "hold", str(nodes), str(folder)]
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as holder:
        assert holder.stdin
        assert holder.stdout
        said = ""
        while "end them: " not in said:
            line = holder.stdout.readline()
            assert line, said
            said += line
        try:
            yield Cluster(folder)
        finally:
            holder.stdin.close()
            said += holder.stdout.read()
    assert holder.returncode == 0, said
