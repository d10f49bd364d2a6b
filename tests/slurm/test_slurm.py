"""The batch scripts in jobs of a real Slurm cluster: whole runs, and what happens when a rank or the job is lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import SUPPORT
from slurm_cluster import SLURM, Cluster, dev_cluster

from convneur.config import load_config
from convneur.records.listing import checkpoint_step, list_checkpoints
from convneur.records.metrics import read_metrics

pytestmark = pytest.mark.slurm

SMALL = {
    "model.variant": "n1",
    "model.num_classes": 10,
    "data.image_size": 32,
    "data.global_batch_size": 128,
    "data.lanes": 8,
    "data.workers": 1,
    "schedule.warmup_epochs": 0.2,
    "run.log_every_steps": 1,
}


@dataclass(frozen=True)
class Ended:
    """A job that has ended, or is queued again."""

    job: dict[str, str]
    log: str


# Whole runs. They go on at the same time, which is part of the test.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs of the whole runs are submitted from."""
    return tmp_path_factory.mktemp("submitted")


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, digits: Path, folder: Path) -> dict[str, Ended]:
    """Jobs of the unmodified slurm/train_m4.sh that share node n1 for a while.

    two-nodes: a rank on each of two nodes; one-node: two ranks on n1; warned: told to stop before Python is up.
    misspelt: an override that doesn't exist; astray: a dataset that doesn't.
    """
    script = SLURM / "train_m4.sh"
    small = [f"--{key}={value}" for key, value in SMALL.items()] + [f"--data.root={digits}"]

    def submit(name: str, options: str, *overrides: str) -> str:
        log = [] if name == "two-nodes" else [f"--output={name}.log"]
        words = [*log, *options.split(), script, *small, "--run.name", name, *overrides]
        return cluster.submit(*words, cwd=folder)

    numbers = {
        "warned": submit("warned", "-N1 -n1 --gpus-per-node=1", "--schedule.epochs", "4"),
        "two-nodes": submit("two-nodes", "-N2 --ntasks-per-node=1 --gpus-per-node=1", "--schedule.epochs", "1"),
        "one-node": submit("one-node", "-N1 -w n1 --gpus-per-node=2", "--schedule.epochs=1", "--optimizer.lr=2e-3"),
        "misspelt": submit("misspelt", "-N2 --gpus-per-node=1", "--optimiser.lr", "1e-3"),
        "astray": submit("astray", "-N2 --gpus-per-node=1", "--data.root", "nowhere"),
    }
    wait_for(folder / "warned.log", "slurm: job")
    cluster.run("scancel", "--batch", "--signal=USR2", numbers["warned"])
    ended = {name: cluster.wait(number) for name, number in numbers.items() if name != "warned"}
    ended["warned"] = cluster.wait(numbers["warned"], "PENDING", "COMPLETED", "FAILED")
    logs = {name: folder / f"{name}.log" for name in numbers}
    logs["two-nodes"] = folder / f"runs/slurm/m4-{numbers['two-nodes']}.out"
    return {name: Ended(ended[name], logs[name].read_text()) for name in numbers}


@pytest.mark.parametrize("name", ["two-nodes", "one-node"])
def test_run_goes_from_start_to_an_evaluated_checkpoint(jobs: dict[str, Ended], folder: Path, name: str) -> None:
    job, run = jobs[name].job, folder / "runs" / name
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), jobs[name].log
    assert jobs[name].log.count("n1: 0.67 M parameters, 2 x cpu, ") == 1
    summary = json.loads((run / "summary.json").read_text())
    scores = [record for record in read_metrics(run) if "eval/top1" in record]
    assert summary["top1"] == scores[-1]["eval/top1"] > 0.1
    assert summary["images"] == 11 * 128
    assert list_checkpoints(run / "checkpoints")[0].name == "step-00000011"
    assert load_config([run / "config.yaml"]).optimizer.lr == (2e-3 if name == "one-node" else 5e-4)


def test_jobs_that_share_a_node_meet_at_ports_of_their_own(jobs: dict[str, Ended]) -> None:
    first, second = jobs["two-nodes"].job, jobs["one-node"].job
    assert first["NodeList"] == "n[1-2]"
    assert second["NodeList"] == "n1"
    assert max(first["StartTime"], second["StartTime"]) < min(first["EndTime"], second["EndTime"])
    ports = [
        re.findall(r"attempt 1, MASTER_PORT=(\d+)", jobs[name].log) for name in ("two-nodes", "one-node", "warned")
    ]
    assert len({port for (port,) in ports}) == len(ports)


def test_log_is_under_runs_and_named_where_slurm_writes(jobs: dict[str, Ended], folder: Path) -> None:
    number = jobs["two-nodes"].job["JobId"]
    stub = (folder / f"slurm-{number}.out").read_text()
    assert stub == f"slurm: the log of this job is runs/slurm/m4-{number}.out\n"
    assert jobs["two-nodes"].log.count("GLOO_SOCKET_IFNAME=lo ") == 1
    assert jobs["two-nodes"].log.count("OMP_NUM_THREADS=1") == 1
    assert sorted(path.name for path in folder.glob("slurm-*.out")) == [f"slurm-{number}.out"]


def test_notice_before_python_is_up_is_not_lost(cluster: Cluster, jobs: dict[str, Ended], folder: Path) -> None:
    job, log = jobs["warned"].job, jobs["warned"].log
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), log
    assert "s; if --time is no longer than the notice of --signal, ask for more of it" in log
    noticed = log.index("USR2: the job is about to lose its nodes")
    # Of a job whose step can't be made at once, srun ends before the ranks are up.
    up = log.find("n1: 0.67 M parameters")
    assert noticed < up or "Cancelled pending step" in log, log
    step = re.findall(r"stopped by SIGUSR2 after (\d+) of 44 steps", log)[0] if up >= 0 else 0
    saved = [checkpoint_step(path) for path in list_checkpoints(folder / "runs" / "warned" / "checkpoints")[:1]]
    assert saved == ([int(step)] if int(step) else [])  # it may well come before the first batch

    cluster.hurry(job["JobId"])
    assert cluster.wait(job["JobId"])["JobState"] == "COMPLETED"
    appended = (folder / "warned.log").read_text().removeprefix(log)
    assert f"job {job['JobId']}, start 2, on n" in appended
    resumed = f"resuming from runs/warned/checkpoints/step-{int(step):08}, {step} of 44 steps made"
    assert (resumed in appended) == bool(saved)
    steps = [record["step"] for record in read_metrics(folder / "runs" / "warned") if "train/loss" in record]
    assert steps == list(range(1, 45))


@pytest.mark.parametrize(
    ("name", "line"), [("misspelt", "did you mean --optimizer.lr?"), ("astray", "error: nowhere does not exist")]
)
def test_bad_input_is_said_once_and_starts_no_ranks(jobs: dict[str, Ended], folder: Path, name: str, line: str) -> None:
    assert (jobs[name].job["JobState"], jobs[name].job["ExitCode"]) == ("FAILED", "2:0")
    assert jobs[name].job["Restarts"] == "0"
    assert jobs[name].log.count(line) == 1
    assert "srun" not in jobs[name].log
    assert not (folder / "runs" / name).exists()


def wait_for(log: Path, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, f"{log} has no {text!r}"
        time.sleep(0.1)


# Small programs in the place of `convneur`, started by the same scripts from a checkout of their own.

Submit = Callable[..., tuple[str, Path]]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """Submits train_m1.sh of a checkout whose site.sh names a Python program; the job's number and its log."""
    checkout = tmp_path / "a checkout"
    shutil.copytree(SLURM, checkout / "slurm")

    def submit(program: str, *options: str) -> tuple[str, Path]:
        shutil.copytree(SLURM.parent / "launch", checkout / "launch", dirs_exist_ok=True)
        plan = {"folder": str(tmp_path / "runs" / "a name"), "finished": False}
        head = f"import json, os, sys\nif '--check' in sys.argv: print({json.dumps(plan)!r}); sys.exit()\n"
        (checkout / "program.py").write_text(f"{head}run = {plan['folder']!r}\n{program}")
        with (checkout / "slurm" / "site.sh").open("a") as site:
            site.write(
                f"convneur=({sys.executable} -S '{checkout}/program.py')\npython={sys.executable}\n"
                f"data=/the/data\nruns='{tmp_path}/runs'\n"
            )
        script = checkout / "slurm" / "train_m1.sh"
        number = cluster.submit("--job-name=small", *options, script, "--run.name", "a name", cwd=tmp_path)
        return number, tmp_path / "runs" / "slurm" / f"small-{number}.out"

    return submit


def test_ranks_know_their_place(cluster: Cluster, submit: Submit) -> None:
    variables = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"]
    program = f"print('place', *[os.environ[name] for name in {variables}], sys.argv[1:])\n{FINISH}"
    number, log = submit(program, "-N2", "-n6")
    assert cluster.wait(number)["JobState"] == "COMPLETED", log.read_text()
    words = ["train", "--config", f"{log.parents[2]}/a checkout/configs/m1.yaml", "--launch", "env", "--resume", "auto"]
    words += ["--run.root", f"{log.parents[1]}", "--data.root", "/the/data", "--run.name", "a name"]
    gpus = "0,1,2,3,4,5,6,7"
    assert sorted(line for line in log.read_text().splitlines() if line.startswith("place")) == [
        f"place {rank} {rank % 3} 6 n{1 + rank // 3} 127.0.0.1 {gpus} {words}" for rank in range(6)
    ]


FINISH = "os.makedirs(run, exist_ok=True); open(f'{run}/summary.json', 'w').close()\n"
DIE = "os.kill(os.getpid(), 9)"


def attempts(log: Path, event: str) -> list[dict[str, Any]]:
    """The records of an event in the history of the run of `submit`."""
    lines = (log.parents[1] / "a name" / "attempts.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_a_rank_that_dies_takes_the_others_along_and_is_started_again(cluster: Cluster, submit: Submit) -> None:
    program = "import time\nfirst = '-0-1/' in os.environ['TORCHELASTIC_ERROR_FILE']\n"
    program += f"if os.environ['RANK'] == '1' and first: {DIE}\n"
    program += f"if first: time.sleep(600)\nif os.environ['RANK'] == '0':\n  {FINISH}"
    number, log = submit(program, "--nodes=2", "--ntasks-per-node=2")
    started = time.monotonic()
    assert cluster.wait(number)["JobState"] == "COMPLETED", log.read_text()
    assert time.monotonic() - started < 300  # the others would sleep for 600
    assert "attempt 1 of start 1 failed; rank 1 on n1 failed first: killed by SIGKILL" in log.read_text()
    first, second = attempts(log, "end")
    assert (first["outcome"], first["action"], first["rank"], first["node"]) == ("failed", "restart", 1, "n1")
    assert second["outcome"] == "finished"
    ports = re.findall(r"MASTER_PORT=(\d+)", log.read_text())
    assert len(set(ports)) == 2


def test_failures_without_a_new_checkpoint_end_the_job(cluster: Cluster, submit: Submit) -> None:
    number, log = submit("sys.exit(1)", "--nodes=2", "--ntasks-per-node=1")
    job = cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log.read_text()
    assert [record["action"] for record in attempts(log, "end")] == ["restart", "restart", "stop: no progress"]
    assert "3 failures in a row without a new checkpoint" in log.read_text()


def test_new_checkpoints_let_a_job_be_queued_again(cluster: Cluster, submit: Submit) -> None:
    program = "n = len(open(f'{run}/attempts.jsonl').readlines())\nos.makedirs(f'{run}/checkpoints/step-{n:08}')\n"
    program += "open(f'{run}/checkpoints/step-{n:08}/manifest.json', 'w').close()\nsys.exit(1)"
    number, log = submit(program, "--nodes=2", "--ntasks=2")
    wait_for(log, "queueing the job again")
    job = cluster.wait(number, "PENDING")
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), log.read_text()
    assert [record["action"] for record in attempts(log, "end")] == ["restart", "restart", "restart", "requeue"]
    cluster.run("scancel", number)


def test_bad_node_is_excluded_when_it_has_failed_twice(cluster: Cluster, submit: Submit) -> None:
    program = f"if os.environ['SLURMD_NODENAME'] == 'n1': {DIE}\n{FINISH}"
    number, log = submit(program, "--nodes=1", "--ntasks=1")  # Slurm takes the first node that is free
    wait_for(log, "queueing the job again")
    job = cluster.wait(number, "PENDING")
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), log.read_text()
    wait_until(lambda: cluster.job(number)["ExcNodeList"] == "n1")
    assert [record["action"] for record in attempts(log, "end")] == ["restart", "requeue"]
    assert attempts(log, "end")[-1]["excluded"] == "n1"
    cluster.run("scancel", number)


def test_bad_input_of_a_rank_and_a_finished_run_start_nothing_again(cluster: Cluster, submit: Submit) -> None:
    word = {"message": {"message": "InputError: no such setting"}}
    leave_word = f"open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write({json.dumps(word)!r})"
    program = f"if os.environ['RANK'] == '1': {leave_word}; sys.exit(2)\nimport time\ntime.sleep(600)"
    number, log = submit(program, "-N1", "-n2")
    job = cluster.wait(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log.read_text()
    assert [record["action"] for record in attempts(log, "end")] == ["stop: bad input"]
    # Ranks that abort after the summary has been written have finished nevertheless.
    number, log = submit(f"{FINISH}{DIE}", "-N1", "-n1")
    assert cluster.wait(number)["JobState"] == "COMPLETED", log.read_text()


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_notice_to_a_job_that_runs_queues_it_again(cluster: Cluster, submit: Submit, name: str) -> None:
    program = "import signal, time\nsignal.signal(signal.SIGUSR2, lambda *_: sys.exit())\nprint('up')\ntime.sleep(600)"
    number, log = submit(program, "-N2", "-n2")
    wait_for(log, "rank 0 is bound")
    cluster.run("scancel", "--batch", f"--signal={name}", number)
    job = cluster.wait(number, "PENDING", "FAILED", "COMPLETED")
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), log.read_text()
    assert [(r["outcome"], r["action"]) for r in attempts(log, "end")] == [("stopped", "requeue")]
    cluster.run("scancel", number)


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_cancelled_job_is_not_queued_again(cluster: Cluster, submit: Submit) -> None:
    number, log = submit("import time\ntime.sleep(600)", "--nodes=2", "--ntasks-per-node=1")
    wait_for(log, "srun")
    cluster.run("scancel", number)
    assert cluster.wait(number)["JobState"] == "CANCELLED"
    assert "queueing the job again" not in log.read_text()


def test_cancelled_task_of_an_array_is_not_queued_again(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    number, _ = submit("import time\ntime.sleep(600)", "--array=1-2", "--nodes=1", "--ntasks=1", "--requeue")
    for task in (1, 2):
        wait_for(tmp_path / f"slurm-{number}_{task}.out", "rank 0 is bound")
    cluster.run("scancel", f"{number}_2")  # its number is the array's, whose other task runs on
    job = cluster.wait(f"{number}_2")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "queueing the job again" not in (tmp_path / f"slurm-{number}_2.out").read_text()
    cluster.run("scancel", number)


@pytest.mark.parametrize("script", sorted(SLURM.glob("train_*.sh")), ids=lambda script: script.stem)
def test_slurm_takes_every_script(cluster: Cluster, script: Path) -> None:
    cluster.run("sbatch", "--test-only", "--nodes=2", script)


# The cluster itself.


def test_cluster_ends_only_what_it_has_started(cluster: Cluster) -> None:
    second = Cluster(cluster.folder.with_name(f"{cluster.folder.name}-second"))
    assert dev_cluster("up", "1", second.folder).returncode == 0
    bystander = subprocess.Popen(["sleep", "600"], env=os.environ | second.env)
    try:
        second.submit("--wrap=srun sleep 600", cwd=second.folder)
        assert dev_cluster("status", second.folder).stdout.split().count("n1") >= 1
        down = dev_cluster("down", second.folder)
        assert down.returncode == 0, down.stderr
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert not second.folder.exists()
    assert not processes_that_name(second.folder)
    assert dev_cluster("status", second.folder).returncode == 1
    assert dev_cluster("status", cluster.folder).returncode == 0


def test_cluster_that_is_up_stays_up(cluster: Cluster) -> None:
    before = processes_that_name(cluster.folder)
    again = dev_cluster("up", "2", cluster.folder)
    assert (again.returncode, "already up" in again.stdout) == (0, True)
    assert processes_that_name(cluster.folder) == before


def test_cluster_removes_no_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=ours\n")
    refused = dev_cluster("down", tmp_path)
    assert refused.returncode == 1
    assert "is not a folder of this script" in refused.stderr
    assert (tmp_path / "slurm.conf").exists()


def processes_that_name(folder: Path) -> set[str]:
    """Processes with a folder in their command lines."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if str(folder).encode() in (process / "cmdline").read_bytes():
                found.add(process.name)
    return found


def test_cluster_ends_with_who_holds_it_even_killed(cluster: Cluster) -> None:
    folder = cluster.folder.with_name(f"{cluster.folder.name}-held")
    program = f"import os, sys; sys.path.insert(0, {str(SUPPORT)!r})\n"
    program += "from pathlib import Path; from slurm_cluster import held_cluster\n"
    program += f"with held_cluster(1, Path({str(folder)!r})): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    wait_until(lambda: not folder.exists() and not processes_that_name(folder))
