"""Run in ranks: a few steps of a small model in every mode of the engine; prints what happened as JSON.

Usage: engine_modes.py [MODE...]
"""

import json
import sys
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convneur.config import deepspeed_config, load_config
from convneur.data.keys import seed_libraries
from convneur.engine.build import build_engine
from convneur.engine.config import choose_implementation
from convneur.engine.optimizer import build_optimizer
from convneur.engine.section import offloads_optimizer
from convneur.models.convneur.config import MemoryConfig, ModelConfig
from convneur.models.convneur.model import ConvNeur
from convneur.ops.memory import cpp, eager
from convneur.system.world import World

STEPS = 3
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def section(precision: str, stage: int, **zero: Any) -> dict[str, Any]:
    precisions = {"fp32": {}, "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}}
    return {"zero_optimization": {"stage": stage, **zero}} | precisions.get(precision, {"bf16": {"enabled": True}})


MODES: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{f"{p}-{stage}": (section(p, stage), []) for p in ("fp32", "autocast") for stage in range(4)},
    **{f"bf16-{stage}": (section("bf16", stage), []) for stage in (1, 2, 3)},
    **{f"fp32-{stage}-offload": (section("fp32", stage, **OFFLOAD), ["torch"]) for stage in (1, 2, 3)},
    "fp32-0-lamb": (section("fp32", 0), ["torch", "lamb"]),
    "fp32-0-recompute": (section("fp32", 0), ["recompute"]),
    "autocast-1-recompute": (section("autocast", 1), ["recompute"]),
    "autocast-3-recompute": (section("autocast", 3), ["recompute"]),
    "fp32-0-compile": (section("fp32", 0), ["compile"]),
    "autocast-1-compile": (section("autocast", 1), ["compile"]),
    "fp32-0-deepspeed": (section("fp32", 0), ["deepspeed"]),
    "fp32-2-offload-deepspeed": (section("fp32", 2, **OFFLOAD), ["deepspeed"]),
}


class Watch(TorchDispatchMode):
    """Notes operators that compute in another precision than float32; moving and rounding values is none of that."""

    MOVES = (
        "alias",
        "copy_",
        "to",
        "_to_copy",
        "empty",
        "new_empty",
        "empty_like",
        "permute",
        "slice",
        "split",
        "split_with_sizes",
        "select",
    )
    MOVES += ("unsqueeze", "unflatten", "view", "_unsafe_view", "transpose", "t", "unbind", "expand", "detach")

    def __init__(self, seen: set[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        name = func.overloadpacket.__name__
        if name not in self.MOVES and operands and torch.float32 not in operands:
            self.seen.add(f"{name}({', '.join(map(str, operands))})")
        return func(*args, **kwargs or {})


def run(section: dict[str, Any], options: list[str], world: World, seen: set[str]) -> dict[str, Any]:
    words = ["--data.global_batch_size", "8", "--optimizer.lr", "1e-3"]
    words += ["--optimizer.name", "lamb"] if "lamb" in options else []
    for name in ("torch", "deepspeed"):
        words += ["--optimizer.implementation", name] if name in options else []
    config = load_config(overrides=[*words, "--deepspeed", json.dumps(section)])
    torch.manual_seed(0)
    memory = MemoryConfig(chunk_length=16)
    model = ConvNeur(ModelConfig("n1", num_classes=10, memory=memory, drop_path=0.3, layer_scale=0.1))
    model.set_grad_checkpointing("recompute" in options)
    offload = offloads_optimizer(section)
    implementation = choose_implementation(config.optimizer, "cpu", offload)
    optimizer = build_optimizer(model, config.optimizer, implementation, 8, offload)
    engine = build_engine(model, optimizer, deepspeed_config(config, world.size), compile="compile" in options)
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8)
    losses = []
    seen.clear()
    for step in range(STEPS):
        seed_libraries(step)
        loss = torch.nn.functional.cross_entropy(engine(images).float(), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    whose = f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"
    return {"losses": losses, "memory": sorted(seen), "optimizer": whose}


def main() -> None:
    world = World.join()
    calls: list[str] = []
    seen: set[str] = set()
    for module, name in product((eager, cpp), ("forward", "backward")):
        function = getattr(module, name)

        def watched(*args: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            with Watch(seen):
                return function(*args)

        setattr(module, name, watched)
    for mode in sys.argv[1:]:
        calls.clear()
        result = run(*MODES[mode], world, seen)
        print(json.dumps({"mode": mode, "memory_calls": sorted(set(calls))} | result), flush=True)
    world.leave()


main()
