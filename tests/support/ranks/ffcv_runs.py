"""Run in ranks: with FFCV's engine, trains a run in one go and another that is stopped and resumed.

Usage: ffcv_runs.py DIGITS OUT
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from small_run import small_config

from convneur.data.stream.ffcv import FfcvLoader
from convneur.system.world import World
from convneur.train import train

STOP_AT = 6  # between two checkpoints, so that steps are lost and made again


class StoppedError(Exception):
    """Stands for whatever ends a run in the middle of an epoch."""


def main() -> None:
    digits, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = World.join()
    small = small_config(digits, 1, accumulation=2)
    augment = replace(small.data.augment, randaugment="", vflip=0.1)
    data = replace(small.data, engine="ffcv", interpolation="area", augment=augment)
    config = replace(small, data=data)
    iterate = FfcvLoader.iterate

    def stopping(self: FfcvLoader, start: int, stop: int) -> Iterator[object]:
        for step, batches in enumerate(iterate(self, start, stop), start):
            if step == STOP_AT:
                raise StoppedError
            yield batches

    FfcvLoader.iterate = stopping
    with suppress(StoppedError):
        train(config, world, out / "stopped")
    FfcvLoader.iterate = iterate
    # The run in one go comes in between, so that nothing left over in the process can help the resumed one.
    train(config, world, out / "whole")
    train(replace(config, data=replace(data, workers=2)), world, out / "stopped", resume="auto")
    world.leave()


main()
