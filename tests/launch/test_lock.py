"""A run's folder has one writer, and is not locked by the dead."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from convneur.data.errors import InputError
from convneur.launch import lock
from convneur.launch.lock import locked
from convneur.records.folder import LOCK_FILE

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


def test_a_job_may_be_started_in_another_s_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no reason to take its run from it, here or on another node."""
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    process = holder(tmp_path)
    try:
        with pytest.raises(InputError, match=f"in use by process {process.pid} of job 3"), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()
    (tmp_path / LOCK_FILE).write_text(json.dumps({"token": "x", "host": "n7", "processes": "", "pid": 1, "job": "3"}))
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started >= lock.DEAD_SECONDS


def test_a_holder_that_is_stopped_is_no_dead_one(tmp_path: Path) -> None:
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(InputError, match=f"which is stopped .kill -CONT {process.pid} "), locked(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_holder_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    """On another machine it can't be told whether it is stopped."""
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGSTOP)
    found = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps(found | {"boot": "another"}))
    with locked(tmp_path):
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(10) == 1


@pytest.mark.parametrize("content", [b"", bytes(150), b"[]", b'{"token": "../x", "host": "n", "pid": 1}'])
def test_a_lock_that_says_nothing_is_watched(tmp_path: Path, content: bytes) -> None:
    """A machine that stopped may have left it so. While somebody touches it, it is held."""
    path = tmp_path / LOCK_FILE
    path.write_bytes(content)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    keeper = threading.Thread(target=touch)
    keeper.start()
    with pytest.raises(InputError, match="in use by a process that its lock doesn't name"), locked(tmp_path):
        pass
    ended.set()
    keeper.join()
    assert path.read_bytes() == content
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started >= lock.DEAD_SECONDS
    assert not list(tmp_path.iterdir())


def test_what_can_t_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).symlink_to("absent")
    with pytest.raises(InputError, match="is a link to nowhere"), locked(tmp_path):
        pass
    (tmp_path / LOCK_FILE).unlink()
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(InputError, match="so it can't be told whether"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / LOCK_FILE]


def test_a_lock_lives_as_long_as_those_it_is_shared_with(tmp_path: Path) -> None:
    """A launcher that is killed may leave ranks that still write."""
    writer = subprocess.Popen(["sleep", "60"])
    try:
        with locked(tmp_path) as held:
            held.share([writer.pid])
            left = json.loads((tmp_path / LOCK_FILE).read_text()) | {"pid": 2**22 + 1}
        (tmp_path / LOCK_FILE).write_text(json.dumps(left))
        with pytest.raises(InputError, match=f"and its ranks {writer.pid} "), locked(tmp_path):
            pass
    finally:
        writer.kill()
    while Path(f"/proc/{writer.pid}/stat").read_text().split()[2] != "Z":  # ended, and not yet noticed
        time.sleep(0.01)
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < lock.DEAD_SECONDS
    writer.wait()


def test_a_number_that_came_round_is_another_process(tmp_path: Path) -> None:
    with locked(tmp_path):
        left = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps(left | {"token": "left", "start": left["start"] - 1}))
    started = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - started < lock.DEAD_SECONDS


def test_a_lock_that_is_removed_comes_back(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        (tmp_path / LOCK_FILE).unlink()
        held.beat()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} "), locked(tmp_path):
            pass
    assert not (tmp_path / LOCK_FILE).exists()


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
