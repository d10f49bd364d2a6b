"""What Slurm says of the jobs that train runs, and of those that wait.

Submissions below a folder of runs lie in its folder `submitted/`, each with its snapshot: `config-N.yaml` is the Nth
task's, and Slurm tells of every job which of them it came from.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from convneur.data.errors import InputError

SUBMITTED = "submitted"


def queued(root: Path) -> dict[str, str]:
    """The runs below a folder whose submitted jobs Slurm has, waiting or running: their names, and the jobs' states.

    Raises InputError where Slurm can't be asked, though something has been submitted from here.
    """
    if not (root / SUBMITTED).is_dir():
        return {}
    found = {}
    for line in _ask("squeue", "--noheader", "--array", "--format=%K %T %o").splitlines():
        task, state, script = line.split(maxsplit=2)
        submission = Path(script).parent.parent
        if submission.parent.name == SUBMITTED and submission.parent.resolve() == (root / SUBMITTED).resolve():
            config = submission / f"config-{task if task.isdecimal() else 0}.yaml"  # it is "N/A" of a job alone
            found[_run_name(config) or str(config)] = state
    return found


@cache  # it is written once, and there may be hundreds
def _run_name(config: Path) -> str | None:
    """The run that a submitted configuration is of; None where it can't be read."""
    try:
        return str(yaml.load(config.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["run"]["name"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def array_limit() -> int:
    """Most tasks that Slurm takes in an array."""
    shown = _ask("scontrol", "show", "config")
    return int(re.findall(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)[0])


def job_states(jobs: Sequence[str]) -> dict[str, str] | None:
    """What Slurm says of jobs, those left out that it no longer knows; None where it doesn't answer."""
    if not jobs or not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%A %T", f"--jobs={','.join(jobs)}"]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        return {} if "Invalid job id" in asked.stderr else None
    return dict(line.split()[:2] for line in asked.stdout.splitlines())


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise InputError(f"Slurm doesn't answer {command[0]} ({reason}): try later, or on a login node") from error
