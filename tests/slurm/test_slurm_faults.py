"""Faults in whole runs on a Slurm cluster: each ends with the same weights as a run that nothing happened to."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kills import fill
from safetensors.torch import load_file
from slurm_cluster import ENDED, SLURM, Cluster

from convneur.monitoring.watchdog import EXIT_STATUS
from convneur.records.listing import list_checkpoints
from convneur.records.metrics import read_metrics

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
    raise LookupError(f"job {number} has no rank {rank}")


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
    cluster.hurry(number)
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


def test_full_disk(cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path, small_disk: Path) -> None:
    number, run, log = start("full", f"--run.root={small_disk}"), small_disk / "full", folder / "full.log"
    wait_for_step(run, 5)
    fill(small_disk)
    wait_until(lambda: "ALARM: after 22 steps writing the checkpoint failed on rank 0: " in log.read_text())
    (small_disk / "ballast").unlink()
    assert cluster.wait(number, timeout=400)["JobState"] == "COMPLETED", log.read_text()
    found = final_weights(run)
    assert all(found[name].equal(weights[name]) for name in weights)


def test_lost_node(cluster: Cluster, start: Start, weights: dict[str, Any], folder: Path) -> None:
    number, run = start("lost"), folder / "runs" / "lost"
    wait_for_step(run, 5)
    process = rank_process(number, 1)
    os.kill(int((cluster.folder / "n2.pid").read_text()), signal.SIGKILL)
    os.kill(process, signal.SIGSTOP)  # a lost node's ranks don't close their connections
    wait_until(lambda: cluster.job(number)["Restarts"] == "1")
    cluster.wait(number, "PENDING")
    bring_back_n2(cluster, process)
    cluster.hurry(number)
    check(cluster, number, run, weights)


def bring_back_n2(cluster: Cluster, process: int) -> None:
    """Starts the node anew and waits until nothing of the time before is left there.

    A job that is hurried back to the node before that finds it busy for ever. Slurm's own two minutes avoid it.
    """
    conf = cluster.folder / "slurm.conf"
    subprocess.run(["/usr/sbin/slurmd", "-f", conf, "-N", "n2"], env=cluster.env, check=True, timeout=30)
    wait_until(lambda: "DOWN" not in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T").upper())
    wait_until(lambda: not Path(f"/proc/{process}").exists())


# Twenty faults of random kinds, at random times, in one run.

SOAK = (
    "--schedule.epochs=30",
    "--run.eval_every_epochs=30",
    "--watchdog.seconds=60",
    "--watchdog.long_seconds=120",  # a rank that is stopped while it saves
)
SOAK_STEPS = 330
FAULTS = 20


@dataclass
class Soak:
    """A run that bad luck follows; each method is a fault, which may hit nobody where no ranks run."""

    cluster: Cluster
    start: Start
    run: Path
    draw: random.Random
    number: str

    def killed(self) -> None:
        os.kill(self.some_rank(), signal.SIGKILL)

    def killed_in_a_save(self) -> None:
        process = self.some_rank()
        wait_until(lambda: list((self.run / "checkpoints").glob("tmp-*")) or not Path(f"/proc/{process}").exists())
        os.kill(process, signal.SIGKILL)

    def stopped(self) -> None:
        os.kill(self.some_rank(), signal.SIGSTOP)

    def noticed(self) -> None:
        self.cluster.run("scancel", "--batch", f"--signal={self.draw.choice(['USR2', 'TERM'])}", self.number)

    def ranks_noticed(self) -> None:
        self.cluster.run("scancel", f"--signal={self.draw.choice(['USR2', 'TERM'])}", self.number)

    def requeued(self) -> None:
        with suppress(subprocess.CalledProcessError):  # Slurm is queueing it again already
            self.cluster.run("scontrol", "requeue", self.number)

    def cancelled_and_submitted_again(self) -> None:
        self.cluster.run("scancel", self.number)
        self.cluster.wait(self.number)
        self.number = self.start(self.run.name, *SOAK)

    def damaged(self) -> None:
        if len(list_checkpoints(self.run / "checkpoints")) < 2:
            raise LookupError("a run whose only checkpoint is damaged ends, and says so")
        process = rank_process(self.number, 0)
        os.kill(process, signal.SIGSTOP)  # or it would save another one meanwhile
        weights = list_checkpoints(self.run / "checkpoints")[0] / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[self.draw.randrange(len(data))] ^= 1
        weights.write_bytes(data)
        os.kill(process, signal.SIGKILL)

    def node_lost(self) -> None:
        process, restarts = rank_process(self.number, 1), self.cluster.job(self.number)["Restarts"]
        os.kill(int((self.cluster.folder / "n2.pid").read_text()), signal.SIGKILL)
        os.kill(process, signal.SIGSTOP)
        wait_until(lambda: self.cluster.job(self.number)["Restarts"] != restarts)
        bring_back_n2(self.cluster, process)

    def some_rank(self) -> int:
        return rank_process(self.number, self.draw.randrange(2))

    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.run)), default=0)

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has come that far; its job need not wait in the queue for two minutes."""
        deadline = time.monotonic() + 600
        while self.step() < step:
            job = self.cluster.job(self.number)
            assert job["JobState"] not in ENDED, job
            assert time.monotonic() < deadline, job
            if job["JobState"] == "PENDING":
                self.cluster.hurry(self.number)
            time.sleep(0.2)


KINDS = [
    Soak.killed,
    Soak.killed_in_a_save,
    Soak.stopped,
    Soak.noticed,
    Soak.ranks_noticed,
    Soak.requeued,
    Soak.cancelled_and_submitted_again,
    Soak.damaged,
    Soak.node_lost,
]


def test_twenty_faults(cluster: Cluster, start: Start, folder: Path) -> None:
    whole = start("soak-whole", *SOAK)
    assert cluster.wait(whole, timeout=1200)["JobState"] == "COMPLETED", (folder / "soak-whole.log").read_text()
    seed = int(os.environ.get("SOAK_SEED", "0"))
    soak = Soak(cluster, start, folder / "runs" / "soak", random.Random(seed), start("soak", *SOAK))
    kinds = [*KINDS, *soak.draw.choices(KINDS, k=FAULTS - len(KINDS))]
    soak.draw.shuffle(kinds)
    for kind in kinds:
        soak.wait_for_step(min(soak.step() + soak.draw.randint(1, 7), SOAK_STEPS - 3))
        time.sleep(soak.draw.random())
        print(f"{time.strftime('%X')} {kind.__name__} after step {soak.step()}", flush=True)
        # Nobody there to be hit; or Slurm's commands wait for the node that has just been lost.
        with suppress(LookupError, ProcessLookupError, subprocess.TimeoutExpired):
            kind(soak)
    soak.wait_for_step(SOAK_STEPS)
    assert cluster.wait(soak.number)["JobState"] == "COMPLETED", (folder / "soak.log").read_text()
    interrupted, uninterrupted = soak.run, folder / "runs" / "soak-whole"
    for name in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        first, second = (
            load_file(list_checkpoints(run / "checkpoints")[0] / f"{name}.safetensors")
            for run in (interrupted, uninterrupted)
        )
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first), name
    # A step's loss tells its samples: no other batch has it to the bit.
    losses, expected = (
        [(record["step"], record["train/loss"]) for record in read_metrics(run) if "train/loss" in record]
        for run in (interrupted, uninterrupted)
    )
    assert losses == expected
    assert [step for step, _ in losses] == list(range(1, SOAK_STEPS + 1))
