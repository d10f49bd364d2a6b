"""kill -9 in every phase of a save, at random, and disks on which nothing more can be written."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
import torch
from forked import free_port, server
from kills import (
    PHASES,
    fill,
    train_alone,
    train_and_die,
    train_on_a_full_disk,
    train_rank,
    train_with_small_files,
)
from safetensors.torch import load_file
from small_run import STEPS, small_config

from convneur.config import Config
from convneur.records.listing import checkpoint_step, list_checkpoints
from convneur.records.log import TrainingLog
from convneur.records.manifest import newest_intact
from convneur.records.metrics import read_metrics
from convneur.system.world import World
from convneur.tasks.classification import ClassificationScores

KILLS = 200


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    return server()


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Its `root`, which nothing else uses here, is the file for what the processes say."""
    log = str(tmp_path_factory.mktemp("said") / "log")
    config = small_config(digits, 1, checkpoint_every_steps=1, keep_checkpoints=1, keep_best=False, root=log)
    return replace(config, data=replace(config.data, workers=0))


def start(processes: ForkServerContext, target: object, *words: object) -> int:
    """Runs a function in a process; returns its exit status, negative where a signal ended it."""
    process = processes.Process(target=target, args=words)
    process.start()
    process.join(200)
    assert process.exitcode is not None
    return process.exitcode


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[0]


def assert_same_end(first: Path, second: Path) -> None:
    for name in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        a, b = (load_file(newest(run) / f"{name}.safetensors") for run in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.fixture(scope="module")
def whole(processes: ForkServerContext, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(processes, train_alone, config, folder) == 0
    return folder


def test_killed_in_every_phase_of_a_save(
    processes: ForkServerContext, config: Config, world: World, whole: Path, tmp_path: Path
) -> None:
    """One run that is killed in one phase after the other and resumed; what is committed is never lost or half."""
    run, step = tmp_path / "run", 0
    for phase in PHASES:
        assert start(processes, train_and_die, config, run, phase) == -signal.SIGKILL, phase
        checkpoints = list_checkpoints(run / "checkpoints")
        step += phase in ("_publish: after", "_remove: in the middle")
        assert [checkpoint_step(path) for path in checkpoints][:1] == [step][:step], phase
        for path in checkpoints:
            assert newest_intact([path], world) == (path, []), phase
    assert start(processes, train_alone, config, run) == 0
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == [f"step-{STEPS:08d}"]
    assert_same_end(whole, run)


@pytest.mark.slow
def test_two_hundred_random_kills(processes: ForkServerContext, config: Config, world: World, tmp_path: Path) -> None:
    """No checkpoint that was whole is ever lost."""
    run, draw, last = tmp_path / "run", random.Random(0), 0
    endless = replace(config, schedule=replace(config.schedule, epochs=1000))
    for _ in range(KILLS):
        process = processes.Process(target=train_alone, args=(endless, run))
        process.start()
        while not any(checkpoint_step(path) > last for path in list_checkpoints(run / "checkpoints")):
            assert process.is_alive(), Path(config.run.root).read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))  # a step and its save take about as long
        process.kill()
        process.join()
        for path in list_checkpoints(run / "checkpoints"):
            assert newest_intact([path], world) == (path, [])
        step = checkpoint_step(newest(run))
        assert step > last
        last = step


def two_ranks(processes: ForkServerContext, config: Config, run: Path, resume: str = "auto") -> list[ForkServerProcess]:
    port = free_port()
    ranks = [processes.Process(target=train_rank, args=(config, run, rank, 2, port, resume)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def wait_for_a_step(run: Path, ranks: list[ForkServerProcess], before: os.stat_result | None) -> None:
    """Until a start, which writes its metrics to a new file, has added a line to it."""
    file = run / "metrics.jsonl"
    while not file.exists() or (before and file.stat().st_ino == before.st_ino):
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.01)
    size = file.stat().st_size
    while file.stat().st_size == size:
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("stage", range(4))
def test_random_kills_of_two_ranks_change_no_bit(
    processes: ForkServerContext, config: Config, tmp_path: Path, stage: int, autocast: bool
) -> None:
    """Both at once, or one before the other, or while one of them is stopped; at any moment, saves included."""
    digits, log = Path(config.data.root), config.run.root
    small = small_config(digits, stage, autocast=autocast, checkpoint_every_steps=1, keep_checkpoints=2, root=log)
    small = replace(small, data=config.data, schedule=replace(config.schedule, epochs=4))
    whole, run, draw = tmp_path / "whole", tmp_path / "run", random.Random(stage)
    for rank in two_ranks(processes, small, whole):
        rank.join()
    for _ in range(12):
        before = (run / "metrics.jsonl").stat() if run.exists() else None
        ranks = two_ranks(processes, small, run)
        wait_for_a_step(run, ranks, before)
        time.sleep(draw.uniform(0, 1))
        first, kind = ranks[draw.randrange(2)], draw.randrange(3)
        if kind:
            os.kill(first.pid or 0, signal.SIGKILL if kind == 1 else signal.SIGSTOP)
            time.sleep(draw.uniform(0, 0.5))
        for rank in ranks:
            rank.kill()
            rank.join()
        if (run / "summary.json").exists():
            break
    ranks = two_ranks(processes, small, run)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0], Path(log).read_text()[-3000:]
    assert_same_end(whole, run)
    losses = [[record.get("train/loss") for record in read_metrics(folder)] for folder in (whole, run)]
    assert losses[0] == losses[1]


def test_what_rank_0_can_t_do_by_itself_ends_both_ranks_alike(
    processes: ForkServerContext, config: Config, tmp_path: Path
) -> None:
    """Metrics that can't be read are rank 0's business alone, and the other would wait for it in the first step."""
    log, run = tmp_path / "log", tmp_path / "run"
    (run / "metrics.jsonl").mkdir(parents=True)
    ranks = two_ranks(processes, replace(config, run=replace(config.run, root=str(log))), run, resume="never")
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert log.read_text().count(f"DamagedError: {run}/metrics.jsonl: can't be read (Is a directory)\n") == 2


def test_a_full_disk_does_not_end_a_run(
    processes: ForkServerContext, config: Config, world: World, whole: Path, small_disk: Path
) -> None:
    """No checkpoint can be written, yet it trains; given room again, it goes on."""
    run = small_disk / "run"
    every_4 = replace(config, run=replace(config.run, checkpoint_every_steps=4))
    assert start(processes, train_and_die, every_4, run, "_publish: after") == -signal.SIGKILL
    assert start(processes, train_on_a_full_disk, every_4, run) == 1  # the last checkpoint can't be written either
    log = Path(config.run.root).read_text()
    assert "ALARM: after 8 steps " in log
    assert "No space left on device" in log
    assert f"epoch 1.00  step {STEPS}/{STEPS}" in log
    assert newest_intact(list_checkpoints(run / "checkpoints"), world) == (run / "checkpoints" / "step-00000004", [])
    (small_disk / "ballast").unlink()
    assert start(processes, train_alone, every_4, run) == 0
    assert_same_end(whole, run)


def test_a_run_that_finds_no_room_to_start_says_so_in_a_line(digits: Path, small_disk: Path) -> None:
    fill(small_disk)
    words = ["--data.root", digits, "--model.num_classes", "10", "--run.root", small_disk, "--run.name", "run"]
    command = [sys.executable, "-m", "convneur.launch", "train", *map(str, words)]
    env = {name: value for name, value in os.environ.items() if name != "RANK"}  # no rank of the tests' own world
    result = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=200)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "convneur: error: No space left on device"
    assert "Traceback" not in result.stderr
    assert not (small_disk / "run").exists()


def test_metrics_that_find_no_room(small_disk: Path, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither lines nor TensorBoard's events, which a thread writes later on, end a run."""
    settings = {"start_step": 0, "total_steps": 400, "steps_per_epoch": 400, "images_per_step": 1, "every_steps": 1}
    log = TrainingLog(small_disk, world, **settings)
    fill(small_disk)
    for step in range(400):
        log.scores(step + 1, ClassificationScores(0.5, 0.9, 1.0, 360), None, {})
    log.close()
    assert "ALARM: metrics can't be written ([Errno 28] No space left on device)" in capsys.readouterr().out


def test_files_that_can_t_grow_do_not_end_a_run(
    processes: ForkServerContext, config: Config, world: World, tmp_path: Path
) -> None:
    """The same for whoever may mount nothing: weights don't fit, metrics do."""
    run = tmp_path / "run"
    twice = replace(config, run=replace(config.run, checkpoint_every_steps=4))
    assert start(processes, train_and_die, twice, run, "_publish: after") == -signal.SIGKILL
    assert start(processes, train_with_small_files, twice, run, 1 << 20) == 1  # the last checkpoint can't be written
    log = Path(config.run.root).read_text()
    assert "ALARM: after 8 steps writing the checkpoint failed on rank 0: " in log
    assert [record["step"] for record in read_metrics(run)][-1] == STEPS
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["step-00000004"]
    assert newest_intact([newest(run)], world) == (newest(run), [])
