"""Whole runs in two processes: every ZeRO stage, stopping and resuming, kill -9, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import STEPS, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convneur.checkpoint import list_checkpoints
from convneur.config import save_config
from convneur.metrics import read_metrics

RUNS = ["zero0-bf16", "zero1-bf16", "zero2-fp32", "zero3-bf16", "zero3-fp32"]
TESTS = Path(__file__).parent
PATHS = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(TESTS / "ranks" / "zero_stages.py"), str(digits), str(out)]
    result = subprocess.run(torchrun + script, env=ENV, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return out


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[0]


def assert_same_files(first: Path, second: Path) -> None:
    """Weights, averages and every tensor of DeepSpeed's files, optimizer state among them, are equal to the bit."""
    for name in ("model.safetensors", "ema.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    states = sorted(p.name for p in (first / "deepspeed").glob("*.pt"))
    assert states == sorted(p.name for p in (second / "deepspeed").glob("*.pt"))
    compared = 0
    for name in states:
        a, b = (torch.load(run / "deepspeed" / name, weights_only=False) for run in (first, second))
        compared += assert_same_tensors(a, b, name)
    assert compared > 100


def assert_same_tensors(a: object, b: object, where: str) -> int:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
        return 1
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return sum(assert_same_tensors(a[key], b[key], f"{where}.{key}") for key in a)
    if isinstance(a, list | tuple):
        assert len(a) == len(b), where
        return sum(assert_same_tensors(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    return 0


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_equals_uninterrupted(runs: Path, name: str) -> None:
    whole, stopped = runs / f"{name}-whole", runs / f"{name}-stopped"
    assert_same_files(newest(whole), newest(stopped))
    losses = [[r["train/loss"] for r in read_metrics(run) if "train/loss" in r] for run in (whole, stopped)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, stopped)]
    assert summaries[0]["top1"] == summaries[1]["top1"]
    assert summaries[0]["top1_ema"] == summaries[1]["top1_ema"]


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [
        ("zero2-fp32", "zero3-fp32", 1e-5),
        ("zero0-bf16", "zero1-bf16", 3e-2),
        ("zero0-bf16", "zero3-bf16", 3e-2),
    ],
)
def test_zero_stages_agree(runs: Path, first: str, second: str, tolerance: float) -> None:
    """They compute the same thing; sums in another order, or of bf16 gradients, differ in the last digits."""
    a, b = (load_file(newest(runs / f"{name}-whole") / "model.safetensors") for name in (first, second))
    difference = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
    total = torch.cat([a[key].flatten() for key in a]).norm()
    assert 0 < difference / total < tolerance


def test_the_run_learns(runs: Path) -> None:
    summary = json.loads((runs / "zero1-bf16-whole" / "summary.json").read_text())
    assert summary["top1"] > 0.3  # chance is 0.1


def test_a_run_folder_holds_it_all(runs: Path) -> None:
    run = runs / "zero1-bf16-stopped"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] == STEPS * 128
    assert summary["epochs"] == 1
    assert Path(summary["checkpoint"]) == newest(run)
    assert newest(run).name == f"step-{STEPS:08d}"
    assert (run / "checkpoints" / "LATEST").read_text().strip() == newest(run).name
    assert (run / "config.yaml").is_file()
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert events.Scalars("eval/top1")[0].value == pytest.approx(summary["top1"])


def test_killed_and_resumed_equals_uninterrupted(runs: Path, digits: Path, tmp_path: Path) -> None:
    """kill -9 of every process at once, through the command line, as soon as a checkpoint is there."""
    config = small_config(digits, 1, accumulation=2, root=str(tmp_path / "runs"))
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-P", "-m", "convneur.launch", "train", "--config", str(tmp_path / "config.yaml")]
    command += ["--launch", "local", "--nproc", "2", "--resume", "auto"]
    run = tmp_path / "runs" / "small"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=ENV, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list_checkpoints(run / "checkpoints"):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kill_tree(process)
    assert not (run / "summary.json").exists()
    assert list_checkpoints(run / "checkpoints")[0].name < f"step-{STEPS:08d}"

    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resuming from" in result.stdout
    assert_same_files(newest(runs / "zero1-bf16-whole"), newest(run))


def test_term_saves_a_checkpoint_of_the_last_step(digits: Path, tmp_path: Path) -> None:
    config = small_config(digits, 1, root=str(tmp_path / "runs"), checkpoint_every_steps=100)
    save_config(config, tmp_path / "config.yaml")
    run = tmp_path / "runs" / "small"
    command = [sys.executable, "-P", "-m", "convneur.launch", "train", "--config", str(tmp_path / "config.yaml")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--nproc", "2"], env=ENV, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not read_metrics(run):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        process.wait(60)
    steps = [record["step"] for record in read_metrics(run)]
    assert 0 < steps[-1] < STEPS
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == [f"step-{steps[-1]:08d}"]
    assert f"stopped by SIGTERM after {steps[-1]} of {STEPS} steps" in (tmp_path / "log").read_text()
    assert not (run / "summary.json").exists()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all below it; torchrun gives its workers sessions of their own."""
    below = [process.pid]
    for pid in below:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        below += [int(child) for child in children.read_text().split()] if children.exists() else []
    for pid in below:
        os.kill(pid, signal.SIGKILL)
    process.wait()
