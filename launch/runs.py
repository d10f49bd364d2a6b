"""What the runs in a folder are doing: from their files, and from Slurm."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from convneur.data.errors import DamagedError, InputError
from convneur.launch.run_reader import RunReader
from convneur.launch.slurm_queue import SUBMITTED, job_states, queued
from convneur.launch.supervisor.run_files import Record
from convneur.launch.tables import show_table, table_of
from convneur.records.folder import ATTEMPTS_FILE, CHECKPOINTS, CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from convneur.records.summary import ends_as_told
from convneur.tasks.metrics import Metric, primary_metric

HEADINGS = ("run", "state", "epoch", "score", "images/s", "left", "restarts", "ETTR")
WORDS = ("run", "state")
RUN_FILES = {CONFIG_FILE, SUMMARY_FILE, METRICS_FILE, ATTEMPTS_FILE, CHECKPOINTS}
"""What tells the folder of a run: any of them, since damage may have taken the others."""


@dataclass(frozen=True)
class RunStatus:
    """A run as its files show it; None where they don't say.

    Attributes:
        name: of its folder.
        state: "finished", what Slurm says of its job, such as "RUNNING", how its last attempt ended, or "damaged" and
            why: nothing else is said then.
        epoch: reached.
        epochs: of the whole run; 0 for one that Slurm has only queued.
        score: of the newest evaluation, by the task's first metric, the better of raw and averaged weights.
        images_per_second: last reported.
        seconds_left: at that speed.
        restarts: attempts after the first one; None for a run outside of Slurm.
        ettr: effective training time ratio: how much of the time since its first start it made steps that count;
            queues, starts, checkpoints, evaluations and steps that had to be made again are the rest. None for a run
            outside of Slurm. After "Revisiting Reliability in Large-Scale Machine Learning Research Clusters", arXiv
            2410.21680.
    """

    name: str
    state: str
    epoch: float
    epochs: int
    score: float | None
    images_per_second: float | None
    seconds_left: float | None
    restarts: int | None
    ettr: float | None
    metric: Metric | None = None

    def cells(self) -> list[str]:
        """The row of a table."""
        minutes = None if self.seconds_left is None else round(self.seconds_left / 60)
        return [
            self.name,
            self.state,
            f"{self.epoch:.2f}/{self.epochs}" if self.epochs else "-",
            "-" if self.score is None or self.metric is None else f"{self.score:{self.metric.form}}",
            "-" if self.images_per_second is None else f"{self.images_per_second:,.0f}",
            "-" if minutes is None else f"{minutes // 60}:{minutes % 60:02d} h",
            "-" if self.restarts is None else str(self.restarts),
            "-" if self.ettr is None else f"{self.ettr:.0%}",
        ]


def headings(runs: Sequence[RunStatus]) -> list[str]:
    """Of the table of these runs: a score has the name that their tasks give it."""
    titles = dict.fromkeys(run.metric.title for run in runs if run.metric)
    return [" or ".join(titles) if titles and heading == "score" else heading for heading in HEADINGS]


class Runs:
    """All runs in a folder, looked at again and again. InputError where there is no such folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder, expected one with runs in it, such as runs")
        self.folder = folder
        self._readers: dict[Path, RunReader] = {}

    def look(self) -> tuple[list[RunStatus], list[str]]:
        """The runs, by name, then those in Slurm's queue; and what else there is to say, a line each."""
        notes: list[str] = []
        seen = [self._see(path, notes) for path in sorted(self.folder.iterdir())]
        states = job_states([run.job for run in seen if isinstance(run, _Begun) and run.job])
        begun = [run.status(states) if isinstance(run, _Begun) else run for run in seen if run]
        names = {run.name for run in begun}
        in_queue = {}
        if (self.folder / SUBMITTED).is_dir() and shutil.which("squeue"):
            try:
                in_queue = queued(self.folder)
            except InputError as error:
                notes.append(str(error))
        return begun + [_not_begun(*run) for run in sorted(in_queue.items()) if run[0] not in names], notes

    def show(self) -> None:
        """Prints what there is to see now."""
        runs, notes = self.look()
        show_table(headings(runs), [run.cells() for run in runs], text=WORDS)
        for note in notes:
            print(f"note: {note}", flush=True)

    def _see(self, path: Path, notes: list[str]) -> "_Begun | RunStatus | None":
        """What a run's files say; None where a folder is none of a run."""
        try:
            if not path.is_dir():
                return _damaged(path.name, "it is a link to nothing") if path.is_symlink() else None
            names = {entry.name for entry in os.scandir(path)}
        except OSError as error:
            return _damaged(path.name, f"can't be read ({error.strerror})")
        if not names & RUN_FILES:
            return None
        if CONFIG_FILE not in names:
            return _damaged(path.name, f"it has no {CONFIG_FILE}")
        try:
            return _read(self._readers.setdefault(path, RunReader(path)), notes)
        except DamagedError as error:
            return _damaged(path.name, str(error).replace(f"{path}/", ""))


def watch(runs: Runs, every: float) -> NoReturn:
    """Shows the runs again and again, `every` so many seconds; on a terminal in the same place."""
    console = Console()
    if not console.is_terminal:
        while True:
            runs.show()
            time.sleep(every)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            found, notes = runs.look()
            table = table_of(headings(found), [run.cells() for run in found], console.width, text=WORDS)
            live.update(Group(table, *(Text(f"note: {note}") for note in notes)), refresh=True)
            time.sleep(every)


@dataclass(frozen=True)
class _Begun:
    """A run of which all is known but what Slurm says: `job` is the one to ask for, `outcome` what it is without."""

    name: str
    job: str | None
    outcome: str
    known: dict[str, Any]

    def status(self, states: Mapping[str, str] | None) -> RunStatus:
        state = self.outcome
        if self.job:
            state = "unknown: Slurm doesn't answer" if states is None else states.get(self.job, self.outcome)
        return RunStatus(name=self.name, state=state, **self.known)


def _read(run: RunReader, notes: list[str]) -> _Begun:
    config, summary, metrics = run.config(), run.summary(), run.metrics
    metrics.read()
    epochs, batch = config.schedule.epochs, config.data.global_batch_size
    finished = summary is not None and summary.epochs >= epochs  # else it was made longer
    if summary and finished and metrics.step and not ends_as_told(summary, metrics.epoch):
        raise DamagedError(f"{METRICS_FILE} ends at epoch {metrics.epoch:.2f}, {SUMMARY_FILE} at {summary.epochs}")
    try:
        attempts, lost = run.attempts(), False
    except DamagedError as error:
        attempts, lost = [], True
        notes.append(f"{run.folder.name}: {error}; so its state, its restarts and its ETTR aren't known")
    left = None
    if metrics.rate and metrics.epoch and not finished:
        left = (metrics.step / metrics.epoch * epochs - metrics.step) * batch / metrics.rate
    metric = primary_metric(config)
    names = f"eval/{metric.name}", f"eval/{metric.name}_ema"
    scores = [summary.score, summary.score_ema] if summary and finished else [metrics.scores.get(n) for n in names]
    known = {
        "epoch": float(epochs) if finished else metrics.epoch,
        "epochs": epochs,
        "score": max((score for score in scores if score is not None), key=metric.rank, default=None),
        "metric": metric,
        "images_per_second": metrics.rate,
        "seconds_left": left,
        "restarts": max(0, sum(record["event"] == "start" for record in attempts) - 1) if attempts else None,
        "ettr": _ettr(attempts, metrics.step_seconds * batch, finished) if attempts else None,
    }
    if finished or not attempts:
        return _Begun(run.folder.name, None, "finished" if finished else "not known" if lost else "unknown", known)
    return _Begun(run.folder.name, str(attempts[-1]["job"]), attempts[-1].get("outcome", "lost"), known)


def _damaged(name: str, why: str) -> RunStatus:
    return _not_begun(name, f"damaged: {why}")


def _not_begun(name: str, state: str) -> RunStatus:
    nothing = dict.fromkeys(("score", "images_per_second", "seconds_left", "restarts", "ettr"))
    return RunStatus(name, state, 0.0, 0, **nothing)


def _ettr(attempts: Sequence[Record], seconds: float, finished: bool) -> float:
    """Of the time since the first start, the part that went into the steps that the metrics have."""
    first, last = attempts[0]["seconds"], attempts[-1]["seconds"]
    return seconds / max((last if finished else time.time()) - first, 1.0)
