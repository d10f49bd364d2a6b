"""Running what a study misses: as processes of this machine, some at a time, or as lines for Slurm."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls

from convneur.config import Config, save_config
from convneur.data.errors import DamagedError, InputError
from convneur.launch.leash import LAUNCHER
from convneur.launch.local import WAKE_SECONDS
from convneur.launch.signals import handling, stoppable
from convneur.records.summary import Summary, read_summary
from convneur.studies.grid import Place, StudyConfig, progress
from convneur.studies.series import Standing, member_folder

CONFIGS = "configs"
LOGS = "logs"
POLL_SECONDS = 0.5


def save_configs(runs: Mapping[Place, Config], folder: Path) -> dict[Place, Path]:
    """Writes the configuration of every run into the study's folder; returns the files."""
    (folder / CONFIGS).mkdir(parents=True, exist_ok=True)
    paths = {place: folder / CONFIGS / f"{place.name}.yaml" for place in runs}
    for place, path in paths.items():
        save_config(runs[place], path)
    return paths


def sbatch_lines(runs: Mapping[Place, Config], paths: Mapping[Place, Path], script: Path) -> Iterator[str]:
    """A line for each run that submits it by one of the batch scripts, which ask for the nodes and GPUs.

    The places of runs and data are repeated, because the scripts have some of their own.
    """
    for place, path in paths.items():
        run = runs[place]
        words = ["sbatch", f"--job-name={place.name}", str(script), "--config", str(path.resolve())]
        yield shlex.join([*words, "--run.root", run.run.root, "--data.root", run.data.root])


def run_missing(config: StudyConfig, stand: Standing[Place], folder: Path, jobs: int, nproc: int) -> list[str]:
    """Trains the unfinished runs, `jobs` of them at a time with `nproc` ranks each; the names of those that failed.

    A run that fails is left behind and the others go on. What a run says goes to logs/NAME.log in the study's folder.

    Raises StoppedError where a signal came that stops runs; they have saved checkpoints by then.
    """
    missing = stand.missing
    paths = save_configs(missing, folder)
    (folder / LOGS).mkdir(exist_ok=True)
    weights = {place: state.weight for place, state in progress(config).items()}
    total, finished = sum(weights.values()), sum(weights[place] for place in stand.finished)
    spent: dict[Place, float] = {}  # seconds, of the runs that end here
    print(f"{len(stand.finished)} of {len(weights)} runs are finished, {finished / total:.0%} of the operations")
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(jobs * nproc)))}
    waiting, failed = list(missing), []
    running: dict[Place, subprocess.Popen[bytes]] = {}
    free, of_run = device_shares(jobs, nproc), {}
    with stoppable(), _waking(running) as wake:
        try:
            while waiting or running:
                wake()
                while waiting and len(running) < jobs:
                    place = waiting.pop(0)
                    of_run[place] = free.pop()
                    log = folder / LOGS / f"{place.name}.log"
                    running[place] = _start(paths[place], log, nproc, environment | of_run[place])
                    spent[place] = -time.monotonic()
                time.sleep(POLL_SECONDS)
                for place in [place for place, process in running.items() if process.poll() is not None]:
                    del running[place]
                    free.append(of_run.pop(place))
                    spent[place] += time.monotonic()
                    summary = _summary(missing[place])
                    if summary is None:
                        del spent[place]
                        failed.append(place.name)
                        print(f"FAILED: {place.name}; see {folder / LOGS / place.name}.log", flush=True)
                        continue
                    finished += weights[place]
                    ended = {one: seconds for one, seconds in spent.items() if seconds > 0}
                    left = _seconds_left(ended, weights, [*running, *waiting]) / jobs
                    done = len(stand.finished) + len(missing) - len(waiting) - len(running) - len(failed)
                    print(
                        f"[{done}/{len(weights)}] {place.name}  {summary.metric} {summary.chosen:.4f}"
                        f"  {summary.seconds:.0f} s"
                        f"  {finished / total:.0%} of the operations, about {left / 60:.0f} min left",
                        flush=True,
                    )
        finally:
            _stop(running)
    return failed


def _summary(run: Config) -> Summary | None:
    try:
        return read_summary(member_folder(run))
    except DamagedError:
        return None


def _seconds_left(ended: Mapping[Place, float], weights: Mapping[Place, float], ahead: Sequence[Place]) -> float:
    """What the runs ahead will take one after the other, if runs take so long to start and so long an operation."""
    largest = max(weights.values())
    work = np.array([[1.0, weights[place] / largest] for place in ended])
    start, slope = nnls(work, np.array(list(ended.values())))[0]
    return float(sum(start + slope * weights[place] / largest for place in ahead))


def device_shares(jobs: int, nproc: int) -> list[dict[str, str]]:
    """For each of the runs at a time, the environment that gives it `nproc` GPUs of its own; nothing without GPUs.

    Raises InputError where there are too few.
    """
    count = torch.cuda.device_count()
    if not count:
        return [{} for _ in range(jobs)]
    if jobs * nproc > count:
        raise InputError(f"--jobs {jobs} x --nproc {nproc} is more than the {count} GPUs here: lower one of them")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[job * nproc : (job + 1) * nproc])} for job in range(jobs)]


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _start(config: Path, log: Path, nproc: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts `convneur train` for a run, in a session of its own: a Ctrl-C comes here alone and is passed on.

    Its leash ties it to this process, as ranks are tied to their launcher: they stop and end together.
    """
    words = ["train", "--config", str(config), "--resume", "auto", "--launch", "local", "--nproc", str(nproc)]
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "convneur.launch", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment, LAUNCHER: str(os.getpid())},
            start_new_session=True,
        )


def _stop(running: Mapping[Place, subprocess.Popen[bytes]]) -> None:
    """Has the runs save a checkpoint and end."""
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for process in running.values():
        process.wait()


@contextmanager
def _waking(running: Mapping[Place, subprocess.Popen[bytes]]) -> Iterator[Callable[[], None]]:
    """Yields what is to be called again and again: it wakes the runs for a while after this process was woken."""
    until = 0.0

    def woken(*_: object) -> None:
        nonlocal until
        until = time.monotonic() + WAKE_SECONDS

    def wake() -> None:
        if time.monotonic() < until:
            for process in running.values():
                process.send_signal(signal.SIGCONT)

    with handling({signal.SIGCONT: woken}):
        yield wake
