"""Before a job is queued: does it fit, how long will it take, and what binds it?

Memory is counted by following the model through a step on fake tensors (`convneur.trace`) and adding what DeepSpeed
0.19.8 keeps; benchmarks/planner.py holds that against real steps. Time is a range between two rooflines: every kernel
at the rates of the data sheet, and every kernel at the fractions of them in `SLOW`. Nobody has held those against a GPU
yet.

Names: P parameters, N ranks. Byte counts are for one rank, unless it says otherwise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from convneur.config import Config
from convneur.data.store import open_store
from convneur.deepspeed_config import deepspeed_config, offloads_optimizer
from convneur.errors import PlanError
from convneur.gpu import Gpu
from convneur.model import ModelConfig
from convneur.trace import HALF_BYTES, Kernel, Moment, Precision, Trace, trace_step

GIB = 2**30
STAGES = (0, 1, 2, 3)
FLOAT = 4  # bytes

# What the CUDA context, cuDNN's and NCCL's buffers take, and what the allocator can't use: a guess.
RESERVE_BYTES = 2 * GIB

# Fractions of the data sheet's rates that the slow end of the range reckons with: guesses. The recurrence of the memory
# is a chain of small float32 products.
SLOW = {"matrix": 0.4, "depthwise": 0.2, "memory": 0.1, "pointwise": 0.6}
SLOW_BANDWIDTH = 0.6
SLOW_LINKS = 0.5
LAUNCH_SECONDS = 5e-6  # eager kernels can't follow each other faster: a guess

# Images a second and core that docs/data.md has measured, with RandAugment and without, by data.interpolation.
IMAGES_PER_CORE = {True: {"bicubic": 157.0}, False: {"bicubic": 256.0, "bilinear": 324.0}}
OTHERS_PER_CORE = {True: 197.0, False: 399.0}

# ImageNet-1k: 1,281,167 images in ILSVRC2012_img_train.tar, of 147,897,477,120 bytes, and 50,000 to evaluate on.
IMAGENET_IMAGES = 1_281_167
IMAGENET_EVAL_IMAGES = 50_000
IMAGENET_BYTES_PER_IMAGE = 147_897_477_120 / IMAGENET_IMAGES


@dataclass(frozen=True)
class Memory:
    """The bytes of a rank at the moment of a step at which they are the most.

    Attributes:
        weights: what the forward pass computes with; this rank's share of it under ZeRO 3.
        optimizer: float32 masters, where the weights aren't those, and moments.
        averages: the moving average of the weights.
        gradients: of parameters, complete ones.
        buckets: DeepSpeed's buffers for reducing gradients, and copies it makes on the way.
        gathered: other ranks' parameters, under ZeRO 3.
        activations: all else: what the backward pass needs, what passes, and copies in half precision.
        memory_states: the part of the activations that are states of the neural memory.
        when: "in the forward pass", "in the backward pass" or "after the backward pass".
    """

    weights: int
    optimizer: int
    averages: int
    gradients: int
    buckets: int
    gathered: int
    activations: int
    memory_states: int
    when: str

    @property
    def total(self) -> int:
        """All of it; the states are part of the activations."""
        parts = self.weights, self.optimizer, self.averages, self.gradients, self.buckets, self.gathered
        return sum(parts) + self.activations


@dataclass(frozen=True)
class Range:
    """From the best to the worst that is to be expected, low <= high."""

    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> "Range":
        """Both ends, scaled."""
        return Range(self.low * factor, self.high * factor)

    def per(self, amount: float) -> "Range":
        """The amount divided by both ends."""
        return Range(amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Plan:
    """What is to be expected of a run.

    Attributes:
        variant: of the model.
        params: P.
        gpu: name of the GPU.
        ranks: N, one a GPU.
        nodes: machines.
        micro_batch: images of a rank and micro-batch.
        accumulation: micro-batches a step.
        precision: what the step computes in.
        stage: the ZeRO stage that is configured.
        memory: by ZeRO stage, what the micro-batch takes.
        capacity: bytes of a GPU that can be used.
        host_bytes: what an offloaded optimizer takes of the host's memory.
        largest_micro_batch: by ZeRO stage, the most images of a micro-batch that fit; 0 if none.
        compute_seconds: forward and backward passes and optimizer, a step.
        parts: the same by what the time goes into.
        comm_bytes: sent and received by a GPU, a step.
        comm_seconds: for them.
        step_seconds: both.
        images_per_second: of all ranks.
        mfu: fraction of the half-precision peak.
        binds: what takes most of the slow end's time.
        data_bytes_per_second: read by all nodes.
        loader_cores: cores a GPU that decode fast enough for the fast end, and for the slow one.
        steps: optimizer steps of the run.
        hours: of wall time, evaluation included.
        checkpoint_bytes: of one checkpoint.
        kept_bytes: of those that are kept at the same time.
        warnings: settings that make no sense, or don't work.
        assumed: what had to be assumed.
    """

    variant: str
    params: int
    gpu: str
    ranks: int
    nodes: int
    micro_batch: int
    accumulation: int
    precision: str
    stage: int
    memory: dict[int, Memory]
    capacity: int
    host_bytes: int
    largest_micro_batch: dict[int, int]
    compute_seconds: Range
    parts: dict[str, Range]
    comm_bytes: int
    comm_seconds: Range
    step_seconds: Range
    images_per_second: Range
    mfu: Range
    binds: str
    data_bytes_per_second: Range
    loader_cores: Range
    steps: int
    hours: Range
    checkpoint_bytes: int
    kept_bytes: int
    warnings: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    @property
    def gpu_hours(self) -> Range:
        """Hours of every GPU."""
        return self.hours.times(self.ranks)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        values = asdict(self) | {"gpu_hours": asdict(self.gpu_hours)}
        for stage, memory in self.memory.items():
            values["memory"][stage]["total"] = memory.total
        return values
