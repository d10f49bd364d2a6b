"""The planner's memory against real steps: bytes of living tensors in every rank, by variant and ZeRO stage.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/planner.py

Each case builds the engine as `convneur train` does and makes two steps, of which the second is looked at; on a GPU
torch.cuda.max_memory_allocated is beside it. A table and planner.json, and a figure of the ZeRO stages.
"""

import argparse
import gc
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import command_line
from matplotlib import pyplot as plt

from convneur.config import Config, deepspeed_config, load_config
from convneur.engine.build import build_engine
from convneur.engine.config import choose_implementation
from convneur.engine.ema import Ema
from convneur.engine.optimizer import build_optimizer
from convneur.models.build import build_model
from convneur.planning.footprint import layout, peak
from convneur.planning.step_trace import LiveStorages, Precision, trace_step
from convneur.system.world import World
from convneur.tasks.classification import cross_entropy


@dataclass(frozen=True)
class Case:
    """What was predicted of a step and what it took, in bytes of rank 0."""

    variant: str
    image_size: int
    micro_batch: int
    accumulation: int
    precision: str
    recompute: bool
    stage: int
    planned: int
    measured: int
    allocated: int | None

    @property
    def error(self) -> float:
        """Planned over measured, minus 1."""
        return self.planned / (self.allocated or self.measured) - 1


def settings(variant: str, args: argparse.Namespace, stage: int, ranks: int) -> Config:
    """A run's configuration with what matters here."""
    words = {
        "model.variant": variant,
        "data.image_size": args.image_size,
        "data.global_batch_size": args.micro_batch * args.accumulation * ranks,
        "train.accumulation": args.accumulation,
        "train.recompute": str(args.recompute).lower(),
        "deepspeed.zero_optimization.stage": stage,
    }
    if args.precision == "autocast":
        words["deepspeed.torch_autocast"] = "{enabled: true, dtype: bfloat16}"
    elif args.precision == "bf16":
        words["deepspeed.bf16"] = "{enabled: true}"
    return load_config(overrides=[f"--{key}={value}" for key, value in words.items()])


def measure(config: Config, world: World) -> tuple[int, int | None]:
    """The most bytes of living tensors in the second step, and of CUDA's allocator where there is one."""
    accumulation, size = config.train.accumulation, config.data.image_size
    micro_batch = config.data.global_batch_size // world.size // accumulation
    with LiveStorages() as tensors:
        torch.manual_seed(0)
        model = build_model(config.model).to(world.device)
        model.set_grad_checkpointing(config.train.recompute)
        implementation = choose_implementation(config.optimizer, world.device.type, False)
        optimizer = build_optimizer(model, config.optimizer, implementation, config.data.global_batch_size, False)
        engine = build_engine(model, optimizer, deepspeed_config(config, world.size))
        ema = Ema(engine, config.train.ema_decay)
        target = torch.full((micro_batch, config.model.num_classes), 1e-3, device=world.device)
        for _ in range(2):
            gc.collect()
            tensors.high = tensors.live
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(accumulation):
                images = torch.randn(micro_batch, 3, size, size, device=world.device)
                loss = cross_entropy(engine(images.to(memory_format=torch.channels_last)).float(), target)
                engine.backward(loss)
                engine.step()
                del loss, images
            ema.update()
    allocated = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    engine.destroy()
    return tensors.high, allocated


def draw(cases: list[Case], path: Path) -> None:
    """Measured points on planned lines, by parameters' variant and stage."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    variants = list(dict.fromkeys(case.variant for case in cases))
    for stage in sorted({case.stage for case in cases}):
        mine = {case.variant: case for case in cases if case.stage == stage}
        at = [number for number, variant in enumerate(variants) if variant in mine]
        chosen = [mine[variant] for variant in variants if variant in mine]
        axis.plot(at, [c.planned / 1e9 for c in chosen], "-", color=f"C{stage}", label=f"ZeRO {stage}, planned")
        real = [(c.allocated or c.measured) / 1e9 for c in chosen]
        axis.plot(at, real, "o", color=f"C{stage}", label=f"ZeRO {stage}, measured")
    axis.set(yscale="log", ylabel="GB of a rank at the peak of a step", xticks=range(len(variants)))
    axis.set_xticklabels([variant.upper() for variant in variants])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures all cases that the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("--variants", nargs="+", default=["m1", "m2", "m3", "m4", "m5", "m6", "m7"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "autocast", "bf16"], default="autocast")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("planner.json"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    world, cases = World.join(), []
    precision: Precision = args.precision
    if world.is_main:
        print("| variant | ZeRO | planned, MB | measured, MB | error |\n|---|---:|---:|---:|---:|", flush=True)
    for variant in args.variants:
        model, cuda = settings(variant, args, 0, world.size).model, world.device.type == "cuda"
        trace = trace_step(model, args.micro_batch, args.image_size, precision, recompute=args.recompute, cuda=cuda)
        for stage in args.stages:
            config = settings(variant, args, stage, world.size)
            how = layout(deepspeed_config(config, world.size), stage, world.size, precision, averages=True)
            planned = peak(trace, how).total
            shape = args.image_size, args.micro_batch, args.accumulation
            case = Case(variant, *shape, precision, args.recompute, stage, planned, *measure(config, world))
            cases.append(case)
            if world.is_main:
                real = (case.allocated or case.measured) / 1e6
                print(f"| {variant} | {stage} | {planned / 1e6:.1f} | {real:.1f} | {case.error:+.1%} |", flush=True)
                args.out.write_text(json.dumps([{**asdict(case), "error": case.error} for case in cases], indent=2))
    if world.is_main and args.figure:
        draw(cases, args.figure)
    world.leave()


if __name__ == "__main__":
    main()
