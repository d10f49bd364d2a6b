"""Launcher and ranks of one machine stop, go on and end together."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from places import RANKS

from convneur.data.errors import InputError
from convneur.launch import local
from convneur.launch.lock import locked

RANK = RANKS / "obedient.py"
LAUNCH = """
import sys
from pathlib import Path
sys.executable, folder = sys.argv[1:3]
from convneur.launch.local import run_ranks
from convneur.launch.lock import locked
with locked(Path(folder)) as lock:
    sys.exit(run_ranks(sys.argv[2:], 2, lock))
"""


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def counts(folder: Path) -> list[int]:
    return [int((folder / f"count-{rank}").read_text().split()[0]) for rank in range(2)]


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """What the launcher takes for Python: starts the rank that stands in for training."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{RANK}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def launch(interpreter: Path, tmp_path: Path) -> Iterator[Callable[..., psutil.Popen]]:
    """Starts a launcher of two ranks that count in `tmp_path`/run, and returns when they do."""
    started, folder = [], tmp_path / "run"
    folder.mkdir()

    def start(*words: str, before: tuple[str, ...] = ()) -> psutil.Popen:
        command = [*before, sys.executable, "-c", LAUNCH, interpreter, folder, *words]
        launcher = psutil.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
        started.append(launcher)
        until(lambda: all((folder / f"count-{rank}").exists() for rank in range(2)))
        return launcher

    yield start
    for launcher in started:
        for process in [*launcher.children(), launcher] if launcher.is_running() else []:
            process.kill()
        launcher.wait()


def test_ranks_stop_and_go_on_with_their_launcher_and_keep_the_run(
    launch: Callable[..., psutil.Popen], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    launcher = launch()
    for sent in (signal.SIGSTOP, signal.SIGTSTP):  # the one can't be heard, the other passed on
        launcher.send_signal(sent)
        processes = [launcher, *launcher.children()]
        until(lambda all=processes: {one.status() for one in all} == {psutil.STATUS_STOPPED})
        with pytest.raises(InputError, match=f"in use by process {launcher.pid} and its ranks"), locked(folder):
            pass
        before = counts(folder)
        launcher.send_signal(signal.SIGCONT)
        until(lambda old=before: all(now > then for now, then in zip(counts(folder), old, strict=True)))
    launcher.send_signal(signal.SIGUSR2)
    assert launcher.wait(60) == 128 + signal.SIGUSR2
    assert [(folder / f"saved-{rank}").read_text() for rank in range(2)] == ["SIGUSR2"] * 2


def test_ranks_save_and_end_when_their_launcher_is_gone(launch: Callable[..., psutil.Popen], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = launch()
    ranks = launcher.children()
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs(ranks, timeout=60)[1]
    assert [(folder / f"saved-{rank}").read_text() for rank in range(2)] == ["SIGTERM"] * 2
    with locked(folder):
        pass


def test_the_first_interrupt_is_patient_and_the_second_is_not(launch: Callable[..., psutil.Popen]) -> None:
    launcher = launch("deaf")
    ranks = launcher.children()
    launcher.send_signal(signal.SIGINT)
    assert launcher.stderr.readline().startswith("convneur: stopping; a run saves a checkpoint first")
    assert all(rank.is_running() for rank in ranks)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) == 130
    assert "ended at once; what was made since the last checkpoint is lost" in launcher.stderr.read()
    assert not psutil.wait_procs(ranks, timeout=60)[1]


def test_a_terminal_that_closes_stops_a_run_unless_nohup_says_otherwise(
    launch: Callable[..., psutil.Popen], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    launcher = launch(before=("nohup",))
    before = counts(folder)
    launcher.send_signal(signal.SIGHUP)
    until(lambda: all(now > then + 5 for now, then in zip(counts(folder), before, strict=True)))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == 128 + signal.SIGTERM


def test_a_machine_without_loopback_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> socket.socket:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(InputError, match="which can't be reached here"):
        local.run_ranks([], 1)
