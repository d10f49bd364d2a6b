"""Before a job is queued: does it fit, how long will it take, and what binds it?

Memory is footprint.py's. Time is a range between two rooflines over the kernels that step_trace.py has
seen: all at the rates of the data sheet, and all at the fractions of them in `SLOW`. The fractions are guesses that
nobody has held against a GPU yet; the plan says so.

Names: P parameters, N ranks.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from convneur.config import Config, deepspeed_config
from convneur.data.config import DataConfig
from convneur.data.errors import InputError
from convneur.data.format.manifest import MANIFEST
from convneur.data.stores.choose import open_store
from convneur.models.convneur.config import ModelConfig
from convneur.planning.footprint import FLOAT, HALF, Footprint, Layout, host_bytes, largest_micro_batch, layout, peak
from convneur.planning.rates import images_per_core
from convneur.planning.step_trace import Group, Kernel, Precision, Trace, trace_step
from convneur.system.gpu import Gpu

STAGES = (0, 1, 2, 3)

# What the CUDA context and the buffers of cuDNN and NCCL take, and what the allocator can't use: a guess.
RESERVE_BYTES = 2 * 2**30

# Fractions of the data sheet's rates at the slow end: guesses. The memory is a chain of small float32 products.
SLOW: dict[Group, float] = {"matrix": 0.4, "depthwise": 0.2, "memory": 0.1, "pointwise": 1.0}
SLOW_BANDWIDTH = 0.6
SLOW_LINKS = 0.5
LAUNCH_SECONDS = 5e-6  # the least between two kernels of an eager step, at the slow end: a guess

AVERAGE_BYTES = 3 * FLOAT
NORM_BYTES = FLOAT

# ILSVRC2012_img_train.tar holds 1,281,167 images in 147,897,477,120 bytes; 50,000 others are for evaluation.
IMAGENET = (1_281_167, 50_000)
IMAGE_BYTES = 147_897_477_120 // IMAGENET[0]

SMALL_FOR_ZERO_3 = 0.25  # of the memory: what fits so often without ZeRO 3 has no use for it


@dataclass(frozen=True)
class Range:
    """From the least to the most that is to be expected."""

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> "Range":
        """Both, scaled."""
        return Range(self.low * factor, self.high * factor)

    def rate(self, amount: float) -> "Range":
        """An amount a second, where this is seconds."""
        return Range(amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Cluster:
    """Machines and what is in them.

    Attributes:
        gpu: of every rank.
        nodes: machines.
        gpus_per_node: of each; one rank a GPU.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for key in ("nodes", "gpus_per_node"):
            if getattr(self, key) < 1:
                raise InputError(f"--{key.replace('_', '-')} is {getattr(self, key)}, expected at least 1")

    @property
    def ranks(self) -> int:
        """N."""
        return self.nodes * self.gpus_per_node


Part = Literal["matrix", "depthwise", "memory", "pointwise", "optimizer", "communication"]


@dataclass(frozen=True)
class Plan:
    """What is to be expected of a run.

    Attributes:
        variant: of the model.
        params: P.
        gpu: name of the GPU.
        nodes: machines.
        ranks: N.
        stage: the ZeRO stage that is configured.
        precision: of the step.
        micro_batch: images of a rank and micro-batch.
        accumulation: micro-batches of a step.
        capacity: bytes of a GPU that tensors can have.
        memory: by ZeRO stage, what a rank holds at the peak; 0 to 3 where DeepSpeed takes the precision.
        largest_micro_batch: by ZeRO stage, the most images that fit.
        host_bytes: of a rank, for an offloaded optimizer.
        sent_bytes: by a GPU, and as many received, a step.
        seconds: of a step, by what they go into.
        step_seconds: all of them.
        images_per_second: of all ranks.
        mfu: arithmetic of the step over the GPUs' dense half-precision peak.
        binds: what most of the slow end's time goes into.
        read_bytes_per_second: of all nodes, from storage.
        cores_per_gpu: that decode as fast as that; the low end feeds the slow one.
        steps: of the run.
        hours: of the run, evaluation included.
        checkpoint_bytes: of each.
        kept_checkpoints: at the same time.
        warnings: what makes no sense or doesn't work.
        assumed: what the configuration leaves open.
    """

    variant: str
    params: int
    gpu: str
    nodes: int
    ranks: int
    stage: int
    precision: str
    micro_batch: int
    accumulation: int
    capacity: int
    memory: dict[int, Footprint]
    largest_micro_batch: dict[int, int]
    host_bytes: int
    sent_bytes: int
    seconds: dict[Part, Range]
    step_seconds: Range
    images_per_second: Range
    mfu: Range
    binds: Part
    read_bytes_per_second: Range
    cores_per_gpu: Range
    steps: int
    hours: Range
    checkpoint_bytes: int
    kept_checkpoints: int
    warnings: tuple[str, ...]
    assumed: tuple[str, ...]

    @property
    def gpu_hours(self) -> Range:
        """Hours of all GPUs."""
        return self.hours.times(self.ranks)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        memory = {stage: {**asdict(held), "total": held.total} for stage, held in self.memory.items()}
        return {**asdict(self), "memory": memory, "gpu_hours": asdict(self.gpu_hours)}


def make_plan(config: Config, cluster: Cluster) -> Plan:
    """What is to be expected of a run on a cluster.

    Raises:
        InputError: the configuration can't be trained on so many ranks.
    """
    ranks, gpu, run = cluster.ranks, cluster.gpu, config.run
    section = deepspeed_config(config, ranks)
    micro_batch, accumulation = section["train_micro_batch_size_per_gpu"], config.train.accumulation
    precision, stage = _precision(section), section["zero_optimization"].get("stage", 0)
    trace = _traced(config, micro_batch, precision)
    params = sum(shape.numel() for shape in trace.shapes.values())
    averages = bool(config.train.ema_decay)
    stages = [s for s in STAGES if s or precision in ("fp32", "autocast")]
    layouts = {s: layout(section, s, ranks, precision, averages, config.optimizer.name) for s in stages}
    capacity = round(gpu.memory_gb * 1e9) - RESERVE_BYTES
    sizes = (micro_batch, trace), (2 * micro_batch, _traced(config, 2 * micro_batch, precision))

    sent = _sent(trace, stage, ranks, precision)
    seconds = _seconds(trace, accumulation, sent, layouts[stage], cluster)
    step = total(seconds.values())
    images, eval_images, assumed = _images(config.data)
    per_core, how_known = images_per_core(config.data)
    batch = config.data.global_batch_size
    steps = images // batch * config.schedule.epochs
    per_image = total(_kernel_seconds(kernel, gpu) for kernel in trace.kernels if kernel.forward).times(1 / micro_batch)
    evaluations = math.ceil(config.schedule.epochs / run.eval_every_epochs) * (1 + averages)
    rate = step.rate(batch)
    flops = sum(kernel.flops for kernel in trace.kernels) * accumulation
    plan = Plan(
        variant=config.model.variant,
        params=params,
        gpu=gpu.name,
        nodes=cluster.nodes,
        ranks=ranks,
        stage=stage,
        precision=precision,
        micro_batch=micro_batch,
        accumulation=accumulation,
        capacity=capacity,
        memory={s: peak(trace, how) for s, how in layouts.items()},
        largest_micro_batch={s: _largest(*sizes, how, capacity) for s, how in layouts.items()},
        host_bytes=host_bytes(params, layouts[stage]),
        sent_bytes=sent,
        seconds=seconds,
        step_seconds=step,
        images_per_second=rate,
        mfu=step.rate(flops / (gpu.half_tflops * 1e12)),
        binds=max(seconds, key=lambda part: seconds[part].high),
        read_bytes_per_second=rate.times(IMAGE_BYTES / config.data.repeats),
        cores_per_gpu=rate.times(1 / ranks / per_core),
        steps=steps,
        hours=step.times(steps / 3600) + per_image.times(evaluations * eval_images / ranks / 3600),
        checkpoint_bytes=(1 + layouts[stage].moments + averages) * FLOAT * params,
        kept_checkpoints=run.keep_checkpoints + run.keep_best,
        warnings=(),
        assumed=(*assumed, how_known, "the fractions of the data sheet's rates at the slow end are guesses"),
    )
    return _with_warnings(plan, config)


def _seconds(trace: Trace, accumulation: int, sent: int, how: Layout, cluster: Cluster) -> dict[Part, Range]:
    """Those of a step, by what they go into; `sent` bytes leave every rank."""
    seconds: dict[Part, Range] = {}
    for kernel in trace.kernels:
        took = _kernel_seconds(kernel, cluster.gpu).times(accumulation)
        seconds[kernel.group] = seconds.get(kernel.group, Range(0, 0)) + took
    params = sum(shape.numel() for shape in trace.shapes.values())
    state_share = params / (how.ranks if how.stage else 1)
    average_share = params / (how.ranks if how.stage == 3 else 1) * how.averages
    # For a parameter the optimizer reads gradient, master and moments, and writes all but the gradient.
    optimizer_bytes = (3 + 2 * how.moments) * FLOAT
    moved = optimizer_bytes * state_share + AVERAGE_BYTES * average_share + NORM_BYTES * state_share
    moving = moved / (cluster.gpu.bandwidth_gbs * 1e9)
    seconds["optimizer"] = Range(moving, moving / SLOW_BANDWIDTH)
    seconds["communication"] = _communication(sent, cluster, overlaps=how.stage == 3)
    return seconds


def total(spans: Iterable[Range]) -> Range:
    """Their sum."""
    return sum(spans, Range(0, 0))


def _precision(section: dict[str, Any]) -> Precision:
    if section.get("bf16", section.get("bfloat16", {})).get("enabled", False):
        return "bf16"
    if section.get("fp16", {}).get("enabled", False):
        return "fp16"
    return "autocast" if section.get("torch_autocast", {}).get("enabled", False) else "fp32"


def _largest(small: tuple[int, Trace], large: tuple[int, Trace], how: Layout, capacity: int) -> int:
    """`largest_micro_batch`, once for all runs that share traces, which `_trace` makes once and keeps."""
    key = id(small[1]), id(large[1]), how, capacity
    if key not in _LARGEST:
        _LARGEST[key] = largest_micro_batch(small, large, how, capacity)
    return _LARGEST[key]


_LARGEST: dict[tuple[int, int, Layout, int], int] = {}


def _traced(config: Config, images: int, precision: Precision) -> Trace:
    return _trace(config.model, images, config.data.image_size, precision, config.train.recompute)


@cache  # the runs of a study share models
def _trace(model: ModelConfig, images: int, image_size: int, precision: Precision, recompute: bool) -> Trace:
    return trace_step(model, images, image_size, precision, recompute=recompute)


def _kernel_seconds(kernel: Kernel, gpu: Gpu) -> Range:
    """A roofline at the data sheet's rates, and one at the fractions of them in `SLOW`."""
    on_tensor_cores = kernel.half and kernel.group == "matrix"
    flops = (gpu.half_tflops if on_tensor_cores else gpu.float_tflops) * 1e12
    computing, moving = kernel.flops / flops, kernel.bytes / (gpu.bandwidth_gbs * 1e9)
    slow = max(computing / SLOW[kernel.group], moving / SLOW_BANDWIDTH, LAUNCH_SECONDS)
    return Range(max(computing, moving), slow)


def _sent(trace: Trace, stage: int, ranks: int, precision: Precision) -> int:
    """Bytes that a rank sends in a step, by algorithms that send no more than they must.

    ZeRO 0 all-reduces float32 gradients; 1 and 2 all-reduce them too, since DeepSpeed reduces a bucket for all of its
    owners at once, and gather the weights; 3 reduces every gradient to its owner and gathers the weights once, as
    all of them fit into what it keeps (stage3_max_live_parameters). Autocast reduces matrices in half precision under
    ZeRO 1 to 3.
    """
    params = sum(shape.numel() for shape in trace.shapes.values())
    matrices = sum(shape.numel() for shape in trace.shapes.values() if len(shape) > 1)
    own_half = precision in ("bf16", "fp16")
    weights = (HALF if own_half else FLOAT) * params
    gradients = FLOAT * params
    if stage and precision == "autocast":
        gradients = HALF * matrices + FLOAT * (params - matrices)
    once = (ranks - 1) / ranks
    if stage == 0:
        return round(2 * once * gradients)
    return round(once * (gradients * (2 if stage < 3 else 1) + weights))


def _communication(sent: int, cluster: Cluster, *, overlaps: bool) -> Range:
    """Within the nodes first, then between GPUs of the same place in their nodes, each over a network of its own.

    DeepSpeed begins when the backward pass is over, but for ZeRO 3, whose communication may hide behind it.
    """
    ranks, gpu = cluster.ranks, cluster.gpu
    if ranks == 1:
        return Range(0, 0)
    whole = sent * ranks / (ranks - 1)
    within = whole * (cluster.gpus_per_node - 1) / cluster.gpus_per_node
    between = whole * (cluster.nodes - 1) / cluster.nodes / cluster.gpus_per_node
    seconds = within / (gpu.link_gbs * 1e9) + between / (gpu.network_gbs * 1e9)
    return Range(0 if overlaps else seconds, seconds / SLOW_LINKS)


@cache  # the index of a large dataset takes its time
def _images(data: DataConfig) -> tuple[int, int, tuple[str, ...]]:
    """Images to train and to evaluate on, and what was assumed about them."""
    try:
        return len(open_store(data, data.train_split)), len(open_store(data, data.val_split)), ()
    except InputError:
        if (Path(data.root) / MANIFEST).exists():  # it is there, and can't be used like this
            raise
        images = data.subset or IMAGENET[0]
        return images, IMAGENET[1], (f"{data.root} isn't there: it is reckoned with {images:,} images of ImageNet-1k",)


def _with_warnings(plan: Plan, config: Config) -> Plan:
    held, stage = plan.memory[plan.stage], plan.stage
    warnings = []
    if held.total > plan.capacity:
        fitting = [s for s in plan.memory if plan.largest_micro_batch[s] >= plan.micro_batch]
        ways = [f"ZeRO {fitting[0]}"] if fitting else []
        ways += ["train.accumulation", "more GPUs"] + ([] if config.train.recompute else ["train.recompute"])
        warnings.append(
            f"{plan.micro_batch} images a GPU don't fit: {held.total / 1e9:.1f} GB of {plan.capacity / 1e9:.1f} GB;"
            f" take {', '.join(ways[:-1])} or {ways[-1]}"
        )
    cheaper = plan.memory.get(0)
    if stage == 3 and cheaper and cheaper.total < SMALL_FOR_ZERO_3 * plan.capacity:
        warnings.append(
            f"ZeRO 3 makes no sense here: ZeRO 0 takes {cheaper.total / 1e9:.1f} GB of {plan.capacity / 1e9:.1f} GB,"
            " and its steps are faster"
        )
    if config.train.recompute and cheaper and held.total < SMALL_FOR_ZERO_3 * plan.capacity:
        warnings.append("train.recompute costs a third of the time, and there is memory enough to do without")
    if plan.cores_per_gpu.low > config.data.workers:
        warnings.append(
            f"data.workers is {config.data.workers} a GPU, but even the slow end needs {plan.cores_per_gpu.low:.0f}:"
            " the GPUs will wait for images; more workers, or tiled shards (convneur prepare tile), help"
        )
    parts = plan.ranks * plan.accumulation
    if config.data.lanes % parts:
        warnings.append(f"data.lanes is {config.data.lanes}, which {parts} ranks and micro-batches don't divide")
    if plan.seconds["communication"].high > plan.step_seconds.high / 2:
        warnings.append("most of the step may be communication: fewer GPUs do nearly as much")
    return Plan(**{**plan.__dict__, "warnings": tuple(warnings)})
