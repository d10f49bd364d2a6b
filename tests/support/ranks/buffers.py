"""Run in ranks: a model with buffers of all kinds in one go, and stopped and resumed; prints what was equal as JSON.

Usage: buffers.py OUT
"""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convneur.config import load_config
from convneur.engine.build import build_engine
from convneur.engine.ema import Ema
from convneur.engine.engine import Engine, Weights
from convneur.engine.state import gather, gather_model, moment_names
from convneur.records.checkpoint import TrainState, load_checkpoint, load_weights, save_checkpoint
from convneur.records.retention import Retention
from convneur.system.world import World

STEPS, SAVED, ACCUMULATION, BATCH = 6, 3, 2, 4


class Net(nn.Module):
    """Logits of images (b, 3, 8, 8), with running statistics, counts, a flag, a constant, and what isn't persistent."""

    mask: Tensor
    used: Tensor
    passes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.register_buffer("mask", torch.tensor([0.1] * 9 + [-float("inf")]))
        self.register_buffer("used", torch.zeros((), dtype=torch.bool))
        self.register_buffer("passes", torch.zeros(3, dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.used.fill_(True)
            self.passes += 1 + dist.get_rank()
        logits: Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return logits + self.mask.nan_to_num(neginf=-1.0)


def new_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def micro_batches(step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    images = torch.randn(ACCUMULATION, BATCH, 3, 8, 8, generator=generator) * (1 + rank) + rank
    return [(part, torch.arange(BATCH)) for part in images]


def start(stage: int, seed: int) -> tuple[Engine, Ema]:
    model = new_net(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    section = {
        "train_batch_size": BATCH * ACCUMULATION * dist.get_world_size(),
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2**20},
    }
    engine = build_engine(model, optimizer, section)
    return engine, Ema(engine, 0.8)


def make_step(engine: Engine, ema: Ema, step: int, rank: int, factor: float = 1.0) -> None:
    for images, labels in micro_batches(step, rank):
        engine.backward(cross_entropy(engine(images), labels) * factor)
        engine.step()
    ema.update()


def state_of(engine: Engine, ema: Ema) -> dict[str, Tensor]:
    state = gather_model(engine) | {f"average {name}": value for name, value in ema.full_model().items()}
    for moment in moment_names(engine):
        state |= {f"{moment} {name}": value for name, value in gather(engine, moment).items()}
    return {name: value.clone() for name, value in state.items()}


def scores(weights: Weights) -> Tensor:
    """What a model makes of held-out images, once it has taken all of these, and no others."""
    model = Net().eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9)))


def odd(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of what isn't equal to the bit."""
    same = {name for name in a.keys() & b.keys() if a[name].numpy().tobytes() == b[name].numpy().tobytes()}
    return sorted((a.keys() | b.keys()) - same)


def expected_statistics(world: World) -> Tensor:
    """Running means after the first step: each rank's own, from its micro-batches, then their mean."""
    found = []
    for rank in range(world.size):
        model = new_net(0)
        for images, _ in micro_batches(0, rank):
            model(images)
        found.append(model.norm.running_mean)
    return torch.stack([mean for mean in found if mean is not None]).mean(0)


def play(stage: int, folder: Path, world: World) -> dict[str, Any]:
    config = load_config(overrides=["--model.num_classes", "10"])
    engine, ema = start(stage, seed=0)
    told: dict[str, Any] = {}
    for step in range(STEPS):
        make_step(engine, ema, step, world.rank)
        if step == 0:
            told["error"] = (gather_model(engine)["norm.running_mean"] - expected_statistics(world)).abs().max().item()
        if step + 1 in (SAVED, STEPS):
            state = TrainState(step + 1, 0.0, {}, engine.settings)
            saved = save_checkpoint(folder, config, world, engine, ema, state, Retention(9))
    whole = state_of(engine, ema)
    resumed, resumed_ema = start(stage, seed=1)
    load_checkpoint(folder / f"step-{SAVED:08d}", resumed, resumed_ema)
    for step in range(SAVED, STEPS):
        make_step(resumed, resumed_ema, step, world.rank)
    told["resumed"] = odd(whole, state_of(resumed, resumed_ema))

    raw, averaged = (load_weights(saved, averaged=averaged) for averaged in (False, True))
    told["saved"] = odd(gather_model(engine), raw) + odd(ema.full_model(), averaged)
    found = [scores(gather_model(engine)), scores(ema.full_model())]
    again = [scores(gather_model(resumed)), scores(resumed_ema.full_model())]
    told["scores"] = [torch.equal(a, b) for a, b in zip(found, [scores(raw), scores(averaged)], strict=True)]
    told["scores"] += [torch.equal(a, b) for a, b in zip(found, again, strict=True)]
    told["scores differ"] = not torch.equal(*found)

    others: list[dict[str, Tensor]] = [{}] * world.size
    dist.all_gather_object(others, deepcopy(dict(engine.module.named_buffers())), world.control)
    told["ranks"] = odd(*others)
    make_step(engine, ema, STEPS, world.rank, factor=float("nan") if world.rank == 1 else 1.0)
    told["skipped"] = bool(engine.skipped), odd(raw, gather_model(engine))
    make_step(engine, ema, STEPS + 1, world.rank)
    told["after"] = odd(raw, gather_model(engine))
    return told


def main() -> None:
    world = World.join()
    for stage in (0, 1, 3):
        told = play(stage, Path(sys.argv[1]) / f"zero{stage}", world)
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, told, world.control)
        if world.is_main:
            print(json.dumps({"stage": stage, "ranks": everyone}), flush=True)
    world.leave()


main()
