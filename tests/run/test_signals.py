"""A run of two ranks that is stopped, suspended and killed at random, and resumed until it is done, to the bit."""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from compared_runs import assert_same_files
from small_run import STEPS, small_config

from convneur.config import save_config
from convneur.records.listing import checkpoint_name
from convneur.records.metrics import read_metrics

SEED = int(os.environ.get("CONVNEUR_SIGNALS_SEED", "0"))
INTERRUPTIONS, EPOCHS = 8, 4
START_SECONDS = 15.0
END_SECONDS = 1200.0  # what takes longer hangs
SUSPENDED = "suspended for a while"
NUMBERS = {
    "INT": signal.SIGINT,
    "HUP": signal.SIGHUP,
    "USR2": signal.SIGUSR2,
    "TERM": signal.SIGTERM,
    "Ctrl-C": signal.SIGINT,
    "a rank killed": signal.SIGKILL,
    "the launcher killed": signal.SIGKILL,
    SUSPENDED: signal.SIGTSTP,
}
KINDS = tuple(NUMBERS)
MOMENTS = ("start", "training", "evaluation", "saving", "end")


@dataclass
class Start:
    """One start of the run, by its launcher, in a session of its own as from a terminal."""

    run: Path
    launcher: psutil.Popen
    before: int | None

    @property
    def ranks(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [one for one in self.launcher.children() if one.is_running()]
        return []

    @property
    def lines(self) -> bytes:
        """The metrics that this start has written, and those it has kept: every start makes the file anew."""
        path = self.run / "metrics.jsonl"
        with suppress(FileNotFoundError):
            return path.read_bytes() if path.stat().st_ino != self.before else b""
        return b""

    def reaches(self, moment: str) -> bool:
        """Whether the run is where it is to be interrupted."""
        lines = self.lines
        if moment == "start":
            return True
        if moment == "training":
            return bool(lines)
        if moment == "evaluation":  # its line is written when it is over
            last = lines.rpartition(b"\n{")[2]
            return b'"train/loss"' in last and any(f'"epoch": {n}.0' in last.decode() for n in range(1, EPOCHS + 1))
        if moment == "saving":
            return bool(lines) and any((self.run / "checkpoints").glob("tmp-step-*"))
        return f'{{"step": {EPOCHS * STEPS},'.encode() in lines

    def is_over(self) -> bool:
        return self.launcher.poll() is not None


@contextmanager
def started(config: Path, run: Path, said: Path) -> Iterator[Start]:
    """Leaves no process of it behind, however the block ends."""
    words = ["train", "--launch", "local", "--nproc", "2", "--resume", "auto", "--config", str(config)]
    command = [sys.executable, "-m", "convneur.launch", *words, "--run.name", run.name]
    env = {name: value for name, value in os.environ.items() if name != "RANK"} | {"OMP_NUM_THREADS": "1"}
    before = (run / "metrics.jsonl").stat().st_ino if (run / "metrics.jsonl").exists() else None
    with said.open("ab") as log:
        launcher = psutil.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield Start(run, launcher, before)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def interrupt(start: Start, kind: str, draw: random.Random) -> None:
    """Sends what a terminal would to all processes of the run, and the rest to its launcher or to a rank."""
    ranks = start.ranks
    with suppress(psutil.NoSuchProcess, ProcessLookupError):  # it is over
        if kind == "Ctrl-C":
            os.killpg(start.launcher.pid, signal.SIGINT)
        elif kind == "a rank killed" and ranks:
            draw.choice(ranks).kill()
        elif kind == SUSPENDED:
            os.killpg(start.launcher.pid, signal.SIGTSTP)
            time.sleep(draw.uniform(0, 3))
            os.killpg(start.launcher.pid, signal.SIGCONT)
        else:
            start.launcher.send_signal(NUMBERS[kind])


def interrupted(start: Start, draw: random.Random, moments: tuple[str, ...]) -> str:
    """Interrupts a start, suspending it any number of times before; returns what was done, and how it has ended."""
    done = []
    while True:
        kind, moment = draw.choice(KINDS), draw.choice(moments)
        done.append(f"{kind} at {moment}")
        while not start.reaches(moment) and not start.is_over():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, START_SECONDS if moment == "start" else 0.3))
        ranks = start.ranks
        interrupt(start, kind, draw)
        if kind != SUSPENDED or start.is_over():
            break
    status = start.launcher.wait(END_SECONDS)
    done.append(f"status {status}")
    assert not psutil.wait_procs(ranks, timeout=END_SECONDS)[1], f"{done}: ranks go on without their launcher"
    killed = -signal.SIGKILL, 128 + signal.SIGKILL
    allowed = {SUSPENDED: (), "a rank killed": killed, "the launcher killed": killed}.get(kind, (128 + NUMBERS[kind],))
    # Before it listens, it dies of the signal; after its last step, nothing was left to stop.
    assert status in (0, *allowed, -NUMBERS[kind] if moment == "start" else 0), done
    return ", ".join(done)


@pytest.mark.slow
def test_signals_at_random_moments_change_no_bit(digits: Path, tmp_path: Path) -> None:
    """The environment's CONVNEUR_SIGNALS_SEED draws other signals at other moments."""
    draw, history, said = random.Random(SEED), [], tmp_path / "said"
    config = small_config(digits, 1, checkpoint_every_steps=2, keep_checkpoints=2, root=str(tmp_path))
    save_config(replace(config, schedule=replace(config.schedule, epochs=EPOCHS)), tmp_path / "config.yaml")
    whole, run = tmp_path / "whole", tmp_path / "run"
    try:
        with started(tmp_path / "config.yaml", whole, said) as start:
            assert start.launcher.wait(END_SECONDS) == 0
        for n in range(INTERRUPTIONS):
            with started(tmp_path / "config.yaml", run, said) as start:
                history.append(interrupted(start, draw, MOMENTS[: -1 if n < INTERRUPTIONS / 2 else None]))
            history[-1] += f", {len(read_metrics(run)) if run.exists() else 0} lines"
        with started(tmp_path / "config.yaml", run, said) as start:
            assert start.launcher.wait(END_SECONDS) == 0
        assert_same_end(whole, run)
    finally:  # pytest shows it where the test fails
        print(said.read_text()[-6000:], f"CONVNEUR_SIGNALS_SEED={SEED}:", *history, sep="\n")


def assert_same_end(first: Path, second: Path) -> None:
    name = checkpoint_name(EPOCHS * STEPS)
    assert_same_files(first / "checkpoints" / name, second / "checkpoints" / name)
    keys = ("step", "train/loss", "eval/top1", "eval/loss", "eval/loss_ema")
    x, y = ([[record.get(key) for key in keys] for record in read_metrics(run)] for run in (first, second))
    assert x == y
