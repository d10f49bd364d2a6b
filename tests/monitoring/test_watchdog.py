"""A rank that hangs shows its stacks and ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from convneur.monitoring.watchdog import EXIT_STATUS

WATCHED = """
import sys, threading, time
from pathlib import Path
from convneur.monitoring import watchdog
watchdog.OTHERS_SECONDS, watchdog.DEAF_SECONDS = 0.1, {deaf}
config = watchdog.WatchdogConfig(seconds=2, long_seconds=10)

def stuck():
    {stuck}

with watchdog.Watchdog(config, Path(sys.argv[1]) / "stacks", rank=3) as dog:
    time.sleep(2.5)  # the start may take long
    for _ in range(4):
        dog.step()
        time.sleep(0.3)
    with dog.paused():
        time.sleep(2.5)
    stuck()
print("ended well")
"""


def run(folder: Path, stuck: str, deaf: float = 30) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", WATCHED.format(stuck=stuck, deaf=deaf), str(folder)]
    return subprocess.run(words, capture_output=True, text=True, timeout=1200)


def test_stacks_of_a_rank_that_hangs_are_in_a_file_and_in_the_log(tmp_path: Path) -> None:
    hung = run(tmp_path, "time.sleep(60)")
    assert hung.returncode == EXIT_STATUS, hung.stderr
    for text in (hung.stderr, (tmp_path / "stacks" / "rank-3.txt").read_text()):
        assert "in stuck" in text
    assert "rank 3: no step for too long" in hung.stderr


def test_a_call_that_lets_no_python_run_is_ended_too(tmp_path: Path) -> None:
    hung = run(tmp_path, "import ctypes; ctypes.PyDLL(None).sleep(60)", deaf=0.5)
    assert hung.returncode == -signal.SIGABRT
    assert "in stuck" in hung.stderr


def test_a_process_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """For longer than it may hang, by both clocks; a step was due when it was stopped."""
    program = WATCHED.format(stuck="print('here', flush=True); sys.stdin.readline()", deaf=0.1)
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.stdin.write("\n")
        process.stdin.flush()
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "ended well\n"
        assert process.wait() == 0


def test_a_run_that_ends_leaves_nothing(tmp_path: Path) -> None:
    ended = run(tmp_path, "pass")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended well\n", "")
    assert not list(tmp_path.iterdir())
