"""Signals that come while a run evaluates, or waits for data, lead to a checkpoint and cost nothing."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import BATCH, small_config

from convneur.config import Config
from convneur.data.errors import WorkerError
from convneur.data.stream.batch import Batch, EvalBatch
from convneur.data.stream.eval import EvalLoader
from convneur.data.stream.train import TrainLoader
from convneur.records.listing import list_checkpoints
from convneur.records.metrics import read_metrics
from convneur.system.world import World
from convneur.train import train


@pytest.fixture
def config(digits: Path) -> Config:
    """Two epochs of two steps, with an evaluation after each."""
    config = small_config(digits, 1, checkpoint_every_steps=100, eval_every_epochs=1)
    data = replace(config.data, workers=0, subset=2 * BATCH, eval_batch_size=64)
    return replace(config, data=data, schedule=replace(config.schedule, epochs=2))


def assert_same_end(first: Path, second: Path) -> None:
    for name in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
        a, b = (load_file(list_checkpoints(run / "checkpoints")[0] / f"{name}.safetensors") for run in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    kept = [
        [(r["step"], r.get("train/loss"), r.get("eval/top1"), r.get("eval/loss")) for r in read_metrics(run)]
        for run in (first, second)
    ]
    assert kept[0] == kept[1]


def test_a_signal_in_an_evaluation_or_a_wait(
    config: Config, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its first evaluation, in its second, and while it waits for data that don't come."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(config, world, whole)
    evaluated, given = 0, EvalLoader.__iter__

    def interrupting(self: EvalLoader) -> Iterator[EvalBatch]:
        nonlocal evaluated
        for batch in given(self):
            evaluated += 1
            if evaluated == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(EvalLoader, "__iter__", interrupting)
    assert train(config, world, run) is None
    assert 2 <= evaluated <= 4  # of 12: 6 batches, of raw and averaged weights
    assert "stopped by SIGTERM after 2 of 4 steps; --resume auto goes on\n" in capfd.readouterr().out
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002"]

    iterate = TrainLoader.iterate

    def waiting(self: TrainLoader, start: int, stop: int) -> Iterator[list[Batch]]:
        yield next(iterate(self, start, stop))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(600)

    evaluated = 100
    usr2 = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGUSR2))
    monkeypatch.setattr(TrainLoader, "iterate", waiting)
    assert train(config, world, run, "auto") is None
    monkeypatch.setattr(TrainLoader, "iterate", iterate)
    signal.signal(signal.SIGALRM, usr2)
    assert "stopped by SIGUSR2 after 3 of 4 steps; --resume auto goes on\n" in capfd.readouterr().out
    assert list_checkpoints(run / "checkpoints")[0].name == "step-00000003"

    evaluated = 0
    assert train(config, world, run, "auto") is None
    said = capfd.readouterr().out
    assert "stopped by SIGTERM after 4 of 4 steps; --resume auto goes on\n" in said
    evaluated = 100
    assert train(config, world, run, "auto")
    assert_same_end(whole, run)


def test_a_run_saves_where_a_decoding_process_was_killed(
    config: Config, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = TrainLoader.iterate

    def broken(self: TrainLoader, start: int, stop: int) -> Iterator[list[Batch]]:
        yield next(iterate(self, start, stop))
        raise WorkerError

    monkeypatch.setattr(TrainLoader, "iterate", broken)
    with pytest.raises(WorkerError):
        train(config, world, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
