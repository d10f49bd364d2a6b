"""Times saving a checkpoint, which training waits for, and checking and loading it, which a start waits for.

    torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint.py --folder runs

Moments are there as after a step. The files are flushed to the disk that FOLDER lies on; what is read back right after
comes from the system's cache.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from common import command_line

from convneur.config import deepspeed_config, load_config
from convneur.engine.build import build_engine
from convneur.engine.ema import Ema
from convneur.engine.optimizer import build_optimizer
from convneur.models.build import build_model
from convneur.records.checkpoint import TrainState, load_checkpoint, save_checkpoint
from convneur.records.manifest import newest_intact
from convneur.records.retention import Retention
from convneur.system.world import World

EVERY_SECONDS = 600


def seconds(call: Callable[[], Any]) -> float:
    """How long all ranks together take for a call."""
    dist.barrier()
    start = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - start


def measure(variant: str, stage: int, runs: int, folder: Path, world: World) -> str:
    """A row of the table: medians of some saves, each checked and loaded right after."""
    overrides = ["--model.variant", variant, "--data.global_batch_size", str(world.size)]
    config = load_config(overrides=[*overrides, "--deepspeed.zero_optimization.stage", str(stage)])
    torch.manual_seed(0)
    model = build_model(config.model).to(world.device)
    optimizer = build_optimizer(model, config.optimizer, "torch", world.size, offload=False)
    engine = build_engine(model, optimizer, deepspeed_config(config, world.size))
    ema = Ema(engine, config.train.ema_decay)
    engine.backward(engine(torch.randn(1, 3, 64, 64, device=world.device)).square().mean())
    engine.step()
    saves, checks, loads = [], [], []
    for step in range(runs):
        state, path = TrainState(step, 0.0, {}, engine.settings), folder / f"step-{step:08d}"
        saves.append(seconds(partial(save_checkpoint, folder, config, world, engine, ema, state, Retention(1))))
        checks.append(seconds(partial(newest_intact, [path], world)))
        loads.append(seconds(partial(load_checkpoint, path, engine, ema)))
    parameters = engine.parameters
    engine.destroy()
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    save, check, load = map(statistics.median, (saves, checks, loads))
    return (
        f"| {stage} | {parameters / 1e6:.1f} M | {size / 1e6:,.0f} MB | {save:.2f} s | {save / EVERY_SECONDS:.2%} "
        f"| {check:.2f} s | {load:.2f} s |"
    )


def main() -> None:
    """Measures what the command line asks for, and prints a table."""
    parser = command_line(__doc__)
    parser.add_argument("--variant", default="m4")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    args = parser.parse_args()
    world = World.join()
    if world.is_main:
        print("| ZeRO | parameters | bytes | save | share of ten minutes | check all bytes | load |")
        print("|---|---|---|---|---|---|---|")
    for stage in args.stages:
        with TemporaryDirectory(dir=args.folder) as own:
            folder = [own]
            dist.broadcast_object_list(folder)
            row = measure(args.variant, stage, args.runs, Path(folder[0]), world)
            if world.is_main:
                print(row, flush=True)
            dist.barrier()
    world.leave()


if __name__ == "__main__":
    main()
