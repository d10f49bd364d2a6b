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
from compared_runs import ENV, assert_same_files, newest
from forked import run_ranks
from places import RANKS, SUPPORT
from resave import resave
from safetensors.torch import load_file
from small_run import BATCH, STEPS, small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convneur.config import save_config
from convneur.records.listing import list_checkpoints
from convneur.records.metrics import read_metrics
from convneur.system.world import World
from convneur.train import train

TRAINED = ["zero0-bf16-whole", "zero1-bf16-whole", "zero2-fp32-whole", "zero3-bf16-whole"]
ACROSS_STAGES = [(0, 1), (1, 0), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2), (0, 3), (3, 0)]
RUNS = ["zero0-bf16", "zero1-bf16", "zero2-fp32", "zero3-bf16", "zero3-fp32", "zero1-mup"]


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_ranks(RANKS / "zero_stages.py", digits, out)
    return out


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


@pytest.mark.slow
def test_the_other_stages_and_precisions_resume_to_the_bit(digits: Path, tmp_path: Path) -> None:
    run_ranks(RANKS / "zero_stages.py", digits, tmp_path, "rest")
    others = "zero0-fp32", "zero1-fp32", "zero2-bf16", "zero1-own", "zero2-own", "zero3-own"
    for name in (*others, "zero0-mup", "zero2-mup", "zero3-mup"):
        test_stopped_and_resumed_equals_uninterrupted(tmp_path, name)


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
    assert 0 < distance(a, b) < tolerance


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Between two sets of weights, relative to the length of the first."""
    total = torch.cat([a[key].flatten() for key in a]).norm()
    return float(torch.cat([(a[key] - b[key]).flatten() for key in a]).norm() / total)


@pytest.fixture(scope="module")
def converted(runs: Path, digits: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks loaded and saved by one, and those and others by two, under every ZeRO stage."""
    out = tmp_path_factory.mktemp("converted")
    for stage in range(4):
        config = small_config(digits, stage)
        resave(config, world, newest(runs / TRAINED[stage]), out / f"one-{stage}")
    words: list[object] = []
    for source, target in ACROSS_STAGES:
        words += [newest(runs / TRAINED[source]), target, out / f"{source}-{target}"]
    for stage in range(4):
        words += [list_checkpoints(out / f"one-{stage}")[0], 3 - stage, out / f"two-{stage}"]
    run_ranks(SUPPORT / "resave.py", digits, *words)
    return out


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("step", ["one", "two"])
def test_other_world_sizes_change_no_bit(runs: Path, converted: Path, stage: int, step: str) -> None:
    """From two ranks to one under the same stage, and from there to two under another."""
    assert_same_files(newest(runs / TRAINED[stage]), list_checkpoints(converted / f"{step}-{stage}")[0])


@pytest.mark.parametrize(("source", "target"), ACROSS_STAGES)
def test_other_zero_stages_change_no_bit(runs: Path, converted: Path, source: int, target: int) -> None:
    assert_same_files(newest(runs / TRAINED[source]), list_checkpoints(converted / f"{source}-{target}")[0])


def test_a_run_goes_on_with_other_ranks_and_another_stage(
    runs: Path, digits: Path, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one rank under ZeRO 3 what two began under ZeRO 1: it ends near where those two end. Drop path differs."""
    whole = runs / "zero1-bf16-whole"
    begun = list_checkpoints(whole / "checkpoints")[-1]
    train(small_config(digits, 3, accumulation=4), world, tmp_path / "other", resume=str(begun))
    said = capfd.readouterr().out
    assert "resuming 2 x ZeRO 1, 2 micro-batches as 1 x ZeRO 3, 4 micro-batches: " in said
    a, b = (load_file(newest(run) / "model.safetensors") for run in (whole, tmp_path / "other"))
    assert 0 < distance(a, b) < 3e-2
    start = load_file(begun / "model.safetensors")
    assert distance(a, start) > 2 * distance(a, b)


def test_the_run_learns(runs: Path) -> None:
    summary = json.loads((runs / "zero1-bf16-whole" / "summary.json").read_text())
    assert summary["top1"] > 0.3  # chance is 0.1


def test_a_run_folder_holds_it_all(runs: Path) -> None:
    run = runs / "zero1-bf16-stopped"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["images"] == STEPS * BATCH
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
        deadline = time.monotonic() + 1200
        while not list_checkpoints(run / "checkpoints"):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        kill_tree(process)
    assert not (run / "summary.json").exists()
    assert list_checkpoints(run / "checkpoints")[0].name < f"step-{STEPS:08d}"

    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=1200)
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
        deadline = time.monotonic() + 1200
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
