"""A run's folder has one writer, and is not locked by the dead."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convneur.data.errors import InputError
from convneur.launch import lock
from convneur.launch.lock import LOCK_FILE, locked

HOLD = "import sys, time; from pathlib import Path; from convneur.launch import lock\n"
HOLD += "lock.BEAT_SECONDS = 0.2\nwith lock.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 1.0)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_holder_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid}"), locked(tmp_path):
            pass
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < lock.DEAD_SECONDS
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_holder_on_another_node_is_dead_when_it_no_longer_touches_its_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps({"token": "x", "host": "n7", "processes": "", "pid": 1, "job": "3"}))
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started >= lock.DEAD_SECONDS


def test_the_next_start_of_a_job_need_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    (tmp_path / LOCK_FILE).write_text(json.dumps({"token": "x", "host": "n7", "processes": "", "pid": 1, "job": "3"}))
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < lock.DEAD_SECONDS / 2


def test_a_holder_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    with locked(tmp_path):
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(10) == 1


def _take(folder: Path, holding: "multiprocessing.sharedctypes.Synchronized[int]") -> None:
    lock.BEAT_SECONDS = 0.05
    with locked(folder):
        with holding.get_lock():
            holding.value += 1
        time.sleep(4.0)


def test_of_several_that_find_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with locked(tmp_path):
        left = json.loads((tmp_path / LOCK_FILE).read_text()) | {"pid": dead.pid, "token": "left"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(left))
    context = multiprocessing.get_context("fork")
    holding = context.Value("i", 0)
    takers = [context.Process(target=_take, args=(tmp_path, holding)) for _ in range(6)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(20)
    assert holding.value == 1
    assert sorted(taker.exitcode or 0 for taker in takers) == [0, 1, 1, 1, 1, 1]
