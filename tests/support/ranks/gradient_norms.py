"""Run in ranks: one training step in every precision, ZeRO stage and accumulation; prints norms as JSON.

What is printed of each: the norm that is logged, that of the gradient that the optimizer was given (its first moment
after one step, over 1 - beta1), and the norm of a whole model's float64 gradient of the global batch.
"""

import json
from itertools import product
from typing import Any

import torch
from deepspeed.runtime import torch_autocast

from convneur.config import deepspeed_config, load_config
from convneur.engine.build import build_engine
from convneur.engine.config import choose_implementation
from convneur.engine.engine import Engine
from convneur.engine.optimizer import build_optimizer
from convneur.engine.section import offloads_optimizer
from convneur.engine.state import gather, gather_scalars, restore
from convneur.models.convneur.config import MemoryConfig, ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.system.world import World
from convneur.tasks.classification import cross_entropy
from convneur.train import train_step

BATCH = 8
LIMIT = 0.5
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "fp16-autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
    "bf16": {"bf16": {"enabled": True}},
}
Micro = tuple[torch.Tensor, torch.Tensor]


class Given:
    """Classification of batches that are images and targets already."""

    def prepare(self, batch: Micro) -> Micro:
        return batch

    def losses(self, model: Engine, images: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": cross_entropy(model(images).float(), targets)}


def small_model() -> ConvNeur:
    torch.manual_seed(0)
    memory = MemoryConfig(chunk_length=16)
    return ConvNeur(ModelConfig("4x1-1-1-1", num_classes=10, memory=memory, drop_path=0.0, layer_scale=0.1))


def whole_batch() -> Micro:
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, 32, 32), torch.eye(10)[torch.arange(BATCH)]


def start(world: World, precision: str, stage: int, accumulation: int, offload: bool) -> Engine:
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    section = {"zero_optimization": zero} | PRECISIONS[precision]
    words = ["--data.global_batch_size", str(BATCH), "--train.accumulation", str(accumulation)]
    words += ["--optimizer.clip_grad", str(LIMIT), "--deepspeed", json.dumps(section)]
    words += ["--optimizer.implementation", "torch"]
    config = load_config(overrides=words)
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # a global of DeepSpeed's, which an earlier engine has set
    model = small_model()
    offload = offloads_optimizer(config.deepspeed)
    implementation = choose_implementation(config.optimizer, "cpu", offload)
    optimizer = build_optimizer(model, config.optimizer, implementation, BATCH, offload)
    return build_engine(model, optimizer, deepspeed_config(config, world.size))


def step(world: World, engine: Engine, accumulation: int, factor: float = 1.0) -> tuple[float, float]:
    """One step; the norm that is logged and that of the first moment."""
    images, targets = (x.chunk(world.size)[world.rank].chunk(accumulation) for x in whole_batch())
    batches = [(image * factor, target) for image, target in zip(images, targets, strict=True)]
    train_step(engine, batches, Given(), None)  # type: ignore[arg-type]
    moment = gather(engine, "exp_avg")
    return float(engine.gradient_norm() or 0), float(torch.stack([m.double().norm() for m in moment.values()]).norm())


def expected_norm() -> float:
    model = small_model().double()
    images, targets = whole_batch()
    cross_entropy(model(images.double()), targets.double()).backward()
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert all(grad.dtype == torch.float64 for grad in grads)
    return float(torch.stack(grads).norm())


def scales(world: World, stage: int) -> dict[str, Any]:
    """The scale after a step that overflows, and what a resumed engine makes of a step after which it grows."""
    engine = start(world, "fp16-autocast", stage, 2, False)
    step(world, engine, 2)
    step(world, engine, 2, factor=float("inf"))
    told = gather_scalars(engine)
    moments = {name: gather(engine, name) for name in ("exp_avg", "exp_avg_sq")}
    moments["exp_avg"] = {name: torch.zeros_like(moment) for name, moment in moments["exp_avg"].items()}
    last = told["loss_scale"] | {"_growth_tracker": told["loss_scale"]["growth_interval"] - 1}
    resumed = start(world, "fp16-autocast", stage, 2, False)
    restore(resumed, small_model().state_dict(), moments, told | {"loss_scale": last})
    restored = gather_scalars(resumed)["loss_scale"] == last
    norm, moment = step(world, resumed, 2)
    return {
        "overflow": told | {"steps": max(told["steps"].values())},
        "restored": restored,
        "grown": gather_scalars(resumed)["loss_scale"],
        "norm": norm,
        "clipped": moment / 0.1,
    }


def main() -> None:
    world = World.join()
    modes = [(p, stage, 2, False) for p, stage in product(PRECISIONS, range(4)) if (p, stage) != ("bf16", 0)]
    modes += [("fp32", stage, 1, False) for stage in range(4)]
    modes += [("fp16-autocast", stage, 2, True) for stage in (1, 2, 3)]
    expected = expected_norm()
    for precision, stage, accumulation, offload in modes:
        engine = start(world, precision, stage, accumulation, offload)
        norm, moment = step(world, engine, accumulation)
        mode = f"{precision}-{stage}-{accumulation}{'-offload' if offload else ''}"
        if world.is_main:
            print(json.dumps({"mode": mode, "expected": expected, "norm": norm, "clipped": moment / 0.1}), flush=True)
    for stage in range(4):
        told = scales(world, stage)
        if world.is_main:
            print(json.dumps({"mode": f"scale-{stage}", "expected": expected} | told), flush=True)
    world.leave()


main()
