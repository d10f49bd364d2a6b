"""What the runs in a folder are doing: from their files, and from Slurm."""

import shutil
import subprocess
import time
from calendar import timegm
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convneur.config import load_config
from convneur.data.errors import InputError
from convneur.launch.submit import SUBMITTED, queued
from convneur.launch.supervise import TIME_FORMAT, Record, read_attempts
from convneur.metrics import read_metrics
from convneur.summary import read_summary


@dataclass(frozen=True)
class RunStatus:
    """A run as its files show it; None where they don't say.

    Attributes:
        name: of its folder.
        state: "finished", what Slurm says of its job, such as "RUNNING", or how its last attempt ended.
        epoch: reached.
        epochs: of the whole run; 0 for one that Slurm has only queued.
        top1: of the newest evaluation, the better of raw and averaged weights.
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
    top1: float | None
    images_per_second: float | None
    seconds_left: float | None
    restarts: int | None
    ettr: float | None

    def cells(self) -> list[str]:
        """The row of a table."""
        minutes = None if self.seconds_left is None else round(self.seconds_left / 60)
        return [
            self.name,
            self.state,
            f"{self.epoch:.2f}/{self.epochs}" if self.epochs else "-",
            "-" if self.top1 is None else f"{self.top1:.2%}",
            "-" if self.images_per_second is None else f"{self.images_per_second:,.0f}",
            "-" if minutes is None else f"{minutes // 60}:{minutes % 60:02d} h",
            "-" if self.restarts is None else str(self.restarts),
            "-" if self.ettr is None else f"{self.ettr:.0%}",
        ]


def list_runs(folder: Path) -> list[RunStatus]:
    """All runs in a folder, by name, then those in Slurm's queue. InputError where there is no such folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder, expected one with runs in it, such as runs")
    begun = [_status(path.parent) for path in sorted(folder.glob("*/config.yaml"))]
    names = {run.name for run in begun}
    in_queue = queued(folder) if (folder / SUBMITTED).is_dir() and shutil.which("squeue") else {}
    return begun + [_not_begun(*run) for run in sorted(in_queue.items()) if run[0] not in names]


def _status(run: Path) -> RunStatus:
    config = load_config([run / "config.yaml"])
    records = read_metrics(run)
    scores = [max(r["eval/top1"], r.get("eval/top1_ema") or 0.0) for r in records if "eval/top1" in r]
    rates = [r["train/images_per_second"] for r in records if "train/images_per_second" in r]
    attempts = read_attempts(run)
    starts = sum(record["event"] == "start" for record in attempts)
    epoch = float(records[-1]["epoch"]) if records else 0.0
    finished = read_summary(run) is not None
    left = None
    if rates and epoch and not finished:
        steps = records[-1]["step"] / epoch * config.schedule.epochs - records[-1]["step"]
        left = steps * config.data.global_batch_size / rates[-1]
    return RunStatus(
        name=run.name,
        state="finished" if finished else _state(attempts),
        epoch=epoch,
        epochs=config.schedule.epochs,
        top1=scores[-1] if scores else None,
        images_per_second=rates[-1] if rates else None,
        seconds_left=left,
        restarts=max(0, starts - 1) if attempts else None,
        ettr=_ettr(attempts, records, config.data.global_batch_size, finished) if attempts else None,
    )


def _not_begun(name: str, state: str) -> RunStatus:
    nothing = dict.fromkeys(("top1", "images_per_second", "seconds_left", "restarts", "ettr"))
    return RunStatus(name, state, 0.0, 0, **nothing)


def _ettr(attempts: Sequence[Record], records: Sequence[Mapping[str, Any]], batch: int, finished: bool) -> float:
    """Seconds in the steps that the metrics still have, over those since the first start."""
    seconds, before = 0.0, 0
    for record in records:
        if "train/images_per_second" in record:
            seconds += (record["step"] - before) * batch / record["train/images_per_second"]
            before = record["step"]
    first, last = (timegm(time.strptime(attempts[i]["time"], TIME_FORMAT)) for i in (0, -1))
    return seconds / max((last if finished else time.time()) - first, 1.0)


def _state(attempts: Sequence[Record]) -> str:
    """What Slurm says of the job of the last attempt; where it no longer knows it, how that attempt ended."""
    if not attempts:
        return "unknown"
    if shutil.which("squeue"):
        command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={attempts[-1]['job']}"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.split()[0]
    return attempts[-1].get("outcome", "lost")
