"""Run in ranks: two ranks, of which the second fails in one way after the other.

Usage: faults.py DIGITS OUT
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from small_run import BATCH, small_config
from torch import Tensor

from convneur import train
from convneur.config import Config
from convneur.data.keys import key, seed_libraries
from convneur.data.stream.train import TrainLoader
from convneur.engine.engine import Engine
from convneur.engine.state import gather, gather_scalars, moment_names
from convneur.errors import TrainingError
from convneur.monitoring.config import GuardConfig
from convneur.monitoring.guards import Guards
from convneur.records import checkpoint
from convneur.run.build import started_run
from convneur.system.world import World
from convneur.tasks import classification

Play = Callable[[Config, World, Path], None]


def main() -> None:
    digits, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = World.join()
    scenes: dict[str, tuple[Play, int]] = {f"skip-{stage}": (skip, stage) for stage in range(4)}
    scenes |= {"back": (go_back, 1), "flip": (flip, 0), "slow": (be_slow, 1), "disk": (fail_to_write, 1)}
    scenes["none"] = make_no_step, 1
    for name, (play, stage) in scenes.items():
        config = small_config(digits, stage, accumulation=2)
        config = replace(config, data=replace(config.data, workers=0))
        with (out / f"{name}.{world.rank}.txt").open("w") as file, redirect_stdout(file):
            try:
                play(config, world, out / name)
            except TrainingError as error:
                print(f"{type(error).__name__}: {error}")
    world.leave()


def poison(steps: set[int], world: World) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that is NaN on rank 1 in the first micro-batch of some steps."""
    calls = iter(range(10**6))
    real = CROSS_ENTROPY

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        step, micro_batch = divmod(next(calls), 2)
        bad = world.rank == 1 and micro_batch == 0 and step in steps
        return real(logits, targets) * (float("nan") if bad else 1.0)

    return loss


CROSS_ENTROPY = classification.cross_entropy


def skip(config: Config, world: World, folder: Path) -> None:
    """The third of four steps is not finite on one rank, and must leave no trace on any."""
    classification.cross_entropy = poison({2}, world)
    with started_run(config, world, folder, "never") as run:
        guards, states = run.monitors.guards, []
        for step, batches in run.steps():
            if step == 4:
                break
            seed_libraries(key(0, "step", step, world.rank), world.device)
            run.trainer.schedule.step_update(step)
            loss = train.train_step(run.trainer.engine, batches, run.task, None)
            guards.observe(step, batches, loss)
            states.append(state_of(run.trainer.engine))
        guards.review()
        same = [same_bits(a, b) for a, b in pairwise(states)]
        print(f"same {same} skipped {guards.skipped}")
    classification.cross_entropy = CROSS_ENTROPY


def state_of(engine: Engine) -> dict[str, Tensor]:
    state = {"steps": torch.tensor(list(gather_scalars(engine)["steps"].values()))}
    for moment in (None, *moment_names(engine)):
        state |= {f"{moment} {name}": weight.clone() for name, weight in gather(engine, moment).items()}
    if engine.stage < 3:  # which leaves nothing of the parameters themselves
        state |= {f"own {name}": p.detach().clone() for name, p in engine.module.named_parameters()}
    return state


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def go_back(config: Config, world: World, folder: Path) -> None:
    """Two bad steps in a row, then, having gone back, two more."""
    classification.cross_entropy = poison({5, 6, 9, 10}, world)
    try:
        train.train(replace(config, guards=GuardConfig(max_bad_steps=2)), world, folder)
    finally:
        classification.cross_entropy = CROSS_ENTROPY


def make_no_step(config: Config, world: World, folder: Path) -> None:
    """Both steps of a short run are bad."""
    classification.cross_entropy = poison({0, 1}, world)
    try:
        train.train(replace(config, data=replace(config.data, subset=2 * BATCH)), world, folder)
    finally:
        classification.cross_entropy = CROSS_ENTROPY


def flip(config: Config, world: World, folder: Path) -> None:
    """One bit of one weight changes on one rank, between two steps."""
    observe = Guards.observe

    def flipping(self: Guards, number: int, *words: object) -> None:
        observe(self, number, *words)
        if number == 2 and world.rank == 1:
            weight = dict(self._engine.module.named_parameters())["head.fc.weight"]
            weight.data.view(torch.int32)[3, 5] ^= 1 << 9

    Guards.observe = flipping
    try:
        train.train(replace(config, guards=GuardConfig(compare_every_steps=2)), world, folder)
    finally:
        Guards.observe = observe


def be_slow(config: Config, world: World, folder: Path) -> None:
    """One rank waits for its data."""
    iterate = TrainLoader.iterate

    def slow(self: TrainLoader, start: int, stop: int) -> Iterator[object]:
        for batches in iterate(self, start, stop):
            if world.rank == 1:
                time.sleep(0.5)
            yield batches

    TrainLoader.iterate = slow
    try:
        train.train(replace(config, run=replace(config.run, log_every_steps=11)), world, folder)
    finally:
        TrainLoader.iterate = iterate


def fail_to_write(config: Config, world: World, folder: Path) -> None:
    """One rank can't write its part of the first checkpoint."""
    write, calls = checkpoint._write_weights, []

    def failing(*words: object) -> None:
        calls.append(words)
        if world.rank == 1 and len(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*words)

    checkpoint._write_weights = failing
    try:
        train.train(config, world, folder)
    finally:
        checkpoint._write_weights = write


main()
