"""Submitting runs to Slurm by submitit, from a snapshot of code and configuration.

A submitted job is one Python process on its first node, started by submitit in place of the batch shell. It runs the
snapshot's `slurm/common.sh`, which starts and looks after the ranks as for the batch scripts. submitit calls
`checkpoint` inside its handler of the signal that comes ahead of a time limit or a preemption, and then queues the job
again: by then the ranks must have saved. They are other processes, so the handler can wait for that.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor

from convneur.config import Config, save_config
from convneur.data.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[1]
CODE = ("convneur", "data", "launch", "slurm", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
NOTICE_SECONDS = 300
TELL_SECONDS = 2.0


@dataclass(frozen=True)
class Resources:
    """What a job asks for; `options` go to sbatch as they are."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    timeout_min: int
    options: dict[str, Any]


class Training:
    """What submitit runs in the job."""

    def __init__(self, script: Path, words: Sequence[str]) -> None:
        self.script, self.words = script, list(words)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Runs the batch script; an exception where it fails, so that Slurm says FAILED."""
        self._process = subprocess.Popen(["bash", str(self.script), *self.words])
        while (status := self._process.poll()) is None:
            time.sleep(0.5)
        if status:
            sys.exit(status)

    def checkpoint(self, *_: Any) -> submitit.helpers.DelayedSubmission:
        """Has the ranks save and stop, and waits for it."""
        # The handler may have interrupted `poll`, whose lock it can't take a second time.
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while self._process and self._process.returncode is None and not os.waitid(os.P_PID, self._process.pid, ended):
            os.kill(self._process.pid, signal.SIGUSR2)
            time.sleep(TELL_SECONDS)
        return submitit.helpers.DelayedSubmission(Training(self.script, self.words))


def snapshot(configs: Sequence[Config], folder: Path) -> list[Path]:
    """Copies this checkout's code, and writes the configurations, into a new folder; the configurations' files."""
    if not (CHECKOUT / "slurm").is_dir():
        raise InputError(f"{CHECKOUT} is not a checkout, expected the folder slurm/ in it: submit from a checkout")
    folder.mkdir(parents=True)
    for name in CODE:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    package = folder / "packages" / "convneur"  # as it is installed; see setup.cfg
    shutil.copytree(folder / "convneur", package)
    for room in ("data", "launch"):
        shutil.copytree(folder / room, package / room)
    paths = []
    for number, config in enumerate(configs):
        paths.append(folder / f"config-{number}.yaml")
        save_config(config, paths[-1])
    return paths


def executor(folder: Path, name: str, resources: Resources, python: str) -> SlurmExecutor:
    """submitit's executor with the resources of a job; InputError where there is no Slurm."""
    try:
        made = SlurmExecutor(folder, python=f"exec {python}", max_num_timeout=1000)
    except RuntimeError as error:
        raise InputError(f"there is no srun here ({error}): submit on a login node") from error
    made.update_parameters(
        job_name=name,
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_task=resources.cpus_per_task,
        time=resources.timeout_min,
        stderr_to_stdout=True,
        use_srun=False,
        setup=["trap '' USR2 # a notice that comes before Python listens must not end the job"],
        additional_parameters={"signal": f"B:USR2@{NOTICE_SECONDS}", "requeue": True, **resources.options},
    )
    return made
