"""What the supervisor makes of ranks that end, and of storage and a Slurm that don't answer; Slurm is a few scripts."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from convneur.launch.supervisor import supervisor
from convneur.launch.supervisor.run_files import newest_checkpoint
from convneur.launch.supervisor.supervisor import Supervisor, free_port

RUNNING = 'echo "JobId=11 JobState=RUNNING Reason=None"'

SCRIPT = ROOT / "launch" / "supervise.py"


@dataclass(frozen=True)
class Slurm:
    """A job whose ranks are shell scripts, and Slurm's answers."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def notice(self) -> Path:
        return self.folder / "notice"

    def says(self, state: str, requeue: str = "true") -> None:
        """What `scontrol show` and `scontrol requeue` do."""
        asked = f"echo asked >>'{self.folder}/asked'"
        requeue = f"echo \"$2\" >>'{self.folder}/queued'; {requeue}"
        self.tool("scontrol", f"case $1 in show) {asked}; {state} ;; requeue) {requeue} ;; esac")

    def tool(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
        return path

    def supervise(self, ranks: str, requeues: bool = True) -> int:
        ranks = f"trap '' USR2\nrun='{self.run}' notice='{self.notice}'\nattempt=${{CONVNEUR_FAULTS##*-}}\n{ranks}"
        return Supervisor(self.run, self.notice, [str(self.tool("ranks", ranks))], requeues).run()

    def queued(self) -> list[str]:
        path = self.folder / "queued"
        return path.read_text().split() if path.exists() else []

    def ends(self) -> list[dict[str, Any]]:
        lines = (self.run / "attempts.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == "end"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm(tmp_path)
    slurm.says(RUNNING)
    slurm.tool("squeue", "echo 11.0")
    slurm.tool("sinfo", "")
    slurm.run.mkdir()
    environment = {"SLURM_JOB_ID": "11", "SLURM_JOB_NODELIST": "n1", "SLURM_NNODES": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "OUTAGE_PAUSES", (0.1, 0.2))
    return slurm


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses longer than those between two looks at a process; they are not made."""
    made: list[float] = []
    sleep = supervisor.time.sleep
    monkeypatch.setattr(supervisor.time, "sleep", lambda s: made.append(s) if s >= 1 else sleep(s))
    return made


FINISH = 'echo "{}" >"$run/summary.json"'
SAVE = 'mkdir -p "$run/checkpoints/step-00000200"; echo "{}" >"$run/checkpoints/step-00000200/manifest.json"'
LEAVE_WORD = 'echo "$(date +%s.%N) {status} n1" >"$CONVNEUR_FAULTS/rank-0.ended"'
EXPLAIN = """echo '{{"message": {{"message": "{error}: what is wrong"}}}}' >"$CONVNEUR_FAULTS/rank-0.json" """


def fails(status: int, error: str = "") -> str:
    said = EXPLAIN.format(error=error) if error else ""
    return f"{said}\n{LEAVE_WORD.format(status=status)}\nexit {status}"


@pytest.mark.parametrize("removes_summary", [True, False])
def test_finished_run_that_is_made_longer_is_unfinished_until_its_own_end(slurm: Slurm, removes_summary: bool) -> None:
    (slurm.run / "summary.json").write_text("{}")  # of the shorter run
    begins = 'rm -f "$run/summary.json"' if removes_summary else "true"
    assert slurm.supervise(f"{begins}; {SAVE}; touch $notice; sleep 0.2; exit 0") == 0
    assert (slurm.ends()[-1]["outcome"], slurm.queued()) == ("stopped", ["11"])
    slurm.notice.unlink()
    assert slurm.supervise(f"{begins}; [ $attempt = 2 ] || exit 1; {FINISH}") == 0
    assert [end["outcome"] for end in slurm.ends()[1:]] == ["failed", "finished"]
    assert slurm.queued() == ["11"]


@pytest.mark.parametrize("requeue", ["true", "[ $(wc -l <FOLDER/queued) -ge 3 ] || exit 1"])
def test_a_controller_that_is_silent_for_a_while_ends_nothing(slurm: Slurm, pauses: list[float], requeue: str) -> None:
    silent = 'echo "Unable to contact slurm controller" >&2; exit 1'
    state = f"[ $(wc -l <'{slurm.folder}/asked') -ge 4 ] || {{ {silent}; }}; {RUNNING}"
    slurm.says(state, requeue.replace("FOLDER", str(slurm.folder)))
    assert slurm.supervise(f"{SAVE}; touch $notice; sleep 0.2; exit 0") == 0
    assert slurm.queued() == ["11"] * (1 if requeue == "true" else 3)
    assert pauses[:3] == [1, 2, 5]


def test_a_controller_that_stays_silent_is_no_cancelled_job(slurm: Slurm, pauses: list[float]) -> None:
    slurm.says("exit 1")
    assert slurm.supervise(f"{SAVE}; touch $notice; sleep 0.2; exit 0") == 0
    assert slurm.queued() == ["11"]
    assert 60 <= sum(pauses) <= 600


def test_a_job_that_may_not_be_queued_again_says_so_at_once(
    slurm: Slurm, pauses: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    slurm.says(RUNNING, 'echo "Requested operation is presently disabled for job 11" >&2; exit 1')
    assert slurm.supervise(f"{SAVE}; touch $notice; sleep 0.2; exit 0") == 1
    assert "presently disabled" in capfd.readouterr().out
    assert not pauses


def test_a_job_that_never_has_time_for_a_step_is_not_queued_for_ever(
    slurm: Slurm, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with a time limit within the notice of --signal."""

    def start(ranks: str) -> int:
        slurm.notice.unlink(missing_ok=True)
        return slurm.supervise(f"{ranks}; touch $notice; sleep 0.1; exit 0")

    for _ in range(supervisor.VAIN_STOPS - 1):
        assert start("true") == 0
    assert start(SAVE) == 0  # a step was made, so this begins anew
    for _ in range(supervisor.VAIN_STOPS - 2):
        assert start("true") == 0
    assert start("true") == 1
    assert len(slurm.queued()) == 2 * supervisor.VAIN_STOPS - 2
    assert "before a new checkpoint: the job ends; ask for more --time" in capfd.readouterr().out


def test_srun_that_gives_up_a_job_step_at_the_notice_has_not_failed(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "TELL_SECONDS", 0.1)
    waiting = "echo 'srun: Job 11 step creation temporarily disabled, retrying'; touch $notice"
    ranks = f"trap 'echo srun: Cancelled pending step; exit 1' USR2; {waiting}; for i in {{1..60}}; do sleep 0.1; done"
    assert slurm.supervise(ranks) == 0
    assert [end["outcome"] for end in slurm.ends()] == ["stopped"]
    assert slurm.queued() == ["11"]


def test_outage_is_waited_out_and_counts_as_no_failure(slurm: Slurm) -> None:
    ranks = f"[ $attempt -gt 5 ] || {{ {fails(74, 'StorageError')}; }}\n{FINISH}"
    assert slurm.supervise(ranks) == 0
    assert [end["outcome"] for end in slurm.ends()] == ["outage"] * 5 + ["finished"]


def test_notice_in_the_pause_of_an_outage_queues_the_job_again(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "OUTAGE_PAUSES", (600,))
    ranks = f"(sleep 0.3; touch $notice) >/dev/null 2>&1 &\n{fails(74)}"
    assert slurm.supervise(ranks) == 0
    assert slurm.queued() == ["11"]


def test_outage_without_end_ends(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "OUTAGE_SECONDS", 0.5)
    assert slurm.supervise(fails(74)) == supervisor.STORAGE
    assert slurm.queued() == []


def test_what_is_missing_during_an_outage_is_part_of_it(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fails(2, "InputError")
    assert slurm.supervise(f"[ $attempt != 1 ] || {{ {fails(74)}; }}\n[ $attempt != 2 ] || {{ {bad}; }}\n{FINISH}") == 0
    (slurm.run / "summary.json").unlink()
    monkeypatch.setattr(supervisor, "DOUBT_SECONDS", 0.0)
    assert slurm.supervise(f"[ $attempt != 1 ] || {{ {fails(74)}; }}\n{bad}") == supervisor.BAD_INPUT


def test_only_a_rank_that_says_so_has_bad_input(slurm: Slurm) -> None:
    assert slurm.supervise(fails(2)) == 1  # "python: can't open file", or a shell's own
    assert [end["action"] for end in slurm.ends()] == ["restart", "restart", "stop: no progress"]
    assert slurm.supervise(fails(2, "InputError")) == supervisor.BAD_INPUT


def test_run_folder_that_vanishes_is_not_begun_anew(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "OUTAGE_SECONDS", 0.5)
    (slurm.run / "checkpoints/step-00000100").mkdir(parents=True)
    (slurm.run / "checkpoints/step-00000100/manifest.json").write_text("{}")
    gone = f'mv "$run" "{slurm.folder}/elsewhere"; exit 1'
    assert slurm.supervise(gone) == supervisor.STORAGE
    assert not (slurm.run / "faults").exists()


def test_what_lies_beside_checkpoints_is_none(tmp_path: Path) -> None:
    names = [
        "step-00000100.bak",
        "step-00000999-keep",
        "step-best",
        "step-0000007",
        "step-00000300 (copy)",
    ]
    for name in [*names, "step-00000200"]:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == 200


@pytest.mark.parametrize("status", [1, 137, 139, 255, 75, 200])
def test_any_exit_status_is_a_reason(slurm: Slurm, status: int) -> None:
    assert slurm.supervise(f"[ $attempt = 2 ] || {{ {fails(status)}; }}\n{FINISH}") == 0
    assert slurm.ends()[0]["reason"]


@pytest.mark.parametrize("line", ["1", "null", '{"time": "2026', "\xff", '{"event": "end"}'])
def test_history_of_any_content_is_gone_on_with(slurm: Slurm, line: str) -> None:
    (slurm.run / "attempts.jsonl").write_bytes(line.encode("latin-1"))
    assert slurm.supervise("exit 1") == 1
    lines = (slurm.run / "attempts.jsonl").read_bytes().splitlines()
    assert lines[0] == line.encode("latin-1")
    assert [json.loads(one)["event"] for one in lines[1:]] == ["start", "end"] * 3


def test_a_link_or_another_users_file_is_no_notice(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.notice.symlink_to(slurm.run)
    assert not supervisor.is_ours(slurm.notice)
    slurm.notice.unlink()
    slurm.notice.touch()
    assert supervisor.is_ours(slurm.notice)
    monkeypatch.setattr(os, "getuid", lambda: slurm.notice.stat().st_uid + 1)
    assert not supervisor.is_ours(slurm.notice)


def test_a_rank_that_was_signalled_has_the_job_queued_again(slurm: Slurm) -> None:
    ranks = f"trap '{SAVE}; exit 0' USR2; touch $CONVNEUR_FAULTS/notice; for i in {{1..60}}; do sleep 0.1; done"
    assert slurm.supervise(ranks, requeues=False) == 0  # submitit has not heard of it
    assert slurm.queued() == ["11"]


def test_time_limit_without_a_notice_stops_the_ranks(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.tool("squeue", f"date -d @{time.time() + 2:.0f} +%Y-%m-%dT%H:%M:%S")
    monkeypatch.setattr(supervisor, "LAST_SECONDS", 0.3)
    monkeypatch.setattr(supervisor, "TELL_SECONDS", 0.1)
    ranks = f"trap '{SAVE}; exit 0' USR2; for i in {{1..60}}; do sleep 0.1; done"
    assert slurm.supervise(ranks) == 0
    assert slurm.queued() == ["11"]


def test_ranks_that_end_well_without_a_run_are_not_started_for_ever(slurm: Slurm) -> None:
    assert slurm.supervise("exit 0") == 1
    assert len(slurm.ends()) == 3


def test_ports_are_found_at_any_address() -> None:
    for address in ("127.0.0.1", "::1", "localhost", "no-such-name.invalid"):
        assert 20000 <= free_port(address, 5) < 32768


def test_log_that_cannot_be_written_ends_nothing(slurm: Slurm) -> None:
    ranks = slurm.tool("ranks", f"run='{slurm.run}'; {FINISH}")
    words = [
        sys.executable,
        "-IB",
        str(SCRIPT),
        f"--folder={slurm.run}",
        f"--notice={slurm.notice}",
        "--",
        str(ranks),
    ]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(words, stdout=full, stderr=full).returncode == 0


def test_it_is_run_by_its_path_and_takes_no_file_beside_it_for_the_standard_library_s(tmp_path: Path) -> None:
    copy = tmp_path / "launch" / SCRIPT.name
    shutil.copytree(Path(supervisor.__file__).parent, copy.parent / "supervisor")
    shutil.copy(SCRIPT, copy)
    for name in ("queue", "signal", "socket", "supervisor"):
        (copy.parent / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    shown = subprocess.run([sys.executable, "-IB", copy, "--help"], cwd=copy.parent, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--notice" in shown.stdout
