"""A checkpoint loaded into a fresh engine and saved again, which any fault in either would change.

Run in ranks: resave.py DIGITS [SOURCE STAGE OUT]...
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from small_run import small_config

from convneur.config import Config, deepspeed_config
from convneur.engine.build import build_engine
from convneur.engine.ema import Ema
from convneur.engine.optimizer import build_optimizer
from convneur.models.convneur.model import ConvNeur
from convneur.records.checkpoint import load_checkpoint, read_state, save_checkpoint
from convneur.records.retention import Retention
from convneur.system.world import World


def resave(config: Config, world: World, source: Path, out: Path) -> Path:
    """Returns the new checkpoint. Nothing of the weights that the engine starts from is in the old one."""
    torch.manual_seed(12345)
    model = ConvNeur(config.model)
    optimizer = build_optimizer(model, config.optimizer, "torch", config.data.global_batch_size, offload=False)
    engine = build_engine(model, optimizer, deepspeed_config(config, world.size))
    ema = Ema(engine, config.train.ema_decay)
    load_checkpoint(source, engine, ema)
    saved = save_checkpoint(out, config, world, engine, ema, read_state(source), Retention(1))
    engine.destroy()
    return saved


def main() -> None:
    digits, words = Path(sys.argv[1]), sys.argv[2:]
    world = World.join()
    for source, stage, out in zip(words[::3], words[1::3], words[2::3], strict=True):
        config = small_config(digits, int(stage))
        resave(replace(config, data=replace(config.data, workers=0)), world, Path(source), Path(out))
    world.leave()


if __name__ == "__main__":
    main()
