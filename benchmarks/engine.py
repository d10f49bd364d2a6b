"""Times the whole training step against the bare loops that it is made of, on data that are ready.

ours       `train_step` and what the loop calls after it: average, guards, log, the agreement on stopping
deepspeed  forward, loss, backward and step of a DeepSpeed engine of the same ZeRO stage and precision
pytorch    the same without DeepSpeed: DistributedDataParallel, autocast, clipping, AdamW
strict     ours with deterministic algorithms

Each has a model of its own; their steps alternate, and the figure to quote is the ratio of medians: of wall time, or on
a CPU that others use, too, of rank 0's CPU time. Logging is as often as by default, so at least one line falls into the
steps that are timed.

    torchrun --standalone --nproc-per-node 2 benchmarks/engine.py --out engine.json

Prints a table in Markdown; the file has the medians it is made of.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from common import command_line, processor_name, row, synchronize
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from convneur.config import Config, deepspeed_config, load_config
from convneur.data.stream.batch import Batch
from convneur.engine.build import build_engine
from convneur.engine.ema import Ema
from convneur.engine.optimizer import build_optimizer
from convneur.models.build import build_model
from convneur.models.convneur.model import ConvNeur
from convneur.monitoring.gauges import Gauges, step_flops
from convneur.monitoring.guards import Guards
from convneur.records.log import TrainingLog
from convneur.system.stopping import StopRequest
from convneur.system.world import World
from convneur.tasks.choose import build_task
from convneur.train import train_step

Step = Callable[[int], None]
cross_entropy = SoftTargetCrossEntropy()


def settings(args: argparse.Namespace, stage: int, autocast: bool, world: World) -> Config:
    """The defaults, but for what is compared."""
    config = load_config(
        overrides=[
            "--model.variant", args.variant, "--data.global_batch_size", str(args.batch_size * world.size),
            "--deepspeed.zero_optimization.stage", str(stage),
            "--deepspeed.torch_autocast", f"{{enabled: {str(autocast).lower()}, dtype: bfloat16}}",
        ]
    )  # fmt: skip
    return replace(config, data=replace(config.data, image_size=args.image_size))


def build(config: Config, world: World) -> tuple[ConvNeur, torch.optim.Optimizer]:
    """A model and its optimizer."""
    torch.manual_seed(0)
    model = build_model(config.model).to(world.device)
    return model, build_optimizer(model, config.optimizer, "torch", config.data.global_batch_size, offload=False)


def ours(config: Config, world: World, images: Tensor, targets: Tensor) -> Step:
    """The project's step, with everything around it."""
    model, optimizer = build(config, world)
    engine = build_engine(model, optimizer, deepspeed_config(config, world.size))
    ema = Ema(engine, config.train.ema_decay)
    log = TrainingLog(
        Path(tempfile.mkdtemp()),
        world,
        start_step=0,
        total_steps=10**6,
        steps_per_epoch=1000,
        images_per_step=config.data.global_batch_size,
        every_steps=config.run.log_every_steps,
    )
    log.say = lambda _: None  # type: ignore[method-assign]
    guards = Guards(config.guards, world, engine, ema, str, config.data.image_size, log.say)
    gauges = Gauges(world, step_flops(config.model, config.data.image_size), engine.gradient_norm, {})
    stop_request = StopRequest()
    counts = torch.arange(len(images))
    batch = Batch(images, counts, counts, epoch=0, step=0, lanes=range(1), repetitions=counts)

    task = build_task(config, world.device)
    task.prepare = lambda _: (images, targets)  # type: ignore[method-assign]

    def step(number: int) -> None:
        loss = train_step(engine, [batch], task, ema)
        guards.observe(number, [batch], loss)
        log.step(number + 1, loss, 1e-3, gauges)
        guards.compare_weights(number + 1)
        if (number + 1) % config.run.log_every_steps == 0:
            guards.review()
        stop_request.agreed()

    return step


def bare_deepspeed(config: Config, world: World, images: Tensor, targets: Tensor) -> Step:
    """A DeepSpeed engine and nothing else."""
    model, optimizer = build(config, world)
    section = deepspeed_config(config, world.size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=section, dist_init_required=False)

    def step(_: int) -> None:
        engine.backward(cross_entropy(engine(images).float(), targets))
        engine.step()

    return step


def bare_pytorch(config: Config, world: World, images: Tensor, targets: Tensor) -> Step:
    """PyTorch and nothing else."""
    model, optimizer = build(config, world)
    parallel = DistributedDataParallel(model)
    enabled = config.deepspeed["torch_autocast"]["enabled"]

    def step(_: int) -> None:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=enabled):
            logits = parallel(images)
        cross_entropy(logits.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def strict(config: Config, world: World, images: Tensor, targets: Tensor) -> Step:
    """Ours with deterministic algorithms; what NCCL and cuBLAS read from the environment stays as it is."""
    step = ours(config, world, images, targets)

    def strictly(number: int) -> None:
        torch.use_deterministic_algorithms(True)
        step(number)
        torch.use_deterministic_algorithms(False)

    return strictly


LOOPS = {"ours": ours, "deepspeed": bare_deepspeed, "pytorch": bare_pytorch, "strict": strict}


def compare(args: argparse.Namespace, stage: int, autocast: bool, world: World) -> dict[str, Any]:
    """Median seconds of a step of each loop, and ours in units of the others'."""
    config = settings(args, stage, autocast, world)
    torch.manual_seed(world.rank)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=world.device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.softmax(torch.randn(args.batch_size, config.model.num_classes, device=world.device), 1)
    steps = {name: loop(config, world, images, targets) for name, loop in LOOPS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.warmup + args.steps):
        for name in sorted(steps, key=lambda name: (place(name) + number) % len(steps)):  # each goes first in turn
            dist.barrier()
            synchronize(world.device)
            start, cpu_start = time.perf_counter(), time.process_time()
            steps[name](number)
            synchronize(world.device)
            if number >= args.warmup:
                times[name].append(time.perf_counter() - start)
                cpu_times[name].append(time.process_time() - cpu_start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    cpu_medians = {name: statistics.median(values) for name, values in cpu_times.items()}
    return {
        "stage": stage,
        "precision": "bf16 autocast" if autocast else "fp32",
        "world_size": world.size,
        "seconds": medians,
        "over_deepspeed": medians["ours"] / medians["deepspeed"],
        "over_pytorch": medians["ours"] / medians["pytorch"],
        "strict_over_ours": medians["strict"] / medians["ours"],
        "cpu_seconds": cpu_medians,
        "cpu_over_deepspeed": cpu_medians["ours"] / cpu_medians["deepspeed"],
        "cpu_over_pytorch": cpu_medians["ours"] / cpu_medians["pytorch"],
        "cpu_strict_over_ours": cpu_medians["strict"] / cpu_medians["ours"],
    }


HEADINGS = (
    "| ranks, ZeRO, precision | whole step, wall (CPU) | / bare DeepSpeed | / bare PyTorch or DDP | strict / fast |\n"
    "|---|---|---|---|---|"
)


def line(result: dict[str, Any]) -> str:
    """A comparison as a row of the table: ratios of wall time, in brackets those of CPU time."""
    ratios = [
        f"{result[name]:.3f} ({result[f'cpu_{name}']:.3f})"
        for name in ("over_deepspeed", "over_pytorch", "strict_over_ours")
    ]
    ours = f"{result['seconds']['ours'] * 1e3:.1f} ms ({result['cpu_seconds']['ours'] * 1e3:.1f} ms)"
    loop = f"{result['world_size']}, {result['stage']}, {result['precision']}"
    return row([loop, ours, *ratios])


def place(name: str) -> int:
    """A loop's place among the others."""
    return list(LOOPS).index(name)


def main() -> None:
    """Runs the comparisons that the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("--variant", default="m1")
    parser.add_argument("--batch-size", type=int, default=32, help="images a rank")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "autocast"], default=["fp32", "autocast"])
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps of each loop that are timed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    world = World.join()
    torch.utils.deterministic.fill_uninitialized_memory = False
    results = []
    if world.is_main:
        print(HEADINGS)
    for stage in args.stages:
        for precision in args.precisions:
            results.append(compare(args, stage, precision == "autocast", world))
            if world.is_main:
                print(line(results[-1]), flush=True)
    if args.out and world.is_main:
        machine = {"cpu": processor_name(), "cores": len(os.sched_getaffinity(0))}
        machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        args.out.write_text(json.dumps({"machine": machine, "load": os.getloadavg(), "results": results}, indent=2))
    world.leave()


if __name__ == "__main__":
    main()
