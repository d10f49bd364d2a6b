"""Run in ranks: under every ZeRO stage, trains a run in one go and another that is stopped and resumed.

Usage: zero_stages.py DIGITS OUT [rest]
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from small_run import small_config

from convneur.data.stream.train import TrainLoader
from convneur.system.world import World
from convneur.train import train

STOP_AT = 6  # between two checkpoints, so that steps are lost and made again


# Stage, precision, accumulation. own: DeepSpeed's bf16 mode instead of autocast. mup: autocast, and a width that isn't
# that of model.mup_base.
USUAL = ((0, "bf16", 2), (1, "bf16", 2), (2, "fp32", 1), (3, "bf16", 2), (3, "fp32", 1), (1, "mup", 1))
REST = (
    *((0, "fp32", 1), (1, "fp32", 2), (2, "bf16", 2), (1, "own", 2), (2, "own", 1), (3, "own", 1)),
    *((0, "mup", 2), (2, "mup", 2), (3, "mup", 2)),
)


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

    for stage, precision, accumulation in REST if sys.argv[3:] == ["rest"] else USUAL:
        config = small_config(digits, stage, autocast=precision in ("bf16", "mup"), accumulation=accumulation)
        if precision == "own":
            config = replace(config, deepspeed={**config.deepspeed, "bf16": {"enabled": True}})
        if precision == "mup":
            config = replace(config, model=replace(config.model, mup_base="4x2-1-1-1"))
        name = f"zero{stage}-{precision}"
        TrainLoader.iterate = stopping
        with suppress(StoppedError):
            train(config, world, out / f"{name}-stopped")
        TrainLoader.iterate = iterate
        # The run in one go comes in between, so that nothing left over in the process can help the resumed one.
        train(config, world, out / f"{name}-whole")
        train(config, world, out / f"{name}-stopped", resume="auto")
    world.leave()
    # DeepSpeed loads torch.compile's compiler for an optimizer that no run has, which takes seconds of every start.
    assert "torch._inductor.compile_fx" not in sys.modules


main()
