"""Submitting runs to Slurm by submitit, from a snapshot of code and configuration.

A submitted job is one Python process on its first node, started by submitit in place of the batch shell. It runs the
snapshot's `slurm/common.sh`, which starts and looks after the ranks as for the batch scripts. submitit calls
`checkpoint` inside its handler of the signal that comes ahead of a time limit or a preemption, and then queues the job
again: by then the ranks must have saved. They are other processes, so the handler can wait for that.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from convneur.config import Config, save_config
from convneur.data.errors import InputError
from convneur.launch.slurm_queue import SUBMITTED
from convneur.launch.supervisor.job import Job

CHECKOUT = Path(__file__).resolve().parents[1]
CODE = ("convneur", "data", "launch", "slurm", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
NOTICE_SECONDS = 300
TELL_SECONDS = 2.0
EARLY_NOTICE = "CONVNEUR_EARLY_NOTICE"
NOTICES = ("HUP", "INT", "QUIT", "ALRM", "TERM", "USR1", "USR2")
"""Signals that `--signal` may be asked for, and TERM, which comes when the nodes are taken."""
SETUP = (
    # A notice that comes before Python listens: to bash, in a variable; later, in signals that are blocked till then.
    f"export {EARLY_NOTICE}=",
    f"trap {EARLY_NOTICE}=yes {' '.join(NOTICES)}",
)


@dataclass(frozen=True)
class Resources:
    """What a job asks for; `options` go to sbatch as they are. `at_once`: most tasks of an array at a time, if any."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus_per_task: int
    timeout_min: int
    options: dict[str, Any]
    at_once: int | None = None

    @property
    def ranks(self) -> int:
        """Of a job."""
        return self.nodes * self.tasks_per_node


class Training:
    """What submitit runs in the job."""

    def __init__(self, script: Path, words: Sequence[str]) -> None:
        self.script, self.words = script, list(words)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Runs the batch script; an exception where it fails, so that Slurm says FAILED."""
        self._listen()
        self._process = subprocess.Popen(["bash", str(self.script), *self.words])
        while (status := self._process.poll()) is None:
            time.sleep(0.5)
        if status:
            sys.exit(status)

    def _listen(self) -> None:
        """Has submitit's handler, which is for USR2, hear of all others, too, and of a notice that came before."""
        handler = signal.getsignal(signal.SIGUSR2)
        assert callable(handler)

        def taken(number: int, frame: FrameType | None) -> None:
            if Job().is_running(()) is not False:  # else it was cancelled, or Slurm queues it again itself
                handler(number, frame)

        numbers = [signal.Signals[f"SIG{name}"] for name in NOTICES]
        for number in numbers:
            signal.signal(number, taken if number == signal.SIGTERM else handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        if os.environ.pop(EARLY_NOTICE, ""):
            taken(signal.SIGUSR2, None)

    def checkpoint(self, *_: Any) -> submitit.helpers.DelayedSubmission:
        """Has the ranks save and stop, and waits for it."""
        # The handler may have interrupted `poll`, whose lock it can't take a second time.
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while self._process and self._process.returncode is None and not os.waitid(os.P_PID, self._process.pid, ended):
            os.kill(self._process.pid, signal.SIGUSR2)
            time.sleep(TELL_SECONDS)
        return submitit.helpers.DelayedSubmission(Training(self.script, self.words))


def submission_folder(root: Path, name: str) -> Path:
    """A new folder for a submission, among those below a folder of runs."""
    return root.absolute() / SUBMITTED / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


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


class _Executor(SlurmExecutor):
    """submitit's, which says what it would give to sbatch on machines without Slurm, too."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _job_name(name: str) -> str:
    """A run's name as Slurm shows it, in whose scripts a line ends at a line's end, quoted or not."""
    return re.sub(r"[^\w.+=@%:/ -]", "_", name)


def executor(folder: Path, name: str, resources: Resources, python: str) -> SlurmExecutor:
    """submitit's executor with the resources of a job."""
    made = _Executor(
        folder, python=f"exec env --block-signal={','.join(NOTICES)} {shlex.quote(python)}", max_num_timeout=1000
    )
    made.update_parameters(
        job_name=_job_name(name),
        nodes=resources.nodes,
        ntasks_per_node=resources.tasks_per_node,
        gpus_per_node=resources.gpus_per_node,
        cpus_per_task=resources.cpus_per_task,
        time=resources.timeout_min,
        stderr_to_stdout=True,
        use_srun=False,
        setup=list(SETUP),
        **({"array_parallelism": resources.at_once} if resources.at_once else {}),
        additional_parameters={"signal": f"B:USR2@{NOTICE_SECONDS}", "requeue": True, **resources.options},
    )
    return made


def sbatch_text(folder: Path, name: str, resources: Resources, tasks: int | None) -> str:
    """What sbatch would be given for a submission in a folder: a job, or an array of so many tasks."""
    made = executor(folder / "jobs", name, resources, sys.executable)
    return str(_make_sbatch_string(made._submitit_command_str, made.folder, map_count=tasks, **made.parameters))


def submit(
    configs: Sequence[Config], folder: Path, name: str, resources: Resources, begin: str | None = None
) -> list[submitit.Job[None]]:
    """Submits runs from a new snapshot in a folder: one as a job, several as an array of a job each.

    They begin from a checkpoint, or another run's newest, if one is given as `begin`.

    Raises InputError where there is no sbatch, or it refuses; nothing is left behind then.
    """
    if not shutil.which("sbatch"):
        raise InputError("there is no sbatch here: submit on a login node")
    made = executor(folder / "jobs", name, resources, sys.executable)
    paths = snapshot(configs, folder)
    script, more = folder / "slurm" / "submitted.sh", [f"--begin={Path(begin).resolve()}"] if begin else []
    try:
        with redirect_stderr(StringIO()), made.batch():  # submitit repeats there what sbatch says
            return [made.submit(Training(script, [sys.executable, str(path), *more])) for path in paths]
    except FailedJobError as error:
        shutil.rmtree(folder)
        raise InputError(str(error).strip().splitlines()[-1]) from error
