"""Faults in whole runs on a Slurm cluster: each ends with the same weights as a run that nothing happened to."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from slurm_cluster import SLURM, Cluster

from convneur.checkpoint import list_checkpoints
from convneur.metrics import read_metrics
from convneur.watchdog import EXIT_STATUS

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 22
SMALL = {
    "model.variant": "n1",
    "model.num_classes": 10,
    "data.image_size": 32,
    "data.global_batch_size": 128,
    "data.lanes": 8,
    "data.workers": 1,
    "schedule.epochs": 2,
    "schedule.warmup_epochs": 0.2,
    "run.log_every_steps": 1,
    "run.checkpoint_every_steps": 3,
    "run.eval_every_epochs": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


Start = Callable[..., str]


@pytest.fixture(scope="module")
def start(cluster: Cluster, digits: Path, folder: Path) -> Start:
    """Submits the unmodified train_m4.sh, one rank on each of two nodes, under a name; the job's number."""

    def start(name: str, *overrides: str, nodes: int = 2) -> str:
        options = [f"-N{nodes}", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2"]
        words = [f"--{key}={value}" for key, value in SMALL.items()] + [f"--data.root={digits}", f"--run.name={name}"]
        words = [f"--output={name}.log", *options, SLURM / "train_m4.sh", *words, *overrides]
        return cluster.submit(*words, cwd=folder)

    return start


@pytest.fixture(scope="module")
def weights(cluster: Cluster, start: Start, folder: Path) -> dict[str, Any]:
    """Those that an uninterrupted run ends with."""
    number = start("whole")
    assert cluster.wait(number)["JobState"] == "COMPLETED", (folder / "whole.log").read_text()
    return final_weights(folder / "runs" / "whole")


def final_weights(run: Path) -> dict[str, Any]:
    checkpoint = list_checkpoints(run / "checkpoints")[0]
    assert checkpoint.name == f"step-{STEPS:08}"
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer" / "exp_avg.safetensors")


def check(cluster: Cluster, number: str, run: Path, weights: dict[str, Any]) -> list[dict[str, Any]]:
    """Waits for the end of a job that must equal the uninterrupted run; its history."""
    assert cluster.wait(number, timeout=400)["JobState"] == "COMPLETED", run.parents[1].joinpath(f"{run.name}.log")
    found = final_weights(run)
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)
    assert [r["step"] for r in read_metrics(run) if "train/loss" in r] == list(range(1, STEPS + 1))
    history = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [record for record in history if record["event"] == "end"]


def wait_for_step(run: Path, step: int) -> None:
    wait_until(lambda: any(record["step"] >= step for record in read_metrics(run)))


def wait_until(holds: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rank_process(number: str, rank: int) -> int:
    """The process of a rank of a job: the one that rank.sh has started, not its workers."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = (process / "environ").read_bytes().split(b"\0")
            if f"SLURM_JOB_ID={number}".encode() in environ and f"RANK={rank}".encode() in environ:
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if b"rank.sh" in Path(f"/proc/{parent}/cmdline").read_bytes():
                    return int(process.name)
    raise AssertionError(f"job {number} has no rank {rank}")


def test_killed_rank(cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path) -> None:
    number, run = start("killed"), folder / "runs" / "killed"
    wait_for_step(run, 5)
    os.kill(rank_process(number, 1), signal.SIGKILL)
    first, second = check(cluster, number, run, weights)
    assert (first["rank"], first["node"], first["action"]) == (1, "n2", "restart")
    assert "SIGKILL" in first["reason"]
    assert second["outcome"] == "finished"


def test_rank_killed_during_a_save(cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path) -> None:
    number, run = start("unsaved"), folder / "runs" / "unsaved"
    wait_for_step(run, 4)
    process = rank_process(number, 0)
    wait_until(lambda: list((run / "checkpoints").glob("tmp-*")))
    os.kill(process, signal.SIGKILL)
    assert check(cluster, number, run, weights)[0]["action"] == "restart"


def test_stopped_rank(cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path) -> None:
    number, run = start("hung", "--watchdog.seconds=25"), folder / "runs" / "hung"
    wait_for_step(run, 5)
    os.kill(rank_process(number, 1), signal.SIGSTOP)
    first, _ = check(cluster, number, run, weights)
    # 1 is faulthandler's own status: gloo's collectives may let no other Python thread run.
    assert first["rank"] == 0
    assert first["status"] in (1, EXIT_STATUS)
    assert first["action"] == "restart"
    assert "convneur/train.py" in (folder / "hung.log").read_text()


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_notice_to_the_ranks_alone(
    cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path, name: str
) -> None:
    number, run = start(name), folder / "runs" / name
    wait_for_step(run, 5)
    cluster.run("scancel", f"--signal={name}", number)
    wait_until(lambda: cluster.job(number)["Restarts"] == "1")
    cluster.wait(number, "PENDING")
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    first = check(cluster, number, run, weights)[0]
    assert (first["outcome"], first["action"]) == ("stopped", "requeue")


def test_one_node_goes_on_with_what_two_have_started(
    cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path
) -> None:
    number, run = start("fewer"), folder / "runs" / "fewer"
    wait_for_step(run, 7)
    cluster.run("scancel", number)
    assert cluster.wait(number)["JobState"] == "CANCELLED"
    number = start("fewer", nodes=1)
    assert cluster.wait(number)["JobState"] == "COMPLETED", (folder / "fewer.log").read_text()
    for name, weight in final_weights(run).items():
        assert (weight - weights[name]).norm() <= 0.05 * weights[name].norm() + 1e-3, name


def test_lost_node(cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path) -> None:
    number, run = start("lost"), folder / "runs" / "lost"
    wait_for_step(run, 5)
    os.kill(int((cluster.folder / "n2.pid").read_text()), signal.SIGKILL)
    os.kill(rank_process(number, 1), signal.SIGSTOP)  # a lost node's ranks don't close their connections
    wait_until(lambda: cluster.job(number)["Restarts"] == "1")
    cluster.wait(number, "PENDING")
    conf = cluster.folder / "slurm.conf"
    subprocess.run(["/usr/sbin/slurmd", "-f", conf, "-N", "n2"], env=cluster.env, check=True, timeout=30)
    wait_until(lambda: "DOWN" not in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T").upper())
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    check(cluster, number, run, weights)
