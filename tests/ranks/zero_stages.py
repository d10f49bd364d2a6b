"""Run by torchrun: under every ZeRO stage, trains a run in one go and another that is stopped and resumed.

Usage: zero_stages.py DIGITS OUT
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from small_run import small_config

from convneur.data.loader import TrainLoader
from convneur.train import train
from convneur.world import World

STOP_AT = 6  # between two checkpoints, so that steps are lost and made again


class StoppedError(Exception):
    """Stands for whatever ends a run in the middle of an epoch."""


def main() -> None:
    digits, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = World.join()
    iterate = TrainLoader.iterate

    def stopping(self: TrainLoader, start: int, stop: int) -> Iterator[object]:
        for step, batches in enumerate(iterate(self, start, stop), start):
            if step == STOP_AT:
                raise StoppedError
            yield batches

    for stage, autocast, accumulation in ((0, True, 2), (1, True, 2), (2, False, 1), (3, True, 2), (3, False, 1)):
        config = small_config(digits, stage, autocast=autocast, accumulation=accumulation)
        name = f"zero{stage}-{'bf16' if autocast else 'fp32'}"
        TrainLoader.iterate = stopping
        with suppress(StoppedError):
            train(config, world, out / f"{name}-stopped")
        TrainLoader.iterate = iterate
        # The run in one go comes in between, so that nothing left over in the process can help the resumed one.
        train(config, world, out / f"{name}-whole")
        train(config, world, out / f"{name}-stopped", resume="auto")
    world.leave()


main()
